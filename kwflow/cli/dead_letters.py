"""`kwflow dead-letters`: records that could not be applied, and parked instances."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kwflow.cli.shared import Application, Bootstrap, ConfigFile, Json, Letter, MaybeDir, columns, err, out, print_json, print_table, read, sole_writer, states, text_of
from kwflow.config import Config, load_config
from kwflow.core import wire
from kwflow.core.wire import Output, Record
from kwflow.errors import UsageError
from kwflow.runners.groups import Group, Mark, Undone
from kwflow.runners.instances import header_of
from kwflow.runners.parked import ADDRESS, HOLD, holds

__all__ = ["dead"]

dead = typer.Typer(no_args_is_help=True, help="Records that could not be applied, and parked instances.")
_DONE = "kwflow-dead-letter-done"
_FIRST = "kwflow-original-timestamp"
_SHOWN_MAX = 10  # records of a hold that `show` prints
All = Annotated[bool, typer.Option("--all", help="Everything that `dead-letters list` shows.")]
Reason = Annotated[str | None, typer.Option("--reason", help="With --all: only what has this reason.")]
What = Annotated[str | None, typer.Argument(metavar="ID|LETTER", help="A parked instance's id, or a dead letter as `dead-letters list` names it.")]


class Parked(msgspec.Struct, frozen=True):
    """An instance that waits for somebody, and what it holds: the record at fault first."""

    header: dict[str, Any]
    hold: list[Record]

    @property
    def why(self) -> dict[str, Any]:
        found: dict[str, Any] = self.header["parked"]
        return found


def _letters(settings: Config, embedded: Path | None) -> dict[str, Record]:
    """Identity (`<partition>:<offset>`) -> dead letter that nobody has dealt with; those that only tell of a parked instance are left out."""
    letters: dict[str, Record] = {}
    done: set[bytes | None] = set()
    for record in read(settings, embedded, settings.dead_letter_topic):
        reason = wire.header(record, "kwflow-error-reason")
        if reason is None:  # a mark; a letter may bear any header of its sender's, this one too
            done |= {value for name, value in record.headers if name == _DONE}
        elif reason != "parked":
            letters[f"{record.partition}:{record.offset}"] = record
    return {identity: record for identity, record in letters.items() if identity.encode() not in done}


def _parked(settings: Config, embedded: Path | None) -> dict[str, Parked]:
    """Id -> every parked instance; one that is only paused is not at fault."""
    state = states(settings, embedded, lambda key, value: key.startswith(HOLD) or _at_fault(key, value) is not None)
    held = holds(state)
    found = {key.decode(): Parked(header, held.get(key.decode(), [])) for key, stored in state.items() if (header := _at_fault(key, stored)) is not None}
    return dict(sorted(found.items()))


def _at_fault(key: bytes, stored: bytes) -> dict[str, Any] | None:
    header = header_of(stored) if not key.startswith(b"\0") else {}
    return header if header.get("status") == "parked" and header["parked"]["reason"] != "paused" else None


@dead.command("list")
def dead_list(
    embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, as_json: Json = False, config: ConfigFile = None
) -> None:  # fmt: skip
    """What could not be applied, and why: records by themselves, and parked instances with the records that wait behind.

    Example: kwflow dead-letters list --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    rows: list[dict[str, Any]] = []
    for id, parked in _parked(settings, embedded).items():
        rows.append({"letter": None, "id": id, "reason": parked.why["reason"], "message": parked.why["message"], "holds": len(parked.hold)})
    for identity, record in _letters(settings, embedded).items():
        why = {"reason": wire.header(record, "kwflow-error-reason"), "message": wire.header(record, "kwflow-error-message")}
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
    """One dead letter with its headers, or a parked instance: why, where it waits, the record at fault and the hold behind it.

    Example: kwflow dead-letters show order-7 --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    parked = _parked(settings, embedded).get(what)
    if parked is not None:
        _show_parked(what, parked)
        return
    record = _letters(settings, embedded).get(what)
    if record is None:
        raise UsageError(f"{what!r} is no parked instance and no open dead letter; kwflow dead-letters list shows them")
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
    what: What = None, every: All = False, reason: Reason = None, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None
) -> None:
    """Apply what a parked instance holds, in order, or send a dead-lettered record again.

    Example: kwflow dead-letters retry order-7 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, every, reason, "retry")


