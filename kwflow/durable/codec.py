"""Object graphs that hold durable generators, to bytes and back.

A body is one pickle of one list: the root, whether there are fillers, then (kind, shell, state) for each object that was pickled
as an empty shell.  The list grows while it is pickled, so identity and cycles survive, and a chain of 20,000 generators does not
recurse.  CPython refuses this for a plain list (gh-149816: 3.14 and 3.15 since summer 2026) but allows it for the items of an
iterator, which costs a microsecond more.  Both sides begin with the same table of names (`SEEDS`) in their memo, which keeps
small snapshots small.  names.py decides what may be named, reducers.py how values are reduced; this module must not know
workflows.  Both directions of the format are in this one file, whatever its length: a change of one is a change of the other.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import importlib
import io
import itertools
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

from kwflow.durable import culprit, exceptions, iters, names, rebuild, registry
from kwflow.durable.frames import CREATED, FINISHED, SUSPENDED, discard, enter, forget_shells, refill, snap
from kwflow.durable.local_classes import by_value, reduce_class
from kwflow.durable.lower import LOWERING_VERSION
from kwflow.durable.lower.upgrade import upgraded
from kwflow.durable.moves import MovingNames
from kwflow.durable.reducers import PROTOCOL, Refused, as_pickle_reduces, cannot_be_filled, is_value, plain, reduce_module, reducer_of
from kwflow.durable.stacks import is_async_callback
from kwflow.errors import CorruptSnapshotError, KwflowBug, ResourceError, SnapshotError

__all__ = ["FORMAT", "SEEDS", "Code", "dumps", "dumps_with_code", "loads", "padded", "register_class", "seeded", "unfilled"]

Code = dict[str, tuple[registry.Module, dict[str, str]]]  # by reference: the version that it stands for, and the hashes of its units that are held

FORMAT = b"\2"
# Kinds of states; part of the format.
_GENERATOR, _CELL, _FUNCTION, _EXCEPTION, _OBJECT, _CREATED, _FINISHED, _REENTER = range(8)
_STATES = 255  # the number of the list itself among the classes of `register_class`
_TOGETHER = 1000  # items that every pickler writes as one batch; each further batch of a body begins with a filler: part of the format
_KINDS = {SUSPENDED: _GENERATOR, CREATED: _CREATED, FINISHED: _FINISHED}

# What both memos hold from the start.  Part of format 2, so never change it: only a new format may have another list.
SEEDS: tuple[Any, ...] = (
    *(rebuild.CONSTRUCTORS[name] for name in "generator cell function exception instance bound method global_of iterator_at custom".split()),
    *(getattr(builtins, name) for name in "iter range enumerate zip reversed map filter".split()),
    *map(sys.intern, ("main", "tasks", "waits", "joins", "finished", "steps", "task_next", "now_ms", "pending", "ok", "failed", "@l", "self", "opts")),
)
_PADDING = b"N" + b"\x94" * len(SEEDS) + b"."  # makes an unpickler count as many memo entries as there are seeds


def padded(body: bytes) -> io.BytesIO:
    """Return what an unpickler reads: first the padding, with a `load` of its own, then what follows the number of the format."""
    return io.BytesIO(_PADDING + body[1:])


def seeded(seeds: tuple[Any, ...]) -> Any:
    """Return the memo of an unpickler that holds these seeds, to be assigned to other unpicklers."""

    class Template(pickle.Unpickler):
        def persistent_load(self, number: str) -> Any:
            return seeds[int(number)]

    template = Template(io.BytesIO(b"\x80\x05" + b"".join(b"P%d\n\x94" % n for n in range(len(seeds))) + b"."))
    template.load()
    return template.memo


class _Pickler(pickle.Pickler):
    """Pickles one graph.  `pins` are the module versions that it was loaded with; `held` is the code that it holds now (semantics §8.1)."""

    states: list[Any]
    pins: registry.Pins
    held: Code
    units: dict[registry.Module, tuple[str, dict[str, str]]]  # for each module with code that is held: its reference, and the units held
    minor = ""  # the minor of Python, if the graph holds something that only this one can load

    def begin(self, root: Any, pins: registry.Pins) -> None:
        self.pins, self.held, self.units = pins, {}, {}
        self.memo = _pickler_memo
        self.states = states = [root, None] if _lists_may_grow else _States((root, True))  # two items from the start: pickle does not look again at a list of one after its item
        self.dump(states)

    def reducer_override(self, value: Any) -> Any:
        cls = type(value)
        reducer = _REDUCERS.get(cls)
        if reducer is not None:
            return reducer(self, value)
        if cls not in plain:
            return self.first(cls, value)
        return NotImplemented if registry.sentinel(value) is None else self.sentinel(value) or NotImplemented

    def whole(self, states: _States) -> Any:
        return rebuild.instance, (_STATES,), None, itertools.chain(itertools.islice(states, _TOGETHER), states.later())

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
            _REDUCERS[cls] = _Pickler.exception
        elif hasattr(cls, "__durable_reenter__"):
            _REDUCERS[cls] = _Pickler.resource
        elif reducer_of(cls) is not None:
            _REDUCERS[cls] = _Pickler.reduced
        elif isinstance(as_pickle_reduces(value), str):
            _REDUCERS[cls] = _Pickler.by_name
        elif cannot_be_filled(cls):
            _REDUCERS[cls] = _Pickler.unfillable
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

    def resource(self, value: Any) -> Any:
        known = self.sentinel(value)
        if known is not None:
            return known
        self.states += (_REENTER, value, None)
        return value.__reduce_ex__(PROTOCOL)

    def class_(self, cls: type[Any]) -> Any:
        if cls in _checked or cls in _TYPES_WITHOUT_A_NAME:
            return NotImplemented
        if "<locals>" in cls.__qualname__:
            return self.local_class(cls)
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
        self.states += (_EXCEPTION, error, state)
        return rebuild.exception, (cls, args)

    def generator(self, gen: types.GeneratorType[Any, Any, Any]) -> Any:
        function, status, slots, cells = snap(gen)
        reference = self.hold(function)
        self.states += (_KINDS[status], gen, slots)
        if gen.__name__ != function.name or gen.__qualname__ != function.qualname:
            return rebuild.generator, (reference, function.path, cells, gen.__name__, gen.__qualname__)
        return rebuild.generator, ((reference, function.path, cells) if cells else (reference, function.path))

    def cell(self, cell: types.CellType) -> Any:
        try:
            self.states += (_CELL, cell, cell.cell_contents)
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
            self.states += (_FUNCTION, fn, (None, None, fn.__dict__, fn.__name__, name, None, None))
            return rebuild.exit_callback, (is_async, fn.__closure__)
        if known is None:
            raise Refused(f"the function {name} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno}), which does not belong to a durable module")
        elsewhere = None if module == known.namespace["__name__"] else module  # changed by functools.wraps
        attributes = {name: value for name, value in fn.__dict__.items() if name != "_is_coroutine_mark"} if known.coroutine else fn.__dict__
        self.states += (_FUNCTION, fn, (fn.__defaults__, fn.__kwdefaults__, attributes, fn.__name__, fn.__qualname__, fn.__doc__, elsewhere))
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


class _States(list[Any]):
    """The list of a body, which grows while it is pickled: see the docstring of the module."""

    def later(self) -> Iterator[Any]:
        """Yield the items after the first thousand.

        Pickle writes a thousand items as one batch, and asks for the second item of a batch before it writes the first.  So the first one is a filler,
        which adds nothing to the list.
        """
        for place in itertools.count(_TOGETHER):
            if place >= len(self):
                return
            if (place - _TOGETHER) % (_TOGETHER - 1) == 0:
                yield None
            yield self[place]


_checked: set[type] = set()  # classes that may be named; only positive answers are kept, because `allow_modules` may add more
_local_classes: list[type] = []  # local classes that `plain` and `_REDUCERS` hold
_LOCAL_CLASSES_MAX = 50
_TYPES_WITHOUT_A_NAME = (type(None), type(NotImplemented), type(...))
_REDUCERS: dict[type, Any] = {
    types.GeneratorType: _Pickler.generator,
    types.CellType: _Pickler.cell,
    types.FunctionType: _Pickler.function,
    types.MethodType: _Pickler.method,
    types.ModuleType: _Pickler.module,
    types.TracebackType: _Pickler.traceback,
    _States: _Pickler.whole,
}
rebuild.register(_STATES, list)
_seeded_pickler = pickle.Pickler(io.BytesIO(), PROTOCOL)
_seeded_pickler.memo = {id(seed): (number, seed) for number, seed in enumerate(SEEDS)}
_pickler_memo = _seeded_pickler.memo


def _meaning(of: rebuild.Names) -> tuple[Any, ...]:
    """Return the seeds for an unpickler, bound to the module versions that its snapshot means."""
    return tuple(getattr(of, seed.__name__) if getattr(seed, "__name__", None) in _METHODS else seed for seed in SEEDS)


_METHODS = frozenset(name for name in rebuild.CONSTRUCTORS if hasattr(rebuild.Names, name))
_unpickler_memo = seeded(_meaning(rebuild.CURRENT))


def _named(module: str | None, qualname: str) -> Any:
    try:
        return names.find(sys.modules.get(module or ""), qualname)
    except AttributeError:
        return None


def register_class(tag: int, cls: type) -> None:
    """Save objects of this class as shells, with their `__getstate__` deferred.  The tag is part of the snapshot format."""
    rebuild.register(tag, cls)

    def registered(pickler: _Pickler, value: Any) -> Any:
        pickler.states += (_OBJECT, value, value.__getstate__())
        return rebuild.instance, (tag,)

    _REDUCERS[cls] = registered


class _TracingPickler(_Pickler):
    def reducer_override(self, value: Any) -> Any:
        self.seen.append(value)
        return super().reducer_override(value)

    seen: collections.deque[Any]


def _last_seen(root: Any, pins: registry.Pins) -> list[Any]:
    """Return the last objects that a save of this graph looks at before it fails."""
    pickler = _TracingPickler(io.BytesIO(), PROTOCOL)
    pickler.seen = collections.deque(maxlen=20)
    with contextlib.suppress(Exception):
        pickler.begin(root, pins)
    return list(pickler.seen)


def _is_savable(value: Any, pins: registry.Pins) -> bool:
    try:
        _Pickler(io.BytesIO(), PROTOCOL).begin(value, pins)
    except Exception:
        return False
    return True


def dumps(root: Any) -> bytes:
    """Return the graph below `root` as bytes.

    Raises UnsavableError that names variable, function, file, line and type of what cannot be saved, NotDurableError for a
    native generator.
    """
    return dumps_with_code(root, {})[0]


def dumps_with_code(root: Any, pins: registry.Pins) -> tuple[bytes, Code, str]:
    """Return `dumps` of a graph that was loaded with these pins, the code that it holds, and the minor that it is bound to ("" if to none)."""
    file = io.BytesIO()
    file.write(FORMAT)
    pickler = _Pickler(file, PROTOCOL)
    try:
        pickler.begin(root, pins)
    except Exception as error:  # reducers of any class may raise anything
        raise culprit.explain(root, error, _last_seen(root, pins), lambda value: _is_savable(value, pins)) from error
    return file.getvalue(), pickler.held, pickler.minor


# -- back ----------------------------------------------------------------------------------------------------------

_MOVED = {"pathlib._local": "pathlib"}  # in snapshots that an earlier release wrote on another minor


class _Unpickler(pickle.Unpickler):
    names: rebuild.Names

    def find_class(self, module: str, name: str) -> Any:
        if module == rebuild.__name__ and name in _METHODS:
            return getattr(self.names, name)
        if module in self.names.pins or registry.is_durable(module):
            return self.names.named(module, name)
        if module not in sys.modules:
            if not names.importable(module):
                raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is not allowed (or its module is not loaded)")
            try:
                importlib.import_module(module)
            except ImportError:
                module = _MOVED.get(module, module)
        if module == "itertools" and sys.version_info >= (3, 14) and name in names.ITERTOOLS:
            return getattr(iters, name)  # stored by an earlier release: on 3.14 the originals accept no state
        try:
            found: Any = names.find(sys.modules[module], name)
        except (KeyError, AttributeError):
            if module == "builtins":
                raise SnapshotError(f"a snapshot names {name}, which Python {rebuild.MINOR} does not have; it was saved by a newer Python, which can continue it") from None
            raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which no longer exists") from None
        if not names.allowed(module, name, found) and not names.is_nameable(found):
            raise CorruptSnapshotError(f"a snapshot names {module}.{name}, which is not allowed")
        return found


_no_pins: registry.Pins = {}


def loads(data: bytes, pins: registry.Pins = _no_pins, lowering: int = LOWERING_VERSION, moving: MovingNames | None = None) -> Any:
    """Return the graph that was saved.  Generators wait at the yields where they were saved, in the pinned versions of modules, or else in the current ones.

    With `moving`, which has the same pins, generators of old versions wait at the same yields of edited functions instead.

    Raises SnapshotError and nothing else; a CodeChangedError names the module that lacks something.  `__durable_reenter__` of objects that have it is
    called last; what it raises becomes a ResourceError.
    """
    waiting: list[types.GeneratorType[Any, Any, Any]] = []
    try:
        root, states = _states(data, pins, moving) if data[:1] == FORMAT else _states_of_format_1(data, moving or rebuild.Names(pins))
        if lowering != LOWERING_VERSION:
            _upgrade(states, lowering, moving)
        if moving is not None:
            moving.settle(states, _GENERATOR, _CREATED, _CELL)
        reentered = _fill(states, waiting)
        for gen in waiting:
            enter(gen)
    except BaseException as error:
        for gen in waiting:
            discard(gen)
        forget_shells()
        if isinstance(error, SnapshotError) or not isinstance(error, (Exception, SystemExit)):  # the `__setstate__` of an author's class may raise anything
            raise
        raise CorruptSnapshotError(f"not a readable snapshot: {type(error).__name__}: {error}") from error
    for resource in reentered:
        _reenter(resource, waiting)
    return root


def _states(data: bytes, pins: registry.Pins, moving: MovingNames | None = None) -> tuple[Any, list[Any]]:
    unpickler = _Unpickler(padded(data))
    unpickler.load()
    unpickler.names = moving or (rebuild.Names(pins) if pins else rebuild.CURRENT)
    unpickler.memo = _unpickler_memo if unpickler.names is rebuild.CURRENT else seeded(_meaning(unpickler.names))
    states = unfilled(unpickler.load())
    return states[0], states[2:]


def unfilled(states: list[Any]) -> list[Any]:
    """Remove the fillers from the list of a body; a list written by an earlier release has none."""
    if states[1] is not None:
        del states[_TOGETHER::_TOGETHER]
    return states


def _states_of_format_1(data: bytes, names: rebuild.Names) -> tuple[Any, list[Any]]:
    """Read what 0.1.0 wrote: the root, then lists of (kind, shell, state) until None, as separate pickles that share one memo."""
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.names = names
    root = unpickler.load()
    states: list[Any] = []
    for found in iter(unpickler.load, None):
        for kind, made, state in found:
            states += (_KINDS[state[0]], made, state[1]) if kind == _GENERATOR else (kind, made, state)
    return root, states


def _upgrade(states: list[Any], lowering: int, moving: MovingNames | None) -> None:
    """Rename what an older lowering saved of each waiting generator to the names that this one uses."""
    moved = moving.moved if moving is not None else {}
    for number in range(0, len(states), 3):
        kind, made, saved = states[number : number + 3]
        function = (moved[made][0].old if made in moved else registry.function_of(made.gi_code)) if kind == _GENERATOR else None
        if function is not None:
            states[number + 2] = upgraded(function, saved, lowering, LOWERING_VERSION)


def _fill(states: list[Any], waiting: list[types.GeneratorType[Any, Any, Any]]) -> list[Any]:
    """Fill the shells; return the objects with `__durable_reenter__` among them."""
    reentered = []
    for kind, made, state in zip(states[::3], states[1::3], states[2::3], strict=True):
        if kind == _GENERATOR:
            refill(made, SUSPENDED, state)
            waiting.append(made)
        elif kind == _OBJECT:
            rebuild.tag_of(type(made))
            made.__setstate__(state)
        elif kind == _CELL:
            made.cell_contents = state
        elif kind == _FUNCTION:
            rebuild.set_function(made, state)
        elif kind == _EXCEPTION:
            exceptions.fill(made, state)
        elif kind in (_CREATED, _FINISHED):
            refill(made, CREATED if kind == _CREATED else FINISHED, state)
        elif kind == _REENTER:
            reentered.append(made)
        else:
            raise CorruptSnapshotError(f"unknown kind of state {kind!r}")
    return reentered


def _reenter(resource: Any, waiting: list[types.GeneratorType[Any, Any, Any]]) -> None:
    try:
        resource.__durable_reenter__()
    except Exception as error:
        for gen in waiting:
            discard(gen)
        name = type(resource).__qualname__
        raise ResourceError(f"{name}.__durable_reenter__ failed: {type(error).__name__}: {error}; retry once it can be reacquired", name) from error


class _Probe(_Pickler):
    """Pickles a list in which each item adds one more, as a chain of generators does, until there are `until` items."""

    until: int

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _States):
            return self.whole(value)
        if type(value) is object and len(self.states) < self.until:
            self.states.append(object())
        return NotImplemented


def _nothing_is_left_out(count: int) -> bool:
    """Whether this interpreter pickles a growing list completely; one that asked for items earlier, or had smaller batches, would lose states silently."""
    file = io.BytesIO(FORMAT)
    file.seek(len(FORMAT))
    probe = _Probe(file, PROTOCOL)
    probe.until = count
    try:
        probe.begin(object(), _no_pins)
    except RuntimeError:  # the list has changed its size
        return False
    return len(_states(file.getvalue(), _no_pins)[1]) == count - 2


_lists_may_grow = True
_lists_may_grow = _nothing_is_left_out(3)
if not _lists_may_grow and not _nothing_is_left_out(_TOGETHER + 1):
    raise KwflowBug("this Python pickles items in a way that kwflow does not support; nothing can be saved")
