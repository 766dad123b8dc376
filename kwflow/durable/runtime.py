"""What lowered code calls: one object per module, its global `RUNTIME`.  One rule: nothing here may raise StopIteration by accident."""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from kwflow.durable import awaiting, protocols, tracebacks
from kwflow.durable.driving import abandoning, in_event_loop, thread
from kwflow.durable.refusals import no_manager, not_awaitable
from kwflow.durable.registry import RUNTIME, Module, Place, function_of, register_code

__all__ = ["Resume", "Runtime", "as_coroutine", "awaited", "delegate", "inject", "shown"]


def abandoned() -> type[BaseException] | tuple[()]:
    """The type of the first except clause around every wait: it catches the GeneratorExit of a forgotten generator, and nothing else."""
    _report_caught()
    return GeneratorExit if abandoning() else ()


def _report_caught() -> None:
    error = sys.exc_info()[1]
    driver = thread.driver
    if driver is not None and error is not None:
        driver.catching(error)


def kept() -> bool:
    """Whether a `finally` runs: it does, unless a forgotten generator is being dropped."""
    _report_caught()
    return not (sys.exc_info()[0] is GeneratorExit and abandoning())


def entry(manager: Any) -> Any:
    """Return `__enter__`, looked up as the with statement does: both methods on the type, before either runs.

    Lowered code itself calls it and `__exit__`, so that none of our frames is in the author's tracebacks.
    """
    cls = type(manager)
    enter_ = getattr(cls, "__enter__", None)
    if enter_ is None or not hasattr(cls, "__exit__"):
        raise no_manager(cls, ("__enter__", "__exit__"), ("__aenter__", "__aexit__"))
    if not isinstance(manager, contextlib._GeneratorContextManager) and "<locals>" not in cls.__qualname__:  # classes that are made again and again are not kept
        _managers.add(cls)
    return enter_


_managers: set[type] = set()  # types that have passed the checks above and that no driver has to be told of


def entered(manager: Any, value: Any) -> Any:
    """Return what `__enter__` returned, and tell the driver."""
    driver = thread.driver
    if driver is not None:
        driver.entered(manager, value)
    return value


class _Iterable:
    """Wraps an iterator without `__iter__` (which `for` allows) and adds one."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __iter__(self) -> _Iterable:
        return self

    def __next__(self) -> Any:
        return next(self.iterator)


_SOURCES: tuple[Any, ...] = ([], (), "", "\u00e9", b"", {}, {}.values(), {}.items(), set(), range(0), range(1 << 70), enumerate(()), zip(), map(str, ()), reversed([]))
_ITERATORS = frozenset(type(iter(source)) for source in _SOURCES) | {types.GeneratorType}  # iter() of one of these is the iterator itself, no need to check


def iterate(source: Any) -> Iterator[Any]:
    """Return iter(source) as an iterator whose own iter() is itself, so that `for` can take it again and again."""
    iterator: Iterator[Any] = iter(source)
    return iterator if type(iterator) in _ITERATORS else own_iterator(iterator)


def own_iterator(iterator: Any) -> Iterator[Any]:
    """Do the same for an iterator that `iter` returned, if its type is not known."""
    try:
        if iter(iterator) is iterator:
            return iterator  # type: ignore[no-any-return]
    except TypeError:
        pass
    return _Iterable(iterator)


class _Delegate(_Iterable):
    """`_Iterable` for `yield from`: send, throw and close go to the iterator if it has them (PEP 380)."""

    def __getattr__(self, name: str) -> Any:
        """Look a method up when it is needed, as CPython does.  The author's `close` is cleanup, which is skipped if the generator is merely forgotten (G8)."""
        if name == "close" and abandoning():
            return _nothing
        if name in ("send", "throw", "close"):
            return getattr(self.iterator, name)
        raise AttributeError(name)


def _nothing() -> None:
    """The `close` of an iterator that is merely forgotten."""


