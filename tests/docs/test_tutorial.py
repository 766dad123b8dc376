"""The tutorial, followed from its first line to the last: its files are saved, its commands run, and what it shows is what they print."""

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from tests.waiting import until

TUTORIAL = pathlib.Path(__file__).parents[2] / "docs/TUTORIAL.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.slow


class Reader:
    """Somebody who does what the tutorial says, in a folder; `engines` is how many of them have begun to run."""

    def __init__(self, folder: pathlib.Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)
        (folder / "bin").mkdir()
        for name, module in (("kwflow", "kwflow"), ("pytest", "pytest")):
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
            path.chmod(0o755)
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.files = ["test_orders.py", "orders.py"]
        self.dev: subprocess.Popen[bytes] | None = None
        self.engines = 0
        self.printed = ""

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def sees_an_engine(self) -> None:
        self.engines += 1
        until(lambda: self.log().count("engine runs in") >= self.engines, told=self.log)

    def python(self, text: str) -> None:
        (self.folder / self.files.pop()).write_text(text)

    def run(self, line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)

    def waits(self, id: str) -> bool:
        done = self.run(f"kwflow query {id}")
        return " waiting" in done.stdout + done.stderr

    def sh(self, text: str) -> None:
        if text.startswith("kwflow dev"):
            with open(self.folder / "log", "wb") as log:
                self.dev = subprocess.Popen([*text.split(), "--port", "0"], cwd=self.folder, env=self.environment, stderr=log, stdout=log)
            self.sees_an_engine()
            return
        self.printed = ""
        for line in text.splitlines():
            done = self.run(line)
            assert done.returncode == 0, (line, done.stdout + done.stderr)
            self.printed += done.stdout
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                self.environment[name] = value
            elif line.startswith("kill "):
                self.sees_an_engine()
            elif line.startswith("kwflow start"):
                until(functools.partial(self.waits, line.split()[2]))

    def diff(self, text: str) -> None:
        before, after = (next(line[1:] for line in text.splitlines() if line[0] == sign) for sign in "-+")
        path = self.folder / "orders.py"
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, after))
        self.sees_an_engine()

    def sees(self, shown: str, printed: str) -> None:
        pattern = ".*".join(map(re.escape, shown.strip().split("…")))
        assert re.search(pattern, "\n".join(line.rstrip() for line in printed.splitlines())), printed


@pytest.fixture
def reader(tmp_path: pathlib.Path) -> Iterator[Reader]:
    reader = Reader(tmp_path, {name: text for name, text in os.environ.items() if not name.startswith(("KWFLOW", "PYTEST"))})
    yield reader
    if reader.dev is not None:
        reader.dev.send_signal(signal.SIGINT)
        assert reader.dev.wait(30) == 0


def test_what_the_tutorial_says_is_what_happens(reader: Reader) -> None:
    kinds = []
    for kind, text in BLOCK.findall(TUTORIAL.read_text(encoding="utf-8")):
        kinds.append(kind)
        if kind == "text":
            reader.sees(text, reader.printed)
        elif kind == "log":
            reader.sees(text, reader.log())
        elif kind != "kafka":
            getattr(reader, kind)(text)
    assert (kinds.count("sh"), kinds.count("text"), kinds.count("diff"), kinds[-1]) == (7, 4, 1, "kafka")
