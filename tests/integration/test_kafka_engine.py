"""The trip saga on a real broker, the engine as a process through its command line (T-KW-2..5, G1, G2, G6, K5, K6)."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

ROOT = pathlib.Path(__file__).parents[2]
TRIP = str(ROOT / "workflows/trip_booking.py")
pytestmark = [pytest.mark.broker, pytest.mark.slow]


class Site:
    """One application on the broker: its topics, engines, and a reader that sees committed records only."""

    def __init__(self, broker: str, application: str, directory: pathlib.Path) -> None:
        self.broker = broker
        self.application = application
        self.directory = directory
        self.environment = {
            **os.environ,
            "KWFLOW_BOOTSTRAP_SERVERS": broker,
            "KWFLOW_APPLICATION_ID": application,
            **{f"KWFLOW_{name.upper()}_TOPIC": self.topic(name) for name in ("resume", "result", "error", "scheduler")},
        }
        self.processes: list[subprocess.Popen[str]] = []
        self.producer = Producer({"bootstrap.servers": broker})  # default settings: CRC32, so most ids land elsewhere (K6)
        self.run("topics", "create", TRIP, "--partitions", "4")

    def topic(self, name: str) -> str:
        return f"{self.application}-{name}"

    def run(self, *arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "kwflow.cli", *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def engine(self, name: str = "one", module: str = TRIP) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "kwflow.cli", "engine", module, "--with-scheduler", "--state-dir", str(self.directory / name)]
        log = open(self.directory / f"{name}.log", "a")
        process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stderr=log, text=True)
        self.processes.append(process)
        return process

    def send(self, id: str | None, value: str | None) -> None:
        self.producer.produce(self.topic("resume"), value, id)
        assert self.producer.flush(20) == 0

    def read(self, topic: str, count: int, seconds: float = 60) -> list[tuple[str, str]]:
        """The first `count` committed records of a topic, all partitions."""
        consumer = Consumer({"bootstrap.servers": self.broker, "group.id": "reader", "isolation.level": "read_committed", "auto.offset.reset": "earliest", "enable.auto.commit": False})
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        found: list[tuple[str, str]] = []
        deadline = time.monotonic() + seconds
        while len(found) < count and time.monotonic() < deadline:
            for message in consumer.consume(100, 0.2):
                if message.error() is None:
                    found.append(((message.key() or b"").decode(), (message.value() or b"null").decode()))
        consumer.close()
        logs = "".join(path.read_text()[-2000:] for path in self.directory.glob("*.log"))
        assert len(found) >= count, f"{topic}: {found}\n{logs}"
        return found


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    yield site
    for process in site.processes:
        process.kill()
        process.wait()


def refs(site: Site, ids: list[str]) -> dict[str, dict[str, str]]:
    """What each saga asked for; the topics of the sample are shared by all tests, so reading goes on until all ids are there."""
    asked: dict[str, dict[str, str]] = {}
    for kind in ("car", "hotel", "flight"):
        seen: list[tuple[str, str]] = []
        while not set(ids) <= {id for id, _ in seen}:
            seen = site.read(f"saga-reserve-{kind}", len(seen) + 1)
        assert sorted(id for id, _ in seen if id in ids) == sorted(ids), "each is asked for once"
        asked[kind] = dict(seen)
    return {id: {kind: asked[kind][id] for kind in asked} for id in ids}


def answer(site: Site, id: str, ref: str) -> None:
    site.send(id, f'{{"ref": "{ref}", "value": "ok"}}')


def test_many_sagas_survive_kill_9_and_a_deleted_state_directory(site: Site) -> None:
    """G1, G6, K5, K6: four partitions, a producer with default settings, bad records in between."""
    ids = [f"{site.application}-{number}" for number in range(12)]
    engine = site.engine()
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    site.send(ids[0], "{not json")
    site.send(None, "{}")
    asked = refs(site, ids)
    for id in ids:
        answer(site, id, asked[id]["car"])
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    shutil.rmtree(site.directory / "one")
    for id in ids:
        answer(site, id, asked[id]["hotel"])
    site.engine("two")
    for id in ids:
        answer(site, id, asked[id]["flight"])
    results = site.read(site.topic("result"), len(ids))
    assert sorted(key for key, _ in results) == sorted(ids)
    for id, value in results:
        assert all(f'"{asked[id][kind]}"' in value for kind in ("car", "hotel", "flight"))
    assert len(site.read(f"{site.application}-dead-letter", 2)) == 2


def test_a_second_engine_takes_over_and_sigterm_ends_with_0(site: Site) -> None:
    """G6, K7."""
    ids = [f"{site.application}-{number}" for number in range(4)]
    first = site.engine("one")
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids)
    site.engine("two")
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    for id in ids:
        for kind in ("hotel", "car", "flight"):
            answer(site, id, asked[id][kind])
    site.read(site.topic("result"), len(ids))
    site.send(ids[0], '{"ref": "nobody"}')  # one more committed step on each engine before the last look
    assert sorted(id for id, _ in site.read(site.topic("result"), len(ids))) == sorted(ids)


def test_a_timer_fires_on_kafka_and_the_saga_is_undone(site: Site) -> None:
    """SC-1, T-KW-5."""
    site.engine()
    site.send(f"{site.application}-t", 'new:{"timeout": 1500}')
    assert site.read(site.topic("error"), 1)[0] == (f"{site.application}-t", '"timeout"')


def test_a_frozen_engine_whose_partitions_moved_writes_nothing_when_it_wakes(site: Site) -> None:
    """K2, K7, G6: trap 1, frozen."""
    ids = [f"{site.application}-{number}" for number in range(4)]
    first = site.engine("one")
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids)
    first.send_signal(signal.SIGSTOP)
    for id in ids:
        answer(site, id, asked[id]["car"])
    site.engine("two")
    for id in ids:
        answer(site, id, asked[id]["hotel"])
        answer(site, id, asked[id]["flight"])
    site.read(site.topic("result"), len(ids))
    first.send_signal(signal.SIGCONT)
    late = f"{site.application}-late"
    site.send(late, 'new:{"timeout": 1}')  # ends in an error record, written by whoever owns its partition now
    site.read(site.topic("error"), 1)
    assert sorted(id for id, _ in site.read(site.topic("result"), len(ids))) == sorted(ids)


LARGE = """
import kwflow as kw
kw.declare_topics("saga-reserve-car")

def main(opts):
    kw.output("small", "saga-reserve-car")
    kw.output("x" * opts["bytes"], "saga-reserve-car")
    return opts["bytes"]
    yield
"""


def test_an_output_larger_than_the_broker_takes_parks_its_instance_and_no_innocent_one(site: Site) -> None:
    """K11, K15, G4: traps 3 and 4."""
    module = site.directory / "large.py"
    module.write_text(LARGE)
    ids = [f"{site.application}-{number}" for number in range(9)]
    for number, id in enumerate(ids):
        site.send(id, f'new:{{"bytes": {3_000_000 if number == 4 else 10}}}')
    site.engine("one", str(module))
    results = site.read(site.topic("result"), len(ids) - 1)
    assert sorted(id for id, _ in results) == sorted(set(ids) - {ids[4]})
    assert site.read(f"{site.application}-dead-letter", 1)[0][0] == ids[4]
    mine = [id for id, value in site.read("saga-reserve-car", 2 * len(ids) - 2) if id == ids[4]]
    assert mine == [], "nothing of the refused step is visible"
    site.send(ids[4], '{"ref": "held"}')
    again = f"{site.application}-after"
    site.send(again, 'new:{"bytes": 10}')
    assert again in {id for id, _ in site.read(site.topic("result"), len(ids))}
