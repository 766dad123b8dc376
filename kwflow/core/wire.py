"""Records in and out, and what a record on the input topic means.

All functions are total: bytes from outside become a value or a ProtocolError, never anything else.  Every rule about the
bytes of a record lives here.  This module must not know instances or tasks.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import msgspec

from kwflow.core.encrypted import check_decrypted
from kwflow.core.values import MESSAGE_LEVELS, check_levels
from kwflow.errors import ProtocolError, UsageError

__all__ = [
    "CALLBACK",
    "DELAY_MS_MAX",
    "ID_CHARACTERS_MAX",
    "KEPT_WHILE_PAUSED",
    "OPS",
    "REASON_CHARACTERS_MAX",
    "UNREADABLE",
    "Address",
    "Command",
    "Heartbeat",
    "Output",
    "Reason",
    "Record",
    "Reply",
    "Resume",
    "Signal",
    "SignalStart",
    "Start",
    "Update",
    "answered_ref",
    "check_size",
    "given_headers",
    "header",
    "header_bytes",
    "is_engine_id",
    "is_topic",
    "key_of",
    "parent_of",
    "parse",
    "reply_address",
    "reply_output",
    "short_header",
    "shown_headers",
    "travelling_headers",
    "workflow_id",
]

Headers = tuple[tuple[str, bytes | None], ...]
CALLBACK = "callback-"  # refs that begin with it may be answered by anybody who knows them: `POST /callbacks/ID/REF` of a gateway asks for no token
DELAY_MS_MAX = 10 * 366 * 24 * 3600 * 1000  # ten years: a longer delay is a mistake in units
UNREADABLE = ("kwflow-unreadable", b"")  # in place of headers whose names are not UTF-8
REASON_CHARACTERS_MAX = 1000
_Text = Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Ttl = Annotated[int, msgspec.Meta(gt=0, le=DELAY_MS_MAX)]
ID_CHARACTERS_MAX = 1200  # ids of runs, requests and commands: a child's start id holds its parent's id and a ref
_ID_BYTES_MAX = 512  # wire.md §4: an id is a state key and part of a timer key
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_ENGINE_ID = re.compile(r"\d+:\d+\Z")


class Record(msgspec.Struct, frozen=True):
    """One record as it was read; `offset` identifies it within (topic, partition)."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class Output(msgspec.Struct, frozen=True):
    """One record to write.  `timestamp_ms` and `partition` are chosen by the runner if they are None."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    timestamp_ms: int | None = None
    partition: int | None = None


class Start(msgspec.Struct, frozen=True):
    """`new:<json>`: start a workflow (KW-2).  `workflow` None means the default one."""

    options: object
    workflow: str | None


class Resume(msgspec.Struct, frozen=True):
    """`{"ref", "value"|"error"}`: answer a wait (KW-3).  `ref` None is ignored by rule (KW-5)."""

    ref: str | None
    value: object
    failed: bool


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of cancel, terminate, pause and unpause.  The JSON `null` means the same as `{}`."""

    reason: _Text = ""


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments: `null` or `{}`."""


class SignalStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Signal-with-start: what to start if the id is not running."""

    workflow: _Name | None = None
    input: Any = None


class Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of a signal.  It expires `ttl_ms` after the timestamp of its record."""

    name: _Name
    value: Any = None
    ttl_ms: _Ttl | None = None
    start: SignalStart | None = None


class Fork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of fork: the id of the copy, where None leaves the choice to the engine; the checkpoint to continue from, if it is not the current state; and whether it begins paused."""

    id: str | None = None
    at: int | None = None
    paused: bool = False


class Rewind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of rewind: the number of the checkpoint."""

    to: int


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the attempt of an activity whose answer this ref waits for says of its progress."""

    ref: str
    details: Any


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of query: the ref of the activity's call whose heartbeat is asked for, instead of everything."""

    ref: str | None = None


class Migrate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of migrate: whether to move the instance in place, instead of by a function of `@kw.migrate`."""

    in_place: bool = False


class Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of an update."""

    name: _Name
    value: Any = None


OPS: dict[str, type[msgspec.Struct]] = {
    "cancel": Reason, "discard": Nothing, "fork": Fork, "heartbeat": Heartbeat, "migrate": Migrate, "pause": Reason, "query": Query, "retry": Nothing, "rewind": Rewind, "signal": Signal,
    "terminate": Reason, "unpause": Reason, "update": Update,
}  # fmt: skip
KEPT_WHILE_PAUSED = frozenset({"cancel", "resume", "signal", "update"})  # what a paused instance keeps, and replies to when it is unpaused; `resume` answers a wait, but for callbacks and calls


