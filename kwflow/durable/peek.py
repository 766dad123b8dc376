"""What a snapshot's body holds, looked at without running or even loading the author's code (semantics §4.1, §4.4).

Every class and function the bytes name becomes a stub that only remembers what it was given.  Nobody has checked these bytes:
none may take more memory or time than they are long.  `peek` shows the waiting generators and their variables, `told` the same
as text, `graph` gives all of it, `Shown` writes values for people, `canonical` is a form of the whole that is equal when two graphs are.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time, timedelta
from typing import Any

from kwflow.durable import rebuild
from kwflow.durable.codec import _CELL, _CREATED, _EXCEPTION, _FINISHED, _GENERATOR, _OBJECT, FORMAT, SEEDS, dumps, padded, seeded, unfilled
from kwflow.durable.frames import SUSPENDED
from kwflow.errors import CorruptSnapshotError

__all__ = ["CREATED", "OBJECT", "WAITING", "Shown", "States", "Stub", "canonical", "canonical_bytes", "graph", "peek", "qualname", "text", "told"]

_REAL: dict[str, type] = {cls.__name__: cls for cls in (complex, range)}  # what a call of another would copy, or count up: pickle has opcodes for those
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
        """As they are; times as one reads them, with their zone behind."""
        moment, others = self.moment()
        return [*([moment] if moment else []), *map(repr, others)]

    def moment(self) -> tuple[str, tuple[Any, ...]]:
        """A time as one reads it, which pickle packs into bytes, and the arguments beside it; empty if it is none."""
        if self.name in _TIMES:
            with contextlib.suppress(Exception):  # damaged
                count = 1 if isinstance(self.args[0], bytes) else len(self.args)
                return str(_TIMES[self.name](*self.args[:count])), self.args[count:]
        return "", self.args


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
    "local_class": _finds("local_class", lambda metaclass, name, *_: text(name)),
    "named": _finds("named", lambda module, qualname: f"{text(module)}.{text(qualname)}"),
}


def text(value: Any) -> str:
    """What is a text where these bytes are what they say."""
    return value if isinstance(value, str) else "?"


def _check_keys(keys: Iterable[Any]) -> None:
    """A tuple of tuples takes hash() as long as all of it is when written out, and as much of the C stack as it is deep.  Raises UnpicklingError."""
    for key in keys:
        todo, met = [(key, 0)], 0
        while todo:
            value, depth = todo.pop()
            met += 1
            if met > _KEY_VALUES_MAX or depth > _KEY_NESTING_MAX:
                raise pickle.UnpicklingError("a key of a dict, or an item of a set, nests too deeply")
            if type(value) is tuple:
                todo += [(item, depth + 1) for item in value]


def _check_filled(stack: list[Any]) -> None:
    """Attributes are for stubs: a constructor of ours is the process's own."""
    if not isinstance(stack[-2], Stub):
        raise pickle.UnpicklingError("a state for what is no object")


