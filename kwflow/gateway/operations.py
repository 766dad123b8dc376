"""What each route takes and answers, declared once at its handler, for `openapi.py`.

Callers read a handler's docstring, the first line as a summary.  A handler does not name the words of problems that every
request of its kind may meet: `openapi.py` adds those of admission and of reading a body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from kwflow.errors import KwflowBug
from kwflow.gateway.requests import Options

__all__ = ["ANY", "ENGINE", "HOLD", "VALUE", "Operation", "Text", "operation_of"]

_T = TypeVar("_T", bound=Callable[..., Any])
_ATTRIBUTE = "__kwflow_operation__"
VALUE = "value"  # a body that is one JSON value
ANY = "any"  # a body from a sender that knows nothing of kwflow (callbacks)
ENGINE = ("bad_header", "encrypted", "outcome_unknown", "refused", "too_large", "unreachable", "wrong_partition")  # possible answers to any record for an engine
HOLD = ("discarded", "held", "hold_full")  # possible answers to a record for a parked workflow


class Text(msgspec.Struct, frozen=True):
    """An answer that is not JSON: its media type, its description, and an example."""

    media_type: str
    description: str
    example: str


class Operation(msgspec.Struct, frozen=True):
    """A decorator of handlers.

    `answers` has, for each status, a struct, a list of structs, a `Text`, a tuple of several kinds, or None for no body.  `options` is None if the
    query is ignored; `body` is VALUE, ANY, a struct or None; `keyed` says that Idempotency-Key is accepted; `words` are keys of KINDS.
    """

    name: str
    answers: dict[int, Any]
    options: type[msgspec.Struct] | None = Options
    body: Any = None
    keyed: bool = False
    words: tuple[str, ...] = ()

    def __call__(self, handler: _T) -> _T:
        setattr(handler, _ATTRIBUTE, self)
        return handler


def operation_of(handler: Callable[..., Any]) -> Operation:
    found = getattr(handler, _ATTRIBUTE, None)
    if not isinstance(found, Operation):
        raise KwflowBug(f"{handler!r} answers requests, and no Operation says how")
    return found
