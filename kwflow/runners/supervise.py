"""One process per core: N engines of one application on this machine, each restarted when it dies.

Each is the same command with its number in the environment (K1: own identity, own state directory); they share nothing
but the broker.  A process that was killed, or that asks for a restart (exit code 3), is restarted: the first time at once,
then after growing delays of up to half a minute.  A process whose exit code says that it can never start (1, 2) ends all of
them.  This module must not know Kafka.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from kwflow.runners.logs import Line

__all__ = ["orphaned", "supervise"]

_LOOK_S = 0.1
_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_STEADY_S = 60  # a process that ran for this long had started well: its next death counts as the first
_HOPELESS = (1, 2)
NUMBER, PARENT = "KWFLOW_PROCESS", "KWFLOW_SUPERVISOR_PID"


class _Child:
    """One numbered process.  Invariant: `process` is None only before the first start, and while it waits for `again_at`."""

    def __init__(self, number: int, command: Sequence[str], on_log: Callable[[str], None]) -> None:
        self.number = number
        self._command = command
        self._on_log = on_log
        self._deaths = 0
        self._started = 0.0
        self.again_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process in a session of its own: Ctrl-C on the terminal reaches the supervisor alone, which passes it on once."""
        environment = {**os.environ, NUMBER: str(self.number), PARENT: str(os.getpid())}
        self._started = time.monotonic()
        self.process = subprocess.Popen(self._command, env=environment, start_new_session=True)

    def look(self) -> int | None:
        """Restart the process when it is time.  Returns its exit code if it must not be restarted, else None."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.again_at:
                try:
                    self.start()
                except OSError as error:  # such as too little memory for one more process; the others go on
                    self._later(now, f"cannot be started: {error.strerror}")
            return None
        code = self.process.poll()
        if code is None or code in _HOPELESS:
            return code
        self._deaths = 0 if now - self._started > _STEADY_S else self._deaths
        self.process = None
        self._later(now, f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}")
        return None

    def _later(self, now: float, how: str) -> None:
        delay = _BACKOFF_S[min(self._deaths, len(_BACKOFF_S) - 1)]
        self._deaths += 1
        self.again_at = now + delay
        self._on_log(Line.of(f"process {self.number} {how}; restarting {f'in {delay:g} s' if delay else 'at once'}", "warning"))

    def end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def supervise(command: Sequence[str], count: int, asked: Callable[[], int], on_log: Callable[[str], None]) -> int:
    """Run `count` numbered copies until `asked()` is not 0 or one of them can never work; return the exit code.

    `asked` counts the signals to stop: after the first all processes end cleanly, after the second they are killed.  The code
    is 0 if every process ended well, else that of one that did not.
    """
    children = [_Child(number, command, on_log) for number in range(count)]
    for child in children:
        child.start()
    hopeless: int | None = None
    while not asked() and hopeless is None:
        for child in children:
            code = child.look()
            if code is not None:
                on_log(Line.of(f"process {child.number} ended with {code}: restarting would not help; all processes end", "error"))
                hopeless = code
        time.sleep(_LOOK_S)
    for child in children:
        child.end(signal.SIGTERM)
    killed = False
    while any(child.process is not None and child.process.poll() is None for child in children):
        if asked() > 1 and not killed:
            killed = True
            for child in children:
                child.end(signal.SIGKILL)
        time.sleep(_LOOK_S)
    codes = [child.process.returncode for child in children if child.process is not None]
    bad = [code if code > 0 else 128 - code for code in codes if code]
    return hopeless if hopeless is not None else bad[0] if bad else 0


def orphaned(supervisor_pid: int | None) -> bool:
    """Whether the supervisor of this process is gone, so that nobody else would end this process."""
    return supervisor_pid is not None and os.getppid() != supervisor_pid
