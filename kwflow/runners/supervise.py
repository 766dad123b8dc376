"""One process per core: N engines of one application on this machine, each started again when it dies.

Each is the same command with its number in the environment (K1: own identity, own state directory); they share nothing
but the broker.  A process that was killed or asks for it (exit code 3) comes back, the first time at once, then ever
later up to half a minute; one that says that its start can never work (1, 2) ends all.  It must not know Kafka.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

__all__ = ["orphaned", "supervise"]

_LOOK_S = 0.1
_BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_STEADY_S = 60  # one that ran for this long had started well: its next death is a first one again
_HOPELESS = (1, 2)
NUMBER, PARENT = "KWFLOW_PROCESS", "KWFLOW_SUPERVISOR_PID"


class _Child:
    """One numbered process.  Invariant: `process` is None only while it waits for `again_at`."""

    def __init__(self, number: int, command: Sequence[str], on_log: Callable[[str], None]) -> None:
        self.number = number
        self._command = command
        self._on_log = on_log
        self._deaths = 0
        self._started = 0.0
        self.again_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """In a session of its own: Ctrl-C on the terminal is the supervisor's to pass on, once."""
        environment = {**os.environ, NUMBER: str(self.number), PARENT: str(os.getpid())}
        self._started = time.monotonic()
        self.process = subprocess.Popen(self._command, env=environment, start_new_session=True)

    def look(self) -> int | None:
        """Start it again when it is time; the exit code of one that is not to be started again."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.again_at:
                try:
                    self.start()
                except OSError as error:  # no memory for one process more, say: the others go on
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
        self._on_log(f"process {self.number} {how}; it is started again {f'in {delay:g} s' if delay else 'at once'}")

    def end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def supervise(command: Sequence[str], count: int, asked: Callable[[], int], on_log: Callable[[str], None]) -> int:
    """Run `count` numbered copies until `asked()` is not 0 or one cannot work; the exit code.

    `asked` counts the signals to stop: at the first all end cleanly, at the second at once.  0 if every process ended well
    after that, else the code of one that did not.
    """
    children = [_Child(number, command, on_log) for number in range(count)]
    for child in children:
        child.start()
    hopeless: int | None = None
    while not asked() and hopeless is None:
        for child in children:
            code = child.look()
            if code is not None:
                on_log(f"process {child.number} ended with {code}: starting it again would not help; all end")
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
    """Whether the supervisor of this process is gone, so that nobody would end it."""
    return supervisor_pid is not None and os.getppid() != supervisor_pid
