"""The types of what is reported about an instance: in a header that may be unsigned, and in a row that another engine sends.

Nobody checks again after this module: whatever passes can be listed, compared and shown.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kwflow.core.wire import Address
from kwflow.errors import CorruptSnapshotError

__all__ = ["Cancel", "Forked", "Heartbeat", "Outcome", "Parked", "Row", "Wait", "check_rows", "checked_header"]


class Wait(msgspec.Struct):
    """What a workflow waits for."""

    ref: str
    kind: str
    since: float
    due: float = 0
    name: str = ""
    attempt: int = 0
    queue: str = ""
    child: str = ""
    workflow: str = ""
    function: str = ""
    file: str = ""
    line: int = 0


class Parked(msgspec.Struct):
    """Why it is parked or paused, and by which record."""

    reason: str
    message: str
    offset: int
    was: str | None = None
    paused: str | None = None


class Outcome(msgspec.Struct):
    """How it has ended; `value` is JSON as text, null if it is too large to be kept here."""

    kind: str
    value: str | None
    at: dict[str, str | int] = {}


class Cancel(msgspec.Struct):
    """It was cancelled, and why."""

    reason: str
    at: float


class Forked(msgspec.Struct):
    """What it is a fork of."""

    id: str
    start_id: str = ""


class Heartbeat(msgspec.Struct):
    """What a running activity said of its progress, and when."""

    at: float
    details: Any


class _Open(msgspec.Struct):
    """An update that it has accepted and not answered, and who waits for the answer."""

    to: list[Address]
    id: str | None = None


class _Told(msgspec.Struct):
    """The fields of a header that are reported.  Nobody else checks their types, and one bad header would hide all others."""

    workflow: str
    waits: list[Wait]
    start_id: str = ""
    created: float = 0
    updated: float = 0
    ended: float = 0
    applied: tuple[str, int, int] | None = None
    parked: Parked | None = None
    outcome: Outcome | None = None
    cancel: Cancel | None = None
    parent: str = ""
    forked: Forked | None = None
    checkpoints: tuple[int, int] | None = None
    mailbox: dict[str, dict[str, int]] = {}
    updates: dict[str, _Open] = {}
    heartbeats: dict[str, Heartbeat] = {}


class Row(msgspec.Struct):
    """A workflow in a list; `changed` in milliseconds since 1970."""

    id: str
    workflow: str
    status: str
    changed: float
    waits: list[Wait]
    start_id: str = ""
    status_value: Any = None
    outcome: Outcome | None = None


class _Rows(msgspec.Struct):
    rows: list[Row]
    counts: dict[str, int]


def checked_header(header: dict[str, Any]) -> dict[str, Any]:
    """Return the header unchanged.  Raises CorruptSnapshotError if a field has the wrong type."""
    try:
        told = msgspec.convert(header, _Told)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CorruptSnapshotError(f"the header of a snapshot is invalid: {error}") from None
    if header["status"] == "parked" and told.parked is None:
        raise CorruptSnapshotError("the header of a snapshot is invalid: it is parked without a reason")
    return header


def check_rows(answer: Any) -> None:
    """Check the answer of an engine.  Raises msgspec.ValidationError."""
    msgspec.convert(answer, list[Row] | _Rows)
