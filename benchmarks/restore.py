"""Restoring a million waiting instances: from the changelog into a new engine's store, as `kwflow engine` does it."""

from __future__ import annotations

import os
import pathlib
import time
import urllib.error
import urllib.request

from confluent_kafka import Producer

from benchmarks.common import broker, figure, processor, share, workflow
from benchmarks.kafka import PARTITIONS, Lab
from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Record
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore
from tests.integration.broker import free_port

WAITING = share(1_000_000)


def measure(directory: pathlib.Path) -> None:
    with broker(directory) as bootstrap:
        if bootstrap is None:
            print("restore was not measured: it needs a Kafka")
            return
        lab = Lab(bootstrap, directory / "lab")
        size = fill(lab)
        figure("restored instances, bytes each", size)
        port = free_port()
        state = str(lab.config.state_dir)
        with lab.running("-m", "kwflow", "engine", "bench_workflows.py", "--state-dir", state, "--http", f"127.0.0.1:{port}") as process:
            begun = 0.0
            while (reached := progress(port)) is None or reached < PARTITIONS:
                if reached and not begun:
                    begun, first = time.perf_counter(), reached
                time.sleep(0.02)
                if process.poll() is not None:
                    raise RuntimeError((lab.directory / "log").read_text()[-2000:])
            seconds = time.perf_counter() - begun
            figure("restored instances/s", WAITING * (PARTITIONS - first) / PARTITIONS / seconds, ">= 100,000")
            figure("engine after it, MB", resident_mb(process.pid), "< 600")


def fill(lab: Lab) -> int:
    """Fill the changelog as a million started instances would; return the bytes of one snapshot."""
    workflow()
    store = MemoryStore()
    overlay = Overlay(store)
    processor(Config(), "incarnation").decide(overlay, [Record("workflow-resume", 0, 0, 1000, b"i", b"new:{}")], 1000)
    data = next(value for key, value in overlay.changes.items() if key == b"i") or b""
    producer = Producer({"bootstrap.servers": lab.config.bootstrap_servers, "linger.ms": 50, "log_level": 0})
    for n in range(WAITING):
        key = b"instance-%d" % n
        while True:
            try:
                producer.produce(lab.config.changelog_topic, data, key, partition=partition_of(key, PARTITIONS))
                break
            except BufferError:
                producer.poll(0.1)
        if n % 1000 == 0:
            producer.poll(0)
    producer.flush()
    return len(data)


def progress(port: int) -> float | None:
    """How many partitions are restored, with fractions; None while the engine does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except (OSError, urllib.error.URLError):
        return None
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("kwflow_restore_ratio{"))


def resident_mb(pid: int) -> float:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

