"""Constructors that snapshots name: what our unpickler may call besides a fixed table of builtins.

All of `names.CONSTRUCTORS` are here, and snapshots name them by this module, so none can move.  `Names` has those that need to
know which module versions the snapshot means (semantics §8.2).

Cells, functions, classes, exceptions and generators are created empty, and `loading.fill` fills them afterwards, so that
cycles and chains of any length need no recursion.  Names and arguments here are part of the snapshot format.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from kwflow.durable import iters, names, registry
from kwflow.durable.frames import empty
from kwflow.durable.registry import Function, Module, Pins
from kwflow.durable.runtime import as_coroutine
from kwflow.durable.stacks import made_callback
from kwflow.errors import CodeChangedError, CorruptSnapshotError, SnapshotError

__all__ = [
    "CONSTRUCTORS", "CURRENT", "MINOR", "Names", "Wrapped", "bound", "builders", "cell", "class_by_value", "custom", "exception", "exit_callback", "function", "generator", "global_of",
    "imported_module", "instance", "iterator_at", "local_class", "logger", "mapping_proxy", "match", "memory", "method", "named", "nothing", "numpy_array", "path", "register", "set_class",
    "set_contents", "set_function", "super_of", "tag_of", "view", "zone",
]  # fmt: skip

_makers: dict[int, Callable[[], Any]] = {}
_tags: dict[type[Any], int] = {}
builders: dict[str, Callable[[Any], Any]] = {}  # by name in snapshots: the `build` of `register_reducer`


def register(tag: int, cls: type[Any]) -> None:
    """Give a class its number in snapshots."""
    _makers[tag], _tags[cls] = functools.partial(cls.__new__, cls), tag


def tag_of(cls: type[Any]) -> int:
    return _tags[cls]


def instance(tag: int) -> Any:
    """Return an object of a registered class, still empty."""
    try:
        make = _makers[tag]
    except KeyError:
        raise CorruptSnapshotError(f"a snapshot holds an object of class number {tag}, which this version of kwflow does not know") from None
    return make()


# -- generators, functions, cells ----------------------------------------------------------------------------------


def nothing() -> None:
    return None


def super_of(cls: type[Any], owner: Any) -> Any:
    return super(cls, owner)


def cell() -> types.CellType:
    return types.CellType()


class Names:
    """What the names in one snapshot mean: the versions that its header pins, or else current code.

    Every public method is a constructor.  Its argument `module` is a reference as `registry.reference` returns it.
    """

    def __init__(self, pins: Pins) -> None:
        self.pins = pins

    def _function(self, module: str, path: str) -> Function:
        try:
            return registry.module(module, self.pins).functions[path]
        except KeyError:
            raise CodeChangedError(f"{module} no longer has a function {path!r}", module) from None

    def generator(
        self, module: str, path: str, cells: tuple[types.CellType, ...] = (), name: str | None = None, qualname: str | None = None
    ) -> types.GeneratorType[Any, Any, Any]:
        return empty(self._function(module, path), cells, name, qualname)

    def function(self, module: str, path: str, cells: tuple[types.CellType, ...]) -> types.FunctionType:
        found = self._function(module, path)
        made = types.FunctionType(found.plain, found.namespace, found.name, None, cells)
        if found.annotations:
            made.__annotations__ = found.annotations.copy()
        return as_coroutine(made) if found.coroutine else made

    def named(self, module: str, qualname: str) -> Any:
        """Return a class or function that a durable module defines, or what has taken its place (after a move or a renaming) if that may be named itself.

        The name never leads into another module that this one has imported.
        """
        home = registry.module(module, self.pins)
        found = self._global(home, module, qualname)
        is_own = isinstance(found, (type, types.FunctionType)) and registry.logical_name(found.__module__) == home.name and found.__qualname__ == qualname
        if not is_own and not names.is_nameable(found):
            raise CodeChangedError(f"a snapshot names {module}.{qualname}, which is not allowed: no class or function of that module", module)
        return found

    def global_of(self, module: str, name: str) -> Any:
        """Return a sentinel: whatever the global of a durable module is bound to now (semantics §4.3), if a snapshot may name that."""
        found = self._global(registry.module(module, self.pins), module, name)
        if name[0] == "@" or name[:2] == "__" or (isinstance(found, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)) and not names.is_nameable(found)):
            raise CodeChangedError(f"a snapshot names {module}.{name}, which is not allowed: it is a {type(found).__name__}", module)
        return found

    @staticmethod
    def _global(home: Module, module: str, qualname: str) -> Any:
        try:
            first, _, rest = qualname.partition(".")
            found = home.namespace[first]
            if rest and not isinstance(found, type):
                raise AttributeError(qualname)
            return names.find(found, rest) if rest else found
        except (KeyError, AttributeError):
            raise CodeChangedError(f"a snapshot names {module}.{qualname}, which no longer exists", module) from None

    def imported_module(self, name: str) -> types.ModuleType:
        """Return a module by name.  It is imported only if it is in the standard library, allowed by `allow_modules`, or imported by a durable module."""
        pinned = self.pins.get(name) or registry.version(name)
        if pinned is not None:
            return sys.modules[pinned.namespace["__name__"]]
        if not names.is_module_value(name):
            raise CorruptSnapshotError(f"a snapshot holds the module {name!r}, which is not allowed or not loaded; import it in a durable module, or list it under [snapshot] modules in kwflow.toml")
        return importlib.import_module(name)


# Picklers name the functions below; an unpickler replaces them by the methods of its own `Names`.
CURRENT = Names({})


def generator(*arguments: Any) -> Any:
    return CURRENT.generator(*arguments)


def function(*arguments: Any) -> Any:
    return CURRENT.function(*arguments)


def named(*arguments: Any) -> Any:
    return CURRENT.named(*arguments)


def global_of(*arguments: Any) -> Any:
    return CURRENT.global_of(*arguments)


def imported_module(*arguments: Any) -> Any:
    return CURRENT.imported_module(*arguments)


def set_function(made: types.FunctionType, state: tuple[Any, ...]) -> None:
    """Fill a function.  A `module` of None leaves it that of the code it was made from."""
    made.__defaults__, made.__kwdefaults__, attributes, made.__name__, made.__qualname__, made.__doc__, module = state
    if module is not None:
        made.__module__ = module
    made.__dict__.update(attributes)


def exit_callback(is_async: bool, closure: tuple[types.CellType, ...]) -> types.FunctionType:
    """Return the wrapper in which an exit stack holds what `callback` or `push_async_callback` was given."""
    return made_callback(is_async, closure)


def method(owner: Any, made: Callable[..., Any]) -> types.MethodType:
    return types.MethodType(made, owner)


# -- classes defined in a function ---------------------------------------------------------------------------------


_local: weakref.WeakSet[type[Any]] = weakref.WeakSet()


def local_class(metaclass: type[Any], name: str, bases: tuple[type[Any], ...], slots: Any) -> type[Any]:
    """Return a class without its members; `set_class` adds them."""
    if not (isinstance(metaclass, type) and issubclass(metaclass, type)):
        raise CorruptSnapshotError(f"a snapshot makes a class by {metaclass!r}, which is not a metaclass")
    options, members = {"metaclass": metaclass} if metaclass is not type else {}, {"__slots__": slots} if slots is not None else {}
    try:
        made: type[Any] = types.new_class(name, bases, options, lambda space: space.update(members))
    except Exception:  # an `__init_subclass__` that needs arguments or members: what it did to the class is among the saved members
        with _untold(bases):
            made = types.new_class(name, bases, options, lambda space: space.update(members))
    _local.add(made)
    return made


@contextlib.contextmanager
def _untold(bases: tuple[type[Any], ...]) -> Iterator[None]:
    """Keep `__init_subclass__` of the bases from running for classes that this thread makes meanwhile."""
    here = threading.get_ident()
    hooks = {base: hook for one in bases for base in one.__mro__ if isinstance(hook := base.__dict__.get("__init_subclass__"), classmethod)}
    for base, hook in hooks.items():
        type.__setattr__(base, "__init_subclass__", classmethod(lambda cls, hook=hook, **options: None if threading.get_ident() == here else hook.__get__(None, cls)(**options)))
    try:
        yield
    finally:
        for base, hook in hooks.items():
            type.__setattr__(base, "__init_subclass__", hook)


MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"


def class_by_value(minor: str, data: bytes) -> type[Any]:
    """Return a class from cloudpickle's bytes.  They hold code of one minor, and are accepted only where that is allowed."""
    if not names.classes_by_value():
        raise SnapshotError("a snapshot holds a class as code (cloudpickle), which snapshot_cloudpickle does not allow here")
    if minor != MINOR:
        raise SnapshotError(f"a snapshot holds a class as code of Python {minor}; this is {MINOR}")
    import cloudpickle  # type: ignore[import-untyped] # it has no types

    made: type[Any] = cloudpickle.loads(data)
    return made


