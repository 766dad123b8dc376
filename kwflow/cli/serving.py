"""What every command that runs until it is told to stop begins with: signals, and waiting for the broker and the topics."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence

from kwflow import api
from kwflow.config import Config
from kwflow.errors import TransportError
from kwflow.runners.logs import Line

__all__ = ["signals", "stopper", "wait_for_topics"]


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


def wait_for_topics(
    settings: Config, log: Callable[[str], None], groups: list[str], modules: Sequence[str], stop: Callable[[], bool] = lambda: False, declared: Iterable[str] | None = None
) -> None:  # fmt: skip
    """Raises TransportError when broker or topics (`declared`: default those of the modules) are not as they must be for these groups, after `wait_for_broker_s`; not if it is to stop."""
    from kwflow.runners import topics

    give_up, said = time.monotonic() + settings.wait_for_broker_s, ""
    while True:
        try:
            found = topics.problems(topics.admin(settings), settings, api.declared_topics() if declared is None else declared, groups)
            if not found:
                return
            remedy = f" ({' '.join(['kwflow topics create', *modules])} makes what is missing)" if any(problem.endswith("is missing") for problem in found) else ""
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
