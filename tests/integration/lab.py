"""Kafka runners in the test's own process, which the test moves turn by turn, against a real broker."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

from confluent_kafka import Producer

from kwflow import api, durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor

SOURCE = """
import kwflow as kw
kw.declare_topics("trap-out")

def main(opts):
    value = yield kw.suspend("r")
    kw.output(str(value), "trap-out")
    yield kw.suspend("end")
"""


class Handle:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.ms = time.time_ns() // 1_000_000

    def now_ms(self) -> int:
        return self.ms


class Lab:
    """Runners of one application in this process, moved turn by turn; the group evicts them after a second without a poll."""

    def __init__(self, broker: str, application: str, directory: pathlib.Path) -> None:
        self.directory = directory
        self.clock = Handle()
        self.base: dict[str, Any] = {
            "application_id": application, "bootstrap_servers": broker, "kafka": {"session.timeout.ms": 1000, "max.poll.interval.ms": 1000, "heartbeat.interval.ms": 200},
            **{f"{name}_topic": f"{application}-{name}" for name in ("resume", "result", "error", "scheduler")},
        }  # fmt: skip
        self.module = durable.load_source("trap_workflows", SOURCE, "trap_workflows.py")
        topics.create(topics.admin(self.config("any")), self.config("any"), api.declared_topics(), 1, 1)
        self.runners: list[KafkaRunner] = []
        self.producer = Producer({"bootstrap.servers": broker, "log_level": 0})

    def config(self, name: str, **more: Any) -> Config:
        return Config(**self.base, state_dir=self.directory / name, **more)

    def engine(self, name: str, **more: Any) -> KafkaRunner:
        config = self.config(name, **more)
        workflows, topics = Workflows({"main": self.module.main}, "main"), api.declared_topics()
        return self._made(KafkaRunner(config, lambda incarnation: WorkflowProcessor(config, workflows, topics, incarnation), config.application_id, clock=self.clock, outputs=topics))

    def scheduler(self, name: str) -> KafkaRunner:
        config = self.config(name)
        return self._made(KafkaRunner(config, lambda _: TimerProcessor(config), f"{config.application_id}-scheduler", clock=self.clock))

    def _made(self, runner: KafkaRunner) -> KafkaRunner:
        self.runners.append(runner)
        return runner

    def send(self, name: str, key: str, value: str) -> None:
        self.producer.produce(self.base[f"{name}_topic"], value, key)
        assert self.producer.flush(10) == 0

    def written(self, topic: str, key: str) -> list[str]:
        records = kafka_link.read(self.config("any"), topic)
        return [(record.value or b"").decode() for record in records if record.key == key.encode()]


def turn(runner: KafkaRunner, until: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline, "it did not happen within 60 s"
        runner.turn()


def stop(runner: KafkaRunner) -> None:
    """Stop a runner as a kill would: nothing is finished, but its files are released."""
    runner.close()
