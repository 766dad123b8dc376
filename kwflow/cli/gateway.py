"""The HTTP gateway as a command."""

from __future__ import annotations

import functools
import signal
from typing import Annotated

import typer

from kwflow.cli.engines import open_many_files
from kwflow.cli.messages import connect
from kwflow.cli.serving import without_extra
from kwflow.cli.shared import Application, Bootstrap, ConfigFile, LogFormat, MaybeDir
from kwflow.cli.watching import carry_logging, ends_in_its_log, log_of
from kwflow.config import load_config
from kwflow.errors import UsageError
from kwflow.runners import outside

__all__ = ["gateway"]

_OPTIONAL = ("starlette", "uvicorn")


def gateway(
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default: all addresses if gateway_tokens is set, else 127.0.0.1.")] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one, which the log names.")] = 8080,
    queue: Annotated[list[str] | None, typer.Option("--queue", help="Hand the calls of this queue to workers that speak HTTP; Kafka only; may be given several times.")] = None,
    log_format: LogFormat = None,
    config: ConfigFile = None,
) -> None:
    """Serve HTTP until SIGTERM, for programs in any language (docs/HTTP.md); any number of gateways may run side by side.

    Example: kwflow gateway --port 8080 --bootstrap-servers localhost:9092
    """
    try:
        from kwflow.gateway.server import serve
    except ModuleNotFoundError as error:
        raise without_extra("gateway", _OPTIONAL, error) from None
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, log_format=log_format)
    if queue and embedded is not None:
        raise UsageError("--queue is for Kafka: an embedded engine runs the activities of queues itself")
    log = log_of(settings)
    carry_logging(log)
    open_many_files()
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises once more what it was ended by, when all is done
        signal.signal(number, lambda *_: None)
    look = functools.partial(outside.asked, settings, embedded)
    with ends_in_its_log(settings):
        serve(settings, lambda: connect(settings, embedded), look, host, port, log, list(dict.fromkeys(queue or ())))
