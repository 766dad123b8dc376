"""What authors import as `kwflow`: thin functions over the running step, and the registry that modules fill on import.

The registry (topics, workflows) is process state filled at import time only; everything else acts on the current step
and raises UsageError outside one.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, TypeVar, overload

from kwflow.activities import Activity, ActivityInfo, Retry, activity, activity_info, batch_of, find_activity, registered_activities
from kwflow.batches import Call
from kwflow.core import children, messages, wire
from kwflow.core.children import Child
from kwflow.core.current import current, in_step
from kwflow.core.mailbox import Inbox, Update
from kwflow.core.migration import OldInstance, OldTask
from kwflow.core.tasks import Awaitable, Suspension, Task
from kwflow.core.wire import Record
from kwflow.durable import registry
from kwflow.durable.resources import reacquire
from kwflow.errors import CodeChangedError, UsageError
from kwflow.feeds import Cancel, Resume, Signal, Start, feed
from kwflow.waits import Gen, Wait, all, race, shield, sleep, spawn, suspend, timeout

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
    "wait_signal",
    "workflow",
    "workflow_id",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_topics: set[str] = set()
_hearing: list[set[str]] = []
_workflows: dict[str, Callable[..., Any]] = {}
_migrations: dict[str, Callable[..., Any]] = {}


def cancel(x: object) -> None:
    """Raise Cancelled at the innermost waits of x, in this step, after the current code has reached its next wait."""
    current().cancel(x)


@overload
def start_child(workflow: str | Callable[..., Any], input: object = None, *, id: str | None = None, parent_close: str = "cancel", detach: Literal[False] = False) -> Child: ...
@overload
def start_child(workflow: str | Callable[..., Any], input: object = None, *, id: str | None = None, parent_close: str = "cancel", detach: Literal[True]) -> str: ...
def start_child(workflow: str | Callable[..., Any], input: object = None, *, id: str | None = None, parent_close: str = "cancel", detach: bool = False) -> Child | str:
    """Start another workflow by name or function; `yield` gives its result or raises ChildError (M5).

    `id` defaults to `<this id>/<ref>`.  When this workflow ends or stops waiting, the child is told what `parent_close` says:
    cancel, terminate, or nothing (abandon).  With `detach=True` nobody waits, and the id is returned.
    """
    return children.start(current(), workflow, input, id, parent_close, detach)


def wait_signal(name: str) -> Awaitable[Any]:
    """The next signal of this name; one that came before is kept, in order (M3)."""
    return messages.wait_signal(current(), name)


def signals(name: str) -> Inbox:
    """The mailbox of this name: `yield inbox` waits for the next signal, `inbox.take()` gives all that are there, `len(inbox)` counts them."""
    return messages.signals(current(), name)


def on_update(name: str, validator: Callable[[Any], object] | None = None) -> Inbox:
    """Take updates of this name from here on: `update = yield inbox`, then `kw.reply(update, value)`.

    The validator, a plain function of the value, refuses one by raising; kw.* functions do not work in it.
    """
    return messages.on_update(current(), name, validator)


def reply(update: Update, value: object = None) -> None:
    """Answer an update with JSON; sent when this step is committed.  What is open at the end is answered `ended`."""
    messages.reply(current(), update, value)


def reject(update: Update, reason: str) -> None:
    """Answer an update with a refusal, as its validator would have done: its sender gets CommandError `rejected` with the reason."""
    messages.reject(current(), update, reason)


def send_signal(id: str, name: str, value: object = None, *, start: str | Callable[..., Any] | None = None, input: object = None) -> None:
    """Put a signal into another workflow's mailbox, with this step's commit; `start` is the workflow to start, with `input`, if the id does not run.

    Nobody waits: a signal for an id that is not there, or whose mailbox is full, is a dead letter.  Raises UsageError.
    """
    messages.send_signal(current(), id, name, value, start, input)


def set_status(value: object) -> None:
    """JSON that queries and listings show, at most 16 KiB."""
    messages.set_status(current(), value)


def output(value: str | bytes | None, topic: str, key: str | bytes | None = None, headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None, timestamp_ms: int | None = None) -> None:
    """Write one record with this step; key defaults to this workflow's id, value None is a tombstone."""
    current().output(value, topic, key, headers, timestamp_ms)


def output_json(value: object, topic: str, key: str | bytes | None = None, headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None, timestamp_ms: int | None = None) -> None:
    """`output` of the value as compact JSON."""
    current().output(wire.json_dumps(value), topic, key, headers, timestamp_ms)


