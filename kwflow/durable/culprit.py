"""Which value made a save fail, and how it is reached, or which variable is the largest; used only for messages, after the failure.

The value is the last object that the pickler looked at.  The way to it is the shortest one through variables of durable
generators, containers, attributes, closures and exceptions.
"""

from __future__ import annotations

import collections
import functools
import gc
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kwflow.durable import names, registry
from kwflow.durable.frames import snap
from kwflow.durable.names import Refused
from kwflow.errors import NotDurableError, SnapshotError, UnsavableError

__all__ = ["explain", "largest"]

_LOOKED_AT_MAX = 300_000
_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, types.ModuleType, types.CodeType, types.BuiltinFunctionType)
_REMEDY = "drop it before the yield, recreate it after a restore with kw.reacquire(...), or do this work in an activity"
_REMEDIES = {
    "_thread.lock": "a step runs alone and needs no lock; bind a lock for other threads to a global of the module",
    "_thread.RLock": "a step runs alone and needs no lock; bind a lock for other threads to a global of the module",
    "_asyncio.Future": "wait with kw.suspend, kw.sleep or an activity: asyncio's futures do not outlive a process",
    "_asyncio.Task": "wait with kw.spawn or an activity: asyncio's tasks do not outlive a process",
    "_io.TextIOWrapper": "read what is needed before the yield, or keep kw.reacquire(lambda: open(...))",
    "_io.BufferedReader": "read what is needed before the yield, or keep kw.reacquire(lambda: open(...))",
    "builtins.coroutine": "await it at once; only coroutines of durable modules survive a wait",
    "builtins.frame": "keep what you need from it as text",
    "builtins.traceback": "keep traceback.format_exception(error)",
}


@dataclass(frozen=True)
class _Place:
    """A variable of a waiting generator, and the path that leads on from it."""

    variable: str = ""
    function: str = ""
    where: str = ""
    path: str = ""


def explain(root: Any, error: Exception, seen: list[Any], savable: Callable[[Any], bool]) -> SnapshotError:
    """Return the error to raise for a graph that could not be saved.  `seen` are the last objects that the pickler looked at, newest last."""
    reason = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply; keep long chains in lists"
    found = None if isinstance(error, RecursionError) else _find(root, list(reversed(seen)))
    if found is None:
        found = next(((value, place) for value, place in _variables(root) if not savable(value)), None)
    if found is None:
        return error if isinstance(error, NotDurableError) else UnsavableError(f"cannot be saved: {reason}", "", "", "", type(root).__name__)  # type: ignore[return-value]
    value, place = found
    kind = type(value)
    advice = "" if isinstance(error, (NotDurableError, Refused, RecursionError)) and ";" in reason else f"; {_REMEDIES.get(f'{kind.__module__}.{kind.__qualname__}', _REMEDY)}"
    way = f"{place.path} is a {kind.__name__}" if place.path != place.variable else kind.__name__
    subject = f"variable {place.variable!r} of {place.function} ({place.where}) " if place.variable else ""
    return UnsavableError(f"{subject}cannot be saved: {way}: {reason}{advice}", place.variable, place.function, place.where, kind.__name__)


def largest(root: Any) -> str:
    """Name the variable of a waiting generator that holds most, with its place; "" if there is none.  What several hold counts for the nearest."""
    sizes: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for value, place in _reached(root, False):
        if place.variable:
            sizes[place.variable, place.function, place.where] += len(value) if isinstance(value, (str, bytes, bytearray)) else 8
    return "".join(f"variable {variable!r} of {function} ({where})" for (variable, function, where), _ in sizes.most_common(1))


def _find(root: Any, wanted: list[Any]) -> tuple[Any, _Place] | None:
    """Return the newest of these objects that can be reached, with a way to it.  An object is preferred to its class."""
    if len(wanted) > 1 and wanted[0] is type(wanted[1]):
        wanted = wanted[1:]
    for candidates in (wanted[:1], wanted):
        for thorough in (False, True):
            ways = {id(value): place for value, place in _reached(root, thorough) if any(value is one for one in candidates)} if candidates else {}
            for value in candidates:
                if id(value) in ways:
                    return value, ways[id(value)]
    return None


def _variables(root: Any) -> Iterator[tuple[Any, _Place]]:
    """Yield the variables of every generator that can be reached, with their places."""
    return ((value, place) for value, place in _reached(root, False) if place.variable and place.path == place.variable)


def _reached(root: Any, thorough: bool) -> Iterator[tuple[Any, _Place]]:
    """Yield every object at or below the root, breadth first, each with the shortest way to it."""
    seen: set[int] = set()
    queue: collections.deque[tuple[Any, _Place]] = collections.deque([(root, _Place(path="it"))])
    while queue and len(seen) < _LOOKED_AT_MAX:
        value, place = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value, place
        if not isinstance(value, _ATOMS):
            queue.extend(_below(value, place, thorough))


def _below(value: Any, place: _Place, thorough: bool) -> Iterator[tuple[Any, _Place]]:
    if isinstance(value, types.GeneratorType) and registry.function_of(value.gi_code) is not None and not value.gi_running:
        function, _, slots, cells = snap(value)
        frame = value.gi_frame
        line = frame.f_lineno if frame is not None and value.gi_suspended else function.lineno
        for name, held in [*slots.items(), *((name, cell) for name, cell in zip(function.captured, cells, strict=False))]:
            if name != "@l":
                shown = name if name[0] != "@" else f"the {name[1:].split(' ')[0]} in use"
                yield held, _Place(shown, value.__qualname__, f"{function.filename}:{line}", shown)
        return
    for label, held in _children(value):
        yield held, _Place(place.variable, place.function, place.where, (place.path + label)[:300])
    if thorough and not isinstance(value, (types.FunctionType, type)):
        for held in gc.get_referents(value):
            if not isinstance(held, type):
                yield held, _Place(place.variable, place.function, place.where, f"something inside {place.path}"[:300])


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, each part with the text that an author would write for it."""
    if isinstance(value, types.CellType):
        try:
            yield "", value.cell_contents
        except ValueError:
            return
    elif isinstance(value, (*names.DICTS, types.MappingProxyType)):
        for key, held in value.items():
            shown = _shown(key)
            yield f"[{shown}]", held
            yield f" (the key {shown})", key
    elif isinstance(value, (list, tuple, collections.deque)):
        for n, held in enumerate(value):
            yield f"[{n}]", held
    elif isinstance(value, (set, frozenset)):
        for held in value:
            yield " (an element)", held
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            yield f" (its variable {name!r})", cell
        yield ".__defaults__", value.__defaults__ or ()
        yield ".__kwdefaults__", value.__kwdefaults__ or {}
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    elif isinstance(value, BaseException):
        yield ".args", value.args
        yield ".__cause__", value.__cause__
        yield ".__context__", value.__context__
    elif isinstance(value, type):
        for name, held in value.__dict__.items() if "<locals>" in value.__qualname__ else ():
            yield f".{name}", held
        return
    yield from _attributes(value)


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except Exception:  # the author's `__repr__` may raise anything
        return object.__repr__(key)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that are stored in the object itself, never the value of an author's property."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        held = None
    if isinstance(held, dict):
        for name, attribute in held.items():
            yield f".{name}", attribute
    for cls in type(value).__mro__ if not isinstance(value, types.FunctionType) else ():
        for name, descriptor in cls.__dict__.items():
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield f".{name}", descriptor.__get__(value)
                except (AttributeError, TypeError):
                    continue
