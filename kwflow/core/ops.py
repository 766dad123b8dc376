"""Ops that run no author code: what a query shows, how an instance is ended, and how it is copied, from its header alone (M2, M3).

So they also work on an instance that is parked, whose code is gone, or whose body is damaged.  This module must not know
stores or the bytes of snapshots: a header goes in, data comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from kwflow.core import children, outcomes, queues, updates, wire
from kwflow.core.calls import timer_key
from kwflow.core.contract import Context, Topics
from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.core.values import json_dumps
from kwflow.core.wire import Address, Output, Record, Reply

__all__ = [
    "Closing", "Rewound", "details_of", "forget_heartbeats", "fork", "heartbeats", "heartbeats_of", "identity", "moves", "place_of", "rewind", "seen", "terminate", "unforkable",
]  # fmt: skip

_SHOWN = (
    "id", "workflow", "status", "start_id", "created", "updated", "ended", "status_value", "outcome", "parked", "cancel", "client", "parent", "forked", "mailbox", "checkpoints",
    "heartbeats",
)  # fmt: skip
_WAITS_SHOWN_MAX = 100
_OF_ONE_RUN = ("client", "parent", "ids", "updates", "parked", "checkpoints", "calls", "moves")  # who started it, sent it something or waits for it, and its past


class Closing(msgspec.Struct, frozen=True):
    """What ending an instance does: records to write, calls to withdraw after the commit, replies, and the header of the entry that stays (K20)."""

    outputs: tuple[Output, ...]
    dispatch: tuple[object, ...]
    replies: tuple[Reply, ...]
    header: dict[str, Any]


class Rewound(msgspec.Struct, frozen=True):
    """What putting an instance back does: its header then, records to write, calls to withdraw and to make, and replies."""

    header: dict[str, Any]
    outputs: tuple[Output, ...]
    dispatch: tuple[object, ...]
    replies: tuple[Reply, ...]


def seen(header: dict[str, Any], ref: str | None = None) -> dict[str, Any]:
    """Return the answer to a query: the header without the engine's own entries.  `waits` are the first 100 of `waits_total`.

    With a ref, it has of them and of the heartbeats only what is under this ref: each of many calls asks for its own, and one
    with all of them may have a megabyte.
    """
    if ref is not None:
        told = [wait for wait in header.get("waits", []) if wait["ref"] == ref]
        given = {name: heartbeat for name, heartbeat in heartbeats_of(header).items() if name == ref}
        header = {name: header[name] for name in ("id", "workflow", "status", "start_id") if name in header} | {"waits": told} | ({"heartbeats": given} if given else {})
    shown = {name: header[name] for name in _SHOWN if name in header}
    waits = header.get("waits", [])
    return {**shown, "waits": waits[:_WAITS_SHOWN_MAX], "waits_total": len(waits)}


def heartbeats(header: dict[str, Any], given: wire.Heartbeat, at_ms: int) -> dict[str, Any] | None:
    """Return the last heartbeats of all calls, with this one; None if no activity's answer is waited for under this ref."""
    if not any(wait["ref"] == given.ref and wait["kind"] in ("activity", "job") for wait in header["waits"]):
        return None
    return {**heartbeats_of(header), given.ref: {"at": at_ms, "details": given.details}}


def heartbeats_of(header: dict[str, Any]) -> dict[str, Any]:
    """The last heartbeats of all calls, by ref."""
    known: dict[str, Any] = header.get("heartbeats", {})
    return known


def details_of(header: dict[str, Any], ref: str) -> Any:
    """The last details that the call behind this ref gave; None if there are none."""
    given = heartbeats_of(header).get(ref)
    return given["details"] if given is not None else None


def forget_heartbeats(header: dict[str, Any], waits: Collection[str]) -> None:
    """Drop those of calls that are not waited for any more."""
    left = {ref: heartbeat for ref, heartbeat in heartbeats_of(header).items() if ref in waits}
    del header["heartbeats"]
    if left:
        header["heartbeats"] = left


def _timer(header: dict[str, Any], wait: dict[str, Any], record: Record, topics: Topics) -> tuple[list[Output], list[object]]:
    return [Output(topics.scheduler, timer_key(header["id"], wait["ref"]), b"0", wire.travelling_headers(record), record.timestamp_ms)], []


def _activity(header: dict[str, Any], wait: dict[str, Any], record: Record, topics: Topics) -> tuple[list[Output], list[object]]:
    return [], [Withdraw(header["id"], wait["ref"])]


def _child(header: dict[str, Any], wait: dict[str, Any], record: Record, topics: Topics) -> tuple[list[Output], list[object]]:
    return children.parent_closed_header(header, wait, record, topics.resume), []


def _job(header: dict[str, Any], wait: dict[str, Any], record: Record, topics: Topics) -> tuple[list[Output], list[object]]:
    return [Output(wait["queue"], queues.key_of(header["id"], wait["ref"]), None, wire.travelling_headers(record), record.timestamp_ms)], []


