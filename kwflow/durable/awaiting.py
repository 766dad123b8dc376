"""What async code of durable modules calls: `await`, async generators and async context managers, as plain picklable data.

A lowered `async def` is a durable generator.  What it awaits is an iterator with `send`, `throw` and `close` (PEP 380), which
can be saved in the middle.  Coroutines of other code cannot be saved; those of contextlib have stand-ins that can, and all others are
refused.  Snapshots name the classes here by this module.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from kwflow.durable.refusals import asyncio_refusal, no_iterator, no_manager, not_awaitable

__all__ = [
    "Advance", "AsyncGenerator", "Chained", "Item", "Once", "Settled", "aenter", "aexit", "aiter_", "aleave", "anext_", "below", "is_unstarted", "iterator_of", "leaving", "stand_ins",
]  # fmt: skip

Gen: TypeAlias = "types.GeneratorType[Any, Any, Any]"
stand_ins: dict[types.CodeType, Callable[[dict[str, Any]], Any]] = {}  # by the code of a coroutine: makes from its arguments the iterator that stands for it; stacks.py enters those of exit stacks


# -- await -------------------------------------------------------------------------------------------------------------
class Once:
    """Yields its target once, to whoever drives the generators; what is sent back is the value of the `await`."""

    __slots__ = ("target",)

    def __init__(self, target: Any) -> None:
        self.target = target

    def __iter__(self) -> Once:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: object) -> Any:
        target, self.target = self.target, None
        if target is None:
            raise StopIteration(value)
        return target

    def throw(self, error: BaseException, *_: object) -> Any:
        self.target = None
        try:
            raise error
        finally:
            del error  # the frame holds the error, and the error the frame: this cycle would keep much alive

    def close(self) -> None:
        self.target = None


def iterator_of(value: Any) -> Any:
    """Return what `await value` iterates, for anything but a generator.  Raises TypeError as Python does, UsageError for values of asyncio."""
    if inspect.iscoroutine(value):
        made = _instead_of(value)
        if made is not None:
            return made
    refusal = asyncio_refusal(value)
    if refusal is not None:
        raise refusal
    method = getattr(type(value), "__await__", None)
    if method is None:
        raise not_awaitable(value)
    iterator = method(value)
    if not hasattr(type(iterator), "__next__"):
        raise no_iterator(value, iterator)
    return iterator


def _instead_of(coroutine: types.CoroutineType[Any, Any, Any]) -> Any:
    """Return the iterator that stands for an unstarted coroutine; None if nothing does."""
    make = stand_ins.get(coroutine.cr_code)
    if make is None or coroutine.cr_frame is None or coroutine.cr_suspended:
        return None
    names = dict(coroutine.cr_frame.f_locals)
    coroutine.close()
    return make(names)


def below(delegate: Any) -> Any:
    """Return the generator that runs inside one of our delegates, or the delegate itself."""
    while isinstance(delegate, Chained):
        delegate = delegate.target
    return delegate.agen.gen if isinstance(delegate, Advance) else delegate


# -- async generators ----------------------------------------------------------------------------------------------------
class Item:
    """Wraps what an async generator yields, as opposed to what it waits for."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class AsyncGenerator:
    """A durable async generator: the methods of a native one (PEP 525) over a durable generator.

    Invariant: `running` is true from the first step of an `asend`, `athrow` or `aclose` to its last.
    """

    __slots__ = ("__weakref__", "gen", "running")

    def __init__(self, gen: Gen) -> None:
        self.gen = gen
        self.running = False

    def __getattr__(self, name: str) -> Any:
        if name in ("__name__", "__qualname__"):
            return getattr(self.gen, name)
        raise AttributeError(f"'async_generator' object has no attribute {name!r}")

    def __aiter__(self) -> AsyncGenerator:
        return self

    def __anext__(self) -> Advance:
        return Advance(self, "asend", None)

    def asend(self, value: Any) -> Advance:
        return Advance(self, "asend", value)

    def athrow(self, error: Any, value: Any = None, traceback: Any = None) -> Advance:
        return Advance(self, "athrow", error if value is None else value)

    def aclose(self) -> Advance:
        return Advance(self, "aclose", None)

    def __repr__(self) -> str:
        return f"<async generator {self.gen.__qualname__}>"


