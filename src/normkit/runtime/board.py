"""Where the ranks of a process group note what they do, for a rank that waits to look it up.

The notes lie in the store that the group was started by. Writing one takes microseconds, and is
done before every message; they are read only by a rank that has waited long, or that may not send
before it knows what the others are about to.
"""

from __future__ import annotations

import json
import time
import weakref
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

_PATIENCE = timedelta(seconds=1)
"""So long a rank waits before it looks up what the others do, and from then on this often."""


class Note(NamedTuple):
    """What a rank is about to send as its message `number`, and what it says of itself.

    Ranks fit that send the same. One that can't send, for what it says, sends `NOTHING`.
    """

    number: int
    sends: str
    said: Any


NOTHING = ""


class Board:
    """The notes of a group's ranks; `number` counts the messages that this rank took part in."""

    def __init__(self, group: Any) -> None:
        self._store = dist.distributed_c10d._get_process_group_store(group)
        self._group = group
        self._here, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self.number = 0
        self._aside = ""

    def post(self, sends: str, said: Any = None) -> None:
        """Say what this rank is about to send."""
        self._store.set(self._key(self._here), json.dumps([self.number, sends, said or sends]))

    def aside(self, said: str, *, failed: bool) -> None:
        """Say what this rank does in place of its next message."""
        note = json.dumps([self.number, NOTHING if failed else "later", said])
        if note != self._aside:
            self._aside = note
            self._store.set(f"normkit/{self._here}/aside", note)

    def meet(self, sends: str, said: Any) -> list[Note]:
        """Every rank's note of this message, this one's among them; waits for those to come.

        Raises:
            LookupError: one failed in place of it.
            RuntimeError: one didn't come before the group's timeout.
        """
        self.post(sends, said)
        pause, ends, failed = 1e-4, time.monotonic() + self._timeout().total_seconds(), ""
        while True:
            notes = [self._read(self._key(rank)) for rank in range(self._ranks)]
            there = [note for note in notes if note is not None and note.number == self.number]
            if len(there) == self._ranks:
                return there
            if failed:
                raise LookupError(failed)
            if time.monotonic() > ends:
                raise RuntimeError(f"timed out after {self._timeout().total_seconds():.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            # Before the notes, so that a rank which failed because of these is heard with them.
            failed = self.failed()

    def wait(self, work: Any) -> None:
        """Until a collective is done; raises what it raises, LookupError if a rank failed."""
        while True:
            try:
                work.wait(_PATIENCE)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()
                    return
            if failed := self.failed():
                raise LookupError(failed)

    def failed(self) -> str:
        """Which ranks failed in place of this message, and how."""
        failed = [(rank, note) for rank, note in self._asides() if note.sends == NOTHING]
        return "; ".join(f"rank {rank}: {note.said}" for rank, note in failed)

    def doing(self) -> str:
        """What others said they do in place of this message."""
        return "".join(f"; rank {rank} {note.said}" for rank, note in self._asides())

    def _asides(self) -> list[tuple[int, Note]]:
        others = [rank for rank in range(self._ranks) if rank != self._here]
        notes = [(rank, self._read(f"normkit/{rank}/aside")) for rank in others]
        return [(rank, n) for rank, n in notes if n is not None and n.number == self.number]

    def _key(self, rank: int) -> str:
        # Two by turns: a rank is at most one message ahead of one that hasn't read its last note.
        return f"normkit/{rank}/{self.number % 2}"

    def _read(self, key: str) -> Note | None:
        return Note(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _timeout(self) -> timedelta:
        return self._group._get_backend(self._group._device_types[0]).options._timeout


_boards: weakref.WeakKeyDictionary[Any, Board] = weakref.WeakKeyDictionary()


def board(group: Any) -> Board:
    """The board of a process group; None stands for that of all ranks."""
    group = dist.group.WORLD if group is None else group
    if group not in _boards:
        _boards[group] = Board(group)
    return _boards[group]
