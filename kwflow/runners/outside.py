"""The stored data of an application, for programs that are not its engine: reading it, embedded or on Kafka, and writing as commands do.

Nothing here disturbs an engine: an embedded directory is opened read-only beside the engine that holds it, or that engine is
asked over its socket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from kwflow.config import Config
from kwflow.core import wire
from kwflow.core.wire import Record
from kwflow.errors import TransportError, UsageError
from kwflow.runners.checkpoints import Extent, entry_key, extent, number_of, of_checkpoint, prefix_of
from kwflow.runners.code import CodeStore
from kwflow.runners.embedded.socket import submit, submit_all
from kwflow.runners.embedded.state import EmbeddedStore, read_only, records_of
from kwflow.runners.groups import Group
from kwflow.runners.instances import Filter, Found, header_of, newest_of
from kwflow.runners.parked import HOLD, kept

__all__ = [
    "Entry", "Wanted", "Write", "all_snapshots", "asked", "checkpoints", "code_store", "entry", "instances", "missing", "read", "send", "snapshots", "sole_writer", "states", "stored", "text_of",
]  # fmt: skip


def send(settings: Config, embedded: Path | None, id: str, value: bytes, headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
    """Write one record to the resume topic, embedded or on Kafka.  It is durable when this returns."""
    if embedded is not None:
        submit(embedded, settings.resume_topic, wire.key_of(id), value, headers)
        return
    from kwflow.runners.kafka.link import send

    send(settings, settings.resume_topic, wire.key_of(id), value, headers)


Write = Callable[[Sequence[Group]], Iterator[bool]]
_GROUPS_MAX = 100  # in one batch, during which an embedded engine does nothing else
_GROUPS_BYTES_MAX = 1_000_000  # a request has at most 16 MB, base64 included, and a transaction must end within 10 s, even over a slow line


@contextlib.contextmanager
def sole_writer(settings: Config, embedded: Path | None, name: str) -> Iterator[Write]:
    """Yield `write(groups)`, which yields for each group in turn whether it was written.

    Read inside of this what is to be done: on Kafka, an earlier writer can write nothing more by then.
    """
    if embedded is not None:
        yield lambda groups: (bool(offsets) for some in _parts(groups) for offsets in submit_all(embedded, some))
        return
    from kwflow.runners.kafka.writer import SoleWriter

    with SoleWriter(settings, name) as writer:

        def write(groups: Sequence[Group]) -> Iterator[bool]:
            for some in _parts(groups):
                yield from (True for _ in writer.write_each(some))

        yield write


def _parts(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Split groups into parts, each as large as one request may be."""
    part: list[Group] = []
    left = _GROUPS_BYTES_MAX
    for group in groups:
        size = sum(len(output.key or b"") + len(output.value or b"") + wire.header_bytes(output.headers) for output in group.records)
        if part and (len(part) >= _GROUPS_MAX or size > left):
            yield part
            part, left = [], _GROUPS_BYTES_MAX
        part.append(group)
        left -= size
    if part:
        yield part


def read(settings: Config, embedded: Path | None, topic: str, start: int = 0) -> Iterator[Record]:
    """Yield every committed record that a topic still has, from an offset on."""
    if embedded is None:
        from kwflow.runners.kafka.link import read

        yield from read(settings, topic, start=start)
        return
    with contextlib.closing(read_only(embedded)) as db:
        yield from records_of(db, topic, start)


Wanted = Callable[[bytes, bytes], bool]  # (key, value) -> whether to keep the entry: of a million entries few shall be in memory


def states(settings: Config, embedded: Path | None, wanted: Wanted = lambda key, value: True) -> dict[bytes, bytes]:
    """Every entry of the workflows' state, including the engine's own, whose keys begin with NUL."""
    if embedded is None:
        from kwflow.runners.kafka.link import latest

        return latest(settings, settings.changelog_topic, kept=lambda key, value: value if wanted(key, value) else None)
    with contextlib.closing(read_only(embedded)) as db:
        return {key: value for key, value in EmbeddedStore(db, settings.changelog_topic).scan(b"") if wanted(key, value)}


def snapshots(settings: Config, embedded: Path | None, wanted: Wanted = lambda key, value: True) -> dict[bytes, bytes]:
    """Id -> stored bytes of every instance."""
    return states(settings, embedded, lambda key, value: not key.startswith(b"\0") and wanted(key, value))


def all_snapshots(settings: Config, embedded: Path | None) -> dict[bytes, bytes]:
    """The same, and the entries of all checkpoints."""
    return states(settings, embedded, lambda key, value: not key.startswith(b"\0") or of_checkpoint(key) is not None)


class Entry(msgspec.Struct, frozen=True):
    """The stored bytes of one instance, or of a checkpoint of it; the number of records on its hold, and the first of these; and its checkpoints."""

    data: bytes
    holds: int
    held: list[Record]
    checkpoints: Extent


