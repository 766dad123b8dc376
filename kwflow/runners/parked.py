"""What cannot be applied: dead letters, and parked instances with their hold (semantics §7, K17).

A parked instance keeps its last good state.  The record at fault is the head of its hold, and later records queue behind
it, as entries `\\0hold\\0<id>\\0<offset>` of the same state.  This module must not run a step.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kwflow.config import Config
from kwflow.core import children, dispatch, snapshot, wire
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output, Record, Reply
from kwflow.durable import versions
from kwflow.errors import CodeChangedError, CorruptSnapshotError, MigrationError, ProtocolError, SnapshotError, UncaughtError
from kwflow.ports import Changes, Decision, RunEvent
from kwflow.runners.instances import Page

__all__ = [
    "ADDRESS", "DRAINED_MAX", "HOLD", "SAID", "all_held", "answered", "dead", "dead_letter", "drop_head", "forward", "has_failed", "held_keys", "hold", "hold_again", "hold_all", "holding", "holds",
    "is_paused", "kept", "of_hold", "old_code", "park", "park_rest", "release", "remnant",
]  # fmt: skip

DRAINED_MAX = 500
HOLD = b"\0hold\0"
_MESSAGE_CHARACTERS = 300
_SAID_CHARACTERS = 10_000  # of an error message, which goes into a header of the dead letter and into that of the snapshot
_KEY_BYTES_MAX = 10_000
_HOLDING_MAX = 10_000
_CALLBACKS = 10  # unexpected callbacks are held in a tenth of the hold: anybody may send them, and what others send would find no room
_RAN_NOTHING_OLD = (CodeChangedError, CorruptSnapshotError, MigrationError)  # old code was not even loaded, or a migration was at fault
ADDRESS = ("kwflow-request", "kwflow-reply-to")
SAID = ("reason", "message", "topic", "partition", "offset", "timestamp", "at")  # the headers `kwflow-error-...` of a dead letter, which follow those that its record had


class _Held(Record, frozen=True):
    """A record that was taken out of a hold.  If it is put back, it returns to its `place`."""

    place: int = 0


def dead_letter(config: Config, record: Record, reason: str, message: str, received_ms: int) -> Output:
    """Build a dead letter: the record's key, value and headers, and headers that say which record it was, why it was refused and when."""
    said = (reason, message, record.topic, record.partition, record.offset, record.timestamp_ms, received_ms)
    headers = tuple((f"kwflow-error-{name}", str(value).encode("utf-8", "replace")) for name, value in zip(SAID, said, strict=True))
    return Output(config.dead_letter_topic, record.key, record.value, (*record.headers, *headers), record.timestamp_ms)


def dead(config: Config, record: Record, reason: str, message: str, received_ms: int) -> Decision:
    """Dead-letter the record alone; nothing else changes."""
    where = f"{record.topic}[{record.partition}]@{record.offset}"
    letter = dead_letter(config, record, reason, message, received_ms)
    status = reason.replace("-", "_")
    return Decision(
        (letter, *children.refused(record, status, message, config.resume_topic)), (f"dead letter {where}: {message}",), ("dead-letter",), answered(config, record, status, message)
    )


def remnant(config: Config, record: Record, reason: str, received_ms: int) -> Decision:
    """Replace a dead letter that the broker refused by one that says which record it was and why, without anything that could be too large (K11)."""
    message = f"{reason}; a dead letter with its value and headers was refused, too: they exist only in the original record"
    made = dead(config, record, "refused", message, received_ms)
    bare = msgspec.structs.replace(record, key=record.key if len(record.key or b"") <= _KEY_BYTES_MAX else None, value=None, headers=())
    letter = dead_letter(config, bare, "refused", message, received_ms)
    return msgspec.structs.replace(made, outputs=(msgspec.structs.replace(letter, timestamp_ms=received_ms), *made.outputs[1:]))


def forward(config: Config, record: Record, partitions: int, received_ms: int) -> Decision:
    """Send a record that is in the wrong partition to the one that its key belongs to, once (K6)."""
    if record.key is None or wire.header(record, "kwflow-forwarded") is not None:
        return dead(config, record, "wrong-partition", "forwarded once already", received_ms)
    headers = (*record.headers, ("kwflow-forwarded", str(record.partition).encode()))
    home = partition_of(record.key, partitions)
    return Decision((Output(record.topic, record.key, record.value, headers, record.timestamp_ms, home),), counts=("forwarded",))


