"""What every command that runs until it is told to stop begins with: signals, and waiting for the broker and the topics."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import typer

from kwflow import api
from kwflow.config import Config
from kwflow.errors import TransportError, UsageError
from kwflow.runners.logs import Line
from kwflow.runners.stats import Stats
from kwflow.runners.supervise import supervise

__all__ = ["begin_processes", "end_if_late", "signals", "stopper", "wait_for_topics", "without_extra"]

_START_ME_AGAIN = 3
_COMMIT_S = 90  # beside what else a turn may take: a transaction is asked for thirty seconds, and its abort, too


def without_extra(command: str, packages: Sequence[str], error: ModuleNotFoundError) -> Exception:
    """What is to be raised where a command, which has an extra of its name, found one of these packages missing; the error itself, if it is another one."""
    missing = (error.name or "").partition(".")[0]
    return UsageError(f"kwflow {command} needs {missing}: pip install 'kwflow[{command}]'") if missing in packages else error


def stopper() -> Callable[[], bool]:
    """Flag-only signal handlers: the batch is finished whole; a second signal ends at once (semantics §2.5)."""
    asked = signals(lambda number: os._exit(128 + number))
    return lambda: asked() > 0


def signals(on_second: Callable[[int], None]) -> Callable[[], int]:
    """Count the signals to stop."""
    asked: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if asked:
            on_second(number)
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return lambda: len(asked)


def begin_processes(settings: Config, processes: int, log: Callable[[str], None]) -> None:
    """Run so many of this command, each of them started again when it dies, and end with them; nothing for one alone, or in one of them."""
    if processes > 1 and settings.supervisor_pid is None:
        raise typer.Exit(supervise([sys.executable, "-P", "-m", "kwflow", *sys.argv[1:]], processes, signals(lambda _: None), log))


def wait_for_topics(
    settings: Config, log: Callable[[str], None], groups: list[str], modules: Sequence[str], stop: Callable[[], bool] = lambda: False, declared: Iterable[str] | None = None
) -> None:  # fmt: skip
    """Raises TransportError when broker or topics (`declared`: default those of the modules) are not as they must be for these groups, after `wait_for_broker_s`; not if it is to stop."""
    from kwflow.runners.kafka import topics

    give_up, said = time.monotonic() + settings.wait_for_broker_s, ""
    while True:
        try:
            found = topics.problems(topics.admin(settings), settings, api.declared_topics() if declared is None else declared, groups)
            if not found:
                return
            remedy = f" (create what is missing with {' '.join(['kwflow topics create', *modules])})" if any(problem.endswith("is missing") for problem in found) else ""
            problem = TransportError("; ".join(found) + remedy, retryable=False)
        except TransportError as error:
            problem = error
        if stop():
            return
        if time.monotonic() >= give_up:
            raise problem
        if str(problem) != said:
            said = str(problem)
            log(Line.of(f"waiting: {said}", "warning"))
        time.sleep(0.5)


class Late(Protocol):
    """A loop over Kafka's client, as far as another thread looks after it."""

    @property
    def stats(self) -> Stats: ...

    def ends_in_a_call(self) -> None:
        """This process is ended because a call of the client does not return, which is no record's fault (K19)."""


def end_if_late(loops: Sequence[Late], turn_s: float, log: Callable[[str], None]) -> None:
    """End this process, to be started again, if one of them does not come back from a call; `turn_s` is what a turn may take beside transactions."""
    if any(loop.stats.is_late(time.monotonic(), turn_s + _COMMIT_S) for loop in loops):
        log(Line.of("a call of the Kafka client does not return; this process ends, and should be restarted", "error"))
        try:
            for loop in loops:
                if loop.stats.back_by_s:
                    loop.ends_in_a_call()
        finally:  # with this exit code, whatever could not be noted: no supervisor restarts it after another one
            os._exit(_START_ME_AGAIN)
