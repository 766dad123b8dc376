"""Typed values: how they become JSON, and how annotations rebuild them, for activities and for the inputs of workflows.

Every rule of this conversion lives here (decision 0050).  This module must not know records or instances.
"""

from __future__ import annotations

import collections.abc
import contextlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from kwflow.core import outcomes
from kwflow.core.tasks import ABORTS
from kwflow.core.values import LEVELS_MAX, json_dumps
from kwflow.errors import ProtocolError, UsageError

__all__ = ["from_plain", "hint_of", "input_hints", "input_json", "rebuilt_input", "signature_of", "to_plain", "unchecked"]

_PLAIN = (type(None), bool, int, float, str)
_JSON: tuple[Any, ...] = (None, True, 1, 1.0, "", [], {})
_SAID_CHARACTERS_MAX = 2_000  # the validators of a model may report an error for each of 10,000 items


def to_plain(value: Any, annotated: bool) -> Any:
    """Convert to JSON values.  Without an annotation only JSON values are accepted, since nothing could rebuild others.  Raises TypeError or ValueError."""
    if annotated:
        return msgspec.to_builtins(value, builtin_types=(), str_keys=True, enc_hook=_dump_model)
    _check_plain(value, 0)
    return value


def _dump_model(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)  # pydantic
    if dump is None:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"a value of class {name} has no JSON form; make it a dataclass, or give it the model_dump and model_validate methods of pydantic")
    return dump(mode="json")


def _check_plain(value: Any, depth: int) -> None:
    if depth > LEVELS_MAX:
        raise ValueError("too deeply nested (or cyclic) for JSON")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a str; annotate it as dict[{type(key).__name__}, ...]")
            _check_plain(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, depth + 1)
    elif type(value) not in _PLAIN:
        raise TypeError(f"a value of class {type(value).__qualname__} needs an annotation, from which the other side rebuilds it")


def from_plain(value: Any, hint: Any) -> Any:
    """Rebuild a value from JSON values by its annotation: dataclasses, msgspec structs, pydantic models, and what these and containers hold."""
    return msgspec.convert(value, hint, str_keys=True, dec_hook=_load_model)


def _load_model(hint: Any, value: Any) -> Any:
    validate = getattr(hint, "model_validate", None)  # pydantic
    if validate is not None:
        return validate(value)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin in (collections.abc.Iterable, collections.abc.Container, collections.abc.Reversible):  # msgspec does not see that every list is one
        return from_plain(value, list[items])  # type: ignore[valid-type]
    raise TypeError(f"the annotation {getattr(hint, '__qualname__', hint)} cannot be rebuilt from JSON")


# -- the inputs of workflows -------------------------------------------------------------------------------------------
def input_json(value: object) -> bytes:
    """Return the input of a workflow as JSON; only the engine that runs it knows whether its parameter has an annotation.  Raises TypeError or ValueError."""
    with contextlib.suppress(TypeError):  # bytes, a pydantic model, or a container of them
        return json_dumps(value)
    return json_dumps(to_plain(value, annotated=True))


def rebuilt_input(whose: str, hint: Any, value: object) -> Any:
    """Rebuild the input by its annotation.  Raises ProtocolError if it does not fit, whatever the author's classes, which are built here, raise."""
    try:
        return from_plain(value, hint)
    except ABORTS:
        raise
    except BaseException as error:
        said = outcomes.describe_error(error).removeprefix("ValidationError: ")
    said = " ".join(said.split())  # it is also written to the log, as one line
    raise ProtocolError(f"{whose} does not accept this input: {said}"[:_SAID_CHARACTERS_MAX], "bad-input")


def input_hints(functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return by workflow name the annotations that inputs are rebuilt by, if they say anything.  Raises UsageError for one that can rebuild nothing."""
    found = {}
    for name, function in functions.items():
        said = f"the input of workflow {name!r} ({getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)})"
        target = inspect.unwrap(getattr(function, "__func__", function))
        parameter = next(iter(signature_of(function).parameters.values()), None) if isinstance(target, types.FunctionType) else None
        hint = hint_of(said, target, parameter) if parameter is not None else Any
        if not _says_nothing(hint):
            found[name] = hint
    return found


def hint_of(said: str, function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the annotation of this parameter, or Any.  All others are not resolved, since they may use names that only type checkers know.

    Raises UsageError for an annotation that nothing can be rebuilt from.
    """
    if parameter.annotation is parameter.empty:
        return Any
    alone = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        hint = typing.get_type_hints(alone, inspect.unwrap(function).__globals__, include_extras=True)[parameter.name]
        refused = next(_refused(msgspec.inspect.type_info(hint), True, set()), None)
    except Exception as error:  # an annotation is any expression
        remedy = "it must exist at run time, not only under `if TYPE_CHECKING`" if isinstance(error, NameError) else "without an annotation, the input is plain JSON"
        raise UsageError(f"{said}: its annotation cannot be resolved: {error}; {remedy}") from None
    if refused is not None:
        raise UsageError(f"{said} is annotated with {refused}")
    return hint


def _says_nothing(hint: Any) -> bool:
    return hint in (Any, object, dict) or (typing.get_origin(hint) is dict and typing.get_args(hint) in ((str, Any), (str, object)))


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return its signature.  From 3.14 on, annotations are evaluated on demand: they may use names that are defined later, or that only type checkers know."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def unchecked(hint: Any) -> str | None:
    """Name a class in it that would be rebuilt without its checks, and the remedy; None if there is none, or if msgspec does not know the annotation."""
    try:
        found = msgspec.inspect.type_info(hint)
    except Exception:  # it may use a name that does not exist
        return None
    return next(_refused(found, False, set()), None)


def _refused(found: object, needed: bool, seen: set[tuple[int, bool]]) -> Iterator[str]:
    """Name the classes in it that are not rebuilt, and the remedy.

    These are dataclasses of pydantic and, where a value is needed (not in a field that has a default), classes that cannot be rebuilt from JSON.
    """
    if isinstance(found, msgspec.inspect.CustomType) and needed and not hasattr(found.cls, "model_validate") and not _is_of_json(found.cls):
        remedy = "make it a dataclass, or give it the model_dump and model_validate methods of pydantic; without an annotation, the input is plain JSON"
        yield f"{found.cls.__module__}.{found.cls.__qualname__}, which cannot be rebuilt from JSON: {remedy}"
    if isinstance(found, msgspec.inspect.DataclassType) and hasattr(found.cls, "__pydantic_validator__"):
        remedy = "make it a pydantic.BaseModel, or a dataclass of the standard library"
        yield f"{found.cls.__module__}.{found.cls.__qualname__}, a dataclass of pydantic, which would be rebuilt without its checks and defaults: {remedy}"
    needed = needed and not (isinstance(found, msgspec.inspect.Field) and not found.required)
    if isinstance(found, msgspec.Struct) and (id(found), needed) not in seen:
        seen.add((id(found), needed))
        found = msgspec.structs.astuple(found)
    for part in found if isinstance(found, tuple) else ():
        yield from _refused(part, needed, seen)


def _is_of_json(hint: type) -> bool:
    try:
        return any(isinstance(value, hint) for value in _JSON)
    except TypeError:  # a Protocol that is only for type checkers
        return False
