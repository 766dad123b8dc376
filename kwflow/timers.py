"""The timer service on Kafka (SC-1..SC-9): `kwflow scheduler`, `python -m scheduler`, or beside an engine with `--with-scheduler`.

It runs no code of yours, has a consumer group and a changelog of its own, and is exactly-once and restart-safe like an
engine, because it is one more processor on the same loop.
"""

from __future__ import annotations

from collections.abc import Callable

from kwflow.config import Config
from kwflow.runners.timers import TimerProcessor

__all__ = ["run", "service"]


def service(config: Config) -> tuple[str, Callable[[str], TimerProcessor]]:
    """Its consumer group, and what makes its processor for a runner."""
    return config.timers_group, lambda _incarnation: TimerProcessor(config)


def run(config: Config, until: Callable[[], bool], on_log: Callable[[str], None] = print) -> None:
    """Fire timers until `until()`, asked after each batch.  Raises FencedError or TransportError when it has to be started again."""
    from kwflow.runners.kafka.runner import KafkaRunner

    name, make = service(config)
    KafkaRunner(config, make, name, on_log).run(until)
