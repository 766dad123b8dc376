"""What does not outlive a process (connections, files, locks), and how an author gets it back after a restore.

There are two ways.  `reacquire` wraps a resource whose class is not the author's; what is saved is how to create it.  An object
of a class with `__durable_reenter__` is saved like any other (`__getstate__` selects what), and this method is called after a restore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from kwflow.errors import UsageError

__all__ = ["Reacquired", "reacquire"]

_T = TypeVar("_T")
_ABSENT: Any = object()


def reacquire(factory: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Return `factory(*args, **kwargs)` in a wrapper that a variable may hold over a wait.

    Calls, attributes, items and `with` go through to the resource.  It is created now, and again when it is first used after a
    restore; what `factory` raises then is raised in the author's code, at that use.  If it was in a `with` block, it is entered
    again.  Its state is not kept: the position of a file, a lock that was taken, an open transaction.
    """
    if not callable(factory):
        raise UsageError(f"kw.reacquire takes a function that creates the resource, not the resource: kw.reacquire(lambda: ...), not {type(factory).__name__}")
    made: Any = Reacquired(factory, args, kwargs)
    object.__getattribute__(made, "_kw_resource")()
    return made  # type: ignore[no-any-return]  # to the author it is what `factory` returns


class Reacquired:
    """The wrapper.  Its own attributes begin with `_kw_`; all others are those of the resource."""

    __slots__ = ("__weakref__", "_kw_args", "_kw_entered", "_kw_factory", "_kw_held", "_kw_kwargs")

    def __init__(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.__setstate__((factory, args, kwargs, 0))

    def __getstate__(self) -> tuple[Any, ...]:
        return self._kw_factory, self._kw_args, self._kw_kwargs, self._kw_entered

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        factory, args, kwargs, entered = state
        for name, value in {"factory": factory, "args": args, "kwargs": kwargs, "entered": entered, "held": _ABSENT}.items():
            object.__setattr__(self, f"_kw_{name}", value)

    def _kw_resource(self) -> Any:
        """Return the resource of this process.  If there is none yet, create it and enter it as often as it was entered before."""
        if self._kw_held is _ABSENT:
            held = self._kw_factory(*self._kw_args, **self._kw_kwargs)
            for _ in range(self._kw_entered):
                type(held).__enter__(held)
            object.__setattr__(self, "_kw_held", held)
        return self._kw_held

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # copy, inspect and the like ask for these: no reason to open anything
            raise AttributeError(name)
        return getattr(self._kw_resource(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._kw_resource(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._kw_resource(), name)

    def __enter__(self) -> Any:
        held = self._kw_resource()
        got = type(held).__enter__(held)
        object.__setattr__(self, "_kw_entered", self._kw_entered + 1)
        return self if got is held else got

    def __exit__(self, *error: Any) -> Any:
        entered = self._kw_entered
        object.__setattr__(self, "_kw_entered", max(0, entered - 1))
        if self._kw_held is _ABSENT or not entered:
            return None  # not used since the restore: there is nothing to exit
        return type(self._kw_held).__exit__(self._kw_held, *error)

    __iter__ = None  # the position of an iterator would be lost silently; iterate over a list

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._kw_resource()(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._kw_resource()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._kw_resource()[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._kw_resource()[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._kw_resource()

    def __len__(self) -> int:
        return len(self._kw_resource())

    def __bool__(self) -> bool:
        return bool(self._kw_resource())

    def __repr__(self) -> str:
        return f"<reacquired {self._kw_held!r}>" if self._kw_held is not _ABSENT else f"<to be reacquired by {self._kw_factory!r}>"
