"""What all routes share: the client, and waiting for it without a thread.

Every wait of a request lives here, for three reasons that end it early: a caller that hung up is forgotten, a gateway
that ends answers who waits, and a client whose link is lost is made anew.  It must not know paths or bodies.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from kwflow.client import Client, Future
from kwflow.config import Config
from kwflow.errors import OutcomeUnknown, TransportError, UsageError
from kwflow.runners.instances import Filter, Found
from kwflow.worker import Lending

__all__ = ["Gone", "Look", "Service", "hung_up"]

_T = TypeVar("_T")
Look = Callable[[Filter, int], Found]
_SEARCHES_MAX = 4  # what is known is in an entry; outcomes that are older, or larger, are looked for


class Gone(Exception):
    """The caller has hung up; nobody is there to be answered."""


class Service:
    """One gateway's client and its waits.  Close it, or use it in a `with`; all else is called on the event loop."""

    def __init__(self, config: Config, connect: Callable[[], Client], look: Look, lendings: Iterable[Lending] = (), of_this_machine: bool = False) -> None:
        """`connect` and `look` are called in threads.  `of_this_machine`: nobody else is meant to reach it."""
        self.config = config
        self._look = look
        self.of_this_machine = of_this_machine
        self.lendings = {lending.queue: lending for lending in lendings}
        self.waiting = 0  # requests that are being answered; Invariant: <= config.gateway_waits_max
        self.ending = False
        self._connect = connect
        self._client = connect()
        self._mending = asyncio.Lock()
        self._searches = asyncio.Semaphore(_SEARCHES_MAX)
        self._failed_s = 0.0
        self._failure: Exception = TransportError("never tried")
        self._at_end: set[Callable[[], None]] = set()

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def end(self) -> None:
        """Who waits for an outcome is answered now, and nobody waits for long any more."""
        self.ending = True
        for callback in list(self._at_end):
            callback()

    @contextlib.contextmanager
    def at_end(self, callback: Callable[[], None]) -> Iterator[None]:
        """Called when the gateway ends; at once if it does already."""
        self._at_end.add(callback)
        if self.ending:
            callback()
        try:
            yield
        finally:
            self._at_end.discard(callback)

    async def client(self) -> Client:
        """The client, or another one if its link was lost.  Raises TransportError."""
        asked_s = time.monotonic()
        if self._client.lost is None:
            return self._client
        async with self._mending:
            if self._failed_s > asked_s:  # while this one waited: it would fail alike, as late as the broker lets it
                raise self._failure
            if self._client.lost is not None and not self.ending:
                lost = self._client
                try:
                    self._client = await asyncio.to_thread(self._connect)
                except TransportError as error:
                    self._failed_s, self._failure = time.monotonic(), error
                    raise
                await asyncio.to_thread(lost.close)
        return self._client

    def seconds(self, wait: float) -> float:
        """How long a caller may wait.  Raises UsageError."""
        most = self.config.gateway_wait_s_max
        if wait > most:
            raise UsageError(f"wait={wait:g} is more than {most:g} s (limit gateway_wait_s_max); wait shorter and ask for the outcome again, the workflow goes on")
        return wait

    async def reply(self, request: Request, future: Future[_T]) -> _T:
        """What an engine replies; the client's own deadline ends it.  Raises what the future does, and Gone."""
        await self.first(request, None, future)
        return future.result()

    async def first(self, request: Request, seconds: float | None, *futures: concurrent.futures.Future[Any], ends: bool = False) -> bool:
        """Whether one of them is done, within so long; with `ends`, before the gateway ends.  When the caller hangs up they are cancelled.  Raises Gone."""
        loop = asyncio.get_running_loop()
        released: asyncio.Future[None] = loop.create_future()

        def release() -> None:
            if not released.done():
                released.set_result(None)

        for future in futures:
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(release))
        gone = loop.create_task(hung_up(request.receive))
        gone.add_done_callback(lambda _: release())
        try:
            with self.at_end(release) if ends else contextlib.nullcontext():
                async with asyncio.timeout(seconds):
                    await released
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            _cancel(futures)
            raise
        finally:
            gone.cancel()
        done = any(future.done() for future in futures)
        if gone.done() and not done:
            _cancel(futures)
            raise Gone
        return done

    async def found(self, wanted: Filter, limit: int) -> Found:
        """What engines tell of their instances.  Raises TransportError, OutcomeUnknown."""
        async with self.searching():
            return await asyncio.to_thread(self._look, wanted, limit)

    @contextlib.asynccontextmanager
    async def searching(self) -> AsyncIterator[None]:
        """To read topics from their begin, a few at a time: on Kafka each search is a reader of its own.  Raises OutcomeUnknown."""
        try:
            async with asyncio.timeout(self.config.command_timeout_s):
                await self._searches.acquire()
        except TimeoutError:
            raise OutcomeUnknown(f"{_SEARCHES_MAX} others are looked for in the topics already; ask again") from None
        try:
            yield
        finally:
            self._searches.release()

    async def late(self, request: Request, future: Future[_T]) -> _T:
        """What is known to be there and is looked for, as long as a reply may take.  Raises OutcomeUnknown, Gone."""
        if not await self.first(request, self.config.command_timeout_s, future):
            raise OutcomeUnknown(f"not found within {self.config.command_timeout_s:g} s; ask again")
        return future.result()


def _cancel(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """They are not waited for any more: the client forgets them."""
    for future in futures:
        future.cancel()


async def hung_up(receive: Receive) -> None:
    """Ends when the caller hangs up; what is left of the body is of no interest."""
    while (await receive())["type"] != "http.disconnect":
        pass
