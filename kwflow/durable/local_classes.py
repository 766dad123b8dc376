"""Classes defined inside a function of a durable module: they are saved as their parts.

Their functions are saved by their path in the source, as closures are, so such a snapshot loads on every minor of Python and
contains no code.  Classes made by generated code (enums, named tuples, attrs) have no such parts.  cloudpickle saves these, but only
if that is allowed, since it binds the snapshot to one minor and makes every byte of it a way to run code.
"""

from __future__ import annotations

import abc
import enum
import sys
import types
from typing import Any

from kwflow.durable import rebuild, registry
from kwflow.durable.names import Refused

__all__ = ["by_value", "reduce_class"]

_OWN = frozenset("__dict__ __weakref__ __slots__ _abc_impl __annotate_func__ __annotations_cache__ __static_attributes__ __firstlineno__".split())
_DATACLASS = frozenset("__dataclass_fields__ __dataclass_params__ __match_args__ __init__ __repr__ __eq__ __lt__ __le__ __gt__ __ge__ __hash__ __setattr__ __delattr__ __replace__".split())
_PARAMS = ("init", "repr", "eq", "order", "unsafe_hash", "frozen", "match_args", "kw_only")


def reduce_class(cls: type[Any]) -> Any:
    """Return what `__reduce__` of this class would return.  Raises Refused if the class cannot be rebuilt from its parts."""
    if isinstance(cls, enum.EnumMeta) or (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        raise Refused(f"the class {cls.__qualname__} is defined inside a function; define enums and named tuples at module level")
    if type(cls) not in (type, abc.ABCMeta):
        raise Refused(f"the class {cls.__qualname__} is defined inside a function, with a metaclass of its own; define it at module level")
    params = cls.__dict__.get("__dataclass_params__")
    dataclass = {name: getattr(params, name) for name in _PARAMS if hasattr(params, name)} if params is not None else None
    if dataclass and "__slots__" in cls.__dict__:
        raise Refused(f"the dataclass {cls.__qualname__} with slots is defined inside a function; define it at module level")
    cls.__doc__  # 3.15 creates the docstring of a dataclass when it is first read
    members = {name: _member(cls, name, value) for name, value in cls.__dict__.items() if not _made_again(name, value, dataclass)}
    if annotations := _annotations(cls):
        members["__annotations__"] = annotations
    if dataclass is not None:
        members |= _fields(cls)
    members = dict(sorted(members.items())) | {"__qualname__": cls.__qualname__}  # in the same order, however the class was made
    return rebuild.local_class, (type(cls), cls.__name__, cls.__bases__, cls.__dict__.get("__slots__")), (members, dataclass), None, None, rebuild.set_class


def by_value(cls: type[Any]) -> tuple[str, bytes]:
    """Return the arguments of `rebuild.class_by_value`: this minor, and cloudpickle's bytes.  Raises Refused."""
    import cloudpickle  # type: ignore[import-untyped] # it has no types

    try:
        return rebuild.MINOR, cloudpickle.dumps(cls)
    except Exception as error:  # cloudpickle walks into everything that the class refers to
        raise Refused(f"the class {cls.__qualname__} is defined inside a function, and cloudpickle cannot save it: {error}") from error


def _made_again(name: str, value: Any, dataclass: Any) -> bool:
    if name in _OWN or isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
        return True
    if dataclass is None or name not in _DATACLASS:
        return False
    return not (isinstance(value, types.FunctionType) and registry.function_of(value.__code__) is not None)


def _annotations(cls: type[Any]) -> dict[str, Any]:
    """Return the class's own annotations; a name that cannot be resolved yet is kept as text."""
    own: dict[str, Any] = cls.__dict__.get("__annotations__", {})
    if sys.version_info >= (3, 14):
        import annotationlib  # type: ignore[import-not-found, unused-ignore] # since 3.14

        found = annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF)
        own = {name: value.__forward_arg__ if isinstance(value, annotationlib.ForwardRef) else value for name, value in found.items()}
    return own


def _fields(cls: type[Any]) -> dict[str, Any]:
    """Return the fields as the author wrote them, so that `dataclass` can be applied again; inherited fields come with the base class."""
    import dataclasses

    own = _annotations(cls)
    found = {}
    for name, field in cls.__dict__["__dataclass_fields__"].items():
        if name in own and field._field_type.name == "_FIELD":
            values = {key: getattr(field, key) for key in ("default", "default_factory", "init", "repr", "hash", "compare", "kw_only") if getattr(field, key) is not dataclasses.MISSING}
            found[name] = rebuild.Wrapped("field", (values, dict(field.metadata)))
    return found


def _member(cls: type[Any], name: str, value: Any) -> Any:
    if isinstance(value, property):
        return rebuild.Wrapped("property", (value.fget, value.fset, value.fdel, value.__doc__))
    if isinstance(value, (staticmethod, classmethod)):
        return rebuild.Wrapped(type(value).__name__, (value.__func__,))
    if isinstance(value, types.FunctionType) and registry.function_of(value.__code__) is None and value.__module__ == cls.__module__:
        raise Refused(f"the class {cls.__qualname__} is defined inside a function and its {name} is not written in it; define the class at module level")
    return value
