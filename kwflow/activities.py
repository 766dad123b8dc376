"""Activities: functions with side effects that a workflow calls durably.  This module has the decorator, and the conversion of values.

In a step, a call becomes a wait (`flows/` retries it, `runners/activities/dispatch.py` of an engine runs it).  Outside a
step, it calls the plain function, which asks `running.py` for what it runs for.  Arguments and results travel as JSON and are
rebuilt by annotations, as `core/typed.py` defines.  This module must not know records, or the threads that run activities.
"""

from __future__ import annotations

import functools
import inspect
import math
import traceback
import typing
import zlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, ParamSpec, TypeVar, overload

import msgspec

from kwflow import flows
from kwflow.batches import Batch
from kwflow.core import wire
from kwflow.core.current import current, in_step
from kwflow.core.dispatch import Callee
from kwflow.core.tasks import Awaitable
from kwflow.core.typed import from_plain, signature_of, to_plain, unchecked
from kwflow.core.values import json_dumps
from kwflow.declarations import declare_topics
from kwflow.errors import ActivityError, BusinessError, CodeChangedError, UsageError

__all__ = ["Activity", "Retry", "activity", "activity_named", "batch_of", "failure_of", "failure_payload", "find_activity", "is_queue", "registered_activities"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Batched = TypeVar("_Batched", bound=Callable[..., Any])
_TEXT_MAX = 2_000  # characters of an error's message that are sent
_DETAILS_BYTES_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Retry:
    """How often an activity is retried, and how fast: after `first`, `first*factor`, ..., at most `max` (seconds or timedelta).

    `max_attempts` includes the first attempt; None means no limit.  Each pause is shortened by up to `jitter` of itself, so that
    a thousand workflows that failed at the same time do not retry at the same time.
    """

    max_attempts: int | None = 5
    first: timedelta | float = 1.0
    factor: float = 2.0
    max: timedelta | float = 60.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.max_attempts is not None and (isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1):
            raise UsageError(f"Retry.max_attempts must be an integer of at least 1, or None for no limit, not {self.max_attempts!r}")
        for name, least in (("first", 0), ("factor", 1), ("max", 0), ("jitter", 0)):
            value = _seconds(getattr(self, name)) if name in ("first", "max") else getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
                raise UsageError(f"Retry.{name} must be a {'timedelta or a ' if name in ('first', 'max') else ''}number of at least {least}, not {getattr(self, name)!r}")
        if self.jitter > 1:
            raise UsageError(f"Retry.jitter must be a fraction of the pause, from 0 to 1, not {self.jitter!r}")

    def pause_s(self, attempt: int, key: str) -> float | None:
        """Return the seconds to wait after this attempt has failed; None if it was the last.

        The jitter is a hash of key and attempt, since a step uses no randomness.
        """
        if self.max_attempts is not None and attempt >= self.max_attempts:
            return None
        try:
            pause = min(_seconds(self.max), _seconds(self.first) * self.factor ** (attempt - 1))
        except OverflowError:
            pause = _seconds(self.max)
        return pause * (1 - self.jitter * zlib.crc32(f"{key}|{attempt}".encode()) / 2**32)


def _seconds(given: timedelta | float) -> float:
    return given.total_seconds() if isinstance(given, timedelta) else given


class Activity(Callee, Generic[_P, _R]):
    """A registered function.  In a step, calling it returns a wait, and the call starts with the commit of the step; elsewhere it is the plain function."""

    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[_P, _R], name: str, retry: Retry, timeout_s: float | None, queue: str | None = None, heartbeat_s: float | None = None) -> None:
        self.function = function
        self.name = name
        self.retry = retry
        self.timeout_s = timeout_s
        self.queue = queue
        self.heartbeat_s = heartbeat_s
        self.batched: Batch | None = None
        self.is_async = inspect.iscoroutinefunction(function)
        self.signature = signature_of(function)
        functools.update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"<activity {self.name}>"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return activity_named, (self.name,)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_R]:
        """Return the wait, in a workflow; outside one, what `function` returns, which has the function's own type."""
        if not in_step():
            return self.function(*args, **kwargs)  # type: ignore[return-value]
        gen = flows.attempts(self.heartbeat_s is not None)(self.name, self.encode_arguments(args, kwargs))
        gen.__qualname__ = f"activity {self.name}"
        return current().call(gen)

    # -- values to JSON and back -----------------------------------------------------------------------------------
    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        """The annotations, resolved at first use.  Raises UsageError if one cannot be resolved, or has a class whose checks would be skipped."""
        try:
            found = typing.get_type_hints(self.function, include_extras=True)
        except Exception as error:  # an annotation is any expression
            raise UsageError(f"an annotation of activity {self.name} cannot be resolved: {error}") from None
        for hint in found.values():
            if (refused := unchecked(hint)) is not None:
                raise UsageError(f"an annotation of activity {self.name} has {refused}")
        return found

    def encode_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """Return the arguments as a JSON object by parameter name.  Raises TypeError as the call would, UsageError for a value that has no JSON form."""
        try:
            given = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            hint = "; set its timeout and retries in @kw.activity(...)" if kwargs.keys() & {"timeout", "retry"} else ""
            raise TypeError(f"activity {self.name}: {error}{hint}") from None
        encoded = []
        for name, value in given.items():
            try:
                encoded.append(json_dumps(name) + b":" + json_dumps(to_plain(value, name in self.hints)))
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise UsageError(f"argument {name!r} of activity {self.name} cannot be sent: {error}") from None
        return b"{" + b",".join(encoded) + b"}"

    def decode_arguments(self, data: bytes) -> inspect.BoundArguments:
        """Return the arguments to call the function with.  Raises ActivityError if they no longer fit it."""
        bound = self.signature.bind_partial()
        try:
            for name, value in msgspec.json.decode(data).items():
                parameter = self.signature.parameters.get(name)
                if parameter is None:
                    raise TypeError(f"the function no longer has a parameter {name!r}")
                bound.arguments[name] = self._rebuild_argument(parameter, value)
            self.signature.bind(*bound.args, **bound.kwargs)
        except Exception as error:  # a model's validators may raise anything
            raise ActivityError(f"activity {self.name} does not accept its arguments: {error}", "BadArguments", final=True) from error
        return bound

    def _rebuild_argument(self, parameter: inspect.Parameter, value: Any) -> Any:
        if parameter.name not in self.hints:
            return tuple(value) if parameter.kind is parameter.VAR_POSITIONAL else value
        hint = self.hints[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            return tuple(from_plain(item, hint) for item in value)
        if parameter.kind is parameter.VAR_KEYWORD:
            return {name: from_plain(item, hint) for name, item in value.items()}
        return from_plain(value, hint)

    def encode_result(self, value: Any) -> bytes:
        """Return the result as JSON.  Raises ActivityError that tells why it cannot be sent."""
        try:
            return json_dumps(to_plain(value, "return" in self.hints))
        except Exception as error:  # serializers of models may raise anything
            raise ActivityError(f"the result of activity {self.name} cannot be sent: {error}", "BadResult", final=True) from error

    def decode_result(self, value: Any) -> Any:
        """Return the result as annotated.  Raises ActivityError if it does not fit.

        That error has no cause: workflows hold it while they compensate, and a snapshot could not hold a library's error.
        """
        try:
            return from_plain(value, self.hints["return"]) if "return" in self.hints else value
        except Exception as error:  # a model's validators may raise anything
            said = str(error)
        raise ActivityError(f"the result of activity {self.name} does not match its annotation: {said}", "BadResult", final=True)


# -- the registry ------------------------------------------------------------------------------------------------------
_activities: dict[str, Activity[Any, Any]] = {}
_queues: set[str] = set()


class _Maker(typing.Protocol):
    """The type of `@activity(...)`: what it returns for `def` and for `async def` functions."""

    @overload
    def __call__(self, function: Callable[_P, Coroutine[Any, Any, _R]], /) -> Activity[_P, _R]: ...
    @overload
    def __call__(self, function: Callable[_P, _R], /) -> Activity[_P, _R]: ...


@overload
def activity(function: Callable[_P, Coroutine[Any, Any, _R]]) -> Activity[_P, _R]: ...
@overload
def activity(function: Callable[_P, _R]) -> Activity[_P, _R]: ...
@overload
def activity(
    *, name: str | None = None, retry: Retry | None = None, timeout: timedelta | float | None = None, queue: str | None = None, heartbeat: timedelta | float | None = None
) -> _Maker: ...  # fmt: skip
def activity(
    function: Callable[..., Any] | None = None, *, name: str | None = None, retry: Retry | None = None, timeout: timedelta | float | None = None, queue: str | None = None,
    heartbeat: timedelta | float | None = None,
) -> Any:  # fmt: skip
    """Make a `def` or `async def` an activity.  Waiting calls find it by `name`, which defaults to that of the function.

    Each attempt may take up to `timeout` (seconds or timedelta), counted from the step that starts it.  With a `queue`, the name of a
    topic, calls are run by workers that serve it (`kwflow worker`), not by engines on Kafka.  With a `heartbeat` (seconds or timedelta),
    an attempt that calls `kw.activity_info().heartbeat()` less often has failed.  Raises UsageError for a function that cannot be an
    activity, and if another activity has the same name.
    """
    policy = Retry() if retry is None else retry
    if not isinstance(policy, Retry):
        raise UsageError(f"@kw.activity(retry=...) must be a kw.Retry, not {retry!r}")
    timeout_s, heartbeat_s = _positive("timeout", timeout), _positive("heartbeat", heartbeat)
    if queue is not None and not wire.is_topic(queue):
        raise UsageError(f"@kw.activity(queue=...) must be a topic name of letters, digits, '.', '_' and '-', not {queue!r}")

    def register(target: Callable[..., Any]) -> Activity[..., Any]:
        if not inspect.isroutine(target) or isinstance(target, (staticmethod, classmethod)):
            raise UsageError(f"@kw.activity must decorate a function, not {target!r}")
        if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
            raise UsageError(f"{target.__qualname__} contains a yield: an activity is an ordinary function; the yield belongs in the workflow that calls it")
        owner = target.__qualname__.rpartition(".")[0]
        if owner and not owner.endswith(">"):  # a class, not <locals> or <listcomp>
            remedy = "write a function that calls the method of a module-level object"
            raise UsageError(f"{target.__qualname__} is a method, but an activity must be a function, which any engine can find by name: {remedy}")
        made = Activity(target, name or target.__name__, policy, timeout_s, queue, heartbeat_s)
        known = _activities.get(made.name)
        old = "@" in (target.__module__ or "")  # an old version that is loaded beside the new one may add activities, but not replace any
        if known is not None and not old and _place(known.function) != _place(target):
            remedy = "rename one with @kw.activity(name=...)"
            if queue is not None and queue == known.queue:
                remedy = f"the declaration for engines and the implementation for workers of queue {queue!r} belong in two processes; in one, or embedded, let one module import the other's activity"
            raise UsageError(f"two activities are named {made.name!r}: {_place(known.function)} and {_place(target)}; {remedy}")
        if known is None or not old:
            _activities[made.name] = made
        if queue is not None:
            declare_topics(queue)
            _queues.add(queue)
        return made

    return register if function is None else register(function)


def _positive(name: str, given: timedelta | float | None) -> float | None:
    seconds = None if given is None else _seconds(given)
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds <= 0):
        raise UsageError(f"@kw.activity({name}=...) must be a timedelta or a number of seconds above 0, not {given!r}")
    return seconds


