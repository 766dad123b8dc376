"""Constructors that snapshots name: what an unpickler of ours may call beside a fixed table of builtins.

`Names` has those that need to know which versions of modules the snapshot is of (semantics §8.2).

Cells, functions, exceptions and generators come into being empty; `codec.loads` fills them afterwards, so that cycles
and chains of any length need no recursion.  Names here are part of the snapshot format.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from kwflow.durable import registry
from kwflow.durable.frames import shell
from kwflow.durable.registry import Function, Pins
from kwflow.errors import CodeChangedError, CorruptSnapshotError

__all__ = [
    "CONSTRUCTORS", "EXCEPTION_ATTRIBUTES", "Names", "bound", "cell", "exception", "function", "generator", "global_of", "imported_module", "instance", "method", "named", "register",
    "set_exception", "set_function", "tag_of",
]  # fmt: skip

# what __init__ of a builtin exception stores beside args, which __new__ alone does not
EXCEPTION_ATTRIBUTES: dict[type[BaseException], tuple[str, ...]] = {
    StopIteration: ("value",),
    StopAsyncIteration: (),
    SystemExit: ("code",),
    ImportError: ("name", "path", "msg"),
    OSError: ("errno", "strerror", "filename", "filename2"),
    UnicodeDecodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeEncodeError: ("encoding", "object", "start", "end", "reason"),
    SyntaxError: ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"),
    AttributeError: ("name", "obj"),
    NameError: ("name",),
}


_classes: dict[int, type[Any]] = {}
_tags: dict[type[Any], int] = {}


def register(tag: int, cls: type[Any]) -> None:
    """Give a class its number in snapshots."""
    _classes[tag], _tags[cls] = cls, tag


def tag_of(cls: type[Any]) -> int:
    return _tags[cls]


def instance(tag: int) -> Any:
    """An object of a registered class, still empty."""
    try:
        cls = _classes[tag]
    except KeyError:
        raise CorruptSnapshotError(f"a snapshot holds an object of class number {tag}, which this version of kwflow does not know") from None
    made: Any = object.__new__(cls)
    return made


def cell() -> types.CellType:
    return types.CellType()


class Names:
    """What the names in one snapshot mean: the versions its header pins, else current code.

    Every method that is no property of Python is a constructor; `module` is a reference as `registry.reference` makes it.
    """

    def __init__(self, pins: Pins) -> None:
        self.pins = pins

    def _function(self, module: str, path: str) -> Function:
        try:
            return registry.module(module, self.pins).functions[path]
        except KeyError:
            raise CodeChangedError(f"{module} has no function {path!r} any more", module) from None

    def generator(self, module: str, path: str, cells: tuple[types.CellType, ...], name: str, qualname: str) -> types.GeneratorType[Any, Any, Any]:
        return shell(self._function(module, path), cells, name, qualname)[0]

    def function(self, module: str, path: str, cells: tuple[types.CellType, ...]) -> types.FunctionType:
        found = self._function(module, path)
        return types.FunctionType(found.plain, found.namespace, found.name, None, cells)

    def named(self, module: str, qualname: str) -> Any:
        """A class or function of a durable module."""
        found = self._global(module, qualname)
        if not isinstance(found, (type, types.FunctionType)):
            raise CorruptSnapshotError(f"a snapshot names {module}.{qualname}, which is neither a class nor a function")
        return found

    def global_of(self, module: str, name: str) -> Any:
        """A sentinel: the object a durable module's global is bound to (semantics §4.3)."""
        return self._global(module, name)

    def _global(self, module: str, qualname: str) -> Any:
        try:
            return registry.lookup(registry.module(module, self.pins).namespace, qualname)
        except (KeyError, AttributeError):
            raise CodeChangedError(f"a snapshot names {module}.{qualname}, which is gone", module) from None

    def imported_module(self, name: str) -> types.ModuleType:
        """A module by name: only one that is loaded already, since importing runs code."""
        pinned = self.pins.get(name) or registry.version(name)
        try:
            return sys.modules[name if pinned is None else pinned.namespace["__name__"]]
        except KeyError:
            raise CorruptSnapshotError(f"a snapshot holds the module {name!r}, which is not loaded") from None


# what picklers name: an unpickler gives the methods of its `Names` for these
_current = Names({})


def generator(*arguments: Any) -> Any:
    return _current.generator(*arguments)


def function(*arguments: Any) -> Any:
    return _current.function(*arguments)


def named(*arguments: Any) -> Any:
    return _current.named(*arguments)


def global_of(*arguments: Any) -> Any:
    return _current.global_of(*arguments)


def imported_module(*arguments: Any) -> Any:
    return _current.imported_module(*arguments)


def set_function(made: types.FunctionType, state: tuple[Any, ...]) -> None:
    """`__module__` None: that of the code it was made from."""
    made.__defaults__, made.__kwdefaults__, attributes, made.__name__, made.__qualname__, made.__doc__, module = state
    if module is not None:
        made.__module__ = module
    made.__dict__.update(attributes)


def method(owner: Any, made: Callable[..., Any]) -> types.MethodType:
    return types.MethodType(made, owner)


_BOUND_OF = (list, dict, set, frozenset, tuple, str, bytes, bytearray, int, float)


def bound(owner: Any, name: str) -> Any:
    """A bound method of a builtin container, such as `undo.append`."""
    if not isinstance(owner, _BOUND_OF) or name.startswith("_"):
        raise CorruptSnapshotError(f"a snapshot names {type(owner).__name__}.{name}, which no snapshot of ours does")
    return getattr(owner, name)


def exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise CorruptSnapshotError(f"a snapshot raises {cls!r}, which is no exception class")
    try:
        made = cls.__new__(cls, *args)
    except TypeError:
        made = BaseException.__new__(cls)
    made.args = args
    return made


def set_exception(made: BaseException, state: tuple[dict[str, Any], dict[str, Any], Any, Any, bool]) -> None:
    attributes, slots, cause, context, suppress = state
    for name, value in slots.items():
        try:
            setattr(made, name, value)
        except (AttributeError, TypeError):
            continue  # read-only on this minor: args hold it
    made.__dict__.update(attributes)
    made.__cause__, made.__context__ = cause, context
    made.__suppress_context__ = suppress


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    made.__name__: made for made in (bound, cell, exception, function, generator, global_of, imported_module, instance, method, named)
}
