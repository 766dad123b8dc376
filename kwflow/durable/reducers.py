"""How each kind of value that a variable may hold is saved, besides generators, functions, cells and exceptions (saving.py) and iterators (positions.py).

There is one table, by exact type or, for modules that need not be loaded, by name.  A reducer returns what `pickle` expects
of `__reduce__`.  It names constructors in rebuild.py or iters.py, never a private name of the standard library, so that a
snapshot written on one minor of Python loads on the others.
"""

from __future__ import annotations

import array
import collections
import copyreg
import enum
import gc
import operator
import re
import struct
import sys
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

from kwflow.durable import names, positions, rebuild, registry
from kwflow.durable.names import Refused
from kwflow.errors import UsageError

__all__ = ["PROTOCOL", "as_pickle_reduces", "cannot_be_filled", "has_contents", "is_value", "plain", "reduce_contents", "reduce_module", "reducer_of", "register_reducer"]

PROTOCOL = 5  # of pickle
Reducer = Callable[[Any], Any]
_ATOMS = (type(None), bool, int, float, str, bytes, bytearray, tuple, list, dict, set, frozenset, type, types.FunctionType, types.GeneratorType, types.CellType)


plain: set[type[Any]] = set()  # classes whose objects pickle can save by itself, unless the object is a sentinel


def register_reducer(cls: type[Any], reduce: Callable[[Any], Any], build: Callable[[Any], Any], name: str | None = None) -> None:
    """Save objects of exactly this class as `reduce(object)`, and rebuild them with `build(that value)`.

    `reduce` returns any value that can be saved and that does not lead back to the object.  `name` (by default that of the
    class) is written into snapshots, so keep it as long as they live.  In old code that is loaded beside the new, this call has
    no effect, except for classes of that old code (semantics §8.4).  Raises UsageError for builtin values and for a name that is taken.
    """
    key = name or f"{cls.__module__}.{cls.__qualname__}"
    old = registry.version(getattr(build, "__module__", None) or "")
    if old is not None:
        if registry.version(cls.__module__) is not old:
            return
        key = f"{key}@{old.version[:12]}"
    if not isinstance(cls, type) or cls in _ATOMS or issubclass(cls, BaseException):
        raise UsageError(f"{cls!r} is already saved by kwflow; register_reducer is for other classes")
    known = _owners.get(key)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UsageError(f"the reducer {key!r} is for {known.__module__}.{known.__qualname__} already; give this one another name")
    _owners[key] = cls
    rebuild.builders[key] = build
    plain.discard(cls)
    _BY_TYPE[cls] = lambda value: (rebuild.custom, (key, reduce(value)))


_owners: dict[str, type[Any]] = {}


def reducer_of(cls: type[Any]) -> Reducer | None:
    """Return the reducer of this class, if it has one."""
    found = _BY_TYPE.get(cls)
    if found is None and issubclass(cls, enum.Enum) and cls.__reduce_ex__ in _ENUMS:
        return _enum
    if found is None:
        found = _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    if found is None and str(cls.__module__).partition(".")[0] == "numpy":
        found = next((_FAMILIES[key] for base in cls.__mro__ if (key := f"{base.__module__}.{base.__qualname__}") in _FAMILIES), None)
    return found


def is_value(value: Any) -> bool:
    """Whether a copy is as good as the object.  Such a value is never saved as the global bound to it: after a deployment, that may be another value."""
    cls = type(value)
    if isinstance(value, enum.Enum):
        return names.allowed(cls.__module__, cls.__qualname__, cls)
    if f"{cls.__module__}.{cls.__qualname__}" not in _VALUES:
        return False
    zone = getattr(value, "tzinfo", None)
    return getattr(value, "key", "") is not None and (zone is None or is_value(zone))


def as_pickle_reduces(value: Any) -> Any:
    """Return what its class, or a function registered for it, tells pickle to save; None if that is the default of all classes, or if it fails."""
    cls: Any = type(value)
    reduce: Any = copyreg.dispatch_table.get(cls)
    if reduce is None and cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__:
        return None
    try:
        return reduce(value) if reduce is not None else value.__reduce_ex__(PROTOCOL)
    except Exception:  # saving it will raise the error
        return None


def cannot_be_filled(cls: Any) -> bool:
    """Whether `__getattr__` of this class fails when an unpickler asks an empty object for `__setstate__`."""
    if not hasattr(cls, "__getattr__") or cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        return False
    try:
        empty = cls.__new__(cls)
    except Exception:  # it needs arguments
        return False
    try:
        getattr(empty, "__setstate__", None)
    except Exception:
        return True
    return False


