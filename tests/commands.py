"""`kwflow …` in a process of its own that ends by itself, forked from one that has imported kwflow: most of what a command takes is its imports."""

import contextlib
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping

__all__ = ["run"]

_ROOT = pathlib.Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kwflow.cli", "kwflow.client", "kwflow.runners.kafka.link", "kwflow.runners.kafka.upkeep", "tests.commands"])


def run(*arguments: str, environment: Mapping[str, str] | None = None, typed: str = "", seconds: float = 60) -> "subprocess.CompletedProcess[str]":
    """What it said and how it ended, as `subprocess.run` of `python -m kwflow` here would tell.  Raises TimeoutExpired."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.NamedTemporaryFile("w+")) for _ in range(3)]
        files[0].write(typed)
        files[0].flush()
        process = _context.Process(target=_be, args=(arguments, dict(os.environ if environment is None else environment), [file.name for file in files]))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["kwflow", *arguments], seconds)
        said, told = (pathlib.Path(file.name).read_text() for file in files[1:])
        return subprocess.CompletedProcess(["kwflow", *arguments], process.exitcode, said, told)


def _be(arguments: tuple[str, ...], environment: dict[str, str], files: list[str]) -> None:
    """The command, from its begin to its end."""
    for number, (name, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(name, flags), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(_ROOT)
    sys.argv = ["kwflow", *arguments]
    from kwflow.cli import main

    main()