def entry(settings: Config, embedded: Path | None, id: str, held_max: int, at: int | None = None) -> Entry | None:
    """Return an instance with at most `held_max` of its held records, or its checkpoint `at`; None if there is no such instance or checkpoint."""
    key = id.encode("utf-8", "surrogateescape")
    prefix, earlier = HOLD + key + b"\0", entry_key(key, at or 0)
    found = _entries(settings, embedded, key, {key}, prefix) if at is None else _entries(settings, embedded, key, {key, earlier})
    held = [entry for entry in sorted(found.items()) if entry[0].startswith(prefix)]
    data = found.get(key if at is None else earlier)
    if data is None or key not in found:
        return None
    return Entry(data, len(held), [kept(*entry) for entry in held[:held_max]], extent(header_of(found[key])))


def checkpoints(settings: Config, embedded: Path | None, id: str) -> dict[int, bytes]:
    """The checkpoints of an instance by number, in order."""
    key = wire.key_of(id)
    return {number_of(found): value for found, value in sorted(_entries(settings, embedded, key, (), prefix_of(key)).items())}


def stored(settings: Config, embedded: Path | None, id: str, at: int | None = None) -> bytes:
    """The stored bytes of one instance, or of its checkpoint `at`.  Raises UsageError if there is no such instance or checkpoint."""
    key = wire.key_of(id)
    wanted = key if at is None else entry_key(key, at)
    found = _entries(settings, embedded, key, {wanted}).get(wanted)
    if found is None:
        raise missing(id, at)
    return found


def missing(id: str, at: int | None) -> UsageError:
    """Return the error that says that there is no such instance, or no such checkpoint of it."""
    return UsageError(f"no instance {id!r}" if at is None else f"{id!r} has no checkpoint {at}; kwflow checkpoints {id} lists those that there are")


def _entries(settings: Config, embedded: Path | None, of: bytes, keys: Collection[bytes], prefix: bytes | None = None) -> dict[bytes, bytes]:
    """These entries, and all with this prefix, of the partition that the record key `of` belongs to."""
    if embedded is not None:
        with contextlib.closing(read_only(embedded)) as db:
            store = EmbeddedStore(db, settings.changelog_topic)
            found = {key: value for key in keys if (value := store.get(key)) is not None}
            return found | dict(store.scan(prefix)) if prefix is not None else found
    from kwflow.runners.kafka.link import latest, partition_for

    def kept(key: bytes, value: bytes) -> bytes | None:
        return value if key in keys or (prefix is not None and key.startswith(prefix)) else None

    return latest(settings, settings.changelog_topic, partition_for(settings, settings.changelog_topic, of), kept)


def code_store(settings: Config, embedded: Path | None) -> CodeStore:
    """The stored sources, as an engine reads them."""
    if embedded is not None:
        return CodeStore(lambda offset: list(read(settings, embedded, settings.code_topic, offset)), settings.signing_keys)
    from kwflow.runners.kafka import topics
    from kwflow.runners.kafka.code import CodeTopic

    topics.partitions_of(topics.admin(settings), settings)  # raises within `client_connect_s` if there is no broker, and says why
    return CodeStore(CodeTopic(settings).read, settings.signing_keys)


def instances(settings: Config, embedded: Path | None, wanted: Filter, limit: int | None, note: Callable[[str], None]) -> Found:
    """The newest of the selected instances: from the engines that own them, if all of them answer; otherwise from the changelog, and a note says why."""
    if embedded is not None:
        with contextlib.closing(read_only(embedded)) as db:
            entries = EmbeddedStore(db, settings.changelog_topic).scan(wanted.prefix)
            return newest_of((row for key, data in entries if not key.startswith(b"\0") and (row := wanted.row(key, data)) is not None), limit)
    from kwflow.runners.kafka import asking
    from kwflow.runners.kafka.link import each_latest

    answer = asking.list_(settings, note, wanted, limit)
    if answer is not None:
        return answer
    rows = each_latest(settings, settings.changelog_topic, lambda key, data: _row(key, data, wanted))
    return newest_of((msgspec.json.decode(row) for row in rows), limit)


def asked(settings: Config, embedded: Path | None, wanted: Filter, limit: int) -> Found:
    """The same, but without reading a whole changelog.  Raises TransportError if an engine does not answer."""
    if embedded is not None:
        return instances(settings, embedded, wanted, limit, lambda _: None)
    from kwflow.runners.kafka import asking

    notes: list[str] = []
    answer = asking.list_(settings, notes.append, wanted, limit)
    if answer is None:
        raise TransportError(f"{'; '.join(notes)}: engines started with --http list their instances")
    return answer


def _row(key: bytes, data: bytes, wanted: Filter) -> bytes | None:
    """What to keep of an entry until it is known to be the last one of its id."""
    row = wanted.row(key, data) if not key.startswith(b"\0") else None
    return msgspec.json.encode(row) if row is not None else None


def text_of(data: bytes | None) -> str:
    """The value of a record, for people."""
    return "null" if data is None else data.decode("utf-8", "backslashreplace")
