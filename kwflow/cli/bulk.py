"""`kwflow bulk …`: one command for all workflows that a filter finds, each by itself and committed when it is told."""

from __future__ import annotations

import inspect
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import track

from kwflow.cli.instances import IdPart, OfStatus, OfWorkflow, Since, Where, note_source, wanted_of
from kwflow.cli.messages import CommandId, Patience, Reason, Value, connect
from kwflow.cli.shared import Bootstrap, ConfigFile, Json, MaybeDir, err, json_option, out, print_json
from kwflow.client import Client, Future
from kwflow.config import Config, load_config
from kwflow.errors import CommandError, OutcomeUnknown, TransportError, UsageError
from kwflow.runners import outside, parked
from kwflow.runners.instances import ALL, Filter

__all__ = ["bulk_app", "command_each", "found_by"]

bulk_app = typer.Typer(no_args_is_help=True, help="One command for many workflows.")
Everything = Annotated[bool, typer.Option("--everything", help="Without a filter: all workflows that have not ended.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list them.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]

_OPEN_MAX = 200  # commands under way: engines go on with other work between them
_OURS = "kwflow."
_NO_FAULT = ("ok", "not_found", "paused", "unchanged")  # it has ended since the filter found it; is paused, and keeps what was sent; has nothing to migrate
_WAITS_BEHIND = ("cancel", "signal")  # a pause, as their replies do
_NO_SIGNAL = {"name": "", "value": "null"}
_KEPT = "the instance is paused: this is done when it is unpaused"


class _Asked(msgspec.Struct, frozen=True):
    """Whom it is for, where they are, and how it is to be told."""

    wanted: Filter
    settings: Config
    embedded: Path | None
    dry_run: bool
    yes: bool
    as_json: bool


def _each(asked: _Asked, verb: str, command_id: str | None, call: Callable[[Client, str, str, str], Future[Any]]) -> None:
    """`call` it for each of them with its id, its run and the command's id; exit code 1 if any could not be done.  Raises TransportError when engines cannot be reached."""
    found = found_by(asked.wanted, asked.settings, asked.embedded)
    if asked.dry_run:
        for id, start_id, _ in found:
            print_json({"id": id, "start_id": start_id}) if asked.as_json else out.print(id, markup=False, highlight=False, soft_wrap=True)
    many = _counted(found)
    if not found or asked.dry_run:
        err.print(many)
        return
    if not asked.yes and not typer.confirm(f"{verb} {many}?", err=True):
        raise typer.Exit(1)
    command_each(found, asked.settings, asked.embedded, verb, command_id, asked.as_json, verb in _WAITS_BEHIND, call)


def command_each(
    found: list[tuple[str, str, bool]],
    settings: Config,
    embedded: Path | None,
    verb: str,
    command_id: str | None,
    as_json: bool,
    waits_behind: bool,
    call: Callable[[Client, str, str, str], Future[Any]],
) -> None:
    """`call` it for each of these (its id, its run, whether it is paused) with its id, its run and the command's id, as `_each` does.

    `waits_behind` tells that a paused workflow keeps the command until it is unpaused.
    """
    many = _counted(found)
    name = command_id or f"bulk-{uuid.uuid4().hex[:12]}"
    counts: Counter[str] = Counter()
    try:
        with connect(settings, embedded) as client:  # first, as it imports: Python forgets a Ctrl-C that comes while it lets go of a module's lock
            err.print(f"{verb} {many}, --command-id {name}")  # before any is done: who is killed has no last word
            for id, status, message in _done(client, found, lambda id, run: call(client, id, run, name), waits_behind):
                counts[status] += 1
                if as_json:
                    print_json({"id": id, "status": status, **({"message": message} if message else {})})
                elif status != "ok":
                    err.print(f"{id}: {status}{f': {message}' if message else ''}", markup=False)
    except BaseException as error:
        again = f"at least {counts.total():,} of {len(found):,} are done; repeat with --command-id {name}, which does nothing twice"
        if isinstance(error, TransportError):
            why = error.why if isinstance(error, OutcomeUnknown) else error
            raise TransportError(f"{why}; {again}", error.retryable) from None
        err.print(f"interrupted: {again}")  # Ctrl-C; or nobody reads what is printed any more
        raise
    err.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts.keys() - set(_NO_FAULT):
        raise typer.Exit(1)


def _counted(found: list[tuple[str, str, bool]]) -> str:
    return f"{len(found):,} workflow{'s' * (len(found) != 1)}"


def found_by(wanted: Filter, settings: Config, embedded: Path | None, but: tuple[str, ...] = ("ended",)) -> list[tuple[str, str, bool]]:
    """Id and run of those that do not have such a status, and whether it is paused; kwflow's own, such as schedules, only if their workflow is named."""
    rows = outside.instances(settings, embedded, wanted, None, note_source).rows
    return [(row["id"], row["start_id"], row["status"] == "paused") for row in rows if row["status"] not in but and (wanted.workflow or not row["workflow"].startswith(_OURS))]


def _done(client: Client, found: list[tuple[str, str, bool]], call: Callable[[str, str], Future[Any]], waits_behind: bool) -> Iterator[tuple[str, str, str]]:
    """Id, status and message of each, in their order."""
    under_way: deque[_Sent] = deque()
    for id, start_id, paused in track(found, console=err, disable=not err.is_terminal, transient=True):
        try:
            future = call(id, start_id)
        except UsageError as error:  # a damaged store has what no record could have made
            yield id, "bad_id", str(error)
            continue
        under_way.append(_Sent(client, id, start_id, future, client.query(id, start_id=start_id or None) if paused and waits_behind else None))
        while len(under_way) >= _OPEN_MAX:
            yield under_way.popleft().outcome()
    for one in under_way:
        yield one.outcome()


class _Sent(msgspec.Struct, frozen=True):
    """A command under way; behind one to an instance that is paused a query, which is answered in its order though the command is not."""

    client: Client
    id: str
    start_id: str
    future: Future[Any]
    behind: Future[dict[str, Any]] | None

    def outcome(self) -> tuple[str, str, str]:
        """Id, status and message.  Raises TransportError."""
        try:
            if self.behind is not None and self._kept(self.behind):
                return self.id, "paused", _KEPT
            self.future.result()
            return self.id, "ok", ""
        except CommandError as error:
            return self.id, error.status, error.message
        except OutcomeUnknown:  # it was paused meanwhile, perhaps
            if self.behind is not None or not self._kept(self.client.query(self.id, start_id=self.start_id or None)):
                raise
            return self.id, "paused", _KEPT

    def _kept(self, asked: Future[dict[str, Any]]) -> bool:
        try:
            header = asked.result()
        except OutcomeUnknown:  # nobody answers: what is said is said of the command
            return False
        return parked.is_paused(header) and (not self.future.done() or isinstance(self.future.exception(), OutcomeUnknown))


def _apply(
    verb: str,
    name: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    value: Value = "null",
    workflow: OfWorkflow = None,
    status: OfStatus = None,
    since: Since = None,
    id: IdPart = "",
    where: Where = None,
    everything: Everything = False,
    reason: Reason = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    command_id: CommandId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """What all of these commands do; its parameters are theirs."""
    content = msgspec.json.decode(json_option(value, "--value"))
    arguments = {"signal": (name, content), "unpause": ()}.get(verb, (reason,))
    wanted = wanted_of(workflow, status, since, id, where)
    if wanted == ALL and not everything:
        raise UsageError(f"{verb} which workflows? select them with --workflow, --status, --since, --id or --where, or all with --everything")
    asked = _Asked(wanted, load_config(config, bootstrap_servers=bootstrap_servers, command_timeout_s=command_timeout), embedded, dry_run, yes, as_json)
    _each(asked, verb, command_id, lambda client, id, run, command: getattr(client, verb)(id, *arguments, start_id=run or None, command_id=command))


def _command(verb: str, doc: str, example: str, **fixed: Any) -> None:
    """A command with the parameters of `_apply`, but for those that are fixed for its verb."""
    signature = inspect.signature(_apply, eval_str=True)

    def command(**given: Any) -> None:
        _apply(verb, **fixed, **given)

    taken = [parameter for parameter in signature.parameters.values() if parameter.name not in ("verb", *fixed)]
    command.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]  # it is what Typer reads
    bulk_app.command(verb, help=f"{doc}\n\n    Example: {example}")(command)


_command("cancel", "Raise kw.Cancelled in all selected workflows.", "kwflow bulk cancel --workflow order --where region=north --reason recall --embedded ./state", **_NO_SIGNAL)
_command("terminate", "End all selected workflows without running their code.", "kwflow bulk terminate --workflow order --id test- --embedded ./state", **_NO_SIGNAL)
_command("pause", "Hold all records for the selected workflows.", "kwflow bulk pause --workflow order --status waiting --embedded ./state", **_NO_SIGNAL)
_command("unpause", "Apply the records held for the selected workflows, and let them continue.", "kwflow bulk unpause --status paused --embedded ./state", **_NO_SIGNAL, reason="")
_command("signal", "Put the same signal into the mailboxes of all selected workflows.", "kwflow bulk signal price --value 5 --workflow subscription --embedded ./state", reason="")
