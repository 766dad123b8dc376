"""Author code that never reaches a wait: named in the log, then ended, so that the partition goes on (K19).

Python can raise in another thread only between bytecodes, so a call that blocks in C cannot be ended: an engine's process
ends instead, and after its start the record is looked for, until three processes have died of it alone (attempts.py).  One thread
of the process looks at all watchdogs now and then: waking it for each step would cost more than the step.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kwflow.errors import StepTimeout

__all__ = ["Watchdog", "end_when_stuck"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_AGAIN_S = 1.0  # author code may swallow it in a loop; raise again until the step ends
_LOOK_S = 1.0
_START_ME_AGAIN = 3  # exit code
_ends: list[bool] = []  # set in processes that are nothing but engines
_watched: weakref.WeakSet[Watchdog] = weakref.WeakSet()
_registering = threading.Lock()  # a set that another thread adds to while it is passed ends the one thread that looks
_watcher: list[threading.Thread] = []


class Watchdog:
    """Around each step of one thread: `watchdog.run(id, step, ...)`.

    After `warn_ms` the log says where the step is; at `abort_ms` StepTimeout is raised in it, and again at its end if
    author code swallowed it.
    """

    def __init__(self, warn_ms: int, abort_ms: int, on_log: Callable[[str], None]) -> None:
        self._warn_s, self._abort_s = warn_ms / 1000, abort_ms / 1000
        self._stuck_s = self._abort_s + max(2.0, self._abort_s / 2)  # well before the broker gives the partition to the next engine
        self._on_log = on_log
        self._lock = threading.Lock()
        self._name = ""
        self._ident = 0
        self._begun = 0.0  # 0: no step runs
        self._warned = self._raised = 0.0
        self.look_s = min(_LOOK_S, self._warn_s / 4, self._abort_s / 4)
        with _registering:
            _watched.add(self)

    def run(self, name: str, step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `step` returns.  Raises StepTimeout if it was to be ended, whatever it did about that."""
        if not _watcher:
            _watcher.append(threading.Thread(target=_watch, name="kwflow-watchdog", daemon=True))
            _watcher[0].start()
        self._name, self._ident = name, threading.get_ident()
        self._warned = self._raised = 0.0
        self._begun = time.monotonic()
        try:
            try:
                made = step(*args, **kwargs)
            finally:
                self._end()
        except StepTimeout:
            self._end()  # it may have come before the first instruction of the other
            if not self._raised:
                raise  # author code's own
        if self._raised:
            raise StepTimeout(f"the step took more than {self._abort_s:g} s without reaching a wait (limit step_abort_ms); do long work in an activity, or raise it and retry")
        return made

    def _end(self) -> None:
        """Nothing is raised in this thread any more when this has returned."""
        while True:
            try:
                with self._lock:
                    self._begun = 0.0
                    if not self._raised:
                        return
                    # One may still be on its way.  It is not taken back but replaced and waited for: taken back, CPython before
                    # 3.13 looks for it at each jump and call from then on (loops take 1.4 times as long), and 3.11 hangs when traced.
                    if not _raise_in(self._ident):
                        return
                    while True:
                        pass
            except StepTimeout:
                if not self._begun:
                    return

    def look(self, now: float) -> None:
        """Warn or raise if the step runs too long."""
        begun = self._begun
        passed = now - begun
        if not begun or passed < min(self._warn_s, self._abort_s):
            return
        if passed >= self._warn_s and self._warned != begun:
            self._warned = begun
            self._on_log(f"{self._name}: its step runs for {passed:.1f} s, now at {_where(self._ident)}")
        if passed >= self._abort_s and now - self._raised >= _AGAIN_S:
            with self._lock:
                if self._begun == begun:
                    self._raised = now
                    _raise_in(self._ident)
        if _ends and passed >= self._stuck_s and self._begun == begun:
            self._on_log(f"{self._name}: its step cannot be ended, at {_where(self._ident)}; this process ends, and is to be started again")
            os._exit(_START_ME_AGAIN)


def end_when_stuck() -> None:
    """From now on a step that cannot be ended ends this process, with exit code 3."""
    _ends.append(True)


def _raise_in(ident: int) -> bool:
    """False if there is no such thread: gevent has numbers of its own."""
    return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(StepTimeout)))


def _watch() -> None:
    while True:
        with _registering:
            dogs = list(_watched)
        time.sleep(min([_LOOK_S, *(dog.look_s for dog in dogs)]))
        for dog in dogs:
            dog.look(time.monotonic())


def _where(ident: int) -> str:
    frame = sys._current_frames().get(ident)
    while frame is not None and "kwflow" in frame.f_globals.get("__name__", "").split(".")[:1]:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"
