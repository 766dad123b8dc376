"""Starts, queries and outcomes: the routes by which a workflow is created, inspected and awaited."""

from __future__ import annotations

import uuid
from typing import Annotated

from msgspec import Meta
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.client import Run
from kwflow.errors import UsageError
from kwflow.gateway import endings
from kwflow.gateway.answers import Ended, Made, Running, Workflow, Workflows
from kwflow.gateway.operations import ENGINE, HOLD, VALUE, Operation
from kwflow.gateway.requests import Options, StartId, Wait, answer, body, key_of_request, options, query, segment, service_of, trace_of, workflow_path
from kwflow.runners.instances import STATUSES, asked_for, since_ms

__all__ = ["ROUTES", "made"]

_IDS = uuid.UUID("6f0a4a0e-3c0e-4b51-9d0c-0b9a1f6b4c1d")  # the namespace of ids that are made from start ids; must never change
_ROWS, _ROWS_MAX = 100, 1000


class _Start(Options, frozen=True):
    workflow: Annotated[str | None, Meta(description="Name of the workflow; by default the default workflow.")] = None
    start_id: Annotated[StartId | None, Meta(description="With the same id it is one run, however often it is sent, even after its end.")] = None
    wait: Wait | None = None


class _Of(Options, frozen=True):
    start_id: StartId | None = None


class _Outcome(Options, frozen=True):
    start_id: StartId | None = None
    wait: Wait = 0


class _Listed(Options, frozen=True):
    """The options, for the document; `asked_for` reads them, with `since` converted to ms."""

    status: Annotated[str | None, Meta(extra_json_schema={"enum": list(STATUSES)})] = None
    workflow: Annotated[str | None, Meta(description="The name of the workflow.")] = None
    id: Annotated[str | None, Meta(description="What the id begins with; after a *, what it contains.")] = None
    since: Annotated[str | None, Meta(description="Changed since then: 30m, 2h or 7d ago, or a time like 2026-01-31T12:00 (UTC).")] = None
    where: Annotated[list[str] | None, Meta(description="NAME=VALUE in the status set by kw.set_status, with dots for nested names; all must match.")] = None
    limit: Annotated[int, Meta(ge=1, le=_ROWS_MAX)] = _ROWS


def made(request: Request, run: Run) -> Response:
    """201 with the run's Location; 200 if this start had been made before (K20)."""
    return answer(201 if run.new else 200, Made(run.id, run.start_id, run.new), [("Location", workflow_path(request, run.id))])


_STARTS = {200: (Ended, Made), 201: Made, 202: Running}
_START_WORDS = (*ENGINE, *HOLD, "bad_input", "cancelled", "error", "exists", "terminated", "unknown_workflow")


async def _start(request: Request) -> Response:
    """Start a workflow.  Without an id in the path it gets one, which is the same if the same start is repeated."""
    asked = options(request, _Start)
    wait = None if asked.wait is None else service_of(request).seconds(asked.wait)
    given = key_of_request(request, asked.start_id, "start_id")
    start_id = given if given is not None else uuid.uuid4().hex
    id = segment(request, "id") if "id" in request.path_params else uuid.uuid5(_IDS, start_id).hex
    value, client = await body(request), await service_of(request).client()
    if wait is None:
        return made(request, await service_of(request).reply(request, client.start(id, value, workflow=asked.workflow, start_id=start_id, headers=trace_of(request))))
    future = client.start_and_wait(id, value, workflow=asked.workflow, start_id=start_id, headers=trace_of(request))
    return await endings.after_start(request, client, future, id, start_id, wait)


class _Workflows(HTTPEndpoint):
    @Operation("start_new_workflow", _STARTS, _Start, VALUE, keyed=True, words=_START_WORDS)
    async def post(self, request: Request) -> Response:
        """Start a workflow under an id that is made of its start_id; the body is its input.

        With `wait` the answer is its outcome: 200 for a result, 202 if it has not ended, 424 for any other end.
        """
        return await _start(request)

    @Operation("list_workflows", {200: Workflows}, _Listed, words=("outcome_unknown", "unreachable"))
    async def get(self, request: Request) -> Response:
        """The newest instances that match, and how many there are of each status."""
        given = [(name, f"{since_ms(value):.0f}" if name == "since" else value) for name, value in query(request)]
        wanted, limit = asked_for(given)
        if limit is not None and limit > _ROWS_MAX:
            raise UsageError(f"limit={limit} is more than {_ROWS_MAX}; filter by status, workflow, id, since or where")
        found = await service_of(request).found(wanted, limit or _ROWS)
        return answer(200, {"workflows": found.rows, "counts": found.counts})


class _Workflow(HTTPEndpoint):
    @Operation("start_workflow", _STARTS, _Start, VALUE, keyed=True, words=_START_WORDS)
    async def post(self, request: Request) -> Response:
        """Start a workflow; the body is its input.

        With `wait` the answer is its outcome: 200 for a result, 202 if it has not ended, 424 for any other end.
        """
        return await _start(request)

    @Operation("get_workflow", {200: Workflow}, _Of, words=(*ENGINE, "not_found"))
    async def get(self, request: Request) -> Response:
        """What a query tells: its status, what it waits for, how it has ended.  None of its code runs."""
        id, asked = segment(request, "id"), options(request, _Of)
        client = await service_of(request).client()
        shown = await service_of(request).reply(request, client.query(id, start_id=asked.start_id))
        return answer(200, shown)


@Operation("get_outcome", {200: Ended, 202: Running}, _Outcome, words=(*ENGINE, "cancelled", "error", "not_found", "terminated"))
async def _outcome(request: Request) -> Response:
    """How it has ended, or does within `wait`: 200 for a result, 424 for any other end."""
    id, asked = segment(request, "id"), options(request, _Outcome)
    seconds, client = service_of(request).seconds(asked.wait), await service_of(request).client()
    return await endings.within(request, client, id, asked.start_id, seconds)


ROUTES = [
    Route("/workflows", _Workflows),
    Route("/workflows/{id}", _Workflow),
    Route("/workflows/{id}/outcome", _outcome, methods=["GET"]),
]
