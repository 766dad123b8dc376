"""Iterators that can be saved in the middle, as plain classes: `itertools`, and those over containers that change or are still being filled.

Since Python 3.14, the originals of `itertools` cannot be saved.  Each twin takes the arguments of its original, and its `__reduce__`
and `__setstate__` have the shapes that the original had up to 3.13.  So a saved original becomes its twin here, and what an older
release stored loads into the twin.  On 3.14, a durable module that imports the original gets the twin.  Authors may use them
directly: `from kwflow.durable.iters import pairwise`.  Snapshots name the classes by this module (and pools.py), so none can move,
whatever the length of this file.
"""

from __future__ import annotations

import collections
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kwflow.durable.pools import IteratorBase, combinations, combinations_with_replacement, permutations, product

__all__ = [
    "Broken", "Later", "SetIterator", "accumulate", "after", "batched", "chain", "combinations", "combinations_with_replacement", "compress", "contents", "count", "cycle", "dropwhile",
    "filterfalse", "groupby", "islice", "pairwise", "permutations", "product", "repeat", "starmap", "takewhile", "tee", "twins", "zip_longest",
]  # fmt: skip


# -- over containers ----------------------------------------------------------------------------------------------------


_CONTENTS: dict[str, Callable[[Any], Any]] = {
    "keys": iter,
    "values": lambda source: iter(source.values()),
    "items": lambda source: iter(source.items()),
    "reversed keys": reversed,
    "reversed values": lambda source: reversed(source.values()),
    "reversed items": lambda source: reversed(source.items()),
}


def contents(source: Any, way: str) -> Any:
    """Return a fresh iterator over a dict or a deque."""
    return _CONTENTS[way](source)


def after(source: Any, way: str, position: int) -> Iterator[Any]:
    """Return a native iterator over a dict or a deque that is past its first items."""
    made: Iterator[Any] = contents(source, way)
    collections.deque(itertools.islice(made, position), maxlen=0)
    return made


class Broken(IteratorBase):
    """A dict or set iterator whose container has changed its size: it raises this error for ever, as the original does."""

    __slots__ = ("message",)

    def __init__(self, message: str) -> None:
        self.message = message

    def __next__(self) -> Any:
        raise RuntimeError(self.message)

    def __reduce__(self) -> Any:
        return Broken, (self.message,)


class Later(IteratorBase):
    """An iterator over a container that is still being filled when the iterator is made, because the container holds it."""

    __slots__ = ("inner", "position", "size", "source", "way")

    def __init__(self, source: Any, way: str, position: int, size: int) -> None:
        self.source, self.way, self.position, self.size = source, way, position, size
        self.inner: Iterator[Any] | None = None

    def _begin(self) -> Iterator[Any]:
        if len(self.source) != self.size:
            self.inner = Broken("dictionary changed size during iteration" if isinstance(self.source, dict) else "deque mutated during iteration")
        else:
            self.inner = after(self.source, self.way, self.position)
        return self.inner

    def __next__(self) -> Any:
        return next(self.inner if self.inner is not None else self._begin())

    def __reduce__(self) -> Any:
        return (iter, (self.inner,)) if self.inner is not None else (Later, (self.source, self.way, self.position, self.size))


class SetIterator(IteratorBase):
    """The rest of a set in the order that it had when it was saved; it watches the set itself for changes of its size."""

    __slots__ = ("rest", "size", "source")

    def __init__(self, source: Any, rest: list[Any], size: int) -> None:
        self.source, self.size = source, size
        self.rest = rest[::-1]

    def __next__(self) -> Any:
        if self.source is None:
            raise StopIteration
        if self.size < 0 or len(self.source) != self.size:
            self.size = -1
            raise RuntimeError("Set changed size during iteration")
        if not self.rest:
            self.source = None
            raise StopIteration
        return self.rest.pop()

    def __length_hint__(self) -> int:
        return len(self.rest)

    def __reduce__(self) -> Any:
        if self.source is None:
            return iter, ((),)
        return (SetIterator, (self.source, self.rest[::-1], self.size)) if self.size >= 0 else (Broken, ("Set changed size during iteration",))


# -- itertools ---------------------------------------------------------------------------------------------------------


class count(IteratorBase):
    __slots__ = ("step", "value")

    def __init__(self, start: Any = 0, step: Any = 1) -> None:
        self.value, self.step = start, step

    def __next__(self) -> Any:
        value = self.value
        self.value = value + self.step
        return value

    def __reduce__(self) -> Any:
        return count, (self.value, self.step)

    def __repr__(self) -> str:
        return f"count({self.value!r})" if self.step == 1 and isinstance(self.step, int) else f"count({self.value!r}, {self.step!r})"


