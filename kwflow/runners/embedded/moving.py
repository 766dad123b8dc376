"""An embedded engine's directory as an archive, and an archive as a new directory (decision 0065)."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rocksdict import Rdict, WriteBatch, WriteOptions

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.wire import Output
from kwflow.errors import UsageError
from kwflow.runners import archive, rocks
from kwflow.runners.archive import CODE, LETTERS, RESUME, SCHEDULER, STATE, TIMERS, Entry, Head, Part, Sent, Tail
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.state import IMPORT, POSITION, STORE_ID, EmbeddedStore, read_only, records_of
from kwflow.runners.ended import FORGOTTEN
from kwflow.runners.groups import Group
from kwflow.runners.moved import MOVES, Due, moves_of
from kwflow.runners.private import lasting

__all__ = ["bring", "take"]

_OWN = {FORGOTTEN, MOVES, timers.COUNT}  # made anew where the state goes
_WRITTEN_MAX = 1000  # parts in one write
_NAMED_MAX = 3
_CREATED = ("IDENTITY", "LOCK", "LOG", "MANIFEST-", "OPTIONS-", "engine.pid", "00000")  # files of a database that has nothing yet


def take(config: Config, directory: Path, path: Path) -> tuple[dict[str, int], list[str]]:
    """Write the archive of a directory as it is now, even while an engine holds it.  Return what is in it, and what is not, as text.  Raises UsageError, TransportError."""
    left_out: list[str] = []
    with contextlib.closing(read_only(directory)) as db, rocks.failing(directory):
        moves = moves_of(EmbeddedStore(db, config.changelog_topic).get(MOVES))
        return archive.write(path, config, _parts(config, db, left_out), lambda: moves, time.time_ns() // 1_000_000), left_out


def _parts(config: Config, db: Rdict, left_out: list[str]) -> Iterator[Part]:
    for table, changelog in ((STATE, config.changelog_topic), (TIMERS, config.timers_changelog_topic)):
        yield from archive.entries(table, EmbeddedStore(db, changelog).scan(b""), _OWN, left_out)
    code = {record.key: record.value for record in records_of(db, config.code_topic)}
    yield from (Entry(CODE, key, value) for key, value in code.items() if key is not None and value is not None)
    for role, topic in ((SCHEDULER, config.scheduler_topic), (RESUME, config.resume_topic)):
        waiting = records_of(db, topic, int(db.get(POSITION + topic.encode()) or 0))
        yield from (Sent(role, record.key, record.value, record.headers, record.timestamp_ms) for record in waiting)
    yield from archive.letters(config, records_of(db, config.dead_letter_topic))


def bring(config: Config, path: Path, directory: Path) -> dict[str, int]:
    """Make a directory in which an engine continues what is in the archive; until it is whole, no engine starts there.  Return what is in it.  Raises UsageError, TransportError."""
    # The files are made in their place: it may be a mounted volume or a link, and its parent may belong to somebody else.
    _check_free(directory)
    found = archive.check(path, config)
    if found.calls:
        named = ", ".join(found.calls[:_NAMED_MAX])
        raise UsageError(f"{len(found.calls)} calls in {path} wait in queues ({named}), and an embedded engine has no workers; let the workers answer them, then export again")
    existed = directory.exists()
    engine = Embedded(directory, _without_encryption(config), sync=False, imports=True)
    if not _is_free(engine.db):
        engine.close()
        raise UsageError(f"{directory} is not empty any more: an engine ran there meanwhile")
    try:
        with contextlib.closing(engine), rocks.failing(directory):
            _fill(config, engine, path, found)
    except BaseException:
        _remove(directory, existed)
        raise
    lasting(directory)
    lasting(directory.absolute().parent)
    return found.counts


def _check_free(directory: Path) -> None:
    """Raises UsageError unless there is nothing in the directory, or only what an import has left that did not end."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory")
    if (directory / "CURRENT").exists():
        with contextlib.closing(read_only(directory, imports=True)) as db:
            if _is_free(db):
                return
    elif all(path.name.startswith(_CREATED) and path.suffix not in (".log", ".sst") for path in directory.iterdir()):
        return  # nothing, or a database whose creation was interrupted
    raise UsageError(f"{directory} is not empty; an archive becomes a new directory, with nothing else in it")


def _is_free(db: Rdict) -> bool:
    return db.get(IMPORT) is not None or all(key == STORE_ID for key in db.keys())


def _fill(config: Config, engine: Embedded, path: Path, found: archive.Summary) -> None:
    durable = WriteOptions()
    durable.sync = True
    first, last = WriteBatch(raw_mode=True), WriteBatch(raw_mode=True)
    first.delete_range(b"", b"\xff")  # what an import has left that was killed
    first.put(IMPORT, found.id.encode())
    engine.db.write(first, durable)
    read, due = archive.parts(path, config), Due()
    next(read)
    for some in iter(lambda: list(itertools.islice(read, _WRITTEN_MAX)), []):
        _put(config, engine, some, due)
    last.put(EmbeddedStore(engine.db, config.changelog_topic).prefix + MOVES, b"%d" % (found.moves + 1))
    if due.entry is not None:
        last.put(EmbeddedStore(engine.db, config.timers_changelog_topic).prefix + timers.COUNT, due.entry)
    last.delete(IMPORT)
    engine.db.write(last, durable)


def _remove(directory: Path, existed: bool) -> None:
    """Remove what an import that has failed leaves; what cannot be removed has its mark."""
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            path.unlink()
    if not existed:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _without_encryption(config: Config) -> Config:
    """The keys decrypt the archive; an engine that encrypts a local disk does not exist."""
    plain = config.model_copy(update={"encryption_keys": []})
    plain.__dict__.pop("cipher_keys", None)  # which may have been asked for already
    return plain


def _put(config: Config, engine: Embedded, some: Iterable[Head | Part | Tail], due: Due) -> None:
    changelogs, topics = {STATE: config.changelog_topic, TIMERS: config.timers_changelog_topic}, {RESUME: config.resume_topic, SCHEDULER: config.scheduler_topic, LETTERS: config.dead_letter_topic}
    batch, sent = WriteBatch(raw_mode=True), list[Output]()
    for part in some:
        if isinstance(part, Sent):
            sent.append(Output(topics[part.role], part.key, part.value, archive.headers_of(config, part), part.timestamp_ms))
        elif isinstance(part, Entry) and part.table == CODE:
            sent.append(Output(config.code_topic, part.key, part.value))
        elif isinstance(part, Entry):
            batch.put(EmbeddedStore(engine.db, changelogs[part.table]).prefix + part.key, part.value)
            due.see(part.key)
    engine.db.write(batch)
    engine.append_all([Group(tuple(sent))])