def answered(config: Config, record: Record, status: str, message: str = "", value: object = None) -> tuple[Output, ...]:
    """The reply to a record that no step answers; empty if its sender waits for none."""
    try:
        address = wire.reply_address(record)
    except ProtocolError:
        return ()
    return (wire.reply_output(config.reply_topic, Reply(address, status, message, value)),) if address is not None else ()


def park(config: Config, state: Changes, name: str, stored: bytes | None, record: Record, error: BaseException, received_ms: int) -> Decision:
    """Put the instance back to `stored`, to wait for an operator; this record becomes the head of its hold."""
    reason = type(error).__name__
    message = str(error).encode("utf-8", "replace").decode()[:_SAID_CHARACTERS] or reason  # author code may have written the message
    ran = "" if stored is None or isinstance(error, _RAN_NOTHING_OLD) else "".join(f"; {said}" for said in old_code(config, name, stored))
    base = {"id": name, "workflow": _text(record, "workflow"), "start_id": _text(record, "start-id"), "created": record.timestamp_ms, "updated": record.timestamp_ms, "waits": []}
    base |= {entry: value for entry in ("client", "parent") if (value := _text(record, entry))} if stored is None else {}
    data = snapshot.park(stored, base, reason, message + ran, record.offset, config.signing_keys, record.timestamp_ms)
    state.put(name.encode(), data)
    kept, replies = _kept_and_replies(config, record, reason, message)
    _put(state, name, kept, _last(state, name)[1])
    told = dead_letter(config, record, "parked", f"{reason}: {message}", received_ms)
    in_log = error.in_log if isinstance(error, UncaughtError) else message
    run = RunEvent(snapshot.read_header(data)["workflow"], "parked")
    return Decision((told,), (f"{name} is parked: {reason}: {in_log}{ran}",), ("parked",), replies, runs=(run,))


def old_code(config: Config, name: str, stored: bytes) -> list[str]:
    """Say, in at most one sentence, that the instance runs old code, which a retry runs again."""
    try:
        run = versions.outdated(snapshot.split(stored, config.signing_keys)[0].get("code", {}))
    except SnapshotError:  # it cannot be loaded here
        return []
    return [f"it runs old code ({', '.join(run)}): kwflow code migrate {shlex.quote(name)} --in-place moves it onto the engine's"] if run else []


def _kept_and_replies(config: Config, record: Record, reason: str, message: str) -> tuple[Record, tuple[Output, ...]]:
    """Return the record as it is kept, and the reply that its sender gets now, as a retry may be days away.

    The kept record has no address for replies any more: one request gets one reply.
    """
    said, until = (f"paused ({message[:_MESSAGE_CHARACTERS]})", "unpaused") if reason == "paused" else (f"parked ({reason}: {message[:_MESSAGE_CHARACTERS]})", "retried")
    replies = answered(config, record, "held", f"it is {said}; this record is kept and applied when the instance is {until}")
    if not replies:
        return record, ()
    return msgspec.structs.replace(record, headers=tuple(pair for pair in record.headers if pair[0] not in ADDRESS)), replies


def _text(record: Record, name: str) -> str:
    """A header that a first start may have, for the entry of a parked instance; empty if it is missing, or if it is not text and the step never looked at it."""
    try:
        return (wire.parent_of(record) if name == "parent" else wire.header(record, f"kwflow-{name}")) or ""
    except ProtocolError:
        return ""


def is_paused(header: dict[str, Any]) -> bool:
    """Whether somebody paused the instance, even if it is also parked for another reason."""
    mark = header.get("parked") if header["status"] == "parked" else None
    return mark is not None and (mark["reason"] == "paused" or "paused" in mark)


def has_failed(header: dict[str, Any]) -> bool:
    """Whether an instance is parked because of a record, and nobody has paused it."""
    return header["status"] == "parked" and header["parked"]["reason"] not in ("paused", "draining") and not is_paused(header)


