"""The timer service on Kafka (SC-1..SC-9): `kwflow scheduler`, `python -m scheduler`, or beside an engine with `--with-scheduler`.

It runs no author code, and has its own consumer group and changelog.  It is exactly-once and restart-safe like an engine,
because it is one more processor on the same loop.
"""

from __future__ import annotations

from collections.abc import Callable

from kwflow.config import Config
from kwflow.runners.timers import TimerProcessor

__all__ = ["run", "service"]


def service(config: Config) -> tuple[str, Callable[[str], TimerProcessor]]:
    """Return its consumer group, and the factory of its processor for a runner."""
    return config.timers_group, lambda _incarnation: TimerProcessor(config)


def run(config: Config, until: Callable[[], bool], on_log: Callable[[str], None] = print) -> None:
    """Fire timers until `until()` is true, which is called after each batch.  Raises FencedError or TransportError if it has to be started again."""
    from kwflow.runners.kafka.runner import KafkaRunner

    name, make = service(config)
    KafkaRunner(config, make, name, on_log).run(until)
