"""The header of a snapshot: the types of its entries.

Without keys, whoever may write to the changelog may write any header, and commands act on headers alone.  So its types are
checked where it is decoded (`snapshot.py`), and nobody checks them again.  Entries that are unknown here are of a later kwflow.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from kwflow.core.contract import CHECKPOINTS_MAX
from kwflow.core.wire import Address, is_engine_id
from kwflow.errors import CorruptSnapshotError

__all__ = ["Cancel", "Forked", "Heartbeat", "Outcome", "Parked", "Wait", "check"]

Ms = int  # since 1970

_NEEDED = {"activity": "ref", "child": "child", "job": "queue"}  # by kind of wait: the entry by which whoever works for it is told that nobody waits any more


class Wait(msgspec.Struct):
    """What a workflow waits for."""

    ref: str
    kind: str
    since: Ms
    due: Ms = 0
    name: str = ""
    attempt: int = 0
    queue: str = ""
    child: str = ""
    workflow: str = ""
    function: str = ""
    file: str = ""
    line: int = 0


class Outcome(msgspec.Struct):
    """How it has ended; `value` is JSON as text, null if it is too large to be kept here."""

    kind: str
    value: str | None
    at: dict[str, str | int] = {}


class Parked(msgspec.Struct):
    """Why it is parked or paused, and by which record."""

    reason: str
    message: str
    offset: int
    was: str | None
    paused: str | UnsetType = UNSET


class Cancel(msgspec.Struct):
    """It was cancelled, and why."""

    reason: str
    at: Ms


class Forked(msgspec.Struct):
    """What it is a fork of."""

    id: str
    start_id: str = ""


class Heartbeat(msgspec.Struct):
    """What a running activity said of its progress, and when."""

    at: Ms
    details: Any


class _Open(msgspec.Struct):
    """An update that it has accepted and not answered, and who waits for the answer."""

    to: list[Address]
    id: str | None = None


class _Code(msgspec.Struct):
    """The version of a module in whose code it waits, and the hashes of the functions."""

    version: str
    units: dict[str, str]


class _Header(msgspec.Struct):
    id: str
    status: str
    workflow: str
    start_id: str
    waits: list[Wait]
    created: Ms = 0
    updated: Ms = 0
    ended: Ms | UnsetType = UNSET
    applied: tuple[str, int, int] | None = None
    code: dict[str, _Code] = {}
    lowering: int = 0
    minor: str = ""
    parked: Parked | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    cancel: Cancel | UnsetType = UNSET
    client: str = ""
    parent: str = ""
    forked: Forked | UnsetType = UNSET
    checkpoints: tuple[int, int] = (0, 0)
    calls: list[dict[str, Any]] = []
    ids: dict[str, tuple[str, str, Any]] = {}
    mailbox: dict[str, dict[str, int]] = {}
    updates: dict[str, _Open] = {}
    heartbeats: dict[str, Heartbeat] = {}
    trace: dict[str, str] = {}
    moves: Annotated[int, msgspec.Meta(ge=0, lt=100_000)] = 0


def check(header: Any) -> dict[str, Any]:
    """Return the header unchanged.  Raises CorruptSnapshotError if an entry has the wrong type, or is missing."""
    try:
        told = msgspec.convert(header, _Header)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CorruptSnapshotError(f"the header of a snapshot is invalid: {error}") from None
    for status, entry in (("parked", told.parked), ("ended", told.ended)):
        if told.status == status and entry is UNSET:
            raise CorruptSnapshotError(f"the header of a snapshot is invalid: its status is {status}, and it has no `{status}`")
    for wait in told.waits:
        if wait.kind in _NEEDED and not (is_engine_id(wait.ref) and getattr(wait, _NEEDED[wait.kind])):
            raise CorruptSnapshotError(f"the header of a snapshot is invalid: it waits for {wait.kind} {wait.ref!r}")
    first, current = told.checkpoints
    if not 0 <= first <= current <= first + CHECKPOINTS_MAX:
        raise CorruptSnapshotError(f"the header of a snapshot is invalid: checkpoints {first} to {current}")
    return header  # type: ignore[no-any-return]
