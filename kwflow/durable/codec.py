"""Object graphs that hold durable generators, to bytes and back: the two calls, and what becomes of errors in them.

body.py says what the bytes are, saving.py how objects become them, loading.py how they become objects; this module must not know
workflows.
"""

from __future__ import annotations

import collections
import contextlib
import io
import types
from typing import Any

from kwflow.durable import culprit, loading, rebuild, registry
from kwflow.durable.body import FORMAT
from kwflow.durable.frames import discard, enter, forget_shells
from kwflow.durable.lower import LOWERING_VERSION
from kwflow.durable.moves import MovingNames
from kwflow.durable.reducers import PROTOCOL
from kwflow.durable.saving import Code, GraphPickler, register_class
from kwflow.errors import CorruptSnapshotError, SnapshotError

__all__ = ["Code", "dumps", "dumps_with_code", "loads", "register_class"]


class _TracingPickler(GraphPickler):
    def reducer_override(self, value: Any) -> Any:
        self.seen.append(value)
        return super().reducer_override(value)

    seen: collections.deque[Any]


def _last_seen(root: Any, pins: registry.Pins) -> list[Any]:
    """Return the last objects that a save of this graph looks at before it fails."""
    pickler = _TracingPickler(io.BytesIO(), PROTOCOL)
    pickler.seen = collections.deque(maxlen=20)
    with contextlib.suppress(Exception):
        pickler.begin(root, pins)
    return list(pickler.seen)


def _is_savable(value: Any, pins: registry.Pins) -> bool:
    try:
        GraphPickler(io.BytesIO(), PROTOCOL).begin(value, pins)
    except Exception:
        return False
    return True


def dumps(root: Any) -> bytes:
    """Return the graph below `root` as bytes.

    Raises UnsavableError that names variable, function, file, line and type of what cannot be saved, NotDurableError for a
    native generator.
    """
    return dumps_with_code(root, {})[0]


def dumps_with_code(root: Any, pins: registry.Pins) -> tuple[bytes, Code, str]:
    """Return `dumps` of a graph that was loaded with these pins, the code that it holds, and the minor that it is bound to ("" if to none)."""
    file = io.BytesIO()
    file.write(FORMAT)
    pickler = GraphPickler(file, PROTOCOL)
    try:
        pickler.begin(root, pins)
    except Exception as error:  # reducers of any class may raise anything
        raise culprit.explain(root, error, _last_seen(root, pins), lambda value: _is_savable(value, pins)) from error
    return file.getvalue(), pickler.held, pickler.minor


_no_pins: registry.Pins = {}


def loads(data: bytes, pins: registry.Pins = _no_pins, lowering: int = LOWERING_VERSION, moving: MovingNames | None = None) -> Any:
    """Return the graph that was saved.  Generators wait at the yields where they were saved, in the pinned versions of modules, or else in the current ones.

    With `moving`, which has the same pins, generators of old versions wait at the same yields of edited functions instead.

    Raises SnapshotError and nothing else; a CodeChangedError names the module that lacks something.  `__durable_reenter__` of objects that have it is
    called last; what it raises becomes a ResourceError.
    """
    waiting: list[types.GeneratorType[Any, Any, Any]] = []
    try:
        root, states = loading.read(data, moving or (rebuild.Names(pins) if pins else rebuild.CURRENT))
        if lowering != LOWERING_VERSION:
            loading.upgrade(states, lowering, LOWERING_VERSION, moving)
        if moving is not None:
            moving.settle(states)
        reentered = loading.fill(states, waiting)
        for gen in waiting:
            enter(gen)
    except BaseException as error:
        for gen in waiting:
            discard(gen)
        forget_shells()
        if isinstance(error, SnapshotError) or not isinstance(error, (Exception, SystemExit)):  # the `__setstate__` of an author's class may raise anything
            raise
        raise CorruptSnapshotError(f"not a readable snapshot: {type(error).__name__}: {error}") from error
    for resource in reentered:
        loading.reenter(resource, waiting)
    return root
