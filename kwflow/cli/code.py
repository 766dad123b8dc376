"""`kwflow code`: which instances run which code, how it differs, moving them, and clearing up; `kwflow engine --check`."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kwflow.cli.bulk import command_each, found_by
from kwflow.cli.lowered import lowered
from kwflow.cli.messages import CommandId, Patience
from kwflow.cli.shared import AppDir, Application, Bootstrap, ConfigFile, Json, MaybeDir, columns, out, print_json, print_table
from kwflow.client import Client, Future
from kwflow.config import Config, load_config
from kwflow.core import snapshot, wire
from kwflow.core.wire import Output
from kwflow.durable import allow_classes_by_value, allow_modules, find_source, registry, versions
from kwflow.errors import SnapshotError, UsageError
from kwflow.runners import deployment, parked
from kwflow.runners.checkpoints import of_checkpoint
from kwflow.runners.code import LEASE_MS
from kwflow.runners.deployment import Fate
from kwflow.runners.groups import Group
from kwflow.runners.instances import ALL, header_of, instant
from kwflow.runners.migrations import Trial, without_code
from kwflow.runners.modules import load_workflows
from kwflow.runners.outside import all_snapshots, code_store, snapshots, sole_writer, states, stored

__all__ = ["check", "code_app", "prepare_stored"]

code_app = typer.Typer(no_args_is_help=True, help="The code that instances run: old and new versions.")
code_app.command()(lowered)
_SHOWN = 20


@code_app.command("list")
def list_(
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    every: Annotated[bool, typer.Option("--ids", help="All ids, not only the first five.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List every version of a module that is stored, or that an instance runs or has run in a checkpoint.

    Example: kwflow code list --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    store = code_store(settings, embedded)
    running = deployment.versions_in(all_snapshots(settings, embedded))
    rows: list[dict[str, Any]] = []
    for key in sorted({*running, *store.entries}):
        name, _, version = key.rpartition("@")
        ids = running.get(key, [])
        rows.append({"module": name, "version": version, "stored": store.written_ms.get(key), "instances": len(ids), "ids": ids if every else ids[:5]})
    if as_json:
        print_json(rows)
        return
    table = columns("module", "version", "stored", "instances", "ids")
    for row in rows:
        stored = "no" if row["stored"] is None else instant(row["stored"])
        table.add_row(row["module"], row["version"][:12], stored, str(row["instances"]), ", ".join(row["ids"]) + (", …" if len(row["ids"]) < row["instances"] else ""))
    print_table(table)


@code_app.command()
def diff(
    id: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None, app_dir: AppDir = None
) -> None:
    """Compare the stored source of an instance with the source on this machine; nothing is imported.

    Example: kwflow code diff order-7 --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    data = stored(settings, embedded, id)
    store = code_store(settings, embedded)
    for name, saved in deployment.code_of(snapshot.read_header(data)):
        old = deployment.source_of(name, saved["version"], store)
        new = find_source(name, str(app_dir or Path.cwd()))
        title = f"{name}@{saved['version'][:12]}"
        if old is None:
            out.print(f"{title}: its source is not stored")
        elif old == new:
            out.print(f"{title}: unchanged")
        else:
            for line in difflib.unified_diff(old.splitlines(), (new or "").splitlines(), title, name if new is not None else f"{name} (gone)", lineterm=""):
                out.print(line)


@code_app.command()
def migrate(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...")] = None,
    every: Annotated[bool, typer.Option("--all", help="All instances; those that have nothing to migrate are left alone.")] = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="Move each to the same wait of the edited code, instead of calling a migration.")] = False,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    command_id: CommandId = None,
    command_timeout: Patience = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Move waiting instances to the engine's code: with the `@kw.migrate` functions of its modules, or in place. A parked one is retried on it.

    Example: kwflow code migrate order-7 --in-place --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, command_timeout_s=command_timeout)
    if bool(ids) == every:
        raise UsageError("give the ids of instances, or --all")
    found = found_by(ALL, settings, embedded, ("ended", "damaged")) if every else [_waiting(id, settings, embedded) for id in ids or ()]

    def call(client: Client, id: str, run: str, command: str) -> Future[Any]:
        return client.migrate(id, in_place=in_place, start_id=run or None, command_id=command)

    command_each(found, settings, embedded, "migrate", command_id, as_json, not in_place, call)


def _waiting(id: str, settings: Config, embedded: Path | None) -> tuple[str, str, bool]:
    """Its id, its run and whether it is paused.  Raises UsageError if nothing waits under this id."""
    header = header_of(stored(settings, embedded, wire.key_of(id).decode()))
    if header["status"] == "ended":
        raise UsageError(f"{id!r} has ended")
    return id, header.get("start_id", ""), parked.is_paused(header)


