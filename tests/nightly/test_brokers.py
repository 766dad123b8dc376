"""The tests with a real broker, on other versions of Kafka than the one in CI."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.integration.broker import can_start

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.broker
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not can_start(), reason="NOT TESTED: other versions of Kafka need Java and Maven")
@pytest.mark.parametrize("version", ["3.7.2", "3.9.2", "4.0.1", "4.4.0"])
def test_engines_do_there_what_they_do_here(version: str, tmp_path: pathlib.Path) -> None:
    """Section "Brokers" of OPERATIONS."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--basetemp={tmp_path / 'tests'}", "tests/integration"]
    environment = {name: value for name, value in os.environ.items() if name != "KWFLOW_TEST_BOOTSTRAP"} | {"KWFLOW_TEST_KAFKA": version, "KWFLOW_REQUIRE_KAFKA": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:]
