"""Commands that work on stored bytes: query, terminate, pause and unpause, fork, retry and discard (M2, K17), and migrate where no step can do it.

They reach an instance that is parked or damaged, which no step could.  This module must not run a step itself: records
that were held are applied by the batch that it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from kwflow.activities import failure_payload
from kwflow.config import Config
from kwflow.core import children, messages, migration, ops, snapshot, wire
from kwflow.core.contract import Context
from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.core.murmur2 import partition_of
from kwflow.core.step import applied_before
from kwflow.core.values import json_dumps
from kwflow.core.wire import Command, Output, Record
from kwflow.durable.registry import Module
from kwflow.durable.versions import Sources
from kwflow.errors import ActivityError, KwflowBug, ProtocolError, RefusedError, SnapshotError, UsageError
from kwflow.ports import Changes, Decision
from kwflow.runners import checkpoints, parked
from kwflow.runners.activities.dispatch import keep
from kwflow.runners.deployment import moved_to

__all__ = ["apply", "refuse", "takes"]


class Batch(Protocol):
    """What a command needs from the batch it is part of."""

    config: Config
    state: Changes
    context: Context
    partitions: int
    sources: Sources

    def stored(self, key: bytes) -> bytes | None:
        """The stored bytes of this id, including everything that this batch did so far."""

    def calls(self, name: str, refs: Sequence[str]) -> dict[str, Dispatch | None]:
        """The activity calls behind these waits, by ref; None for a call that is not stored here."""

    def put(self, key: bytes, data: bytes, modules: Sequence[Module] = ()) -> None:
        """Save an instance in the place of a step; `modules` are the versions that its snapshot names, if they are not those it named before."""

    def keep(self, key: bytes, header: dict[str, Any]) -> None:
        """Keep the current state as a checkpoint, and note so in the header of the state that replaces it, if its workflow has checkpoints."""

    def drain(self, records: list[Record]) -> list[Decision]:
        """Apply held records."""

    def end(self, key: bytes, header: dict[str, Any]) -> None:
        """Replace the instance by the entry that stays after its end, or by nothing."""


def apply(batch: Batch, name: str, record: Record, command: Command) -> Decision:
    """Carry out a command, unless one with this `kwflow-id` was carried out before (M1.4) or there is no such run (M1.5).  Raises ProtocolError."""
    wire.reply_address(record)
    stored = batch.state.get(name.encode())
    header = _header(batch.config, name, stored)
    if stored is None or (command.start_id is not None and command.start_id != header["start_id"]):
        return _replied(batch, record, "not_found", count="unknown-id")
    known = header.get("ids", {}).get(command.id) if command.id is not None else None
    if known is not None:
        return _replied(batch, record, known[0], known[1], known[2], "repeated")
    if command.op == "query":
        return _replied(batch, record, "ok", value=ops.seen(header), count="queried")
    if header["status"] == "ended" and not (command.op == "fork" and command.arguments.at is not None):
        return _replied(batch, record, "not_found", "it has ended" if command.op != "rewind" else "it has ended; kwflow fork --at continues from a state before that", count="unknown-id")
    return _CHANGING[command.op](batch, name, header, record, command)


def refuse(config: Config, state: Changes, name: str, record: Record, reason: str) -> Decision:
    """Dead-letter a command whose Decision the log refused.  A discard still drops the head of the hold:

    1. A discard drops the head and applies the rest of the hold, and one of these records produces an output that no broker accepts.
    2. If the discard had no effect at all, the next one would fail in the same way, and the instance could never be settled.
    """
    letter, op, stored = parked.dead(config, record, "refused", reason, record.timestamp_ms), wire.header(record, "kwflow-op"), state.get(name.encode())
    header = _header(config, name, stored)
    if op not in ("retry", "discard") or header["status"] != "parked" or stored is None:
        return letter
    draining = header["parked"]["reason"] == "draining"
    if draining:  # nothing continues the drain now: somebody has to decide
        state.put(name.encode(), snapshot.amend(stored, config.signing_keys, parked={**header["parked"], "reason": RefusedError.__name__, "message": reason}))
    if draining or op == "retry":
        return joined([letter, Decision(counts=("parked",))]) if draining else letter
    head = parked.drop_head(state, name)
    if head is None:
        return letter
    failed = _call_failed(config, state, name, head, record)
    keep(state, failed.dispatch)
    return joined([letter, Decision(counts=("discarded",)), failed])


def _header(config: Config, name: str, stored: bytes | None) -> dict[str, Any]:
    empty = {"id": name, "workflow": "", "status": "damaged", "start_id": "", "waits": []}
    try:
        return {**empty, **snapshot.split(stored, config.signing_keys)[0]} if stored is not None else empty
    except SnapshotError:
        return empty


def _replied(batch: Batch, record: Record, status: str, message: str = "", value: object = None, count: str = "") -> Decision:
    return Decision(counts=(count,), replies=parked.answered(batch.config, record, status, message, value))


def _done(batch: Batch, name: str, record: Record, command: Command, status: str, made: Sequence[Decision] = (), message: str = "", value: object = None) -> Decision:
    """The reply, remembered in the header if the instance still has one, joined with everything else that was done.

    Lists show when the instance changed, which is now, however old the records are that it has held.
    """
    key = name.encode()
    stored = batch.state.get(key)
    left = _header(batch.config, name, stored)
    if stored is not None and left["status"] != "damaged":
        fields: dict[str, Any] = snapshot.changed(left, record.timestamp_ms) if made and command.op != "fork" else {}  # a fork does not change its original
        if command.id is not None:
            fields["ids"] = left.get("ids", {})
            messages.remember(fields["ids"], command.id, status, message, value)
        if fields:
            batch.state.put(key, snapshot.amend(stored, batch.config.signing_keys, **fields))
    mine = Decision(counts=(_COUNTED.get(command.op, command.op),), replies=parked.answered(batch.config, record, status, message, value))
    return joined([mine, *made])


def joined(made: Sequence[Decision]) -> Decision:
    """Join several decisions into one, in order."""
    return Decision(*(tuple(item for decision in made for item in getattr(decision, field)) for field in Decision.__struct_fields__))


def _terminate(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """End the run.  Records on hold meet the end: commands are answered, the rest is ignored by rule (G3)."""
    topics = batch.context.topics
    closing = ops.terminate(header, command.arguments.reason, record, topics)
    held = list(parked.all_held(batch.state, name))
    mark = header.get("parked")
    unread = header["status"] == "damaged" or (isinstance(mark, dict) and mark.get("was") == "damaged")
    earlier = checkpoints.found(batch.state, name.encode()) if unread else {}
    batch.end(name.encode(), {**closing.header, **earlier, "applied": [batch.context.incarnation, record.partition, record.offset]})
    replies = [reply for one in held for reply in parked.answered(batch.config, one, "not_found", "it was terminated before this was applied")]
    replies += [wire.reply_output(batch.config.reply_topic, reply) for reply in closing.replies]
    others = [one for one in held if dict(one.headers).get("kwflow-start-id") != header["start_id"].encode()]  # the parent of this run is answered with its end
    told = [output for one in others for output in children.refused(one, "terminated", "what ran under this id was terminated before this start was applied", batch.config.resume_topic)]
    made = Decision((*closing.outputs, *told), (f"{name}: terminated",), ("unknown-id",) * len(held), tuple(replies), closing.dispatch)
    return _done(batch, name, record, command, "ok", [made])


def _pause(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Pause: from here on the instance's records join the hold.  If it is parked already, it cannot be retried before it is unpaused."""
    key, reason = name.encode(), command.arguments.reason
    stored = batch.state.get(key)
    if header["status"] == "parked" and stored is not None:
        batch.state.put(key, snapshot.amend(stored, batch.config.signing_keys, parked={**header["parked"], "paused": reason}))
    else:
        batch.state.put(key, snapshot.park(stored, header, "paused", reason, record.offset, batch.config.signing_keys))
    return _done(batch, name, record, command, "ok", [Decision(logs=(f"{name}: paused",))])


