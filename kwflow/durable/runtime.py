"""What lowered code calls: one object per module, its global `RUNTIME`.  Nothing here may raise StopIteration by accident."""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import inspect
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

from kwflow.durable import awaiting
from kwflow.durable.registry import RUNTIME, Module, Place, function_of, register_code

__all__ = ["Driver", "Resume", "Runtime", "abandoning", "clean_up_here", "delegate", "inject", "set_abandoning", "set_driving"]

_forget_by_default = False


class Driver(Protocol):
    """Whoever runs durable generators on this thread may want to know what only lowered code sees."""

    def delegating(self, gen: types.GeneratorType[Any, Any, Any]) -> None:
        """`yield from gen` is about to begin.  What this raises is raised there."""

    def entered(self, manager: Any, value: Any) -> None:
        """A `with` that holds a wait has entered this manager and got this value.  What this raises is raised there."""

    def owns(self, gen: types.GeneratorType[Any, Any, Any]) -> bool:
        """Whether this generator is the driver's already, so that `await` has to wait for it instead of running it."""

    def catching(self, error: BaseException) -> None:
        """An error has reached a `try` or `with` of the author that holds a wait, and may be swallowed by it."""


class _Thread(threading.local):
    forget: bool | None = None  # None: as the process does by default
    collecting = False
    driver: Driver | None = None


_thread = _Thread()


def set_driving(forget: bool | None, driver: Driver | None) -> tuple[bool | None, Driver | None]:
    """On this thread, from now on: whether generators that are dropped are only forgotten, and who is told.  Returns what both were."""
    before = _thread.forget, _thread.driver
    _thread.forget, _thread.driver = forget, driver
    return before


def abandoning() -> bool:
    """Whether a GeneratorExit that arrives now means "forgotten": cleanup of the author is skipped (G8)."""
    forget = _thread.forget
    return _forget_by_default if forget is None or _thread.collecting else forget


def set_abandoning(value: bool | None, everywhere: bool = False) -> bool | None:
    """Set it for this thread (None: the process's default again) or as the process's default; returns what it was."""
    global _forget_by_default
    if everywhere:
        before, _forget_by_default = _forget_by_default, bool(value)
        return before
    previous, _thread.forget = _thread.forget, value
    return previous


def clean_up_here() -> None:
    """On this thread, where no workflow runs, what is dropped is cleaned up, but what a collection finds: that may be a workflow's."""
    _thread.forget = False
    if _collects not in gc.callbacks:
        gc.callbacks.append(_collects)


def _collects(phase: str, _: object) -> None:
    _thread.collecting = phase == "start"


def forget_frames(error: BaseException) -> None:
    """Take the frames of this package out of the error's tracebacks, those of its causes and contexts included.

    They say nothing to the author, and each holds its callers, among them whoever drives the generator: an error that is
    kept would keep generators alive that have ended.
    """
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        errors += [one.__cause__, one.__context__]
        first = _authors(one.__traceback__)
        if first is not one.__traceback__:
            BaseException.__setattr__(one, "__traceback__", first)  # a frozen class would refuse
        while first is not None:
            following = _authors(first.tb_next)
            if following is not first.tb_next:
                first.tb_next = following
            first = following


def _authors(entry: types.TracebackType | None) -> types.TracebackType | None:
    while entry is not None and entry.tb_frame.f_globals.get("__name__") in _OUR_MODULES:
        entry = entry.tb_next
    return entry


_OUR_MODULES = (__name__, awaiting.__name__)


def abandoned() -> type[BaseException] | tuple[()]:
    """The first except clause around every wait: catches the GeneratorExit of a forgotten generator, else nothing."""
    _tell()
    return GeneratorExit if abandoning() else ()


def _tell() -> None:
    error = sys.exc_info()[1]
    driver = _thread.driver
    if driver is not None and error is not None:
        driver.catching(error)


def kept() -> bool:
    """Whether a `finally` runs: not when a forgotten generator is being dropped."""
    _tell()
    return not (sys.exc_info()[0] is GeneratorExit and abandoning())


def entry(manager: Any) -> Any:
    """`__enter__`, looked up as the with statement does: both methods on the type, before either runs.

    Lowered code calls it, and `__exit__`, itself: no frame of ours stands in the author's tracebacks.
    """
    cls = type(manager)
    enter_ = getattr(cls, "__enter__", None)
    if enter_ is None or not hasattr(cls, "__exit__"):
        raise awaiting.no_manager(cls, ("__enter__", "__exit__"), ("__aenter__", "__aexit__"))
    if not isinstance(manager, contextlib._GeneratorContextManager) and "<locals>" not in cls.__qualname__:  # those come and go
        _managers.add(cls)
    return enter_


