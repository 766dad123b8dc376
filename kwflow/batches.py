"""Batches: one call of a function for many calls of an activity (BW-1..BW-16), for services that accept many items at a time."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from kwflow.errors import UsageError

__all__ = ["Batch", "Call"]

_SIZE_MAX = 10_000


class Batch:
    """A function that handles many calls of an activity: `size` of them, or as many as have arrived `within_s` seconds after the first."""

    __slots__ = ("function", "is_async", "size", "within_s")

    def __init__(self, function: Callable[..., Any], size: int, within: timedelta | float) -> None:
        """Raises UsageError."""
        within_s = within.total_seconds() if isinstance(within, timedelta) else within
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _SIZE_MAX:
            raise UsageError(f"@kw.batch_of(size=...) must be an integer from 1 to {_SIZE_MAX:,}, not {size!r}")
        if isinstance(within_s, bool) or not isinstance(within_s, (int, float)) or not math.isfinite(within_s) or within_s < 0:
            raise UsageError(f"@kw.batch_of(within=...) must be a timedelta or a number of seconds of at least 0, not {within!r}")
        if not inspect.isroutine(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(f"@kw.batch_of(...) takes a function of a list of kw.Call, not {function!r}")
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        self.size = size
        self.within_s = within_s


class Call:
    """One call in a batch: its arguments by name, as annotated, and its `info`.

    It is answered once: with `complete` or `fail`, at any time before the function of the batch returns, or by what that
    function returns.  `complete` and `fail` may be called on any thread.
    """

    __slots__ = ("_answer", "_answered", "_lock", "arguments", "info")

    def __init__(self, arguments: Mapping[str, Any], info: Any, answer: Callable[[Any, BaseException | None], None]) -> None:
        self.arguments = arguments
        self.info = info
        self._answer = answer
        self._answered = False
        self._lock = threading.Lock()

    def complete(self, value: Any = None) -> None:
        """Answer the call with its result.  Raises UsageError if it was answered before."""
        self._once(value, None)

    def fail(self, error: BaseException) -> None:
        """Answer the call with an error.  It is retried as `Retry` says, unless the error is a BusinessError or final.

        Raises UsageError if it was answered before.
        """
        if not isinstance(error, BaseException):
            raise UsageError(f"call.fail takes an exception, such as kw.ActivityError(...) or kw.BusinessError(...), not {error!r}")
        self._once(None, error)

    @property
    def answered(self) -> bool:
        return self._answered

    def _once(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            before, self._answered = self._answered, True
        if before:
            raise UsageError(f"this call of {self.info.activity} (workflow {self.info.workflow_id}) was answered before")
        self._answer(value, error)

    def __repr__(self) -> str:
        return f"<call of {self.info.activity} for {self.info.workflow_id}, attempt {self.info.attempt}{', answered' if self._answered else ''}>"