class cycle(IteratorBase):
    __slots__ = ("first", "iterator", "saved")

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterator = iter(iterable)
        self.saved: list[Any] = []
        self.first = True

    def __next__(self) -> Any:
        for item in self.iterator:
            if self.first:
                self.saved.append(item)
            return item
        if not self.saved:
            raise StopIteration
        self.first = False
        self.iterator = iter(self.saved)
        return next(self.iterator)

    def __reduce__(self) -> Any:
        return cycle, (self.iterator,), (self.saved, not self.first)

    def __setstate__(self, state: Any) -> None:
        self.saved, again = state
        self.first = not again


class repeat(IteratorBase):
    __slots__ = ("left", "value")

    def __init__(self, value: Any, times: int | None = None) -> None:
        self.value = value
        self.left = None if times is None else max(times, 0)

    def __next__(self) -> Any:
        if self.left is not None:
            if not self.left:
                raise StopIteration
            self.left -= 1
        return self.value

    def __length_hint__(self) -> int:
        if self.left is None:
            raise TypeError("len() of unsized object")
        return self.left

    def __reduce__(self) -> Any:
        return repeat, (self.value,) if self.left is None else (self.value, self.left)

    def __repr__(self) -> str:
        return f"repeat({self.value!r})" if self.left is None else f"repeat({self.value!r}, {self.left})"


class accumulate(IteratorBase):
    __slots__ = ("begun", "function", "initial", "iterator", "total")

    def __init__(self, iterable: Iterable[Any], func: Callable[[Any, Any], Any] | None = None, *, initial: Any = None) -> None:
        self.iterator = iter(iterable)
        self.function = func
        self.initial = initial
        self.total: Any = None
        self.begun = False

    def __next__(self) -> Any:
        if self.initial is not None:
            self.total, self.initial, self.begun = self.initial, None, True
            return self.total
        item = next(self.iterator)
        self.total = item if not self.begun else (self.function or operator.add)(self.total, item)
        self.begun = True
        return self.total

    def __reduce__(self) -> Any:
        return accumulate, (self.iterator, self.function), (self.total, self.initial, self.begun)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 3:
            self.total, self.initial, self.begun = state
        else:  # the state of the original, which saves a total of None as an islice over an accumulate
            self.total, self.begun = state, state is not None


class chain(IteratorBase):
    __slots__ = ("active", "source")

    def __init__(self, *iterables: Iterable[Any]) -> None:
        self.source: Any = iter(iterables)
        self.active: Any = None

    @classmethod
    def from_iterable(cls, iterable: Iterable[Iterable[Any]]) -> chain:
        made = cls()
        made.source = iter(iterable)
        return made

    def __next__(self) -> Any:
        while self.source is not None:
            if self.active is None:
                try:
                    self.active = iter(next(self.source))
                except BaseException:
                    self.source = None  # also when it raises, as the original does
                    raise
            for item in self.active:
                return item
            self.active = None
        raise StopIteration

    def __reduce__(self) -> Any:
        if self.source is None:
            return chain, ()
        return chain, (), ((self.source, self.active) if self.active is not None else (self.source,))

    def __setstate__(self, state: Any) -> None:
        self.source, self.active = state if len(state) == 2 else (*state, None)


class compress(IteratorBase):
    __slots__ = ("data", "selectors")

    def __init__(self, data: Iterable[Any], selectors: Iterable[Any]) -> None:
        self.data, self.selectors = iter(data), iter(selectors)

    def __next__(self) -> Any:
        while True:
            item = next(self.data)
            if next(self.selectors):
                return item

    def __reduce__(self) -> Any:
        return compress, (self.data, self.selectors)


class _While(IteratorBase):
    __slots__ = ("iterator", "passed", "predicate")

    def __init__(self, predicate: Callable[[Any], Any], iterable: Iterable[Any]) -> None:
        self.predicate, self.iterator = predicate, iter(iterable)
        self.passed = False

    def __reduce__(self) -> Any:
        return type(self), (self.predicate, self.iterator), self.passed

    def __setstate__(self, state: Any) -> None:
        self.passed = bool(state)


class dropwhile(_While):
    __slots__ = ()

    def __next__(self) -> Any:
        for item in self.iterator:
            if self.passed or not self.predicate(item):
                self.passed = True
                return item
        raise StopIteration


