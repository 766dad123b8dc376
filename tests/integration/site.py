"""One application on the broker as a user sees it: the command line, a plain producer, and a read_committed consumer."""

import os
import pathlib
import time
from collections.abc import Callable, Mapping

from confluent_kafka import Consumer, Producer, TopicPartition

from tests import commands
from tests.commands import Started
from tests.waiting import until

__all__ = ["ROOT", "SHOP", "TRIP", "Site", "answer", "refs"]

ROOT = pathlib.Path(__file__).parents[2]
TRIP = str(ROOT / "workflows/trip_booking.py")
SHOP = str(ROOT / "workflows/ecommerce.py")


class Site:
    """One application on the broker: its topics, its engines, and a reader that sees only committed records."""

    def __init__(
        self, broker: str, application: str, directory: pathlib.Path, partitions: int = 4, modules: tuple[str, ...] = (TRIP, SHOP), environment: Mapping[str, str] = {}
    ) -> None:  # fmt: skip
        self.broker = broker
        self.application = application
        self.directory = directory
        self.environment = {
            **os.environ,
            "KWFLOW_BOOTSTRAP_SERVERS": broker,
            "KWFLOW_APPLICATION_ID": application,
            "KWFLOW_STATE_DIR": str(directory / "state"),
            **{f"KWFLOW_{name.upper()}_TOPIC": self.topic(name) for name in ("resume", "result", "error", "scheduler")},
            **environment,
        }
        self.processes: list[Started] = []
        self.producer = Producer({"bootstrap.servers": broker, "log_level": 0})  # default settings: CRC32, so most ids go to another partition (K6)
        self.run("topics", "create", *modules, "--partitions", str(partitions))

    def topic(self, name: str) -> str:
        return f"{self.application}-{name}"

    def run(self, *arguments: str) -> str:
        done = commands.run(*arguments, environment=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str) -> str:
        return self.fails(2, *arguments)

    def fails(self, code: int, *arguments: str, typed: str = "") -> str:
        """Run a command that must end with this exit code; return its output."""
        done = commands.run(*arguments, environment=self.environment, typed=typed)
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + done.stderr

    def engine(self, name: str = "one", module: str = TRIP, scheduler: bool = True, *more: str) -> Started:
        return self.started(f"{name}.log", "engine", module, "--state-dir", str(self.directory / name), *(["--with-scheduler"] if scheduler else []), *more)

    def started(self, log: str, *arguments: str) -> Started:
        """Start a command that keeps running."""
        self.processes.append(commands.start(*arguments, log=self.directory / log, environment=self.environment))
        return self.processes[-1]

    def send(self, id: str | None, value: str | None) -> None:
        self.producer.produce(self.topic("resume"), value, id)
        assert self.producer.flush(20) == 0

    def read(self, topic: str, count: int, seconds: float = 60) -> list[tuple[str, str]]:
        """Read the first `count` committed records of a topic, from all partitions."""
        consumer = Consumer({"bootstrap.servers": self.broker, "group.id": "reader", "log_level": 0, "isolation.level": "read_committed", "auto.offset.reset": "earliest", "enable.auto.commit": False})
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        found: list[tuple[str, str]] = []
        deadline = time.monotonic() + seconds
        while len(found) < count and time.monotonic() < deadline:
            for message in consumer.consume(100, 0.2):
                if message.error() is None:
                    found.append(((message.key() or b"").decode(), (message.value() or b"null").decode()))
        consumer.close()
        assert len(found) >= count, f"{topic}: {found}\n{self.logged()}"
        return found

    def until(self, found: Callable[[], object], seconds: float = 60) -> None:
        until(found, seconds, self.logged)

    def logged(self) -> str:
        """What its processes said last."""
        return "\n".join(path.read_text()[-2000:] for path in self.directory.glob("*.log"))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def refs(site: Site, ids: list[str], once: bool = True) -> dict[str, dict[str, str]]:
    """id -> kind -> the ref that each saga asked with.  All tests share the sample's topics, so reading continues until all ids are there."""
    asked: dict[str, dict[str, str]] = {}
    for kind in ("car", "hotel", "flight"):
        seen: list[tuple[str, str]] = []
        while not set(ids) <= {id for id, _ in seen}:
            seen = site.read(f"saga-reserve-{kind}", len(seen) + 1)
        assert not once or sorted(id for id, _ in seen if id in ids) == sorted(ids), "each is asked for once"
        asked[kind] = dict(seen)
    return {id: {kind: asked[kind][id] for kind in asked} for id in ids}


def answer(site: Site, id: str, ref: str) -> None:
    site.send(id, f'{{"ref": "{ref}", "value": "ok"}}')
