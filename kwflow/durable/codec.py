"""Object graphs that hold durable generators, to bytes and back.

Shells first (objects whose content is deferred), then their states by repeated `dump` on the same Pickler: its memo is
shared, so identity and cycles survive and a chain of 20,000 generators does not recurse.  What may be named in a
snapshot is decided in `allowed`, and the same list holds when saving: it must not know workflows.
"""

from __future__ import annotations

import collections
import importlib
import io
import pickle
import sys
import types
from typing import Any

from kwflow.durable import rebuild, registry
from kwflow.durable.frames import SUSPENDED, State, copied_locals, discard, enter, fill, read
from kwflow.errors import CorruptSnapshotError, KwflowError, NotDurableError, SnapshotError, UnsavableError

__all__ = ["Code", "allow_modules", "dumps", "dumps_with_code", "loads", "register_class"]

Code = dict[str, tuple[registry.Module, dict[str, str]]]  # reference -> the version it stands for, and hashes of its units that are held

_PROTOCOL = 5
_BUILTINS = frozenset(
    "object type int float complex str bytes bytearray bool list tuple dict set frozenset range slice memoryview enumerate zip map filter reversed "
    "iter NotImplemented Ellipsis property staticmethod classmethod super len min max sum abs sorted repr str print all any isinstance round hash id next".split()
)
_STDLIB = frozenset(
    "collections datetime decimal fractions uuid enum pathlib ipaddress itertools operator functools re types array zoneinfo random "
    "dataclasses typing contextlib numbers string http copyreg _collections _operator pathlib._local _datetime _decimal".split()
)
_FUNCTIONS = {"copyreg": {"_reconstructor", "__newobj__", "__newobj_ex__"}, "re": {"_compile"}, "collections": {"_deque_iterator"}, "uuid": set(), "functools": {"reduce"}, "operator": None}
_allowed: set[str] = set()
_plain: set[type] = set()  # classes whose objects pickle handles by itself, unless the object is a sentinel
_checked: set[type] = set()  # classes that may be named; only positive answers, `allow_modules` may add some
_METHODS = frozenset(name for name in rebuild.CONSTRUCTORS if hasattr(rebuild.Names, name))
_GENERATOR, _CELL, _FUNCTION, _EXCEPTION, _OBJECT = range(5)  # kinds of deferred states, part of the snapshot format
_atoms = (type(None), bool, int, float, str, bytes)


def allow_modules(names: list[str]) -> None:
    """Modules (and their submodules) whose classes snapshots may hold, beside durable ones (config `snapshot.modules`)."""
    _allowed.update(names)


def allowed(module: str, qualname: str, value: object) -> bool:
    """Whether a snapshot may name this object: classes of known modules, functions only from fixed tables."""
    if module == "builtins":
        return qualname in _BUILTINS or (isinstance(value, type) and issubclass(value, BaseException))
    if module == rebuild.__name__:
        return qualname in rebuild.CONSTRUCTORS
    if module.split(".")[0] == "kwflow":
        return isinstance(value, type) or module == "kwflow.api"
    if registry.logical_name(module) in registry.modules() or registry.version(module) or any(module == name or module.startswith(name + ".") for name in _allowed):
        return True
    if module in _FUNCTIONS and not isinstance(value, type):
        names = _FUNCTIONS[module]
        return names is None or qualname in names
    return module in _STDLIB and isinstance(value, type)


class _Refused(Exception):
    """Why one object cannot be saved."""