def has_contents(cls: Any) -> bool:
    """Whether this subclass of dict, list or set fills itself by a method of its own, which pickle would call while the object has no attributes yet."""
    if any(hasattr(cls, name) for name in ("__setstate__", "__getnewargs__", "__getnewargs_ex__")) or cls.__getstate__ is not object.__getstate__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        return False
    if issubclass(cls, dict):
        return cls.__reduce__ is object.__reduce__ and cls.__new__ is dict.__new__ and cls.items is dict.items and cls.__setitem__ is not dict.__setitem__
    if issubclass(cls, list):
        filled = cls.append is list.append and cls.extend is list.extend
        return cls.__reduce__ is object.__reduce__ and cls.__new__ is list.__new__ and cls.__iter__ is list.__iter__ and not filled
    return issubclass(cls, set) and cls.__reduce__ is set.__reduce__ and cls.__new__ is set.__new__ and cls.__iter__ is set.__iter__ and cls.__init__ is not set.__init__


def reduce_contents(value: Any) -> Any:
    """Reduce such an object to an empty one that is filled once it has attributes."""
    held = dict(value) if isinstance(value, dict) else list(value)
    return copyreg.__newobj__, (type(value),), (value.__getstate__(), held), None, None, rebuild.set_contents  # type: ignore[attr-defined]


# -- attributes of builtin objects -----------------------------------------------------------------------------------


def _builtin(value: Any) -> Any:
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        module = value.__module__ or ""
        if not names.allowed(module, value.__qualname__, value):
            raise Refused(f"the function {module}.{value.__qualname__} of a module that is not durable; list it under [snapshot] modules in kwflow.toml, or call it where it is needed")
        return NotImplemented
    return _bound(value)


def _bound(value: Any) -> Any:
    owner = value.__self__
    if not names.is_bound(owner, value.__name__):
        raise Refused(f"the method {value.__name__} of a {type(owner).__name__}; keep the object and call its method where it is needed")
    return rebuild.bound, (owner, value.__name__)


def _descriptor(value: Any) -> Any:
    owner = value.__objclass__
    if not names.is_bound(owner, value.__name__):
        raise Refused(f"{owner.__name__}.{value.__name__}; write a function instead")
    return rebuild.bound, (owner, value.__name__)


# -- other values ----------------------------------------------------------------------------------------------------


def reduce_module(value: Any) -> Any:
    name: str = value.__name__
    if not names.is_module_value(name) or sys.modules.get(name) is not value:
        raise Refused(f"the module {name!r}, which cannot be found under that name; import it where it is needed")
    return rebuild.imported_module, (name,)


def _mapping_proxy(value: Any) -> Any:
    return rebuild.mapping_proxy, (gc.get_referents(value)[0],)


def _view(value: Any) -> Any:
    return rebuild.view, (gc.get_referents(value)[0], type(value).__name__.removeprefix("dict_").removeprefix("odict_"))


def _memory(value: Any) -> Any:
    whole = value.obj
    if not isinstance(whole, (bytes, bytearray, array.array)) or value.nbytes != memoryview(whole).nbytes or value.format != memoryview(whole).format:
        raise Refused("a memoryview of part of an object; keep the bytes, or the whole object and the bounds")
    return rebuild.memory, (whole,)


def _weak(value: Any) -> Any:
    raise Refused("a weak reference: what it points to may be gone after a restore; keep the object itself, or a key to look it up")


def _context(value: Any) -> Any:
    raise Refused("context variables belong to a thread of one process; keep their value in a variable of your own")


def _super(value: Any) -> Any:
    return rebuild.super_of, (value.__thisclass__, value.__self__)


def _match(value: Any) -> Any:
    pattern, text = value.re, value.string
    for way, first in (("search", value.pos), ("match", value.pos), ("fullmatch", value.pos), ("match", value.start()), ("fullmatch", value.start()), ("search", value.start())):
        again = getattr(pattern, way)(text, first, value.endpos)
        if again is not None and again.regs == value.regs and again.lastindex == value.lastindex:
            return rebuild.match, (pattern, way, text, first, value.endpos)
    raise Refused("a match that its pattern does not find again; keep its groups")


def _path(value: Any) -> Any:
    return rebuild.path, (type(value).__name__, str(value))


def _zone(value: Any) -> Any:
    if value.key is None:
        raise Refused("a time zone read from a file, which has no key; use ZoneInfo(key)")
    return rebuild.zone, (value.key,)