def _may_close(iterator: object) -> bool:
    """Whether the iterator could have a `close`; this runs no author code."""
    cls = type(iterator)
    return hasattr(cls, "close") or hasattr(cls, "__getattr__") or "close" in getattr(iterator, "__dict__", ())


def delegate(source: Any) -> Any:
    """Return what `yield from source` iterates."""
    if isinstance(source, types.GeneratorType):
        driver = thread.driver
        if driver is not None:
            driver.delegating(source)
        return source
    iterator = iter(source)
    if isinstance(iterator, _OURS):
        return iterator
    try:
        if iter(iterator) is iterator and (isinstance(iterator, types.GeneratorType) or not _may_close(iterator)):
            return iterator
    except TypeError:
        pass
    return _Delegate(iterator)


_OURS = (awaiting.Once, awaiting.Advance, awaiting.Chained)


def awaited(value: Any) -> Any:
    """Return what `await value` iterates: a fresh durable generator runs here, any other generator is waited for (semantics §6.1)."""
    if isinstance(value, types.GeneratorType):
        if value.gi_code.co_name == "<genexpr>":
            raise not_awaitable(value)
        driver = thread.driver
        if function_of(value.gi_code) is None or not _is_unstarted(value) or (driver is not None and driver.owns(value)):
            return value if value.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE and in_event_loop() else awaiting.Once(value)
        return value
    if in_event_loop():
        return protocols.native_iterator_of(value)
    iterator = protocols.iterator_of(value)
    return iterator if isinstance(iterator, _OURS) else delegate(iterator)


def _is_unstarted(gen: types.GeneratorType[Any, Any, Any]) -> bool:
    return gen.gi_frame is not None and not gen.gi_suspended and not gen.gi_running


_EMPTY = types.CellType()  # a comparison with it tells whether a cell is empty, without looking at contents


def first(slots: dict[str, Any], name: str = "", cell: types.CellType | None = None) -> Any:
    """Empty a state that has been read, and return its value of that name (or the content of its cell), which zero-argument `super()` looks for."""
    value = slots.get(name)
    slots.clear()
    if cell is not None:
        try:
            value = cell.cell_contents
        except ValueError:
            return None
    return value


class Resume:
    """A delegate that has already been started: it swallows the `next` of the handshake, then passes everything on (PEP 380)."""

    def __init__(self, target: Any, _reached: int) -> None:
        self.target = target
        self.entered = False

    def __iter__(self) -> Resume:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        if not self.entered:
            self.entered = True
            return None
        return next(self.target) if value is None else self.target.send(value)

    def __getattr__(self, name: str) -> Any:
        if name in ("throw", "close"):
            return getattr(self.target, name)
        raise AttributeError(name)


_VALUES = (str, bytes, int, float, complex)


def same(one: Any, other: Any) -> bool:
    """Whether these are one object, or would be if none had been saved and made again."""
    return one is other or (type(one) is type(other) and type(one) in _VALUES and bool(one == other))


def unbound(name: str) -> NoReturn:
    """Raise the error for reading a variable of this generator that is not bound."""
    raise UnboundLocalError(f"cannot access local variable {name!r} where it is not associated with a value")


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """Remove from a frame's `locals()` the names that lowering has added.  Until 3.12 it is the same dict each time, as in Python itself."""
    for name in [name for name in found if name[:1] == "@"]:
        del found[name]
    return found


def looked(function: Any, found: Any) -> Any:
    """Return what `locals()`, `vars()` or `dir()` returned, without our names; if the function is another one, its value as it is (semantics §5.5)."""
    if function is builtins.dir:
        return [name for name in found if name[:1] != "@"]
    return shown(found) if function in (builtins.locals, builtins.vars) else found


def inject(namespace: dict[str, Any], module: Module, bound: Mapping[str, type]) -> None:
    """Add to a module's namespace the globals that its lowered code uses besides the author's."""
    namespace.update({RUNTIME: Runtime(module, bound), "__@type__": builtins.type, "__@iter__": builtins.iter, "__@exc_info__": sys.exc_info})
    namespace.update({"__@managers__": _managers, "__@iterators__": _ITERATORS, "__@empty__": _EMPTY})


