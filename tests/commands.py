"""Run `kwflow …` in a process forked from one that has imported kwflow: most of a command's time, and half of an engine's start, is spent on imports."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess

__all__ = ["Started", "run", "start"]

_ROOT = pathlib.Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kwflow.client", "kwflow.runners.kafka.queues", "kwflow.runners.kafka.runner", "kwflow.runners.kafka.upkeep", "tests.commands", "tests.prepared"])


def run(*arguments: str, environment: Mapping[str, str] | None = None, typed: str = "", seconds: float = 60) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; return its output and exit code, as `subprocess.run` of `python -m kwflow` would.  Raises TimeoutExpired."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.NamedTemporaryFile("w+")) for _ in range(3)]
        files[0].write(typed)
        files[0].flush()
        process = _forked(arguments, environment, *(file.name for file in files))
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["kwflow", *arguments], seconds)
        said, told = (pathlib.Path(file.name).read_text() for file in files[1:])
        return subprocess.CompletedProcess(["kwflow", *arguments], process.exitcode, said, told)


class Started:
    """A command that keeps running, with the part of Popen's interface that tests use."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.pid: int = process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code.  Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("kwflow", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, but the fork server has not told us yet
            if self._process.exitcode is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: str, log: pathlib.Path, environment: Mapping[str, str] | None = None) -> Started:
    """Start a command that appends its output to this file, which exists when this returns."""
    log.touch()
    return Started(_forked(arguments, environment, os.devnull, str(log), str(log)))


def _forked(arguments: tuple[str, ...], environment: Mapping[str, str] | None, *files: str) -> ForkServerProcess:
    process = _context.Process(target=_be, args=(arguments, dict(os.environ if environment is None else environment), files))
    process.start()
    return process


def _be(arguments: tuple[str, ...], environment: dict[str, str], files: tuple[str, ...]) -> None:
    """Be the command, in the forked process."""
    for number, (name, flags) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_APPEND | os.O_CREAT] * 2), strict=True)):
        os.dup2(os.open(name, flags, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes processes that it starts in the background, such as these tests, ignore it
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(_ROOT)
    sys.path[:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = ["kwflow", *arguments]
    from kwflow.cli import main

    main()