def is_parked(config: Config, stored: bytes | None) -> bool:
    try:
        return stored is not None and snapshot.split(stored, config.signing_keys)[0]["status"] == "parked"
    except SnapshotError:
        return False


def hold(config: Config, state: Changes, header: dict[str, Any], record: Record, received_ms: int, known: dict[str, tuple[int, int]]) -> Decision:
    """Put the record at the end of the hold.  `known` remembers, for a batch, how many records an instance holds and the place of the last.

    If the instance failed, the record's sender is told so now; if it is paused or being drained, the sender waits as the record does.  Who sends a callback,
    or answers a call of an activity, is told of a pause, too: nothing is left to do for that service, and a gateway does not lend the call again.
    """
    name: str = header["id"]
    count, last = known.get(name) or _last(state, name)
    ref = wire.answered_ref(record)
    waited = next((wait["kind"] for wait in header["waits"] if wait["ref"] == ref), None) if ref is not None else None
    is_callback = ref is not None and ref.startswith(wire.CALLBACK)
    expected = not is_callback or waited is not None
    if count >= (config.hold_max if expected else config.hold_max // _CALLBACKS):
        again = "unpause it" if is_paused(header) else "retry or discard what it holds"
        limit = "hold_max" if expected else f"hold_max / {_CALLBACKS} for a callback that it does not wait for"
        said = f"{name} already holds {count} records (limit {limit}); {again}, then retry this dead letter, or raise the limit"
        return dead(config, record, "hold-full", said, received_ms)
    mark = header["parked"]
    answers_call = waited in ("activity", "job") if waited is not None else ref is not None and wire.is_engine_id(ref)  # perhaps one that nobody waits for any more
    silent = mark["reason"] == "draining" or (mark["reason"] == "paused" and not is_callback and not answers_call)
    kept, replies = (record, ()) if silent else _kept_and_replies(config, record, mark["reason"], mark["message"])
    known[name] = count + 1, max(last, _put(state, name, kept, last))
    return Decision(counts=("held",), replies=replies)


def release(config: Config, state: Changes, name: str, record: Record) -> list[Record]:
    """Put the state back to what it was before the instance was parked, and return the first held records, in order, for the record that applies them."""
    stored = state.get(name.encode())
    state.put(name.encode(), snapshot.unpark(stored, config.signing_keys) if stored is not None else None)
    return [_in_order(one, record) for one in held(state, name)]


def _in_order(held: Record, record: Record) -> Record:
    """A held record so that its offset tells what came before what, also for what comes after `record`:

    1. An instance is parked and holds a record with the offset 5000.  Then its topic is created anew, or its state moves to another log (decision 0064).
    2. When it is retried, that record is applied: the instance has applied everything up to the offset 5000.
    3. The log has got to offset 10, and whatever comes up to 5000 would be taken for repeated.

    So one of an earlier log gets a partition that no log has, and its place as offset; so does one whose place is not its offset, as one of another log is before it.
    """
    place = held.place if isinstance(held, _Held) else held.offset
    if held.offset == place and (held.partition != record.partition or place <= record.offset):
        return held
    return msgspec.structs.replace(held, partition=-1 - held.partition, offset=place)


def held(state: Changes, name: str) -> list[Record]:
    """Take out and return the first records of the hold, as many as one transaction may apply (K17)."""
    found: list[Record] = []
    for key, value in list(itertools.islice(state.scan(_prefix(name)), DRAINED_MAX)):
        state.put(key, None)
        found.append(kept(key, value))
    return found


def held_keys(state: Changes, name: str) -> set[bytes]:
    """Return the keys of everything that it holds."""
    return {key for key, _ in state.scan(_prefix(name))}


def kept(key: bytes, value: bytes) -> Record:
    """The record of an entry of a hold.  An entry that nobody can read becomes a record of its bytes, which is dead-lettered when its turn comes."""
    place = _place(key)
    try:
        return msgspec.structs.replace(msgspec.msgpack.decode(value, type=_Held), place=place)
    except msgspec.DecodeError:
        return _Held("", 0, place, 0, of_hold(key), value, (("kwflow-op", b"unreadable"),), place)


def hold_again(state: Changes, records: Sequence[Record]) -> None:
    """Put records that were taken out, but not applied, back to their places."""
    for record in records:
        _put(state, wire.workflow_id(record), record, -1)


def hold_all(state: Changes, name: str, records: Sequence[Record]) -> None:
    """Make these records, in order, the hold of an instance that has none."""
    last = -1
    for record in records:
        last = _put(state, name, record, last)


def drop_head(state: Changes, name: str) -> Record | None:
    """Take out and return the first record of the hold; None if there is none."""
    for key, value in itertools.islice(state.scan(_prefix(name)), 1):
        state.put(key, None)
        return kept(key, value)
    return None


def all_held(state: Changes, name: str) -> Iterator[Record]:
    """Take out and yield every record of the hold."""
    while records := held(state, name):
        yield from records


def park_rest(config: Config, state: Changes, name: str) -> Output | None:
    """If records are left on the hold, park the instance again and return the command that continues; records that arrive meanwhile join the hold."""
    stored = state.get(name.encode())
    if next(iter(state.scan(_prefix(name))), None) is None or is_parked(config, stored):
        return None
    base = {"id": name, "workflow": "", "start_id": "", "waits": []}
    state.put(name.encode(), snapshot.park(stored, base, "draining", "what it held is being applied", -1, config.signing_keys))
    return Output(config.resume_topic, name.encode(), b"null", (("kwflow-op", b"retry"),))


def holds(state: Mapping[bytes, bytes]) -> dict[str, list[Record]]:
    """Id -> the records that each parked instance holds, in order, for inspection."""
    found: dict[str, list[Record]] = {}
    for key in sorted(key for key in state if key.startswith(HOLD)):
        found.setdefault((of_hold(key) or b"").decode(), []).append(kept(key, state[key]))
    return found


def of_hold(key: bytes) -> bytes | None:
    """Return the record key of the instance that holds this entry; None if it is none of a hold."""
    return key[len(HOLD) :].rpartition(b"\0")[0] if key.startswith(HOLD) else None


def holding(page: Page) -> int:
    """Count the instances that hold records, up to a limit; it takes one look into the store for each, however much that holds."""
    count, start = 0, HOLD
    while count < _HOLDING_MAX and (found := page(start, 1)) and found[0][0].startswith(HOLD):
        count, start = count + 1, found[0][0].rpartition(b"\0")[0] + b"\1"  # no id has a NUL, so this is behind all that it holds
    return count


def _prefix(name: str) -> bytes:
    return HOLD + name.encode() + b"\0"


def _place(key: bytes) -> int:
    return int(key.rpartition(b"\0")[2])


def _last(state: Changes, name: str) -> tuple[int, int]:
    """How many records are held, and the place of the last; -1 if there are none."""
    count, last = 0, b""
    for key, _ in state.scan(_prefix(name)):
        count, last = count + 1, key
    return count, _place(last) if count else -1


def _put(state: Changes, name: str, record: Record, last: int) -> int:
    """Store a record behind the last one, and return its place.

    The offset of the last one may be larger, if the instance moved to another partition or its topic was created anew.
    """
    _note_answer(state, name, record)
    place = record.place if isinstance(record, _Held) else max(record.offset, last + 1)
    state.put(_prefix(name) + b"%020d" % place, msgspec.msgpack.encode(Record(*msgspec.structs.astuple(record)[: len(Record.__struct_fields__)])))
    return place


def _note_answer(state: Changes, name: str, record: Record) -> None:
    """If the record answers a call of an activity, note that in the call's entry: otherwise each new owner of the partition would begin it again, for as long as the record is held."""
    try:
        ref = wire.answered_ref(record)
        key = dispatch.state_key(name, ref) if ref is not None and wire.is_engine_id(ref) else b""
        call = dispatch.decode(stored) if key and (stored := state.get(key)) is not None else None
    except (ProtocolError, msgspec.DecodeError, RecursionError):  # a record that killed processes and was parked unread, or an entry that was damaged
        return
    if call is not None and not call.held:
        state.put(key, dispatch.encode(msgspec.structs.replace(call, held=True)))
