"""The timer table, pure: records on the scheduler topic set, replace and cancel; due ones become resume records.

SC-1..SC-9.  Key `<workflow id>|<value>`, value the delay in ms as text (`0` or null cancels).  The table is ordered by
due time, so that a tick reads only what is due.  It must not know a clock: now arrives as an argument.
"""

from __future__ import annotations

from kwflow.core.wire import Output, Record, header, travelling_headers
from kwflow.errors import ProtocolError

__all__ = ["COUNT", "DUE", "cancel_or_set", "due_entries", "fire"]

DUE = b"\0due\0"
COUNT = b"\0timers"  # `<how many are set> <first due key>`: counting a million entries, or passing those that were deleted, would take seconds
_DELAY_MS_MAX = 10 * 366 * 24 * 3600 * 1000  # ten years: a longer one is a mistake in units


def _due_key(due_ms: int, offset: int, key: bytes) -> bytes:
    return DUE + b"%020d\0%020d\0" % (due_ms, offset) + key


def _delay_ms(value: bytes | None) -> int:
    if value is None or value.strip() == b"null":
        return 0
    try:
        delay = int(value)
    except ValueError:
        raise ProtocolError(f"a delay is a whole number of ms, not {value[:40]!r}", "bad-delay") from None
    if delay > _DELAY_MS_MAX:
        raise ProtocolError(f"a delay is at most {_DELAY_MS_MAX} ms, not {delay}", "bad-delay")
    return delay


def cancel_or_set(record: Record, stored: bytes | None) -> dict[bytes, bytes | None]:
    """The changes this record makes to the table; `stored` is the due key that its timer has now.  Raises ProtocolError.

    A negative delay is due at once (SC-8).
    """
    key = record.key
    if key is None or b"|" not in key or key.startswith(b"\0") or not key.partition(b"|")[0]:
        raise ProtocolError("a timer's key is <workflow id>|<value>", "bad-key")
    delay = _delay_ms(record.value)
    changes: dict[bytes, bytes | None] = {}
    if stored is not None:
        changes[stored] = None
        changes[key] = None
    if delay:
        absolute = header(record, "kwflow-due-ms")
        if absolute is not None and not absolute.isdigit():
            raise ProtocolError(f"kwflow-due-ms is a whole number of ms, not {absolute[:40]!r}", "bad-delay")
        due_key = _due_key(int(absolute) if absolute is not None else record.timestamp_ms + max(0, delay), record.offset, key)
        changes[due_key] = b"\0".join(b"%s\1%s" % (name.encode(), value or b"") for name, value in travelling_headers(record))
        changes[key] = due_key
    return changes


def due_entries(due_key: bytes) -> tuple[int, bytes]:
    """(due in ms, timer key) of a table entry."""
    _, _, due_ms, _, key = due_key.split(b"\0", 4)
    return int(due_ms), key


def fire(due_key: bytes, headers: bytes, resume_topic: str, now_ms: int) -> tuple[dict[bytes, bytes | None], Output]:
    """The entry's removal and its resume record."""
    _, key = due_entries(due_key)
    workflow, _, value = key.partition(b"|")
    pairs = tuple((name.decode(), content) for name, _, content in (pair.partition(b"\1") for pair in headers.split(b"\0") if pair))
    return {due_key: None, key: None}, Output(resume_topic, workflow, value, pairs, now_ms)
