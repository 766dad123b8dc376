"""Activity calls for workers that speak only HTTP: fetch and lock, then complete, fail or reject (ET-3..ET-19).

An answer is sent through the client, as all answers are, so 204 means that it is committed, and any gateway accepts it.  Only
the gateway that handed a call out knows who has locked it, by its `kwflow.worker.Lending`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.core import queues, wire
from kwflow.core.dispatch import Dispatch
from kwflow.core.wire import Headers
from kwflow.errors import CommandError, OutcomeUnknown
from kwflow.gateway.answers import LentCall, Locked
from kwflow.gateway.operations import ENGINE, HOLD, VALUE, Operation
from kwflow.gateway.problems import RequestError
from kwflow.gateway.requests import Options, Wait, answer, body, no_body, options, segment, service_of
from kwflow.worker import Lending

__all__ = ["ROUTES", "travelling"]

_LOCK_S_MAX = 86_400
_OF_A_REQUEST = 1_000  # bytes for the headers by which the client gets its reply
_OVER = ("discarded", "held", "hold_full", "not_found", "unknown_ref")  # what an engine says of an answer that leaves nothing to do for workers; the operator has it, perhaps as a dead letter
_Lock = Annotated[float, msgspec.Meta(gt=0, le=_LOCK_S_MAX, description="Seconds during which nobody else gets the call.")]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, description="A name that the worker chooses; its locks belong to this name.")]
_Text = Annotated[str, msgspec.Meta(max_length=2_000)]


class _Fetch(Options, frozen=True):
    worker: _Name
    max: Annotated[int, msgspec.Meta(ge=1, le=100, description="Maximum number of calls.")] = 1
    lock: _Lock = 60
    wait: Wait = 0


class _By(Options, frozen=True):
    worker: _Name


class _Locking(_By, frozen=True):
    lock: _Lock = 60


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An attempt failed: it is tried again as the activity's `Retry` says, unless `final`."""

    message: _Text
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] = "ActivityError"
    details: Any = None
    final: bool = False


class Rejected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An outcome that is no result, a kw.BusinessError at the yield: never tried again."""

    code: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    message: _Text = ""
    variables: Any = None


def _lending(request: Request) -> Lending:
    lendings, name = service_of(request).lendings, segment(request, "queue")
    if name not in lendings:
        raise RequestError("no_queue", f"queue {name[:249]!r}; here are: {', '.join(lendings) or 'none'}")
    return lendings[name]


@Operation("fetch_calls", {200: list[LentCall]}, _Fetch, words=("no_queue",))
async def _fetch(request: Request) -> Response:
    """Lock calls that nobody else has, the oldest first; an empty list if there was none within `wait` seconds."""
    asked, lending, service = options(request, _Fetch), _lending(request), service_of(request)
    give_up = time.monotonic() + service.seconds(asked.wait)
    await no_body(request)
    while True:
        calls = lending.lent.fetch(asked.max, asked.worker, asked.lock)
        left = give_up - time.monotonic()
        if calls or left <= 0 or service.ending:
            now_ms = time.time_ns() // 1_000_000
            for call in calls:
                request.app.state.waits.labels(lending.queue).observe(max(0, now_ms - call.called_ms) / 1000)
            return answer(200, [_shown(call, service.config.resume_topic, now_ms + round(asked.lock * 1000)) for call in calls])
        await service.first(request, left, lending.lent.arrival(), ends=True)


def _shown(call: Dispatch, resume_topic: str, until_ms: int) -> LentCall:
    """A call as workers see it: the value of its record, and its headers."""
    return LentCall(**msgspec.structs.asdict(queues.job_of(call, resume_topic)), headers=wire.shown_headers(call.headers), locked_until=until_ms)


def _mine(request: Request, lending: Lending, worker: str) -> tuple[str, str]:
    """Workflow id and ref of a call that no other worker has.  Raises RequestError (ET-10, ET-11)."""
    id, ref = segment(request, "id"), segment(request, "ref")
    holder = lending.lent.holder(id, ref)
    if holder not in (None, worker):
        raise RequestError("locked", f"{ref} of {id} is locked by {holder}, not by {worker}")
    return id, ref


async def _answered(request: Request, payload: Any, failed: bool) -> Response:
    """Send an answer to a call: 204 once it is committed, 404 if nobody waits for it any more.

    Meanwhile its lock does not expire, nor as long as its worker repeats an answer that no engine has replied to.
    """
    by, lending = options(request, _By), _lending(request)
    id, ref = _mine(request, lending, by.worker)
    headers = travelling(lending.lent.headers(id, ref), service_of(request).config.header_bytes_max)
    client, timeout_s = await service_of(request).client(), service_of(request).config.command_timeout_s
    close = lending.closing(id, ref)
    lending.lent.keep(id, ref, by.worker, timeout_s)
    try:
        await service_of(request).reply(request, client.resume(id, ref, headers=headers, error=payload) if failed else client.resume(id, ref, payload, headers=headers))
    except CommandError as error:
        if error.status in _OVER:
            close()
        raise
    except OutcomeUnknown:
        lending.lent.keep(id, ref, by.worker, timeout_s)
        raise
    close()
    return answer(204)


def travelling(headers: Headers, bytes_max: int) -> Headers:
    """The call's headers, which every worker's answer carries.

    None are passed on if they leave no room for the client's own, as a record that is refused is no answer.
    """
    return headers if wire.header_bytes(headers) + _OF_A_REQUEST <= bytes_max else ()


_ANSWER = (*ENGINE, *HOLD, "locked", "no_queue", "not_found", "unknown_ref")


@Operation("complete_call", {204: None}, _By, VALUE, words=_ANSWER)
async def _complete(request: Request) -> Response:
    """The call has been done; the body is its result."""
    return await _answered(request, await body(request), False)


@Operation("fail_call", {204: None}, _By, Failed, words=(*_ANSWER, "bad_arguments"))
async def _fail(request: Request) -> Response:
    """The attempt has failed: it is tried again as the activity's `Retry` says, unless `final`."""
    body = await _body_of(request, Failed)
    return await _answered(request, {"kind": "activity", **body}, True)


