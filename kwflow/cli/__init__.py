"""`kwflow …`: one clear line for every error, an exit code (0, 1 error, 2 usage, 3 start me again, 130 interrupted), never a traceback.

One module for each group of commands; `shared.py` has what they have in common.  The commands are put together here.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from typing import Annotated

import typer

import kwflow
from kwflow.cli.bulk import bulk_app
from kwflow.cli.code import code_app
from kwflow.cli.console import console
from kwflow.cli.dead_letters import dead
from kwflow.cli.engines import engine, feed, run, scheduler
from kwflow.cli.gateway import gateway
from kwflow.cli.history import history
from kwflow.cli.instances import checkpoints, list_, show
from kwflow.cli.messages import cancel, fork, pause, query, result, rewind, signal, terminate, unpause, update
from kwflow.cli.records import resume, start, tail
from kwflow.cli.schedules import schedules_app
from kwflow.cli.shared import err, error_text, exit_code, out
from kwflow.cli.topics import reset, topics_app
from kwflow.cli.workers import worker

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"max_content_width": 120})
app.add_typer(dead, name="dead-letters")
app.add_typer(schedules_app, name="schedule")
app.add_typer(topics_app, name="topics")
app.add_typer(code_app, name="code")
app.add_typer(bulk_app, name="bulk")
for _command in (
    engine, worker, scheduler, feed, gateway, console, run, start, resume, signal, update, query, cancel, terminate, pause, unpause, fork, rewind, result, show, checkpoints, history, tail,
    reset,
):  # fmt: skip
    app.command()(_command)
app.command("list")(list_)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"kwflow {kwflow.__version__}")
        raise typer.Exit


@app.callback()
def about(print_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Durable workflows as plain Python generators."""


def _open_streams() -> None:
    """What was closed when we began is /dev/null: an engine's database would get its number, and what libraries say there.  What a terminal cannot show is escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ended() -> int | str | None:
    """What `sys.exit` takes."""
    try:
        app(standalone_mode=True, auto_envvar_prefix="KWFLOW")
    except SystemExit as ended:
        return ended.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        err.print(error_text(error), style="red")
        return exit_code(error)
    return 0


def main() -> None:
    """The entry point: errors become one line."""
    _open_streams()
    code = _ended()
    if "confluent_kafka" in sys.modules and (code is None or isinstance(code, int)):
        # 1. a client that was not closed, perhaps one of the author's module, is dropped as the interpreter ends
        # 2. it has joined a group, and nobody has asked it since: librdkafka waits until somebody does, with a processor of its own
        # 3. the engine, which has told of its end, is never started again
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)