def _load_bytearray(unpickler: Any) -> None:
    """Python makes one before it looks whether so many bytes are there."""
    (length,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(bytearray(unpickler.read(min(length, sys.maxsize))))


def _after(check: Callable[[list[Any]], None], load: Callable[[Any], None]) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        check(unpickler.stack)
        load(unpickler)

    return checked


_LOADS: Any = pickle._Unpickler.dispatch
_CHECKS: dict[bytes, Callable[[list[Any]], None]] = {
    pickle.BUILD: _check_filled, pickle.SETITEM: lambda stack: _check_keys(stack[-2:-1]), pickle.SETITEMS: lambda stack: _check_keys(stack[::2]), pickle.ADDITEMS: _check_keys,
    pickle.FROZENSET: _check_keys,
}  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """The one in Python: its memo is a dict, and five bytes that name a high number in one do not fill the memory of the machine."""

    memo: dict[int, Any]
    dispatch = {**_LOADS, pickle.BYTEARRAY8[0]: _load_bytearray, **{code[0]: _after(check, _LOADS[code[0]]) for code, check in _CHECKS.items()}}

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
CREATED, OBJECT, WAITING = _CREATED, _OBJECT, _GENERATOR  # kinds of states


States = dict[int, tuple[int, Any, Any]]  # by the `id` of a stub: its kind, itself, and what was saved of it


def graph(body: bytes) -> tuple[Any, States]:
    """The root, and what was saved of each object that is filled after it was made.  Raises CorruptSnapshotError."""
    root, states = _stubs(body)
    return root, {id(made): (kind, made, state) for kind, made, state in states}


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
    return _checked(_stubs(body)[1])


def _checked(states: list[tuple[int, Any, Any]]) -> list[tuple[str, dict[str, Any]]]:
    try:
        return _waiting(states)
    except (LookupError, TypeError, AttributeError) as error:
        raise CorruptSnapshotError(f"the body of a snapshot is not an instance: {error!r}") from error


def told(body: bytes, characters: int) -> list[tuple[str, dict[str, str]]]:
    """The same as text, each value in so many characters.  Raises CorruptSnapshotError."""
    states = _stubs(body)[1]
    shown = Shown({id(made): (kind, made, state) for kind, made, state in states})
    return [(function, {text(name): shown.text(value, characters) for name, value in values.items()}) for function, values in _checked(states)]


def _waiting(states: list[tuple[int, Any, Any]]) -> list[tuple[str, dict[str, Any]]]:
    cells = {id(cell): value for kind, cell, value in states if kind == _CELL}
    found = []
    for kind, made, slots in states:
        if kind == _GENERATOR:
            values = {name: value for name, value in slots.items() if name[0] != "@"}
            held = made.args[2] if len(made.args) > 2 else ()
            shared = [cells[id(cell)] for cell in held if id(cell) in cells]
            function = qualname(made)
            found.append((function, {**values, **({"(shared with inner functions)": shared} if shared else {})}))
    return found


def qualname(made: Stub) -> str:
    """What a generator or function calls itself: the name in its path, without the numbers of functions that share theirs."""
    return text(made.args[4]) if len(made.args) > 4 else re.sub(r"#\d+|\.<body>$", "", text(made.args[1]))


class Shown:
    """Values as a person reads them, each in so many characters: what nests without end, or holds itself, is cut off.

    `named` says of an object that is told apart what it is, if it is to be said in other words.
    """

    def __init__(self, states: States, named: Callable[[Stub], str | None] = lambda _: None) -> None:
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
        named = self._named(made)
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
        elif kind == _CELL:
            yield from self._value(state, depth)
        elif kind == _EXCEPTION and len(made.args) > 1:
            yield self._counted(str(getattr(made.args[0], "name", getattr(made.args[0], "__name__", "exception"))))
            yield from self._value(made.args[1], depth)
        else:
            yield from self._parts(made, depth)

    def _parts(self, made: Stub, depth: int) -> Iterator[str]:
        """`Order(items=[1, 2])`."""
        state = made.state[1] if isinstance(made.state, tuple) and len(made.state) == 2 and made.state[0] is None else made.state
        attributes = state if isinstance(state, dict) else {}
        values = [*((None, value) for value in (*made.args, *([state] if state is not None and state is not attributes else []), *made.items)), *attributes.items()]
        yield self._counted(f"{made.name}(")
        for number, (name, value) in enumerate(values):
            if self._left <= 0:
                return
            yield self._counted((", " if number else "") + ("" if name is None else f"{text(name)}="))
            yield from self._value(value, depth)
        yield self._counted(")")


_BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), dict: ("{", "}"), set: ("{", "}"), frozenset: ("{", "}")}
_NESTING_MAX = 20
_KEY_VALUES_MAX = 100_000
_KEY_NESTING_MAX = 500


def _plain(value: Any, characters: int) -> str:
    if isinstance(value, type):
        return f"<class {getattr(value, 'name', value.__qualname__)}>"
    try:
        return repr(value[: characters + 1] if isinstance(value, (str, bytes, bytearray)) else value)
    except ValueError:  # Python writes no number of so many digits
        return f"<int of {value.bit_length()} bits>" if isinstance(value, int) else f"<{type(value).__name__} of large numbers>"


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
            line = f"{node.name} {ref(node.args)} {ref(node.state)} {' '.join(map(ref, node.items))} {kind} {ref(state)}"
        elif isinstance(node, dict):
            line = "{" + " ".join(f"{ref(key)}: {ref(item)}" for key, item in node.items()) + "}"
        else:
            line = f"[{' '.join(map(ref, node))}]"
        lines.append(f"#{met} {line}")
        met += 1
    return "\n".join(lines)
