"""`kwflow …`: one clear line for every error, an exit code (0, 1 error, 2 usage, 3 start me again, 130 interrupted), never a traceback.

One module for each group of commands; `shared.py` has what they have in common.  The commands are put together here, each when it is
asked for: importing and preparing all of them would be most of the time that one of them takes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import os
import sys
from collections import UserDict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import kwflow
from kwflow.cli.shared import err, error_text, exit_code, out

__all__ = ["app", "main"]

_COMMANDS = {  # in the order of the help: where each command or group of commands is
    "engine": "engines.engine", "worker": "workers.worker", "scheduler": "engines.scheduler", "feed": "engines.feed", "gateway": "gateway.gateway", "console": "console.console",
    "run": "engines.run", "dev": "dev.dev", "start": "records.start", "resume": "records.resume", "signal": "messages.signal", "update": "messages.update", "query": "messages.query",
    "cancel": "messages.cancel", "terminate": "messages.terminate", "pause": "messages.pause", "unpause": "messages.unpause", "fork": "messages.fork", "rewind": "messages.rewind",
    "result": "messages.result", "show": "instances.show", "checkpoints": "instances.checkpoints", "history": "history.history", "tail": "records.tail", "reset": "topics.reset",
    "list": "instances.list_", "dead-letters": "dead_letters.dead", "schedule": "schedules.schedules_app", "topics": "topics.topics_app", "code": "code.code_app", "bulk": "bulk.bulk_app",
    "export": "archive.export", "import": "archive.import_",
}  # fmt: skip


@functools.cache
def _command(name: str, place: str) -> object:
    """Import this command, or this group of them, and prepare it."""
    module, _, attribute = place.partition(".")
    found = getattr(importlib.import_module(f"kwflow.cli.{module}"), attribute)
    alone = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=name)
    else:
        alone.command(name)(found)
    return typer.main.get_group(alone).commands[name]


class _Prepared(UserDict[str, Any]):
    """What is prepared, by name, of these commands in their places."""

    def __getitem__(self, name: str) -> object:
        return _command(name, self.data[name])


class _Commands(TyperGroup):
    """All of `kwflow`, of which a command line needs one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Prepared(_COMMANDS)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"max_content_width": 120})


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
