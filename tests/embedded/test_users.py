"""Who may read the state, and what kwflow needs of the user it runs as: nothing but its own directory."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.kafka.environment import LIVE
from kwflow.runners.private import private
from tests.simulation.test_found import Lab

ROOT = pathlib.Path(__file__).parents[2]
NOBODY = 65_534
WORKFLOW = """
import kwflow as kw

def main(opts):
    yield kw.sleep(0.01)
    return "done by " + str(opts)
"""
# the interpreter may be where only root can read it: so load what a first run loads, then become nobody, then run
PROGRAM = """
import atexit, importlib, os, sys
uid, modules, *arguments = sys.argv[1:]
for name in modules.split():
    try:
        importlib.import_module(name)
    except Exception:
        pass
if uid != "-":
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    assert os.getuid() == int(uid)
from kwflow import cli
sys.argv = ["kwflow", *arguments]
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
cli.main()
"""


def mode(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_state_directories_are_their_users_alone(tmp_path: pathlib.Path) -> None:
    """0700, whatever the umask, for them and for parent directories that had to be made. A directory of ours that is open to others is closed."""
    before = os.umask(0)
    try:
        Embedded(tmp_path / "a" / "b").close()
        LIVE.database(tmp_path / "c" / "app" / "0").close()
        Lab(tmp_path / "kafka").engine("one")
        (tmp_path / "open").mkdir(mode=0o755)
        private(tmp_path / "open")
        made = [tmp_path / name for name in ("a", "a/b", "c", "c/app", "c/app/0", "kafka/one", "kafka/one/found", "kafka/one/found/0", "kafka/one/found/0/found", "open")]
        assert {str(path): mode(path) for path in made} == {str(path): 0o700 for path in made}
    finally:
        os.umask(before)


@pytest.fixture
def place() -> Iterator[pathlib.Path]:
    """A directory that nobody may use, outside of pytest's private one."""
    path = pathlib.Path(tempfile.mkdtemp())
    (path / "plain.py").write_text(WORKFLOW)
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def kwflow(place: pathlib.Path, uid: str, modules: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PROGRAM, uid, modules, *arguments]
    return subprocess.run(command, cwd=place, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_kwflow_runs_as_a_user_who_owns_nothing_but_the_state_directory(place: pathlib.Path) -> None:
    uid = str(NOBODY) if os.geteuid() == 0 else "-"
    first = kwflow(place, "-", "", "run", "plain.py", "--input", '"root"', "--embedded", str(place / "first"))
    assert "done by root" in first.stdout, first.stderr
    if uid != "-":
        shutil.rmtree(place / "first")
    done = kwflow(place, uid, first.stderr.splitlines()[-1], "run", "plain.py", "--input", '"nobody"', "--embedded", str(place / "state"))
    assert done.returncode == 0 and "done by nobody" in done.stdout, done.stderr[-2000:]
    assert mode(place / "state") == 0o700
    if uid != "-":
        assert (place / "state").stat().st_uid == NOBODY
