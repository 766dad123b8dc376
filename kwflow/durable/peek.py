"""What a snapshot's body holds, looked at without running or even loading the author's code (semantics §4.4).

Every class and function the bytes name becomes a stub that only remembers what it was given.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from kwflow.durable.codec import _CELL, _GENERATOR
from kwflow.durable.frames import SUSPENDED
from kwflow.errors import CorruptSnapshotError

__all__ = ["Stub", "peek"]

_REAL: dict[str, type] = {cls.__name__: cls for cls in (set, frozenset, bytearray, complex, range, slice, list, dict, tuple)}


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
        held = [*map(repr, self.args), *([repr(self.state)] if self.state is not None else []), *map(repr, self.items)]
        return f"<{self.name} {' '.join(held)}>" if held else f"<{self.name}>"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in _REAL:
            return _REAL[name]
        shown = name if module.startswith("kwflow.") or module == "builtins" else f"{module}.{name}"
        return type(name, (Stub,), {"name": shown})


def peek(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(function, its variables) of each waiting generator, in the order they were met.  Raises CorruptSnapshotError."""
    try:
        unpickler = _Unpickler(io.BytesIO(body))
        unpickler.load()
        states = [state for states in iter(unpickler.load, None) for state in states]
    except Exception as error:  # damaged bytes may do anything in an unpickler
        raise CorruptSnapshotError(f"the body of a snapshot cannot be read: {type(error).__name__}: {error}") from error
    cells = {id(cell): value for kind, cell, value in states if kind == _CELL}
    found = []
    for kind, made, state in states:
        if kind == _GENERATOR and state[0] == SUSPENDED:
            values = {name: value for name, value in state[1].items() if name[0] != "@"}
            shared = [cells[id(cell)] for cell in made.args[2] if id(cell) in cells]
            found.append((made.args[4], {**values, **({"(shared with inner functions)": shared} if shared else {})}))
    return found
