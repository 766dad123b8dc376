"""The local copy of one partition's state (K8): RocksDB, WAL on, sync off; the changelog is the truth.

Each settle writes the changes and the changelog offset they reach in one WriteBatch; a copy that belongs to another
topic incarnation, or is ahead of the changelog, is wiped and restored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from rocksdict import Options, Rdict, WriteBatch

from kwflow.runners.embedded import entries

__all__ = ["PartitionStore"]

_STATE, _META = b"s", b"m"


class PartitionStore:
    """A Store; `offset` is the changelog offset that the next restore starts from (0: nothing yet)."""

    def __init__(self, directory: Path, incarnation: str) -> None:
        self.directory = directory
        self.incarnation = incarnation
        self._open()
        if self._meta("incarnation") != incarnation:
            self.wipe()

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        self._db = Rdict(str(self.directory), options)

    def _meta(self, name: str) -> str:
        found: bytes | None = self._db.get(_META + name.encode())
        return (found or b"").decode()

    @property
    def offset(self) -> int:
        return int(self._meta("offset") or 0)

    def wipe(self) -> None:
        """Start from nothing."""
        self._db.close()
        shutil.rmtree(self.directory)
        self._open()
        self._db[_META + b"incarnation"] = self.incarnation.encode()

    def get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._db.get(_STATE + key)
        return found

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        for key, value in entries(self._db, _STATE + prefix):
            yield key[1:], value

    def settle(self, changes: dict[bytes, bytes | None], offset: int | None) -> None:
        """The changes, and up to where in the changelog they reach."""
        batch = WriteBatch(raw_mode=True)
        for key, value in changes.items():
            if value is None:
                batch.delete(_STATE + key)
            else:
                batch.put(_STATE + key, value)
        if offset is not None:
            batch.put(_META + b"offset", b"%d" % offset)
        self._db.write(batch)

    def close(self) -> None:
        self._db.close()
