"""What every group of figures uses: the measured workflow, the broker, and where figures go."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from kwflow import api, durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.runners.loop import WorkflowProcessor

SOURCE = """
import kwflow as kw
kw.declare_topics("bench-out")

def main(opts):
    n = 0
    while True:
        value = yield kw.suspend("r")
        n += 1
        kw.output(str(value), "bench-out")
"""
INSTANCES = 500
SHARE = float(os.environ.get("KWFLOW_BENCH_SHARE", "1"))  # of the full amount of work: with less, a run shows whether the benchmarks work, not how fast


def share(count: int) -> int:
    return max(INSTANCES, int(count * SHARE))


STEPS = share(30_000)
FIGURES: dict[str, float] = {}
TARGETS: dict[str, str] = {}


def figure(name: str, value: float, target: str = "") -> None:
    """Note a figure; `target` is the project's own goal, as text."""
    FIGURES[name] = value
    if target:
        TARGETS[name] = target


def percentiles(name: str, seconds: list[float]) -> float:
    """Note p50 and p99 in ms; return p50 in seconds."""
    ordered = sorted(seconds)
    figure(f"{name}, ms p50", 1000 * ordered[len(ordered) // 2])
    figure(f"{name}, ms p99", 1000 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)])
    return ordered[len(ordered) // 2]


def workflow() -> Any:
    """Load the module of the measured workflow as durable code."""
    return durable.load_source("bench_workflows", SOURCE, "bench_workflows.py")


def processor(config: Config, incarnation: str) -> WorkflowProcessor:
    return WorkflowProcessor(config, Workflows({"main": workflow().main}, "main"), api.declared_topics(), incarnation)


@contextlib.contextmanager
def broker(directory: pathlib.Path) -> Iterator[str | None]:
    """Yield the address of a Kafka that exists already, or of one that is started from Maven's jars; None if there is neither."""
    given = os.environ.get("KWFLOW_TEST_BOOTSTRAP")
    if given or not (shutil.which("java") and shutil.which("mvn")):
        yield given
        return
    from tests.integration.broker import Broker

    class Optimised(Broker):
        jvm = ()

    started = Optimised(directory / "broker")
    started.start()
    try:
        yield started.bootstrap
    finally:
        started.kill()
