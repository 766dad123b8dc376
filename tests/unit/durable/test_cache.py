"""The cache of lowered modules: used when it fits, never when it does not, and never required (semantics §5.2)."""

import ast
import gc
import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from kwflow import durable

SOURCE = "import kwflow as kw\ndef gen(x):\n    got = yield x\n    return (got, 1)\n"
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from kwflow import durable
durable.install(["cached"])
import cached
gen = cached.gen(3)
first = next(gen)
again = durable.loads(durable.dumps(gen))
try:
    again.send("back")
except StopIteration as stop:
    print(first, stop.value, sorted(durable.describe(gen)[0].locals), cached.gen.__code__.co_firstlineno)
"""


def run(directory: pathlib.Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, check=False, env=env, cwd=pathlib.Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cache_of(directory: pathlib.Path) -> pathlib.Path:
    [found] = (directory / "__pycache__").glob("cached.*.kwflow")
    return found


@pytest.mark.slow
def test_a_module_is_lowered_once_and_again_when_its_source_changes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cached.py").write_text(SOURCE)
    expected = "3 ('back', 1) ['x'] 2"
    assert run(tmp_path) == expected
    before = cache_of(tmp_path).stat()
    assert run(tmp_path) == expected
    assert cache_of(tmp_path).stat().st_mtime_ns == before.st_mtime_ns
    (tmp_path / "cached.py").write_text(SOURCE.replace("(got, 1)", "(got, 2)"))
    assert run(tmp_path) == "3 ('back', 2) ['x'] 2"
    assert cache_of(tmp_path).stat().st_mtime_ns != before.st_mtime_ns
    assert [path.name for path in (tmp_path / "__pycache__").iterdir()] == [cache_of(tmp_path).name]  # no temporary file is left behind


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"", b"garbage", b"i\1\0\0\0", None])
def test_a_cache_that_is_damaged_is_made_again(tmp_path: pathlib.Path, damage: bytes | None) -> None:
    (tmp_path / "cached.py").write_text(SOURCE)
    expected = run(tmp_path)
    cache = cache_of(tmp_path)
    cache.write_bytes(cache.read_bytes()[:-20] if damage is None else damage)
    assert run(tmp_path) == expected
    assert len(cache.read_bytes()) > 200


@pytest.mark.slow
def test_where_nothing_can_be_written_modules_load_all_the_same(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cached.py").write_text(SOURCE)
    (tmp_path / "__pycache__").write_text("a file, so no directory can be made")
    assert run(tmp_path) == "3 ('back', 1) ['x'] 2"


@pytest.mark.slow
def test_a_warning_about_a_call_that_is_thrown_away_is_said_from_the_cache_too(tmp_path: pathlib.Path) -> None:
    """§1.4."""
    (tmp_path / "cached.py").write_text(SOURCE + "def main(o):\n    gen(1)\n    yield gen(2)\n")
    env = {**{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}, "PYTHONWARNINGS": "always"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True, env=env, cwd=pathlib.Path(__file__).parents[3])
        assert "cached.py:6: LostCallWarning" in done.stderr


def test_a_module_that_was_lowered_keeps_no_tree_of_its_source(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/LOCALS.md "Libraries": where no cache can be written, each process would hold the trees of all modules of a library."""
    (tmp_path / "without_tree.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    durable.install(["without_tree"])
    before = {id(value) for value in gc.get_objects() if isinstance(value, ast.Module)}
    gen = importlib.import_module("without_tree").gen(3)
    gc.collect()
    assert [ast.dump(value) for value in gc.get_objects() if isinstance(value, ast.Module) and id(value) not in before] == []
    next(gen)
    assert [*durable.describe(durable.loads(durable.dumps(gen)))[0].locals] == ["x"]
