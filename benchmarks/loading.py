"""The cost of importing a durable module: lowering compared with compiling, and our cache with Python's own."""

from __future__ import annotations

import importlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import figure
from kwflow import durable
from kwflow.durable.lower import lower_module

UNIT = """
class Order{n}:
    def __init__(self, items):
        self.items = items
        self.total = sum(item["price"] * item["count"] for item in items)


def charge{n}(order, retries=3):
    for attempt in range(retries):
        try:
            receipt = yield ("charge", order.total, attempt)
            if receipt and receipt.get("ok"):
                return receipt["id"]
        except ValueError as error:
            print(f"attempt {{attempt}} failed: {{error}}")
            yield ("sleep", 2 ** attempt)
    raise RuntimeError("could not charge")


def main{n}(opts):
    undo = []
    order = Order{n}(opts["items"])
    try:
        payment = yield from charge{n}(order)
        undo.append(lambda: ("refund", payment))
        return {{"payment": payment, "parcels": [item for item in order.items if item]}}
    except Exception:
        for step in reversed(undo):
            yield step()
        raise
"""


def cpu(work: Callable[[], Any], repeat: int) -> float:
    """Seconds of CPU of the best of several runs.  CPU time, as one lowering takes longer than a time slice on a busy core."""
    best = float("inf")
    for _ in range(repeat):
        begun = time.process_time()
        work()
        best = min(best, time.process_time() - begun)
    return best


def measure(directory: pathlib.Path) -> None:
    """Measure the import of 1,000 lines: uncached compared with compiling them, cached compared with Python's cached import."""
    source = "".join(UNIT.format(n=n) for n in range(31))
    for name in ("bench_native", "bench_durable"):
        (directory / f"{name}.py").write_text(source)
    sys.path.insert(0, str(directory))
    durable.install(["bench_durable"])
    compiled = cpu(lambda: compile(source, "bench.py", "exec", dont_inherit=True), 15)
    figure("load 1,000 lines uncached / compile", cpu(lambda: lower_module("bench_durable", source, "bench.py"), 15) / compiled, "<= 10")
    writing, sys.dont_write_bytecode = sys.dont_write_bytecode, False

    def imported(name: str) -> None:
        sys.modules.pop(name, None)
        importlib.import_module(name)

    imported("bench_native")
    imported("bench_durable")
    figure("load 1,000 lines cached / cached import", cpu(lambda: imported("bench_durable"), 60) / cpu(lambda: imported("bench_native"), 60), "<= 3")
    sys.dont_write_bytecode = writing
    durable.uninstall()
    sys.path.remove(str(directory))
