"""What all commands share: the batch that a command is part of, the stored header, and the decision with its reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kwflow.config import Config
from kwflow.core import snapshot, updates
from kwflow.core.contract import Context
from kwflow.core.dispatch import Dispatch
from kwflow.core.wire import Command, Output, Record
from kwflow.durable.registry import Module
from kwflow.durable.versions import Sources
from kwflow.errors import SnapshotError
from kwflow.ports import Changes, Decision
from kwflow.runners import parked

__all__ = ["Batch", "done", "header_of", "joined", "replied"]

_COUNTED = {"fork": "forked", "retry": "retried", "discard": "discarded", "rewind": "rewound", "terminate": "terminated", "pause": "paused", "unpause": "unpaused"}


class Batch(Protocol):
    """What a command needs from the batch it is part of."""

    config: Config
    state: Changes
    context: Context
    partitions: int
    sources: Sources

    def stored(self, key: bytes) -> bytes | None:
        """The stored bytes of this id, including everything that this batch did so far."""

    def calls(self, name: str, refs: Sequence[str]) -> dict[str, Dispatch | None]:
        """The activity calls behind these waits, by ref; None for a call that is not stored here."""

    def withdrawn(self, items: Sequence[object]) -> list[Output]:
        """The records that withdraw these calls from queues into which they came by a move."""

    def put(self, key: bytes, data: bytes, modules: Sequence[Module] = ()) -> None:
        """Save an instance in the place of a step; `modules` are the versions that its snapshot names, if they are not those it named before."""

    def keep(self, key: bytes, header: dict[str, Any]) -> None:
        """Keep the current state as a checkpoint, and note so in the header of the state that replaces it, if its workflow has checkpoints."""

    def drain(self, records: list[Record]) -> list[Decision]:
        """Apply held records."""

    def end(self, key: bytes, header: dict[str, Any]) -> None:
        """Replace the instance by the entry that stays after its end, or by nothing."""


def header_of(config: Config, name: str, stored: bytes | None) -> dict[str, Any]:
    """The stored header; that of a damaged instance if it cannot be read."""
    empty = {"id": name, "workflow": "", "status": "damaged", "start_id": "", "waits": []}
    try:
        return {**empty, **snapshot.split(stored, config.signing_keys)[0]} if stored is not None else empty
    except SnapshotError:
        return empty


def replied(batch: Batch, record: Record, status: str, message: str = "", value: object = None, count: str = "", log: str = "") -> Decision:
    """The decision of a command that changes nothing: its reply, and a line in the log if there is something to say."""
    return Decision(logs=(log,) if log else (), counts=(count,), replies=parked.answered(batch.config, record, status, message, value))


def done(batch: Batch, name: str, record: Record, command: Command, status: str, made: Sequence[Decision] = (), message: str = "", value: object = None) -> Decision:
    """The reply, remembered in the header if the instance still has one, joined with everything else that was done.

    Lists show when the instance changed, which is now, however old the records are that it has held.
    """
    key = name.encode()
    stored = batch.state.get(key)
    left = header_of(batch.config, name, stored)
    if stored is not None and left["status"] != "damaged":
        fields: dict[str, Any] = snapshot.changed(left, record.timestamp_ms) if made and command.op != "fork" else {}  # a fork does not change its original
        if command.id is not None:
            fields["ids"] = left.get("ids", {})
            updates.remember(fields["ids"], command.id, status, message, value)
        if fields:
            batch.state.put(key, snapshot.amend(stored, batch.config.signing_keys, **fields))
    mine = Decision(counts=(_COUNTED.get(command.op, command.op),), replies=parked.answered(batch.config, record, status, message, value))
    return joined([mine, *made])


def joined(made: Sequence[Decision]) -> Decision:
    """Join several decisions into one, in order."""
    return Decision(*(tuple(item for decision in made for item in getattr(decision, field)) for field in Decision.__struct_fields__))