@dead.command("discard")
def dead_discard(
    what: What = None, every: All = False, reason: Reason = None, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None
) -> None:
    """Drop the record that parked an instance and apply the rest, or close a dead letter.

    Example: kwflow dead-letters discard 0:3 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, every, reason, "discard")


def _settle(settings: Config, embedded: Path | None, what: str | None, every: bool, reason: str | None, op: str) -> None:
    """A parked instance gets the command (K17); a letter is sent again and marked as done in one transaction, so that it is never sent twice."""
    if (what is None) != every or (reason is not None and not every):
        raise UsageError(f"give one ID or LETTER, or --all (with --reason for some of them): kwflow dead-letters {op} ...")
    with sole_writer(settings, embedded, "dead-letters") as write:
        parked, letters = _chosen(settings, embedded, what, reason)
        commands = [Group((Output(settings.resume_topic, id.encode(), b"null", (("kwflow-op", op.encode()),)),)) for id in parked]
        for id, _ in zip(parked, write(commands), strict=True):
            out.print(f"{id}: {op} is asked for; its engine does it")
        empty = [identity for identity, letter in letters.items() if op == "retry" and _is_remnant(letter)]
        for identity in empty:
            place = "{}[{}]@{}".format(*(wire.header(letters[identity], f"kwflow-error-{name}") for name in ("topic", "partition", "offset")))
            err.print(f"{identity}: it holds nothing of its record, which is {place}; send that again from where it came, and discard this", style="red")
        left, refused = [identity for identity in letters if identity not in empty], bool(empty)
        while left:  # one that is refused holds up none of the others
            try:
                for done in write([_closing(settings, identity, letters[identity], op == "retry") for identity in left]):
                    out.print(f"{left.pop(0)}: {('sent again' if op == 'retry' else 'closed') if done else 'somebody else has dealt with it'}")
            except Undone as error:
                err.print(f"{left.pop(0)}: {error}", style="red")
                refused = True
    if refused:
        raise typer.Exit(1)


def _is_remnant(letter: Record) -> bool:
    """Of a record whose letter would have been too much (K11).  Sent again it would be an empty one, whose own letter hides where the first is."""
    return letter.value is None and wire.header(letter, "kwflow-error-reason") == "refused"


def _chosen(settings: Config, embedded: Path | None, what: str | None, reason: str | None) -> tuple[list[str], dict[str, Record]]:
    """Parked instances and letters.  Raises UsageError when there are none."""
    parked, letters = _parked(settings, embedded), _letters(settings, embedded)
    if what is not None:
        parked, letters = {what: parked[what]} if what in parked else {}, {what: letters[what]} if what in letters else {}
    ids = [id for id, found in parked.items() if reason in (None, found.why["reason"])]
    chosen = {identity: record for identity, record in letters.items() if reason in (None, wire.header(record, "kwflow-error-reason"))}
    if not ids and not chosen:
        if what is not None:
            raise UsageError(f"{what!r} is no parked instance and no open dead letter; kwflow dead-letters list shows them")
        raise UsageError("nothing is parked and no dead letter is open" + (f" with reason {reason}" if reason is not None and (parked or letters) else ""))
    return ids, chosen


def _closing(settings: Config, identity: str, letter: Record, again: bool) -> Group:
    """What deals with a letter: the mark, and before it the record itself with its first timestamp in a header (K13).  Its sender was told what became of it, and nobody waits for more."""
    mark = Mark(settings.dead_letter_topic, letter.offset, _DONE, identity.encode())
    records = [Output(settings.dead_letter_topic, letter.key, None, ((mark.name, mark.value),))]
    if again:
        headers = tuple(pair for pair in letter.headers if not pair[0].startswith("kwflow-error-") and pair[0] not in ADDRESS)
        first = () if wire.header(letter, _FIRST) else ((_FIRST, str(letter.timestamp_ms).encode()),)
        records.insert(0, Output(wire.header(letter, "kwflow-error-topic") or settings.resume_topic, letter.key, letter.value, (*headers, *first)))
    return Group(tuple(records), mark)
