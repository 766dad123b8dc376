"""Commands that work on stored bytes (M2): query, terminate, and those in heartbeats.py, holds.py, copies.py and moves.py.

They reach an instance that is parked or damaged, which no step could.  This package must not run a step itself: records
that were held are applied by the batch that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kwflow.config import Config
from kwflow.core import children, ops, snapshot, wire
from kwflow.core.wire import Command, Record
from kwflow.errors import RefusedError
from kwflow.ports import Changes, Decision, RunEvent
from kwflow.runners import checkpoints, parked
from kwflow.runners.activities.dispatch import keep
from kwflow.runners.commands.copies import fork, rewind
from kwflow.runners.commands.heartbeats import heartbeat
from kwflow.runners.commands.holds import call_failed, pause, retry, unpause
from kwflow.runners.commands.moves import migrate
from kwflow.runners.commands.shared import Batch, done, header_of, joined, replied

__all__ = ["apply", "joined", "refuse", "takes"]


def apply(batch: Batch, name: str, record: Record, command: Command) -> Decision:
    """Carry out a command, unless one with this `kwflow-id` was carried out before (M1.4) or there is no such run (M1.5).  Raises ProtocolError."""
    wire.reply_address(record)
    stored = batch.state.get(name.encode())
    header = header_of(batch.config, name, stored)
    if stored is None or (command.start_id is not None and command.start_id != header["start_id"]):
        return replied(batch, record, "not_found", count="unknown-id")
    known = header.get("ids", {}).get(command.id) if command.id is not None else None
    if known is not None:
        return replied(batch, record, known[0], known[1], known[2], "repeated")
    if command.op == "query":
        return replied(batch, record, "ok", value=ops.seen(header, command.arguments.ref), count="queried")
    if header["status"] == "ended" and not (command.op == "fork" and command.arguments.at is not None):
        return replied(batch, record, "not_found", "it has ended" if command.op != "rewind" else "it has ended; kwflow fork --at continues from a state before that", count="unknown-id")
    return _CHANGING[command.op](batch, name, header, record, command)


def takes(config: Config, op: str | None, record: Record, stored: Callable[[], bytes | None]) -> bool:
    """Whether a record with this op is carried out here, not by a step.  `stored` gives its instance, unless that is live.  Raises ProtocolError.

    A `migrate` is one if it is in place, or for an instance that has failed, which would hold it behind the record at fault.
    """
    if op != "migrate":
        return op in _OPS
    command = wire.parse(record)
    return isinstance(command, Command) and (command.arguments.in_place or parked.has_failed(header_of(config, "", stored())))


def refuse(config: Config, state: Changes, name: str, record: Record, reason: str) -> Decision:
    """Dead-letter a command whose Decision the log refused.  A discard still drops the head of the hold:

    1. A discard drops the head and applies the rest of the hold, and one of these records produces an output that no broker accepts.
    2. If the discard had no effect at all, the next one would fail in the same way, and the instance could never be settled.
    """
    letter, op, stored = parked.dead(config, record, "refused", reason, record.timestamp_ms), wire.header(record, "kwflow-op"), state.get(name.encode())
    header = header_of(config, name, stored)
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
    failed = call_failed(config, state, name, head, record)
    keep(state, failed.dispatch)
    return joined([letter, Decision(counts=("discarded",)), failed])


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
    began_ms = header.get("created", record.timestamp_ms)
    run = RunEvent.ended(header["workflow"], closing.header["outcome"]["kind"], began_ms, record.timestamp_ms)
    made = Decision((*closing.outputs, *told), (f"{name}: terminated",), ("unknown-id",) * len(held), tuple(replies), closing.dispatch, runs=(run,))
    return done(batch, name, record, command, "ok", [made])


_CHANGING: dict[str, Callable[[Batch, str, dict[str, Any], Record, Command], Decision]] = {
    "discard": retry, "fork": fork, "heartbeat": heartbeat, "migrate": migrate, "pause": pause, "retry": retry, "rewind": rewind, "terminate": _terminate, "unpause": unpause,
}  # fmt: skip
_OPS = {"query", *_CHANGING}
