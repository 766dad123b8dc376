"""The rows of lists of instances, which other engines send.  Whatever passes here can be compared and shown."""

from __future__ import annotations

from typing import Any

import msgspec

from kwflow.core.header import Outcome, Wait

__all__ = ["Row", "check_rows"]


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


def check_rows(answer: Any) -> None:
    """Check the answer of an engine.  Raises msgspec.ValidationError."""
    msgspec.convert(answer, list[Row] | _Rows)
