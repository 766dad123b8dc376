"""Starts, queries and outcomes: the routes of a workflow as a thing that is made, looked at and waited for."""

from __future__ import annotations

import uuid

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.client import Run
from kwflow.errors import UsageError
from kwflow.gateway import endings
from kwflow.gateway.requests import Options, Seconds, answer, body, key_of_request, options, query, segment, service_of, trace_of, workflow_path
from kwflow.runners.instances import asked_for, since_ms

__all__ = ["ROUTES", "made"]

_IDS = uuid.UUID("6f0a4a0e-3c0e-4b51-9d0c-0b9a1f6b4c1d")  # ids that are made of start ids; never to be changed
_ROWS, _ROWS_MAX = 100, 1000


class _Start(Options, frozen=True):
    workflow: str | None = None
    start_id: str | None = None
    wait: Seconds | None = None


class _Of(Options, frozen=True):
    start_id: str | None = None


class _Outcome(Options, frozen=True):
    start_id: str | None = None
    wait: Seconds = 0


def made(request: Request, run: Run) -> Response:
    """201 with its place; 200 if this start had been made before (K20)."""
    about = {"id": run.id, "start_id": run.start_id, "new": run.new}
    return answer(201 if run.new else 200, about, [("Location", workflow_path(request, run.id))])


async def _start(request: Request) -> Response:
    """Without an id in the path it gets one, the same when the same start is repeated."""
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
    async def post(self, request: Request) -> Response:
        return await _start(request)

    async def get(self, request: Request) -> Response:
        """The newest of those that are asked for, and how many there are of each status."""
        given = [(name, f"{since_ms(value):.0f}" if name == "since" else value) for name, value in query(request)]
        wanted, limit = asked_for(given)
        if limit is not None and limit > _ROWS_MAX:
            raise UsageError(f"limit={limit} is more than {_ROWS_MAX}; narrow it by status, workflow, id, since or where")
        found = await service_of(request).found(wanted, limit or _ROWS)
        return answer(200, {"workflows": found.rows, "counts": found.counts})


class _Workflow(HTTPEndpoint):
    async def post(self, request: Request) -> Response:
        return await _start(request)

    async def get(self, request: Request) -> Response:
        """What a query tells."""
        id, asked = segment(request, "id"), options(request, _Of)
        client = await service_of(request).client()
        shown = await service_of(request).reply(request, client.query(id, start_id=asked.start_id))
        return answer(200, shown)


async def _outcome(request: Request) -> Response:
    id, asked = segment(request, "id"), options(request, _Outcome)
    seconds, client = service_of(request).seconds(asked.wait), await service_of(request).client()
    return await endings.within(request, client, id, asked.start_id, seconds)


ROUTES = [
    Route("/workflows", _Workflows),
    Route("/workflows/{id}", _Workflow),
    Route("/workflows/{id}/outcome", _outcome, methods=["GET"]),
]
