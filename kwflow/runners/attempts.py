"""Records that kill the process: found by counting deaths in a place that outlives the process (K19, decision 0043).

After an unclean stop, of this engine or of the partition's previous owner, the records of what may have been the fatal
batch are taken a few at a time, and each group is noted before its step.  If a process dies in such a group, its records are
taken one by one.  A record that three processes died of, each while it stepped that record alone, is refused.
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
_TOGETHER_MAX = 64  # a batch of thousands of records costs a few dozen notes; a death in one group costs 64 more


class Suspects(msgspec.Struct, frozen=True, array_like=True, order=True):
    """The records from `offset` up to, but not including, `until` may kill; `count` processes may have died while they stepped the first of them alone."""

    offset: int
    count: int
    until: int


Note = Callable[[int, Suspects | None], None]  # (partition, its suspects); None: nothing in it is suspected


class Attempts:
    """The suspects of this process, kept in the runner's locked directory and passed to `note`, which puts them where other engines find them.

    `unclean` is true if the previous run in this directory ended without a call of `finished`; `fresh` if there is no sign of a previous run.
    """

    def __init__(self, directory: Path, note: Note = lambda *_: None) -> None:
        self._running = directory / "running"
        self._stopped = directory / "stopped"
        self._path = directory / "attempts"
        self._note = note
        self.unclean = self._running.exists()
        self.fresh = not self.unclean and not self._stopped.exists()
        self._known: dict[int, Suspects] = {}  # what earlier processes may have died of
        self._mine: dict[int, Suspects] = {}  # what this process will have died of, if it dies now
        if self.unclean and self._path.exists():
            try:
                self._known = msgspec.json.decode(self._path.read_bytes(), type=dict[int, Suspects])
            except msgspec.DecodeError:
                self._known = {}
        self._running.touch()
        self._touched = self._running.stat()

    def learn(self, partition: int, suspects: Suspects) -> None:
        """Take over what the last owner of this partition has noted."""
        self._known[partition] = max(suspects, self._known.get(partition, suspects))

    def suspected_until(self, partition: int) -> int:
        """The offset before which the remaining records of this partition may have killed a process; -1 if none are suspected."""
        return self._known[partition].until if partition in self._known else -1

    def another(self, partition: int, records: list[Record]) -> tuple[list[Record], str | None]:
        """Return the records of a partition that come next, in order, durably noted before their step; and why the first one is refused, if it killed too often."""
        offset = records[0].offset
        known = self._known.get(partition)
        deaths = known.count if known is not None and known.offset == offset else 0
        if known is not None and known.offset <= offset < known.until:
            records, suspects = records[:1], Suspects(offset, deaths + 1, known.until)
        else:
            records = records[:_TOGETHER_MAX]
            suspects = Suspects(offset, int(len(records) == 1), records[-1].offset + 1)
        if self._mine.get(partition) != suspects:  # if equal, the transaction was aborted and is being repeated
            self._mine[partition] = suspects
            self._save()
        self._note(partition, suspects)
        return records, None if deaths < _ATTEMPTS_MAX else "the engine died three times with this record"

    def survived(self, partition: int) -> None:
        """Record that the noted records were stepped: whatever went wrong afterwards was not their fault, and must not be counted as a death."""
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
        """This process ends for a reason that is no record's fault.  Called from another thread."""
        self.finished()
        for partition, suspects in list(self._mine.items()):  # a copy: the call may return just now, and its thread goes on
            self._take_back(partition, suspects)

    def finished(self) -> None:
        """Record a clean stop.  Does nothing if the directory was removed, or belongs to another engine by now."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._running.stat(), self._touched):
                self._stopped.touch()
                self._running.unlink()
                self._path.unlink(missing_ok=True)
