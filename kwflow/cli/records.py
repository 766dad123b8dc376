"""Records in and out by hand: start and resume a workflow, follow a topic."""

from __future__ import annotations

import uuid
from typing import Annotated

import msgspec
import typer

from kwflow.cli.messages import connect, wait_for
from kwflow.cli.shared import Bootstrap, ConfigFile, GivenHeaders, Json, MaybeDir, given_headers, json_option, out, print_json
from kwflow.config import load_config
from kwflow.errors import UsageError
from kwflow.runners.outside import read, send, text_of

__all__ = ["resume", "start", "tail"]


def start(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    workflow: Annotated[str | None, typer.Option("--workflow", help="Name of the workflow; default: the engine's first MODULE.")] = None,
    input: Annotated[str, typer.Option("--input", help="JSON for the workflow's argument.")] = "null",
    start_id: Annotated[str | None, typer.Option("--start-id", help="Id of the run: starts repeated with the same id are one run, even after its end; default: a new id.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end and print its result; exit code 1 for any other outcome.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", help="With --wait: seconds to wait; the workflow continues.")] = None,
    header: GivenHeaders = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Start a workflow under an id; if one already runs under it, nothing changes. Without --wait, the start is only written: an unknown workflow becomes a dead letter.

    Example: kwflow start order-7 --input '{"items": 3}' --wait --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers)
    argument, run, given = json_option(input, "--input"), start_id or uuid.uuid4().hex, given_headers(header)
    if wait:
        with connect(settings, embedded) as client:
            value = wait_for(client.start_and_wait(id, msgspec.json.decode(argument), workflow=workflow, start_id=run, timeout=timeout, headers=given), id, as_json)
        print_json({"id": id, "start_id": run, "outcome": "result", "value": value} if as_json else value)
        return
    headers = (*given, ("kwflow-start-id", run.encode()), *([("kwflow-workflow", workflow.encode())] if workflow else []))
    send(settings, embedded, id, b"new:" + argument, headers)
    if as_json:
        print_json({"id": id, "start_id": run})


def resume(
    id: str,
    ref: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    value: Annotated[str | None, typer.Option("--value", help="JSON that the yield returns.")] = None,
    error: Annotated[str | None, typer.Option("--error", help="JSON that is raised as kw.WorkflowError.")] = None,
    config: ConfigFile = None,
) -> None:
    """Answer a wait. The answer is only written; the engine ignores and logs an answer that nobody waits for.

    Example: kwflow resume order-7 0:1 --value '"paid"' --embedded ./state
    """
    if value is not None and error is not None:
        raise UsageError("give --value or --error, not both")
    name, text = ("error", error) if error is not None else ("value", "null" if value is None else value)
    message = b'{"ref":' + msgspec.json.encode(ref) + b',"%s":' % name.encode() + json_option(text, f"--{name}") + b"}"
    send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, message)


def tail(
    topic: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    offset: Annotated[int, typer.Option(help="Start at this offset.")] = 0,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Print the committed records of a topic.

    Example: kwflow tail workflow-result --embedded ./state
    """
    for record in read(load_config(config, bootstrap_servers=bootstrap_servers), embedded, topic, offset):
        if as_json:
            headers = {name: text_of(value) for name, value in record.headers}
            print_json({"partition": record.partition, "offset": record.offset, "timestamp": record.timestamp_ms, "key": text_of(record.key), "value": text_of(record.value), "headers": headers})
        else:
            out.print(f"{record.offset} {text_of(record.key)} {text_of(record.value)}")
