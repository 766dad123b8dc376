"""Which value stopped a save, and how it is reached: for the error message only, after the save has failed.

The object is the last one the pickler looked at; the way to it is the shortest through variables of durable generators,
containers, attributes, closures and exceptions.
"""

from __future__ import annotations

import collections
import functools
import gc
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kwflow.durable import registry
from kwflow.durable.frames import snap
from kwflow.durable.reducers import Refused
from kwflow.errors import NotDurableError, SnapshotError, UnsavableError

__all__ = ["explain"]

_LOOKED_AT_MAX = 300_000
_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, types.ModuleType, types.CodeType, types.BuiltinFunctionType)
_REMEDY = "drop it before the yield, make it again after a restore with kw.reacquire(...), or do this work in an activity"
_REMEDIES = {
    "_thread.lock": "a step runs alone and needs no lock; one for other threads is bound to a global of the module",
    "_thread.RLock": "a step runs alone and needs no lock; one for other threads is bound to a global of the module",
    "_asyncio.Future": "wait with kw.suspend, kw.sleep or an activity: asyncio's futures do not outlive a process",
    "_asyncio.Task": "wait with kw.spawn or an activity: asyncio's tasks do not outlive a process",
    "_io.TextIOWrapper": "read what is needed before the yield, or keep kw.reacquire(lambda: open(...))",
    "_io.BufferedReader": "read what is needed before the yield, or keep kw.reacquire(lambda: open(...))",
    "builtins.coroutine": "await it at once; only coroutines of durable modules are kept over a wait",
    "builtins.frame": "keep what you need of it as text",
    "builtins.traceback": "keep traceback.format_exception(error)",
}


@dataclass(frozen=True)
class _Place:
    """A variable of a waiting generator, and the way on from it."""

    variable: str = ""
    function: str = ""
    where: str = ""
    path: str = ""


def explain(root: Any, error: Exception, seen: list[Any]) -> SnapshotError:
    """The error to raise for a graph that could not be saved; `seen` are the last objects the pickler looked at, newest last."""
    reason = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply; keep long chains in lists"
    for value, place in _found(root, list(reversed(seen))):
        kind = type(value)
        full = f"{kind.__module__}.{kind.__qualname__}"
        advice = "" if isinstance(error, (NotDurableError, Refused, RecursionError)) and ";" in reason else f"; {_REMEDIES.get(full, _REMEDY)}"
        way = f"{place.path} is a {kind.__name__}" if place.path != place.variable else kind.__name__
        if place.variable:
            text = f"variable {place.variable!r} of {place.function} ({place.where}) cannot be saved: {way}: {reason}{advice}"
        else:
            text = f"cannot be saved: {way}: {reason}{advice}"
        return UnsavableError(text, place.variable, place.function, place.where, kind.__name__)
    return error if isinstance(error, NotDurableError) else UnsavableError(f"cannot be saved: {reason}", "", "", "", type(root).__name__)  # type: ignore[return-value]


def _found(root: Any, wanted: list[Any]) -> Iterator[tuple[Any, _Place]]:
    """The first of these objects that can be reached; a class only when no object of it can."""
    ways = [way for thorough in (False, True) for way in [_ways(root, {id(value) for value in wanted}, thorough)] if way]
    for way in ways[:1]:
        for value in [*(v for v in wanted[:3] if not isinstance(v, type)), *wanted]:
            if id(value) in way:
                yield value, way[id(value)]


def _ways(root: Any, wanted: set[int], thorough: bool) -> dict[int, _Place]:
    """Places of the wanted objects, breadth first."""
    found: dict[int, _Place] = {}
    seen: set[int] = set()
    queue: collections.deque[tuple[Any, _Place]] = collections.deque([(root, _Place(path="it"))])
    while queue and len(seen) < _LOOKED_AT_MAX:
        value, place = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if id(value) in wanted:
            found.setdefault(id(value), place)
            if len(found) == len(wanted):
                break
        if not isinstance(value, _ATOMS):
            queue.extend(_below(value, place, thorough))
    return found


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
    """What an object holds, each with how an author would write it."""
    if isinstance(value, types.CellType):
        try:
            yield "", value.cell_contents
        except ValueError:
            return
    elif isinstance(value, (dict, types.MappingProxyType)):
        for key, held in value.items():
            yield f"[{key!r}]", held
            yield f" (the key {key!r})", key
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


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Read from the object itself, never through a property of the author's."""
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
