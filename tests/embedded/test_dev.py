"""`kwflow dev`: what is edited is deployed, and what waits continues."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from kwflow.cli.dev import _Sources
from kwflow.errors import UsageError
from kwflow.runners.embedded.socket import is_served
from tests.embedded.shell import Shell

pytestmark = pytest.mark.slow
FLOW = "import kwflow as kw\nfrom beside import word\n\ndef main(o):\n    a = yield kw.wait_signal('a')\n    return ['one', a, word()]\n"


class Dev(Shell):
    """`kwflow dev`, and a file that is edited."""

    def __init__(self, directory: pathlib.Path) -> None:
        super().__init__(directory / "state")
        self.folder, self.log = directory, directory / "log"
        self.edit("beside.py", "def word():\n    return 'x'\n")
        self.edit("flow.py", FLOW)
        with open(self.log, "wb") as log:
            command = [sys.executable, "-m", "kwflow", "dev", "flow", "--embedded", str(self.directory), "--port", "0", "--app-dir", str(directory)]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)

    def edit(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def said(self, text: str, times: int = 1) -> None:
        self.until(lambda: self.log.read_text().count(text) >= times)

    def engine_pid(self) -> int:
        return int((self.directory / "engine.pid").read_text())


@pytest.fixture
def dev(tmp_path: pathlib.Path) -> Iterator[Dev]:
    dev = Dev(tmp_path)
    yield dev
    if dev.process.poll() is None:
        dev.process.send_signal(signal.SIGINT)
        dev.process.wait(30)


def test_an_edited_module_is_deployed_and_what_waits_in_the_old_code_finishes_on_it(dev: Dev) -> None:
    """G10, as at any deployment; a file that cannot be imported deploys nothing."""
    dev.said("engine runs in")
    dev("start", "w")
    dev.until(lambda: "signal" in dev("list"))
    dev.edit("flow.py", FLOW.replace("one", "two"))
    dev.said("engine runs in", 2)
    assert "deploying: 1 waiting: 0 resume on this code, 1 stay on old code" in dev.log.read_text()
    dev("start", "v")
    dev.edit("flow.py", "def main(o:\n")
    dev.said("not deployed: kwflow: '(' was never closed (flow.py, line 1)")
    for id in ("w", "v"):
        dev("signal", id, "a")
    assert [dev("result", id).strip() for id in ("w", "v")] == ['["one",null,"x"]', '["two",null,"x"]'], "the engine of before goes on"
    dev.edit("flow.py", FLOW)
    dev.said("engine runs in", 3)
    dev.edit("beside.py", "def word():\n    return 'y'\n")
    dev.said("engine runs in", 4)
    dev("start", "u")
    dev("signal", "u", "a")
    assert dev("result", "u").strip() == '["one",null,"y"]', "what lies beside a module is deployed, too"
    [address] = re.findall(r"console listens on (http://\S+)", dev.log.read_text())
    with urllib.request.urlopen(address) as page:
        assert b"flow" in page.read()


def test_an_engine_that_is_killed_starts_again_and_all_ends_with_ctrl_c(dev: Dev) -> None:
    dev.said("engine runs in")
    os.kill(dev.engine_pid(), signal.SIGKILL)
    dev.said("the engine has ended with -9; it starts again")
    dev.said("engine runs in", 2)
    dev.said("console listens on")
    dev.process.send_signal(signal.SIGINT)
    assert dev.process.wait(30) == 0
    assert not is_served(dev.directory)


def test_if_it_is_killed_its_engine_ends_too(dev: Dev) -> None:
    dev.said("engine runs in")
    dev.process.kill()
    dev.process.wait()
    dev.until(lambda: not is_served(dev.directory))


def test_a_module_that_is_not_there_is_wrong_usage(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UsageError, match="no module nowhere in"):
        _Sources(["nowhere.flows"], tmp_path)


def test_files_of_a_package_are_looked_at_wherever_they_are_and_only_once_they_are_still(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    inner = tmp_path / "watched_shop" / "inner"
    inner.mkdir(parents=True)
    for file in (inner.parent / "__init__.py", inner / "__init__.py", inner / "flows.py"):
        file.write_text("")
    sources = _Sources(["watched_shop.inner.flows"], tmp_path)
    assert not sources.changed()
    (inner / "flows.py").write_text("x = 1")
    assert not sources.changed(), "it may be written still"
    (inner / "more.py").write_text("")
    assert not sources.changed()
    assert sources.changed() and not sources.changed()
    (inner / "more.py").unlink()
    assert [sources.changed(), sources.changed()] == [False, True]
