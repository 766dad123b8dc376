"""How a body becomes objects again: what the names in it mean, and how shells are filled once all of them exist.

Its one rule: what names.py does not allow is refused, whoever wrote the bytes.  This file does not know how a body is saved: that is
saving.py, and both know body.py.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import types
from typing import Any

from kwflow.durable import body, exceptions, iters, names, rebuild, registry
from kwflow.durable.body import CELL, EXCEPTION, FUNCTION, GENERATOR, OBJECT, REENTER
from kwflow.durable.frames import CREATED, FINISHED, SUSPENDED, discard, refill
from kwflow.durable.lower.upgrade import upgraded
from kwflow.durable.moves import MovingNames
from kwflow.errors import CorruptSnapshotError, ResourceError, SnapshotError

__all__ = ["fill", "read", "reenter", "upgrade"]

_MOVED = {"pathlib._local": "pathlib"}  # in snapshots that an earlier release wrote on another minor


class _Unpickler(pickle.Unpickler):
    names: rebuild.Names

    def find_class(self, module: str, name: str) -> Any:
        if module == rebuild.__name__ and name in _METHODS:
            return getattr(self.names, name)
        if module in self.names.pins or registry.is_durable(module):
            return self.names.named(module, name)
        if module not in sys.modules:
            if not names.importable(module):
                raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is not allowed (or its module is not loaded)")
            try:
                importlib.import_module(module)
            except ImportError:
                module = _MOVED.get(module, module)
        if module == "itertools" and sys.version_info >= (3, 14) and name in names.ITERTOOLS:
            return getattr(iters, name)  # stored by an earlier release: on 3.14 the originals accept no state
        try:
            found: Any = names.find(sys.modules[module], name)
        except (KeyError, AttributeError):
            if module == "builtins":
                raise SnapshotError(f"a snapshot names {name}, which Python {rebuild.MINOR} does not have; it was saved by a newer Python, which can continue it") from None
            raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which no longer exists") from None
        if not names.allowed(module, name, found) and not names.is_nameable(found):
            raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is not allowed")
        return found


def _meaning(of: rebuild.Names) -> tuple[Any, ...]:
    """Return the seeds for an unpickler, bound to the module versions that its snapshot means."""
    return tuple(getattr(of, seed.__name__) if getattr(seed, "__name__", None) in _METHODS else seed for seed in body.SEEDS)


_METHODS = frozenset(name for name in rebuild.CONSTRUCTORS if hasattr(rebuild.Names, name))
_memo = body.seeded(_meaning(rebuild.CURRENT))


def read(data: bytes, of: rebuild.Names) -> tuple[Any, list[Any]]:
    """Return the root, and kind, shell and state of each object that is still to be filled, one after the other."""
    if data[:1] != body.FORMAT:
        unpickler = _Unpickler(io.BytesIO(data))
        unpickler.names = of
        return body.of_format_1(unpickler)
    unpickler = _Unpickler(body.padded(data))
    unpickler.load()
    unpickler.names = of
    unpickler.memo = _memo if of is rebuild.CURRENT else body.seeded(_meaning(of))
    return body.unfilled(unpickler.load())


def upgrade(states: list[Any], lowering: int, now: int, moving: MovingNames | None) -> None:
    """Rename what an older lowering saved of each waiting generator to the names that version `now` uses."""
    moved = moving.moved if moving is not None else {}
    for number in range(0, len(states), 3):
        kind, made, saved = states[number : number + 3]
        function = (moved[made][0].old if made in moved else registry.function_of(made.gi_code)) if kind == GENERATOR else None
        if function is not None:
            states[number + 2] = upgraded(function, saved, lowering, now)


def fill(states: list[Any], waiting: list[types.GeneratorType[Any, Any, Any]]) -> list[Any]:
    """Fill the shells and add generators that are to be entered to `waiting`; return the objects with `__durable_reenter__`."""
    reentered = []
    for kind, made, state in zip(states[::3], states[1::3], states[2::3], strict=True):
        if kind == GENERATOR:
            refill(made, SUSPENDED, state)
            waiting.append(made)
        elif kind == OBJECT:
            rebuild.tag_of(type(made))
            made.__setstate__(state)
        elif kind == CELL:
            made.cell_contents = state
        elif kind == FUNCTION:
            rebuild.set_function(made, state)
        elif kind == EXCEPTION:
            exceptions.fill(made, state)
        elif kind in (body.CREATED, body.FINISHED):
            refill(made, CREATED if kind == body.CREATED else FINISHED, state)
        elif kind == REENTER:
            reentered.append(made)
        else:
            raise CorruptSnapshotError(f"unknown kind of state {kind!r}")
    return reentered


def reenter(resource: Any, waiting: list[types.GeneratorType[Any, Any, Any]]) -> None:
    """Call `__durable_reenter__`; if it fails, forget the generators of the graph.  Raises ResourceError."""
    try:
        resource.__durable_reenter__()
    except Exception as error:
        for gen in waiting:
            discard(gen)
        name = type(resource).__qualname__
        raise ResourceError(f"{name}.__durable_reenter__ failed: {type(error).__name__}: {error}; retry once it can be reacquired", name) from error
