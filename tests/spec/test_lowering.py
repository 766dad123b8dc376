"""A new kwflow is a code change, too (semantics §8.6): the next lowering version reads this one's snapshots, and this one refuses the next one's by name.

The next version is a copy of this package, changed as its developers would change it.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DRIVER = """
import pathlib, sys
import kwflow as kw
from kwflow import durable
from kwflow.errors import SnapshotError
from kwflow.testing import WorkflowTester

SOURCE = '''
import kwflow as kw
def main(opts):
    got = []
    for n in [1, 2, 3]:
        got.append((n, (yield kw.suspend(f"r{n}"))))
    return got
'''
state, first, last = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
w = WorkflowTester(durable.load_source("lowered_again", SOURCE, "lowered_again.py").main)
if state.exists():
    w.state.entries[b"w"] = state.read_bytes()
    for _ in range(10 * first):  # offsets go on behind those that were applied
        w.resume("nobody", "r")
else:
    w.start("w")
for n in range(first, last):
    w.resume("w", f"r{n}", f"by {n}")
header = w.header("w")
if header is None:
    print(w.result("w"))
elif "parked" in header:
    print(header["parked"]["message"])
else:
    print("lowering", header["lowering"])
    state.write_bytes(w.state.entries[b"w"])
"""


class Kwflow:
    """One version of the package, run in its own processes."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def __call__(self, state: pathlib.Path, first: int, last: int) -> str:
        """Answer the waits from `first` up to `last`; returns what the process prints then."""
        command = [sys.executable, "-c", DRIVER, str(state), str(first), str(last)]
        done = subprocess.run(command, cwd=self.folder, env={"PYTHONPATH": str(self.folder)}, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def changed(folder: pathlib.Path, renamed: str) -> Kwflow:
    """The package with another name for the role of a loop's iterator."""
    shutil.copytree(ROOT / "kwflow", folder / "kwflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, after in (
        ("__init__.py", "LOWERING_VERSION = 1\n", "LOWERING_VERSION = 2\n"),
        ("statements.py", '"for-iterator"', '"loop-iterator"'),
        ("upgrade.py", "RENAMED: dict[int, dict[str, str]] = {}", f"RENAMED: dict[int, dict[str, str]] = {renamed}"),
    ):
        path = folder / "kwflow/durable/lower" / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
    return Kwflow(folder)


@pytest.mark.slow
def test_the_next_lowering_version_reads_what_this_one_saved_and_this_one_refuses_what_that_one_saves(tmp_path: pathlib.Path) -> None:
    """G7, G10: slots are named by what they mean, waits by their path."""
    this, following = Kwflow(ROOT), changed(tmp_path / "next", "{1: {'for-iterator': 'loop-iterator'}}")
    state = tmp_path / "state"
    assert this(state, 1, 2) == "lowering 1"
    assert following(state, 2, 3) == "lowering 2"
    assert "saved by a newer kwflow (lowering version 2; this one reads up to 1)" in this(state, 3, 4)
    assert following(state, 3, 4) == "[[1, 'by 1'], [2, 'by 2'], [3, 'by 3']]"


@pytest.mark.slow
def test_a_slot_that_a_lowering_version_does_not_know_parks_the_instance_before_anything_runs(tmp_path: pathlib.Path) -> None:
    """G7: a slot is never dropped."""
    this, following = Kwflow(ROOT), changed(tmp_path / "next", "{}")
    state = tmp_path / "state"
    assert this(state, 1, 2) == "lowering 1"
    assert "lowered_again.main was saved by lowering version 1, and lowering version 2 does not know its @for-iterator" in following(state, 2, 3)
