"""Author code that never reaches a wait: named in the log, then ended, so that the partition goes on (K19).

Python can raise in another thread only between bytecodes, so a call that blocks in C is named but not ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator

from kwflow.errors import StepTimeout

__all__ = ["Watchdog"]

_AGAIN_S = 1.0  # author code may swallow it in a loop; raise again until the step ends


class Watchdog:
    """Watches one thread's steps.  `warn_ms` logs where a step is; at `abort_ms` StepTimeout is raised in it."""

    def __init__(self, warn_ms: int, abort_ms: int, on_log: Callable[[str], None]) -> None:
        self._warn_s, self._abort_s = warn_ms / 1000, abort_ms / 1000
        self._on_log = on_log
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._step: tuple[str, int, float] | None = None
        self._fired = False
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Around one step.  Raises StepTimeout at its end if author code swallowed it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="kwflow-watchdog", daemon=True)
            self._thread.start()
        ident = threading.get_ident()
        with self._lock:
            self._step, self._fired = (name, ident, time.monotonic()), False
            self._changed.notify()
        try:
            yield
        finally:
            with self._lock:
                self._step = None
                fired = self._fired
                if fired:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)
        if fired:
            raise StepTimeout(f"the step took more than {self._abort_s:g} s without reaching a wait")

    def _watch(self) -> None:
        warned: tuple[str, int, float] | None = None
        with self._lock:
            while True:
                step = self._step
                if step is None:
                    self._changed.wait()
                    continue
                name, ident, begun = step
                passed = time.monotonic() - begun
                if passed >= self._warn_s and warned != step:
                    warned = step
                    self._on_log(f"{name}: its step runs for {passed:.1f} s, now at {_where(ident)}")
                if passed >= self._abort_s:
                    self._fired = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(StepTimeout))
                    self._changed.wait(_AGAIN_S)
                else:
                    self._changed.wait((self._abort_s if warned == step else min(self._warn_s, self._abort_s)) - passed)


def _where(ident: int) -> str:
    frame = sys._current_frames().get(ident)
    while frame is not None and "kwflow" in frame.f_globals.get("__name__", "").split(".")[:1]:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"
