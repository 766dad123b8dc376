"""Records in and out by hand: start and resume a workflow, follow a topic."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from kwflow.cli.shared import Bootstrap, ConfigFile, MaybeDir, json_option, out, read, send, text_of
from kwflow.config import load_config
from kwflow.errors import UsageError

__all__ = ["resume", "start", "tail"]


def start(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    workflow: Annotated[str | None, typer.Option("--workflow", help="Name; default: the engine's first MODULE.")] = None,
    input: Annotated[str, typer.Option("--input", help="JSON for the workflow's argument.")] = "null",
    config: ConfigFile = None,
) -> None:
    """Start a workflow under an id; an id that runs is left alone.

    Example: kwflow start order-7 --input '{"items": 3}' --embedded ./state
    """
    headers = (("kwflow-workflow", workflow.encode()),) if workflow else ()
    send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, b"new:" + json_option(input, "--input"), headers)


def resume(
    id: str,
    ref: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    value: Annotated[str | None, typer.Option("--value", help="JSON that the yield returns.")] = None,
    error: Annotated[str | None, typer.Option("--error", help="JSON that is raised as kw.WorkflowError.")] = None,
    config: ConfigFile = None,
) -> None:
    """Answer a wait.

    Example: kwflow resume order-7 0:1 --value '"paid"' --embedded ./state
    """
    if value is not None and error is not None:
        raise UsageError("give --value or --error, not both")
    name, text = ("error", error) if error is not None else ("value", value or "null")
    message = b'{"ref":' + msgspec.json.encode(ref) + b',"%s":' % name.encode() + json_option(text, f"--{name}") + b"}"
    send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, message)


def tail(topic: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, offset: Annotated[int, typer.Option(help="From this offset on.")] = 0, config: ConfigFile = None) -> None:
    """Print the committed records of a topic.

    Example: kwflow tail workflow-result --embedded ./state
    """
    for record in read(load_config(config, bootstrap_servers=bootstrap_servers), embedded, topic):
        if record.offset >= offset:
            out.print(f"{record.offset} {text_of(record.key)} {text_of(record.value)}", markup=False, highlight=False)
