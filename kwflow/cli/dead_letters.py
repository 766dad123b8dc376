"""`kwflow dead-letters`: records that could not be applied, and parked instances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kwflow.cli.messages import Patience, connect
from kwflow.cli.shared import Application, Bootstrap, ConfigFile, Json, Letter, MaybeDir, columns, err, out, print_json, print_table
from kwflow.config import Config, load_config
from kwflow.core.wire import Record
from kwflow.errors import CommandError, OutcomeUnknown, UsageError
from kwflow.runners.embedded.socket import is_served
from kwflow.runners.letters import Parked, Settled, letters_of, no_such, note_of, parked_of, settle
from kwflow.runners.outside import text_of

__all__ = ["dead"]

dead = typer.Typer(no_args_is_help=True, help="Records that could not be applied, and parked instances.")
_OPEN_MAX = 200  # retries under way
_SHOWN_MAX = 10  # records of a hold that `show` prints
All = Annotated[bool, typer.Option("--all", help="Everything that `dead-letters list` shows.")]
Reason = Annotated[str | None, typer.Option("--reason", help="With --all: only those with this reason.")]
What = Annotated[str | None, typer.Argument(metavar="ID|LETTER", help="Id of a parked instance, or a dead letter as `dead-letters list` names it.")]


@dead.command("list")
def dead_list(
    embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, as_json: Json = False, config: ConfigFile = None
) -> None:  # fmt: skip
    """List what could not be applied, and why: single records, and parked instances with the records held for them.

    Example: kwflow dead-letters list --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    rows: list[dict[str, Any]] = []
    for id, parked in parked_of(settings, embedded).items():
        rows.append({"letter": None, "id": id, "reason": parked.why["reason"], "message": parked.why["message"], "holds": len(parked.hold)})
    for identity, record in letters_of(settings, embedded).items():
        why = {"reason": note_of(record, "reason"), "message": note_of(record, "message")}
        rows.append({"letter": identity, "id": text_of(record.key), **why, "holds": None})
    if as_json:
        print_json(rows)
        return
    table = columns("letter", "id", "reason", "message", "holds")
    for row in rows:
        table.add_row(*["" if value is None else str(value) for value in row.values()])
    print_table(table)


@dead.command("show")
def dead_show(what: Letter, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Show a dead letter with its headers, or a parked instance: why it is parked, where it waits, the record at fault and the records held behind it.

    Example: kwflow dead-letters show order-7 --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    parked = parked_of(settings, embedded).get(what)
    if parked is not None:
        _show_parked(what, parked)
        return
    record = letters_of(settings, embedded).get(what)
    if record is None:
        raise no_such(what)
    _show_record(record)


def _show_parked(id: str, parked: Parked) -> None:
    out.print(f"{id}  {parked.header['workflow']}  parked at offset {parked.why['offset']}: {parked.why['reason']}: {parked.why['message']}")
    for wait in parked.header["waits"]:
        out.print(f"  waits for {wait['kind']} {wait['ref']}  {wait.get('function', '')}  {wait.get('file', '')}:{wait.get('line', '')}")
    if not parked.hold:
        return
    head, *behind = parked.hold
    out.print("the record at fault:")
    _show_record(head)
    if behind:
        out.print(f"{len(behind)} records wait behind it:")
    for record in behind[:_SHOWN_MAX]:
        out.print(f"  {record.topic}[{record.partition}]@{record.offset} {text_of(record.value)}"[:500])
    if len(behind) > _SHOWN_MAX:
        out.print(f"  … and {len(behind) - _SHOWN_MAX} more")


def _show_record(record: Record) -> None:
    out.print(f"{record.topic}[{record.partition}]@{record.offset}\nkey    {text_of(record.key)}\nvalue  {text_of(record.value)}")
    for name, value in record.headers:
        out.print(f"{name}: {text_of(value)}")


@dead.command("retry")
def dead_retry(
    what: What = None,
    every: All = False,
    reason: Reason = None,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    command_timeout: Patience = None,
    config: ConfigFile = None,
) -> None:
    """Apply the records that a parked instance holds, in order, or send a dead-lettered record again. Exit code 1 if it is parked again.

    Example: kwflow dead-letters retry order-7 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, command_timeout_s=command_timeout), embedded, what, every, reason, "retry")


@dead.command("discard")
def dead_discard(
    what: What = None, every: All = False, reason: Reason = None, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None
) -> None:
    """Drop the record that parked an instance and apply the rest, or close a dead letter.

    Example: kwflow dead-letters discard 0:3 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, every, reason, "discard")


def _settle(settings: Config, embedded: Path | None, what: str | None, every: bool, reason: str | None, op: str) -> None:
    if (what is None) != every or (reason is not None and not every):
        raise UsageError(f"give one ID or LETTER, or --all (--reason selects some of them): kwflow dead-letters {op} ...")
    refused = False
    waits = op == "retry" and (embedded is None or is_served(embedded))  # without an engine, nobody would answer
    for one in settle(settings, embedded, what, reason, op, (lambda ids: _retried(settings, embedded, ids)) if waits else None):
        if one.done:
            out.print(f"{one.what}: {one.said}")
        else:
            err.print(f"{one.what}: {one.said}", style="red")
            refused = True
    if refused:
        raise typer.Exit(1)


def _retried(settings: Config, embedded: Path | None, ids: Sequence[str]) -> Iterator[Settled]:
    """Retry these instances, and yield what their engines say became of each."""
    if not ids:
        return
    with connect(settings, embedded) as client:
        for start in range(0, len(ids), _OPEN_MAX):
            for id, future in [(id, client.retry(id)) for id in ids[start : start + _OPEN_MAX]]:
                try:
                    yield Settled(id, "; ".join(["retried", *filter(None, [future.result()])]))
                except CommandError as error:
                    yield Settled(id, error.message or error.status, False)
                except OutcomeUnknown as error:
                    yield Settled(id, f"retry requested; {error.why}")