TELL: dict[str, Callable[[dict[str, Any], dict[str, Any], Record, Topics], tuple[list[Output], list[object]]]] = {
    "activity": _activity, "child": _child, "job": _job, "timer": _timer,
}  # fmt: skip  # by kind of wait: how to tell whoever works for it


def _give_up(header: dict[str, Any], waits: list[dict[str, Any]], record: Record, topics: Topics) -> tuple[list[Output], list[object]]:
    """Tell whoever works for these waits that nobody waits any more: records to write, and calls to withdraw."""
    outputs: list[Output] = []
    dispatch: list[object] = []
    for wait in waits:
        tell = TELL.get(wait["kind"])
        if tell is not None:
            told = tell(header, wait, record, topics)
            outputs += told[0]
            dispatch += told[1]
    return outputs, dispatch


def _answered(updates: dict[str, Any], status: str, message: str) -> list[Reply]:
    """Answer everybody who waits for these updates."""
    return [Reply(msgspec.convert(address, Address), status, message) for waiting in updates.values() for address in waiting["to"]]


def terminate(header: dict[str, Any], reason: str, record: Record, topics: Topics) -> Closing:
    """End an instance now.  Whoever works for its waits is told; an error record is written, unless the workflow already has an outcome."""
    outputs, dispatch = _give_up(header, header.get("waits", []), record, topics)
    replies = _answered(header.get("updates", {}), "ended", "it was terminated")
    kept = {name: value for name, value in header.items() if name not in ("v", "status", "waits", "code", "lowering", "parked", "created", "updated", "mailbox", "updates", "heartbeats")}
    if "outcome" not in header:
        value = json_dumps(f"Terminated: {reason}" if reason else "Terminated")
        if topics.error is not None:
            headers = (
                *wire.travelling_headers(record), *outcomes.run_headers(header["start_id"], header),
                ("kwflow-failure-type", b"Terminated"), ("kwflow-outcome", b"terminated"),
            )  # fmt: skip
            outputs.append(Output(topics.error, header["id"].encode(), value, headers, record.timestamp_ms))
        if "parent" in header:
            outputs.append(children.answer(header["parent"], header["id"], "terminated", value, topics.resume, len(value) + 10_000, record.timestamp_ms))
        kept["outcome"] = outcomes.kept("terminated", value)
    return Closing(tuple(outputs), tuple(dispatch), tuple(replies), {**kept, "ended": record.timestamp_ms})


def moves(header: dict[str, Any], known: int) -> int:
    """The number of moves of an instance that has just moved, to a partition whose state was moved `known` times."""
    return max(int(header.get("moves", 0)) + 1, known)


def place_of(record: Record, moves: int) -> str:
    """What tells a record from every other one of its application: `<partition>-<offset>`, and how often the state was moved, as offsets begin anew then (decision 0064)."""
    return f"{record.partition}-{record.offset}" + (f"-{moves}" if moves else "")


