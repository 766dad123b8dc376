"""What an engine shows while it runs: its log, its HTTP answers, and a bar while it restores."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kwflow.cli.shared import err, error_text, exit_code
from kwflow.config import Config
from kwflow.runners.logs import Line, as_json

__all__ = ["RestoreBar", "carry_logging", "ends_in_its_log", "log_of", "watched"]


def log_of(settings: Config) -> Callable[[str], None]:
    """Where log lines go: standard error, as text or as JSON, with the process's number where there are several.  One that cannot be written is lost, and the engine goes on."""
    number = settings.process if settings.supervisor_pid is not None and "process" in settings.model_fields_set else None
    if settings.log_format == "json":

        def write(line: str) -> None:
            with contextlib.suppress(OSError):
                sys.stderr.buffer.write(as_json(line, process=number) + b"\n")
                sys.stderr.buffer.flush()

        return write
    before = "" if number is None else f"process {number}: "

    def say(line: str) -> None:
        with contextlib.suppress(OSError):
            err.print(before + line, style="red" if getattr(line, "level", "") == "error" else None)

    return say


class _Carried(logging.Handler):
    """What libraries and authors log, as lines of ours; from which level on, their loggers say."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(Line.of(f"{record.name}: {self.format(record)}", record.levelname.lower()))


def carry_logging(log: Callable[[str], None]) -> None:
    """Warnings of libraries, an exporter's for example, and what an author's logger lets through join the log; modules that have set up logging themselves keep theirs."""
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(_Carried(log))


@contextlib.contextmanager
def ends_in_its_log(settings: Config) -> Iterator[None]:
    """What warns of the author's code and what ends the command are lines of its log too: the ones that matter most would be no JSON otherwise."""
    if settings.log_format == "json":
        log = log_of(settings)
        warnings.showwarning = lambda message, category, filename, lineno, *_: log(Line.of(f"{filename}:{lineno}: {category.__name__}: {message}", "warning"))
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        log_of(settings)(Line.of(error_text(error), "error"))
        raise typer.Exit(exit_code(error)) from None


@contextlib.contextmanager
def watched(settings: Config, runners: Sequence[object], log: Callable[[str], None]) -> Iterator[str | None]:
    """Answer on `http` while inside and send spans, each if it is asked for; gives the address where others reach it."""
    if settings.tracing:
        from kwflow.runners.tracing import configure

        configure(settings.application_id)
    if settings.http is None:
        yield None
        return
    from kwflow.runners.watch import advertised, serve_http

    host, _, port_text = settings.http.rpartition(":")
    where = f"{host}:{int(port_text) + settings.process}" if settings.process and port_text.isdigit() and port_text != "0" else settings.http
    with serve_http(where, runners, settings) as port:  # type: ignore[arg-type] # each is a Watched
        served = any(one.instances() is not None for one in runners)  # type: ignore[attr-defined] # workers and gateways have none
        log(f"GET /health{', /metrics and /instances' if served else ' and /metrics'} are answered on port {port}")
        yield advertised(settings, port)


class RestoreBar:
    """A progress bar for each partition that is being restored; `look` is cheap while there is none."""

    def __init__(self, console: Console = err) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._tasks: dict[tuple[str, int], TaskID] = {}

    def look(self, restoring: dict[tuple[str, int], tuple[int, int]]) -> None:
        """(topic, partition) -> (changelog offset reached, its end)."""
        if not restoring and self._progress is None or not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (TextColumn("restoring {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        for where, (reached, end) in restoring.items():
            if where not in self._tasks:
                self._tasks[where] = self._progress.add_task(f"{where[0]}[{where[1]}]", total=end)
            self._progress.update(self._tasks[where], completed=reached)
        for where in self._tasks.keys() - restoring.keys():
            self._progress.remove_task(self._tasks.pop(where))
        if not restoring:
            self._progress.stop()
            self._progress = None
