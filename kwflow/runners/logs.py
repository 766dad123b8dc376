"""Log lines: text for people, together with what it is about, for machines."""

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
    """A line that has a level, and may be about one record or have fields of its own.  It is its text; `as_json` adds the rest."""

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
        """A line that is about no record."""
        line = cls(text)
        line.level = level
        return line

    @classmethod
    def failed(cls, text: str, traceback: str, level: str, **fields: Any) -> Line:
        """A line with a traceback, which is below the message in text and a field of its own in JSON."""
        line = cls.of(f"{text}\n{traceback}" if traceback else text, level)
        line.fields = {**fields, "traceback": traceback} if traceback else fields
        return line


def authors_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, with causes, but without frames of kwflow; empty if no other frames are left."""
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
    except Exception as failed:  # an author's exception may itself raise when it is formatted
        return f"<no traceback: {type(failed).__name__}>"
    return text if len(text) <= _TRACEBACK_MAX else f"{text[: _TRACEBACK_MAX // 2]}\n...\n{text[-_TRACEBACK_MAX // 2 :]}"


def lines_of(decision: Decision, record: Record) -> Iterable[Line]:
    """The log lines of a decision, about its record."""
    level = "warning" if not _WARNED.isdisjoint(decision.counts) else "info"
    return [Line.about(text, record, level) for text in decision.logs]


def as_json(line: str, now_s: float | None = None, process: int | None = None) -> bytes:
    """Encode a line as one JSON object.

    It has the time, level and message; the process's number if there are several; the workflow id, topic, partition and offset
    if the line is about a record; and the line's own fields.
    """
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