class _Pickler(pickle.Pickler):
    """`pins` are the versions of modules that the graph was loaded with; `held` is the code it holds now (semantics §8.1)."""

    def __init__(self, file: io.BytesIO, pins: registry.Pins) -> None:
        super().__init__(file, _PROTOCOL)
        self.pins = pins
        self.deferred: list[tuple[int, Any, Any]] = []
        self.held: Code = {}
        self._references: dict[registry.Module, str] = {}

    def reducer_override(self, value: Any) -> Any:
        cls = type(value)
        if cls not in _plain:
            reducer = _REDUCERS.get(cls)
            if reducer is not None:
                return reducer(self, value)
            if isinstance(value, type):
                return self.class_(value)
            if isinstance(value, BaseException):
                return self.exception(value)
            _plain.add(cls)
        sentinel = registry.sentinel(value)
        if sentinel is None:
            return NotImplemented
        found = registry.reference(*sentinel, value, self.pins)
        if found is None:
            return NotImplemented
        self.held.setdefault(found[0], (found[1], {}))
        return rebuild.global_of, (found[0], sentinel[1])

    def hold(self, function: registry.Function) -> str:
        """The reference of the module this function is of; its unit is held from now on."""
        home = function.home
        reference = self._references.get(home)
        if reference is None:
            reference = self._references[home] = registry.reference_of(home, self.pins.get(home.name) or registry.modules().get(home.name))
        entry = self.held.get(reference)
        if entry is None:
            entry = self.held[reference] = (home, {})
        entry[1][function.unit] = home.units[function.unit]
        return reference

    def named(self, value: type | types.FunctionType) -> Any:
        """A class or function of a durable module, by name; None when it is not what the module has there."""
        found = registry.reference(registry.logical_name(value.__module__), value.__qualname__, value, self.pins)
        if found is None:
            return None
        self.held.setdefault(found[0], (found[1], {}))
        if found[0] == value.__module__ and found[1] is registry.modules().get(found[0]):
            return NotImplemented
        return rebuild.named, (found[0], value.__qualname__)

    def registered(self, value: Any) -> Any:
        self.deferred.append((_OBJECT, value, value.__getstate__()))
        return rebuild.instance, (rebuild.tag_of(type(value)),)

    def class_(self, cls: type) -> Any:
        if cls in _checked or cls in _TYPES_WITHOUT_A_NAME:
            return NotImplemented
        if "<locals>" in cls.__qualname__:
            raise _Refused(f"the class {cls.__qualname__} is defined inside a function; define it at module level")
        if not allowed(cls.__module__, cls.__qualname__, cls):
            raise _Refused(f"a value of class {cls.__module__}.{cls.__qualname__}; list its module under [snapshot] modules in kwflow.toml, or keep plain data")
        if registry.is_durable(cls.__module__):
            named = self.named(cls)
            if named is None:
                raise _Refused(f"the class {cls.__module__}.{cls.__qualname__} is not what its module has under that name")
            return named
        _checked.add(cls)
        return NotImplemented

    def exception(self, error: BaseException) -> Any:
        self.class_(type(error))
        slots = {name: getattr(error, name, None) for cls in type(error).__mro__ for name in EXCEPTION_SLOTS.get(cls, ())}
        state = (error.__dict__, slots, error.__cause__, error.__context__, error.__suppress_context__)
        self.deferred.append((_EXCEPTION, error, state))
        return rebuild.exception, (type(error), error.args)

    def generator(self, gen: types.GeneratorType[Any, Any, Any]) -> Any:
        state = read(gen)
        function = state.function
        self.deferred.append((_GENERATOR, gen, (state.status, state.slots)))
        return rebuild.generator, (self.hold(function), function.path, state.cells, state.name, state.qualname)

    def cell(self, cell: types.CellType) -> Any:
        try:
            self.deferred.append((_CELL, cell, cell.cell_contents))
        except ValueError:
            pass  # an empty cell stays empty
        return rebuild.cell, ()

    def function(self, fn: types.FunctionType) -> Any:
        module, name = fn.__module__, fn.__qualname__
        if module == rebuild.__name__:
            return NotImplemented  # the constructors that our own reducers name
        known = registry.function_of(fn.__code__)
        if "<" not in name and registry.is_durable(module):
            named = self.named(fn)
            if named is not None:
                if known is not None:
                    self.hold(known)
                return named
        elif "<" not in name and _named(module, name) is fn:
            if allowed(module, name, fn) or module in _STDLIB:
                return NotImplemented
            raise _Refused(f"the function {module}.{name} of a module that is not durable; list it under [snapshot] modules in kwflow.toml")
        if known is None:
            raise _Refused(f"the function {name} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno}), which belongs to no durable module")
        elsewhere = None if module == known.namespace["__name__"] else module  # by functools.wraps
        state = (fn.__defaults__, fn.__kwdefaults__, fn.__dict__, fn.__name__, fn.__qualname__, fn.__doc__, elsewhere)
        self.deferred.append((_FUNCTION, fn, state))
        return rebuild.function, (self.hold(known), known.path, fn.__closure__ or ())

    def method(self, value: types.MethodType) -> Any:
        return rebuild.method, (value.__self__, value.__func__)

    def builtin(self, value: types.BuiltinFunctionType) -> Any:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            return NotImplemented
        if isinstance(owner, rebuild._BOUND_OF):
            return rebuild.bound, (owner, value.__name__)
        return NotImplemented

    def traceback(self, value: types.TracebackType) -> Any:
        """Lost, as exceptions lose theirs; every `__aexit__` that waits is given one."""
        return type(None), ()

    def module(self, value: types.ModuleType) -> Any:
        home = registry.version(value.__name__)
        if home is None:
            return rebuild.imported_module, (value.__name__,)
        reference = registry.reference_of(home, self.pins.get(home.name) or registry.modules().get(home.name))
        self.held.setdefault(reference, (home, {}))
        return rebuild.imported_module, (reference,)

    def mappingproxy(self, value: types.MappingProxyType[Any, Any]) -> Any:
        return types.MappingProxyType, (dict(value),)


