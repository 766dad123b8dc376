"""How a run ended, as HTTP: 200 for a result, 424 for any other end, and 202 with a place to ask again while it runs.

Every answer about an outcome is made here, so that a start that waits, `GET …/outcome` and a stream say the same (AF-30).
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kwflow.client import Client, Future, Outcome
from kwflow.errors import CommandError, OutcomeError
from kwflow.gateway.answers import Ended, Running
from kwflow.gateway.problems import problem_of
from kwflow.gateway.requests import answer, outcome_path, refusal, service_of

__all__ = ["after_start", "ended", "event_of", "of_last_run", "outcome_of", "within"]


def event_of(outcome: Outcome) -> Ended:
    """An outcome in the form that it has in all bodies."""
    return Ended(outcome.id, outcome.start_id, outcome.kind, outcome.value)


def ended(outcome: Outcome) -> Response:
    """The answer for an outcome.  One that is no result is 424, for a failure of what the request depended on; after a 5xx a client or proxy would repeat it."""
    if outcome.kind == "result":
        return answer(200, event_of(outcome))
    value = msgspec.json.decode(outcome.value) if isinstance(outcome.value, msgspec.Raw) else outcome.value  # decoded, as people read it in `detail`
    return refusal(problem_of(OutcomeError(outcome.kind, value, outcome.id, outcome.start_id)))


def outcome_of(future: Future[Any], id: str, start_id: str) -> Outcome:
    """The outcome that a future of `result` has.  Raises its error if that is no outcome."""
    try:
        return Outcome(id, start_id, "result", future.result())
    except OutcomeError as error:
        return Outcome(error.id, error.start_id, error.kind, error.value)


def _runs(request: Request, shown: dict[str, Any]) -> Response:
    return answer(202, Running(shown["id"], shown["start_id"], shown["status"]), [("Location", outcome_path(request, shown["id"], shown["start_id"]))])


def _kept(shown: dict[str, Any]) -> Outcome | None:
    """The outcome, if the answer of a query contains it completely; else None."""
    outcome = shown.get("outcome")
    if outcome is None or outcome["value"] is None:
        return None
    return Outcome(shown["id"], shown["start_id"], outcome["kind"], msgspec.Raw(outcome["value"].encode()))


async def _asked(request: Request, client: Client, id: str, start_id: str | None) -> dict[str, Any] | None:
    """The answer of a query; None if there is no such run (any more)."""
    try:
        return await service_of(request).reply(request, client.query(id, start_id=start_id))
    except CommandError as error:
        if error.status != "not_found":
            raise
        return None


async def _found(request: Request, client: Client, id: str, start_id: str | None) -> Outcome:
    """Find an outcome that is only in the topic.  Raises CommandError not_found if it is not there either."""
    service = service_of(request)
    async with service.searching():
        future = client.result(id, start_id=start_id)
        try:
            await service.late(request, future)
        except OutcomeError:
            """It is an outcome, too."""
        finally:
            future.cancel()
    return outcome_of(future, id, start_id or "")


async def of_last_run(request: Request, client: Client, id: str) -> Outcome | None:
    """The outcome of the id's last run; None if that still runs, or if nothing is known of this id."""
    shown = await _asked(request, client, id, None)
    if shown is None or shown.get("outcome") is None:
        return None
    return _kept(shown) or await _found(request, client, id, shown["start_id"])


async def within(request: Request, client: Client, id: str, start_id: str | None, seconds: float) -> Response:
    """The answer for a run's outcome: it may have ended long ago, or be awaited for at most `seconds`."""
    shown = await _asked(request, client, id, start_id)
    if shown is None:
        return ended(await _found(request, client, id, start_id))
    if shown.get("outcome") is not None:
        return ended(_kept(shown) or await _found(request, client, id, shown["start_id"]))
    if seconds == 0:
        return _runs(request, shown)
    future = client.result(id, start_id=shown["start_id"])
    try:
        if await service_of(request).first(request, seconds, future, ends=True):
            return ended(outcome_of(future, id, shown["start_id"]))
        return _runs(request, shown)
    finally:
        future.cancel()


async def after_start(request: Request, client: Client, future: Future[Any], id: str, start_id: str, seconds: float) -> Response:
    """The answer for the outcome of a run that was just started.

    When the time is over, the answer is 202 only if the start is known to have been applied.  A query finds that out: it
    follows the start in the same partition, so if the start was refused, that reply comes first, and its reason is not lost.
    """
    service = service_of(request)
    asked: Future[Any] | None = None
    try:
        if not await service.first(request, seconds, future, ends=True):
            asked = client.query(id, start_id=start_id)
            await service.first(request, None, future, asked)
        if future.done():
            return ended(outcome_of(future, id, start_id))
        shown = asked.result() if asked is not None else {}
        outcome = _kept(shown)
        return ended(outcome) if outcome is not None else _runs(request, shown)
    finally:
        future.cancel()
        if asked is not None:
            asked.cancel()
