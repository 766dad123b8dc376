"""Deployments of the embedded engine: stopped, its code replaced, started again, as its user does it (G10)."""

import pathlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.embedded.test_embedded import Shell

HEAD = "import kwflow as kw\n"
OLD = HEAD + "from shop.helpers import help_\n\ndef main(opts):\n    got = yield kw.suspend('r')\n    yield kw.suspend('s')\n    return ['old', got, help_()]\n"
NEW = HEAD + "\ndef main(opts):\n    got = yield kw.suspend('r')\n    return ['new', got]\n"


class Deployments(Shell):
    """A folder with the package `shop`, and the engine that runs it."""

    def __init__(self, directory: pathlib.Path) -> None:
        super().__init__(directory / "state")
        self.folder = directory
        (directory / "shop").mkdir()
        (directory / "shop/__init__.py").write_text("")

    def deploy(self, files: dict[str, str], *modules: str) -> None:
        """Stop the engine, replace the files (empty: delete), start it with these modules."""
        self.stop()
        for name, text in files.items():
            path = self.folder / "shop" / name
            path.write_text(text)
            if not text:
                path.unlink()
        self.engine(*modules, "--app-dir", str(self.folder))

    def stop(self) -> None:
        for engine in self.engines:
            if engine.poll() is None:
                engine.send_signal(signal.SIGTERM)
                engine.communicate(timeout=30)


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Iterator[Deployments]:
    site = Deployments(tmp_path)
    yield site
    for engine in site.engines:
        engine.kill()
        engine.wait()
        if engine.stderr is not None:
            engine.stderr.close()


def waits_for(site: Shell, id: str, ref: str) -> None:
    site.until(lambda: f" {ref} " in subprocess.run(site._command("show", id), capture_output=True, text=True, check=False).stdout)


@pytest.mark.slow
def test_instances_outlive_a_changed_a_renamed_and_a_deleted_module(site: Deployments) -> None:
    """G10, wire §4: the engine is another process each time; helpers that are gone come from the store."""
    site.deploy({"trips.py": OLD, "helpers.py": "def help_():\n    return 'helped'\n"}, "shop.trips")
    site("start", "w", "--input", "1")
    waits_for(site, "w", "r")
    site.deploy({"trips.py": NEW}, "shop.trips")
    site("start", "v")
    site("resume", "w", "r", "--value", "5")
    site("resume", "v", "r", "--value", "6")
    waits_for(site, "w", "s")
    site.deploy({"trips.py": "", "helpers.py": "", "journeys.py": NEW}, "shop.journeys")
    site("resume", "w", "s")
    site.until(lambda: len(site.records("workflow-result")) == 2)
    assert site.records("workflow-result") == ['0 v ["new",6]', '1 w ["old",5,"helped"]']
