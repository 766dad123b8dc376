"""G7: lowering and snapshots are the same on every supported minor that this machine has."""

import json
import pathlib
import shutil
import subprocess
import sys

import echo
import pytest

from tests.nightly import minor

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3700)]
SUPPORTED = ("3.11", "3.12", "3.13", "3.14", "3.15")


def interpreter(version: str) -> str:
    """The path of a python of this minor: on PATH, or under pyenv."""
    found = shutil.which(f"python{version}")
    if found is not None and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
        return found
    under = sorted(pathlib.Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    if not under:
        pytest.skip(f"NOT TESTED: no Python {version} here")
    return str(under[-1])


def told(version: str, *arguments: str) -> list[str]:
    done = subprocess.run([interpreter(version), str(pathlib.Path(minor.__file__)), *arguments], capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    said: list[str] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("version", [version for version in SUPPORTED if version != f"{sys.version_info[0]}.{sys.version_info[1]}"])
def test_the_corpus_pickled_at_every_yield_does_there_what_it_does_natively(version: str) -> None:
    assert told(version, "corpus") == []


@pytest.mark.parametrize("reader", SUPPORTED)
@pytest.mark.parametrize("writer", SUPPORTED)
def test_snapshots_of_one_minor_go_on_on_another(writer: str, reader: str, tmp_path: pathlib.Path) -> None:
    """Each generator of the corpus and of 100 random programs, saved at every yield. It has to do what it does natively on the reader."""
    interpreter(reader)
    assert told(writer, "write", str(tmp_path / "snapshots.json")) == []
    assert told(reader, "resume", str(tmp_path / "snapshots.json")) == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_cpythons_tests_pass_there_with_a_yield_in_every_place(version: str) -> None:
    """H3 on every minor. test_echo.py covers the running one at length."""
    python, failed = interpreter(version), {}
    done = subprocess.run([python, "-W", "ignore", echo.__file__, *(f"{module}:12" for module in echo.MODULES)], capture_output=True, text=True, check=False, timeout=3600)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    if not outcomes and "FileNotFoundError: test." in done.stderr:
        pytest.skip(f"NOT TESTED: Python {version} comes without CPython's test package")
    for outcome in outcomes:
        failed |= {f"{outcome['module']}.{name}": text for name, text in outcome["failed"].items()}
    assert failed == {} and len(outcomes) > len(echo.MODULES) - 10, done.stderr[-2000:]
