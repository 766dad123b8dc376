"""Records that kill the process: found by counting deaths where they outlive it (K19, decision 0043).

After an unclean stop, its own or that of whoever had the partition before, the records of what may have been the fatal
batch are taken a few at a time, these few written down before their step.  Only those of a few that a process died in are
taken one by one, and one that three processes died of alone is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from kwflow.core.wire import Record
from kwflow.runners.private import replace

__all__ = ["Attempts", "Suspects"]

_ATTEMPTS_MAX = 3
_TOGETHER_MAX = 64  # a batch of thousands costs some dozen notes, and a death in one of them 64


class Suspects(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Records from `offset` to before `until` may kill; `count` processes may have died with the first of them alone."""

    offset: int
    count: int
    until: int


Note = Callable[[int, Suspects | None], None]  # of a partition; None: nothing of it is suspected


class Attempts:
    """Kept in the runner's locked directory, and `note`d where other engines find it.

    `unclean` tells whether the previous run here ended without `finished`, `fresh` whether nothing is known of one.
    """

    def __init__(self, directory: Path, note: Note = lambda *_: None) -> None:
        self._running = directory / "running"
        self._stopped = directory / "stopped"
        self._path = directory / "attempts"
        self._note = note
        self.unclean = self._running.exists()
        self.fresh = not self.unclean and not self._stopped.exists()
        self._known: dict[int, Suspects] = {}  # what processes before this one have died of
        self._mine: dict[int, Suspects] = {}  # what this one would have died of, if it had
        if self.unclean and self._path.exists():
            try:
                self._known = msgspec.json.decode(self._path.read_bytes(), type=dict[int, Suspects])
            except msgspec.DecodeError:
                self._known = {}
        self._running.touch()
        self._touched = self._running.stat()

    def learn(self, partition: int, suspects: Suspects) -> None:
        """What whoever had this partition last has noted."""
        self._known[partition] = max(suspects, self._known.get(partition, suspects))

    def suspected_until(self, partition: int) -> int:
        """Records of it before this offset, if some are left, may have killed."""
        return self._known[partition].until if partition in self._known else -1

    def another(self, partition: int, records: list[Record]) -> tuple[list[Record], str | None]:
        """Which of a partition's records, in order, come next, durably noted before their step; and why it is refused, if it is one that killed too often."""
        offset = records[0].offset
        known = self._known.get(partition)
        deaths = known.count if known is not None and known.offset == offset else 0
        if known is not None and known.offset <= offset < known.until:
            records, suspects = records[:1], Suspects(offset, deaths + 1, known.until)
        else:
            records = records[:_TOGETHER_MAX]
            suspects = Suspects(offset, int(len(records) == 1), records[-1].offset + 1)
        if self._mine.get(partition) != suspects:  # else its transaction was aborted and is made again
            self._mine[partition] = suspects
            self._save()
        self._note(partition, suspects)
        return records, None if deaths < _ATTEMPTS_MAX else "the engine died three times with this record"

    def survived(self, partition: int) -> None:
        """They were stepped, and what went wrong after that was no fault of theirs: nobody need count it."""
        suspects = self._mine.pop(partition)
        self._save()
        self._take_back(partition, suspects)

    def _take_back(self, partition: int, suspects: Suspects) -> None:
        known = self._known.get(partition)
        covered = known is not None and known.offset <= suspects.offset < known.until
        self._note(partition, msgspec.structs.replace(suspects, count=suspects.count - 1) if covered else None)

    def _save(self) -> None:
        replace(self._path, msgspec.json.encode(self._known | self._mine))

    def interrupted(self) -> None:
        """This process ends by no record's fault.  From another thread."""
        self.finished()
        for partition, suspects in self._mine.items():
            self._take_back(partition, suspects)

    def finished(self) -> None:
        """A clean stop.  In a directory that was removed, or is another engine's by now, nothing is done."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._running.stat(), self._touched):
                self._stopped.touch()
                self._running.unlink()
                self._path.unlink(missing_ok=True)
