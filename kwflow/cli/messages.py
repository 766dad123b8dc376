"""Talking to workflows and waiting for them: each command sends one record and waits for the reply, so what it says is committed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kwflow.cli.shared import Bootstrap, ConfigFile, GivenHeaders, Json, MaybeDir, err, given_headers, json_option, out, print_json
from kwflow.client import Client, Future
from kwflow.config import Config, load_config
from kwflow.errors import CommandError, OutcomeError

__all__ = ["cancel", "connect", "fork", "pause", "query", "result", "rewind", "signal", "terminate", "unpause", "update", "wait_for"]

Value = Annotated[str, typer.Option("--value", help="JSON.")]
Reason = Annotated[str, typer.Option("--reason", help="Reason that queries show; the outcome of terminate contains it, too.")]
StartId = Annotated[str | None, typer.Option("--start-id", help="Only this run of the id.")]
CommandId = Annotated[str | None, typer.Option("--command-id", help="Id of this command: repeated with the same id, it is done once; default: a new id.")]
Patience = Annotated[float | None, typer.Option("--command-timeout", help="Seconds to wait for the reply; default: 20.")]


def connect(settings: Config, embedded: Path | None) -> Client:
    return Client.embedded(embedded, settings) if embedded is not None else Client.kafka(settings)


def wait_for(future: Future[Any], id: str, as_json: bool) -> Any:
    """What it gives; what it raises becomes exit code 1, with `--json` as JSON on the standard output."""
    try:
        return future.result()
    except CommandError as error:
        if not as_json:
            raise
        print_json({"id": id, "status": error.status, "message": error.message})
    except OutcomeError as error:
        if as_json:
            print_json({"id": id, "start_id": error.start_id, "outcome": error.kind, "value": error.value})
        else:
            err.print(f"{error.kind}: {msgspec.json.encode(error.value).decode()}")
    except TimeoutError as error:
        if as_json:
            print_json({"id": id, "outcome": "timeout"})
        else:
            err.print(f"kwflow: {error}", style="red")
    raise typer.Exit(1)


def _send(
    id: str, embedded: Path | None, bootstrap_servers: str | None, config: Path | None, command_timeout: float | None, as_json: bool, call: Callable[[Client], Future[Any]]
) -> Any:
    settings = load_config(config, bootstrap_servers=bootstrap_servers, command_timeout_s=command_timeout)
    with connect(settings, embedded) as client:
        return wait_for(call(client), id, as_json)


def _print_status(id: str, as_json: bool, status: str = "ok") -> None:
    if as_json:
        print_json({"id": id, "status": status})


def signal(
    id: str,
    name: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    value: Value = "null",
    ttl: Annotated[float | None, typer.Option("--ttl", help="Seconds after which the signal is no longer delivered.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start the workflow if none runs under this id.")] = False,
    workflow: Annotated[str | None, typer.Option("--workflow", help="With --start: name of the workflow.")] = None,
    input: Annotated[str, typer.Option("--input", help="With --start: JSON for its argument.")] = "null",
    header: GivenHeaders = None,
    start_id: StartId = None,
    command_id: CommandId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Put a signal into a workflow's mailbox.

    Example: kwflow signal order-7 paid --value '{"amount": 3}' --embedded ./state
    """
    content, argument = msgspec.json.decode(json_option(value, "--value")), msgspec.json.decode(json_option(input, "--input"))
    headers = given_headers(header)

    def call(client: Client) -> Future[Any]:
        if start:
            return client.signal_with_start(id, name, content, workflow=workflow, input=argument, ttl=ttl, start_id=start_id, command_id=command_id, headers=headers)
        return client.signal(id, name, content, ttl=ttl, start_id=start_id, command_id=command_id, headers=headers)

    _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, call)
    _print_status(id, as_json, "delivered")


