"""The iterators of `itertools` over whole pools, as plain classes that can be saved half-way; see iters.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["IteratorBase", "combinations", "combinations_with_replacement", "permutations", "product"]


class IteratorBase:
    """An iterator that is saved as its class, the arguments that create it, and a state."""

    __slots__ = ("__weakref__",)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise NotImplementedError


class _Indexed(IteratorBase):
    """Iterates over tuples of indices into a pool.  Invariant: `state` is None before the first tuple, () after the last one."""

    __slots__ = ("pool", "state", "width")

    def __init__(self, iterable: Iterable[Any], r: int) -> None:
        self.pool, self.width = tuple(iterable), r
        if r < 0:
            raise ValueError("r must be non-negative")
        self.state: Any = None

    def __reduce__(self) -> Any:
        return type(self), (self.pool, self.width), self.state

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _first(self) -> Any:
        raise NotImplementedError

    def _after(self, state: Any) -> Any:
        raise NotImplementedError

    def __next__(self) -> Any:
        if self.state != ():
            self.state = self._first() if self.state is None else self._after(self.state)
        if self.state == ():
            raise StopIteration
        return self._items()

    def _items(self) -> Any:
        return tuple(self.pool[i] for i in self.state)


class combinations(_Indexed):
    __slots__ = ()

    def _first(self) -> Any:
        return tuple(range(self.width)) or _EMPTY if self.width <= len(self.pool) else ()

    def _after(self, state: Any) -> Any:
        indices = list(state)
        for i in reversed(range(len(indices))):
            if indices[i] != i + len(self.pool) - self.width:
                return (*indices[:i], *range(indices[i] + 1, indices[i] + 1 + self.width - i))
        return ()


class combinations_with_replacement(_Indexed):
    __slots__ = ()

    def _first(self) -> Any:
        return (0,) * self.width or _EMPTY if self.pool or not self.width else ()

    def _after(self, state: Any) -> Any:
        indices = list(state)
        for i in reversed(range(len(indices))):
            if indices[i] != len(self.pool) - 1:
                return (*indices[:i], *[indices[i] + 1] * (self.width - i))
        return ()


_EMPTY: Any = range(0)  # stands for the empty tuple of indices, since () means "after the last"


class permutations(_Indexed):
    __slots__ = ()

    def __init__(self, iterable: Iterable[Any], r: int | None = None) -> None:
        pool = tuple(iterable)
        super().__init__(pool, len(pool) if r is None else r)

    def _first(self) -> Any:
        n = len(self.pool)
        return (tuple(range(n)), tuple(range(n, n - self.width, -1))) if self.width <= n else ()

    def _after(self, state: Any) -> Any:
        indices, cycles = list(state[0]), list(state[1])
        n = len(indices)
        for i in reversed(range(self.width)):
            cycles[i] -= 1
            if cycles[i] == 0:
                indices[i:] = [*indices[i + 1 :], indices[i]]
                cycles[i] = n - i
            else:
                j = n - cycles[i]
                indices[i], indices[j] = indices[j], indices[i]
                return tuple(indices), tuple(cycles)
        return ()

    def _items(self) -> Any:
        return tuple(self.pool[i] for i in self.state[0][: self.width])


class product(IteratorBase):
    __slots__ = ("pools", "state")

    def __init__(self, *iterables: Iterable[Any], repeat: int = 1) -> None:
        self.pools = [tuple(iterable) for iterable in iterables] * repeat
        self.state: Any = None

    def __next__(self) -> Any:
        if self.state is None:
            self.state = () if not all(self.pools) else (0,) * len(self.pools) or _EMPTY
        elif self.state != ():
            self.state = self._after(list(self.state))
        if self.state == ():
            raise StopIteration
        return tuple(pool[i] for pool, i in zip(self.pools, self.state, strict=True))

    def _after(self, indices: list[int]) -> Any:
        for i in reversed(range(len(indices))):
            indices[i] += 1
            if indices[i] < len(self.pools[i]):
                return tuple(indices)
            indices[i] = 0
        return ()

    def __reduce__(self) -> Any:
        return product, tuple(self.pools), self.state

    def __setstate__(self, state: Any) -> None:
        self.state = state
