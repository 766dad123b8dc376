"""G7: values in locals go on, one by one, from every supported minor to every other."""

import json
import pathlib
import subprocess

import pytest

from tests.nightly import values_minor
from tests.nightly.test_minors import SUPPORTED, interpreter

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]


def run(version: str, *arguments: str) -> str:
    done = subprocess.run([interpreter(version), str(pathlib.Path(values_minor.__file__)), *arguments], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("there", SUPPORTED)
@pytest.mark.parametrize("here", SUPPORTED)
def test_every_value_saved_there_goes_on_here(here: str, there: str, tmp_path: pathlib.Path) -> None:
    run(there, "write", str(tmp_path / "snapshots.json"))
    assert json.loads(run(here, "resume", str(tmp_path / "snapshots.json"))) == []
