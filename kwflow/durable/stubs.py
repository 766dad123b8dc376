"""The body of a snapshot as stubs: read without running or even loading author code (semantics §4.1, §4.4).

Every class and function that the bytes name becomes a stub that only remembers what it was given.  Nobody has checked these bytes:
memory and time must stay in proportion to their length.  `peek.py` shows stubs to people, `canonical.py` compares them.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from typing import Any

from kwflow.durable import body, rebuild
from kwflow.errors import CorruptSnapshotError

__all__ = ["CREATED", "GENERATORS", "OBJECT", "WAITING", "Found", "States", "Stub", "graph", "qualname", "text"]

_REAL: dict[str, type] = {cls.__name__: cls for cls in (complex, range)}  # a call of any other would copy or count up its arguments; pickle has opcodes for those
_TIMES: dict[str, Any] = {f"datetime.{cls.__name__}": cls for cls in (date, datetime, time, timedelta)}
_KEY_VALUES_MAX = 100_000
_KEY_NESTING_MAX = 500


class Stub:
    """Stands for an object of any class; remembers its class and what was saved of it."""

    name = ""

    def __new__(cls, *args: Any, **_kwargs: Any) -> Stub:
        made = object.__new__(cls)
        made.args, made.state, made.items = args, None, []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: everything happens in __new__, which is all that pickle calls."""

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
        """Return the texts of the arguments; a time is readable, followed by its zone."""
        moment, others = self.moment()
        return [*([moment] if moment else []), *map(repr, others)]

    def moment(self) -> tuple[str, tuple[Any, ...]]:
        """Return a time, which pickle packs into bytes, as readable text, and the other arguments; the text is empty if this is not a time."""
        if self.name in _TIMES:
            with contextlib.suppress(Exception):  # the bytes are damaged
                count = 1 if isinstance(self.args[0], bytes) else len(self.args)
                return str(_TIMES[self.name](*self.args[:count])), self.args[count:]
        return "", self.args


class Found(type):
    """Stands for a class that the bytes create by a call; pickle makes objects of it."""

    name: str
    made_of: tuple[Any, ...]

    def __repr__(cls) -> str:
        return f"<class '{cls.name}'>"


def _finds(constructor: str, name_of: Callable[..., str]) -> Callable[..., type]:
    """Return a function that replaces a constructor of classes; `name_of(*arguments)` is the name under which objects of the class are shown."""

    def found(*args: Any) -> type:
        return Found(constructor, (Stub,), {"name": name_of(*args), "made_of": args})

    return found


def _set_contents(made: Any, saved: Any) -> None:
    if isinstance(made, Stub):
        made.state = saved


_FINDING: dict[str, Callable[..., Any]] = {
    "class_by_value": _finds("class_by_value", lambda *_: "class_by_value"),
    "local_class": _finds("local_class", lambda metaclass, name, *_: text(name)),
    "set_contents": _set_contents,
    "named": _finds("named", lambda module, qualname: f"{text(module)}.{text(qualname)}"),
}


def text(value: Any) -> str:
    """Return a value that is a str unless the bytes are damaged or forged; then "?"."""
    return value if isinstance(value, str) else "?"


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises UnpicklingError for keys that hash() could not handle.

    For a tuple of tuples, hash() takes time in proportion to its full size written out, and C stack in proportion to its depth.
    """
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
    """Raises UnpicklingError if the bytes would set attributes of anything but a stub: one of our constructors belongs to the process."""
    if not isinstance(stack[-2], Stub):
        raise pickle.UnpicklingError("a state for what is no object")


def _load_bytearray(unpickler: Any) -> None:
    """Read the bytes before the bytearray is created; Python creates it before it checks whether there are so many bytes."""
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
    """The pure Python unpickler.  Its memo is a dict, so that five bytes that name a high memo number do not fill the machine's memory."""

    memo: dict[int, Any]
    dispatch = {**_LOADS, pickle.BYTEARRAY8[0]: _load_bytearray, **{code[0]: _after(check, _LOADS[code[0]]) for code, check in _CHECKS.items()}}

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in _REAL:
            return _REAL[name]
        if module == rebuild.__name__ and name in _FINDING:
            return _FINDING[name]
        shown = name if module.startswith("kwflow.") or module == "builtins" else f"{module}.{name}"
        return type(name, (Stub,), {"name": shown, "__module__": module})


_SEEDS = tuple(_REAL.get(seed.__name__, type(seed.__name__, (Stub,), {"name": seed.__name__})) if callable(seed) else seed for seed in body.SEEDS)
_memo = body.seeded(_SEEDS).copy()
GENERATORS = (body.GENERATOR, body.CREATED, body.FINISHED)
CREATED, OBJECT, WAITING = body.CREATED, body.OBJECT, body.GENERATOR  # kinds of states
States = dict[int, tuple[int, Any, Any]]  # by the `id` of a stub: its kind, the stub itself, and what was saved of it


def graph(data: bytes) -> tuple[Any, States]:
    """Return the root, and the saved state of each object that is filled after its creation.  Raises CorruptSnapshotError."""
    try:
        root, states = _read(data)
        return root, {id(made): (kind, made, state) for kind, made, state in zip(states[::3], states[1::3], states[2::3], strict=True)}
    except Exception as error:  # damaged bytes may do anything in an unpickler
        raise CorruptSnapshotError(f"the body of a snapshot cannot be read: {type(error).__name__}: {error}") from error


def _read(data: bytes) -> tuple[Any, list[Any]]:
    """Do what `loading.read` does, all as stubs."""
    if data[:1] != body.FORMAT:
        return body.of_format_1(_Unpickler(io.BytesIO(data)))
    unpickler = _Unpickler(body.padded(data))
    unpickler.load()
    unpickler.memo = dict(_memo)
    made = unpickler.load()
    return body.unfilled(made.items if isinstance(made, Stub) else made)


def qualname(made: Stub) -> str:
    """Return the qualified name of a generator or function: its path without the numbers that tell functions of the same name apart."""
    return text(made.args[4]) if len(made.args) > 4 else re.sub(r"#\d+|\.<body>$", "", text(made.args[1]))
