"""What all routes share: the client, and waiting for it without a thread.

Every wait of a request is here, because three things end it early: a caller that hangs up is forgotten, a gateway that ends
answers the requests that wait, and a client whose link is lost is replaced.  This module must not know paths or bodies.
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
_SEARCHES_MAX = 4  # at a time; most outcomes are in an entry, and only older or larger ones are searched for


class Gone(Exception):
    """The caller has hung up, so there is nobody to answer."""


class Service:
    """One gateway's client and its waits.  Close it, or use it in a `with`; everything else is called on the event loop."""

    def __init__(self, config: Config, connect: Callable[[], Client], look: Look, lendings: Iterable[Lending] = (), of_this_machine: bool = False) -> None:
        """`connect` and `look` are called in threads.  `of_this_machine` says that only this machine is meant to reach the gateway."""
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
        """Answer the requests that wait for an outcome now; from here on no request waits for long."""
        self.ending = True
        for callback in list(self._at_end):
            callback()

    @contextlib.contextmanager
    def at_end(self, callback: Callable[[], None]) -> Iterator[None]:
        """Inside of this, call `callback` when the gateway ends; at once if it is already ending."""
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
            if self._failed_s > asked_s:  # another attempt failed while this one waited; this one would fail in the same way, and take as long
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
        """Return how long a caller wants to wait.  Raises UsageError if that is too long."""
        most = self.config.gateway_wait_s_max
        if wait > most:
            raise UsageError(f"wait={wait:g} is more than {most:g} s (limit gateway_wait_s_max); wait for less, and ask for the outcome again: the workflow continues")
        return wait

    async def reply(self, request: Request, future: Future[_T]) -> _T:
        """Wait for an engine's reply, until the client's own deadline.  Raises what the future raises, and Gone."""
        await self.first(request, None, future)
        return future.result()

    async def first(self, request: Request, seconds: float | None, *futures: concurrent.futures.Future[Any], ends: bool = False) -> bool:
        """Wait for one of these futures, at most this long (None: without limit); true if one is done.

        With `ends` the wait is over when the gateway ends.  If the caller hangs up, the futures are cancelled.  Raises Gone.
        """
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
        """What engines report about their instances.  Raises TransportError, OutcomeUnknown."""
        async with self.searching():
            return await asyncio.to_thread(self._look, wanted, limit)

    @contextlib.asynccontextmanager
    async def searching(self) -> AsyncIterator[None]:
        """Limit searches that read topics from their beginning to a few at a time: on Kafka each has a consumer of its own.  Raises OutcomeUnknown."""
        try:
            async with asyncio.timeout(self.config.command_timeout_s):
                await self._searches.acquire()
        except TimeoutError:
            raise OutcomeUnknown(f"{_SEARCHES_MAX} searches of the topics are already running; ask again") from None
        try:
            yield
        finally:
            self._searches.release()

    async def late(self, request: Request, future: Future[_T]) -> _T:
        """Wait for the search for something that is known to exist, as long as a reply may take.  Raises OutcomeUnknown, Gone."""
        if not await self.first(request, self.config.command_timeout_s, future):
            raise OutcomeUnknown(f"not found within {self.config.command_timeout_s:g} s; ask again")
        return future.result()


def _cancel(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """Cancel futures that nobody waits for any more, so that the client forgets them."""
    for future in futures:
        future.cancel()


async def hung_up(receive: Receive) -> None:
    """Return when the caller hangs up; the rest of the body is ignored."""
    while (await receive())["type"] != "http.disconnect":
        pass
