"""What the mixin methods of `collections.abc` iterate, as plain classes that can be saved half-way.

There they are generators of the standard library, which cannot be saved: `for item in UserList(...)`, `for key, value in UserDict(...).items()`,
and the same for every class that derives from `Mapping` or `Sequence`.  A generator that is saved becomes its twin here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kwflow.durable.pools import IteratorBase

__all__ = ["Indexed", "Mapped"]


class Mapped(IteratorBase):
    """Iterates over keys, values or items of a mapping by its keys, which `iterator` gives; None before the first one."""

    __slots__ = ("iterator", "mapping", "way")

    def __init__(self, way: str) -> None:
        self.way = way
        self.mapping: Any = None
        self.iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self.iterator is None:
            self.iterator = iter(self.mapping)
        key = next(self.iterator)
        return key if self.way == "keys" else self.mapping[key] if self.way == "values" else (key, self.mapping[key])

    def __reduce__(self) -> Any:
        return Mapped, (self.way,), (self.mapping, self.iterator)

    def __setstate__(self, state: Any) -> None:
        self.mapping, self.iterator = state


class Indexed(IteratorBase):
    """Iterates over a sequence by `position`, forwards to the first IndexError, or backwards from its end (None before the first item)."""

    __slots__ = ("position", "sequence", "step")

    def __init__(self, step: int) -> None:
        self.step = step
        self.sequence: Any = None
        self.position: int | None = None

    def __next__(self) -> Any:
        if self.position is None:
            self.position = 0 if self.step > 0 else len(self.sequence) - 1
        position, self.position = self.position, -1  # the end, if the sequence raises anything
        if position < 0:
            raise StopIteration
        try:
            item = self.sequence[position]
        except IndexError:
            if self.step < 0:
                raise
            raise StopIteration from None
        self.position = position + self.step
        return item

    def __reduce__(self) -> Any:
        return Indexed, (self.step,), (self.sequence, self.position)

    def __setstate__(self, state: Any) -> None:
        self.sequence, self.position = state
