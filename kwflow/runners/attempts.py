"""Records that kill the process: found by counting attempts in a file that outlives it (K19).

After an unclean stop the records of what may have been the fatal batch are taken one by one, each attempt written with
fsync before its step; a record that was attempted three times is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

__all__ = ["Attempts"]

_ATTEMPTS_MAX = 3


class Attempts:
    """Kept in the runner's locked directory.  `unclean` tells whether the previous run ended without `finished`."""

    def __init__(self, directory: Path) -> None:
        self._running = directory / "running"
        self._path = directory / "attempts"
        self.unclean = self._running.exists()
        self._counts: dict[str, tuple[int, int]] = {}
        self._mine: dict[int, int] = {}  # partition -> the offset that this run counted last
        if self.unclean and self._path.exists():
            try:
                self._counts = msgspec.json.decode(self._path.read_bytes(), type=dict[str, tuple[int, int]])
            except msgspec.DecodeError:
                self._counts = {}
        self._running.touch()

    def another(self, partition: int, offset: int) -> bool:
        """Count one attempt durably, before its step; False when it was attempted too often already."""
        known, count = self._counts.get(str(partition), (offset, 0))
        if self._mine.get(partition) == offset:
            return count <= _ATTEMPTS_MAX  # its transaction was aborted and is made again: this process survived it
        self._mine[partition] = offset
        count = count + 1 if known == offset else 1
        self._counts[str(partition)] = (offset, count)
        with open(self._path, "wb") as file:
            file.write(msgspec.json.encode(self._counts))
            file.flush()
            os.fsync(file.fileno())
        return count <= _ATTEMPTS_MAX

    def finished(self) -> None:
        """A clean stop."""
        self._running.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
