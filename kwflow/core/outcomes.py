"""How the end of a workflow is recorded: headers, errors as values, tracebacks as text (M4)."""

from __future__ import annotations

from typing import Any

from kwflow.core import wire
from kwflow.core.values import json_dumps
from kwflow.errors import Cancelled, WorkflowError

__all__ = ["describe_error", "error_value", "kept", "run_headers", "traceback_text"]

_KEPT_VALUE_BYTES_MAX = 65_536  # M4: the entry that stays after the end holds outcomes up to this size


def run_headers(start_id: str, extra: dict[str, Any]) -> wire.Headers:
    """Return the headers that tell which run a result or error record belongs to, and who started it."""
    client = extra.get("client")
    run = (("kwflow-start-id", start_id.encode()),)
    return run if client is None else (*run, ("kwflow-client", client.encode()))


def kept(kind: str, value: bytes, at: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the outcome in the form of the entry that stays after the end (K20).

    `value` is JSON text; in the entry it is None if it is too large.  `at` is where the workflow failed.
    """
    return {"kind": kind, "value": value.decode() if len(value) <= _KEPT_VALUE_BYTES_MAX else None, **({"at": at} if at else {})}


def describe_error(error: BaseException) -> str:
    """Return `TypeName: message`, or `TypeName` if there is no message (semantics §9.4)."""
    if isinstance(error, Cancelled):
        return "CancelToken"
    try:
        text = str(error)
    except Exception:  # an author's __str__ must not turn an error record into a parked instance
        text = "<no message: __str__ failed>"
    text = text.encode("utf-8", "replace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_value(error: BaseException, bytes_max: int) -> bytes:
    """Return the value of an error record: the payload of a WorkflowError as it is, otherwise the described error."""
    if isinstance(error, WorkflowError):
        try:
            payload = json_dumps(error.payload)
            if len(payload) <= bytes_max:
                return payload
        except (TypeError, ValueError):
            pass
    text = json_dumps(describe_error(error))
    return text if len(text) <= bytes_max else json_dumps(f"{type(error).__name__}: its text has {len(text)} bytes (limit value_bytes_max)")


def traceback_text(error: BaseException) -> bytes:
    """Return the lines in the author's modules that the error came through, outermost first."""
    lines = []
    tb = error.__traceback__
    while tb is not None:
        frame = tb.tb_frame
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(("kwflow.core", "kwflow.durable")):
            lines.append(f"{module}:{tb.tb_lineno} {frame.f_code.co_name}")
        tb = tb.tb_next
    return "\n".join(lines[-50:]).encode("utf-8", "replace")
