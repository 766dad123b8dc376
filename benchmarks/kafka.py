"""The Kafka engine compared with the same loop without an engine: each in a process of its own, with as many partitions and bytes, in turns.

The engine is `kwflow engine`, as a user starts it.  Rates are measured from a tenth of a backlog to its end, so that the start
does not count; CPU is what the kernel says the process used meanwhile, including librdkafka's threads.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from benchmarks.common import INSTANCES, SOURCE, STEPS, broker, figure, percentiles
from kwflow import api
from kwflow.config import Config
from kwflow.runners.kafka import topics

PARTITIONS = 4
OUT = "bench-out"
TRIPS = 300
ECHO_S = 10
SNAPSHOT_BYTES = 681  # as the embedded group prints it for this workflow


class Lab:
    """One application with its topics, and an output topic and a changelog for the loop without an engine."""

    def __init__(self, bootstrap: str, directory: pathlib.Path) -> None:
        name = f"bench-{uuid.uuid4().hex[:6]}"
        self.directory = directory
        directory.mkdir()
        (directory / "bench_workflows.py").write_text(SOURCE)
        self.config = Config(
            application_id=name, bootstrap_servers=bootstrap, state_dir=directory / "state",
            resume_topic=f"{name}-resume", result_topic=f"{name}-result", error_topic=f"{name}-error", scheduler_topic=f"{name}-scheduler",
        )  # fmt: skip
        self.bare = f"{name}-bare"
        api.declare_topics(OUT)
        admin = topics.admin(self.config)
        topics.create(admin, self.config, {OUT, f"{self.bare}-out", f"{self.bare}-state"}, PARTITIONS, 1)
        Reader(bootstrap, f"{self.bare}-out").consumer.close()  # waits until every partition is led
        self.producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 5, "log_level": 0})

    @contextlib.contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        names = ("application_id", "bootstrap_servers", "resume_topic", "result_topic", "error_topic", "scheduler_topic")
        environment = {**os.environ, **{f"KWFLOW_{name.upper()}": getattr(self.config, name) for name in names}}
        environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen([sys.executable, *command], cwd=self.directory, env=environment, stderr=log)
            try:
                yield process
            finally:
                process.terminate()
                process.wait(60)

    def engine(self, *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return self.running("-m", "kwflow", "engine", "bench_workflows.py", "--state-dir", str(self.config.state_dir), *options)

    def loop(self, size: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return self.running("-m", "benchmarks.kafka_bare", self.config.bootstrap_servers, self.config.resume_topic, self.bare, str(size))

    def send(self, count: int, value: bytes | None = None) -> None:
        for n in range(count):
            while True:
                try:
                    self.producer.produce(self.config.resume_topic, value or b'{"ref":"r","value":%d}' % n, b"i%d" % (n % INSTANCES))
                    break
                except BufferError:
                    self.producer.poll(0.1)
            if n % 1000 == 0:
                self.producer.poll(0)
        self.producer.flush()


class Reader:
    """Counts the committed records of a topic from its present end on."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench-reader", "isolation.level": "read_committed", "fetch.wait.max.ms": 10, "log_level": 0})
        partitions = self.consumer.list_topics(topic, timeout=10).topics[topic].partitions
        self.consumer.assign([TopicPartition(topic, p, self._end(topic, p)) for p in partitions])
        self.consumer.consume(1, 0.5)

    def _end(self, topic: str, partition: int) -> int:
        for _ in range(50):
            try:
                return int(self.consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)[1])
            except KafkaException:  # the topic is so new that this partition has no leader yet
                time.sleep(0.1)
        raise RuntimeError(f"{topic}[{partition}] has no leader")

    def until(self, count: int) -> None:
        while count > 0:
            message = self.consumer.poll(60)
            if message is None:
                raise RuntimeError("nothing came within 60 s")
            count -= message.error() is None
            count -= sum(m.error() is None for m in self.consumer.consume(min(1000, count), 0)) if count > 0 else 0