EXCEPTION_SLOTS = rebuild.EXCEPTION_ATTRIBUTES
_TYPES_WITHOUT_A_NAME = (type(None), type(NotImplemented), type(...))
_REDUCERS: dict[type, Any] = {
    types.GeneratorType: _Pickler.generator,
    types.CellType: _Pickler.cell,
    types.FunctionType: _Pickler.function,
    types.MethodType: _Pickler.method,
    types.BuiltinFunctionType: _Pickler.builtin,
    types.ModuleType: _Pickler.module,
    types.TracebackType: _Pickler.traceback,
    types.MappingProxyType: _Pickler.mappingproxy,
}


def _named(module: str | None, qualname: str) -> Any:
    found: Any = sys.modules.get(module or "")
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def register_class(tag: int, cls: type) -> None:
    """Objects of this class are saved as shells with their `__getstate__` deferred; the tag is part of the snapshot format."""
    rebuild.register(tag, cls)
    _REDUCERS[cls] = _Pickler.registered


def _dump(root: Any, pins: registry.Pins) -> tuple[bytes, Code]:
    file = io.BytesIO()
    pickler = _Pickler(file, pins)
    pickler.dump(root)
    while pickler.deferred:
        states, pickler.deferred = pickler.deferred, []
        pickler.dump(states)
    pickler.dump(None)
    return file.getvalue(), pickler.held


def dumps(root: Any) -> bytes:
    """The graph below `root` as bytes.

    Raises UnsavableError naming variable, function, file, line and type of what cannot be saved, NotDurableError for a
    native generator.
    """
    return dumps_with_code(root, {})[0]


def dumps_with_code(root: Any, pins: registry.Pins) -> tuple[bytes, Code]:
    """`dumps` of a graph that was loaded with these pins, and the code it holds."""
    try:
        return _dump(root, pins)
    except (NotDurableError, UnsavableError) as error:
        raise _named_error(root, error) from error
    except Exception as error:  # reducers of any class may raise anything
        raise _named_error(root, error) from error


