"""How an iterator that is in use is saved: as what it goes over and how far it has come, so that it sees later changes as it would have.

Iterators do not tell what they go over; the garbage collector does.  Its one rule: what is saved names only `iter`, `rebuild.iterator_at`
and the classes of iters.py, which continue there.
"""

from __future__ import annotations

import collections
import collections.abc
import gc
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

from kwflow.durable import iters, mixins, names, rebuild
from kwflow.durable.frames import copied_locals
from kwflow.durable.names import Refused

__all__ = ["REDUCERS", "of_a_mixin"]


def _itertool(value: Any) -> Any:
    """Save it as its twin in iters.py, which takes the same arguments and state."""
    if sys.version_info >= (3, 14):
        name = type(value).__name__.lstrip("_")
        raise Refused(f"itertools.{name} cannot be inspected since Python 3.14; use kwflow.durable.iters.{name}, which is what `import itertools` at a durable module's top means there")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = value.__reduce__()
    twin = getattr(iters, made[0].__name__, None) if made[0].__module__ == "itertools" else None
    if twin is None or twin is iters._grouper:  # a group's parent is still the original
        return (twin or made[0], *made[1:])
    again = twin(*made[1])
    if len(made) > 2 and made[2] is not None:
        again.__setstate__(made[2])
    return again.__reduce__()  # so that live and restored iterators are saved alike


def _groupby(value: Any) -> Any:
    """Save a groupby by looking into it, since its own `__reduce__` loses the current group while that is being read."""
    held = gc.get_referents(value)
    source, key, *state = held[1:] if held[0] is itertools.groupby else held
    return iters.groupby, (source, key), state


def _hidden(value: Any) -> Any:
    name = type(value).__name__
    raise Refused(f"itertools.{name} cannot be inspected; use kwflow.durable.iters.{name}")


_WAYS = {
    "dict_keyiterator": "keys", "dict_valueiterator": "values", "dict_itemiterator": "items",
    "dict_reversekeyiterator": "reversed keys", "dict_reversevalueiterator": "reversed values", "dict_reverseitemiterator": "reversed items",
}  # fmt: skip


def _source(value: Any, kinds: type | tuple[type, ...]) -> Any:
    """Return the container that an iterator iterates; None once the iterator has ended."""
    return next((held for held in gc.get_referents(value) if isinstance(held, kinds)), None)


def _rest(value: Any) -> list[Any] | str:
    """Return the items that are still to come, or the error message if there will be none, because the source has changed."""
    try:
        rest: list[Any] = value.__reduce__()[1][0]
        return rest
    except RuntimeError as error:
        return str(error)


def _dict_iterator(value: Any) -> Any:
    """Save it as its dict and position, so that it sees later values and notices later insertions, as the original would have."""
    way = _WAYS[type(value).__name__]
    source = _source(value, names.DICTS)
    if source is None:
        return iter, ((),)
    rest = _rest(value)
    if isinstance(rest, str):
        return iters.Broken, (rest,)
    if not _is_tail(rest, source, way):
        return iter, (rest,)  # keys were removed and others added: no position describes that
    return rebuild.iterator_at, (source, way, len(source) - len(rest), len(source))


def _is_tail(rest: list[Any], source: Any, way: str) -> bool:
    if len(rest) > len(source):
        return False
    tail = itertools.islice(iters.contents(source, way), len(source) - len(rest), None)
    if way.endswith("items"):
        return all(a is c and b is d for (a, b), (c, d) in zip(rest, tail, strict=True))
    return all(a is b for a, b in zip(rest, tail, strict=True))


def _set_iterator(value: Any) -> Any:
    source = _source(value, (set, frozenset))
    if source is None:
        return iter, ((),)
    rest = _rest(value)
    if isinstance(rest, str):
        return iters.Broken, (rest,)
    return iters.SetIterator, (source, rest, len(source))


def _deque_iterator(value: Any) -> Any:
    source, position = value.__reduce__()[1]
    way = "reversed keys" if type(value) is _REVERSED_DEQUE else "keys"
    return rebuild.iterator_at, (source, way, position, len(source))


_REVERSED_DEQUE: type[Any] = type(reversed(collections.deque()))


_VIEWS = {cls.__iter__.__code__: way for cls, way in ((collections.abc.ItemsView, "items"), (collections.abc.ValuesView, "values"), (collections.abc.KeysView, "keys"))}
_SEQUENCES = {collections.abc.Sequence.__iter__.__code__: 1, collections.abc.Sequence.__reversed__.__code__: -1}


def of_a_mixin(gen: types.GeneratorType[Any, Any, Any]) -> Any:
    """Reduce a generator of a mixin method of `collections.abc` to its twin in mixins.py; None for any other.

    The iterator of its loop is on its stack: of the iterators that it refers to, the last one.
    """
    code, frame = gen.gi_code, gen.gi_frame
    if (code not in _VIEWS and code not in _SEQUENCES) or gen.gi_running:
        return None
    if frame is None:
        return iter, ((),)
    held = copied_locals(frame)
    if code in _SEQUENCES:
        position = held["i"] + _SEQUENCES[code] if gen.gi_suspended else None
        return mixins.Indexed, (_SEQUENCES[code],), (held["self"], position)
    iterators = [value for value in gc.get_referents(gen) if hasattr(type(value), "__next__")] if gen.gi_suspended else [None]
    return (mixins.Mapped, (_VIEWS[code],), (held["self"]._mapping, iterators[-1])) if iterators else None


REDUCERS: dict[type[Any], Callable[[Any], Any]] = {
    **{type(iter(getattr({}, way)())): _dict_iterator for way in ("keys", "values", "items")},
    **{type(reversed(getattr({}, way)())): _dict_iterator for way in ("keys", "values", "items")},
    **{getattr(itertools, name): _itertool for name in names.ITERTOOLS - {"pairwise", "batched", "tee"} if hasattr(itertools, name)},
    **{getattr(itertools, name): _hidden for name in ("pairwise", "batched") if hasattr(itertools, name)},
    itertools.groupby: _groupby,
    type(iter(set())): _set_iterator,
    type(iter(collections.deque())): _deque_iterator,
    _REVERSED_DEQUE: _deque_iterator,
}
