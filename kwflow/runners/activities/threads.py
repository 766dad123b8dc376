"""Where activities run: threads for calls that may never end, and an event loop that one of them may block.

Every thread is a daemon: a call that hangs in it dies with the process, and does not keep the process from ending.  This
module must not know what runs.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from kwflow.durable.driving import clean_up_here
from kwflow.runners.clock import SystemClock

__all__ = ["AsyncCall", "Loops", "Threads", "on_thread", "place_of"]

_STUCK_S = 10.0


def place_of(thread: threading.Thread | None) -> str:
    """The function and line where a thread is now, for a log line; empty if it is not known."""
    frame = sys._current_frames().get(thread.ident or 0) if thread is not None else None
    if frame is None:
        return ""
    last = traceback.extract_stack(frame)[-1]
    return f", in {last.name} ({last.filename}:{last.lineno})"


async def on_thread(call: Callable[[], object]) -> None:
    """Make a call that may block, on a thread of its own, and wait for its end.

    The few threads of asyncio's pool are for what activities do on them, and a process that ends waits for them.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.done():  # cancelled
            return
        ended.set_result(None) if error is None else ended.set_exception(error)

    def work() -> None:
        try:
            call()
            failed = None
        except BaseException as error:
            failed = error
        loop.call_soon_threadsafe(settle, failed)

    threading.Thread(target=work, name="kwflow-activity-asks", daemon=True).start()
    await ended


class Threads:
    """As many threads as there are simultaneous calls; none is created while an idle one exists."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = self._busy = self._owed = 0
        self._closed = False

    def run(self, call: Callable[[], None]) -> None:
        """Make the call on some thread: if no more can be created, on the next one that becomes free.  Raises RuntimeError if there is none at all."""
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._busy += 1
                self._calls.put(call)
                return
            try:
                threading.Thread(target=self._work, args=(call,), name="kwflow-activity", daemon=True).start()
                self._busy += 1
            except RuntimeError:  # if it were raised where a result is delivered, it would end the thread that all deliveries depend on
                if not self._busy:
                    raise
                self._owed += 1
                self._calls.put(call)

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        """Wait until the condition is notified, or for this long.  The caller holds its lock."""
        changed.wait(seconds)

    def now_ms(self) -> int:
        return SystemClock().now_ms()

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()

    def _work(self, call: Callable[[], None] | None) -> None:
        clean_up_here()
        while call is not None:
            call()
            with self._lock:
                if self._closed:
                    return
                if self._owed:
                    self._owed -= 1
                else:
                    self._busy -= 1
                    self._idle += 1
            call = self._calls.get()

    def close(self) -> None:
        """End idle threads; the others end after their call."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._calls.put(None)
            self._idle = 0


class _Loop(threading.Thread):
    """An event loop on a thread of its own."""

    def __init__(self, on_log: Callable[[str], None]) -> None:
        super().__init__(name="kwflow-activity-loop", daemon=True)
        self.loop = asyncio.new_event_loop()
        self.beat = time.monotonic()
        self.asked = False
        self.closing = False
        self._on_log = on_log
        self.start()

    def run(self) -> None:
        clean_up_here()
        asyncio.set_event_loop(self.loop)
        while not self.closing:
            try:
                self.loop.run_forever()
            except BaseException as error:  # such as SystemExit from a task that an activity left behind
                self._on_log(f"a task that an activity started ended with {type(error).__name__}: {error}")

    def stop(self) -> None:
        self.closing = True
        self.loop.call_soon_threadsafe(self.loop.stop)


class AsyncCall:
    """A coroutine that runs on a loop."""

    def __init__(self, thread: _Loop) -> None:
        self.thread = thread
        self.begun = False
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    def begin(self, work: Callable[[], Coroutine[Any, Any, None]], never_begun: Callable[[], None]) -> None:
        """Create the task, with a context of its own, on the loop's thread; `never_begun` is called if it is cancelled before its first line."""

        async def body() -> None:
            self.begun = True
            await work()

        self._task = self.thread.loop.create_task(body(), context=contextvars.Context())
        self._task.add_done_callback(lambda _: None if self.begun else never_begun())
        if self._cancelled:
            self._task.cancel()

    def cancel(self) -> None:
        """Raise asyncio's CancelledError in the coroutine.  May be called from any thread."""
        self.thread.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()


class Loops:
    """One event loop, created when needed.  A blocked loop is abandoned to what blocks it, and replaced by another."""

    def __init__(self, on_log: Callable[[str], None]) -> None:
        self._on_log = on_log
        self._thread: _Loop | None = None

    def run(self, work: Callable[[], Coroutine[Any, Any, None]], never_begun: Callable[[], None]) -> AsyncCall:
        """Run this coroutine function on the loop; it must not raise."""
        thread = self._thread = self._thread or _Loop(self._on_log)
        call = AsyncCall(thread)
        thread.loop.call_soon_threadsafe(call.begin, work, never_begun)
        return call

    def look(self, now: float) -> None:
        """Check whether the loop still answers, and abandon it if not.  Called now and then."""
        thread = self._thread
        if thread is None:
            return
        if not thread.asked:
            thread.asked, thread.beat = True, now

            def answer() -> None:
                thread.asked = False

            thread.loop.call_soon_threadsafe(answer)
        elif now - thread.beat > _STUCK_S:
            self._on_log(f"an async activity blocks the event loop for {now - thread.beat:.0f} s{place_of(thread)}; use await, or a plain def; other activities get a new loop")
            self._thread = None

    def close(self) -> None:
        if self._thread is not None:
            self._thread.stop()
