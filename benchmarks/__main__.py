"""Figures of durable generators, the embedded engine and, where a broker is, the Kafka engine."""

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from rich.console import Console
from rich.table import Table
from rocksdict import Options, Rdict, WriteBatch, WriteOptions

from benchmarks import activities
from kwflow import api, durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.core.wire import Output
from kwflow.runners import topics
from kwflow.runners.embedded import Embedded
from kwflow.runners.kafka import KafkaRunner
from kwflow.runners.loop import TimerProcessor, WorkflowProcessor

SOURCE = """
import kwflow as kw
kw.declare_topics("bench-out")

def main(opts):
    n = 0
    while True:
        value = yield kw.suspend("r")
        n += 1
        kw.output(str(value), "bench-out")

def loop(n):
    for i in range(n):
        if i % 2:
            yield i
        else:
            yield -i
"""
INSTANCES = 500
STEPS = int(os.environ.get("KWFLOW_BENCH_STEPS", "10000"))
figures: dict[str, float] = {}


def timed(work: Callable[[], Any], repeat: int = 3) -> float:
    """Seconds of the best of some runs."""
    best = float("inf")
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def generators(module: Any) -> None:
    native: dict[str, Any] = {}
    exec(SOURCE.replace("import kwflow as kw", "").replace('kw.declare_topics("bench-out")', ""), native)
    hot = timed(lambda: sum(1 for _ in module.loop(300_000)))
    bare = timed(lambda: sum(1 for _ in native["loop"](300_000)))
    figures["hot twin / native generator"] = hot / bare
    gen = module.loop(10)
    next(gen)
    data = durable.dumps(gen)
    values = {"n": 10, "i": 0, "it": iter(range(10))}
    plain = pickle.dumps(values, 5)
    many = range(5000)
    figures["save / pickle of its locals"] = timed(lambda: [durable.dumps(gen) for _ in many]) / timed(lambda: [pickle.dumps(values, 5) for _ in many])
    figures["restore / unpickle of its locals"] = timed(lambda: [durable.loads(data) for _ in many]) / timed(lambda: [pickle.loads(plain) for _ in many])


def embedded(module: Any, directory: pathlib.Path) -> int:
    held = Embedded(directory)
    config = Config()
    processors = [WorkflowProcessor(config, Workflows({"main": module.main}, "main"), api.declared_topics(), held.incarnation), TimerProcessor(config)]
    start(lambda key, value: held.append(config.resume_topic, key, value), held)
    while held.step(processors):
        pass
    size = len(held.db.get(b"S" + config.changelog_topic.encode() + b"\0i0") or b"")
    commits: list[float] = []
    begun = time.perf_counter()
    while True:
        one = time.perf_counter()
        if not held.step(processors):
            break
        commits.append(time.perf_counter() - one)
        if held.position(config.resume_topic) == INSTANCES:
            begun = time.perf_counter()
    resume(lambda key, value: held.append(config.resume_topic, key, value), held)
    begun = time.perf_counter()
    while True:
        one = time.perf_counter()
        if not held.step(processors):
            break
        commits.append(time.perf_counter() - one)
    seconds = time.perf_counter() - begun
    held.close()
    figures["embedded steps/s"] = STEPS / seconds
    percentiles("embedded batch of 500", commits)
    return size


def start(send: Callable[[bytes, bytes], Any], held: Embedded | None = None) -> None:
    if held is not None:
        bulk(held, [(b"i%d" % n, b"new:{}") for n in range(INSTANCES)])
        return
    for n in range(INSTANCES):
        send(b"i%d" % n, b"new:{}")


def resume(send: Callable[[bytes, bytes], Any], held: Embedded | None = None) -> None:
    records = [(b"i%d" % (n % INSTANCES), b'{"ref":"r","value":%d}' % n) for n in range(STEPS)]
    if held is not None:
        bulk(held, records)
        return
    for key, value in records:
        send(key, value)


def bulk(held: Embedded, records: list[tuple[bytes, bytes]]) -> None:
    batch = WriteBatch(raw_mode=True)
    ends: dict[str, int] = {}
    for key, value in records:
        held._put(batch, ends, Output("workflow-resume", key, value))
    held.db.write(batch)


