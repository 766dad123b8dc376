"""fork and rewind: an instance continues from a saved state, present or earlier, as a second one or in its own place (decisions 0048, 0062).

Both work on headers alone: nothing is unpickled, and no code of the author's runs.
"""

from __future__ import annotations

import itertools
from typing import Any

from kwflow.core import ops, snapshot, wire
from kwflow.core.calls import REFS_A_MOVE
from kwflow.core.murmur2 import partition_of
from kwflow.core.step import applied_before, has_moved
from kwflow.core.wire import Command, Record
from kwflow.errors import ProtocolError, SnapshotError, UsageError
from kwflow.ports import Decision, RunEvent
from kwflow.runners import checkpoints, parked
from kwflow.runners.activities.dispatch import keep
from kwflow.runners.commands.holds import drain, settled
from kwflow.runners.commands.shared import Batch, done, header_of, replied

__all__ = ["fork", "rewind"]


def fork(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Copy the waiting instance under another id; each then continues on its own.  Records on hold belong to the original alone.

    The copy stays in the same partition, so both are committed in one transaction, and no snapshot travels in a record that
    anybody could have written.
    """

    def refused(status: str, why: str) -> Decision:
        return replied(batch, record, status, why, count="not-forked", log=f"{name}: not forked: {why}")

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
    made, asked, dispatch = ops.fork(header, id, record, batch.context, wire.short_header(record, "kwflow-client"), _moves(batch, header, record), list(calls.values()))
    value = {"id": id, "start_id": made["start_id"]}
    known = batch.stored(key)
    there = header_of(batch.config, id, known)
    if known is not None and there["start_id"] == made["start_id"]:  # this record was applied before
        return replied(batch, record, "ok", value=value, count="repeated")
    if known is not None and there["status"] != "ended":
        return refused("exists", f"{id} already exists")
    if "checkpoints" in there:  # of a run under its id that has ended
        made["checkpoints"] = there["checkpoints"]
    data = snapshot.copy(body, made, batch.config.signing_keys)
    batch.put(key, snapshot.park(data, {}, "paused", "", record.offset, batch.config.signing_keys) if command.arguments.paused else data)
    return done(batch, name, record, command, "ok", [Decision(tuple(asked), (f"{name}: forked as {id}",), dispatch=tuple(dispatch), runs=(RunEvent(made["workflow"], "started"),))], value=value)


def rewind(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Put the instance back to a checkpoint of its run.  The state that this replaces becomes a checkpoint, too.

    If it was parked because it had failed, the records that it holds are then applied to the earlier state; a paused one stays paused.
    """
    key, keys = name.encode(), batch.config.signing_keys
    if applied_before(header.get("applied"), record, batch.context.incarnation):  # a runner has read it twice, and what came after it would be undone
        return replied(batch, record, "ok", count="repeated")
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
        return replied(batch, record, "rejected", why, count="not-rewound", log=f"{name}: not put back: {why}")
    rewound = ops.rewind(current, earlier, record, batch.context, list(calls.values()))
    made = rewound.header
    batch.keep(key, made)
    if header["status"] != "parked":
        if moves := _moves(batch, header, record):
            made["moves"] = moves
        made["applied"] = [batch.context.incarnation, record.partition, record.offset]
    data = snapshot.copy(body, made, keys)
    if header["status"] == "parked":  # what it holds has lower offsets, and is still to be applied
        mark = header["parked"]
        reason, message = ("paused", mark["paused"]) if "paused" in mark else (mark["reason"], mark["message"])
        data = snapshot.park(data, {}, reason, message, mark["offset"], keys)
    batch.put(key, data)
    replies = tuple(wire.reply_output(batch.config.reply_topic, reply) for reply in rewound.replies)
    told = Decision((*batch.withdrawn(rewound.dispatch), *rewound.outputs), (f"{name}: put back to checkpoint {command.arguments.to}",), replies=replies, dispatch=rewound.dispatch)
    keep(batch.state, told.dispatch)  # a state that the records on hold replace is kept with these calls
    if not parked.has_failed(header):
        return done(batch, name, record, command, "ok", [told])
    applied = drain(batch, name, record, discard=False)
    status, message = settled(batch, name)
    return done(batch, name, record, command, status, [told, *applied], message)


def _moves(batch: Batch, header: dict[str, Any], record: Record) -> int:
    """How often what has this header has been moved by the time of this record (decision 0064)."""
    moved = header.get("applied") and has_moved(header["applied"], record, batch.context.incarnation)
    return ops.moves(header, batch.context.moves) if moved else max(int(header.get("moves", 0)), batch.context.moves)


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


def _free_id(batch: Batch, name: str, record: Record) -> str:
    """The first generated id that belongs to this partition; the record's offset makes it unique, and after a move a number that goes on as that of refs does (decision 0064)."""
    first = batch.context.moves * REFS_A_MOVE
    ids = (f"{name}/fork-{record.offset}" + (f"-{number}" if number > 1 else "") for number in itertools.count(first + 1))
    return next(id for id in ids if partition_of(id.encode(), batch.partitions) == record.partition)