def update(
    id: str,
    name: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    value: Value = "null",
    start_id: StartId = None,
    command_id: CommandId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Send an update to a workflow and print its reply.

    Example: kwflow update order-7 price --value 5 --embedded ./state
    """
    content = msgspec.json.decode(json_option(value, "--value"))
    replied = _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: client.update(id, name, content, start_id=start_id, command_id=command_id))
    print_json({"id": id, "status": "ok", "value": replied} if as_json else replied)


def query(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    start_id: StartId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Print the status that a workflow has set (kw.set_status), or its outcome; with --json, its whole header.

    Example: kwflow query order-7 --embedded ./state
    """
    shown = _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: client.query(id, start_id=start_id))
    if as_json:
        print_json(shown)
        return
    outcome = shown.get("outcome")
    out.print(f"{id}  {shown['workflow']}  {shown['status']}" + (f"  {outcome['kind']}: {outcome['value']}" if outcome else ""))
    if "status_value" in shown:
        print_json(shown["status_value"])


def _command(name: str, example: str, doc: str) -> Callable[..., None]:
    """cancel, terminate and pause differ in their words only."""

    def command(
        id: str,
        embedded: MaybeDir = None,
        bootstrap_servers: Bootstrap = None,
        reason: Reason = "",
        start_id: StartId = None,
        command_id: CommandId = None,
        command_timeout: Patience = None,
        as_json: Json = False,
        config: ConfigFile = None,
    ) -> None:
        _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: getattr(client, name)(id, reason, start_id=start_id, command_id=command_id))
        _print_status(id, as_json)

    command.__name__ = name
    command.__doc__ = f"{doc}\n\n    Example: {example}"
    return command


cancel = _command("cancel", "kwflow cancel order-7 --reason 'out of stock' --embedded ./state", "Raise kw.Cancelled where a workflow waits, so that it can clean up.")
terminate = _command("terminate", "kwflow terminate order-7 --embedded ./state", "End a workflow without running its code; its timers, activities and children are cancelled.")
pause = _command("pause", "kwflow pause order-7 --reason audit --embedded ./state", "Hold all records for a workflow until it is unpaused.")


def unpause(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    start_id: StartId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Apply the records held for a workflow, in order, and let it continue.

    Example: kwflow unpause order-7 --embedded ./state
    """
    _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: client.unpause(id, start_id=start_id))
    _print_status(id, as_json)


def fork(
    id: str,
    new_id: Annotated[str | None, typer.Argument(metavar="NEW_ID", help="Id of the second instance; on Kafka it must belong to the same partition. Default: generated by the engine.")] = None,
    at: Annotated[int | None, typer.Option("--at", help="Continue from this checkpoint (kwflow checkpoints ID), not from the present state.")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Continue only when it is unpaused, such as after kwflow code migrate --in-place.")] = False,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    start_id: StartId = None,
    command_id: CommandId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Create a second instance that continues from where a workflow waits, and print its id; the first stays as it is.

    Example: kwflow fork order-7 --embedded ./state
    """
    run = _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: client.fork(id, new_id, at=at, paused=paused, start_id=start_id, command_id=command_id))
    if as_json:
        print_json({"id": run.id, "start_id": run.start_id, "status": "ok"})
    else:
        out.print(run.id, markup=False, highlight=False, soft_wrap=True)


def rewind(
    id: str,
    to: Annotated[int, typer.Option("--to", help="Number of the checkpoint (kwflow checkpoints ID).")],
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    start_id: StartId = None,
    command_id: CommandId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Put a workflow back to a checkpoint, from which it continues; its present state becomes a checkpoint.

    Example: kwflow rewind order-7 --to 4 --embedded ./state
    """
    _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: client.rewind(id, to, start_id=start_id, command_id=command_id))
    _print_status(id, as_json)


def result(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    start_id: StartId = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds to wait for the end; default: forever.")] = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Wait for a workflow and print its result; exit code 1 for any other outcome.

    Example: kwflow result order-7 --timeout 60 --embedded ./state
    """
    value = _send(id, embedded, bootstrap_servers, config, command_timeout, as_json, lambda client: client.result(id, start_id=start_id, timeout=timeout))
    print_json({"id": id, "outcome": "result", "value": value} if as_json else value)