def bare_rocksdb(directory: pathlib.Path, size: int) -> None:
    """The same reads and writes in the same batches, with nothing in between."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    db = Rdict(str(directory), options)
    sync = WriteOptions()
    sync.sync = True
    state = os.urandom(size)
    begun = time.perf_counter()
    for first in range(0, STEPS, 500):
        batch = WriteBatch(raw_mode=True)
        for n in range(first, first + 500):
            db.get(b"S%d" % (n % INSTANCES))
            batch.put(b"L%020d" % n, state[:120])
        for n in range(min(500, INSTANCES)):
            batch.put(b"S%d" % n, state)
        batch.put(b"P", b"%d" % first)
        db.write(batch, sync)
    figures["bare RocksDB loop steps/s"] = STEPS / (time.perf_counter() - begun)
    figures["embedded / bare"] = figures["embedded steps/s"] / figures["bare RocksDB loop steps/s"]
    db.close()


def percentiles(name: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    figures[f"{name}, ms p50"] = 1000 * ordered[len(ordered) // 2]
    figures[f"{name}, ms p99"] = 1000 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def kafka(module: Any, bootstrap: str, directory: pathlib.Path, size: int) -> None:
    application = f"bench-{uuid.uuid4().hex[:6]}"
    config = Config(
        application_id=application, bootstrap_servers=bootstrap, state_dir=directory,
        resume_topic=f"{application}-resume", result_topic=f"{application}-result", error_topic=f"{application}-error", scheduler_topic=f"{application}-scheduler",
    )  # fmt: skip
    topics.create(topics.admin(config), config, api.declared_topics(), 4, 1)
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 50})

    def send(key: bytes, value: bytes) -> None:
        producer.produce(config.resume_topic, value, key)
        producer.poll(0)

    start(send)
    producer.flush()
    runner = KafkaRunner(config, lambda incarnation: WorkflowProcessor(config, Workflows({"main": module.main}, "main"), api.declared_topics(), incarnation), application, lambda _: None)
    done = threading.Event()
    thread = threading.Thread(target=lambda: runner.run(done.is_set))
    thread.start()
    reader = Reader(bootstrap, "bench-out")
    reader.drain()
    resume(send)
    begun = time.perf_counter()
    producer.flush()
    reader.until(STEPS)
    figures["Kafka steps/s"] = STEPS / (time.perf_counter() - begun)
    trips = []
    for n in range(100):
        one = time.perf_counter()
        send(b"i0", b'{"ref":"r","value":%d}' % n)
        producer.flush()
        reader.until(1)
        trips.append(time.perf_counter() - one)
    percentiles("Kafka round trip", trips)
    percentiles("Kafka commit of one record", list(runner.commit_s)[-100:])
    percentiles("Kafka commit under load", list(runner.commit_s)[1:-100])
    done.set()
    thread.join()
    bare_kafka(bootstrap, config, size)


class Reader:
    """Counts committed records of a topic from its end on."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench-reader", "isolation.level": "read_committed", "fetch.wait.max.ms": 10})
        partitions = self.consumer.list_topics(topic, timeout=10).topics[topic].partitions
        ends = [TopicPartition(topic, p, self.consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[1]) for p in partitions]
        self.consumer.assign(ends)

    def drain(self) -> None:
        while self.consumer.consume(1000, 1.0):
            continue

    def until(self, count: int) -> None:
        while count > 0:
            message = self.consumer.poll(60)
            if message is None:
                raise RuntimeError("nothing came within 60 s")
            count -= message.error() is None
            count -= sum(m.error() is None for m in self.consumer.consume(min(1000, count), 0)) if count > 0 else 0


def bare_kafka(bootstrap: str, config: Config, size: int) -> None:
    """Gather, produce one output and one state record for each, commit: the loop with no engine in it."""
    settings = {"group.id": f"{config.application_id}-bare", "isolation.level": "read_committed", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    consumer = Consumer({"bootstrap.servers": bootstrap, **settings})
    consumer.subscribe([config.resume_topic])
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": f"{config.application_id}-bare", "linger.ms": 100, "retry.backoff.ms": 1, "retry.backoff.max.ms": 100})
    producer.init_transactions(10)
    state = os.urandom(size)
    total, begun = 0, 0.0
    while total < STEPS:
        first = consumer.poll(1)
        if first is None:
            continue
        begun = begun or time.perf_counter()
        messages = [m for m in [first, *consumer.consume(499, 0)] if m.error() is None]
        producer.begin_transaction()
        positions: dict[int, int] = {}
        for message in messages:
            producer.produce("bench-out", message.value(), message.key())
            positions[message.partition() or 0] = (message.offset() or 0) + 1
        for key, partition in {message.key(): message.partition() for message in messages}.items():
            producer.produce(config.changelog_topic, state, key, partition=partition or 0)
        producer.send_offsets_to_transaction([TopicPartition(config.resume_topic, p, o) for p, o in positions.items()], consumer.consumer_group_metadata())
        producer.commit_transaction()
        total += len(messages)
    figures["bare Kafka loop steps/s"] = total / (time.perf_counter() - begun)
    figures["Kafka / bare"] = figures["Kafka steps/s"] / figures["bare Kafka loop steps/s"]
    consumer.close()


def lateness(module: Any, directory: pathlib.Path) -> None:
    """How late timers fire on an idle engine."""
    held = Embedded(directory)
    config = Config()
    timers = TimerProcessor(config)
    late: list[float] = []
    for n in range(20):
        held.append(config.scheduler_topic, b"t|%d" % n, b"%d" % (50 + 37 * n))
    held.run([timers], lambda: held.end(config.resume_topic) >= 20)
    asked = held.read(config.scheduler_topic)
    for record in held.read(config.resume_topic):
        n = int(record.value or b"0")
        late.append((record.timestamp_ms - asked[n].timestamp_ms - (50 + 37 * n)) / 1000)
    percentiles("timer lateness", late)
    held.close()


@contextlib.contextmanager
def broker(directory: pathlib.Path) -> Iterator[str | None]:
    """A Kafka that is there already, or one from Maven's jars; None where there is neither."""
    given = os.environ.get("KWFLOW_TEST_BOOTSTRAP")
    if given or not (shutil.which("java") and shutil.which("mvn")):
        yield given
        return
    from tests.integration.broker import Broker

    started = Broker(directory / "broker")
    started.start()
    yield started.bootstrap
    started.kill()


def main() -> None:
    module = durable.load_source("bench_workflows", SOURCE, "bench_workflows.py")
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        generators(module)
        size = embedded(module, directory / "embedded")
        figures["snapshot bytes"] = size
        bare_rocksdb(directory / "bare", size)
        lateness(module, directory / "timers")
        activities.embedded(directory / "activities", figures)
        with broker(directory) as bootstrap:
            if bootstrap:
                kafka(module, bootstrap, directory / "kafka", size)
                activities.kafka(bootstrap, directory / "kafka-activities", figures)
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}" if value < 100 else f"{value:,.0f}")
    console = Console()
    console.print(table)
    if not bootstrap:
        console.print("Kafka was not measured: it needs KWFLOW_TEST_BOOTSTRAP=host:port, or Java 17 and Maven")
    pathlib.Path("bench-results.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