class Command(msgspec.Struct, frozen=True):
    """A record with the header `kwflow-op` (M1, M2).  `id` makes it idempotent; `start_id` limits it to that run of the workflow id."""

    op: str
    arguments: Any
    id: str | None
    start_id: str | None


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Who waits for a reply (M1.2)."""

    partition: int
    process: str
    request: str


class Reply(msgspec.Struct, frozen=True):
    """The reply to a command; `value` is plain JSON."""

    to: Address
    status: str
    message: str = ""
    value: object = None


def header(record: Record, name: str) -> str | None:
    """Return the last header of that name as text, or None (Kafka allows repeated names; the last one was added last).  Raises ProtocolError."""
    for key, value in reversed(record.headers):
        if key == name and value is not None:
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                raise ProtocolError(f"header {name} is not UTF-8", "bad-header") from None
    return None


def workflow_id(record: Record) -> str:
    """Return the record's key as a workflow id: 1 to 512 UTF-8 bytes without NUL and `|`.  Raises ProtocolError."""
    if record.key is None:
        raise ProtocolError("the record has no key", "null-key")
    return _id_of(record.key)


def key_of(id: str) -> bytes:
    """Return the key of the records for this workflow.  Raises UsageError for what is not a workflow id."""
    try:
        key = id.encode()
        _id_of(key)
    except (ProtocolError, UnicodeEncodeError) as error:
        raise UsageError(f"{id!r}: {error}") from None
    return key


@functools.lru_cache(maxsize=100_000)  # the same keys come again and again, and are checked in several places
def _id_of(key: bytes) -> str:
    if not 1 <= len(key) <= _ID_BYTES_MAX:
        raise ProtocolError(f"a workflow id has 1 to {_ID_BYTES_MAX} bytes, not {len(key)}", "bad-key")
    if b"\0" in key or b"|" in key:
        raise ProtocolError("a workflow id must not contain NUL or |", "bad-key")
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("the key is not UTF-8", "bad-key") from None


def parse(record: Record) -> Start | Resume | Command:
    """Return what a record on the input topic asks for.  Raises ProtocolError."""
    if record.value is None:
        raise ProtocolError("the record has no value", "null-value")
    op = header(record, "kwflow-op") if record.headers else None
    if op is not None:
        return _command(op, record.value, record)
    if record.value.startswith(b"new:"):
        return Start(_json(record.value[4:]), header(record, "kwflow-workflow"))
    message = _json(record.value)
    if not isinstance(message, dict):
        raise ProtocolError("a resume is a JSON object", "bad-message")
    ref = message.get("ref")
    failed = "error" in message
    return Resume(ref if isinstance(ref, str) else None, message["error"] if failed else message.get("value"), failed)


def answered_ref(record: Record) -> str | None:
    """The ref that the record answers; None for any other record.  Raises ProtocolError."""
    message = parse(record)
    return message.ref if isinstance(message, Resume) else None


def header_bytes(headers: Headers) -> int:
    """Return the total size of the headers in bytes; names count in characters."""
    return sum([len(name) + len(value or b"") for name, value in headers]) if headers else 0


def check_size(record: Record, value_bytes_max: int, header_bytes_max: int) -> None:
    """Raises ProtocolError for a record that exceeds a limit, that could not be decrypted, or whose headers could not be read.  Such a record is not parsed."""
    check_decrypted(record.value)
    if record.headers and UNREADABLE in record.headers:
        raise ProtocolError("the name of a header is not UTF-8, so none of the headers could be read; send the record again without it", "bad-header")
    if record.value is not None and len(record.value) > value_bytes_max:
        raise ProtocolError(
            f"the value has {len(record.value)} bytes, more than {value_bytes_max} (limit value_bytes_max); send a reference or raise the limit, then retry the dead letter",
            "too-large",
        )
    if record.headers and (size := header_bytes(record.headers)) > header_bytes_max:
        raise ProtocolError(
            f"the headers have {size} bytes, more than {header_bytes_max} (limit header_bytes_max); put data into the value or raise the limit, then retry the dead letter",
            "too-large",
        )


def _command(op: str, value: bytes, record: Record) -> Command:
    arguments = OPS.get(op)
    if arguments is None:
        raise ProtocolError(f"unknown op {op[:100]!r}; there are: {', '.join(OPS)}", "unknown-op")
    try:
        decoded = arguments() if value == b"null" and arguments in (Fork, Migrate, Query, Reason, Nothing) else msgspec.json.decode(value, type=arguments)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"op {op}: {error}", "bad-arguments") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"op {op}: not JSON: {error}", "bad-json") from None
    _check_message(value)
    return Command(op, decoded, short_header(record, "kwflow-id"), short_header(record, "kwflow-start-id"))


