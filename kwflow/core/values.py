"""The JSON values of messages.  One rule: they are written without a silent change, and nested no deeper than any Python can read, save and write."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import re
import types
from collections.abc import Awaitable
from typing import Any, NoReturn

import msgspec

__all__ = ["LEVELS_MAX", "MESSAGE_LEVELS", "check_levels", "json_dumps"]

LEVELS_MAX = 200  # of nested values: every Python can read, save and write that many, from any depth of calls (3.11 saves about 450)
MESSAGE_LEVELS = 5  # levels that our own messages put around a value
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_OPENS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DICTS = (dict, getattr(builtins, "frozendict", dict))  # frozendict is in 3.15; the same as names.DICTS, which is in a package that clients do not load


def json_dumps(value: object) -> bytes:
    """Return compact JSON in insertion order; refuse what msgspec would change silently (wire.md §4)."""
    _check_json(value, 0)
    return msgspec.json.encode(value, enc_hook=_refused)


def _refused(value: object) -> NoReturn:
    if isinstance(value, (types.GeneratorType, Awaitable)):
        name = f"the generator {value.__qualname__}" if isinstance(value, types.GeneratorType) else repr(value)
        raise TypeError(f"{name} has no JSON form, as nobody has waited for it; write `yield` or `await` before its call")
    raise TypeError(f"an object of class {type(value).__qualname__} has no JSON form; pass its values, for a pydantic model .model_dump(mode='json')")


def _check_json(value: object, depth: int) -> None:
    if depth > LEVELS_MAX + MESSAGE_LEVELS:
        raise ValueError("too deeply nested (or cyclic) for JSON")
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{value!r} has no JSON form")
    elif isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError("bytes have no JSON form; decode them first")
    elif isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, _DICTS):
        for key, item in value.items():
            _check_json(key, depth + 1)
            _check_json(item, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _check_json(item, depth + 1)
    elif value is not None and not isinstance(value, int):
        for item in _parts(value):
            _check_json(item, depth + 1)


def _parts(value: Any) -> list[Any]:
    """The values that msgspec writes for an object of an author's class."""
    if isinstance(value, enum.Enum):
        return [value.value]
    names = getattr(type(value), "__struct_fields__", None)
    if names is None:
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else [field for field in getattr(type(value), "__attrs_attrs__", ()) if not field.name.startswith("_")]
        names = [field.name for field in fields]
    return [getattr(value, name, None) for name in names]


def check_levels(data: bytes, more: int = 0) -> None:
    """Raises ValueError for JSON that nests values more than LEVELS_MAX + `more` deep.  A decoder must have accepted `data` before.

    An instance that received such a value could not be saved and would be parked.  Only the sender can do something about it.
    """
    most = LEVELS_MAX + more
    if data.count(b"[") + data.count(b"{") <= most:
        return
    brackets = _STRING.sub(b"", data).translate(_OPENS, _NO_BRACKETS)
    for _ in range(most):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")  # removes the innermost level everywhere
    if brackets:
        raise ValueError(f"the JSON is nested more than {LEVELS_MAX} levels deep; keep long chains in arrays")
