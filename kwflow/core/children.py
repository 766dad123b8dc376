"""Child workflows (M5): how they are started, how their end reaches the parent, and what happens to them when the parent stops waiting.

The start id of a child and its `kwflow-parent` header are `<parent id>|<ref>`.  Whatever ends the child, or refuses to
start it, writes the parent's ref record in the same transaction.  So a parent never waits for a child that does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kwflow.core import typed, wire
from kwflow.core.calls import Calls
from kwflow.core.tasks import FAILED, Outcome, Suspension
from kwflow.core.values import json_dumps
from kwflow.core.wire import Output, Record
from kwflow.durable import registry
from kwflow.errors import ChildError, ProtocolError, UsageError

__all__ = ["POLICIES", "Child", "answer", "answer_again", "name_of", "parent_closed", "parent_closed_header", "refused", "start"]

POLICIES = ("cancel", "terminate", "abandon")


class Child(Suspension):
    """A wait for the outcome of a child workflow.  `parent_close` says what the child is told when nobody waits for it any more."""

    __slots__ = ("child_id", "parent_close", "workflow")
    kind = "child"
    outside = True

    def __init__(self, ref: str, since_ms: int, child_id: str, workflow: str, parent_close: str) -> None:
        super().__init__(ref, since_ms)
        self.child_id = child_id
        self.workflow = workflow
        self.parent_close = parent_close

    def described(self) -> dict[str, Any]:
        return {"child": self.child_id, "workflow": self.workflow, "parent_close": self.parent_close}

    def answer(self, failed: bool, value: object) -> Outcome:
        if failed and isinstance(value, dict) and value.get("kind") == "child":
            return FAILED, ChildError(value)
        return super().answer(failed, value)


def start(calls: Calls, workflow: object, input: object, id: str | None, parent_close: str, detach: bool) -> Child | str:
    """Start a child and return the wait for it; with `detach` return its id, and nobody waits."""
    name = name_of(workflow, calls.context.workflows.functions, "kw.start_child")
    if parent_close not in POLICIES:
        raise UsageError(f"parent_close is one of {', '.join(POLICIES)}, not {parent_close!r}")
    parent, ref = calls.instance.id, calls.next_id()
    child_id = f"{parent}/{ref}" if id is None else id
    _check_id(child_id, parent)
    run = f"{parent}|{ref}".encode()
    headers = (*calls.travelling, ("kwflow-workflow", name.encode()), ("kwflow-start-id", run))
    value, topic = b"new:" + typed.input_json(input), calls.context.topics.resume
    if detach:
        calls.emit(topic, child_id.encode(), value, headers)
        return child_id
    wait = Child(ref, calls.record.timestamp_ms, child_id, name, parent_close)
    return calls.request(wait, topic, child_id.encode(), value, (*headers, ("kwflow-parent", run)))


def name_of(workflow: object, functions: Mapping[str, Callable[..., Any]], said: str) -> str:
    """Return the name of a workflow that is given by name or as a function.

    For a function of an old version of a module, this is the workflow registered now under the same module and qualified name.  Raises UsageError.
    """
    if isinstance(workflow, str) and workflow:
        return workflow  # it may be registered in another engine of this application
    home = registry.version(getattr(workflow, "__module__", None) or "")
    place = getattr(workflow, "__qualname__", "<locals>")
    for name, function in functions.items():
        if function is workflow or (home is not None and "<locals>" not in place and (function.__module__, getattr(function, "__qualname__", "")) == (home.name, place)):
            return name
    raise UsageError(f"{said} takes the name of a workflow or a function registered as one, not {workflow!r}; there are: {', '.join(sorted(functions))}")


def _check_id(id: object, parent: str) -> None:
    if not isinstance(id, str):
        raise UsageError(f"a workflow id must be a str, not {id!r}")
    if id == parent:
        raise UsageError(f"{id!r} is this workflow; a child needs an id of its own")
    try:
        wire.workflow_id(Record("", 0, 0, 0, id.encode("utf-8", "surrogatepass"), None))
    except ProtocolError as error:
        raise UsageError(f"the id of a child: {error}; give a shorter one with id=") from None


# -- what the parent is told -------------------------------------------------------------------------------------------
def answer(parent: str, child_id: str, outcome: str, value: bytes, topic: str, bytes_max: int, timestamp_ms: int) -> Output:
    """Return the parent's ref record.  `value` is the JSON of the result or the error; if it is too large for a record, the parent gets an error instead."""
    key, _, ref = parent.partition("|")
    body = b'"value":' + value if outcome == "result" else b'"error":' + _failure(child_id, outcome, value)
    if len(body) + len(ref) + 20 > bytes_max:
        body = b'"error":' + _failure(child_id, outcome if outcome != "result" else "too_large", json_dumps(f"its {outcome} has {len(value)} bytes"))
    return Output(topic, key.encode(), b'{"ref":' + json_dumps(ref) + b"," + body + b"}", (), timestamp_ms)


def _failure(child_id: str, outcome: str, error: bytes) -> bytes:
    return msgspec.json.encode({"kind": "child", "id": child_id, "outcome": outcome, "error": msgspec.Raw(error)})


def refused(record: Record, outcome: str, message: str, topic: str) -> tuple[Output, ...]:
    """Return the answer to the parent of a start that never ran; nothing for any other record."""
    try:
        parent = wire.parent_of(record)
    except ProtocolError:
        return ()
    if parent is None:
        return ()
    child_id = (record.key or b"").decode("utf-8", "backslashreplace")
    return (answer(parent, child_id, outcome, json_dumps(message), topic, 1_000_000, record.timestamp_ms),)


def answer_again(header: dict[str, Any], record: Record, topic: str, bytes_max: int) -> tuple[Output, ...]:
    """Answer the start of a child that is repeated after the child's end: the parent gets the same answer again."""
    outcome = header.get("outcome")
    if wire.parent_of(record) is None or outcome is None:
        return ()
    if outcome["value"] is None:
        return refused(record, "too_large", "its outcome is too large to keep", topic)
    return (answer(header.get("parent", ""), header["id"], outcome["kind"], outcome["value"].encode(), topic, bytes_max, record.timestamp_ms),)


# -- what the child is told --------------------------------------------------------------------------------------------
def parent_closed(calls: Calls, wait: Child) -> None:
    """Tell the child that nobody waits for it any more, as its `parent_close` says."""
    for output in _command_to_child(calls.instance.id, wait.ref, wait.child_id, wait.parent_close, calls.record, calls.context.topics.resume):
        calls.write(output.topic, output.key or b"", output.value, output.headers)


def parent_closed_header(header: dict[str, Any], wait: dict[str, Any], record: Record, topic: str) -> list[Output]:
    """Return the same records as `parent_closed` writes, made from the parent's header."""
    return _command_to_child(header["id"], wait["ref"], wait["child"], wait["parent_close"], record, topic)


def _command_to_child(parent: str, ref: str, child_id: str, parent_close: str, record: Record, topic: str) -> list[Output]:
    """The command to the child, if any.  It is limited to the run that this parent started, and idempotent."""
    if parent_close == "abandon":
        return []
    run = f"{parent}|{ref}"
    headers = (("kwflow-op", parent_close.encode()), ("kwflow-start-id", run.encode()), ("kwflow-id", f"{run}|{parent_close}".encode()))
    value = json_dumps({"reason": f"its parent {parent} no longer waits for it"[:1000]})
    return [Output(topic, child_id.encode(), value, (*wire.travelling_headers(record), *headers), record.timestamp_ms)]
