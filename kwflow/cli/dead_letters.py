"""`kwflow dead-letters`: records that could not be applied, and parked instances."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from rich.table import Table

from kwflow.cli.shared import Application, Bootstrap, ConfigFile, Letter, MaybeDir, append, out, read, text_of
from kwflow.config import Config, load_config
from kwflow.core import wire
from kwflow.core.wire import Record
from kwflow.errors import UsageError

__all__ = ["dead"]

dead = typer.Typer(no_args_is_help=True, help="Records that could not be applied, and parked instances.")
_DONE = "kwflow-dead-letter-done"


def _letters(settings: Config, embedded: Path | None) -> dict[str, Record]:
    """Identity (`<partition>:<offset>`) -> dead letter that nobody has dealt with."""
    letters: dict[str, Record] = {}
    done: set[str | None] = set()
    for record in read(settings, embedded, settings.dead_letter_topic):
        if any(name == _DONE for name, _ in record.headers):
            done.add(wire.header(record, _DONE))
        else:
            letters[f"{record.partition}:{record.offset}"] = record
    return {identity: record for identity, record in letters.items() if identity not in done}


def _letter(settings: Config, embedded: Path | None, identity: str) -> Record:
    found = _letters(settings, embedded).get(identity)
    if found is None:
        raise UsageError(f"no dead letter {identity!r} is open; kwflow dead-letters list shows them")
    return found


@dead.command("list")
def dead_list(embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """What could not be applied, and why.

    Example: kwflow dead-letters list --embedded ./state
    """
    table = Table("letter", "id", "reason", "message")
    for identity, record in _letters(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded).items():
        table.add_row(identity, text_of(record.key), wire.header(record, "kwflow-error-reason"), wire.header(record, "kwflow-error-message"))
    out.print(table)


@dead.command("show")
def dead_show(letter: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """One dead letter with its headers.

    Example: kwflow dead-letters show 0:3 --embedded ./state
    """
    record = _letter(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, letter)
    out.print(f"key    {text_of(record.key)}\nvalue  {text_of(record.value)}", markup=False, highlight=False)
    for name, value in record.headers:
        out.print(f"{name}: {text_of(value)}", markup=False, highlight=False)


@dead.command("retry")
def dead_retry(what: Letter, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Apply what a parked instance holds, in order, or send a dead-lettered record again.

    Example: kwflow dead-letters retry order-7 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, "retry")


@dead.command("discard")
def dead_discard(what: Letter, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Drop the record that parked an instance and apply the rest, or close a dead letter.

    Example: kwflow dead-letters discard 0:3 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, "discard")


def _settle(settings: Config, embedded: Path | None, what: str, op: str) -> None:
    """K17 for a parked instance; a letter is sent again with its first timestamp in a header (K13), then marked as done."""
    if re.fullmatch(r"\d+:\d+", what) is None:
        append(settings, embedded, settings.resume_topic, what.encode(), b"null", (("kwflow-op", op.encode()),))
        return
    record = _letter(settings, embedded, what)
    if wire.header(record, "kwflow-error-reason") == "parked":
        append(settings, embedded, settings.resume_topic, record.key, b"null", (("kwflow-op", op.encode()),))
    elif op == "retry":
        headers = tuple(pair for pair in record.headers if not pair[0].startswith("kwflow-error-"))
        first = ("kwflow-original-timestamp", str(record.timestamp_ms).encode())
        append(settings, embedded, wire.header(record, "kwflow-error-topic") or settings.resume_topic, record.key, record.value, (*headers, first))
    append(settings, embedded, settings.dead_letter_topic, record.key, None, ((_DONE, what.encode()),))