def batch_of(called: Activity[Any, Any], *, size: int, within: timedelta | float = 1.0) -> Callable[[_Batched], _Batched]:
    """Let one function handle many calls of an activity: `@kw.batch_of(charge, size=100, within=2.0)` above `def charge_all(calls)`.

    It is called with a list of kw.Call: `size` of them, or as many as have arrived `within` seconds after the first (BW-1).
    It answers each with `call.complete(value)` or `call.fail(error)`, or returns a list with a result or an exception for
    each, in the same order.  An exception that it raises is the error of all calls without an answer.  Raises UsageError.
    """
    if not isinstance(called, Activity):
        raise UsageError(f"@kw.batch_of takes an activity, not {called!r}")

    def register(function: _Batched) -> _Batched:
        made = Batch(function, size, within)
        if called.batched is not None and _place(called.batched.function) != _place(function):
            raise UsageError(f"activity {called.name} has two batches: {_place(called.batched.function)} and {_place(function)}")
        if called.timeout_s is not None and made.within_s >= called.timeout_s:
            raise UsageError(f"a batch of activity {called.name} may wait {made.within_s:g} s for more calls, but each call has only {called.timeout_s:g} s (timeout=): reduce within= (BW-6)")
        called.batched = made
        return function

    return register


def _place(function: Callable[..., Any]) -> str:
    return f"{(function.__module__ or '').partition('@')[0]}.{function.__qualname__}"


