"""migrate, where no step can do it: in place (decision 0061), and of an instance that has failed, which would hold it behind the record at fault."""

from __future__ import annotations

from typing import Any

import msgspec

from kwflow.core import migration, snapshot
from kwflow.core.wire import Command, Record
from kwflow.errors import KwflowBug, SnapshotError
from kwflow.ports import Decision
from kwflow.runners import parked
from kwflow.runners.commands.holds import drain, settled
from kwflow.runners.commands.shared import Batch, done, header_of, replied
from kwflow.runners.deployment import moved_to

__all__ = ["migrate"]

_ANSWERED = {*parked.ADDRESS, "kwflow-id"}  # headers of a command whose reply is not the step's


def migrate(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Move the instance to other code, ahead of what it holds; then apply that, if it was parked because it had failed.

    If it cannot be moved, nothing changes, and the sender and the log are told why.
    """
    stored = batch.state.get(name.encode())
    if stored is None:
        raise KwflowBug("a migrate of nothing")
    failed = parked.has_failed(header)
    try:
        made = _moved(batch, name, stored, record, failed) if command.arguments.in_place else _migrated(batch, name, stored, record)
    except SnapshotError as error:
        return replied(batch, record, "rejected", str(error), count="not-migrated", log=f"{name}: not migrated: {error}")
    if isinstance(made, str):
        return replied(batch, record, "unchanged", made, count="not-migrated")
    status, message = settled(batch, name) if failed else ("ok", "")
    return done(batch, name, record, command, status, made, message)


def _moved(batch: Batch, name: str, stored: bytes, record: Record, failed: bool) -> list[Decision] | str:
    """Move the instance in place.  Returns why there is nothing to move; raises SnapshotError if it cannot be moved."""
    found = snapshot.move(stored, batch.sources, batch.config.signing_keys)
    if found is None:
        return "it runs the code of the engine that was asked; if other code has been deployed, restart the engines first"
    data, modules, frames = found
    if len(data) > batch.config.snapshot_bytes_max:
        raise SnapshotError(f"its snapshot would have {len(data)} bytes, more than snapshot_bytes_max = {batch.config.snapshot_bytes_max}")
    header = snapshot.split(data, batch.config.signing_keys)[0]
    if "checkpoints" in header:
        batch.keep(name.encode(), header)
        data = snapshot.amend(data, batch.config.signing_keys, checkpoints=header["checkpoints"])
    batch.put(name.encode(), data, modules)
    told = Decision(logs=(f"{name}: migrated in place{moved_to(frames)}",))
    return [told, *drain(batch, name, record, discard=False)] if failed else [told]


def _migrated(batch: Batch, name: str, stored: bytes, record: Record) -> list[Decision] | str:
    """Migrate a parked instance by its `@kw.migrate` function, in a step.  Returns that it has none; raises SnapshotError if that fails."""
    key, keys = name.encode(), batch.config.signing_keys
    before = snapshot.unpark(stored, keys)
    if before is None:
        raise SnapshotError("its start failed; once it is retried, it takes the current code")
    instance = snapshot.load(before, batch.sources, keys)
    try:
        if migration.find(instance, batch.context.workflows.migrations) is None:
            return migration.nothing_for(instance)
    finally:
        instance.forget()
    batch.state.put(key, before)
    holding = parked.held_keys(batch.state, name)
    made = batch.drain([msgspec.structs.replace(record, headers=tuple(pair for pair in record.headers if pair[0] not in _ANSWERED))])
    after = header_of(batch.config, name, batch.state.get(key))
    if after["status"] == "parked":
        for added in parked.held_keys(batch.state, name) - holding:
            batch.state.put(added, None)
        batch.state.put(key, stored)
        raise SnapshotError(f"{after['parked']['reason']}: {after['parked']['message']}")
    ahead = batch.state.get(key)
    if ahead is not None:  # the held records have lower offsets than this one, and are still to be applied
        batch.state.put(key, snapshot.amend(ahead, keys, applied=snapshot.split(before, keys)[0].get("applied")))
    rest = parked.park_rest(batch.config, batch.state, name)
    uncounted = [msgspec.structs.replace(one, counts=()) for one in made]
    return uncounted if rest is None else [*uncounted, Decision((rest,))]