def _logger(value: Any) -> Any:
    return rebuild.logger, (value.name,)


def _enum(value: Any) -> Any:
    """Save an enum member by its value, on every minor; Python reduces some to `getattr`, which snapshots may not name.

    A member whose value equals only itself, such as a function, is saved by its name, since the value would find no member after a restore.
    """
    equal: Any = type(value._value_).__eq__
    if equal is object.__eq__ and value._name_ is not None:
        return operator.getitem, (type(value), value._name_)
    return type(value), (value._value_,)


_ENUMS = (enum.Enum.__reduce_ex__, enum.Flag.__reduce_ex__, enum.IntFlag.__reduce_ex__, enum.IntEnum.__reduce_ex__)


def _struct(value: Any) -> Any:
    return struct.Struct, (value.format,)


def _numpy_array(value: Any) -> Any:
    return rebuild.numpy_array, (_described(value.dtype), value.shape, value.reshape(-1).tolist() if value.dtype.hasobject else value.tobytes())


def _numpy_scalar(value: Any) -> Any:
    if value.dtype.hasobject:
        raise Refused("a numpy.void that holds objects; keep its item()")
    return rebuild.numpy_array, (_described(value.dtype), None, value.tobytes())


def _numpy_dtype(value: Any) -> Any:
    return rebuild.numpy_array, (_described(value), None, None)


def _described(kind: Any) -> Any:
    """Return a description from which `numpy.dtype` makes the same type; its own `descr` turns the padding between fields into more fields."""
    if kind.subdtype is not None:
        return _described(kind.base), kind.shape
    if kind.names is None:
        if kind.kind not in "?bcfimuMOSUV":
            raise Refused(f"numpy's {kind}, which has no name from which it could be recreated; keep a list, or an array of objects")
        return kind.str
    fields = [kind.fields[name] for name in kind.names]
    described = {"names": list(kind.names), "formats": [_described(field[0]) for field in fields], "offsets": [field[1] for field in fields], "itemsize": kind.itemsize}
    titles = [field[2] if len(field) > 2 else None for field in fields]
    return described | ({"titles": titles} if any(titles) else {}) | ({"aligned": True} if kind.isalignedstruct else {})


_BY_TYPE: dict[type[Any], Reducer] = {
    **positions.REDUCERS,
    **{type(getattr({}, way)()): _view for way in ("keys", "values", "items")},
    **{type(getattr(collections.OrderedDict(), way)()): _view for way in ("keys", "values", "items")},
    types.BuiltinFunctionType: _builtin,
    type(re.compile("").search): _builtin,  # methods that receive their defining class have a type of their own
    types.MethodWrapperType: _bound,
    types.MethodDescriptorType: _descriptor,
    types.WrapperDescriptorType: _descriptor,
    types.ClassMethodDescriptorType: _descriptor,
    types.MappingProxyType: _mapping_proxy,
    memoryview: _memory,
    super: _super,
    re.Match: _match,
    struct.Struct: _struct,
    weakref.ReferenceType: _weak,
    weakref.ProxyType: _weak,
    weakref.CallableProxyType: _weak,
    weakref.WeakKeyDictionary: _weak,
    weakref.WeakValueDictionary: _weak,
    weakref.WeakSet: _weak,
    weakref.WeakMethod: _weak,
}
_PATHS = [f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")]
_BY_NAME: dict[str, Reducer] = {
    **dict.fromkeys(_PATHS, _path),
    **{f"_contextvars.{kind}": _context for kind in ("Context", "ContextVar", "Token")},
    **{f"contextvars.{kind}": _context for kind in ("Context", "ContextVar", "Token")},
    "zoneinfo.ZoneInfo": _zone,
    "logging.Logger": _logger,
    "logging.RootLogger": _logger,
    "numpy.ndarray": _numpy_array,
}
_VALUES = frozenset(
    "builtins.ellipsis builtins.NotImplementedType builtins.range datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone decimal.Decimal fractions.Fraction "
    "ipaddress.IPv4Address ipaddress.IPv4Interface ipaddress.IPv4Network ipaddress.IPv6Address ipaddress.IPv6Interface ipaddress.IPv6Network re.Pattern uuid.UUID zoneinfo.ZoneInfo".split()
).union(_PATHS)
_FAMILIES: dict[str, Reducer] = {"numpy.generic": _numpy_scalar, "numpy.dtype": _numpy_dtype}
register_reducer(typing.TypeVar, lambda variable: variable.__name__, typing.TypeVar)  # the T of `def f[T]`; saved without its bound