def cpu_s(pid: int) -> float:
    """The user and system time that a process has used so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drained(process: subprocess.Popen[bytes], reader: Reader) -> tuple[float, float]:
    """(steps per second, us of CPU per step) for a backlog that is already in the log."""
    first = STEPS // 10
    reader.until(first)
    begun, spent = time.perf_counter(), cpu_s(process.pid)
    reader.until(STEPS - first)
    return (STEPS - first) / (time.perf_counter() - begun), 1e6 * (cpu_s(process.pid) - spent) / (STEPS - first)


def trips(lab: Lab, reader: Reader) -> list[float]:
    """Seconds from a record to its answer, measured one at a time, without the first sixth."""
    seconds = []
    for n in range(TRIPS):
        begun = time.perf_counter()
        lab.producer.produce(lab.config.resume_topic, b'{"ref":"r","value":%d}' % n, b"i0")
        lab.producer.flush()
        reader.until(1)
        seconds.append(time.perf_counter() - begun)
    return seconds[TRIPS // 6 :]


def measure(directory: pathlib.Path) -> None:
    with broker(directory) as bootstrap:
        if bootstrap is None:
            print("Kafka was not measured: it needs KWFLOW_TEST_BOOTSTRAP=host:port, or Java 17 and Maven")
            return
        lab = Lab(bootstrap, directory / "lab")
        best: dict[str, float] = {"engine": 0.0, "bare": 0.0, "cpu": 1e9, "bare cpu": 1e9}
        idle: dict[str, list[float]] = {"engine": [], "bare": []}
        lab.send(INSTANCES, b"new:{}")
        for _ in range(2):  # in turns, so that both meet the same machine
            lab.send(STEPS)
            for name, start, topic in (("engine", lab.engine(), OUT), ("bare", lab.loop(SNAPSHOT_BYTES), f"{lab.bare}-out")):
                reader = Reader(bootstrap, topic)
                with start as process:
                    rate, cpu = drained(process, reader)
                    best[name] = max(best[name], rate)
                    best["cpu" if name == "engine" else "bare cpu"] = min(best["cpu" if name == "engine" else "bare cpu"], cpu)
                    settle(reader)
                    idle[name] += trips(lab, reader)
                reader.consumer.close()
        figure("Kafka steps/s", best["engine"])
        figure("bare Kafka loop steps/s", best["bare"])
        figure("Kafka / bare", best["engine"] / best["bare"], ">= 0.5")
        figure("Kafka engine, us of CPU a step", best["cpu"], "<= 60")
        figure("bare Kafka loop, us of CPU a step", best["bare cpu"])
        engine, bare = percentiles("Kafka round trip", idle["engine"]), percentiles("bare loop round trip", idle["bare"])
        figure("Kafka round trip p50 / bare", engine / bare, "<= 1.5")
        sequential(bootstrap, directory)


def sequential(bootstrap: str, directory: pathlib.Path) -> None:
    """Measure a loop in which every instance has one open question that a client answers: with the engine, then with the bare loop, each with its own topics."""
    best = {"engine": (0.0, 0.0), "two": (0.0, 0.0), "bare": (0.0, 0.0)}
    for turn in range(2):
        lab = Lab(bootstrap, directory / f"engine{turn}")
        lab.send(INSTANCES, b"new:{}")
        best["engine"] = max(best["engine"], echoed(lab, lab.engine(), OUT))
        lab = Lab(bootstrap, directory / f"two{turn}")
        lab.send(INSTANCES, b"new:{}")
        best["two"] = max(best["two"], echoed(lab, lab.engine("--processes", "2"), OUT))
        lab = Lab(bootstrap, directory / f"bare{turn}")
        best["bare"] = max(best["bare"], echoed(lab, lab.loop(SNAPSHOT_BYTES), f"{lab.bare}-out"))
    figure("Kafka sequential steps/s, 500 instances, echo client", best["engine"][0], ">= 10,000")
    figure("Kafka engine then, us of CPU a step", best["engine"][1], "<= 60")
    figure("the same, --processes 2", best["two"][0])
    figure("bare loop's sequential steps/s", best["bare"][0])
    figure("Kafka sequential / bare", best["engine"][0] / best["bare"][0], ">= 0.5")


def settle(reader: Reader) -> None:
    """Read until nothing comes for a second."""
    while reader.consumer.consume(1000, 1.0):
        continue


def echoed(lab: Lab, asking: contextlib.AbstractContextManager[subprocess.Popen[bytes]], topic: str) -> tuple[float, float]:
    """(steps per second of the whole loop, us of CPU per step of the asking process), while a client answers every question."""
    with asking as process, lab.running("-m", "benchmarks.kafka_echo", lab.config.bootstrap_servers, topic, lab.config.resume_topic):
        reader = Reader(lab.config.bootstrap_servers, topic)
        lab.send(INSTANCES)
        reader.until(5 * INSTANCES)
        begun, count, spent = time.perf_counter(), 0, cpu_s(process.pid)
        while time.perf_counter() - begun < ECHO_S:
            reader.until(1000)
            count += 1000
        rate, cpu = count / (time.perf_counter() - begun), 1e6 * (cpu_s(process.pid) - spent) / count
        reader.consumer.close()
    return rate, cpu