class Advance:
    """One `asend`, `athrow` or `aclose` of an async generator while it is awaited."""

    __slots__ = ("agen", "kind", "state", "value")

    def __init__(self, agen: AsyncGenerator, kind: str, value: Any) -> None:
        self.agen = agen
        self.kind = kind
        self.value = value
        self.state = "new"

    def __await__(self) -> Advance:
        return self

    __iter__ = __await__

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        gen = self.agen.gen
        if self.state == "new":
            self._begin()
            if self.kind == "asend":
                if self.value is not None and gen.gi_frame is not None and not gen.gi_suspended:
                    self._end()
                    raise TypeError("can't send non-None value to a just-started async generator")
                return self._outcome(gen.send, self.value)
            if gen.gi_frame is None:
                self._end()
                raise StopIteration if self.kind == "aclose" else StopAsyncIteration
            return self._outcome(gen.throw, GeneratorExit() if self.kind == "aclose" else self.value)
        if self.state == "ended":
            raise RuntimeError(f"cannot reuse already awaited {'__anext__()/asend()' if self.kind == 'asend' else 'aclose()/athrow()'}")
        return self._outcome(gen.send, value)

    def throw(self, error: Any, *rest: Any) -> Any:
        if self.state == "new":
            self._begin()
        elif self.state == "ended":
            raise RuntimeError("cannot reuse already awaited asend()/athrow()")
        try:
            return self._outcome(self.agen.gen.throw, error, *rest)
        finally:
            del error, rest

    def close(self) -> None:
        if self.state == "going":
            self.state = "ended"
            if sys.version_info >= (3, 13):  # before 3.13, Python leaves the generator as it is until it is dropped
                self.agen.gen.close()
                self.agen.running = False

    def _begin(self) -> None:
        if self.agen.running:
            raise RuntimeError(f"{'anext()' if self.kind == 'asend' else self.kind + '()'}: asynchronous generator is already running")
        self.agen.running = True
        self.state = "going"

    def _end(self) -> None:
        self.agen.running = False
        self.state = "ended"

    def _outcome(self, go: Callable[..., Any], *arguments: Any) -> Any:
        try:
            yielded = go(*arguments)
        except StopIteration:
            ended: BaseException = StopAsyncIteration()
        except StopAsyncIteration as error:
            ended = RuntimeError("async generator raised StopAsyncIteration")
            ended.__cause__ = error
        except BaseException as error:
            ended = error
        else:
            if type(yielded) is not Item:
                return yielded
            self._end()
            if self.kind == "aclose":
                raise RuntimeError("async generator ignored GeneratorExit")
            raise StopIteration(yielded.value)
        self._end()
        context = ended.__context__
        try:
            raise StopIteration if self.kind == "aclose" and isinstance(ended, (StopAsyncIteration, GeneratorExit)) else ended
        finally:
            BaseException.__setattr__(ended, "__context__", context)  # raising it here has set another one
            del context, ended, arguments


def aiter_(source: Any) -> Any:
    """Return what `__aiter__` of the type returns, with the checks of `async for`."""
    refusal = asyncio_refusal(source)
    if refusal is not None:
        raise refusal
    method = getattr(type(source), "__aiter__", None)
    if method is None:
        raise TypeError(f"'async for' requires an object with __aiter__ method, got {type(source).__name__}")
    iterator = method(source)
    if not hasattr(type(iterator), "__anext__"):
        raise TypeError(f"'async for' received an object from __aiter__ that does not implement __anext__: {type(iterator).__name__}")
    return iterator


def anext_(iterator: Any) -> Any:
    """Return the awaitable for the next value."""
    found = type(iterator).__anext__(iterator)
    if not isinstance(found, types.GeneratorType) and not hasattr(type(found), "__await__"):
        raise TypeError(f"'async for' received an invalid object from __anext__: {type(found).__name__}")
    return found


# -- async context managers ------------------------------------------------------------------------------------------------
def aenter(manager: Any) -> Any:
    """Return the awaitable of `__aenter__`, looked up as `async with` does; for contextlib's managers, one that can be saved."""
    cls = type(manager)
    enter = getattr(cls, "__aenter__", None)
    if enter is None or not hasattr(cls, "__aexit__"):
        raise no_manager(cls, ("__aenter__", "__aexit__"), ("__enter__", "__exit__"))
    if cls is contextlib._AsyncGeneratorContextManager and isinstance(manager.gen, AsyncGenerator):
        for name in ("args", "kwds", "func"):  # as contextlib does: they are only needed to make the manager again
            manager.__dict__.pop(name, None)
        return Entering(manager.gen.__anext__())
    if cls is contextlib.aclosing:
        return Settled(manager.thing)
    if cls is contextlib.nullcontext:
        return Settled(manager.enter_result)
    return enter(manager)