def log(*parts: object) -> None:
    """A line that is written once, after this step is committed."""
    current().logs.append(" ".join(str(part) for part in parts))


def workflow_id() -> str:
    """The id of this instance."""
    return current().instance.id


def step_id() -> str:
    """The offset of the record this step applies."""
    return str(current().record.offset)


def headers() -> dict[str, str | None]:
    """The headers of the record this step applies, but for kwflow's: those of the start, or of the message that came; they travel over timers, activities and outputs (semantics §9.3).

    Of those with one name the last; bytes that are no UTF-8 escaped as `\\xff`, None for one without a value.  For all its life an instance keeps what it puts into a variable.
    """
    return wire.shown_headers(current().travelling)


def now() -> datetime:
    """Aware UTC: the later of the record's timestamp and the last one this instance saw (semantics §9.1)."""
    return current().now()


def declare_topics(*names: str) -> None:
    """Allow `output` to these topics.  Import time only: a topic declared in a step would differ between engines."""
    if in_step():
        raise UsageError("declare_topics belongs at module level, not inside a step")
    for name in names:
        if not isinstance(name, str) or not name:
            raise UsageError(f"a topic name is a non-empty str, not {name!r}")
    _topics.update(names)
    for heard in _hearing:
        heard.update(names)


@contextlib.contextmanager
def declaring() -> Iterator[set[str]]:
    """The topics that code which runs inside declares, also those that were declared before."""
    heard: set[str] = set()
    _hearing.append(heard)
    try:
        yield heard
    finally:
        _hearing.pop()


def declared_topics() -> frozenset[str]:
    """Every topic declared in this process."""
    return frozenset(_topics)


@overload
def workflow(function: _F) -> _F: ...
@overload
def workflow(*, name: str | None = None, restart: bool = False) -> Callable[[_F], _F]: ...
def workflow(function: _F | None = None, *, name: str | None = None, restart: bool = False) -> _F | Callable[[_F], _F]:
    """Register a workflow under a name (default: the function's); header `kwflow-workflow` of `new:` chooses it.

    With `restart`, a `new:` of an id that runs ends that run, without its author's code, and starts anew; otherwise it
    changes nothing (G5).
    """

    def register(target: _F) -> _F:
        if registry.version(target.__module__) is not None:  # old code that is loaded beside the new (semantics §8.4)
            return target
        label = name or target.__name__
        known = _workflows.get(label)
        if known is not None and (known.__module__, known.__qualname__) != (target.__module__, target.__qualname__):
            raise UsageError(f"two workflows are named {label!r}: {known.__module__}.{known.__qualname__} and {target.__module__}.{target.__qualname__}")
        if restart:
            target.kwflow_restart = True  # type: ignore[attr-defined]
        _workflows[label] = target
        return target

    return register if function is None else register(function)


def migrate(*, from_: str) -> Callable[[_F], _F]:
    """Decorate a function that moves instances waiting in old code: `from_` is main's "module:function", or "module:function@<12 hex>" for one version.

    It gets an OldInstance and returns the unstarted generator that takes main's place, alone or with the refs it takes
    over; `kwflow code migrate` runs it (docs/CODE.md).
    """
    if not isinstance(from_, str) or re.fullmatch(r"[^:@]+:[^:@]+(@[0-9a-f]{12})?", from_) is None:
        raise UsageError(f'@kw.migrate(from_="module:function") or "module:function@<12 hex>", not {from_!r}')

    def register(target: _F) -> _F:
        if registry.version(target.__module__) is not None:
            return target
        known = _migrations.get(from_)
        if known is not None and (known.__module__, known.__qualname__) != (target.__module__, target.__qualname__):
            raise UsageError(f"two migrations are from {from_!r}: {known.__module__}.{known.__qualname__} and {target.__module__}.{target.__qualname__}")
        _migrations[from_] = target
        return target

    return register


def registered_migrations() -> dict[str, Callable[..., Any]]:
    """Function key -> function of every `@migrate` in this process."""
    return dict(_migrations)


def registered_workflows() -> dict[str, Callable[..., Any]]:
    """Name -> function of every `@workflow` in this process."""
    return dict(_workflows)


def activity_named(name: str) -> Activity[Any, Any]:
    """The activity of this name; how snapshots hold activities.  Raises CodeChangedError when this process has none."""
    found = find_activity(name)
    if found is None:
        raise CodeChangedError(f"no activity {name!r} in this process, and an instance holds it")
    return found


for _value in [globals()[_name] for _name in __all__]:
    if isinstance(_value, types.FunctionType):  # wherever it is written, this is what a snapshot that holds it names
        _value.__module__ = __name__
