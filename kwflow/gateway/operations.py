"""What each route takes and answers, said once where its handler is, for `openapi.py` to tell.

A handler's docstring is what callers read of it: the first line, and what is behind it.  Words of problems that every
request of its kind may meet are not named there: who may enter, and what is wrong with a body, `openapi.py` adds.
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
ANY = "any"  # one of who knows nothing of kwflow (callbacks)
ENGINE = ("bad_header", "encrypted", "outcome_unknown", "refused", "too_large", "unreachable", "wrong_partition")  # what any record for an engine may be answered
HOLD = ("discarded", "held", "hold_full")  # what one for a workflow that is parked is


class Text(msgspec.Struct, frozen=True):
    """An answer that is no JSON: its media type, what it is, and one as it may look."""

    media_type: str
    description: str
    example: str


class Operation(msgspec.Struct, frozen=True):
    """A decorator of handlers.

    `answers` has a struct, a list of them, a `Text`, several kinds in a tuple, or None for no body, for each status; `options` is None where the query is not looked
    at; `body` is VALUE, ANY, a struct or None; `keyed` where Idempotency-Key is taken; `words` are keys of KINDS.
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
