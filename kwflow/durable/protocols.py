"""How `await`, `async for` and `async with` look up what they run, with the checks that Python makes.

Coroutines of other code cannot be saved.  Those of contextlib are replaced by what can; all others are refused.  Nothing here is saved:
what is, is in awaiting.py.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from kwflow.durable.awaiting import AsyncGenerator, Entering, Leaving, Settled
from kwflow.durable.driving import in_event_loop
from kwflow.durable.refusals import asyncio_refusal, no_iterator, no_manager, not_awaitable

__all__ = ["aenter", "aexit", "aiter_", "aleave", "anext_", "iterator_of", "leaving", "native_iterator_of", "stand_ins"]

stand_ins: dict[types.CodeType, Callable[[dict[str, Any]], Any]] = {}  # by the code of a coroutine: makes from its arguments the iterator that stands for it; stacks.py enters those of exit stacks


def iterator_of(value: Any) -> Any:
    """Return what `await value` iterates, for anything but a generator.  Raises TypeError as Python does, UsageError for values of asyncio."""
    if inspect.iscoroutine(value):
        made = _instead_of(value)
        if made is not None:
            return made
    refusal = asyncio_refusal(value)
    if refusal is not None:
        raise refusal
    return native_iterator_of(value)


def native_iterator_of(value: Any) -> Any:
    """Return what `await value` iterates in Python itself.  Raises TypeError as it does."""
    method = getattr(type(value), "__await__", None)
    if method is None:
        raise not_awaitable(value)
    iterator = method(value)
    if not hasattr(type(iterator), "__next__"):
        raise no_iterator(value, iterator)
    return iterator


def _instead_of(coroutine: types.CoroutineType[Any, Any, Any]) -> Any:
    """Return the iterator that stands for an unstarted coroutine; None if nothing does."""
    make = stand_ins.get(coroutine.cr_code)
    if make is None or coroutine.cr_frame is None or coroutine.cr_suspended:
        return None
    names = dict(coroutine.cr_frame.f_locals)
    coroutine.close()
    return make(names)


def aiter_(source: Any) -> Any:
    """Return what `__aiter__` of the type returns, with the checks of `async for`."""
    refusal = None if in_event_loop() else asyncio_refusal(source)
    if refusal is not None:
        raise refusal
    method = getattr(type(source), "__aiter__", None)
    if method is None:
        raise TypeError(f"'async for' requires an object with __aiter__ method, got {type(source).__name__}")
    iterator = method(source)
    if not hasattr(type(iterator), "__anext__"):
        raise TypeError(f"'async for' received an object from __aiter__ that does not implement __anext__: {type(iterator).__name__}")
    return iterator


def anext_(iterator: Any) -> Any:
    """Return the awaitable for the next value."""
    found = type(iterator).__anext__(iterator)
    if not isinstance(found, types.GeneratorType) and not hasattr(type(found), "__await__"):
        raise TypeError(f"'async for' received an invalid object from __anext__: {type(found).__name__}")
    return found


def aenter(manager: Any) -> Any:
    """Return the awaitable of `__aenter__`, looked up as `async with` does; for contextlib's managers, one that can be saved."""
    cls = type(manager)
    enter = getattr(cls, "__aenter__", None)
    if enter is None or not hasattr(cls, "__aexit__"):
        raise no_manager(cls, ("__aenter__", "__aexit__"), ("__enter__", "__exit__"))
    if cls is contextlib._AsyncGeneratorContextManager and isinstance(manager.gen, AsyncGenerator):
        for name in ("args", "kwds", "func"):  # as contextlib does: they are only needed to make the manager again
            manager.__dict__.pop(name, None)
        return Entering(manager.gen.__anext__())
    if cls is contextlib.aclosing:
        return Settled(manager.thing)
    if cls is contextlib.nullcontext:
        return Settled(manager.enter_result)
    return enter(manager)


def aleave(manager: Any) -> Any:
    """Return the awaitable of `__aexit__` with the exception that is being handled."""
    return leaving(manager, *sys.exc_info())


def aexit(manager: Any) -> Any:
    return leaving(manager, None, None, None)


def leaving(manager: Any, *exc_info: Any) -> Any:
    """Return the awaitable of `__aexit__`; for contextlib's managers, one that can be saved."""
    cls = type(manager)
    if cls is contextlib._AsyncGeneratorContextManager and isinstance(manager.gen, AsyncGenerator):
        return Leaving(manager.gen, exc_info[1])
    if cls is contextlib.aclosing:
        return manager.thing.aclose()
    if cls is contextlib.nullcontext:
        return Settled(None)
    return cls.__aexit__(manager, *exc_info)
