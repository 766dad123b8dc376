"""What a workflow waits for, as typed functions over the running step: each says what its wait gives.

Types only describe: `all` gives a list also where it is typed as a tuple, as `asyncio.gather` does, so that unpacking knows
each part.  Every overload lives here; those for tuples and mappings overlap with the one for iterables, and come first.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Generator, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, overload

from kwflow.core.current import current
from kwflow.core.tasks import Awaitable, Suspension, Task
from kwflow.errors import UsageError

__all__ = ["Gen", "Wait", "all", "race", "shield", "sleep", "spawn", "suspend", "timeout"]

_T = TypeVar("_T")
_K = TypeVar("_K")
_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")
_D = TypeVar("_D")
_E = TypeVar("_E")
Gen: TypeAlias = Generator[Any, Any, _T]
Wait: TypeAlias = Generator[Any, Any, _T] | collections.abc.Awaitable[_T]  # a call of a durable function in either spelling, or what these functions return


def suspend(id: str | None = None) -> Suspension[Any]:
    """A wait that a record `{"ref": id, ...}` ends; registered now, so an answer before the `yield` is kept (KW-18)."""
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
    """All results in input order (a mapping gives a dict); the first error wins and the rest are cancelled."""
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
    """The first to settle, value or error (a mapping gives (key, value)); the rest are cancelled."""
    return current().race(_alone(items, more), cancel_rest, wait_rest)


def _alone(items: _T, more: tuple[Any, ...]) -> _T:
    if more:
        raise UsageError("kw.all and kw.race take one list of waits; did you mean [...] around them?")
    return items


def spawn(gen: Generator[Any, Any, _T] | collections.abc.Coroutine[Any, Any, _T]) -> Task[_T]:
    """Start a child task now; its error does not touch the parent unless awaited."""
    return current().spawn(gen)


def sleep(delay: timedelta | float) -> Awaitable[None]:
    """A timer over the scheduler topic, in seconds or as timedelta; starts now, cancelled when left."""
    return current().sleep(delay)


def timeout(x: Wait[_T], delay: timedelta | float) -> Awaitable[_T]:
    """x, or TimeoutError after the delay, with x cancelled."""
    return current().timeout(x, delay)


def shield(x: Wait[_T]) -> Awaitable[_T]:
    """x; a cancel of the waiter is held back until x has settled, and raised then."""
    return current().shield(x)
