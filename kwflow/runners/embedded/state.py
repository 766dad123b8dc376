"""The layout of an embedded engine's database, and reading it, even beside the engine that holds it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rocksdict import AccessType, Options, Rdict

from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.runners.rocks import entries, failing

__all__ = ["IMPORT", "LOG", "NEXT", "POSITION", "STORE_ID", "EmbeddedStore", "changelogs_of", "check_imported", "ends_of", "read_only", "records_of"]

LOG, NEXT, POSITION = b"L", b"N", b"P"  # prefixes, per topic: its records; the offset that the next one gets; the offset of the first one that no committed batch contains
IMPORT = b"A"  # there while an archive is imported
STORE_ID = b"I"  # the id of this log, from its creation to its deletion
_VIEW_S = 10  # how long it is tried to read a database that an engine writes to
_STATE = b"S"  # prefix, followed by the name of a changelog: a processor's state


class EmbeddedStore:
    """A Store: one processor's state in the database."""

    def __init__(self, db: Rdict, name: str) -> None:
        self._db = db
        self.prefix = _STATE + name.encode() + b"\0"

    def get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._db.get(self.prefix + key)
        return found

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        for key, value in entries(self._db, self.prefix + prefix, self.prefix + max(prefix, start)):
            yield key[len(self.prefix) :], value


def read_only(directory: Path, imports: bool = False) -> Rdict:
    """Open the database as it is now, even while an engine holds it.  Raises TransportError if there is none or, unless asked for `imports`, only a part of an archive."""
    if not (directory / "CURRENT").exists():
        raise TransportError(f"{directory} holds no embedded engine")
    # 1. RocksDB reads which tables there are, and opens them; meanwhile the engine writes a log to a table, deletes the log, and goes on in the next one.
    # 2. RocksDB reads the logs that are there, and takes it for no error that the first one is missing.
    # 3. The view has what was written last, and lacks what was written before: a backup would be without some of the workflows.
    give_up = time.monotonic() + _VIEW_S
    while True:
        logs, tables = _logs(directory), _tables(directory)
        try:
            with failing(directory):
                db = Rdict(str(directory), Options(raw_mode=True), access_type=AccessType.read_only())
        except TransportError:
            if tables == _tables(directory) or time.monotonic() > give_up:
                raise
            continue  # one was merged into another, and deleted before it was opened
        if logs <= _logs(directory):
            break
        db.close()
        if time.monotonic() > give_up:
            raise TransportError(f"{directory} cannot be read while an engine writes so much to it; stop the engine, or try again")
    if not imports:
        check_imported(db, directory)
    return db


def _tables(directory: Path) -> tuple[str, int]:
    """What changes with each change of the tables: the name and the size of the manifest that lists them."""
    try:
        name = (directory / "CURRENT").read_text().strip()
        return name, (directory / name).stat().st_size
    except OSError:  # between the old manifest and the new one, or lost
        return "", 0


def check_imported(db: Rdict, directory: Path) -> None:
    """Raises TransportError, and closes the database, if it has only a part of an archive."""
    if db.get(IMPORT) is not None:
        db.close()
        raise TransportError(f"{directory}: an archive was imported only in part; finish it with kwflow import, or remove the directory", retryable=False)


def _logs(directory: Path) -> set[str]:
    """The files of what is in no table yet.  Logs are deleted in their order, so the view is whole if those from before it are still there."""
    return {path.name for path in directory.glob("*.log")}


def records_of(db: Rdict, topic: str, offset: int = 0) -> Iterator[Record]:
    """Yield the records of a topic that are still there, from this offset on, oldest first."""
    prefix = LOG + topic.encode() + b"\0"
    for _, value in entries(db, prefix, prefix + b"%020d" % offset):
        yield msgspec.msgpack.decode(value, type=Record)


def changelogs_of(db: Rdict) -> list[str]:
    """The names of the changelogs that have entries."""
    found, start = list[str](), _STATE
    while (key := next((key for key, _ in entries(db, _STATE, start)), None)) is not None:
        name = key[len(_STATE) : key.index(b"\0")]
        found.append(name.decode())
        start = _STATE + name + b"\1"
    return found


def ends_of(db: Rdict, topics: Sequence[str]) -> dict[str, int]:
    """Topic -> the offset that its next record gets."""
    return {topic: int(db.get(NEXT + topic.encode()) or 0) for topic in topics}