def short_header(record: Record, name: str) -> str | None:
    """Return a header that holds an id of 1 to 1,200 characters, or None.  Raises ProtocolError."""
    text = header(record, name)
    if text is not None and not 1 <= len(text) <= ID_CHARACTERS_MAX:
        raise ProtocolError(f"header {name} has 1 to {ID_CHARACTERS_MAX} characters, not {len(text)}", "bad-header")
    return text


def reply_address(record: Record) -> Address | None:
    """Return where the sender waits for the reply, or None if it does not.  Raises ProtocolError for a malformed address."""
    if not record.headers:
        return None
    request, place = short_header(record, "kwflow-request"), short_header(record, "kwflow-reply-to")
    if request is None and place is None:
        return None
    partition, slash, process = (place or "").partition("/")
    if request is None or not slash or not process or not partition.isdecimal() or len(partition) > 9:
        raise ProtocolError("a sender that waits for a reply must send kwflow-request: <uuid> and kwflow-reply-to: <partition>/<process uuid>", "bad-header")
    return Address(int(partition), process, request)


def parent_of(record: Record) -> str | None:
    """Return `<parent id>|<ref>` of a start that a parent wrote, or None.  Raises ProtocolError."""
    if not record.headers or record.value is None or not record.value.startswith(b"new:"):
        return None
    parent = short_header(record, "kwflow-parent")
    if parent is not None and ("|" not in parent.strip("|") or "\0" in parent):
        raise ProtocolError("kwflow-parent is <parent id>|<ref>", "bad-header")
    return parent


def reply_output(topic: str, reply: Reply) -> Output:
    """Return the record that carries the reply; its key is the process that waits on that partition."""
    value = {"request": reply.to.request, "status": reply.status, "message": reply.message, "value": reply.value}
    return Output(topic, reply.to.process.encode(), msgspec.json.encode(value), (), None, reply.to.partition)  # the value is plain JSON and was checked; here it is one level deeper


def _json(data: bytes) -> object:
    try:
        value: object = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}", "bad-json") from None
    _check_message(data)
    return value


def _check_message(data: bytes) -> None:
    try:
        check_levels(data, 2 * MESSAGE_LEVELS)  # a value that was written inside one message may be put into another
    except ValueError as error:
        raise ProtocolError(str(error), "bad-json") from None


def travelling_headers(record: Record) -> Headers:
    """Return the headers of the input that outputs propagate: all but our own (semantics §9.3)."""
    return tuple(pair for pair in record.headers if not pair[0].startswith("kwflow-")) if record.headers else ()


def given_headers(headers: Any, ours: Collection[str] = ()) -> Headers:
    """Return headers from a mapping or pairs, whose values are text, bytes or None.

    Raises UsageError or TypeError for anything else, and UsageError for kwflow-* names other than `ours`.
    """
    try:
        pairs = [(name, value) for name, value in (headers.items() if isinstance(headers, Mapping) else headers)]
    except (TypeError, ValueError):
        raise TypeError(f"headers must be a mapping, or pairs of a name and a value, not {headers!r}") from None
    checked = []
    for name, value in pairs:
        if not isinstance(name, str) or "\0" in name or name != name.encode("utf-8", "ignore").decode():  # librdkafka's binding would end the process, or cut the name off
            raise UsageError(f"header {name!r}: a name must be UTF-8 text without NUL")
        if name.startswith("kwflow-") and name not in ours:
            raise UsageError(f"header {name!r}: kwflow-* headers belong to the engine")
        if value is not None and not isinstance(value, (str, bytes)):
            raise TypeError(f"header {name!r} must be str, bytes or None, not {type(value).__name__}")
        try:
            checked.append((name, value.encode() if isinstance(value, str) else value))
        except UnicodeEncodeError:
            raise UsageError(f"header {name!r}: its text cannot be encoded as UTF-8; pass bytes") from None
    return tuple(checked)


def shown_headers(headers: Headers) -> dict[str, str | None]:
    """Return the last value of each name; bytes that are not UTF-8 are escaped, and a header without a value is None."""
    return {name: None if value is None else value.decode("utf-8", "backslashreplace") for name, value in headers}


def is_topic(name: object) -> bool:
    """Whether a topic could have this name: letters, digits, '.', '_' and '-'."""
    return isinstance(name, str) and _TOPIC.fullmatch(name) is not None


def is_engine_id(ref: str) -> bool:
    """Whether a ref id has the form `<offset>:<n>`, which is reserved for the engine (semantics §9.2)."""
    return _ENGINE_ID.match(ref) is not None
