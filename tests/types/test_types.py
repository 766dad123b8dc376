"""What editors and type checkers know about waits: mypy and pyright read waits.py (semantics §6.3)."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import kwflow
from kwflow import api, errors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = pathlib.Path(__file__).parents[2]
FILE = pathlib.Path(__file__).parent / "waits.py"
EXPECTED = {number for number, line in enumerate(FILE.read_text().splitlines(), 1) if line.endswith("# wrong")}


def test_mypy_knows_what_each_wait_gives_and_reports_each_mistake() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--no-warn-unused-ignores", "--config-file", "", str(FILE)], cwd=ROOT, capture_output=True, text=True, check=False)
    reported = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line and "waits.py" in line}
    assert len(EXPECTED) == 10
    assert reported == EXPECTED, done.stdout + done.stderr


def test_pyright_knows_what_each_wait_gives_and_reports_each_mistake() -> None:
    pyright = shutil.which("pyright", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("NOT TESTED: no pyright here (pip install pyright)")
    done = subprocess.run([pyright, "--outputjson", "--pythonpath", sys.executable, str(FILE)], cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        pytest.skip(f"NOT TESTED: pyright did not run: {done.stderr[-300:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    reported = {one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"}
    assert reported == EXPECTED, [one["message"] for one in found]


def test_the_names_that_type_checkers_see_are_those_that_are_there() -> None:
    """kwflow/__init__.py loads the names lazily, and shows type checkers two star imports."""
    assert set(kwflow.__all__) <= {*api.__all__, *errors.__all__}


def test_the_package_says_that_it_is_typed() -> None:
    """PEP 561. The wheel holds everything below kwflow."""
    assert (ROOT / "kwflow/py.typed").exists()
