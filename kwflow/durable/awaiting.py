"""What async code of durable modules waits for: async generators, and everything else that an `await` iterates, as plain picklable data.

A lowered `async def` is a durable generator.  What it awaits is an iterator with `send`, `throw` and `close` (PEP 380), which
can be saved in the middle.  Snapshots name the classes here by this module, so none can move.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Advance", "AsyncGenerator", "Chained", "Entering", "Item", "Leaving", "Once", "Settled", "below"]

Gen: TypeAlias = "types.GeneratorType[Any, Any, Any]"


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


class Settled(Once):
    """An awaitable that already has its value."""

    __slots__ = ()

    def __await__(self) -> Settled:
        return self

    def send(self, value: object) -> Any:
        raise StopIteration(self.target)


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


# -- awaitables around others ------------------------------------------------------------------------------------------


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


def below(delegate: Any) -> Any:
    """Return the generator that runs inside one of our delegates, or the delegate itself."""
    while isinstance(delegate, Chained):
        delegate = delegate.target
    return delegate.agen.gen if isinstance(delegate, Advance) else delegate
