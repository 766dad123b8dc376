"""`kwflow …`: one clear line for every error, an exit code (0, 1 error, 2 usage, 3 start me again, 130 interrupted), never a traceback.

One module for each group of commands; `shared.py` has what they have in common.  The commands are put together here.
"""

from __future__ import annotations

import os
import sys

import typer

from kwflow.cli.code import code_app
from kwflow.cli.dead_letters import dead
from kwflow.cli.engines import engine, run, scheduler
from kwflow.cli.instances import list_, show
from kwflow.cli.messages import cancel, pause, query, result, signal, terminate, unpause, update
from kwflow.cli.records import resume, start, tail
from kwflow.cli.schedules import schedules_app
from kwflow.cli.shared import err
from kwflow.cli.topics import reset, topics_app
from kwflow.errors import FencedError, KwflowError, TransportError, UnsupportedError, UsageError

__all__ = ["app", "exit_code", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Durable workflows as plain Python generators.", rich_markup_mode=None)
app.add_typer(dead, name="dead-letters")
app.add_typer(schedules_app, name="schedule")
app.add_typer(topics_app, name="topics")
app.add_typer(code_app, name="code")
for _command in (engine, scheduler, run, start, resume, signal, update, query, cancel, terminate, pause, unpause, result, show, tail, reset):
    app.command()(_command)
app.command("list")(list_)


def exit_code(error: TransportError) -> int:
    """3, start me again, where that helps: also when this process was fenced, since another one with its name or its own late transaction did so (K4)."""
    return 3 if error.retryable or isinstance(error, FencedError) else 1


def main() -> None:
    """The entry point: errors become one line."""
    try:
        app(standalone_mode=True, auto_envvar_prefix="KWFLOW")
    except (UsageError, UnsupportedError, SyntaxError) as error:
        err.print(f"kwflow: {error}", style="red", markup=False)
        sys.exit(2)
    except TransportError as error:
        err.print(f"kwflow: {error}", style="red", markup=False)
        sys.exit(exit_code(error))
    except KwflowError as error:
        err.print(f"kwflow: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("KWFLOW_TRACEBACK"):
            raise
        err.print(f"kwflow: {type(error).__name__}: {error} (a bug of kwflow's; KWFLOW_TRACEBACK=1 shows where)", style="red", markup=False)
        sys.exit(1)