def set_class(made: type[Any], state: tuple[dict[str, Any], dict[str, Any] | None]) -> None:
    """Fill a class: set its members, and apply `dataclass` with its arguments if that decorator had made the rest."""
    if made not in _local:
        raise CorruptSnapshotError(f"a snapshot changes the class {made!r}")
    members, dataclass = state
    for name, value in members.items():
        setattr(made, name, _member(value))
    if dataclass is not None:
        importlib.import_module("dataclasses").dataclass(**dataclass)(made)


def set_contents(made: Any, saved: tuple[Any, Any]) -> None:
    """Fill an object of a subclass of dict, list or set: with its attributes, and then with what it holds, by none of the methods of its class."""
    kind = next((kind for kind in (dict, list, set) if isinstance(made, kind) and type(made) is not kind), None)
    if kind is None:
        raise CorruptSnapshotError(f"a snapshot fills a {type(made).__qualname__}")
    attributes, held = saved
    own, slots = attributes if isinstance(attributes, tuple) else (attributes, None)
    if own:
        vars(made).update(own)
    for name, value in (slots or {}).items():
        object.__setattr__(made, name, value)
    {dict: dict.update, list: list.extend, set: set.update}[kind](made, held)  # type: ignore[operator]


def _member(value: Any) -> Any:
    """Return a member; descriptors were saved as what they wrap, since pickle does not know them."""
    if not isinstance(value, Wrapped):
        return value
    if value.kind == "field":
        options, metadata = value.held
        return importlib.import_module("dataclasses").field(metadata=metadata, **options)
    return {"property": property, "classmethod": classmethod, "staticmethod": staticmethod}[value.kind](*value.held)


