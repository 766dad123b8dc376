"""The figures of docs/BENCHMARKS.md can be reproduced. A benchmark that nobody runs breaks when the code that it measures changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = ("embedded", "activities", "kafka", "restore")


@pytest.mark.parametrize("group", ["generators", "loading", "scale", *(pytest.param(group, marks=pytest.mark.nightly) for group in SLOW)])
def test_each_group_of_figures_can_be_taken_with_a_hundredth_of_its_work(group: str, tmp_path: Path) -> None:
    environment = {**os.environ, "KWFLOW_BENCH_SHARE": "0.01", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "benchmarks", group], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not measured" not in done.stdout
    assert all(value >= 0 for value in json.loads((tmp_path / "bench-results.json").read_text()).values())