class takewhile(_While):
    __slots__ = ()

    def __next__(self) -> Any:
        if self.passed:
            raise StopIteration
        item = next(self.iterator)
        if self.predicate(item):
            return item
        self.passed = True
        raise StopIteration


class filterfalse(IteratorBase):
    __slots__ = ("iterator", "predicate")

    def __init__(self, predicate: Callable[[Any], Any] | None, iterable: Iterable[Any]) -> None:
        self.predicate, self.iterator = predicate, iter(iterable)

    def __next__(self) -> Any:
        for item in self.iterator:
            if not (item if self.predicate is None else self.predicate(item)):
                return item
        raise StopIteration

    def __reduce__(self) -> Any:
        return filterfalse, (self.predicate, self.iterator)


_UNSET: Any = object()  # never saved: states leave out what is not set


class groupby(IteratorBase):
    __slots__ = ("current", "current_key", "iterator", "key", "target", "value")

    def __init__(self, iterable: Iterable[Any], key: Callable[[Any], Any] | None = None) -> None:
        self.iterator, self.key = iter(iterable), key
        self.target = self.current_key = self.value = _UNSET
        self.current: _grouper | None = None

    def _step(self) -> None:
        value = next(self.iterator)
        self.value, self.current_key = value, value if self.key is None else self.key(value)

    def __next__(self) -> Any:
        self.current = None
        while self.current_key is _UNSET or (self.target is not _UNSET and self.target == self.current_key):
            self._step()
        self.target = self.current_key
        self.current = _grouper(self, self.target)
        return self.current_key, self.current

    def __reduce__(self) -> Any:
        return groupby, (self.iterator, self.key), [held for held in (self.target, self.current_key, self.value) if held is not _UNSET]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):  # the state of the original, which is lost when the current value has been taken
            self.value, self.target, self.current_key = state
        elif state:
            self.target, self.current_key, self.value = (*state, _UNSET, _UNSET)[:3]


class _grouper(IteratorBase):
    __slots__ = ("key", "parent")

    def __init__(self, parent: groupby, key: Any) -> None:
        self.parent, self.key = parent, key
        parent.current = self

    def __next__(self) -> Any:
        parent = self.parent
        if parent.current is not self:
            raise StopIteration
        if parent.value is _UNSET:
            parent._step()
        if self.key != parent.current_key:
            raise StopIteration
        value, parent.value, parent.current_key = parent.value, _UNSET, _UNSET
        return value

    def __reduce__(self) -> Any:
        return (_grouper, (self.parent, self.key)) if self.parent.current is self else (iter, ((),))


class islice(IteratorBase):
    __slots__ = ("at", "iterator", "next", "step", "stop")

    def __init__(self, iterable: Iterable[Any], *bounds: int | None) -> None:
        made = slice(*bounds)
        for bound in (made.start, made.stop, made.step):
            if bound is not None and bound < 0:
                raise ValueError("Indices for islice() must be None or an integer: 0 <= x <= sys.maxsize.")
        if made.step == 0:
            raise ValueError("Step for islice() must be a positive integer or None.")
        self.iterator: Any = iter(iterable)
        self.next, self.stop, self.step = made.start or 0, made.stop, made.step or 1
        self.at = 0

    def __next__(self) -> Any:
        if self.iterator is None:
            raise StopIteration
        wanted = self.next if self.stop is None else min(self.next, self.stop)
        try:
            while self.at < wanted:
                next(self.iterator)
                self.at += 1
            if self.stop is not None and self.at >= self.stop:
                raise StopIteration
            item = next(self.iterator)
        except StopIteration:
            self.iterator = None
            raise
        self.at += 1
        self.next += self.step
        return item

    def __reduce__(self) -> Any:
        if self.iterator is None:
            return islice, ((), 0), 0
        return islice, (self.iterator, self.next, self.stop, self.step), self.at

    def __setstate__(self, state: Any) -> None:
        self.at = state


class starmap(IteratorBase):
    __slots__ = ("function", "iterator")

    def __init__(self, function: Callable[..., Any], iterable: Iterable[Any]) -> None:
        self.function, self.iterator = function, iter(iterable)

    def __next__(self) -> Any:
        return self.function(*next(self.iterator))

    def __reduce__(self) -> Any:
        return starmap, (self.function, self.iterator)


_TEE_MAX = 57  # as many as one link of the original holds: links that both sides have read can be freed


