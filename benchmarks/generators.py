"""Durable generators against native ones, and their bytes against a pickle of the same values."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

from benchmarks.common import figure, timed
from kwflow import durable

SOURCE = """
def loop(n):
    for i in range(n):
        if i % 2:
            yield i
        else:
            yield -i
"""


def measure(_directory: pathlib.Path) -> None:
    module = durable.load_source("bench_generators", SOURCE, "bench_generators.py")
    native: dict[str, Any] = {}
    exec(SOURCE, native)
    figure("hot twin / native generator", timed(lambda: sum(1 for _ in module.loop(300_000))) / timed(lambda: sum(1 for _ in native["loop"](300_000))))
    gen = module.loop(10)
    next(gen)
    data = durable.dumps(gen)
    values = {"n": 10, "i": 0, "it": iter(range(10))}
    plain = pickle.dumps(values, 5)
    many = range(5000)
    figure("save / pickle of its locals", timed(lambda: [durable.dumps(gen) for _ in many]) / timed(lambda: [pickle.dumps(values, 5) for _ in many]))
    figure("restore / unpickle of its locals", timed(lambda: [durable.loads(data) for _ in many]) / timed(lambda: [pickle.loads(plain) for _ in many]))