def find_activity(name: str) -> Activity[Any, Any] | None:
    """Return the activity of this name, or None if this process has none."""
    return _activities.get(name)


def activity_named(name: str) -> Activity[Any, Any]:
    """Return the activity of this name; snapshots refer to activities like this.  Raises CodeChangedError if this process has none."""
    found = find_activity(name)
    if found is None:
        raise CodeChangedError(f"an instance holds activity {name!r}, which does not exist in this process")
    return found


def is_queue(topic: str) -> bool:
    """Whether this topic is the queue of an activity of this process."""
    return topic in _queues


def registered_activities() -> dict[str, Activity[Any, Any]]:
    """Return every activity of this process by name."""
    return dict(_activities)


# -- errors ------------------------------------------------------------------------------------------------------------
def failure_payload(error: BaseException) -> dict[str, Any]:
    """Return the `error` of the resume record.  It never fails, whatever the error is.  `final` means that a retry cannot help."""
    if isinstance(error, BusinessError):
        return {"kind": "business", "code": _text(error.code), "message": _text(error.message), "variables": _sendable(error.variables)}
    if isinstance(error, ActivityError):
        return {"kind": "activity", "type": _text(error.type or "ActivityError"), "message": _text(error), "details": _sendable(error.details), "final": error.final}
    return {"kind": "activity", "type": type(error).__name__, "message": _text(error), "details": {"at": _where(error)}, "final": False}


def failure_of(name: str, payload: Any) -> ActivityError | BusinessError:
    """Return the error that has travelled as this payload, whoever wrote it."""
    if not isinstance(payload, dict):
        return ActivityError(f"activity {name}: {payload}", "WorkflowError", payload)
    if payload.get("kind") == "business":
        return BusinessError(str(payload.get("code", "")), str(payload.get("message", "")), payload.get("variables"))
    return ActivityError(str(payload.get("message", "")), str(payload.get("type", "")), payload.get("details"), payload.get("final") is True)


def _text(value: object) -> str:
    try:
        return str(value).encode("utf-8", "replace").decode()[:_TEXT_MAX]
    except Exception:  # an author's __str__ must not hide that there was an error
        return "<no message: __str__ failed>"


def _sendable(value: Any) -> Any:
    try:
        encoded = json_dumps(to_plain(value, annotated=True))
    except Exception as error:
        return f"<not sent: {error}>"[:_TEXT_MAX]
    return msgspec.json.decode(encoded) if len(encoded) <= _DETAILS_BYTES_MAX else f"<not sent: {len(encoded)} bytes>"


def _where(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} {frames[-1].name}" if frames else None
