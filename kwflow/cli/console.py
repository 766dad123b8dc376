"""The web console as a command."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kwflow.cli.messages import connect
from kwflow.cli.serving import without_extra
from kwflow.cli.shared import AppDir, Application, Bootstrap, ConfigFile, LogFormat, MaybeDir
from kwflow.cli.watching import carry_logging, ends_in_its_log, log_of
from kwflow.config import Config, load_config

__all__ = ["console", "prepared"]

_OPTIONAL = ("jinja2", "starlette", "uvicorn")


def console(
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default: all addresses if console_tokens is set, else 127.0.0.1.")] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one, which the log names.")] = 8081,
    read_only: Annotated[bool, typer.Option("--read-only", help="Only show: pages have no forms, and submitted forms are refused.")] = False,
    app_dir: AppDir = None,
    log_format: LogFormat = None,
    config: ConfigFile = None,
) -> None:
    """Show in a browser where workflows wait in their source, and for what, and act on them; runs until SIGTERM (docs/CONSOLE.md).

    Example: kwflow console --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, log_format=log_format)
    log = log_of(settings)
    carry_logging(log)
    serve = prepared(settings, embedded, _site_options(embedded, bootstrap_servers, application_id, config), app_dir, read_only)
    with ends_in_its_log(settings):
        serve(host or ("0.0.0.0" if settings.console_tokens else "127.0.0.1"), port, log)


def prepared(settings: Config, embedded: Path | None, options: list[str], app_dir: Path | None, read_only: bool = False) -> Callable[[str, int, Callable[[str], None]], None]:
    """Return the function that serves the console (host, port, log) until a signal.  Raises UsageError if its packages are missing."""
    try:
        from kwflow.console.server import serve
        from kwflow.console.site import Site
    except ModuleNotFoundError as error:
        raise without_extra("console", _OPTIONAL, error) from None
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises once more what it was ended by, when all is done
        signal.signal(number, lambda *_: None)
    return functools.partial(serve, Site(settings, embedded, lambda: connect(settings, embedded), options, app_dir, read_only))


def _site_options(embedded: Path | None, bootstrap_servers: str | None, application_id: str | None, config: Path | None) -> list[str]:
    """The options that say where the application is, for the command lines that pages show."""
    given = {"--embedded": embedded, "--bootstrap-servers": bootstrap_servers, "--application-id": application_id, "--config": config}
    return [word for name, value in given.items() if value is not None for word in (name, str(value))]
