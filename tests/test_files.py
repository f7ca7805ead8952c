"""Files that are written whole or not at all."""

import os

import pytest

from normkit.common.errors import LabError
from normkit.common.files import check_writable, write


def test_a_file_is_replaced_in_one_step_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    for content in ("ä", b"\x00\xff", memoryview(b"more")):
        write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    held = path.open("rb")
    write(path, "new")
    assert held.read() == b"more"  # who reads the old file reads on in it
    held.close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk):
    path = tmp_path / "file"
    for old in (None, "old"):
        if old:
            path.write_text(old)
        with full_disk(), pytest.raises(LabError, match=r"can't write .*file: File too large"):
            write(path, "new" * 99)
        assert os.listdir(tmp_path) == ["file"] * (old is not None)
    assert path.read_text() == "old"


def test_links_devices_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check_writable(tmp_path / "link")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    check_writable(null)
    write(null, "gone")
    assert os.path.realpath(null) == "/dev/null"
    assert not (tmp_path / "real").is_symlink()
    with pytest.raises(LabError, match="can't write /dev/full: No space left on device"):
        write(null.with_name("full").parent / "/dev/full", "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "it is a folder"),
        ("none/file", "there is no folder"),
        ("old/below", "there is no folder"),
        ("x" * 256, "File name too long"),
        ("\0", "null byte"),
    ],
    ids=["a folder", "no folder", "a file for a folder", "too long", "a zero"],
)
def test_what_cannot_be_written_is_told_before_and_nothing_stays(name, said, tmp_path):
    (tmp_path / "old").write_text("old")
    for attempt in (check_writable, lambda path: write(path, "x")):
        with pytest.raises(LabError, match="can't write"):
            attempt(tmp_path / name)
    with pytest.raises(LabError, match=said):
        check_writable(tmp_path / name)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_name_as_long_as_it_may_be_is_taken(tmp_path):
    path = tmp_path / ("x" * 255)
    for _ in range(2):
        check_writable(path)
        write(path, "x")
    assert os.listdir(tmp_path) == [path.name]