@Operation("reject_call", {204: None}, _By, Rejected, words=(*_ANSWER, "bad_arguments"))
async def _reject(request: Request) -> Response:
    """The call has an outcome that is no result, a kw.BusinessError at the yield: never tried again."""
    body = await _body_of(request, Rejected)
    return await _answered(request, {"kind": "business", **body}, True)


async def _body_of(request: Request, kind: type[msgspec.Struct]) -> dict[str, Any]:
    try:
        return msgspec.structs.asdict(msgspec.json.decode(await body(request), type=kind))
    except msgspec.ValidationError as error:
        raise RequestError("bad_arguments", f"the body: {error}") from None


@Operation("extend_call", {200: Locked}, _Locking, words=("locked", "no_queue", "not_locked"))
async def _extend(request: Request) -> Response:
    """Lock it from now on for so long; a lock that is over cannot be extended."""
    asked, lending = options(request, _Locking), _lending(request)
    id, ref = _mine(request, lending, asked.worker)
    await no_body(request)
    return _extended(lending, asked, id, ref)


def _extended(lending: Lending, asked: _Locking, id: str, ref: str) -> Response:
    if not lending.lent.extend(id, ref, asked.worker, asked.lock):
        raise RequestError("not_locked", f"{ref} of {id} is not locked by {asked.worker} (any more)")
    return answer(200, Locked((time.time_ns() // 1_000_000) + round(asked.lock * 1000)))


@Operation("heartbeat_call", {200: Locked}, _Locking, VALUE, words=(*_ANSWER, "not_locked"))
async def _heartbeat(request: Request) -> Response:
    """Lock it from now on for so long, and keep the body (JSON up to 10 KB), which says how far the work is, for the next attempt."""
    asked, lending = options(request, _Locking), _lending(request)
    id, ref = _mine(request, lending, asked.worker)
    details = await body(request)
    extended = _extended(lending, asked, id, ref)
    client = await service_of(request).client()
    await service_of(request).reply(request, client.heartbeat(id, ref, details))
    return extended


@Operation("release_call", {204: None}, _By, words=("locked", "no_queue"))
async def _release(request: Request) -> Response:
    """Somebody else may have it."""
    by, lending = options(request, _By), _lending(request)
    id, ref = _mine(request, lending, by.worker)
    await no_body(request)
    lending.lent.release(id, ref)
    return answer(204)


_CALL = "/queues/{queue}/calls/{id}/{ref}"
ROUTES = [
    Route("/queues/{queue}/fetch", _fetch, methods=["POST"]),
    Route(f"{_CALL}/complete", _complete, methods=["POST"]),
    Route(f"{_CALL}/fail", _fail, methods=["POST"]),
    Route(f"{_CALL}/reject", _reject, methods=["POST"]),
    Route(f"{_CALL}/extend", _extend, methods=["POST"]),
    Route(f"{_CALL}/heartbeat", _heartbeat, methods=["POST"]),
    Route(f"{_CALL}/release", _release, methods=["POST"]),
]
