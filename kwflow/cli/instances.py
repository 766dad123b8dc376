"""Looking at instances: what their engine says of them, or the changelog; from headers alone, no code of the author's is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kwflow.cli.shared import Application, Bootstrap, ConfigFile, Json, MaybeDir, columns, err, out, print_json, print_table
from kwflow.config import Config, load_config
from kwflow.core import snapshot, wire
from kwflow.core.picture import named
from kwflow.durable import versions
from kwflow.durable.peek import peek_text
from kwflow.errors import UsageError
from kwflow.runners import deployment, outside
from kwflow.runners.checkpoints import extent
from kwflow.runners.instances import Filter, described, instant, places_of, since_ms
from kwflow.runners.outside import code_store, stored

__all__ = ["IdPart", "OfStatus", "OfWorkflow", "Since", "Where", "checkpoints", "list_", "note_source", "show", "wanted_of"]

OfWorkflow = Annotated[str | None, typer.Option("--workflow", help="Only instances of this workflow.")]
OfStatus = Annotated[str | None, typer.Option("--status", help="Only this status: waiting, closing, parked, paused, ended or damaged.")]
Since = Annotated[str | None, typer.Option("--since", help="Changed since then: 30m, 2h, 7d, or an ISO time (UTC).")]
IdPart = Annotated[str, typer.Option("--id", help="Only ids that begin with this; with a leading *, ids that contain it.")]
Where = Annotated[list[str] | None, typer.Option("--where", help="NAME=VALUE in the status set by kw.set_status, such as customer=Ada or order.paid=true; may be given several times.")]

At = Annotated[int | None, typer.Option("--at", help="Show this checkpoint (kwflow checkpoints ID) instead of the present state.")]

_CHARACTERS, _JSON_CHARACTERS = 500, 10_000  # of a variable
_FEW = 3  # of something, in one line
_ROWS_MAX = 1000  # of a table; each costs half a millisecond, and nobody reads more


def wanted_of(workflow: str | None, status: str | None, since: str | None, id: str, where: list[str] | None) -> Filter:
    """What these options ask for.  Raises UsageError."""
    return Filter(status or "", workflow or "", id, since_ms(since), tuple(where or ()))


def _wait(wait: dict[str, Any]) -> list[str]:
    """Kind and ref; and what is waited for, where there is more to say."""
    if wait["kind"] == "timer" and "attempt" in wait:
        return [f"timer {wait['ref']}", f"pause before attempt {wait['attempt']} of {wait['name']}"]
    what = f"{wait['child']} ({wait['workflow']})" if wait["kind"] == "child" else wait.get("name", "")
    return [f"{wait['kind']} {wait['ref']}", *([what + (f" attempt {wait['attempt']}" if "attempt" in wait else "")] if what else [])]


def _heartbeat(given: dict[str, Any]) -> str:
    text = msgspec.json.encode(given["details"]).decode()
    return f"heartbeat {instant(given['at'])}: {text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + '…'}"


def show(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    at: At = None,
    locals: Annotated[bool, typer.Option("--locals", help="Show variables, too; for objects of your classes, what was saved of them.")] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Save the instance to this file (JSON), with the code that it runs and the records that it holds, for WorkflowTester.load.")] = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Show where an instance waits, or failed, from its header alone: none of your code is loaded.

    Example: kwflow show order-7 --locals --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    if save is not None:
        data = _saved(settings, embedded, id, at)
        with open(save, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:  # its variables are in it
            file.write(data)
    header, frames = _found(settings, embedded, id, at, (_JSON_CHARACTERS if as_json else _CHARACTERS) if locals else 0)
    if as_json:
        variables = [{"function": function, "locals": values} for function, values in frames]
        print_json({**header, **({"frames": variables} if locals else {})})
        return
    seal = "" if header["seal"] == "unsigned" and not settings.signing_keys else f"  ({header['seal']})"
    out.print(f"{id}  {header['workflow']}  {header['status']}{seal}{f'  (checkpoint {at})' if at is not None else ''}")
    for line in _about(header, earlier=at is not None):
        out.print(line)
    beats = header.get("heartbeats", {})
    for wait in header["waits"]:
        where = [wait["function"], f"{wait['file']}:{wait['line']}"] if "file" in wait else []
        parts = [*_wait(wait), *where, f"since {instant(wait['since'])}", f"due {instant(wait['due'])}" if "due" in wait else "", _heartbeat(beats[wait["ref"]]) if wait["ref"] in beats else ""]
        out.print("  " + "  ".join(part for part in parts if part))
    for function, values in frames:
        out.print(f"  {function}")
        for name, value in values.items():
            out.print(f"    {name} = {value}")


def _found(settings: Config, embedded: Path | None, id: str, at: int | None, characters: int) -> tuple[dict[str, Any], list[tuple[str, dict[str, str]]]]:
    """What is told of it, and its frames if they are wanted, each variable in so many characters: they leave their engine's machine with the changelog only.  Raises UsageError."""
    if embedded is None and at is None and not characters:
        from kwflow.runners.kafka import asking

        answer = asking.show(settings, id, note_source)
        if answer is not None:
            return answer, []
    data = stored(settings, embedded, id, at)
    shown = described(data, settings.signing_keys)
    body = snapshot.split(data, settings.signing_keys)[1] if characters else b""  # variables only of what is verified, where there are keys
    return shown, peek_text(body, characters, named) if body else []


