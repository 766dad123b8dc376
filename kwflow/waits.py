"""What a workflow waits for, as typed functions over the running step: the type of each tells what its wait returns.

Types only describe: `all` returns a list even where it is typed as a tuple, as `asyncio.gather` does, so that type checkers know
each part when it is unpacked.  Every overload lives here; those for tuples and mappings overlap with the one for iterables, and come first.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Generator, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, overload

from kwflow.core.current import current
from kwflow.core.tasks import Awaitable, Suspension, Task
from kwflow.errors import UsageError

__all__ = ["Gen", "Wait", "all", "race", "shield", "sleep", "spawn", "suspend", "timeout", "wait_condition"]

_T = TypeVar("_T")
_K = TypeVar("_K")
_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")
_D = TypeVar("_D")
_E = TypeVar("_E")
Gen: TypeAlias = Generator[Any, Any, _T]
Wait: TypeAlias = Generator[Any, Any, _T] | collections.abc.Awaitable[_T]  # a call of a durable function, `def` or `async def`, or what these functions return


def suspend(id: str | None = None) -> Suspension[Any]:
    """Create a wait that a record `{"ref": id, ...}` ends.  It is registered now, so an answer before the `yield` is kept (KW-18)."""
    return current().suspend(id)


@overload
def all(items: tuple[Wait[_A], Wait[_B]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[tuple[_A, _B]]: ...  # type: ignore[overload-overlap]
@overload
def all(items: tuple[Wait[_A], Wait[_B], Wait[_C]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[tuple[_A, _B, _C]]: ...  # type: ignore[overload-overlap]
@overload
def all(items: tuple[Wait[_A], Wait[_B], Wait[_C], Wait[_D]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[tuple[_A, _B, _C, _D]]: ...  # type: ignore[overload-overlap]
@overload
def all(items: tuple[Wait[_A], Wait[_B], Wait[_C], Wait[_D], Wait[_E]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[tuple[_A, _B, _C, _D, _E]]: ...  # type: ignore[overload-overlap]
@overload
def all(items: Mapping[_K, Wait[_T]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[dict[_K, _T]]: ...  # type: ignore[overload-overlap]
@overload
def all(items: Iterable[Wait[_T]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[list[_T]]: ...
@overload
def all(items: Iterable[Any], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[Any]: ...
def all(items: Iterable[Any] | Mapping[Any, Any], *more: Any, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[Any]:
    """Wait for all results, in input order (a dict for a mapping).  The first error wins, and the rest are cancelled."""
    return current().all(_alone(items, more), cancel_rest, wait_rest)


@overload
def race(items: tuple[Wait[_A], Wait[_B]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[_A | _B]: ...
@overload
def race(items: tuple[Wait[_A], Wait[_B], Wait[_C]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[_A | _B | _C]: ...
@overload
def race(items: tuple[Wait[_A], Wait[_B], Wait[_C], Wait[_D]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[_A | _B | _C | _D]: ...
@overload
def race(items: Mapping[_K, Wait[_T]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[tuple[_K, _T]]: ...
@overload
def race(items: Iterable[Wait[_T]], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[_T]: ...
@overload
def race(items: Iterable[Any], *, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[Any]: ...
def race(items: Iterable[Any] | Mapping[Any, Any], *more: Any, cancel_rest: bool = True, wait_rest: bool = False) -> Awaitable[Any]:
    """Wait for the first to settle, with a value or an error (for a mapping, with (key, value)); the rest are cancelled."""
    return current().race(_alone(items, more), cancel_rest, wait_rest)


def _alone(items: _T, more: tuple[Any, ...]) -> _T:
    if more:
        raise UsageError("kw.all and kw.race take one list of waits; did you mean [...] around them?")
    return items


def spawn(gen: Generator[Any, Any, _T] | collections.abc.Coroutine[Any, Any, _T]) -> Task[_T]:
    """Start a child task now.  Its error does not affect the parent, unless the parent awaits it."""
    return current().spawn(gen)


def sleep(delay: timedelta | float) -> Awaitable[None]:
    """Create a timer through the scheduler topic; the delay is in seconds or a timedelta.  It starts now, and is cancelled when it is left."""
    return current().sleep(delay)


def wait_condition(predicate: Callable[[], _T]) -> Awaitable[_T]:
    """Wait until this plain function of the workflow's own state returns something true, and return that.

    It is called whenever all tasks of the workflow wait; nothing else makes it be called, such as time that passes.  It must not change anything, and `kw.*`
    does not work in it.  If several conditions are met, the one that was made first goes on until it waits again, and then the others are looked at anew.
    If the function raises, so does the wait.
    """
    return current().wait_condition(predicate)


def timeout(x: Wait[_T], delay: timedelta | float, *, wait_rest: bool = False) -> Awaitable[_T]:
    """Wait for x; after the delay, cancel it and raise TimeoutError: at once, or with `wait_rest` when x has cleaned up."""
    return current().timeout(x, delay, wait_rest)


def shield(x: Wait[_T]) -> Awaitable[_T]:
    """Wait for x; a cancel of the waiter is held back until x has settled, and raised then."""
    return current().shield(x)
