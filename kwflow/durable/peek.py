"""What the body of a snapshot holds, for people: the waiting generators and their variables, as text of limited length.

This module must not know how the bytes are read: that is `stubs.py`.  Values that nest too deeply, or hold themselves, are cut off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from kwflow.durable.body import CELL, EXCEPTION, GENERATOR
from kwflow.durable.stubs import States, Stub, graph, qualname, text
from kwflow.errors import CorruptSnapshotError

__all__ = ["Shown", "peek", "peek_text"]

_BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), dict: ("{", "}"), set: ("{", "}"), frozenset: ("{", "}")}
_NESTING_MAX = 20
Naming = Callable[[States, Stub], "str | None"]


def _unnamed(_states: States, _made: Stub) -> None:
    """Nothing has a name of its own."""


def peek(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return (function, its variables) for each waiting generator, in the order in which they were saved.  Raises CorruptSnapshotError."""
    with _corrupt_if_it_fails():
        return _waiting(graph(body)[1].values())


def peek_text(body: bytes, characters: int, named: Naming = _unnamed) -> list[tuple[str, dict[str, str]]]:
    """Return what `peek` does, with each value as text of so many characters at most.  Raises CorruptSnapshotError."""
    with _corrupt_if_it_fails():
        states = graph(body)[1]
        shown = Shown(states, named)
        return [(function, {text(name): shown.text(value, characters) for name, value in values.items()}) for function, values in _waiting(states.values())]


@contextlib.contextmanager
def _corrupt_if_it_fails() -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptSnapshotError(f"the body of a snapshot is not an instance: {error!r}") from error


def _waiting(states: Collection[tuple[int, Any, Any]]) -> list[tuple[str, dict[str, Any]]]:
    cells = {id(cell): value for kind, cell, value in states if kind == CELL}
    found = []
    for kind, made, slots in states:
        if kind == GENERATOR:
            values = {name: value for name, value in slots.items() if name[0] != "@"}
            held = made.args[2] if len(made.args) > 2 else ()
            shared = [cells[id(cell)] for cell in held if id(cell) in cells]
            function = qualname(made)
            found.append((function, {**values, **({"(shared with inner functions)": shared} if shared else {})}))
    return found


class Shown:
    """Renders values for people, each within a number of characters; what nests too deeply, or holds itself, is cut off.

    `named` returns the text for an object that is to be shown in a way of its own, and None for any other.
    """

    def __init__(self, states: States, named: Naming = _unnamed) -> None:
        self._states = states
        self._named = named
        self._left = 0
        self._open: set[int] = set()

    def text(self, value: Any, characters: int) -> str:
        self._left, self._open = characters, set()
        return "".join(self._value(value, 0))[: characters + 1]

    def _value(self, value: Any, depth: int) -> Iterator[str]:
        if self._left <= 0:
            return
        if not isinstance(value, (*_BRACKETS, Stub)):
            yield self._counted(_plain(value, self._left))
        elif id(value) in self._open or depth > _NESTING_MAX:
            yield self._counted("…")
        else:
            self._open.add(id(value))
            yield from self._object(value, depth + 1) if isinstance(value, Stub) else self._container(value, depth + 1)
            self._open.discard(id(value))

    def _counted(self, text: str) -> str:
        self._left, kept = self._left - len(text), text[: max(self._left, 0)]
        return kept if self._left >= 0 else f"{kept}…"

    def _container(self, value: Any, depth: int) -> Iterator[str]:
        before, after = _BRACKETS[type(value)]
        yield self._counted(before)
        for number, item in enumerate(value):
            if self._left <= 0:
                return
            yield self._counted(", " if number else "")
            yield from self._value(item, depth)
            if isinstance(value, dict):
                yield self._counted(": ")
                yield from self._value(value[item], depth)
        yield self._counted(f",{after}" if isinstance(value, tuple) and len(value) == 1 else after)

    def _object(self, made: Stub, depth: int) -> Iterator[str]:
        kind, _, state = self._states.get(id(made), (None, None, None))
        named = self._named(self._states, made)
        if named is None and made.name in ("generator", "function") and len(made.args) > 1:
            named = f"<{made.name} {qualname(made)}>"
        moment, others = made.moment()
        if named is not None:
            yield self._counted(named)
        elif moment:
            yield self._counted(moment)
            for other in others:
                yield self._counted(" ")
                yield from self._value(other, depth)
        elif kind == CELL:
            yield from self._value(state, depth)
        elif kind == EXCEPTION and len(made.args) > 1:
            yield self._counted(str(getattr(made.args[0], "name", getattr(made.args[0], "__name__", "exception"))))
            yield from self._value(made.args[1], depth)
        else:
            yield from self._parts(made, depth)

    def _parts(self, made: Stub, depth: int) -> Iterator[str]:
        """Render an object as `Order(items=[1, 2])`."""
        state = made.state[1] if isinstance(made.state, tuple) and len(made.state) == 2 and made.state[0] is None else made.state
        attributes = _fields(state) if isinstance(state, dict) else {}
        values = [*((None, value) for value in (*made.args, *([] if state is None or isinstance(state, dict) else [state]), *made.items)), *attributes.items()]
        yield self._counted(f"{made.name}(")
        for number, (name, value) in enumerate(values):
            if self._left <= 0:
                return
            yield self._counted((", " if number else "") + ("" if name is None else f"{text(name)}="))
            yield from self._value(value, depth)
        yield self._counted(")")


def _fields(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the attributes of an object; pydantic keeps those of a model in several dicts."""
    if "__pydantic_fields_set__" not in state:
        return state
    parts = (state.get(part) for part in ("__dict__", "__pydantic_extra__", "__pydantic_private__"))
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def _plain(value: Any, characters: int) -> str:
    if isinstance(value, type):
        return f"<class {getattr(value, 'name', value.__qualname__)}>"
    try:
        return repr(value[: characters + 1] if isinstance(value, (str, bytes, bytearray)) else value)
    except ValueError:  # Python refuses to write a number of so many digits
        return f"<int of {value.bit_length()} bits>" if isinstance(value, int) else f"<{type(value).__name__} of large numbers>"
