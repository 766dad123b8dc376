"""How objects with an identity of their own are saved: generators, cells, functions, classes and exceptions, each as a shell and a state.

All other values are in reducers.py.  Its one rule: what names.py does not allow is refused at once, since it would not load.  This file
does not know how a body is loaded: that is loading.py, and both know body.py.
"""

from __future__ import annotations

import io
import itertools
import pickle
import sys
import types
from typing import Any

from kwflow.durable import body, exceptions, names, rebuild, registry
from kwflow.durable.body import CELL, EXCEPTION, FUNCTION, KINDS, OBJECT, REENTER, SEEDS, STATES, TOGETHER, Growing
from kwflow.durable.frames import snap
from kwflow.durable.local_classes import by_value, reduce_class
from kwflow.durable.names import Refused
from kwflow.durable.positions import of_a_mixin
from kwflow.durable.reducers import PROTOCOL, as_pickle_reduces, cannot_be_filled, has_contents, is_value, plain, reduce_contents, reduce_module, reducer_of
from kwflow.durable.stacks import is_async_callback
from kwflow.errors import KwflowBug, NotDurableError

__all__ = ["Code", "GraphPickler", "register_class"]

Code = dict[str, tuple[registry.Module, dict[str, str]]]  # by reference: the version that it stands for, and the hashes of its units that are held


