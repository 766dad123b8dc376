"""An archive: everything that an application's workflows are, in one file, from which another application continues them (decision 0065).

The file is gzip.  In it are parts, each a length (u32, big-endian) and msgpack: a Head, then entries of the state, records and
calls in queues in any order, and a Tail with how many there are.  With `encryption_keys`, everything between these two is
encrypted as values on a broker are.  This module knows the file; where parts come from and go to is known by kafka/ and embedded/.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec

import kwflow
from kwflow.config import Config
from kwflow.core import dispatch, snapshot, timers
from kwflow.core.encrypted import is_encrypted, wrong_with
from kwflow.core.wire import Headers, Record
from kwflow.errors import SnapshotError, TransportError, UsageError
from kwflow.runners.code import WRITTEN
from kwflow.runners.instances import header_of
from kwflow.runners.letters import open_in, renamed
from kwflow.runners.moved import home_of
from kwflow.runners.private import lasting

__all__ = [
    "CODE", "LETTERS", "RESUME", "SCHEDULER", "STATE", "TIMERS", "Call", "Entry", "Head", "Part", "Sent", "Summary", "check", "described", "entries", "headers_of", "letters", "parts", "queue_of",
    "write",
]  # fmt: skip

Table = Literal["state", "timers", "code"]
Role = Literal["resume", "scheduler", "dead-letter"]  # of a topic
STATE: Table = "state"
TIMERS: Table = "timers"
CODE: Table = "code"
RESUME: Role = "resume"
SCHEDULER: Role = "scheduler"
LETTERS: Role = "dead-letter"
_VERSION = 1
_PART_BYTES_MAX = 1 << 30
_NAMED_MAX = 3
_KEY_SHOWN = 100
_LEVEL = 1  # of gzip: a higher one takes three times as long for a tenth less


class Head(msgspec.Struct, frozen=True, array_like=True, tag="kwflow archive"):
    """What the file is; `id` tells one archive from another."""

    version: int
    id: str
    application_id: str
    kwflow: str
    created_ms: int
    encrypted: bool


class Entry(msgspec.Struct, frozen=True, array_like=True, tag="entry"):
    """An entry of a table."""

    table: Table
    key: bytes
    value: bytes


class Sent(msgspec.Struct, frozen=True, array_like=True, tag="sent"):
    """A record of a topic with this role: one that was not applied yet, or an open dead letter."""

    role: Role
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """A call that is in a queue and not answered."""

    queue: str
    call: dispatch.Dispatch


class Tail(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """That the file is whole, what is in it, and how often the state was moved before (moved.py)."""

    counts: dict[str, int]
    moves: int


Part = Entry | Sent | Call
_decoder = msgspec.msgpack.Decoder(Head | Entry | Sent | Call | Tail)
_encoder = msgspec.msgpack.Encoder()


class Summary(msgspec.Struct, frozen=True):
    """What `check` found: how many there are of each, the queues of calls, and some calls that only workers can answer."""

    id: str
    counts: dict[str, int]
    moves: int
    queues: list[str]
    calls: list[str]


def _counted(part: Part) -> Iterator[str]:
    """The words under which a part counts, for people."""
    if isinstance(part, Call):
        yield "calls in queues"
    elif isinstance(part, Sent):
        yield "open dead letters" if part.role == LETTERS else "records that are not applied yet"
    elif part.table == CODE:
        yield "modules"
    elif part.table == TIMERS:
        if part.key.startswith(timers.DUE):
            yield "timers"
    elif part.key.startswith(dispatch.PREFIX):
        yield "calls of activities"
    elif not part.key.startswith(b"\0"):
        status = header_of(part.value).get("status", "parked")
        yield "ended" if status == "ended" else "instances"
        if status == "parked":
            yield "parked or paused"


_ORDER = ("instances", "parked or paused", "ended", "timers", "calls of activities", "calls in queues", "records that are not applied yet", "open dead letters", "modules")


def described(counts: dict[str, int]) -> str:
    """What is in an archive, as text."""
    return ", ".join(f"{counts[word]} {word}" for word in _ORDER if counts.get(word)) or "nothing"


def write(path: Path, config: Config, made: Iterable[Part], moves: Callable[[], int], now_ms: int) -> dict[str, int]:
    """Write an archive of these parts; it is there, durable and readable by its user alone, only once it is whole.  Return what is in it.  `moves` is asked at the end.

    Raises UsageError if the file exists or would have nothing in it, TransportError if it cannot be written, and whatever `made` raises.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; give the archive another name, or remove it")
    new = path.with_name(f"{path.name}.{os.getpid()}.part")
    counts = Counter[str]()
    seal = _sealing(config)
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            with gzip.GzipFile("", "wb", _LEVEL, file, now_ms / 1000) as zipped:
                _put(zipped, _encoder.encode(Head(_VERSION, uuid.uuid4().hex, config.application_id, kwflow.__version__, now_ms, seal is not None)))
                for part in made:
                    counts.update(_counted(part))
                    counts["parts"] += 1
                    encoded = _encoder.encode(part)
                    _put(zipped, encoded if seal is None else seal(encoded))
                if not counts:
                    raise UsageError(f"there is nothing of the application {config.application_id} to export (is application_id right?)")
                _put(zipped, _encoder.encode(Tail(dict(counts), moves())))
            file.flush()
            os.fsync(file.fileno())
        _named(new, path)
    except FileExistsError:
        raise UsageError(f"{path} was created meanwhile; give the archive another name") from None
    except OSError as error:
        raise TransportError(f"{path} cannot be written: {error.strerror}", retryable=False) from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
    return dict(counts)