class _tee_dataobject:
    """A link of the list that the copies of a tee share: the values that were read from the iterator, and the next link."""

    __slots__ = ("iterator", "next", "values")

    def __init__(self, iterator: Any, values: list[Any] | None = None, next: Any = None) -> None:
        self.iterator, self.values, self.next = iterator, list(values or ()), next

    def __reduce__(self) -> Any:
        return _tee_dataobject, (self.iterator, self.values, self.next)


class _tee(IteratorBase):
    __slots__ = ("data", "index")

    def __init__(self, iterable: Any = ()) -> None:
        copied = isinstance(iterable, _tee)
        self.data: _tee_dataobject = iterable.data if copied else _tee_dataobject(iter(iterable))
        self.index: int = iterable.index if copied else 0

    def __next__(self) -> Any:
        if self.index >= _TEE_MAX or (self.index >= len(self.data.values) and self.data.next is not None):
            if self.data.next is None:
                self.data.next = _tee_dataobject(self.data.iterator)
            self.data, self.index = self.data.next, 0
            return next(self)
        if self.index == len(self.data.values):
            self.data.values.append(next(self.data.iterator))
        self.index += 1
        return self.data.values[self.index - 1]

    def __copy__(self) -> _tee:
        return _tee(self)

    def __reduce__(self) -> Any:
        return _tee, ((),), (self.data, self.index)

    def __setstate__(self, state: Any) -> None:
        self.data, self.index = state


def tee(iterable: Iterable[Any], n: int = 2) -> tuple[_tee, ...]:
    """Return `n` independent iterators over one iterable."""
    first = _tee(iterable)
    return tuple(first if k == 0 else _tee(first) for k in range(n))


class zip_longest(IteratorBase):
    __slots__ = ("fill", "iterators")

    def __init__(self, *iterables: Iterable[Any], fillvalue: Any = None) -> None:
        self.iterators: list[Any] = [iter(iterable) for iterable in iterables]
        self.fill = fillvalue

    def __next__(self) -> Any:
        if all(iterator is None for iterator in self.iterators):
            raise StopIteration
        items = []
        for n, iterator in enumerate(self.iterators):
            item = next(iterator, _UNSET) if iterator is not None else _UNSET
            if item is _UNSET and iterator is not None:
                self.iterators[n] = None
                if all(other is None for other in self.iterators):
                    raise StopIteration
            items.append(self.fill if item is _UNSET else item)
        return tuple(items)

    def __reduce__(self) -> Any:
        return zip_longest, tuple(() if iterator is None else iterator for iterator in self.iterators), self.fill

    def __setstate__(self, state: Any) -> None:
        self.fill = state
        self.iterators = [None if _is_over(iterator) else iterator for iterator in self.iterators]


_OVER: Any = type(iter(()))


def _is_over(iterator: Any) -> bool:
    return type(iterator) is _OVER and iterator.__length_hint__() == 0


class pairwise(IteratorBase):
    __slots__ = ("begun", "iterator", "last")

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterator: Any = iter(iterable)
        self.last: Any = None
        self.begun = False

    def __next__(self) -> Any:
        if not self.begun:
            self.last, self.begun = next(self.iterator), True
        first, self.last = self.last, next(self.iterator)
        return first, self.last

    def __reduce__(self) -> Any:
        return pairwise, (self.iterator,), (self.begun, self.last)

    def __setstate__(self, state: Any) -> None:
        self.begun, self.last = state


class batched(IteratorBase):
    __slots__ = ("iterator", "n", "strict")

    def __init__(self, iterable: Iterable[Any], n: int, *, strict: bool = False) -> None:
        if n < 1:
            raise ValueError("n must be at least one")
        self.iterator, self.n, self.strict = iter(iterable), n, strict

    def __next__(self) -> Any:
        batch: list[Any] = []
        for item in self.iterator:
            batch.append(item)
            if len(batch) == self.n:
                return tuple(batch)
        if not batch:
            raise StopIteration
        if self.strict:
            raise ValueError("batched(): incomplete batch")
        return tuple(batch)

    def __reduce__(self) -> Any:
        return batched, (self.iterator, self.n), self.strict

    def __setstate__(self, state: Any) -> None:
        self.strict = state


def twins(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by name, the twins of everything in this namespace that is from itertools."""
    here = sys.modules[__name__]
    found = {id(original): getattr(here, name) for name in __all__ if (original := getattr(itertools, name, None)) is not None} | {id(itertools): here}
    return {name: found[id(value)] for name, value in namespace.items() if id(value) in found}