class GraphPickler(pickle.Pickler):
    """Pickles one graph.  `pins` are the module versions that it was loaded with; `held` is the code that it holds now (semantics §8.1)."""

    states: list[Any]
    pins: registry.Pins
    held: Code
    units: dict[registry.Module, tuple[str, dict[str, str]]]  # for each module with code that is held: its reference, and the units held
    minor = ""  # the minor of Python, if the graph holds something that only this one can load

    def begin(self, root: Any, pins: registry.Pins) -> None:
        self.pins, self.held, self.units = pins, {}, {}
        self.memo = _memo
        self.states = states = [root, None] if _lists_may_grow else Growing((root, True))  # two items from the start: pickle does not look again at a list of one after its item
        self.dump(states)

    def reducer_override(self, value: Any) -> Any:
        cls = type(value)
        reducer = _REDUCERS.get(cls)
        if reducer is not None:
            return reducer(self, value)
        if cls not in plain:
            return self.first(cls, value)
        return NotImplemented if registry.sentinel(value) is None else self.sentinel(value) or NotImplemented

    def whole(self, states: Growing) -> Any:
        return rebuild.instance, (STATES,), None, itertools.chain(itertools.islice(states, TOGETHER), states.later())

    def sentinel(self, value: Any) -> Any:
        """Reduce this object to the name of the global that is bound to it; None if there is none."""
        name = registry.sentinel(value)
        found = registry.reference(*name, value, self.pins) if name is not None and not is_value(value) else None
        if name is None or found is None:
            return None
        self.held.setdefault(found[0], (found[1], {}))
        return rebuild.global_of, (found[0], name[1])

    def hold(self, function: registry.Function) -> str:
        """Return the reference of this function's module, and note that the graph holds the function's unit."""
        home = function.home
        known = self.units.get(home)
        if known is None:
            reference = registry.reference_of(home, self.pins.get(home.name) or registry.modules().get(home.name))
            known = self.units[home] = reference, self.held.setdefault(reference, (home, {}))[1]
        known[1][function.unit] = home.units[function.unit]
        return known[0]

    def named(self, value: type | types.FunctionType) -> Any:
        """Reduce a class or function of a durable module to its name; None if the module has something else under that name."""
        found = registry.reference(registry.logical_name(value.__module__), value.__qualname__, value, self.pins)
        if found is None:
            return None
        self.held.setdefault(found[0], (found[1], {}))
        if found[0] == value.__module__ and found[1] is registry.modules().get(found[0]):
            return NotImplemented
        return rebuild.named, (found[0], value.__qualname__)

    def first(self, cls: type[Any], value: Any) -> Any:
        """Reduce an object of a class that was not seen before, and remember how objects of this class are saved."""
        if issubclass(cls, type):
            return self.class_(value)
        if "<locals>" in cls.__qualname__:
            self.remember_local(cls)
        if issubclass(cls, BaseException):
            _REDUCERS[cls] = GraphPickler.exception
        elif hasattr(cls, "__durable_reenter__"):
            _REDUCERS[cls] = GraphPickler.resource
        elif reducer_of(cls) is not None:
            _REDUCERS[cls] = GraphPickler.reduced
        elif isinstance(as_pickle_reduces(value), str):
            _REDUCERS[cls] = GraphPickler.by_name
        elif has_contents(cls):
            _REDUCERS[cls] = GraphPickler.contents
        elif cannot_be_filled(cls):
            _REDUCERS[cls] = GraphPickler.unfillable
        else:
            plain.add(cls)
        return self.reducer_override(value)

    def remember_local(self, cls: type[Any]) -> None:
        """Limit what is remembered: each call of a function makes another class, and the tables must not keep all of them alive."""
        if len(_local_classes) >= _LOCAL_CLASSES_MAX:
            for known in _local_classes:
                plain.discard(known)
                _REDUCERS.pop(known, None)
            _local_classes.clear()
        _local_classes.append(cls)

    def reduced(self, value: Any) -> Any:
        reducer = reducer_of(type(value))
        return self.sentinel(value) or (reducer(value) if reducer is not None else NotImplemented)

    def by_name(self, value: Any) -> Any:
        """Reduce an object that its class saves as "the global of this name", such as `msgspec.UNSET`; pickle does not ask whether that may be named."""
        known = self.sentinel(value)
        name = as_pickle_reduces(value)
        if known is not None or not isinstance(name, str):
            return known or NotImplemented
        module = pickle.whichmodule(value, name)  # type: ignore[attr-defined] # it is not in typeshed
        if registry.is_durable(module):
            raise Refused(f"{module}.{name}, a {type(value).__name__}, which no global name refers to; look it up where it is needed")
        if not names.allowed(module, name, value):
            raise Refused(f"{module}.{name} of a module that is not durable; list the module under [snapshot] modules in kwflow.toml, or use it where it is needed")
        return name

    def unfillable(self, value: Any) -> Any:
        known = self.sentinel(value)
        made = known or value.__reduce_ex__(PROTOCOL)
        if known is None and len(made) > 2 and made[2] is not None:
            name = type(value).__qualname__
            raise Refused(f"the __getattr__ of {name} fails on an object without attributes, so it could not be loaded; let it raise AttributeError for names that begin with __")
        return made

    def contents(self, value: Any) -> Any:
        return self.sentinel(value) or reduce_contents(value)

    def resource(self, value: Any) -> Any:
        known = self.sentinel(value)
        if known is not None:
            return known
        self.states += (REENTER, value, None)
        return value.__reduce_ex__(PROTOCOL)

    def class_(self, cls: type[Any]) -> Any:
        if cls in _checked or cls in _TYPES_WITHOUT_A_NAME:
            return NotImplemented
        if "<locals>" in cls.__qualname__:
            return self.local_class(cls)
        if not isinstance(cls.__module__, str):
            raise Refused(f"the class {cls.__qualname__}, which has no module to find it in; keep what it was made from")
        if not names.allowed(cls.__module__, cls.__qualname__, cls):
            plain = "wait after the except block and keep only the error's text" if issubclass(cls, BaseException) else "keep plain data"
            raise Refused(f"a value of class {cls.__module__}.{cls.__qualname__}; list its module under [snapshot] modules in kwflow.toml, call durable.register_reducer, or {plain}")
        if registry.is_durable(cls.__module__):
            named = self.named(cls)
            if named is None:
                raise Refused(f"the class {cls.__module__}.{cls.__qualname__} is not the one that its module has under that name")
            return named
        _checked.add(cls)
        return NotImplemented

    def local_class(self, cls: type[Any]) -> Any:
        """Reduce a local class to its parts, or, if that fails and is allowed, to cloudpickle's bytes, which bind the snapshot to this minor."""
        try:
            return reduce_class(cls)
        except Refused as why:
            if not names.classes_by_value():
                raise Refused(f"{why}, or allow snapshot_cloudpickle (docs/LOCALS.md)") from None
        made = rebuild.class_by_value, by_value(cls)
        self.minor = rebuild.MINOR
        return made

    def exception(self, error: BaseException) -> Any:
        cls = type(error)
        self.class_(cls)
        args, state = exceptions.parts(error)
        self.states += (EXCEPTION, error, state)
        return rebuild.exception, (cls, args)

    def generator(self, gen: types.GeneratorType[Any, Any, Any]) -> Any:
        try:
            function, status, slots, cells = snap(gen)
        except NotDurableError:
            made = of_a_mixin(gen)
            if made is None:
                raise
            return made
        reference = self.hold(function)
        self.states += (KINDS[status], gen, slots)
        if gen.__name__ != function.name or gen.__qualname__ != function.qualname:
            return rebuild.generator, (reference, function.path, cells, gen.__name__, gen.__qualname__)
        return rebuild.generator, ((reference, function.path, cells) if cells else (reference, function.path))

    def cell(self, cell: types.CellType) -> Any:
        try:
            self.states += (CELL, cell, cell.cell_contents)
        except ValueError:
            pass  # an empty cell stays empty
        return rebuild.cell, ()

    def function(self, fn: types.FunctionType) -> Any:
        module, name = fn.__module__, fn.__qualname__
        if module == rebuild.__name__:
            return NotImplemented  # these are the constructors that our own reducers name
        known = registry.function_of(fn.__code__)
        if "<" not in name and registry.is_durable(module):
            named = self.named(fn)
            if named is not None:
                if known is not None:
                    self.hold(known)
                return named
        elif "<" not in name and _named(module, name) is fn:
            if names.allowed(module, name, fn):
                return NotImplemented
            raise Refused(f"the function {module}.{name} of a module that is not durable; list the module under [snapshot] modules in kwflow.toml, or call the function where it is needed")
        if known is None and (is_async := is_async_callback(fn)) is not None:
            self.states += (FUNCTION, fn, (None, None, fn.__dict__, fn.__name__, name, None, None))
            return rebuild.exit_callback, (is_async, fn.__closure__)
        if known is None:
            raise Refused(f"the function {name} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno}), which does not belong to a durable module")
        elsewhere = None if module == known.namespace["__name__"] else module  # changed by functools.wraps
        attributes = {name: value for name, value in fn.__dict__.items() if name != "_is_coroutine_mark"} if known.coroutine else fn.__dict__
        self.states += (FUNCTION, fn, (fn.__defaults__, fn.__kwdefaults__, attributes, fn.__name__, fn.__qualname__, fn.__doc__, elsewhere))
        return rebuild.function, (self.hold(known), known.path, fn.__closure__ or ())

    def method(self, value: types.MethodType) -> Any:
        return rebuild.method, (value.__self__, value.__func__)

    def traceback(self, value: types.TracebackType) -> Any:
        """A traceback is lost, as those of exceptions are; but it must not be refused, since every `__aexit__` that waits is given one."""
        return rebuild.nothing, ()

    def module(self, value: types.ModuleType) -> Any:
        home = registry.version(value.__name__)
        if home is None:
            home = registry.modules().get(value.__name__)
            if home is None or not home.whole or home.namespace is not vars(value):
                return reduce_module(value)
        reference = registry.reference_of(home, self.pins.get(home.name) or registry.modules().get(home.name))
        self.held.setdefault(reference, (home, {}))
        return rebuild.imported_module, (reference,)


