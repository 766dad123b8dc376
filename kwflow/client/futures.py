"""What callers of one client wait for: futures, each settled once, by a reply, by its deadline or by the client's end.

The one rule: a future is registered before its request is sent, and once it is settled nothing is kept of it, whoever settled it (M1.4).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import itertools
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any, Generic, TypeVar

import msgspec

from kwflow.core import wire
from kwflow.core.encrypted import is_encrypted, missing_key
from kwflow.core.wire import Record
from kwflow.errors import UsageError

__all__ = ["Future", "Futures", "Reply", "fail", "seconds_of", "settle"]

_T = TypeVar("_T")
_SECONDS_MAX = wire.DELAY_MS_MAX // 1000
_SETTLED_MAX = 100  # deadlines of settled futures that may stay in the heap, besides as many as are open


class Future(concurrent.futures.Future[_T], Generic[_T]):
    """A value to come: `.result(timeout)` waits for it in a thread, `await` in a coroutine.  Cancelling it only stops the waiting."""

    told_by: Callable[[], int] = staticmethod(lambda: 0)  # the id of the thread that settles it, which also runs callbacks

    def result(self, timeout: float | None = None) -> _T:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if not self.done() and threading.get_ident() == self.told_by():
            raise UsageError("a callback must not wait: it runs on the client's thread, which has to deliver the result; add another callback, or wait on a thread of your own")

    def __await__(self) -> Generator[Any, None, _T]:
        return asyncio.wrap_future(self).__await__()


class Reply(msgspec.Struct):
    """An engine's answer to one request."""

    request: str
    status: str
    message: str = ""
    value: Any = None


class Futures:
    """The open futures of one client, and the replies that they wait for.

    `counts` counts replies that were for nobody here; `process` is the address of replies for us.
    """

    def __init__(self, process: str, counts: Counter[str]) -> None:
        self.lost: Exception | None = None  # why no more replies come
        self._open: set[Future[Any]] = set()
        self._requests: dict[str, tuple[Future[Any], Callable[[Reply], None]]] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap of times, with the numbers by which `_late` knows what they are for
        self._late: dict[int, tuple[str | None, Future[Any], Exception]] = {}
        self._process = process.encode()
        self._counts = counts
        self._lock = threading.RLock()
        self._count = itertools.count()
        self._pid = os.getpid()
        self._thread = 0  # the thread on which the link calls us

    def new(self) -> Future[Any]:
        """Create a future.  Raises the error that ended the client, or UsageError in a forked process."""
        future: Future[Any] = Future()
        future.told_by = lambda: self._thread
        with self._lock:
            if self.lost is not None:
                raise self.lost
            if os.getpid() != self._pid:  # a fork does not copy threads: nobody would ever answer
                raise UsageError(f"this client was created in another process (pid {self._pid}); create one after the fork")
            self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def expect(self, future: Future[Any], replied: Callable[[Reply], None], seconds: float, late: Exception) -> str:
        """Register a request that is about to be written, and return its id.

        `replied` is called with the reply; if there is none after `seconds`, the future fails with `late`.
        """
        request = uuid.uuid4().hex
        with self._lock:
            self._requests[request] = future, replied
        future.add_done_callback(lambda _: self._requests.pop(request, None))
        self.at(seconds, future, late, request)
        return request

    def at(self, seconds: float, future: Future[Any], error: Exception, request: str | None = None) -> None:
        """Fail the future after `seconds`, if it is still open and, if `request` is given, that has no reply by then."""
        with self._lock:
            number = next(self._count)
            self._late[number] = request, future, error
            heapq.heappush(self._deadlines, (time.monotonic() + seconds, number))
            if len(self._deadlines) > 2 * len(self._late) + _SETTLED_MAX:
                self._deadlines = sorted(deadline for deadline in self._deadlines if deadline[1] in self._late)
        future.add_done_callback(lambda _: self._late.pop(number, None))

    def take(self, record: Record) -> None:
        """Take a record of the reply topic.

        A reply that we cannot decrypt may be for any request, which would then get no other: so it fails all of them.
        """
        if record.key != self._process:
            self._counts["foreign"] += 1
            return
        if is_encrypted(record.value):
            self._counts["unreadable"] += 1
            with self._lock:
                waiting = [future for future, _ in self._requests.values()]
            for future in waiting:
                fail(future, missing_key(record.topic, record.value))
            return
        try:
            reply = msgspec.json.decode(record.value or b"", type=Reply)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._counts["unreadable"] += 1
            return
        with self._lock:
            asked = self._requests.pop(reply.request, None)
        if asked is None:
            self._counts["foreign"] += 1  # nobody waits for it any more
        else:
            asked[1](reply)

    def tick(self) -> None:
        """Fail the futures whose deadline is over.  Called on the link's thread."""
        self._thread = threading.get_ident()
        now = time.monotonic()
        due = []
        with self._lock:
            while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._late):
                late = self._late.pop(heapq.heappop(self._deadlines)[1], None)
                if late is not None and (late[0] is None or late[0] in self._requests):
                    due.append(late[1:])
        for future, error in due:
            fail(future, error)

    def lose(self, error: Exception) -> None:
        """Fail all open futures and allow no new ones, as no more replies come.  Of several reasons the first is reported."""
        with self._lock:
            self.lost = self.lost or error
            waiting = list(self._open)
        for future in waiting:
            fail(future, error)


def settle(future: Future[Any], value: object) -> None:
    """Set the result.  Does nothing if the caller no longer waits, or the deadline came first."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_result(value)


def fail(future: Future[Any], error: Exception) -> None:
    """Set an exception, otherwise like `settle`."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_exception(error)


def seconds_of(given: timedelta | float, what: str) -> float:
    """Convert a length of time to seconds.  Raises UsageError if it is none, or is too long."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not 0 <= seconds <= _SECONDS_MAX:
        raise UsageError(f"{what} must be a timedelta or a number of seconds, from 0 to {_SECONDS_MAX:,}, not {given!r}")
    return seconds
