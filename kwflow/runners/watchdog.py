"""Author code that never reaches a wait: it is named in the log, then ended, so that the partition goes on (K19).

Python can raise an exception in another thread only between bytecodes, so a call that blocks in C cannot be ended.  An
engine's process ends instead; after its restart the record is searched for, until three processes have died of it alone (attempts.py).

One watcher thread per process looks now and then at each watchdog that had a step when it last looked, or that has begun one
since.  To wake it for each step would cost more than the step; to look at idle watchdogs too would keep a processor busy in
processes with many engines.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kwflow.errors import StepTimeout

__all__ = ["Watchdog", "end_when_stuck"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_AGAIN_S = 1.0  # author code may swallow the exception in a loop: raise it again until the step ends
_LOOK_S = 1.0
_START_ME_AGAIN = 3  # exit code
_ends: list[bool] = []  # not empty in processes that are nothing but engines
_watched: set[Watchdog] = set()
_registering = threading.Lock()
_begins = threading.Event()  # set when a step has begun that the watcher does not know of
_watcher: list[threading.Thread] = []


class Watchdog:
    """Watches each step of one thread: `watchdog.run(id, step, ...)`.

    After `warn_ms` the log says where the step is.  At `abort_ms` StepTimeout is raised in it, and again at its end if author
    code swallowed it.
    """

    def __init__(self, warn_ms: int, abort_ms: int, on_log: Callable[[str], None]) -> None:
        self._warn_s, self._abort_s = warn_ms / 1000, abort_ms / 1000
        self._stuck_s = self._abort_s + max(2.0, self._abort_s / 2)  # must be well before the broker gives the partition to another engine
        self._on_log = on_log
        self._lock = threading.Lock()
        self._name = ""
        self._ident = 0
        self._begun = 0.0  # 0: no step runs; negative: one is about to run, and nothing may be raised in its thread yet
        self._warned = self._raised = 0.0
        self._watched = False
        self._look_at = 0.0
        self._look_s = min(_LOOK_S, self._warn_s / 4, self._abort_s / 4)

    def run(self, name: str, step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what `step` returns.  Raises StepTimeout if the step ran too long, even if it swallowed the exception."""
        self._name, self._ident = name, threading.get_ident()
        self._warned = self._raised = 0.0
        self._begun = begun = time.monotonic()
        if not self._watched:
            self._begun = -begun
            self._register()
            self._begun = begun
        try:
            try:
                made = step(*args, **kwargs)
            finally:
                self._end()
        except StepTimeout:
            self._end()  # the exception may have arrived before the first instruction of the call above
            if not self._raised:
                raise  # author code raised it itself
        if self._raised:
            raise StepTimeout(f"the step took more than {self._abort_s:g} s without reaching a wait (limit step_abort_ms); do long work in an activity, or raise the limit and retry")
        return made

    def _register(self) -> None:
        with _registering:
            self._look_at = time.monotonic() + self._look_s
            self._watched = True
            _watched.add(self)
            if not _watcher:
                _watcher.append(threading.Thread(target=_watch, name="kwflow-watchdog", daemon=True))
                _watcher[0].start()
        _begins.set()

    def _rests(self) -> bool:
        """Whether no step runs now.  If so, the next step registers itself."""
        self._watched = False  # before the look at _begun: a step that begins meanwhile is seen here, or sees this and registers
        self._watched = bool(self._begun)
        return not self._watched

    def _end(self) -> None:
        """End the watch over a step: once this has returned, nothing more is raised in this thread."""
        while True:
            try:
                with self._lock:
                    self._begun = 0.0
                    if not self._raised:
                        return
                    # An exception may still be pending.  It is not cleared, but set again and awaited: once cleared, CPython before 3.13
                    # checks for it at each jump and call from then on (loops take 1.4 times as long), and 3.11 hangs when traced.
                    if not _raise_in(self._ident):
                        return
                    while True:
                        pass
            except StepTimeout:
                if not self._begun:
                    return

    def look(self, now: float) -> None:
        """Warn, raise StepTimeout or end the process, depending on how long the step has been running."""
        begun = self._begun
        passed = now - begun
        if begun <= 0 or passed < min(self._warn_s, self._abort_s):
            return
        if passed >= self._warn_s and self._warned != begun:
            self._warned = begun
            self._on_log(f"{self._name}: its step has been running for {passed:.1f} s, now at {_where(self._ident)}; the rest of its partition waits: do long work in an activity, pause with kw.sleep")
        if passed >= self._abort_s and now - self._raised >= _AGAIN_S:
            with self._lock:
                if self._begun == begun:
                    self._raised = now
                    _raise_in(self._ident)
        if _ends and passed >= self._stuck_s and self._begun == begun:
            self._on_log(f"{self._name}: its step cannot be aborted, at {_where(self._ident)}; this process ends, and should be restarted")
            os._exit(_START_ME_AGAIN)


def end_when_stuck() -> None:
    """Let a step that cannot be ended end this process from now on, with exit code 3."""
    _ends.append(True)


def _raise_in(ident: int) -> bool:
    """Raise StepTimeout in a thread.  False if there is no such thread, as with gevent, which has thread numbers of its own."""
    return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(StepTimeout)))


def _watch() -> None:
    while True:
        now = time.monotonic()
        with _registering:
            due = [dog for dog in _watched if dog._look_at <= now]
            _watched.difference_update([dog for dog in due if dog._rests()])
        for dog in due:
            dog._look_at = now + dog._look_s
            dog.look(now)
        with _registering:
            wait = min((dog._look_at for dog in _watched), default=None)
        _begins.wait(None if wait is None else wait - now)
        _begins.clear()


def _forked() -> None:
    """Start afresh in a forked child: the watcher thread exists in the parent alone, and locks were copied in the state of that moment."""
    global _registering, _begins
    _registering, _begins = threading.Lock(), threading.Event()
    for dog in _watched:
        dog._watched = False
    _watched.clear()
    _watcher.clear()


os.register_at_fork(after_in_child=_forked)


def _where(ident: int) -> str:
    frame = sys._current_frames().get(ident)
    while frame is not None and "kwflow" in frame.f_globals.get("__name__", "").split(".")[:1]:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown line"
