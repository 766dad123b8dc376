"""What authors import as `kwflow`: thin functions over the running step, and the declarations of modules.

The functions act on the current step, and raise UsageError outside a step.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Literal, overload

from kwflow.activities import Activity, Retry, activity, activity_named, batch_of, registered_activities
from kwflow.batches import Call
from kwflow.core import children, messages, updates, wire
from kwflow.core.children import Child
from kwflow.core.current import current
from kwflow.core.mailbox import Inbox, Update
from kwflow.core.migration import OldInstance, OldTask
from kwflow.core.tasks import Awaitable, Suspension, Task
from kwflow.core.values import json_dumps
from kwflow.core.wire import Record
from kwflow.declarations import declare_topics, declared_topics, declaring, migrate, registered_migrations, registered_workflows, workflow
from kwflow.durable.resources import reacquire
from kwflow.feeds import Cancel, Resume, Signal, Start, feed
from kwflow.running import ActivityInfo, activity_info
from kwflow.waits import Gen, Wait, all, race, shield, sleep, spawn, suspend, timeout, wait_condition

__all__ = [
    "Activity",
    "ActivityInfo",
    "Awaitable",
    "Call",
    "Cancel",
    "Child",
    "Gen",
    "Inbox",
    "OldInstance",
    "OldTask",
    "Record",
    "Resume",
    "Retry",
    "Signal",
    "Start",
    "Suspension",
    "Task",
    "Update",
    "Wait",
    "activity",
    "activity_info",
    "activity_named",
    "all",
    "batch_of",
    "cancel",
    "declare_topics",
    "declared_topics",
    "declaring",
    "feed",
    "headers",
    "log",
    "migrate",
    "now",
    "on_update",
    "output",
    "output_json",
    "race",
    "reacquire",
    "registered_activities",
    "registered_migrations",
    "registered_workflows",
    "reject",
    "reply",
    "send_signal",
    "set_status",
    "shield",
    "signals",
    "sleep",
    "spawn",
    "start_child",
    "step_id",
    "suspend",
    "timeout",
    "wait_condition",
    "wait_signal",
    "workflow",
    "workflow_id",
]

def cancel(x: object) -> None:
    """Raise Cancelled at the innermost waits of x; this happens in the same step, after the current code has reached its next wait."""
    current().cancel(x)


@overload
def start_child(workflow: str | Callable[..., Any], input: object = None, *, id: str | None = None, parent_close: str = "cancel", detach: Literal[False] = False) -> Child: ...
@overload
def start_child(workflow: str | Callable[..., Any], input: object = None, *, id: str | None = None, parent_close: str = "cancel", detach: Literal[True]) -> str: ...
def start_child(workflow: str | Callable[..., Any], input: object = None, *, id: str | None = None, parent_close: str = "cancel", detach: bool = False) -> Child | str:
    """Start another workflow by name or function; `yield` returns its result or raises ChildError (M5).

    `id` defaults to `<this id>/<ref>`.  When this workflow ends or stops waiting, `parent_close` decides what the child is told:
    cancel, terminate, or nothing (abandon).  With `detach=True` nobody waits, and the call returns the id.
    """
    return children.start(current(), workflow, input, id, parent_close, detach)


def wait_signal(name: str) -> Awaitable[Any]:
    """Wait for the next signal of this name.  Signals that arrived earlier are kept, in order (M3)."""
    return messages.wait_signal(current(), name)


def signals(name: str) -> Inbox:
    """Return the inbox of this name: `yield inbox` waits for the next signal, `inbox.take()` returns all that are there, `len(inbox)` counts them."""
    return messages.signals(current(), name)


def on_update(name: str, validator: Callable[[Any], object] | None = None) -> Inbox:
    """Accept updates of this name from now on: `update = yield inbox`, then `kw.reply(update, value)`.

    The validator is a plain function of the value, which refuses an update by raising; kw.* functions do not work in it.
    """
    return messages.on_update(current(), name, validator)


def reply(update: Update, value: object = None) -> None:
    """Answer an update with JSON; the answer is sent when this step is committed.  Updates still open at the end are answered with `ended`."""
    updates.reply(current(), update, value)


def reject(update: Update, reason: str) -> None:
    """Refuse an update, as its validator would have done: its sender gets CommandError `rejected` with the reason."""
    updates.reject(current(), update, reason)


def send_signal(id: str, name: str, value: object = None, *, start: str | Callable[..., Any] | None = None, input: object = None) -> None:
    """Send a signal to another workflow's mailbox, with the commit of this step.  If the id is not running, `start` is the workflow to start, with `input`.

    The sender does not wait: a signal for an id that does not exist, or whose mailbox is full, becomes a dead letter.  Raises UsageError.
    """
    messages.send_signal(current(), id, name, value, start, input)


def set_status(value: object) -> None:
    """Set the JSON value that queries and listings show; at most 16 KiB."""
    messages.set_status(current(), value)


def output(value: str | bytes | None, topic: str, key: str | bytes | None = None, headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None, timestamp_ms: int | None = None) -> None:
    """Write one record with this step.  The key defaults to this workflow's id; the value None is a tombstone."""
    current().output(value, topic, key, headers, timestamp_ms)


def output_json(value: object, topic: str, key: str | bytes | None = None, headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None, timestamp_ms: int | None = None) -> None:
    """Write the value as compact JSON, as `output` does."""
    current().output(json_dumps(value), topic, key, headers, timestamp_ms)


def log(*parts: object) -> None:
    """Write a line to the log, once, after this step is committed."""
    current().logs.append(" ".join(str(part) for part in parts))


def workflow_id() -> str:
    """Return the id of this instance."""
    return current().instance.id


def step_id() -> str:
    """Return the offset of the record that this step applies."""
    return str(current().record.offset)


def headers() -> dict[str, str | None]:
    """Return the headers of the record that this step applies, without kwflow's own: those of the start, or of the message that arrived.

    They are propagated through timers, activities and outputs (semantics §9.3).  Of headers with the same name, the last one counts.  Bytes that are not
    UTF-8 are escaped as `\\xff`; a header without a value is None.  An instance that needs them later has to keep them in a variable.
    """
    return wire.shown_headers(current().travelling)


def now() -> datetime:
    """Return the time as an aware datetime in UTC: the record's timestamp, or the latest one that this instance has seen, if that is later (semantics §9.1)."""
    return current().now()


for _value in [globals()[_name] for _name in __all__]:
    if isinstance(_value, types.FunctionType):  # wherever it is defined, a snapshot that holds it names this module
        _value.__module__ = __name__