def _named_error(root: Any, error: Exception) -> SnapshotError:
    reason = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    for state in reversed(_generators(root)):
        values = dict(state.slots)
        for name, cell in zip(state.function.captured, state.cells, strict=False):
            try:
                values[name] = cell.cell_contents
            except ValueError:
                continue
        for name, value in values.items():
            if isinstance(value, types.GeneratorType) and registry.function_of(value.gi_code) is not None:
                continue
            try:
                _dump(value, {})
            except Exception as inner:
                where = f"{state.function.filename}:{state.function.lineno}"
                shown = name if name[0] != "@" else f"the {name[1:].split(' ')[0]} in use"
                text = f"variable {shown!r} of {state.qualname} ({where}) cannot be saved: {type(value).__name__}: {inner or reason}"
                return UnsavableError(text + "; drop it before the yield, or do this work in an activity", shown, state.qualname, where, type(value).__name__)
    return UnsavableError(f"cannot be saved: {reason}", "", "", "", type(root).__name__)


def _generators(root: Any) -> list[State]:
    """The durable generators that can be reached through plain containers, for an error message only."""
    found: list[State] = []
    seen: set[int] = set()
    stack = [root]
    while stack and len(seen) < 100_000:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (*_atoms, types.ModuleType, type)):
            continue
        seen.add(id(value))
        if isinstance(value, types.GeneratorType):
            if registry.function_of(value.gi_code) is not None and not value.gi_running:
                state = read(value)
                found.append(state)
                stack += [*state.slots.values(), *state.cells]
        elif isinstance(value, types.CellType):
            try:
                stack.append(value.cell_contents)
            except ValueError:
                continue
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            stack += value
        elif isinstance(value, types.FunctionType):
            stack += value.__closure__ or ()
        else:
            stack += [getattr(value, name, None) for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
            stack += list(getattr(value, "__dict__", {}).values())
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, names: rebuild.Names) -> None:
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        if module == rebuild.__name__ and name in _METHODS:
            return getattr(self.names, name)
        if module in self.names.pins or registry.is_durable(module):
            return self.names.named(module, name)
        if module not in sys.modules and module not in _STDLIB and not any(module == m or module.startswith(m + ".") for m in _allowed):
            raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is not allowed (or its module is not loaded)")
        if module not in sys.modules:
            importlib.import_module(module)
        found: Any = sys.modules[module]
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is gone") from None
        if not allowed(module, name, found):
            raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is not allowed")
        return found


_no_pins: registry.Pins = {}


def loads(data: bytes, pins: registry.Pins = _no_pins) -> Any:
    """The graph again; generators wait at the yields where they were saved, in the versions of modules that are pinned, else in the current ones.

    Raises SnapshotError and nothing else; CodeChangedError names the module that misses something.
    """
    waiting: list[types.GeneratorType[Any, Any, Any]] = []
    try:
        unpickler = _Unpickler(io.BytesIO(data), rebuild.Names(pins))
        root = unpickler.load()
        for states in iter(unpickler.load, None):
            _fill(states, waiting)
        for gen in waiting:
            enter(gen)
        return root
    except KwflowError:
        _discard(waiting)
        raise
    except Exception as error:
        _discard(waiting)
        raise CorruptSnapshotError(f"not a snapshot that can be read: {type(error).__name__}: {error}") from error


def _fill(states: Any, waiting: list[types.GeneratorType[Any, Any, Any]]) -> None:
    for kind, made, state in states:
        if kind == _GENERATOR:
            status, slots = state
            fill(made, copied_locals(made.gi_frame)["@S"], status, slots)
            if status == SUSPENDED:
                waiting.append(made)
        elif kind == _OBJECT:
            made.__setstate__(state)
        elif kind == _CELL:
            made.cell_contents = state
        elif kind == _FUNCTION:
            rebuild.set_function(made, state)
        elif kind == _EXCEPTION:
            rebuild.set_exception(made, state)
        else:
            raise CorruptSnapshotError(f"unknown kind of state {kind!r}")


def _discard(generators: list[types.GeneratorType[Any, Any, Any]]) -> None:
    for gen in generators:
        discard(gen)