@code_app.command()
def gc(
    days: Annotated[float, typer.Option("--older-than", help="Days since a version was last used; at least 2.")] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    config: ConfigFile = None,
) -> None:
    """Remove stored versions that no instance runs and no engine has used for some days.

    Example: kwflow code gc --older-than 30 --embedded ./state
    """
    if days * LEASE_MS < 2 * LEASE_MS:
        raise UsageError("--older-than must be at least 2 days: engines renew the versions that they use only once a day")
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    stored = all_snapshots(settings, embedded)
    unknown = [key.decode() for key, data in sorted(stored.items()) if of_checkpoint(key) is None and header_of(data, snapshot.read_inner_header)["status"] == "damaged"]
    if unknown:
        raise UsageError(f"{unknown[0]} is damaged, so the code that it runs is unknown; repair or terminate it first")
    store = code_store(settings, embedded)  # after them: what an engine began to run meanwhile was written with its first snapshot
    kept = versions.needed(deployment.versions_in(stored), store.entries)
    oldest = time.time_ns() // 1_000_000 - days * 86_400_000
    gone = sorted(key for key in store.entries if key not in kept and store.written_ms[key] < oldest)
    with contextlib.nullcontext(lambda removals: removals) if dry_run else sole_writer(settings, embedded, "code-gc") as write:
        for key, _ in zip(gone, write([Group((Output(settings.code_topic, key.encode(), None, ()),)) for key in gone]), strict=True):
            name, _, version = key.rpartition("@")
            out.print(f"{'would remove' if dry_run else 'removed'} {name}@{version[:12]}")
    out.print(f"{len(gone)} of {len(store.entries)} versions")


def check(settings: Config, modules: Sequence[str], embedded: Path | None, app_dir: Path | None, migrations: bool = False) -> int:
    """Say what a deployment of these modules would do to the instances that wait; the exit code, 1 if any would be parked.

    With `migrations`, their `@kw.migrate` functions are tried as well; then the exit code is also 1 if any fails.
    """
    workflows = load_workflows(list(modules), app_dir, settings.durable_packages)
    allow_modules(settings.snapshot_modules)
    allow_classes_by_value(settings.snapshot_cloudpickle)
    state = states(settings, embedded, lambda key, _: not key.startswith(b"\0") or (migrations and key.startswith(parked.HOLD)))
    stored, store = {key: data for key, data in state.items() if not key.startswith(b"\0")}, code_store(settings, embedded)
    fates = list(deployment.check(stored, store, workflows.migrations, settings.signing_keys))
    counts = Counter(fate.kind for fate in fates)
    out.print(f"{len(fates) - counts['failed']} waiting: {counts['resume']} resume on this code, {counts['old']} stay on old code, {counts['parked']} would be parked")
    _print_fates("stay on old code", [fate for fate in fates if fate.kind == "old"])
    _print_fates("would be parked", [fate for fate in fates if fate.kind == "parked"])
    _print_fates("is parked", [fate for fate in fates if fate.kind == "failed"])
    classes = {(name, cls) for fate in fates for name, changed in fate.changed.items() for cls in changed}
    for name, cls in sorted(classes):
        holders = sum(cls in fate.changed.get(name, ()) for fate in fates)
        out.print(f"class {name}.{cls} has changed since {holders} of these instances were saved")
    for line in without_code(workflows.migrations, store):
        out.print(line)
    failed = _try_migrations(Trial(settings, workflows, store, state), fates, stored) if migrations else 0
    return 1 if counts["parked"] or failed else 0


def _try_migrations(trial: Trial, fates: list[Fate], stored: dict[bytes, bytes]) -> int:
    """Print what the migrations would do to those that they are for; return how many of these they would not migrate."""
    tried = [(fate.id, *trial(fate.id, stored[fate.id.encode()], time.time_ns() // 1_000_000)) for fate in fates if fate.migration]
    failed = sum(not done for _, done, _ in tried)
    out.print(f"{len(tried) - failed} would be migrated by @kw.migrate, {failed} would not")
    for title, wanted in (("would not be migrated", False), ("would be migrated", True)):
        chosen = [(id, said) for id, done, said in tried if done is wanted]
        for id, said in chosen[:_SHOWN]:
            out.print(f"{title}: {id}  {said}", markup=False)
        if len(chosen) > _SHOWN:
            out.print(f"… and {len(chosen) - _SHOWN} more")
    return failed


def prepare_stored(settings: Config) -> None:
    """Load the stored versions that instances on Kafka run beside the modules that are here, as an engine will; what cannot be loaded parks them, not us."""
    store = code_store(settings, None)
    if any((current := registry.modules().get(key.rpartition("@")[0])) is None or current.version != key.rpartition("@")[2] for key in store.entries):
        for key in deployment.versions_in(snapshots(settings, None)):
            with contextlib.suppress(SnapshotError):
                versions.prepare(key, store)


def _print_fates(title: str, fates: list[Fate]) -> None:
    for fate in fates[:_SHOWN]:
        said = [*fate.why, *(["a migration is there"] if fate.migration else []), *([fate.in_place] if fate.in_place else [])]
        out.print(f"{title}: {fate.id}  {'; '.join(said)}")
    if len(fates) > _SHOWN:
        out.print(f"… and {len(fates) - _SHOWN} more")
