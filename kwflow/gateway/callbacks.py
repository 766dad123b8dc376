"""`POST /callbacks/ID/REF`: a service that was given this URL answers the wait it stands for.

Such a ref holds a part that nobody can guess, so that the URL is its own permission: no token is asked for, and only refs
that begin with `callback-` are answered here.  Its sender knows nothing of kwflow, and is told by status alone what to do.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.errors import CommandError
from kwflow.gateway.problems import RequestError
from kwflow.gateway.requests import Options, answer, any_body, options, segment, service_of, trace_of

__all__ = ["PREFIX", "ROUTES"]

PREFIX = "callback-"
_OVER = ("not_found", "unknown_ref")


async def _callback(request: Request) -> Response:
    """204 applied; 202 kept, as the workflow is parked; 410 nobody waits (any more)."""
    id, ref = segment(request, "id"), segment(request, "ref")
    options(request, Options)
    if not ref.startswith(PREFIX):
        raise RequestError("no_path", f"only refs that begin with {PREFIX} are answered here; others under /workflows")
    value, client = await any_body(request), await service_of(request).client()
    try:
        await service_of(request).reply(request, client.resume(id, ref, value, headers=trace_of(request)))
    except CommandError as error:
        if error.status in _OVER:
            raise RequestError("nobody_waits", f"{ref} of {id} was answered before, or is not waited for any more") from None
        if error.status != "held":
            raise
        return answer(202, {"id": id, "status": "held"})
    return answer(204)


ROUTES = [Route("/callbacks/{id}/{ref}", _callback, methods=["POST"])]
