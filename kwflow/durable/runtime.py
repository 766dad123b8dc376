"""What lowered code calls: one object per module, its global `@kw`.  Nothing here may raise StopIteration by accident."""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from kwflow.durable import awaiting
from kwflow.durable.registry import Function, Module, function_of, register_code

__all__ = ["Driver", "Resume", "Runtime", "abandoning", "delegate", "set_abandoning", "set_driver"]

_forget = threading.local()
_forget_by_default = False
_driving = threading.local()


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


def set_driver(driver: Driver | None) -> Driver | None:
    """Tell this driver, on this thread, from now on; returns the one that was told before."""
    previous: Driver | None = getattr(_driving, "driver", None)
    _driving.driver = driver
    return previous


def abandoning() -> bool:
    """Whether a GeneratorExit that arrives now means "forgotten": cleanup of the author is skipped (G8)."""
    return getattr(_forget, "value", _forget_by_default)


def set_abandoning(value: bool | None, everywhere: bool = False) -> bool | None:
    """Set it for this thread (None: the process's default again) or as the process's default; returns what it was."""
    global _forget_by_default
    if everywhere:
        before, _forget_by_default = _forget_by_default, bool(value)
        return before
    previous: bool | None = getattr(_forget, "value", None)
    if value is None:
        _forget.__dict__.pop("value", None)
    else:
        _forget.value = value
    return previous


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
            one.__traceback__ = first
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
    driver: Driver | None = getattr(_driving, "driver", None)
    if driver is not None and error is not None:
        driver.catching(error)


def kept() -> bool:
    """Whether a `finally` runs: not when a forgotten generator is being dropped."""
    _tell()
    return not (sys.exc_info()[0] is GeneratorExit and abandoning())


def enter(manager: Any) -> Any:
    """`__enter__`, looked up as the with statement does: both methods on the type, before either runs."""
    cls = type(manager)
    enter_ = getattr(cls, "__enter__", None)
    if enter_ is None or not hasattr(cls, "__exit__"):
        missed = " (missed __exit__ method)" if enter_ is not None else ""
        raise TypeError(f"'{cls.__name__}' object does not support the context manager protocol{missed}")
    value = enter_(manager)
    driver: Driver | None = getattr(_driving, "driver", None)
    if driver is not None:
        driver.entered(manager, value)
    return value


def leave(manager: Any) -> bool:
    """`__exit__` with the exception being handled; True when it has to go on."""
    if not kept():
        return True
    return not type(manager).__exit__(manager, *sys.exc_info())


def exit_(manager: Any) -> None:
    type(manager).__exit__(manager, None, None, None)


class _Iterable:
    """An iterator without `__iter__` (legal for `for`), given one."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __iter__(self) -> _Iterable:
        return self

    def __next__(self) -> Any:
        return next(self.iterator)


def iterate(source: Any) -> Iterator[Any]:
    """iter(source) as an object that `for` takes again and again as itself."""
    iterator: Iterator[Any] = iter(source)
    try:
        if iter(iterator) is iterator:
            return iterator
    except TypeError:
        pass
    return _Iterable(iterator)


class _Delegate(_Iterable):
    """`_Iterable` for `yield from`: send, throw and close go to the iterator if it has them (PEP 380)."""

    def __getattr__(self, name: str) -> Any:
        if name in ("send", "throw"):
            return getattr(self.iterator, name)
        raise AttributeError(name)

    def close(self) -> None:
        """The author's `close` is cleanup: skipped when the generator is only forgotten (G8)."""
        close = getattr(self.iterator, "close", None)
        if close is not None and not abandoning():
            close()


def delegate(source: Any) -> Any:
    """What `yield from source` iterates."""
    if isinstance(source, types.GeneratorType):
        driver: Driver | None = getattr(_driving, "driver", None)
        if driver is not None:
            driver.delegating(source)
        return source
    iterator = iter(source)
    if isinstance(iterator, _OURS):
        return iterator
    try:
        if iter(iterator) is iterator and (isinstance(iterator, types.GeneratorType) or not hasattr(iterator, "close")):
            return iterator
    except TypeError:
        pass
    return _Delegate(iterator)


_OURS = (awaiting.Once, awaiting.Advance, awaiting._Chained)


def awaited(value: Any) -> Any:
    """What `await value` iterates: a fresh durable generator runs here, one that runs elsewhere is waited for (semantics §6.1)."""
    if isinstance(value, types.GeneratorType):
        if value.gi_code.co_name == "<genexpr>":
            raise TypeError("object generator can't be used in 'await' expression")
        driver: Driver | None = getattr(_driving, "driver", None)
        if function_of(value.gi_code) is None or not awaiting.is_unstarted(value) or (driver is not None and driver.owns(value)):
            return awaiting.Once(value)
        return value
    iterator = awaiting.iterator_of(value)
    return iterator if isinstance(iterator, _OURS) else delegate(iterator)


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

    def throw(self, *error: Any) -> Any:
        throw = getattr(self.target, "throw", None)
        try:
            if throw is not None:
                return throw(*error)
            raise error[0] if len(error) == 1 else error[1] if isinstance(error[1], BaseException) else error[0](error[1])
        finally:
            error = ()  # or the error would hold this frame, which holds the error

    def close(self) -> None:
        close = getattr(self.target, "close", None)
        if close is not None:
            close()


class Runtime:
    """The helpers as attributes, and `mark`, which tells the registry what each code object is."""

    abandoned = staticmethod(abandoned)
    kept = staticmethod(kept)
    enter = staticmethod(enter)
    leave = staticmethod(leave)
    exit = staticmethod(exit_)
    iter = staticmethod(iterate)
    delegate = staticmethod(delegate)
    chain = itertools.chain
    slice = builtins.slice
    Resume = Resume
    BaseException = builtins.BaseException
    set = builtins.set
    append = staticmethod(list.append)
    add = staticmethod(set.add)
    setitem = staticmethod(operator.setitem)
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
            found = self._marks[path] = functools.partial(_mark, self._functions[path])
        return found

    def marked(self, path: str, function: Any) -> Any:
        """The same for lambdas."""
        return _mark(self._functions[path], function)

    def mark_coroutine(self, path: str) -> Callable[[Any], Any]:
        """The same for async functions."""
        return lambda function: as_coroutine(_mark(self._functions[path], function))

    def generator(self, path: str, made: types.GeneratorType[Any, Any, Any]) -> Any:
        """The same for generator expressions."""
        register_code(made.gi_code, self._functions[path])
        return made

    def closure(self, path: str, lender: types.FunctionType) -> types.FunctionType:
        """A function without a def, around the cells and defaults that a lambda in its place has."""
        function = self._functions[path]
        made = types.FunctionType(function.plain, lender.__globals__, function.name, lender.__defaults__, lender.__closure__)
        made.__kwdefaults__ = lender.__kwdefaults__
        return made


def _mark(function: Function, fn: types.FunctionType) -> types.FunctionType:
    register_code(fn.__code__, function)
    return fn


def as_coroutine(fn: types.FunctionType) -> types.FunctionType:
    """`inspect.iscoroutinefunction` says yes, as for the async def it was (from 3.12 on, where it can be told)."""
    mark: Callable[[Any], Any] | None = getattr(inspect, "markcoroutinefunction", None)
    if mark is not None:
        mark(fn)
    return fn
