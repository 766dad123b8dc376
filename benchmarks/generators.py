"""Figures of durable generators: hot twins compared with native generators, saving and restoring with a plain pickle of the same variables.

Every figure but the size is a ratio of two times in one run, each the best of many short bursts, so that a busy machine does not show.
"""

from __future__ import annotations

import pathlib
import pickle
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import figure
from kwflow import durable
from kwflow.core import snapshot
from kwflow.testing import WorkflowTester

__all__ = ["LIMITS", "figures", "measure", "saga_bytes"]

LOOPS = """
def branches(n):
    for i in range(n):
        if i % 2:
            yield i
        else:
            yield -i

def nested(n):
    for i in range(n // 10):
        for j in range(10):
            yield i + j

class Manager:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return None

MANAGER = Manager()

def protected(n):
    for i in range(n):
        with MANAGER:
            try:
                yield i
            except ValueError:
                yield -1
"""
FRAMES = """
def reserve(kind, attempt):
    ref = "1:1"
    got = yield kind
    return got

def trip(options):
    name, count = "trip", 3
    return (yield from reserve("car", 1))

def report(rows):
    total = 0
    return (yield from reserve("car", 1))
"""
SAGA = """
import kwflow as kw
kw.declare_topics("bench-saga")

def reserve(kind):
    resume = kw.suspend()
    kw.output(resume.id, "bench-saga")
    try:
        yield resume
    except kw.Cancelled:
        kw.output(resume.id, "bench-saga")
        raise
    return {"id": resume.id}

def cancel(kind, item):
    kw.output(item["id"], "bench-saga")
    return
    yield

def main(opts):
    undo = []
    try:
        car = yield reserve("car")
        undo.append(lambda: cancel("car", car))
        hotel = yield reserve("hotel")
        undo.append(lambda: cancel("hotel", hotel))
        return {"car": car, "hotel": hotel}
    except BaseException:
        yield kw.all([u() for u in undo])
        raise
"""
ROWS = [{"id": n, "name": f"order {n}", "price": n * 1.5, "tags": ["a", "b"]} for n in range(230)]  # 10 KB as a pickle
LIMITS = {
    "hot twin / native: for, if, yield": 1.2,
    "hot twin / native: nested for": 1.2,
    "hot twin / native: with and try": 1.2,
    "save / pickle: two small frames": 12,
    "restore / unpickle: two small frames": 25,
    "save / pickle: 10 KB of variables": 2,
    "restore / unpickle: 10 KB of variables": 2,
    "body of a saga of two frames, bytes": 600,
}


def best(work: Callable[[], Any], burst: int, bursts: int = 100) -> float:
    """Seconds per call, in the best burst."""
    found = float("inf")
    for _ in range(bursts):
        begun = time.perf_counter()
        for _ in range(burst):
            work()
        found = min(found, time.perf_counter() - begun)
    return found / burst


def measure(_directory: pathlib.Path) -> None:
    for name, value in figures().items():
        figure(name, value, f"at most {LIMITS[name]}")


def figures() -> dict[str, float]:
    """Measure all figures; return them by name."""
    found: dict[str, float] = {}
    lowered: Any = durable.load_source("bench_loops", LOOPS, "bench_loops.py")
    native: dict[str, Any] = {}
    exec(LOOPS, native)
    for name, shown in (("branches", "for, if, yield"), ("nested", "nested for"), ("protected", "with and try")):
        hot, plain = getattr(lowered, name), native[name]
        found[f"hot twin / native: {shown}"] = best(lambda hot=hot: sum(1 for _ in hot(10_000)), 1, 60) / best(lambda plain=plain: sum(1 for _ in plain(10_000)), 1, 60)  # type: ignore[misc]
    frames: Any = durable.load_source("bench_frames", FRAMES, "bench_frames.py")
    inner = {"kind": "car", "attempt": 1, "ref": "1:1"}
    against_pickle(found, "two small frames", frames.trip({"a": 1}), [{"options": {"a": 1}, "name": "trip", "count": 3}, inner], 50)
    against_pickle(found, "10 KB of variables", frames.report(ROWS), [{"rows": ROWS, "total": 0}, inner], 5)
    found["body of a saga of two frames, bytes"] = max(saga_bytes())
    return found


def against_pickle(found: dict[str, float], shown: str, gen: Any, variables: Any, burst: int) -> None:
    next(gen)
    saved, plain = durable.dumps(gen), pickle.dumps(variables, 5)
    found[f"save / pickle: {shown}"] = best(lambda: durable.dumps(gen), burst) / best(lambda: pickle.dumps(variables, 5), burst)
    found[f"restore / unpickle: {shown}"] = best(lambda: durable.loads(saved), burst) / best(lambda: pickle.loads(plain), burst)


def saga_bytes() -> list[int]:
    """The sizes of the stored graph of a saga that waits in a reservation: in the first one, and in the second."""
    engine = WorkflowTester(durable.load_source("bench_saga", SAGA, "bench_saga.py").__dict__["main"])
    engine.start("w", {})
    sizes = [len(snapshot.split(engine.state.entries[b"w"])[1])]
    engine.resume("w", engine.waits("w")[0], {"ok": True})
    return [*sizes, len(snapshot.split(engine.state.entries[b"w"])[1])]
