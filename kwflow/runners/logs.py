"""Log lines: text that people read, with what it is about beside it for machines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from traceback import FrameSummary, StackSummary, TracebackException
from typing import Any

import msgspec

from kwflow.core.wire import Record
from kwflow.ports import Decision

__all__ = ["Line", "as_json", "authors_traceback", "lines_of"]

_WARNED = {"dead-letter", "parked"}
_OURS = str(Path(__file__).parents[1]) + os.sep
_FRAMES = 20  # of each error, the innermost
_TRACEBACK_MAX = 10_000  # characters


class Line(str):
    """A line that has a level, and may be about one record or have fields of its own; whoever wants text has it, `as_json` adds the rest."""

    __slots__ = ("fields", "level", "record")
    fields: dict[str, Any]
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

    @classmethod
    def failed(cls, text: str, traceback: str, level: str, **fields: Any) -> Line:
        """One with a traceback, below it as text and a field of JSON."""
        line = cls.of(f"{text}\n{traceback}" if traceback else text, level)
        line.fields = {**fields, "traceback": traceback} if traceback else fields
        return line


def authors_traceback(error: BaseException) -> str:
    """As Python prints it, causes too, without frames of ours; empty if no others are left."""
    try:
        told = TracebackException.from_exception(error, limit=-_FRAMES, compact=True)
        inside, frames = [told], 0
        while inside:
            one = inside.pop()
            inside += [other for other in (one.__cause__, one.__context__, *(one.exceptions or ())) if other is not None]
            # columns are left out: to mark them, Python 3.11 calls ast.parse, which no two threads may do at a time
            one.stack = StackSummary.from_list([FrameSummary(frame.filename, frame.lineno, frame.name, line=frame.line) for frame in one.stack if not frame.filename.startswith(_OURS)])
            frames += len(one.stack)
        text = _sendable("".join(told.format()).rstrip("\n")) if frames else ""
    except Exception as failed:  # an author's error may raise where it is looked at
        return f"<no traceback: {type(failed).__name__}>"
    return text if len(text) <= _TRACEBACK_MAX else f"{text[: _TRACEBACK_MAX // 2]}\n...\n{text[-_TRACEBACK_MAX // 2 :]}"


def lines_of(decision: Decision, record: Record) -> Iterable[Line]:
    """What a decision said about its record."""
    level = "warning" if not _WARNED.isdisjoint(decision.counts) else "info"
    return [Line.about(text, record, level) for text in decision.logs]


def as_json(line: str, now_s: float | None = None, process: int | None = None) -> bytes:
    """One JSON object: time, level, message, the process's number if there are several, workflow id, topic, partition and offset if it is about a record, and its own fields."""
    at = datetime.fromtimestamp(time.time() if now_s is None else now_s, UTC).isoformat(timespec="milliseconds")
    fields: dict[str, Any] = getattr(line, "fields", {})
    said: dict[str, Any] = {"time": at, "level": getattr(line, "level", "info"), "message": _sendable(line.removesuffix(f"\n{fields.get('traceback')}"))}
    if process is not None:
        said["process"] = process
    said |= {name: _sendable(value) if isinstance(value, str) else value for name, value in fields.items()}
    record: Record | None = getattr(line, "record", None)
    if record is not None:
        key = (record.key or b"").decode("utf-8", "backslashreplace")
        said |= {"workflow": key.partition("|")[0], "topic": record.topic, "partition": record.partition, "offset": record.offset}
    return msgspec.json.encode(said)


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
