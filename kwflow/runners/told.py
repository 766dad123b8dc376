"""The kinds of what is told of an instance: of a header that nobody signed, and of a row that another engine sends.

Nobody behind this looks again: whatever passes can be listed, compared and shown.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kwflow.errors import CorruptSnapshotError

__all__ = ["check_rows", "checked_header"]


class _Wait(msgspec.Struct):
    """As snapshot.waits_of has it."""

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


class _Parked(msgspec.Struct):
    reason: str
    message: str
    offset: int
    was: str | None = None


class _Outcome(msgspec.Struct):
    kind: str
    value: str | None
    at: dict[str, str | int] = {}


class _Cancel(msgspec.Struct):
    reason: str
    at: float


class _Forked(msgspec.Struct):
    id: str


class _Told(msgspec.Struct):
    """What is told of a header: nobody else looks whether it is what it should be, and one that is not would hide all others."""

    workflow: str
    waits: list[_Wait]
    start_id: str = ""
    created: float = 0
    updated: float = 0
    ended: float = 0
    applied: tuple[str, int, int] | None = None
    parked: _Parked | None = None
    outcome: _Outcome | None = None
    cancel: _Cancel | None = None
    parent: str = ""
    forked: _Forked | None = None
    mailbox: dict[str, dict[str, int]] = {}
    updates: dict[str, Any] = {}


class _Row(msgspec.Struct):
    """As row_of makes them."""

    id: str
    workflow: str
    status: str
    changed: float
    waits: list[_Wait]
    outcome: _Outcome | None = None


class _Rows(msgspec.Struct):
    rows: list[_Row]
    counts: dict[str, int]


def checked_header(header: dict[str, Any]) -> dict[str, Any]:
    """The same.  Raises CorruptSnapshotError."""
    try:
        told = msgspec.convert(header, _Told)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CorruptSnapshotError(f"the header of a snapshot is none: {error}") from None
    if header["status"] == "parked" and told.parked is None:
        raise CorruptSnapshotError("the header of a snapshot is none: it is parked, and does not say why")
    return header


def check_rows(answer: Any) -> None:
    """Raises msgspec.ValidationError."""
    msgspec.convert(answer, list[_Row] | _Rows)