def aleave(manager: Any) -> Any:
    """Return the awaitable of `__aexit__` with the exception that is being handled."""
    return leaving(manager, *sys.exc_info())


def aexit(manager: Any) -> Any:
    return leaving(manager, None, None, None)


def leaving(manager: Any, *exc_info: Any) -> Any:
    """Return the awaitable of `__aexit__`; for contextlib's managers, one that can be saved."""
    cls = type(manager)
    if cls is contextlib._AsyncGeneratorContextManager and isinstance(manager.gen, AsyncGenerator):
        return Leaving(manager.gen, exc_info[1])
    if cls is contextlib.aclosing:
        return manager.thing.aclose()
    if cls is contextlib.nullcontext:
        return Settled(None)
    return cls.__aexit__(manager, *exc_info)


class Settled(Once):
    """An awaitable that already has its value."""

    __slots__ = ()

    def __await__(self) -> Settled:
        return self

    def send(self, value: object) -> Any:
        raise StopIteration(self.target)


class Chained:
    """An awaitable around another one.  How the inner one ends decides what comes next (`ended`)."""

    __slots__ = ("target",)

    def __init__(self, target: Any) -> None:
        self.target = target

    def __await__(self) -> Chained:
        return self

    __iter__ = __await__

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        return self._outcome(self.target.send, value)

    def throw(self, error: Any, *rest: Any) -> Any:
        try:
            return self._outcome(self.target.throw, error, *rest)
        finally:
            del error, rest

    def close(self) -> None:
        self.target.close()

    def _outcome(self, go: Callable[..., Any], *arguments: Any) -> Any:
        value: Any
        error: BaseException | None
        while True:
            value = error = None
            try:
                return go(*arguments)
            except StopIteration as stop:
                value = stop.value
            except BaseException as raised:
                error = raised
            ending = context = None
            try:
                ending = self.ended(value, error)
                if ending is not None:
                    context = ending.__context__
                    raise ending
            finally:
                if ending is not None and ending is error:
                    BaseException.__setattr__(ending, "__context__", context)  # raising it here has set another one
                del context, error, ending, arguments
            go, arguments = self.target.send, (None,)

    def ended(self, value: Any, error: BaseException | None) -> BaseException | None:
        """Return StopIteration with the result, an error to raise, or None to continue with another target."""
        raise NotImplementedError


class Entering(Chained):
    """`__aenter__` of an @asynccontextmanager."""

    __slots__ = ()

    def ended(self, value: Any, error: BaseException | None) -> BaseException | None:
        if isinstance(error, StopAsyncIteration):
            return RuntimeError("generator didn't yield")
        return error if error is not None else StopIteration(value)


class Leaving(Chained):
    """`__aexit__` of an @asynccontextmanager: the rules of contextlib, in a form that can be saved."""

    __slots__ = ("agen", "complaint", "error")

    def __init__(self, agen: AsyncGenerator, error: BaseException | None) -> None:
        super().__init__(agen.__anext__() if error is None else agen.athrow(error))
        self.agen = agen
        self.error = error
        self.complaint = ""

    def ended(self, value: Any, error: BaseException | None) -> BaseException | None:
        if self.complaint:
            return error if error is not None else RuntimeError(self.complaint)
        if error is None:
            self.complaint = "generator didn't stop" if self.error is None else "generator didn't stop after athrow()"
            self.target = self.agen.aclose()
            return None
        if isinstance(error, StopAsyncIteration):
            return StopIteration(self.error is not None and error is not self.error)
        if self.error is not None and (error is self.error or self._wrapped(error)):
            return StopIteration(False)
        return error

    def _wrapped(self, error: BaseException) -> bool:
        """Whether this is our own StopIteration, which left the generator as a RuntimeError."""
        return isinstance(self.error, (StopIteration, StopAsyncIteration)) and isinstance(error, RuntimeError) and error.__cause__ is self.error


def is_unstarted(gen: Gen) -> bool:
    return gen.gi_frame is not None and not gen.gi_suspended and not gen.gi_running
