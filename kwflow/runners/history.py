"""What happened to instances, for audits: one event for each step and each command, in its transaction (config `history_topic`; decision 0059).

The engine never reads an event again: an instance continues from its snapshot alone.  An event names what arrived and where
the instance waits from then on.  It never holds a value that was sent, or a variable, and of a text only the beginning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec

from kwflow.config import Config
from kwflow.core import snapshot, wire
from kwflow.core.contract import Ended, Save, Transition
from kwflow.core.instance import Instance
from kwflow.core.wire import Output, Record
from kwflow.errors import ProtocolError, SnapshotError
from kwflow.ports import Decision
from kwflow.runners import parked
from kwflow.runners.instances import status_of

__all__ = ["History"]

_WAITS_MAX = 20  # waits in one event; of those beyond it only the number is given
_LINES_MAX, _CHARACTERS_MAX = 20, 1_000  # limits for text that an author or a sender wrote: a ref may have 900,000 characters
_CHANGING = ("terminated", "paused", "unpaused", "retried", "discarded", "forked", "rewound", "migrate", "held", "parked")
_GOES_ON = ("unpaused", "retried", "discarded")  # the instance continues with the records that were held, and their events follow
_OF_A_WAIT = ("ref", "kind", "name", "attempt", "child", "function", "file", "line", "due")


class History:
    """Adds an event to the decision that a record led to."""

    def __init__(self, config: Config) -> None:
        self._topic = config.history_topic or ""

    def cause(self, record: Record, instance: Instance | None) -> dict[str, Any]:
        """Describe what arrived: a start, a command by its op, or the answer to a wait by the wait's kind."""
        try:
            message = wire.parse(record)
        except ProtocolError:
            return {"kind": "unreadable"}
        if isinstance(message, wire.Start):
            return {"kind": "start"}
        if isinstance(message, wire.Command):
            about = {name: getattr(message.arguments, name, None) for name in ("name", "reason", "in_place", "at", "to")}
            return {"kind": message.op, **{name: said for name, said in about.items() if said is not None and said is not False and said != ""}}
        wait = instance.waits.get(message.ref) if instance is not None and message.ref is not None else None
        said: dict[str, Any] = {"kind": wait.kind if wait is not None else "answer", "ref": _begin(message.ref)}
        said |= {name: _begin(value) for name, value in wait.described().items() if name in ("name", "attempt", "child")} if wait is not None else {}
        return {**said, "failed": True} if message.failed else said

    def stepped(self, made: Decision, transition: Transition, record: Record, by: dict[str, Any], received_ms: int) -> Decision:
        """Add the event of a step.  A step that changed nothing, by a stated rule, has no event."""
        state = transition.state
        if isinstance(state, Save):
            instance = state.instance
            about = {"workflow": instance.workflow, "start_id": instance.start_id, "status": instance.status, **_waits(snapshot.waits_of(instance, _WAITS_MAX), len(instance.waits))}
        elif isinstance(state, Ended):
            about = {**_run(state.header), **_end(state.header)}
        else:
            return made
        return self._with(made, record, transition.outcome, by, about, transition.logs, received_ms)

    def changed(self, made: Decision, record: Record, by: dict[str, Any], before: bytes | None, after: bytes | None, received_ms: int) -> Decision:
        """Add the event of a change to stored bytes: by a command that runs no author code, a record that is held, or an instance that is parked."""
        event = next((word for word in made.counts if word in _CHANGING), None)
        if event is None or (event == "migrate" and "in_place" not in by):  # one by a function is a step
            return made
        was = _header(before)
        if event == "unpaused" and not parked.is_paused(was):
            return made
        header = _header(after if after is not None else before)
        about = _run(header)
        if event == "terminated":
            about |= _end(header if "outcome" in header else {"outcome": {"kind": "terminated"}})
        elif event not in _GOES_ON and not (event in ("migrate", "rewound") and parked.has_failed(was)):
            about |= _state(header)
        return self._with(made, record, event, by, about, made.logs if event == "forked" else (), received_ms)

    def refused(self, made: Decision, record: Record, after: bytes | None, topic: str) -> Decision:
        """Add the event of a record whose Decision the log refused; `topic` is the topic that refused it, if known.

        If that was the history topic, there is no event: with another one nothing would be left of the record (K11).
        """
        event = next((word for word in made.counts if word in _CHANGING), None)
        if event is None or topic == self._topic:
            return made
        header = _header(after)
        return self._with(made, record, event, self.cause(record, None), {**_run(header), **_state(header)}, (), record.timestamp_ms)

    def _with(self, made: Decision, record: Record, event: str, by: dict[str, Any], about: dict[str, Any], lines: Sequence[str], received_ms: int) -> Decision:
        place = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
        logs = [line[:_CHARACTERS_MAX] for line in lines[:_LINES_MAX]]
        value = {"event": event, "at": received_ms, "by": by, **about, "record": place, **({"logs": logs} if logs else {})}
        output = Output(self._topic, record.key, msgspec.json.encode(value), (), received_ms)
        return msgspec.structs.replace(made, outputs=(output, *made.outputs))


def _header(stored: bytes | None) -> dict[str, Any]:
    """The stored header: the inner one, with the status and the reason of the outer one if the instance was parked unread."""
    header: dict[str, Any] = {"status": "damaged"} if stored is not None else {}
    with contextlib.suppress(SnapshotError):
        if stored is not None:
            header = snapshot.read_header(stored)
            header = {**snapshot.read_inner_header(stored), **{name: header[name] for name in ("status", "parked") if name in header}}
    return header


def _run(header: dict[str, Any]) -> dict[str, Any]:
    return {name: header[name] for name in ("workflow", "start_id") if name in header}


def _state(header: dict[str, Any]) -> dict[str, Any]:
    """The status, the waits, and why the instance is parked.

    Of the error only the name is given: its message may contain the value of a variable, and is in the dead letter.
    """
    if "waits" not in header:
        return header
    why = {}
    if "parked" in header:
        why = {"reason": header["parked"]["message" if header["parked"]["reason"] == "paused" else "reason"]}
    return {"status": status_of(header), **why, **_waits(header["waits"][:_WAITS_MAX], len(header["waits"]))}


def _end(header: dict[str, Any]) -> dict[str, Any]:
    return {"status": "ended", "outcome": {name: header["outcome"][name] for name in ("kind", "at") if name in header["outcome"]}}


def _waits(first: list[dict[str, Any]], count: int) -> dict[str, Any]:
    told = [{name: _begin(wait[name]) for name in _OF_A_WAIT if name in wait} for wait in first]
    return {"waits": told, **({"more_waits": count - len(told)} if count > len(told) else {})}


def _begin(value: Any) -> Any:
    return value[:_CHARACTERS_MAX] if isinstance(value, str) else value