_managers: set[type] = set()  # types that have passed the checks above and of which no driver is told


def entered(manager: Any, value: Any) -> Any:
    """What `__enter__` returned; a driver is told."""
    driver = _thread.driver
    if driver is not None:
        driver.entered(manager, value)
    return value


class _Iterable:
    """An iterator without `__iter__` (legal for `for`), given one."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __iter__(self) -> _Iterable:
        return self

    def __next__(self) -> Any:
        return next(self.iterator)


_SOURCES: tuple[Any, ...] = ([], (), "", "\u00e9", b"", {}, {}.values(), {}.items(), set(), range(0), range(1 << 70), enumerate(()), zip(), map(str, ()), reversed([]))
_ITERATORS = frozenset(type(iter(source)) for source in _SOURCES) | {types.GeneratorType}  # iter() of one is itself, no need to ask


def iterate(source: Any) -> Iterator[Any]:
    """iter(source) as an object that `for` takes again and again as itself."""
    iterator: Iterator[Any] = iter(source)
    return iterator if type(iterator) in _ITERATORS else own_iterator(iterator)


def own_iterator(iterator: Any) -> Iterator[Any]:
    """The same for what `iter` gave, if its type is not known."""
    try:
        if iter(iterator) is iterator:
            return iterator  # type: ignore[no-any-return]
    except TypeError:
        pass
    return _Iterable(iterator)


class _Delegate(_Iterable):
    """`_Iterable` for `yield from`: send, throw and close go to the iterator if it has them (PEP 380)."""

    def __getattr__(self, name: str) -> Any:
        """Looked up when it is needed, as CPython does; the author's `close` is cleanup, skipped when the generator is only forgotten (G8)."""
        if name == "close" and abandoning():
            return _nothing
        if name in ("send", "throw", "close"):
            return getattr(self.iterator, name)
        raise AttributeError(name)


def _nothing() -> None:
    """The `close` of what is only forgotten."""


def _may_close(iterator: object) -> bool:
    """Whether it could have a `close`; asked without running code of the author."""
    cls = type(iterator)
    return hasattr(cls, "close") or hasattr(cls, "__getattr__") or "close" in getattr(iterator, "__dict__", ())


def delegate(source: Any) -> Any:
    """What `yield from source` iterates."""
    if isinstance(source, types.GeneratorType):
        driver = _thread.driver
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


_OURS = (awaiting.Once, awaiting.Advance, awaiting._Chained)


def awaited(value: Any) -> Any:
    """What `await value` iterates: a fresh durable generator runs here, one that runs elsewhere is waited for (semantics §6.1)."""
    if isinstance(value, types.GeneratorType):
        if value.gi_code.co_name == "<genexpr>":
            raise awaiting.not_awaitable(value)
        driver = _thread.driver
        if function_of(value.gi_code) is None or not awaiting.is_unstarted(value) or (driver is not None and driver.owns(value)):
            return awaiting.Once(value)
        return value
    iterator = awaiting.iterator_of(value)
    return iterator if isinstance(iterator, _OURS) else delegate(iterator)


_EMPTY = types.CellType()  # compared with another cell, it tells whether that is empty; contents are not looked at


def first(slots: dict[str, Any], name: str = "", cell: types.CellType | None = None) -> Any:
    """Empties a state that has been read and returns its value of that name: what zero-argument `super()` looks for."""
    value = slots.get(name)
    slots.clear()
    if cell is not None:
        try:
            value = cell.cell_contents
        except ValueError:
            return None
    return value


def links(error: BaseException) -> tuple[types.TracebackType | None, list[tuple[BaseException, BaseException | None]]]:
    """What raising it again, to enter a handler or a `finally`, would change: also a cycle of contexts, which CPython cuts."""
    contexts: list[tuple[BaseException, BaseException | None]] = [(error, error.__context__)]
    seen = set()
    other = sys.exc_info()[1]
    while other is not None and id(other) not in seen:
        seen.add(id(other))
        if other.__context__ is error:
            contexts.append((other, error))
        other = other.__context__
    return error.__traceback__, contexts


