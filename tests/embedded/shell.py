"""The `kwflow` command against one directory, and the engines that run there."""

import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable

from kwflow.config import Config
from kwflow.runners.embedded.state import EmbeddedStore, read_only
from tests import commands
from tests.waiting import until

ROOT = pathlib.Path(__file__).parents[2]
TRIP = str(ROOT / "workflows/trip_booking.py")


class Shell:
    """The kwflow command against one directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.engines: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = commands.run(*arguments, "--embedded", str(self.directory))
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + done.stderr

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "kwflow", *arguments, "--embedded", str(self.directory)]

    def engine(self, *modules: str, file_bytes_max: int | None = None) -> "subprocess.Popen[str]":
        """With a limit, it is as on a disk that is full: writes beyond it fail."""
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))) if file_bytes_max is not None else None
        started = subprocess.Popen(self.command("engine", *modules), stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=limit)
        self.engines.append(started)
        assert started.stderr is not None
        assert "runs in" in started.stderr.readline()
        return started

    def stored(self, id: str) -> bytes | None:
        """Its snapshot as it is now."""
        db = read_only(self.directory)
        try:
            return EmbeddedStore(db, Config().changelog_topic).get(id.encode())
        finally:
            db.close()

    def records(self, topic: str) -> list[str]:
        return self("tail", topic).splitlines()

    def until(self, found: Callable[[], object]) -> None:
        until(found)

    def end(self) -> None:
        for engine in self.engines:
            engine.kill()
            engine.wait()
            if engine.stderr is not None:
                engine.stderr.close()
