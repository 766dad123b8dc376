"""The step that runs on this thread: the only process state of the core, because author code calls `kw.*` without anything that leads to its step."""

from __future__ import annotations

import threading

from kwflow.core.calls import Calls
from kwflow.errors import UsageError

__all__ = ["current", "in_step", "slot"]

slot = threading.local()


def in_step() -> bool:
    """Whether author code of a step is running on this thread."""
    return getattr(slot, "step", None) is not None


def current() -> Calls:
    """Return the running step.  Raises UsageError outside a step (semantics §1.8)."""
    running: Calls | None = getattr(slot, "step", None)
    if running is None:
        raise UsageError("kw.* functions work only inside a running workflow step, not in the function of a kw.wait_condition, in a validator, at import time, or on another thread")
    return running
