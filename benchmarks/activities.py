"""Activities, signals, outcomes and children, measured through the client, with the same code embedded and on Kafka."""

import concurrent.futures
import contextlib
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import FIGURES, broker
from kwflow import api, durable, worker
from kwflow.client import Client
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor

SOURCE = """
import kwflow as kw

@kw.activity(name="bench_square")
def square(n: int) -> int:
    return n * n

@kw.activity(name="bench_elsewhere", queue="bench-queue")
def elsewhere(n: int) -> int:
    return n * n

def queued(count):
    total = 0
    for n in range(count):
        total += yield elsewhere(n)
    return total

def chain(count):
    total = 0
    for n in range(count):
        total += yield square(n)
    return total

def at_once(count):
    return sum((yield kw.all([square(n) for n in range(count)])))

def listener(opts):
    while (yield kw.wait_signal("go")) is not None:
        pass

def nothing(opts):
    return opts

def parent(count):
    for n in range(count):
        yield kw.start_child("nothing", n)
"""
WORKFLOWS = ("queued", "chain", "at_once", "listener", "nothing", "parent")
CHAINS, LINKS, AT_ONCE, TRIPS = 500, 10, 1000, 100
WAIT_S = 300


def measured(client: Client, place: str, figures: dict[str, float]) -> None:
    """Measure everything against a running engine."""
    figures[f"{place} activities/s, {CHAINS} chains of {LINKS}"] = chains(client, "chain")
    begun = time.perf_counter()
    client.start_and_wait("at-once", AT_ONCE, workflow="at_once", timeout=WAIT_S).result(WAIT_S)
    figures[f"{place} activities/s, {AT_ONCE} at once in one workflow"] = AT_ONCE / (time.perf_counter() - begun)
    client.start("listener", workflow="listener").result(WAIT_S)
    trips(f"{place} signal to committed step", figures, lambda _: client.signal("listener", "go", 1))
    trips(f"{place} start and wait", figures, lambda n: client.start_and_wait(f"nothing-{n}", n, workflow="nothing", timeout=WAIT_S))
    begun = time.perf_counter()
    client.start_and_wait("parent", TRIPS, workflow="parent", timeout=WAIT_S).result(WAIT_S)
    figures[f"{place} child start to result, ms"] = 1000 * (time.perf_counter() - begun) / TRIPS


def chains(client: Client, workflow: str) -> float:
    """Measure calls per second."""
    begun = time.perf_counter()
    ended = [client.start_and_wait(f"{workflow}-{n}", LINKS, workflow=workflow, timeout=WAIT_S) for n in range(CHAINS)]
    assert {future.result(WAIT_S) for future in ended} == {sum(n * n for n in range(LINKS))}
    return CHAINS * LINKS / (time.perf_counter() - begun)


def trips(name: str, figures: dict[str, float], begin: Callable[[int], "concurrent.futures.Future[Any]"]) -> None:
    took = []
    for n in range(TRIPS):
        one = time.perf_counter()
        begin(n).result(WAIT_S)
        took.append(time.perf_counter() - one)
    took.sort()
    figures[f"{name}, ms p50"], figures[f"{name}, ms p99"] = 1000 * took[len(took) // 2], 1000 * took[len(took) * 99 // 100]


@contextlib.contextmanager
def running(run: Callable[[Callable[[], bool]], Any]) -> Iterator[None]:
    """Run an engine on a thread of its own while inside of this."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: run(done.is_set))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _workflows() -> Workflows:
    module = durable.load_source("bench_activities", SOURCE, "bench_activities.py")
    return Workflows({name: getattr(module, name) for name in WORKFLOWS})


def embedded(directory: pathlib.Path, figures: dict[str, float]) -> None:
    held, config = Embedded(directory), Config()
    processors = [WorkflowProcessor(config, _workflows(), api.declared_topics(), held.incarnation), TimerProcessor(config)]
    with running(lambda until: held.run(processors, until, lambda _: None)), Client.embedded(held, config) as client:
        measured(client, "embedded", figures)
    held.close()


def kafka(bootstrap: str, directory: pathlib.Path, figures: dict[str, float]) -> None:
    application = f"bench-{uuid.uuid4().hex[:6]}"
    named = {f"{topic}_topic": f"{application}-{topic}" for topic in ("resume", "result", "error", "scheduler", "reply")}
    config = Config(application_id=application, bootstrap_servers=bootstrap, state_dir=directory, **named)
    workflows = _workflows()
    topics.create(topics.admin(config), config, api.declared_topics(), 4, 1)
    runner = KafkaRunner(config, lambda incarnation: WorkflowProcessor(config, workflows, api.declared_topics(), incarnation), application, lambda _: None)
    with running(runner.run), Client.kafka(config) as client:
        measured(client, "Kafka", figures)
        with running(lambda until: worker.run(config, until, on_log=lambda _: None)):
            client.start_and_wait("joined", 1, workflow="queued", timeout=WAIT_S).result(WAIT_S)
            figures[f"Kafka calls of a queue/s, engine and worker in one process, {CHAINS} chains of {LINKS}"] = chains(client, "queued")


def measure(directory: pathlib.Path) -> None:
    """Measure both, and add to the figures of this run."""
    embedded(directory / "embedded", FIGURES)
    with broker(directory) as bootstrap:
        if bootstrap is not None:
            kafka(bootstrap, directory / "kafka", FIGURES)
