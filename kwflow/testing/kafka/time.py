"""Virtual time: future events are in a queue, and time passes only when somebody waits."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

__all__ = ["START_MS", "Host", "VirtualTime"]

START_MS = 1_700_000_000_000  # the wall clock when virtual time begins

_REQUEST_MS = 0.1


class VirtualTime:
    """The clock and its events.  `now` is in ms and never goes back; `version` grows when something happens that a waiting client may be waiting for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.version = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, ms: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + ms, next(self._numbers), do))

    def changed(self) -> None:
        self.version += 1

    def next_ms(self) -> float | None:
        """Return the time of the next event, or None."""
        return self._queue[0][0] if self._queue else None

    def advance(self, until: float) -> None:
        """Run all events that are due until then, in order."""
        while self._queue and self._queue[0][0] <= until:
            at, _, do = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            do()
        self.now = max(self.now, until)


class Host:
    """The process that a client runs in.  This one never fails, and waiting lets time pass.

    A simulation overrides `call` (for each request and each write: it may wait or raise), `answered` (whether the answer is
    lost), `wait` and `background`.  The clients of a host that is not `running` (frozen) do nothing in the background;
    those of a host that is not `alive` never do anything again.
    """

    def __init__(self, time: VirtualTime, name: str = "host") -> None:
        self.time = time
        self.name = name
        self.running = True
        self.alive = True
        self.ahead_ms = 0  # of its wall clock

    def now_ms(self) -> int:
        """Return the time of this process's wall clock."""
        return START_MS + int(self.time.now) + self.ahead_ms

    def call(self, what: str) -> None:
        """Called before each request or write, which is named after the client's function; it takes a moment."""
        self.time.advance(self.time.now + _REQUEST_MS)

    def answered(self, what: str) -> bool:
        """Whether the answer to a request that was carried out arrives."""
        return True

    def chance(self, what: str) -> bool:
        """Whether something that may happen does happen (`buffer-full`, `stale-fetch`, `not-ready`, ...)."""
        return False

    def background(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        """Run work beside everything else, and return a function that waits for its end.  This one raises RuntimeError: it does one thing at a time."""
        raise RuntimeError(f"{self.name} cannot run {name}: a Host that does several things at a time overrides background()")

    def wait(self, until: float) -> None:
        """Return at this time, or earlier if something happens."""
        version = self.time.version
        while self.time.now < until and self.time.version == version:
            upcoming = self.time.next_ms()
            self.time.advance(until if upcoming is None else min(until, upcoming))
