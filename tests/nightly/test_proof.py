"""What `make test` samples, in full: CPython's own tests with a yield in every place (H3), and random programs (H6)."""

import json
import pathlib
import subprocess
import sys

import echo
import pytest
import random_programs

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(3700),
    pytest.mark.filterwarnings("ignore"),  # programs that warn, and generators that are dropped while they ignore GeneratorExit
]
needs_tests = pytest.mark.skipif(echo.source_file("test_grammar") is None, reason="NOT TESTED: this interpreter comes without CPython's test package")
METHODS_MIN = 3000
PROGRAMS, EACH = 10_000, 500
_mutated: dict[str, int] = {}


@needs_tests
@pytest.mark.parametrize("module", echo.MODULES)
def test_mutated_tests_of_cpython_pass_when_restored_at_their_yields(module: str) -> None:
    """G8."""
    done = subprocess.run([sys.executable, "-W", "ignore", str(pathlib.Path(echo.__file__)), module], capture_output=True, text=True, check=False, timeout=3600)
    if echo.source_file(module) is None:
        pytest.skip(f"NOT TESTED: no test.{module} in Python {sys.version_info[0]}.{sys.version_info[1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["failed"] == {}
    _mutated[module] = outcome["mutated"]


@needs_tests
def test_that_was_no_small_part_of_them() -> None:
    if len(_mutated) < len(echo.MODULES) - 10:
        pytest.skip("NOT TESTED: run together with the modules")
    assert sum(_mutated.values()) >= METHODS_MIN


@pytest.mark.parametrize("first", range(0, PROGRAMS, EACH))
def test_a_random_program_does_what_it_does_natively(first: int) -> None:
    """G8. A failure shows the seed, the script and the shrunk program."""
    for seed in range(first, first + EACH):
        found = random_programs.check(seed)
        assert found is None, str(found)
