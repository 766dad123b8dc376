"""The timer table, pure: records on the scheduler topic set, replace and cancel timers; timers that are due become resume records.

SC-1..SC-9.  The key is `<workflow id>|<value>`, the value the delay in ms as text (`0` or null cancels).  The table is
ordered by due time, so that a tick reads only what is due.  This module must not know a clock: the current time is an argument.
"""

from __future__ import annotations

import re

import msgspec

from kwflow.core.wire import DELAY_MS_MAX, Headers, Output, Record, header, travelling_headers
from kwflow.errors import ProtocolError

__all__ = ["COUNT", "DUE", "cancel_or_set", "due_entries", "fire"]

DUE = b"\0due\0"
COUNT = b"\0timers"  # `<number of timers set> <due key before which there is none>`: counting a million entries, or skipping deleted ones, would take seconds
_PACKED = b"\2"  # in the earlier form, no header name began like this
_DELAY = re.compile(rb"[+-]?\d{1,15}")
_INSTANT = re.compile(r"[0-9]{1,15}")  # ms up to the year 33658; int() would accept the digits of any script, and refuse 5000 of them


def _due_key(due_ms: int, offset: int, key: bytes) -> bytes:
    return DUE + b"%020d\0%020d\0" % (due_ms, offset) + key


def _delay_ms(value: bytes | None) -> int:
    if value is None or value.strip() == b"null":
        return 0
    text = value.strip()
    if _DELAY.fullmatch(text) is None:
        raise ProtocolError(f"a delay must be an integer of ms, not {value[:40]!r}", "bad-delay")
    delay = int(text)
    if delay > DELAY_MS_MAX:
        raise ProtocolError(f"a delay is at most {DELAY_MS_MAX} ms, not {delay}", "bad-delay")
    return delay


def cancel_or_set(record: Record, stored: bytes | None) -> dict[bytes, bytes | None]:
    """Return the changes that this record makes to the table.  `stored` is the due key that its timer has now.

    A negative delay is due at once (SC-8).  Raises ProtocolError.
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
        if absolute is not None and _INSTANT.fullmatch(absolute) is None:
            raise ProtocolError(f"kwflow-due-ms must be an integer of ms, not {absolute[:40]!r}", "bad-delay")
        due_key = _due_key(int(absolute) if absolute is not None else record.timestamp_ms + max(0, delay), record.offset, key)
        changes[due_key] = _packed(travelling_headers(record))
        changes[key] = due_key
    return changes


def due_entries(due_key: bytes) -> tuple[int, bytes]:
    """Return the due time in ms and the timer key of a table entry."""
    _, _, due_ms, _, key = due_key.split(b"\0", 4)
    return int(due_ms), key


def fire(due_key: bytes, headers: bytes, resume_topic: str, now_ms: int) -> tuple[dict[bytes, bytes | None], Output]:
    """Return the changes that remove an entry, and its resume record."""
    _, key = due_entries(due_key)
    workflow, _, value = key.partition(b"|")
    return {due_key: None, key: None}, Output(resume_topic, workflow, value, _unpacked(headers), now_ms)


def _packed(headers: Headers) -> bytes:
    """Encode headers for a table entry.  Their values may hold any bytes, so no separator would do."""
    return _PACKED + msgspec.msgpack.encode(headers) if headers else b""


def _unpacked(data: bytes) -> Headers:
    if data.startswith(_PACKED):
        try:
            return msgspec.msgpack.decode(data[1:], type=Headers)
        except msgspec.DecodeError:  # damaged, or forged: the timer fires without them
            return ()
    plain = (pair.partition(b"\1") for pair in data.split(b"\0") if pair)  # the form that 0.1.0 wrote
    return tuple((name.decode("utf-8", "replace"), content) for name, _, content in plain)
