"""`kwflow schedule …`: schedules are workflows of kwflow's own; these commands start one and send it signals."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from kwflow import schedules
from kwflow.cli.shared import Application, Bootstrap, ConfigFile, Json, MaybeDir, columns, json_option, print_json, print_table
from kwflow.config import Config, load_config
from kwflow.errors import UsageError
from kwflow.runners.instances import header_of
from kwflow.runners.outside import send, snapshots

__all__ = ["schedules_app"]

schedules_app = typer.Typer(no_args_is_help=True, help="Workflows that start at given times.")
Name = Annotated[str, typer.Argument(metavar="NAME")]


def _signal(settings: Config, embedded: Any, name: str, message: dict[str, Any], plan: dict[str, Any] | None = None) -> None:
    """Signal a schedule; with a plan it is started if it is not there."""
    body: dict[str, Any] = {"name": schedules.SIGNAL, "value": message}
    if plan is not None:
        body["start"] = {"workflow": schedules.WORKFLOW, "input": plan}
    send(settings, embedded, schedules.instance_id(name), msgspec.json.encode(body), (("kwflow-op", b"signal"),))


def _known(settings: Config, embedded: Any) -> dict[str, dict[str, Any]]:
    """Name -> status of every schedule that is there."""
    found, prefix = {}, schedules.instance_id("").encode()
    for key, data in sorted(snapshots(settings, embedded, lambda key, value: key.startswith(prefix)).items()):
        header = header_of(data)
        if header["workflow"] == schedules.WORKFLOW and header["status"] != "ended":
            status = {**header.get("status_value", {}), "status": header["status"]}
            found[key.decode().partition(":")[2]] = status
    return found


def _send(name: str, do: str, embedded: Any, bootstrap_servers: str | None, application_id: str | None, config: Any) -> None:
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    known = _known(settings, embedded)
    if name not in known:
        raise UsageError(f"no schedule {name!r}; there are: {', '.join(known) or 'none'}")
    _signal(settings, embedded, name, {"do": do})


@schedules_app.command()
def add(
    name: Name,
    workflow: Annotated[str, typer.Option("--workflow", help="Name of the workflow to start.")],
    cron: Annotated[str | None, typer.Option("--cron", help="Cron expression with five fields.")] = None,
    every: Annotated[str | None, typer.Option("--every", help="Interval, such as 90s, 5m, 1h30m, 1d.")] = None,
    input: Annotated[str, typer.Option("--input", help="JSON for the workflow's argument.")] = "null",
    timezone: Annotated[str, typer.Option("--timezone", help="Time zone of the cron expression, such as Europe/Berlin.")] = "UTC",
    overlap: Annotated[str, typer.Option("--overlap", help="If a run has not ended yet: skip, queue or allow.")] = "skip",
    catch_up: Annotated[str, typer.Option("--catch-up", help="After downtime, run what was missed within this time.")] = "1h",
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    config: ConfigFile = None,
) -> None:
    """Add a schedule, or change the one with this name.

    Example: kwflow schedule add nightly --cron "0 3 * * *" --timezone Europe/Berlin --workflow report --input '{"days": 1}'
    """
    plan = schedules.checked({
        "name": name, "workflow": workflow, "input": msgspec.json.decode(json_option(input, "--input")), "cron": cron, "every_ms": None if every is None else schedules.duration_ms(every),
        "timezone": timezone, "overlap": overlap, "catch_up_ms": schedules.duration_ms(catch_up),
    })  # fmt: skip
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    _signal(settings, embedded, name, {"do": "set", "plan": plan}, plan)


@schedules_app.command("list")
def list_(
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List all schedules: when they run next, and what became of their runs.

    Example: kwflow schedule list --embedded ./state
    """
    known = _known(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded)
    if as_json:
        print_json([{"name": name, **status} for name, status in known.items()])
        return
    table = columns("name", "when", "workflow", "next", "runs")
    for name, status in known.items():
        plan = status.get("plan", {})
        when = f"{plan.get('cron')} {plan.get('timezone')}" if "cron" in plan else f"every {plan.get('every_ms', 0) / 1000:g} s"
        following = "parked" if status["status"] == "parked" else "paused" if status.get("paused") else status.get("next") or "never"
        counts = [f"{status[count]} {word}" for count, word in (("active", "on"), ("failed", "failed"), ("skipped", "skipped"), ("missed", "missed")) if status.get(count)]
        if status.get("last_failed"):
            counts.append(f"last failed: {status['last_failed']}")
        table.add_row(name, when, plan.get("workflow", ""), following, ", ".join([str(status.get("runs", "")), *counts]))
    print_table(table)


@schedules_app.command()
def pause(name: Name, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Start only runs that are already queued, until the schedule is unpaused; times that pass meanwhile are not made up.

    Example: kwflow schedule pause nightly
    """
    _send(name, "pause", embedded, bootstrap_servers, application_id, config)


@schedules_app.command()
def unpause(name: Name, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Continue a schedule with its next time.

    Example: kwflow schedule unpause nightly
    """
    _send(name, "unpause", embedded, bootstrap_servers, application_id, config)


@schedules_app.command()
def trigger(name: Name, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Start a run now; the overlap policy applies to it, too.

    Example: kwflow schedule trigger nightly
    """
    _send(name, "trigger", embedded, bootstrap_servers, application_id, config)


@schedules_app.command()
def remove(name: Name, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """End a schedule; workflows that it has started continue.

    Example: kwflow schedule remove nightly
    """
    _send(name, "remove", embedded, bootstrap_servers, application_id, config)
