"""Log lines: text that people read, with what it is about beside it for machines."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from kwflow.core.wire import Record
from kwflow.ports import Decision

__all__ = ["Line", "as_json", "lines_of"]

_WARNED = {"dead-letter", "parked"}


class Line(str):
    """A line that has a level, and may be about one record; whoever wants text has it, `as_json` adds the rest."""

    __slots__ = ("level", "record")
    record: Record
    level: str

    @classmethod
    def about(cls, text: str, record: Record, level: str) -> Line:
        line = cls.of(text, level)
        line.record = record
        return line

    @classmethod
    def of(cls, text: str, level: str) -> Line:
        """One about no record."""
        line = cls(text)
        line.level = level
        return line


def lines_of(decision: Decision, record: Record) -> Iterable[Line]:
    """What a decision said about its record."""
    level = "warning" if not _WARNED.isdisjoint(decision.counts) else "info"
    return [Line.about(text, record, level) for text in decision.logs]


def as_json(line: str, now_s: float | None = None, process: int | None = None) -> bytes:
    """One JSON object: time, level, message, the process's number if there are several, and workflow id, topic, partition and offset if it is about a record."""
    at = datetime.fromtimestamp(time.time() if now_s is None else now_s, UTC).isoformat(timespec="milliseconds")
    said: dict[str, Any] = {"time": at, "level": getattr(line, "level", "info"), "message": line.encode("utf-8", "backslashreplace").decode()}
    if process is not None:
        said["process"] = process
    record: Record | None = getattr(line, "record", None)
    if record is not None:
        key = (record.key or b"").decode("utf-8", "backslashreplace")
        said |= {"workflow": key.partition("|")[0], "topic": record.topic, "partition": record.partition, "offset": record.offset}
    return msgspec.json.encode(said)