def _saved(settings: Config, embedded: Path | None, id: str, at: int | None) -> bytes:
    """The instance or its checkpoint, without a signature, the sources that its code is in, and what it holds.  Raises UsageError, SnapshotError."""
    from kwflow.testing import Saved

    found = outside.entry(settings, embedded, wire.key_of(id).decode(), settings.hold_max, at)
    if found is None:
        raise outside.missing(id, at)
    header, body = snapshot.split(found.data, settings.signing_keys)
    was = header.get("parked", {}).get("was", header["status"])
    if was == "ended" or (not body and not found.held):
        raise UsageError(f"{id!r} is not waiting: it has ended; there is nothing to save")
    if was == "damaged":
        raise UsageError(f"{id!r} was parked unread ({header['parked']['message']}), so it is not known what it is; retry it first")
    if found.holds > len(found.held):
        raise UsageError(f"{id!r} holds {found.holds} records, more than hold_max = {settings.hold_max}; raise it in --config to save them all")
    store = code_store(settings, embedded)
    keys = versions.needed((versions.entry_key(name, saved["version"]) for name, saved in deployment.code_of(header)), store.entries)
    sources = {key: store.entries[key].decode() for key in sorted(keys) if key in store.entries}
    return msgspec.json.encode(Saved(snapshot.copy(body, header), sources, tuple(found.held)))


def checkpoints(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List the earlier states that are kept of an instance, and where it waited in each.

    Example: kwflow checkpoints order-7 --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    header = described(stored(settings, embedded, id), settings.signing_keys)
    rows = [{"number": number, **described(data, settings.signing_keys)} for number, data in outside.checkpoints(settings, embedded, id).items()]
    if as_json:
        print_json(rows)
        return
    if not rows:
        err.print(f"{id} has no checkpoints: @kw.workflow(checkpoints=20) makes an engine keep the last 20, from the next step on", markup=False, highlight=False, soft_wrap=True)
    table = columns("checkpoint", "since", "waits", "in")
    for row in [*rows, *([{"number": "now", **header}] if header["status"] != "ended" else [])]:
        run = f"  (run {row['start_id']})" if row.get("start_id") != header.get("start_id") else ""
        shown = [" ".join(_wait(wait)) for wait in row["waits"]]
        table.add_row(str(row["number"]) + run, instant(row["updated"]), _some(shown), _some(places_of(row)))
    print_table(table)


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:_FEW]) + (f" and {len(texts) - _FEW} more" if len(texts) > _FEW else "")


def note_source(why: str) -> None:
    err.print(f"read from the changelog: {why}", style="dim")


def _about(header: dict[str, Any], earlier: bool = False) -> list[str]:
    """What the header, of the present state or an `earlier` one, tells besides its waits, a line each."""
    lines = []
    if "parked" in header:
        parked = header["parked"]
        lines.append(f"paused: {parked['message'] or '(no reason)'}" if header["status"] == "paused" else f"parked at offset {parked['offset']}: {parked['reason']}: {parked['message']}")
    if header.get("start_id"):
        parent = f", child of {header['parent'].partition('|')[0]}" if "parent" in header else ""
        fork = f", a fork of {header['forked']['id']}" if "forked" in header else ""
        lines.append(f"run {header['start_id']}{parent}{fork}")
    first, current = extent(header)
    if current > first and not earlier:
        lines.append(f"checkpoints {first} to {current - 1}")
    if "cancel" in header:
        lines.append(f"cancelled at {instant(header['cancel']['at'])}: {header['cancel']['reason'] or '(no reason)'}")
    if "status_value" in header:
        lines.append(f"status {header['status_value']!r}")
    for kind, boxes in header.get("mailbox", {}).items():
        lines.append(f"unread {kind}s: " + ", ".join(f"{count} {name}" for name, count in boxes.items()))
    if header.get("updates"):
        lines.append(f"unanswered updates: {len(header['updates'])}")
    if "outcome" in header:
        lines.append(f"outcome {header['outcome']['kind']}: {header['outcome']['value']}")
        at = header["outcome"].get("at")
        lines += [f"  in {at['function']}  {at['file']}:{at['line']}"] if at else []
    return lines


def list_(
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    workflow: OfWorkflow = None,
    status: OfStatus = None,
    since: Since = None,
    id: IdPart = "",
    where: Where = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List all instances, or those that match the filters.

    Example: kwflow list --status parked --since 2h --where customer=Ada --embedded ./state
    """
    wanted = wanted_of(workflow, status, since, id, where)
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    found = outside.instances(settings, embedded, wanted, None if as_json else _ROWS_MAX, note_source)
    found.rows.sort(key=lambda row: str(row["id"]))
    if as_json:
        print_json(found.rows)
        return
    table = columns("id", "workflow", "status", "changed", "waits")
    for row in found.rows:
        waits = [" ".join(_wait(wait)) for wait in row["waits"]]
        outcome = row["outcome"]
        table.add_row(row["id"], row["workflow"], row["status"] + (f" ({outcome['kind']})" if outcome else ""), instant(row["changed"]) if row["changed"] else "", _some(waits))
    print_table(table)
    if found.total > len(found.rows):
        err.print(f"and {found.total - len(found.rows)} more that changed earlier: filter with --workflow, --status, --since, --id or --where, or list all with --json")
