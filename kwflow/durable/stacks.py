"""contextlib's exit stacks in durable code: what stands for the coroutines of `AsyncExitStack`, in a form that can be saved, and their callbacks.

Its own methods are coroutines, which nothing can save.  This module does the same step by step, on the author's own stack.  The
entries stay as contextlib made them, so that `push`, `callback`, `pop_all` and `ExitStack` need no code of ours.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

from kwflow.durable import protocols
from kwflow.durable.awaiting import Chained, Settled
from kwflow.durable.driving import abandoning
from kwflow.durable.runtime import awaited

__all__ = ["Closing", "EnteringInto", "Unwinding", "is_async_callback", "made_callback"]

_STACK: Any = contextlib.AsyncExitStack  # for its private methods, which typeshed does not have
_CALLBACKS = (_STACK._create_cb_wrapper(print).__code__, _STACK._create_async_cb_wrapper(print).__code__)
_CLOSED_OVER = ("args", "callback", "kwds")


def is_async_callback(function: types.FunctionType) -> bool | None:
    """Return True if this is the wrapper that `push_async_callback` makes, False if it is that of `callback`, None if it is neither."""
    if function.__code__ in _CALLBACKS and function.__code__.co_freevars == _CLOSED_OVER:
        return _CALLBACKS.index(function.__code__) == 1
    return None


def made_callback(is_async: bool, closure: tuple[types.CellType, ...]) -> types.FunctionType:
    """Return the same wrapper around these cells."""
    return types.FunctionType(_CALLBACKS[is_async], vars(contextlib), "_exit_wrapper", None, closure)


class EnteringInto(Chained):
    """`await stack.enter_async_context(manager)`."""

    __slots__ = ("manager", "stack")

    def __init__(self, stack: Any, manager: Any) -> None:
        cls = type(manager)
        if not hasattr(cls, "__aenter__") or not hasattr(cls, "__aexit__"):
            raise TypeError(f"'{cls.__module__}.{cls.__qualname__}' object does not support the asynchronous context manager protocol")
        super().__init__(awaited(protocols.aenter(manager)))
        self.stack, self.manager = stack, manager

    def ended(self, value: Any, error: BaseException | None) -> BaseException | None:
        if error is not None:
            return error
        self.stack._push_exit_callback(types.MethodType(type(self.manager).__aexit__, self.manager), False)
        return StopIteration(value)


class Unwinding(Chained):
    """`__aexit__` of an AsyncExitStack: contextlib's rules about what is suppressed, and which error is the context of which.

    `error` is passed to the next callback; `context` is the context of the error that is raised at the end.
    """

    __slots__ = ("context", "error", "handled", "ignored", "pending", "received", "stack", "suppressed")

    def __init__(self, stack: Any, error: BaseException | None) -> None:
        super().__init__(Settled(None))
        self.stack, self.error = stack, error
        self.handled = sys.exc_info()[1]
        self.context: BaseException | None = None
        self.received = error is not None
        self.suppressed = self.pending = self.ignored = False

    def ended(self, value: Any, error: BaseException | None) -> BaseException | None:
        if error is not None:
            self._failed(error)
        elif value and not self.ignored:
            self._swallowed()
        entries = self.stack._exit_callbacks
        while entries:
            is_sync, callback = entries.pop()
            details = _details(self.error)
            try:
                if not is_sync:
                    self.target = awaited(self._leaving(callback, details))
                    return None
                if callback(*details):
                    self._swallowed()
            except BaseException as raised:
                self._failed(raised)
        if self.pending and self.error is not None:
            self.context = self.error.__context__
            return self.error
        return StopIteration(self.result())

    def close(self) -> None:
        """Pass the GeneratorExit to the other entries, as Python does, unless the generator is merely forgotten (G8)."""
        exit_: BaseException = GeneratorExit()
        try:
            self.target.close()
        except BaseException as error:
            exit_ = error
        if abandoning():
            return
        self.target = Settled(None)
        try:
            self.throw(exit_)
        except (GeneratorExit, StopIteration):
            return
        finally:
            del exit_
        raise RuntimeError("coroutine ignored GeneratorExit")

    def result(self) -> bool | None:
        return self.received and self.suppressed

    def _leaving(self, callback: Any, details: tuple[Any, Any, Any]) -> Any:
        """Return the awaitable of one entry; for contextlib's own managers, one that can be saved."""
        manager = callback.__self__ if isinstance(callback, types.MethodType) else None
        self.ignored = isinstance(callback, types.FunctionType) and is_async_callback(callback) is True
        if self.ignored:
            args, function, kwds = (cell.cell_contents for cell in callback.__closure__)
            return function(*args, **kwds)
        if manager is not None and callback.__func__ is getattr(type(manager), "__aexit__", None):
            return protocols.leaving(manager, *details)
        return callback(*details)

    def _swallowed(self) -> None:
        self.suppressed, self.pending, self.error = True, False, None

    def _failed(self, raised: BaseException) -> None:
        """Replace the current error by this one; the previous error becomes the end of its chain of contexts."""
        last = raised
        while last.__context__ is not None and last.__context__ is not self.error:
            if last.__context__ is self.handled:
                BaseException.__setattr__(last, "__context__", self.error)
                break
            last = last.__context__
        self.pending, self.error = True, raised

    def _outcome(self, go: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return super()._outcome(go, *arguments)
        except BaseException as error:
            if self.pending and error is self.error:
                BaseException.__setattr__(error, "__context__", self.context)  # raising it has set another one
            raise
        finally:
            del arguments


def _details(error: BaseException | None) -> tuple[type[BaseException] | None, BaseException | None, types.TracebackType | None]:
    """Return the arguments for an entry.  An error that was loaded from bytes has no traceback, and gets one as if it were raised here."""
    if error is None:
        return None, None, None
    if error.__traceback__ is None:
        context = error.__context__
        try:
            raise error
        except BaseException:
            BaseException.__setattr__(error, "__context__", context)
    return type(error), error, error.__traceback__


class Closing(Unwinding):
    """`await stack.aclose()`."""

    __slots__ = ()

    def __init__(self, stack: Any) -> None:
        super().__init__(stack, None)

    def result(self) -> None:
        return None


protocols.stand_ins.update({
    _STACK.__aenter__.__code__: lambda names: Settled(names["self"]),
    _STACK.__aexit__.__code__: lambda names: Unwinding(names["self"], names["exc_details"][1]),
    _STACK.aclose.__code__: lambda names: Closing(names["self"]),
    _STACK.enter_async_context.__code__: lambda names: EnteringInto(names["self"], names["cm"]),
})  # fmt: skip
