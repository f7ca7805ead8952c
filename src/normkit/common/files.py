"""Files written whole or not at all: an old one stays until its successor is complete."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from normkit.common.errors import LabError


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file in the place of what is there; text is UTF-8.

    The file that `path` leads to is replaced in one step, and its permissions are kept; a device or
    a pipe is written into.

    Raises:
        LabError: it can't be written; an old file is then as it was.
    """
    with _told(path):
        data = content.encode() if isinstance(content, str) else content
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        with _part(target) as (part, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, part)
            os.replace(part, target)


def check_writable(path: Path) -> None:
    """Prove that `write` can write there, before the work whose result it is to hold.

    Raises:
        LabError: it can't, as for a folder, a missing folder, a name that the file system refuses.
    """
    with _told(path):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError("it is a folder; name a file")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {target.parent}")
        if target.is_file():
            with _part(target):
                pass
        elif not target.exists():
            target.open("xb").close()
            target.unlink()


@contextmanager
def _part(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `target`, gone at the end."""
    # A name of its own length: one that the target's name is part of could be too long.
    part = target.with_name(f".normkit-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield part, file
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LabError(f"can't write {path}: {reason}") from None