def relink(error: BaseException, saved: tuple[types.TracebackType | None, list[tuple[BaseException, BaseException | None]]]) -> None:
    """Put that back; one that comes from bytes has no traceback and keeps the line where it was raised again."""
    traceback, contexts = saved
    for other, context in contexts:
        BaseException.__setattr__(other, "__context__", context)
    if traceback is not None:
        BaseException.__setattr__(error, "__traceback__", traceback)


class Resume:
    """A delegate that is already started: swallows the handshake's `next`, then passes everything on (PEP 380)."""

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


def unbound(name: str) -> NoReturn:
    """Reading a variable of this generator that holds nothing."""
    raise UnboundLocalError(f"cannot access local variable {name!r} where it is not associated with a value")


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """A frame's `locals()` without the names that lowering has added; until 3.12 the same dict each time, as natively."""
    for name in [name for name in found if name[:1] == "@"]:
        del found[name]
    return found


def looked(function: Any, found: Any) -> Any:
    """What `locals()`, `vars()` or `dir()` gave, if it is those (semantics §5.5)."""
    if function is builtins.dir:
        return [name for name in found if name[:1] != "@"]
    return shown(found) if function in (builtins.locals, builtins.vars) else found


def inject(namespace: dict[str, Any], module: Module, bound: Mapping[str, type]) -> None:
    """The globals that lowered code of a module uses beside the author's."""
    namespace.update({RUNTIME: Runtime(module, bound), "@type": builtins.type, "@iter": builtins.iter, "@exc_info": sys.exc_info, "@managers": _managers, "@iterators": _ITERATORS, "@empty": _EMPTY})


class Runtime:
    """The helpers as attributes, and `mark`, which tells the registry what each code object is."""

    abandoned = staticmethod(abandoned)
    kept = staticmethod(kept)
    entry = staticmethod(entry)
    entered = staticmethod(entered)
    iter = staticmethod(iterate)
    iterator = staticmethod(own_iterator)
    delegate = staticmethod(delegate)
    first = staticmethod(first)
    links = staticmethod(links)
    relink = staticmethod(relink)
    looked = staticmethod(looked)
    unbound = staticmethod(unbound)
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
    aiter = staticmethod(awaiting.aiter_)
    anext = staticmethod(awaiting.anext_)
    aenter = staticmethod(awaiting.aenter)
    aleave = staticmethod(awaiting.aleave)
    aexit = staticmethod(awaiting.aexit)
    StopAsyncIteration = builtins.StopAsyncIteration
    Item = awaiting.Item
    async_generator = awaiting.AsyncGenerator

    def __init__(self, module: Module, bound: Mapping[str, type]) -> None:
        self.bound = bound  # classes of the current module that a stored version takes as its own
        self._functions = module.functions
        self._marks: dict[str, Callable[[Any], Any]] = {}

    def mark(self, path: str) -> Callable[[Any], Any]:
        """The innermost decorator of every function: registers its code."""
        found = self._marks.get(path)
        if found is None:
            found = self._marks[path] = functools.partial(_mark, (self._functions, path))
        return found

    def marked(self, path: str, function: Any) -> Any:
        """The same for lambdas."""
        return _mark((self._functions, path), function)

    def mark_coroutine(self, path: str) -> Callable[[Any], Any]:
        """The same for async functions."""
        return lambda function: as_coroutine(_mark((self._functions, path), function))

    def generator(self, path: str, made: types.GeneratorType[Any, Any, Any]) -> Any:
        """The same for generator expressions."""
        register_code(made.gi_code, (self._functions, path))
        return made

    @staticmethod
    def called(qualname: str, made: Any) -> Any:
        """A function or generator by the name that it has where it was written."""
        made.__qualname__ = qualname
        return made

    def closure(self, path: str, lender: types.FunctionType) -> types.FunctionType:
        """A function without a def, around the cells and defaults that a lambda in its place has."""
        function = self._functions[path]
        made = types.FunctionType(function.plain, lender.__globals__, function.name, lender.__defaults__, lender.__closure__)
        made.__kwdefaults__ = lender.__kwdefaults__
        return made


def _mark(place: Place, fn: types.FunctionType) -> types.FunctionType:
    register_code(fn.__code__, place)
    return fn


def as_coroutine(fn: types.FunctionType) -> types.FunctionType:
    """`inspect.iscoroutinefunction` says yes, as for the async def it was (from 3.12 on, where it can be told)."""
    mark: Callable[[Any], Any] | None = getattr(inspect, "markcoroutinefunction", None)
    if mark is not None:
        mark(fn)
    return fn