def identity(wait: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a wait of one state from those of another: not its ref alone, as offsets begin anew when a topic is recreated (semantics §9.2)."""
    return wait["ref"], wait["kind"], wait["since"]


def unforkable(header: dict[str, Any], there: Collection[str] = ()) -> str | None:
    """Return why nobody can continue from here; None if somebody can.  What the refs `there` wait for is still to come, or can be asked for again."""
    if header["status"] != "waiting":
        return {"closing": "it has ended and is cleaning up", "ended": "it has ended"}.get(header["status"], f"it is {header['status']}")
    if header["workflow"].startswith("kwflow."):
        return "it belongs to kwflow: both would start the same runs, and no command could address the second; add another schedule with kwflow schedule add"
    for wait in header["waits"]:
        if wait["ref"] in there:
            continue
        if wait["kind"] == "child":
            return f"it waits for its child {wait['child']}, which reports its end only to {header['id']}, and only once; continue from another state"
        if wait["kind"] == "timer" and "due" not in wait:
            return "it was saved by an earlier version of kwflow, which did not store when timers are due; continue from the state after its next step (an unread signal causes one)"
        if wait["kind"] == "job":
            return f"only the queue {wait['queue']} has the arguments of its call of {wait['name']}; continue from a state without it, or declare @kw.workflow(checkpoints=...)"
        if wait["kind"] == "activity":
            return f"the call of its activity {wait['ref']} is not stored here"
        if wait["kind"] not in _FORKABLE:
            return f"it has a {wait['kind']} pending, which this version of kwflow does not know"
    return None


def fork(
    header: dict[str, Any], id: str, record: Record, context: Context, client: str | None, moves: int, calls: Sequence[Dispatch]
) -> tuple[dict[str, Any], list[Output], list[Dispatch]]:
    """Return the header of the copy, the records that set its timers and make these calls in queues, and the other calls to make.

    Nobody who waits for the original waits for the copy.  `moves`: how often what it continues from has been moved by now.
    """
    applied, now_ms = [context.incarnation, record.partition, record.offset], record.timestamp_ms
    own = {"id": id, "start_id": f"fork-{place_of(record, context.moves)}", "applied": applied, "created": now_ms, "updated": now_ms}
    made = {**{name: value for name, value in header.items() if name not in _OF_ONE_RUN}, **own, "forked": {"id": header["id"], "start_id": header["start_id"]}}
    if moves:
        made["moves"] = moves
    if client is not None:
        made["client"] = client
    if "updates" in header:  # the copy will answer the accepted updates, but nobody waits for these answers
        made["updates"] = {number: {"id": None, "to": []} for number in header["updates"]}
    asked, jobs, dispatch = _asked_again(id, header["waits"], calls, record, context)
    if jobs:
        made["calls"] = jobs
    return made, asked, dispatch


def _asked_again(id: str, waits: list[dict[str, Any]], calls: Sequence[Dispatch], record: Record, context: Context) -> tuple[list[Output], list[Any], list[Dispatch]]:
    """Return what asks for the answers to these waits of an instance: records for timers (for the same time) and calls in queues, these calls as data, and other calls."""
    known = {call.ref: msgspec.structs.replace(call, workflow_id=id, called_ms=record.timestamp_ms, held=False) for call in calls}
    outputs, jobs, dispatch = [], [], []
    for wait in waits:
        if wait["kind"] == "timer":
            left, due = max(1, wait["due"] - record.timestamp_ms), ("kwflow-due-ms", str(wait["due"]).encode())
            outputs.append(Output(context.topics.scheduler, timer_key(id, wait["ref"]), str(left).encode(), (*wire.travelling_headers(record), due), record.timestamp_ms))
        elif wait["kind"] == "job":
            call = known[wait["ref"]]
            outputs.append(_handed_out(wait["queue"], call, record, context))
            jobs.append(msgspec.to_builtins(call))
        elif wait["kind"] == "activity":
            call = known[wait["ref"]]
            dispatch.append(call)
            if call.queue and context.queues:
                outputs.append(_handed_out(call.queue, call, record, context))
    return outputs, jobs, dispatch


def _handed_out(queue: str, call: Dispatch, record: Record, context: Context) -> Output:
    return Output(queue, queues.key_of(call.workflow_id, call.ref), queues.handed_out(call, context.topics.resume), call.headers, record.timestamp_ms)


def rewind(header: dict[str, Any], earlier: dict[str, Any], record: Record, context: Context, calls: Sequence[Dispatch]) -> Rewound:
    """Put an instance back to an earlier state of the same run: what it waited for then and no longer does begins again, what it waits for only now is given up.

    Who started it, and what waits for its outcome, stay as they are; so do commands that it has applied.
    """
    now, then = {identity(wait) for wait in header["waits"]}, {identity(wait) for wait in earlier["waits"]}
    outputs, withdrawn = _give_up(header, [wait for wait in header["waits"] if identity(wait) not in then], record, context.topics)
    again = [wait for wait in earlier["waits"] if identity(wait) not in now]
    asked, _, dispatch = _asked_again(header["id"], again, calls, record, context)
    outputs += asked
    made = {name: value for name, value in earlier.items() if name not in _OF_ONE_RUN}
    made |= {name: header[name] for name in (*_OF_ONE_RUN, "applied") if name in header and name not in ("calls", "parked", "updates")}
    jobs = {wait["ref"] for wait in earlier["waits"] if wait["kind"] == "job"}
    if jobs:
        made["calls"] = [call for call in earlier.get("calls", ()) if call["ref"] in jobs]
    open_now, open_then = header.get("updates", {}), earlier.get("updates", {})
    left = {number: waiting for number, waiting in open_now.items() if not _is_same(open_then.get(number), waiting)}
    replies = _answered(left, "rejected", _UNDONE)
    if "ids" in header:
        made["ids"] = dict(header["ids"])
    for waiting in left.values():
        if waiting["id"] is not None:
            updates.remember(made.setdefault("ids", {}), waiting["id"], "rejected", _UNDONE)
    if open_then:
        made["updates"] = {number: open_now[number] if number in open_now.keys() - left.keys() else {"id": None, "to": []} for number in open_then}
    return Rewound({**made, "updated": record.timestamp_ms}, tuple(outputs), (*withdrawn, *dispatch), tuple(replies))


def _is_same(then: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether an update that was open then is the one that is open now: after going back, a number is given a second time.

    Only to an update with a `kwflow-id` more addresses are added later.
    """
    if then is None or then["id"] != now["id"]:
        return False
    return bool(then["to"] == (now["to"] if then["id"] is None else now["to"][: len(then["to"])]))


_UNDONE = "the workflow was put back to a state before this update"
_FORKABLE = {"activity", "condition", "signal", "suspension", "timer", "update"}
