"""Who runs the durable generators of this thread: whom lowered code tells what only it sees, and what becomes of generators that are dropped.

A generator that is merely forgotten is saved elsewhere, so its cleanup must not run here (G8); one that really ends cleans up, as in
plain Python.  Only the driver knows which it is, and says so by `set_driving`.  Everything that belongs to a thread is in this file.
"""

from __future__ import annotations

import gc
import sys
import threading
import types
from typing import Any, Protocol

__all__ = ["Driver", "abandoning", "clean_up_here", "in_event_loop", "set_abandoning", "set_driving", "thread"]

_forget_by_default = False


class Driver(Protocol):
    """Whoever runs durable generators on this thread and wants to be told what only lowered code sees."""

    def delegating(self, gen: types.GeneratorType[Any, Any, Any]) -> None:
        """Called when `yield from gen` is about to begin.  What this raises is raised there."""

    def entered(self, manager: Any, value: Any) -> None:
        """Called when a `with` that contains a wait has entered this manager and received this value.  What this raises is raised there."""

    def owns(self, gen: types.GeneratorType[Any, Any, Any]) -> bool:
        """Whether this generator already belongs to the driver, so that `await` has to wait for it instead of running it."""

    def catching(self, error: BaseException) -> None:
        """Called when an error has reached an author's `try` or `with` that contains a wait, which may swallow it."""


class _Thread(threading.local):
    forget: bool | None = None  # None: the default of the process
    collecting = False
    driver: Driver | None = None


thread = _Thread()


def set_driving(forget: bool | None, driver: Driver | None) -> tuple[bool | None, Driver | None]:
    """Set for this thread whether generators that are dropped are merely forgotten, and who is told.  Return both previous values."""
    before = thread.forget, thread.driver
    thread.forget, thread.driver = forget, driver
    return before


def abandoning() -> bool:
    """Whether a GeneratorExit that arrives now means "forgotten", so that the author's cleanup is skipped (G8)."""
    forget = thread.forget
    return _forget_by_default if forget is None or thread.collecting else forget


def in_event_loop() -> bool:
    """Whether asyncio runs this code, such as below an activity, and no driver: `await` is Python's own then, and nothing is saved."""
    if thread.driver is not None:
        return False
    events = sys.modules.get("asyncio.events")
    return events is not None and events._get_running_loop() is not None


def set_abandoning(value: bool | None, everywhere: bool = False) -> bool | None:
    """Set `abandoning` for this thread (None: back to the default of the process) or, with `everywhere`, that default.  Return the previous value."""
    global _forget_by_default
    if everywhere:
        before, _forget_by_default = _forget_by_default, bool(value)
        return before
    previous, thread.forget = thread.forget, value
    return previous


def clean_up_here() -> None:
    """On this thread, which runs no workflow, clean up generators that are dropped; but not those that a collection finds, which may be a workflow's."""
    thread.forget = False
    if _collects not in gc.callbacks:
        gc.callbacks.append(_collects)


def _collects(phase: str, _: object) -> None:
    thread.collecting = phase == "start"
