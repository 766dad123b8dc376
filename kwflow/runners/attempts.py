"""Records that kill the process: found by counting attempts where they outlive it (K19).

After an unclean stop, its own or that of whoever had the partition before, the records of what may have been the fatal
batch are taken one by one, each attempt written before its step; a record that was attempted three times is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from kwflow.runners.private import replace

__all__ = ["Attempts"]

_ATTEMPTS_MAX = 3
Note = Callable[[int, int, int], None]  # partition, offset, count


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
        self._counts: dict[str, tuple[int, int]] = {}
        self._mine: dict[int, int] = {}  # partition -> the offset that this run counted last
        if self.unclean and self._path.exists():
            try:
                self._counts = msgspec.json.decode(self._path.read_bytes(), type=dict[str, tuple[int, int]])
            except msgspec.DecodeError:
                self._counts = {}
        self._running.touch()

    def learn(self, partition: int, offset: int, count: int) -> None:
        """What whoever had this partition last has counted."""
        known = self._counts.get(str(partition), (-1, 0))
        self._counts[str(partition)] = max(known, (offset, count))

    def another(self, partition: int, offset: int) -> bool:
        """Count one attempt durably, before its step; False when it was attempted too often already."""
        known, count = self._counts.get(str(partition), (offset, 0))
        if self._mine.get(partition) != offset:  # else its transaction was aborted and is made again: this process survived it
            self._mine[partition] = offset
            count = count + 1 if known == offset else 1
            self._counts[str(partition)] = (offset, count)
            replace(self._path, msgspec.json.encode(self._counts))
        self._note(partition, offset, count)
        return count <= _ATTEMPTS_MAX

    def survived(self, partition: int) -> None:
        """It was stepped, and what went wrong after that was no fault of it: the others need not count it."""
        offset, count = self._counts[str(partition)]
        self._note(partition, offset, count - 1)

    def suspects(self, partition: int, position: int) -> bool:
        """Whether the next record, or a later one, has been counted."""
        offset, count = self._counts.get(str(partition), (-1, 0))
        return bool(count) and offset >= position

    def interrupted(self) -> None:
        """This process ends by no record's fault."""
        self.finished()
        for partition in self._mine:
            self.survived(partition)

    def finished(self) -> None:
        """A clean stop."""
        self._stopped.touch()
        self._running.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
