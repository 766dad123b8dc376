"""What happened to instances, for those who keep books: an event for each step and each command, in its transaction (config `history_topic`; decision 0059).

Nothing of it is read again: an instance goes on from its snapshot alone.  An event names what came, and where the instance
waits since; never a value that travelled or a variable.
"""

from __future__ import annotations

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
from kwflow.runners.instances import status_of

__all__ = ["History"]

_WAITS_MAX = 20  # told of one instance; how many more there are is a number
_LINES_MAX, _CHARACTERS_MAX = 20, 1_000
_CHANGING = ("terminated", "paused", "unpaused", "retried", "discarded", "forked", "held", "parked")
_GOES_ON = ("unpaused", "retried", "discarded")  # with what was held, whose events come behind
_OF_A_WAIT = ("ref", "kind", "name", "attempt", "child", "function", "file", "line", "due")


class History:
    """Adds its event to what a record did."""

    def __init__(self, config: Config) -> None:
        self._topic = config.history_topic or ""

    def cause(self, record: Record, instance: Instance | None) -> dict[str, Any]:
        """What came: a start, a command by its op, or the answer of a wait by the wait's kind."""
        try:
            message = wire.parse(record)
        except ProtocolError:
            return {"kind": "unreadable"}
        if isinstance(message, wire.Start):
            return {"kind": "start"}
        if isinstance(message, wire.Command):
            about = {name: getattr(message.arguments, name, None) for name in ("name", "reason")}
            return {"kind": message.op, **{name: text for name, text in about.items() if text}}
        wait = instance.waits.get(message.ref) if instance is not None and message.ref is not None else None
        said: dict[str, Any] = {"kind": wait.kind if wait is not None else "answer", "ref": message.ref}
        said |= {name: value for name, value in wait.described().items() if name in ("name", "attempt", "child")} if wait is not None else {}
        return {**said, "failed": True} if message.failed else said

    def stepped(self, made: Decision, transition: Transition, record: Record, by: dict[str, Any], received_ms: int) -> Decision:
        """After a step; one that changed nothing, by a stated rule, is no event."""
        state = transition.state
        if isinstance(state, Save):
            instance = state.instance
            about = {"workflow": instance.workflow, "start_id": instance.start_id, "status": instance.status, **_waits(snapshot.waits_of(instance, _WAITS_MAX), len(instance.waits))}
        elif isinstance(state, Ended):
            outcome = {name: value for name, value in state.header["outcome"].items() if name != "value"}
            about = {"workflow": state.header["workflow"], "start_id": state.header["start_id"], "status": "ended", "outcome": outcome}
        else:
            return made
        return self._with(made, record, transition.outcome, by, about, transition.logs, received_ms)

    def changed(self, made: Decision, record: Record, by: dict[str, Any], before: bytes | None, after: bytes | None, received_ms: int) -> Decision:
        """After what was done to stored bytes: a command that runs no author code, a record that is held, an instance that is parked."""
        event = next((word for word in made.counts if word in _CHANGING), None)
        if event is None:
            return made
        about = _about(after) if after is not None else {**_about(before), "status": "ended", "waits": []}
        if event in _GOES_ON:
            about = {name: about[name] for name in ("workflow", "start_id") if name in about}
        return self._with(made, record, event, by, about, made.logs if event == "forked" else (), received_ms)

    def _with(self, made: Decision, record: Record, event: str, by: dict[str, Any], about: dict[str, Any], lines: Sequence[str], received_ms: int) -> Decision:
        place = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
        logs = [line[:_CHARACTERS_MAX] for line in lines[:_LINES_MAX]]
        value = {"event": event, "at": received_ms, "by": by, **about, "record": place, **({"logs": logs} if logs else {})}
        output = Output(self._topic, record.key, msgspec.json.encode(value), (), received_ms)
        return msgspec.structs.replace(made, outputs=(output, *made.outputs))


def _about(stored: bytes | None) -> dict[str, Any]:
    if stored is None:
        return {}
    try:
        header, outer = snapshot.read_inner_header(stored), snapshot.read_header(stored)
    except SnapshotError:
        return {"status": "damaged"}
    why = {}
    if "parked" in outer:
        reason, said = outer["parked"]["reason"], outer["parked"]["message"][:_CHARACTERS_MAX]
        why = {"reason": said if reason == "paused" else f"{reason}: {said}"}
    return {"workflow": header["workflow"], "start_id": header.get("start_id", ""), "status": status_of(outer), **why, **_waits(header["waits"][:_WAITS_MAX], len(header["waits"]))}


def _waits(first: list[dict[str, Any]], count: int) -> dict[str, Any]:
    told = [{name: wait[name] for name in _OF_A_WAIT if name in wait} for wait in first]
    return {"waits": told, **({"more_waits": count - len(told)} if count > len(told) else {})}