def _unpause(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    key, stored = name.encode(), batch.state.get(name.encode())
    if not parked.is_paused(header) or stored is None:
        return _done(batch, name, record, command, "ok", message="it was not paused")
    if header["parked"]["reason"] not in ("paused", "draining"):  # it had failed before: it needs retry or discard
        batch.state.put(key, snapshot.amend(stored, batch.config.signing_keys, parked={entry: value for entry, value in header["parked"].items() if entry != "paused"}))
        return _done(batch, name, record, command, "ok", message="it is still parked; retry or discard it")
    return _done(batch, name, record, command, "ok", _drain(batch, name, record, discard=False))


def _fork(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Copy the waiting instance under another id; each then continues on its own.  Records on hold belong to the original alone.

    The copy stays in the same partition, so both are committed in one transaction, and no snapshot travels in a record that
    anybody could have written.
    """

    def refused(status: str, why: str) -> Decision:
        return joined([_replied(batch, record, status, why, count="not-forked"), Decision(logs=(f"{name}: not forked: {why}",))])

    id: str = command.arguments.id if command.arguments.id is not None else _free_id(batch, name, record)
    try:
        key = wire.key_of(id)
    except UsageError as error:
        raise ProtocolError(f"op fork: {error}", "bad-arguments") from None
    home = partition_of(key, batch.partitions)
    if home != record.partition:
        return refused("rejected", f"{id} belongs to partition {home} and {name} to {record.partition}; a fork must be in the partition of its original: let the engine choose the id, or try another")
    try:
        header, body = _state_of(batch, name, header) if command.arguments.at is None else _checkpoint(batch, name, header, command.arguments.at)
        calls = checkpoints.calls_of(header)
        if command.arguments.at is None:
            running = batch.calls(name, [wait["ref"] for wait in header["waits"] if wait["kind"] == "activity"])
            calls |= {ref: call for ref, call in running.items() if call is not None}
        if (why := ops.unforkable(header, calls)) is not None:
            return refused("rejected", why)
    except SnapshotError as error:
        return refused("rejected", str(error))
    made, asked, dispatch = ops.fork(header, id, record, batch.context.incarnation, wire.short_header(record, "kwflow-client"), batch.context.topics, list(calls.values()))
    value = {"id": id, "start_id": made["start_id"]}
    known = batch.stored(key)
    there = _header(batch.config, id, known)
    if known is not None and there["start_id"] == made["start_id"]:  # this record was applied before
        return _replied(batch, record, "ok", value=value, count="repeated")
    if known is not None and there["status"] != "ended":
        return refused("exists", f"{id} already exists")
    if "checkpoints" in there:  # of a run under its id that has ended
        made["checkpoints"] = there["checkpoints"]
    if command.arguments.paused:
        made |= _paused("", record.offset)
    batch.put(key, snapshot.copy(body, made, batch.config.signing_keys))
    return _done(batch, name, record, command, "ok", [Decision(tuple(asked), (f"{name}: forked as {id}",), dispatch=tuple(dispatch))], value=value)


def _paused(reason: str, offset: int) -> dict[str, Any]:
    """The entries in the header of a waiting instance that make it a paused one."""
    return {"status": "parked", "parked": {"reason": "paused", "message": reason, "offset": offset, "was": "waiting"}}


def _state_of(batch: Batch, name: str, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The header and body of the current state, as it was before it was parked.  Raises SnapshotError."""
    keys, stored = batch.config.signing_keys, batch.state.get(name.encode())
    if stored is not None and header["status"] == "parked":
        checkpoints.checked(header, name.encode())
        stored = snapshot.unpark(stored, keys)  # as it was before the record that parked it
    if stored is None:
        raise SnapshotError("its start failed, so there is nothing to continue from")
    header, body = snapshot.split(stored, keys)
    return checkpoints.checked(header, name.encode()), body


def _checkpoint(batch: Batch, name: str, header: dict[str, Any], number: int) -> tuple[dict[str, Any], bytes]:
    """The header and body of an earlier state.  Raises SnapshotError."""
    stored = batch.state.get(checkpoints.entry_key(name.encode(), number)) if number >= 0 else None
    if stored is not None:
        earlier, body = snapshot.split(stored, batch.config.signing_keys)
        return checkpoints.checked(earlier, name.encode()), body
    first, current = checkpoints.extent(header)
    there = f"there are {first} to {current - 1}" if current > first else "there are none; @kw.workflow(checkpoints=...) keeps them"
    raise SnapshotError(f"it has no checkpoint {number}: {there}")


def _rewind(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Put the instance back to a checkpoint of its run.  The state that this replaces becomes a checkpoint, too.

    If it was parked because it had failed, the records that it holds are then applied to the earlier state; a paused one stays paused.
    """
    key, keys = name.encode(), batch.config.signing_keys
    if applied_before(header.get("applied"), record, batch.context.incarnation):  # a runner has read it twice, and what came after it would be undone
        return _replied(batch, record, "ok", count="repeated")
    try:
        current, _ = _state_of(batch, name, header)
        earlier, body = _checkpoint(batch, name, header, command.arguments.to)
        calls, pending = checkpoints.calls_of(earlier), {ops.identity(wait) for wait in current["waits"]}
        there = {wait["ref"] for wait in earlier["waits"] if ops.identity(wait) in pending}
        why = ops.unforkable(current, [wait["ref"] for wait in current["waits"]]) or ops.unforkable(earlier, there | calls.keys())
        if current["start_id"] != earlier["start_id"]:
            why = f"checkpoint {command.arguments.to} is of an earlier run, {earlier['start_id']}; fork it"
    except SnapshotError as error:
        why = str(error)
    if why is not None:
        return joined([_replied(batch, record, "rejected", why, count="not-rewound"), Decision(logs=(f"{name}: not put back: {why}",))])
    rewound = ops.rewind(current, earlier, record, batch.context.topics, list(calls.values()))
    made = rewound.header
    batch.keep(key, made)
    if header["status"] != "parked":
        made["applied"] = [batch.context.incarnation, record.partition, record.offset]
    else:  # what it holds has lower offsets, and is still to be applied
        mark = header["parked"]
        why_paused = mark["message"] if mark["reason"] == "paused" else mark.get("paused")
        made |= {"status": "parked", "parked": {**mark, "was": "waiting"}} if why_paused is None else _paused(why_paused, mark["offset"])
    batch.put(key, snapshot.copy(body, made, keys))
    replies = tuple(wire.reply_output(batch.config.reply_topic, reply) for reply in rewound.replies)
    done = Decision(rewound.outputs, (f"{name}: put back to checkpoint {command.arguments.to}",), replies=replies, dispatch=rewound.dispatch)
    keep(batch.state, done.dispatch)  # a state that the records on hold replace is kept with these calls
    if not parked.has_failed(header):
        return _done(batch, name, record, command, "ok", [done])
    applied = _drain(batch, name, record, discard=False)
    status, message = _settled(batch, name)
    return _done(batch, name, record, command, status, [done, *applied], message)


def _free_id(batch: Batch, name: str, record: Record) -> str:
    """The first generated id that belongs to this partition; the record's offset makes it unique."""
    ids = (f"{name}/fork-{record.offset}{end}" for end in itertools.chain([""], (f"-{number}" for number in itertools.count(2))))
    return next(id for id in ids if partition_of(id.encode(), batch.partitions) == record.partition)


def takes(config: Config, op: str | None, record: Record, stored: Callable[[], bytes | None]) -> bool:
    """Whether a record with this op is carried out here, not by a step.  `stored` gives its instance, unless that is live.  Raises ProtocolError.

    A `migrate` is one if it is in place, or for an instance that has failed, which would hold it behind the record at fault.
    """
    if op != "migrate":
        return op in _OPS
    command = wire.parse(record)
    return isinstance(command, Command) and (command.arguments.in_place or parked.has_failed(_header(config, "", stored())))


def _migrate(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Move the instance to other code, ahead of what it holds; then apply that, if it was parked because it had failed.

    If it cannot be moved, nothing changes, and the sender and the log are told why.
    """
    stored = batch.state.get(name.encode())
    if stored is None:
        raise KwflowBug("a migrate of nothing")
    failed = parked.has_failed(header)
    try:
        made = _moved(batch, name, stored, record, failed) if command.arguments.in_place else _migrated(batch, name, stored, record)
    except SnapshotError as error:
        told = Decision(logs=(f"{name}: not migrated: {error}",))
        return joined([_replied(batch, record, "rejected", str(error), count="not-migrated"), told])
    if isinstance(made, str):
        return _replied(batch, record, "unchanged", made, count="not-migrated")
    status, message = _settled(batch, name) if failed else ("ok", "")
    return _done(batch, name, record, command, status, made, message)


def _moved(batch: Batch, name: str, stored: bytes, record: Record, failed: bool) -> list[Decision] | str:
    """Move the instance in place.  Returns why there is nothing to move; raises SnapshotError if it cannot be moved."""
    found = snapshot.move(stored, batch.sources, batch.config.signing_keys)
    if found is None:
        return "it runs the code of the engine that was asked; if other code has been deployed, restart the engines first"
    data, modules, frames = found
    if len(data) > batch.config.snapshot_bytes_max:
        raise SnapshotError(f"its snapshot would have {len(data)} bytes, more than snapshot_bytes_max = {batch.config.snapshot_bytes_max}")
    header = snapshot.split(data, batch.config.signing_keys)[0]
    if "checkpoints" in header:
        batch.keep(name.encode(), header)
        data = snapshot.amend(data, batch.config.signing_keys, checkpoints=header["checkpoints"])
    batch.put(name.encode(), data, modules)
    told = Decision(logs=(f"{name}: migrated in place{moved_to(frames)}",))
    return [told, *_drain(batch, name, record, discard=False)] if failed else [told]


def _migrated(batch: Batch, name: str, stored: bytes, record: Record) -> list[Decision] | str:
    """Migrate a parked instance by its `@kw.migrate` function, in a step.  Returns that it has none; raises SnapshotError if that fails."""
    key, keys = name.encode(), batch.config.signing_keys
    before = snapshot.unpark(stored, keys)
    if before is None:
        raise SnapshotError("its start failed; once it is retried, it takes the current code")
    instance = snapshot.load(before, batch.sources, keys)
    try:
        if migration.find(instance, batch.context.workflows.migrations) is None:
            return migration.nothing_for(instance)
    finally:
        instance.forget()
    batch.state.put(key, before)
    holding = parked.held_keys(batch.state, name)
    made = batch.drain([msgspec.structs.replace(record, headers=tuple(pair for pair in record.headers if pair[0] not in _ANSWERED))])
    after = _header(batch.config, name, batch.state.get(key))
    if after["status"] == "parked":
        for added in parked.held_keys(batch.state, name) - holding:
            batch.state.put(added, None)
        batch.state.put(key, stored)
        raise SnapshotError(f"{after['parked']['reason']}: {after['parked']['message']}")
    ahead = batch.state.get(key)
    if ahead is not None:  # the held records have lower offsets than this one, and are still to be applied
        batch.state.put(key, snapshot.amend(ahead, keys, applied=snapshot.split(before, keys)[0].get("applied")))
    rest = parked.park_rest(batch.config, batch.state, name)
    uncounted = [msgspec.structs.replace(one, counts=()) for one in made]
    return uncounted if rest is None else [*uncounted, Decision((rest,))]


def _retry(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Retry or discard: apply the hold in order.  Discard drops its head first, if that record has failed."""
    if header["status"] != "parked":
        said = (f"{name}: {command.op} ignored: it is not parked",)
        return joined([_replied(batch, record, "not_found", "it is not parked", count="not-parked"), Decision(logs=said)])
    if parked.is_paused(header):
        said = (f"{name}: {command.op} ignored: it is paused",)
        return joined([_replied(batch, record, "paused", "unpause it first", count="not-parked"), Decision(logs=said)])
    failed = header["parked"]["reason"] != "draining"  # while draining, an earlier command is still being completed, and the next record may be fine
    made = _drain(batch, name, record, discard=command.op == "discard" and failed)
    status, message = _settled(batch, name)
    return _done(batch, name, record, command, status, made, message)


def _settled(batch: Batch, name: str) -> tuple[str, str]:
    """Status and message of a command after which held records were applied: whether the instance is parked again, and that it runs old code, which may be why."""
    stored = batch.state.get(name.encode())
    after = _header(batch.config, name, stored)
    if parked.has_failed(after):
        return "parked", f"it is parked again: {after['parked']['reason']}: {after['parked']['message']}"
    if stored is None or after["status"] == "ended":
        return "ok", ""
    return "ok", "".join(parked.old_code(batch.config, name, stored))


def _discarded(batch: Batch, name: str, head: Record, record: Record) -> Decision:
    """Tell whoever waits for the dropped head."""
    told = children.refused(head, "discarded", "its start failed and was discarded", batch.config.resume_topic)
    mine = Decision(told, replies=parked.answered(batch.config, head, "discarded"))
    return joined([mine, _call_failed(batch.config, batch.state, name, head, record)])


def _call_failed(config: Config, state: Changes, name: str, head: Record, record: Record) -> Decision:
    """Fail the activity call whose result was dropped, so that its workflow does not wait forever.

    If the dropped record was already that failure, withdraw the call: nobody shall work on it any more.
    """
    try:
        answer = wire.parse(head)
    except ProtocolError:  # it killed processes, and was parked unread
        return Decision()
    waits = _header(config, name, state.get(name.encode()))["waits"]
    if not isinstance(answer, wire.Resume) or not any(wait["kind"] in ("activity", "job") and wait["ref"] == answer.ref for wait in waits):
        return Decision()
    if answer.failed and isinstance(answer.value, dict) and answer.value.get("type") == _DISCARDED:
        return Decision(dispatch=(Withdraw(name, str(answer.ref)),))
    error = failure_payload(ActivityError("its result was discarded", _DISCARDED, final=True))
    return Decision((Output(config.resume_topic, name.encode(), json_dumps({"ref": answer.ref, "error": error}), (), record.timestamp_ms),))


def _drain(batch: Batch, name: str, record: Record, discard: bool) -> list[Decision]:
    released = parked.release(batch.config, batch.state, name)
    header = _header(batch.config, name, batch.state.get(name.encode()))
    if header["status"] == "ended":
        batch.end(name.encode(), header)  # its retention may have expired while it was parked
    made = [_discarded(batch, name, released[0], record)] if discard and released else []
    made += batch.drain(released[1 if discard else 0 :])
    rest = parked.park_rest(batch.config, batch.state, name)
    return [*made, Decision((rest,))] if rest is not None else made


_ANSWERED = {*parked.ADDRESS, "kwflow-id"}  # headers of a command whose reply is not the step's
_DISCARDED = "Discarded"
_COUNTED = {"fork": "forked", "retry": "retried", "discard": "discarded", "rewind": "rewound", "terminate": "terminated", "pause": "paused", "unpause": "unpaused"}
_CHANGING: dict[str, Callable[[Batch, str, dict[str, Any], Record, Command], Decision]] = {
    "discard": _retry, "fork": _fork, "migrate": _migrate, "pause": _pause, "retry": _retry, "rewind": _rewind, "terminate": _terminate, "unpause": _unpause,
}  # fmt: skip
_OPS = {"query", *_CHANGING}