class Wrapped:
    """A property, classmethod, staticmethod or dataclass field among the members of a saved class."""

    __slots__ = ("held", "kind")

    def __init__(self, kind: str, held: tuple[Any, ...]) -> None:
        self.kind, self.held = kind, held

    def __reduce__(self) -> tuple[Any, ...]:
        return Wrapped, (self.kind, self.held)


# -- attributes of builtin objects ---------------------------------------------------------------------------------


def bound(owner: Any, name: str) -> Any:
    """Return a bound method of a builtin value, such as `undo.append`, or of a builtin class, such as `dict.fromkeys`."""
    if not names.is_bound(owner, name):
        raise CorruptSnapshotError(f"a snapshot names {type(owner).__name__}.{name}, which no snapshot of ours does")
    return getattr(owner, name)


def view(source: Any, kind: str) -> Any:
    owner: Any = next(cls for cls in (collections.OrderedDict, *names.DICTS) if isinstance(source, cls))
    return {"keys": owner.keys, "values": owner.values, "items": owner.items}[kind](source)


def mapping_proxy(source: Any) -> Any:
    return types.MappingProxyType(source)


def memory(source: Any) -> memoryview:
    return memoryview(source)


# -- iterators ------------------------------------------------------------------------------------------------------


def iterator_at(source: Any, way: str, position: int, size: int) -> Any:
    """Return an iterator that is past `position` of the `size` items that the container had when it was saved.

    It is a native one, unless the container is still being filled (because it holds its own iterator): then it is one that begins later.
    """
    return iters.after(source, way, position) if len(source) == size else iters.Later(source, way, position, size)


# -- values with no portable pickle of their own -------------------------------------------------------------------


def exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise CorruptSnapshotError(f"a snapshot raises {cls!r}, which is not an exception class")
    native: Any = next(new for base in cls.__mro__ if isinstance(new := base.__dict__.get("__new__"), types.BuiltinFunctionType))
    try:
        made: BaseException = native(cls, *args)  # not the author's `__new__`, which may need other arguments
    except (TypeError, ValueError):
        made = cls.__new__(cls, *args) if issubclass(cls, BaseExceptionGroup) else native(cls)  # a group that an earlier release saved
    BaseException.__setattr__(made, "args", args)  # that of the class may refuse everything, as that of a frozen dataclass does
    return made


def path(kind: str, text: str) -> Any:
    """Return a pathlib path; the module of its class differs between minors."""
    if kind not in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"):
        raise CorruptSnapshotError(f"a snapshot holds a path of class {kind!r}")
    return getattr(importlib.import_module("pathlib"), kind)(text)


def zone(key: str) -> Any:
    return importlib.import_module("zoneinfo").ZoneInfo(key)


def logger(name: str) -> Any:
    return importlib.import_module("logging").getLogger(name)


def match(pattern: re.Pattern[Any], way: str, text: Any, first: int, last: int) -> Any:
    """Return the match that this pattern finds again in the same text."""
    found = {"match": re.Pattern.match, "fullmatch": re.Pattern.fullmatch, "search": re.Pattern.search}[way](pattern, text, first, last)
    if found is None:
        raise CorruptSnapshotError("a snapshot holds a match of a pattern that does not match")
    return found


def numpy_array(dtype: Any, shape: tuple[int, ...] | None, data: Any) -> Any:
    """Return a numpy array, scalar (if `shape` is None) or dtype (if `data` is None, too)."""
    numpy = importlib.import_module("numpy")
    kind = numpy.dtype(dtype)
    if data is None:
        return kind
    if kind.hasobject:
        made = numpy.empty(len(data), kind)
        made[:] = data
        return made.reshape(shape)
    made = numpy.frombuffer(data, kind)
    return made[0] if shape is None else made.reshape(shape).copy()


def custom(name: str, state: Any) -> Any:
    """Rebuild what a reducer of the author has saved (`durable.register_reducer`)."""
    try:
        build = builders[name]
    except KeyError:
        raise CorruptSnapshotError(f"a snapshot holds {name!r}, for which no reducer is registered; import the module that calls durable.register_reducer first") from None
    return build(state)


CONSTRUCTORS: dict[str, Callable[..., Any]] = {name: globals()[name] for name in sorted(names.CONSTRUCTORS)}
