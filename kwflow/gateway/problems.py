"""Which error is which HTTP status: every such mapping is here, and covers every error (RFC 9457).

A word names each kind of problem: the unchanged `status` of a CommandError, or a word of the gateway's own.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kwflow.errors import CommandError, KwflowError, OutcomeError, OutcomeUnknown, ProtocolError, TransportError, UsageError

__all__ = ["KINDS", "Details", "Kind", "Problem", "RequestError", "problem_of"]


class Kind(msgspec.Struct, frozen=True):
    """One kind of problem: its HTTP status, what it is, and what to do about it."""

    http: int
    title: str
    remedy: str


class Details(msgspec.Struct, frozen=True):
    """What went wrong, and what to do (RFC 9457); more of it where more is known."""

    type: Annotated[str, Meta(description="urn:kwflow:CODE.")]
    title: Annotated[str, Meta(description="What kind of problem it is.")]
    status: int
    detail: Annotated[str, Meta(description="What is wrong with this request.")]
    code: Annotated[str, Meta(description="The word to branch on; later versions may have more of them.")]
    remedy: Annotated[str, Meta(description="What to do.")]
    id: Annotated[str | UnsetType, Meta(description="The workflow.")] = UNSET
    start_id: Annotated[str | UnsetType, Meta(description="The start_id of the run that has ended.")] = UNSET
    outcome: Annotated[str | UnsetType, Meta(description="error, cancelled or terminated: how it ended (424).")] = UNSET
    value: Annotated[Any, Meta(description="Its outcome, any JSON (424).")] = UNSET
    command_id: Annotated[str | UnsetType, Meta(description="The Idempotency-Key under which to send it again (504).")] = UNSET


class Problem(msgspec.Struct, frozen=True):
    """An answer for a problem; `body` is application/problem+json."""

    http: int
    body: Details
    headers: dict[str, str] = {}


class RequestError(KwflowError):
    """The request itself cannot be served; `word` is a key of KINDS."""

    def __init__(self, word: str, message: str) -> None:
        super().__init__(word, message)
        self.word = word
        self.message = message

    def __str__(self) -> str:
        return self.message


_RECORD = "fix the request: it contains text that a record cannot hold"
KINDS: dict[str, Kind] = {
    # what an engine replies
    "bad_arguments": Kind(400, "an argument has an invalid value", "fix the argument that is named"),
    "bad_header": Kind(400, "an id in the request is invalid", "ids of starts and commands have 1 to 1,200 characters"),
    "bad_input": Kind(422, "the workflow does not accept this input", "send input that matches its annotation"),
    "bad_json": Kind(400, "the body is not JSON", "send JSON in UTF-8; quote text"),
    "bad_key": Kind(400, "this is not a workflow id", "use one of 1 to 512 bytes without NUL and |"),
    "bad_message": Kind(400, "the engine does not understand the record", _RECORD),
    "discarded": Kind(409, "an operator has discarded it", "send it again if it still matters"),
    "encrypted": Kind(500, "the engine does not have the key of the gateway", "give engines and gateways the same encryption_keys; what was sent is a dead letter"),
    "ended": Kind(409, "the workflow has ended", "ask for its outcome"),
    "exists": Kind(409, "another run has this id", "use another id, or the start_id of that run"),
    "full": Kind(429, "its mailbox is full", "send it again once the workflow has read some"),
    "held": Kind(423, "the workflow is parked or paused", "do not repeat it: it is kept, and applied when an operator retries (kwflow dead-letters) or unpauses the workflow"),
    "hold_full": Kind(429, "the workflow is parked or paused, and cannot hold more records", "send it again once an operator has dealt with it"),
    "mailbox_full": Kind(429, "its mailbox is full", "send it again once the workflow has read some"),
    "not_found": Kind(404, "there is no such run", "check the id and the start_id; ended runs are forgotten after ended_retention_ms"),
    "null_key": Kind(400, "the engine does not understand the record", _RECORD),
    "null_value": Kind(400, "the engine does not understand the record", _RECORD),
    "parked": Kind(423, "it is done, and the workflow is parked again", "an operator sees what it holds and why (kwflow dead-letters)"),
    "paused": Kind(423, "the workflow is paused", "unpause it first"),
    "refused": Kind(422, "the engine cannot apply it", "fix what the message names"),
    "rejected": Kind(422, "the workflow rejects it", "fix the value as the message says"),
    "repeated": Kind(409, "it was done before, and its answer is no longer kept", "do not repeat it; ask for the status of the workflow"),
    "too_large": Kind(413, "it is too large", "send a reference instead, or raise value_bytes_max"),
    "unchanged": Kind(409, "there was nothing to change", "nothing"),
    "unknown_op": Kind(400, "the engine does not know this command", "run engines of the gateway's version"),
    "unknown_ref": Kind(404, "nobody waits for this ref", "perhaps it was answered before; GET the workflow to see what it waits for"),
    "unknown_workflow": Kind(404, "no workflow has this name", "use one of those that are named, or deploy it"),
    "wrong_partition": Kind(409, "topics and engines disagree about partitions", "run kwflow topics check"),
    # how an awaited workflow ended
    "error": Kind(424, "the workflow failed", "see value"),
    "cancelled": Kind(424, "the workflow was cancelled", "see value"),
    "terminated": Kind(424, "the workflow was terminated", "see value"),
    # what the gateway says itself
    "usage": Kind(400, "the request is wrong", "fix what the message names"),
    "protocol": Kind(400, "the engine does not understand the record", _RECORD),
    "unauthorized": Kind(401, "no token, or an unknown one", "send Authorization: Bearer with one of gateway_tokens"),
    "web_page": Kind(403, "a web page may have sent this, and the gateway has no tokens", "set gateway_tokens and send one; or call the gateway as localhost, or start it with --host"),
    "no_queue": Kind(404, "this gateway does not serve this queue", "start it with --queue, or ask another gateway"),
    "locked": Kind(409, "another worker has this call", "leave the call to that worker"),
    "not_locked": Kind(409, "this worker has not locked the call, or the lock has expired", "fetch it again"),
    "no_path": Kind(404, "there is no such path", "see docs/HTTP.md"),
    "no_method": Kind(405, "the path has no such method", "see docs/HTTP.md"),
    "slow": Kind(408, "the body did not arrive", "send it again"),
    "nobody_waits": Kind(410, "nobody waits for this callback, or no longer", "do not send it again"),
    "bug": Kind(500, "a bug in kwflow", "see the log of the gateway"),
    "busy": Kind(503, "too many requests are waiting here", "send it again, to another gateway if there is one; or raise gateway_waits_max"),
    "unreachable": Kind(503, "the engines cannot be reached", "send it again; if the problem persists, fix what detail names"),
    "outcome_unknown": Kind(504, "no broker or no engine has replied: it may be done, or be done later", "send it again under the same Idempotency-Key: it is done once"),
}
_ANOTHER = Kind(409, "the engine refuses it", "see detail; engines of another version may know more reasons than this gateway")
_RETRY_AFTER_S = 1
_WORDS: tuple[tuple[type[Exception], str], ...] = ((OutcomeUnknown, "outcome_unknown"), (TransportError, "unreachable"), (ProtocolError, "protocol"), (UsageError, "usage"))  # the first that fits


def problem_of(error: Exception) -> Problem:
    """The answer when this error was raised."""
    if isinstance(error, CommandError):
        return _problem(error.status, error.message, {"id": error.id})
    if isinstance(error, OutcomeError):
        return _problem(error.kind, str(error), {"id": error.id, "start_id": error.start_id, "outcome": error.kind, "value": error.value})
    if isinstance(error, RequestError):
        return _problem(error.word, error.message)
    word = next((word for kind, word in _WORDS if isinstance(error, kind)), "bug")
    if isinstance(error, OutcomeUnknown) and error.command_id:
        return _problem(word, str(error), {"command_id": error.command_id})
    return _problem(word, str(error) if word != "bug" else type(error).__name__)


def _problem(word: str, detail: str, more: dict[str, Any] | None = None) -> Problem:
    kind = KINDS.get(word, _ANOTHER)
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if kind.http in (429, 503) else {"WWW-Authenticate": "Bearer"} if kind.http == 401 else {}
    return Problem(kind.http, Details(f"urn:kwflow:{word}", kind.title, kind.http, detail or kind.title, word, kind.remedy, **(more or {})), headers)