_checked: set[type] = set()  # classes that may be named; only positive answers are kept, because `allow_modules` may add more
_local_classes: list[type] = []  # local classes that `plain` and `_REDUCERS` hold
_LOCAL_CLASSES_MAX = 50
_TYPES_WITHOUT_A_NAME = (type(None), type(NotImplemented), type(...))
_REDUCERS: dict[type, Any] = {
    types.GeneratorType: GraphPickler.generator,
    types.CellType: GraphPickler.cell,
    types.FunctionType: GraphPickler.function,
    types.MethodType: GraphPickler.method,
    types.ModuleType: GraphPickler.module,
    types.TracebackType: GraphPickler.traceback,
    Growing: GraphPickler.whole,
}
_seeded = pickle.Pickler(io.BytesIO(), PROTOCOL)
_seeded.memo = {id(seed): (number, seed) for number, seed in enumerate(SEEDS)}
_memo = _seeded.memo


def _named(module: str | None, qualname: str) -> Any:
    try:
        return names.find(sys.modules.get(module or ""), qualname)
    except AttributeError:
        return None


def register_class(tag: int, cls: type) -> None:
    """Save objects of this class as shells, with their `__getstate__` deferred.  The tag is part of the snapshot format."""
    rebuild.register(tag, cls)

    def registered(pickler: GraphPickler, value: Any) -> Any:
        pickler.states += (OBJECT, value, value.__getstate__())
        return rebuild.instance, (tag,)

    _REDUCERS[cls] = registered


class _Probe(GraphPickler):
    """Pickles a list in which each item adds one more, as a chain of generators does, until there are `until` items."""

    until: int

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Growing):
            return self.whole(value)
        if type(value) is object and len(self.states) < self.until:
            self.states.append(object())
        return NotImplemented


def _nothing_is_left_out(count: int) -> bool:
    """Whether this interpreter pickles a growing list completely; one that asked for items earlier, or had smaller batches, would lose states silently."""
    file = io.BytesIO(body.FORMAT)
    file.seek(len(body.FORMAT))
    probe = _Probe(file, PROTOCOL)
    probe.until = count
    try:
        probe.begin(object(), {})
    except RuntimeError:  # the list has changed its size
        return False
    unpickler = pickle.Unpickler(body.padded(file.getvalue()))
    unpickler.load()
    unpickler.memo = body.seeded(SEEDS)
    return len(body.unfilled(unpickler.load())[1]) == count - 2


_lists_may_grow = True
_lists_may_grow = _nothing_is_left_out(3)
if not _lists_may_grow and not _nothing_is_left_out(TOGETHER + 1):
    raise KwflowBug("this Python pickles items in a way that kwflow does not support; nothing can be saved")