class Runtime:
    """The helpers as attributes, and `mark`, which tells the registry which function each code object belongs to."""

    abandoned = staticmethod(abandoned)
    kept = staticmethod(kept)
    entry = staticmethod(entry)
    entered = staticmethod(entered)
    iter = staticmethod(iterate)
    iterator = staticmethod(own_iterator)
    delegate = staticmethod(delegate)
    first = staticmethod(first)
    links = staticmethod(tracebacks.links)
    relink = staticmethod(tracebacks.relink)
    looked = staticmethod(looked)
    unbound = staticmethod(unbound)
    same = staticmethod(same)
    chain = itertools.chain
    slice = builtins.slice
    Resume = Resume
    BaseException = builtins.BaseException
    set = builtins.set
    list = builtins.list
    dict = builtins.dict
    append = staticmethod(list.append)
    add = staticmethod(set.add)
    setitem = staticmethod(operator.setitem)
    extend = staticmethod(list.extend)
    update = staticmethod(set.update)
    merge = staticmethod(dict.update)
    awaited = staticmethod(awaited)
    aiter = staticmethod(protocols.aiter_)
    anext = staticmethod(protocols.anext_)
    aenter = staticmethod(protocols.aenter)
    aleave = staticmethod(protocols.aleave)
    aexit = staticmethod(protocols.aexit)
    StopAsyncIteration = builtins.StopAsyncIteration
    Item = awaiting.Item
    async_generator = awaiting.AsyncGenerator

    def __init__(self, module: Module, bound: Mapping[str, type]) -> None:
        self.bound = bound  # classes of the current module that a stored version uses as its own
        self._functions = module.functions
        self._marks: dict[str, Callable[[Any], Any]] = {}
        self._awaitable: dict[str, types.CodeType] = {}

    def mark(self, path: str) -> Callable[[Any], Any]:
        """Return the innermost decorator of every function; it registers the function's code."""
        found = self._marks.get(path)
        if found is None:
            found = self._marks[path] = functools.partial(_mark, (self._functions, path))
        return found

    def marked(self, path: str, function: Any) -> Any:
        """Do what `mark` does, for lambdas."""
        return _mark((self._functions, path), function)

    def mark_coroutine(self, path: str) -> Callable[[Any], Any]:
        """Do what `mark` does, for async functions.  Their generators can be awaited by native coroutines, too."""

        def marked(function: types.FunctionType) -> types.FunctionType:
            code = self._awaitable.get(path)
            if code is None:
                code = self._awaitable[path] = function.__code__.replace(co_flags=function.__code__.co_flags | inspect.CO_ITERABLE_COROUTINE)
            function.__code__ = code
            return as_coroutine(_mark((self._functions, path), function))

        return marked

    def generator(self, path: str, made: types.GeneratorType[Any, Any, Any]) -> Any:
        """Do what `mark` does, for generator expressions."""
        register_code(made.gi_code, (self._functions, path))
        return made

    @staticmethod
    def called(qualname: str, made: Any) -> Any:
        """Give a function or generator the name that it has where it was written."""
        made.__qualname__ = qualname
        return made

    def closure(self, path: str, lender: types.FunctionType) -> types.FunctionType:
        """Return a function that has no def, with the cells and defaults of the lambda that stands in its place."""
        function = self._functions[path]
        made = types.FunctionType(function.plain, lender.__globals__, function.name, lender.__defaults__, lender.__closure__)
        made.__kwdefaults__ = lender.__kwdefaults__
        return made


def _mark(place: Place, fn: types.FunctionType) -> types.FunctionType:
    register_code(fn.__code__, place)
    return fn


def as_coroutine(fn: types.FunctionType) -> types.FunctionType:
    """Make `inspect.iscoroutinefunction` true for it, as for the async def that it was (from 3.12 on, where this is possible)."""
    mark: Callable[[Any], Any] | None = getattr(inspect, "markcoroutinefunction", None)
    if mark is not None:
        mark(fn)
    return fn