def _named(new: Path, path: Path) -> None:
    """Give the file its name, durably, and without overwriting another one.  Raises OSError."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as FAT and some that are mounted from elsewhere
        if os.path.lexists(path):
            raise FileExistsError from None
        new.rename(path)
    lasting(path.parent)


def _put(file: gzip.GzipFile, part: bytes) -> None:
    file.write(struct.pack(">I", len(part)) + part)


def _sealing(config: Config) -> Callable[[bytes], bytes] | None:
    if not config.cipher_keys:
        return None
    from kwflow.runners.kafka.encryption import Encryption

    encryption = Encryption(config)
    return lambda part: encryption.encrypt("", part, own=True)[0] or b""


def _unsealing(path: Path, config: Config) -> Callable[[bytes], bytes]:
    from kwflow.runners.kafka.encryption import Encryption

    encryption = Encryption(config)

    def unseal(part: bytes) -> bytes:
        found = encryption.decrypt(part) or b""
        if is_encrypted(found):
            raise UsageError(f"{path}: {wrong_with(found)}")
        return found

    return unseal


def parts(path: Path, config: Config) -> Iterator[Head | Part | Tail]:
    """Yield what is in an archive, the Head first.  Raises UsageError that says why a file is none, or not whole."""
    try:
        with gzip.open(path, "rb") as file:
            head = _next(file, path)
            if not isinstance(head, Head):
                raise UsageError(f"{path} is not an archive of kwflow")
            if head.version != _VERSION:
                raise UsageError(f"{path} is an archive of version {head.version}, which kwflow {kwflow.__version__} does not know; it was written by {head.kwflow}")
            yield head
            unseal = _unsealing(path, config) if head.encrypted else None
            while not isinstance(part := _next(file, path, unseal), Tail):
                if isinstance(part, Head):
                    raise UsageError(f"{path} is damaged: it begins twice")
                yield part
            yield part
            if file.read(1):
                raise UsageError(f"{path} is damaged: something follows its end")
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UsageError(f"{path} cannot be read: {error}") from None


def _next(file: IO[bytes] | gzip.GzipFile, path: Path, unseal: Callable[[bytes], bytes] | None = None) -> Head | Part | Tail:
    length = file.read(4)
    if len(length) < 4:
        raise UsageError(f"{path} is not whole: its end is missing; export again")
    (size,) = struct.unpack(">I", length)
    part = file.read(size) if size <= _PART_BYTES_MAX else b""
    try:
        found: Head | Part | Tail = _decoder.decode(unseal(part) if unseal is not None and is_encrypted(part) else part)
        return found
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not an archive of kwflow, or is damaged: {error}") from None


def check(path: Path, config: Config) -> Summary:
    """Read an archive to its end before anything is done with it.  Raises UsageError also if its snapshots are signed by keys that `config` has not, or not signed although it has keys."""
    read = parts(path, config)
    head = next(read)
    queues, calls, tail, number = set[str](), list[str](), Tail({}, 0), 0
    signed = _Seals(config)
    for part in read:
        if isinstance(part, Tail):
            tail = part
            continue
        number += 1
        if isinstance(part, Call):
            queues.add(part.queue)
            calls.append(f"{part.call.name} of {part.call.workflow_id} in {part.queue}")
        elif isinstance(part, Entry) and part.table == STATE:
            if part.key.startswith(dispatch.PREFIX) and (queue := queue_of(part)):
                queues.add(queue)
            elif not part.key.startswith(b"\0"):
                signed.see(part)
    if not isinstance(head, Head) or tail.counts.get("parts", 0) != number:
        raise UsageError(f"{path} is damaged: it has {number} parts and says {tail.counts.get('parts', 0)}")
    signed.check(path)
    return Summary(head.id, tail.counts, tail.moves, sorted(queues), calls)


def entries(table: Table, found: Iterable[tuple[bytes, bytes]], own: Collection[bytes], left_out: list[str]) -> Iterator[Entry]:
    """What an archive has of a table: all but those of its `own` that every partition makes anew, and those that this version does not know, which it adds to `left_out`."""
    for key, value in found:
        if home_of(key) is not None or key.startswith(WRITTEN):
            yield Entry(table, key, value)
        elif key not in own:
            left_out.append(f"an entry with the key {key[:_KEY_SHOWN]!r} is left out: this version of kwflow does not know what it is")


def letters(config: Config, found: Iterable[Record]) -> Iterator[Sent]:
    """The open letters among the records of the dead-letter topic."""
    names = {config.resume_topic: RESUME, config.scheduler_topic: SCHEDULER}  # the target's topics may have other names
    for letter in open_in(found).values():
        yield Sent(LETTERS, letter.key, letter.value, renamed(letter.headers, names), letter.timestamp_ms)


def headers_of(config: Config, part: Sent) -> Headers:
    """The headers of a record for this application."""
    return renamed(part.headers, {RESUME: config.resume_topic, SCHEDULER: config.scheduler_topic}) if part.role == LETTERS else part.headers


def queue_of(entry: Entry) -> str:
    """The queue whose call this entry is; "" if it is none, its answer is kept already, or nobody can read it."""
    try:
        call = dispatch.decode(entry.value) if entry.key.startswith(dispatch.PREFIX) else None
        return call.queue if call is not None and not call.held else ""
    except (msgspec.DecodeError, RecursionError):
        return ""


class _Seals:
    """Whether an engine with this config would load the snapshots: otherwise all of them would be parked."""

    def __init__(self, config: Config) -> None:
        self._known = {snapshot.key_id(key) for key in config.signing_keys if key != snapshot.UNSIGNED}
        self._unsigned = not self._known or snapshot.UNSIGNED in config.signing_keys
        self._refused: list[tuple[str, str]] = []

    def see(self, entry: Entry) -> None:
        try:
            name = snapshot.read_header(entry.value).get("key")
        except SnapshotError:  # damaged where it comes from, and parked there
            return
        if name not in self._known if name is not None else not self._unsigned:
            self._refused.append((entry.key.decode("utf-8", "replace"), f"signed with key {name}" if name is not None else "not signed"))

    def check(self, path: Path) -> None:
        if self._refused:
            ids = ", ".join(f"{id} is {how}" for id, how in self._refused[:_NAMED_MAX])
            raise UsageError(f"{len(self._refused)} snapshots in {path} would be parked: {ids}; set the snapshot_keys of the application that it is from (and snapshot_unsigned, if it had none)")
