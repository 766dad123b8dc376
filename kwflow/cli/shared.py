"""What every group of commands uses: the options and the consoles."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kwflow.core import wire
from kwflow.errors import FencedError, KwflowError, TransportError, UnsupportedError, UsageError

__all__ = [
    "AcceptReset", "AppDir", "Application", "Bootstrap", "ConfigFile", "GivenHeaders", "Http", "Json", "Letter", "LogFormat", "MaybeDir", "Modules", "StateDir", "Traced", "WaitForBroker",
    "columns", "err", "error_text", "exit_code", "given_headers", "json_option", "out", "print_json", "print_table",
]  # fmt: skip

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Plain(Console):
    """Prints what records hold as it is: no markup, no emoji, and nothing that a terminal would obey."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Nobody reads what an engine says any more: it goes on; what was asked for on the standard output ends."""
        if self.stderr:
            self.quiet = True
        else:
            super().on_broken_pipe()

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text), **options)


out, err = _Plain(), _Plain(stderr=True)


def _look_in(directory: Path | None) -> Path | None:
    """Find modules there even if no MODULE is loaded from it: that of oauth_cb."""
    if directory is not None:
        sys.path.insert(0, str(directory))
    return directory


Bootstrap = Annotated[str | None, typer.Option("--bootstrap-servers", help="HOST:PORT of Kafka; default: from the configuration.")]
Application = Annotated[str | None, typer.Option("--application-id", help="Names the consumer group and its topics.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Directory of local state; each engine needs its own.")]
MaybeDir = Annotated[Path | None, typer.Option("--embedded", envvar="KWFLOW_EMBEDDED", help="Directory of the embedded engine, instead of Kafka.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", envvar="KWFLOW_CONFIG", help="Configuration file; default: kwflow.toml in the current directory, if there is one.")]
AppDir = Annotated[Path | None, typer.Option("--app-dir", envvar="KWFLOW_APP_DIR", callback=_look_in, help="Directory where MODULEs are looked up first; default: the current one.")]
AcceptReset = Annotated[bool, typer.Option("--accept-offset-reset", help="Start from the group's offsets even if they differ from the stored ones, or if retention has deleted the next records.")]
WaitForBroker = Annotated[float | None, typer.Option("--wait-for-broker", help="Seconds to wait for the broker and the topics; default: 0.")]
Http = Annotated[str | None, typer.Option("--http", help="HOST:PORT for GET /health, /metrics and /instances; process n of several listens on PORT + n.")]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="text or json; json lines include workflow id, topic, partition and offset.")]
Traced = Annotated[bool, typer.Option("--tracing", envvar="KWFLOW_TRACING", help="Send OpenTelemetry spans as the OTEL_* variables say (needs kwflow[otel]).")]
Letter = Annotated[str, typer.Argument(metavar="ID|LETTER", help="Id of a parked instance, or a dead letter as `dead-letters list` names it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; a list is one array.")]
GivenHeaders = Annotated[list[str] | None, typer.Option("--header", metavar="NAME=VALUE", help="Header that is passed on to timers, activities and outputs; may be given several times.")]
Modules = Annotated[list[str], typer.Argument(help="Dotted names or path.py", metavar="MODULE...")]


def exit_code(error: Exception) -> int:
    """2 for wrong usage; 3, start me again, where that helps: also when this process was fenced, since another one with its name or its own late transaction did so (K4); else 1."""
    if isinstance(error, TransportError):
        return 3 if error.retryable or isinstance(error, FencedError) else 1
    return 2 if isinstance(error, (UsageError, UnsupportedError, SyntaxError)) or _of_argument(error) else 1


def _of_argument(error: Exception) -> bool:
    """An argument was no UTF-8; anywhere else that is a bug, as what is printed is escaped."""
    return isinstance(error, UnicodeEncodeError) and any(error.object in argument for argument in sys.argv[1:])


def error_text(error: Exception) -> str:
    """The line that says what ended a command.  With KWFLOW_TRACEBACK, raises what is a bug of ours."""
    if isinstance(error, (KwflowError, SyntaxError)):
        return f"kwflow: {error}"
    if os.environ.get("KWFLOW_TRACEBACK"):
        raise error
    if (kafka := sys.modules.get("confluent_kafka")) is not None and isinstance(error, kafka.KafkaException):  # what no place knows an answer to
        return f"kwflow: Kafka: {error.args[0].str()}"
    if isinstance(error, UnicodeEncodeError) and _of_argument(error):
        return f"kwflow: {error.object!a} is not valid UTF-8"
    if isinstance(error, OSError):  # it names the thing: a full disk, a file that must not be written
        return f"kwflow: {error}"
    return f"kwflow: {type(error).__name__}: {error} (a bug in kwflow; KWFLOW_TRACEBACK=1 shows where)"


def columns(*names: str) -> Table:
    """A table that cuts nothing off: what is too long goes on in the next line."""
    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """As wide as the terminal; in a pipe as wide as it is, so that each row is a line."""
    if not out.is_terminal and "COLUMNS" not in os.environ:
        table.width = out.measure(table, options=out.options.update(width=1_000_000)).maximum
    out.print(table)


def json_option(text: str, option: str) -> bytes:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        quoted = f"; quote text: {option} '{msgspec.json.encode(text).decode()}'" if re.fullmatch(r"[\w .,:@/-]+", text) else ""
        raise UsageError(f"{option} is not JSON: {error}{quoted}") from None
    return text.encode()


def given_headers(options: list[str] | None) -> wire.Headers:
    """What `--header NAME=VALUE` says.  Raises UsageError."""
    for option in options or ():
        if "=" not in option.removeprefix("="):
            raise UsageError(f"--header must be NAME=VALUE, not {option!r}")
    return wire.given_headers([tuple(option.split("=", 1)) for option in options or ()])


def print_json(value: object) -> None:
    """One line of JSON on the standard output, in ASCII where that is not UTF-8."""
    text = msgspec.json.encode(value).decode()
    out.print(text if out.encoding == "utf-8" else json.dumps(msgspec.json.decode(text), separators=(",", ":")))
