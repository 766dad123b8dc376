"""What a snapshot's body holds, looked at without running or even loading the author's code (semantics §4.1, §4.4).

Every class and function the bytes name becomes a stub that only remembers what it was given.  `peek` shows the waiting
generators, `canonical` is a form of the whole graph that is equal when two graphs are.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from typing import Any

from kwflow.durable import rebuild
from kwflow.durable.codec import _CELL, _CREATED, _FINISHED, _GENERATOR, FORMAT, SEEDS, dumps, padded, seeded, unfilled
from kwflow.durable.frames import SUSPENDED
from kwflow.errors import CorruptSnapshotError

__all__ = ["Stub", "canonical", "canonical_bytes", "peek"]

_REAL: dict[str, type] = {cls.__name__: cls for cls in (set, frozenset, bytearray, complex, range, slice, list, dict, tuple)}
_TIMES: dict[str, Any] = {f"datetime.{cls.__name__}": cls for cls in (date, datetime, time, timedelta)}


class Stub:
    """Stands for an object of any class; shows its class and what was saved of it."""

    name = ""

    def __new__(cls, *args: Any, **_kwargs: Any) -> Stub:
        made = object.__new__(cls)
        made.args, made.state, made.items = args, None, []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything happened in __new__, which is all that pickle calls."""

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    add = append

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        held = [*self._arguments(), *([repr(self.state)] if self.state is not None else []), *map(repr, self.items)]
        return f"<{self.name} {' '.join(held)}>" if held else f"<{self.name}>"

    def _arguments(self) -> list[str]:
        """As they are; times as one reads them, which pickle packs into bytes, with their zone behind."""
        if self.name in _TIMES:
            with contextlib.suppress(Exception):  # damaged
                count = 1 if isinstance(self.args[0], bytes) else len(self.args)
                return [str(_TIMES[self.name](*self.args[:count])), *map(repr, self.args[count:])]
        return [*map(repr, self.args)]


class _Found(type):
    """Stands for a class that the bytes make by a call: pickle makes objects of it."""

    name: str
    made_of: tuple[Any, ...]

    def __repr__(cls) -> str:
        return f"<class '{cls.name}'>"


def _finds(constructor: str, name_of: Callable[..., str]) -> Callable[..., type]:
    """In place of a constructor of classes; `name_of` its arguments is what an object of it is shown as."""

    def found(*args: Any) -> type:
        return _Found(constructor, (Stub,), {"name": name_of(*args), "made_of": args})

    return found


_FINDING: dict[str, Callable[..., type]] = {
    "class_by_value": _finds("class_by_value", lambda *_: "class_by_value"),
    "local_class": _finds("local_class", lambda metaclass, name, *_: str(name)),
    "named": _finds("named", lambda module, qualname: f"{module}.{qualname}"),
}


class _Unpickler(pickle._Unpickler):
    """The one in Python: its memo is a dict, and five bytes that name a high number in one do not fill the memory of the machine."""

    memo: dict[int, Any]

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in _REAL:
            return _REAL[name]
        if module == rebuild.__name__ and name in _FINDING:
            return _FINDING[name]
        shown = name if module.startswith("kwflow.") or module == "builtins" else f"{module}.{name}"
        return type(name, (Stub,), {"name": shown, "__module__": module})


_SEEDS = tuple(_REAL.get(seed.__name__, type(seed.__name__, (Stub,), {"name": seed.__name__})) if callable(seed) else seed for seed in SEEDS)
_memo = seeded(_SEEDS).copy()
_GENERATORS = (_GENERATOR, _CREATED, _FINISHED)


def _stubs(body: bytes) -> tuple[Any, list[tuple[int, Any, Any]]]:
    """The root and the deferred states, of stubs."""
    try:
        if body[:1] != FORMAT:
            return _stubs_of_format_1(body)
        unpickler = _Unpickler(padded(body))
        unpickler.load()
        unpickler.memo = dict(_memo)
        made = unpickler.load()
        states = unfilled(made.items if isinstance(made, Stub) else made)
        return states[0], list(zip(states[2::3], states[3::3], states[4::3], strict=True))
    except Exception as error:  # damaged bytes may do anything in an unpickler
        raise CorruptSnapshotError(f"the body of a snapshot cannot be read: {type(error).__name__}: {error}") from error


def _stubs_of_format_1(body: bytes) -> tuple[Any, list[tuple[int, Any, Any]]]:
    unpickler = _Unpickler(io.BytesIO(body))
    root = unpickler.load()
    found = [state for states in iter(unpickler.load, None) for state in states]
    numbers = {"created": _CREATED, "finished": _FINISHED, SUSPENDED: _GENERATOR}
    return root, [(numbers[state[0]], made, state[1]) if kind == _GENERATOR else (kind, made, state) for kind, made, state in found]


def peek(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(function, its variables) of each waiting generator, in the order they were met.  Raises CorruptSnapshotError."""
    _, states = _stubs(body)
    cells = {id(cell): value for kind, cell, value in states if kind == _CELL}
    found = []
    for kind, made, slots in states:
        if kind == _GENERATOR:
            values = {name: value for name, value in slots.items() if name[0] != "@"}
            held = made.args[2] if len(made.args) > 2 else ()
            shared = [cells[id(cell)] for cell in held if id(cell) in cells]
            function = made.args[4] if len(made.args) > 4 else _qualname(made.args[1])
            found.append((function, {**values, **({"(shared with inner functions)": shared} if shared else {})}))
    return found


def _qualname(path: str) -> str:
    """The name in a path, without the numbers of functions that share theirs."""
    return re.sub(r"#\d+", "", path)


def canonical(root: Any) -> str:
    """A text that is equal for two graphs that mean the same: nodes numbered as they are met, sets sorted, strings by value.

    Raises UnsavableError, as `dumps`.
    """
    return canonical_bytes(dumps(root))


def canonical_bytes(body: bytes) -> str:
    """`canonical` of what these bytes hold.  Raises CorruptSnapshotError."""
    root, states = _stubs(body)
    deferred = {id(made): (kind, dict(sorted(state.items())) if kind in _GENERATORS else state) for kind, made, state in states}
    numbers: dict[int, int] = {}
    nodes: list[Any] = []

    def ref(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({' '.join(map(ref, value))})"
        if isinstance(value, (set, frozenset)):
            return f"{type(value).__name__}{{{' '.join(sorted(map(flat, value)))}}}"
        if isinstance(value, _Found):
            return f"{value.name} {ref(value.made_of)}"
        if not isinstance(value, (list, dict, bytearray, Stub)):
            return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)
        if id(value) not in numbers:
            numbers[id(value)] = len(nodes)
            nodes.append(value)
        return f"#{numbers[id(value)]}"

    def flat(value: Any) -> str:  # elements of sets are hashable: no cycle leads through them without an object
        return f"{value.name}{flat(value.args)}{flat(value.state)}" if isinstance(value, Stub) else ref(value)

    lines = [ref(root)]
    met = 0
    while met < len(nodes):
        node = nodes[met]
        kind, state = deferred.get(id(node), ("", None))
        if isinstance(node, Stub):
            text = f"{node.name} {ref(node.args)} {ref(node.state)} {' '.join(map(ref, node.items))} {kind} {ref(state)}"
        elif isinstance(node, dict):
            text = "{" + " ".join(f"{ref(key)}: {ref(item)}" for key, item in node.items()) + "}"
        else:
            text = f"[{' '.join(map(ref, node))}]"
        lines.append(f"#{met} {text}")
        met += 1
    return "\n".join(lines)
