"""Times, sizes and JSON in a form for people."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from kwflow.runners.instances import instant

__all__ = ["When", "json_text", "size", "when"]

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class When(msgspec.Struct, frozen=True):
    """`relative` to now, such as `5 min ago`; `absolute` in UTC."""

    relative: str
    absolute: str


def when(ms: float, now_ms: float) -> When:
    length = _length(int(abs(now_ms - ms) / 1000))
    return When("now" if not length else f"{length} ago" if ms < now_ms else f"in {length}", instant(ms))


def _length(seconds: int) -> str:
    """A length of time in its largest unit, with the rest in the next one; empty for less than a second."""
    for (unit, name), (smaller, its_name) in itertools.pairwise((*_UNITS, (1, ""))):
        if seconds >= unit:
            rest = seconds % unit // smaller if its_name else 0
            return f"{seconds // unit} {name}" + (f" {rest} {its_name}" if rest else "")
    return ""


def size(count: int) -> str:
    return f"{count:,} bytes"


def json_text(value: Any) -> str:
    """JSON, indented for reading."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
