"""Which step runs on this thread: the one process state of the core, because author code calls `kw.*` with nothing that would lead to its step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kwflow.errors import UsageError

if TYPE_CHECKING:
    from kwflow.core.calls import Calls

__all__ = ["current", "in_step", "slot"]

slot = threading.local()


def in_step() -> bool:
    """Whether author code of a step is running on this thread."""
    return getattr(slot, "step", None) is not None


def current() -> Calls:
    """The running step.  Raises UsageError outside one (semantics §1.8)."""
    running: Calls | None = getattr(slot, "step", None)
    if running is None:
        raise UsageError("kw.* functions work only inside a running workflow step, not at import time or on another thread")
    return running
