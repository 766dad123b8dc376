"""`POST /callbacks/ID/REF`: a service that was given this URL answers the wait that it stands for.

Such a ref has a part that nobody can guess, so the URL is its own permission: no token is required, and only refs that begin
with `callback-` are answered here.  The sender knows nothing of kwflow; the status alone tells it what to do.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.core.wire import CALLBACK
from kwflow.errors import CommandError
from kwflow.gateway.answers import Held
from kwflow.gateway.operations import ANY, ENGINE, Operation
from kwflow.gateway.problems import RequestError
from kwflow.gateway.requests import Options, answer, any_body, options, segment, service_of, trace_of

__all__ = ["ROUTES"]

_OVER = ("not_found", "unknown_ref")


@Operation("answer_callback", {202: Held, 204: None}, body=ANY, words=(*ENGINE, "discarded", "hold_full", "no_path", "nobody_waits"))
async def _callback(request: Request) -> Response:
    """Answer the wait that this URL stands for, whose ref begins with `callback-`.

    JSON content types have to hold JSON, `text/*` is a string, anything else is JSON if it can be read so, else text.  Only 5xx are worth a repetition.
    """
    id, ref = segment(request, "id"), segment(request, "ref")
    options(request, Options)
    if not ref.startswith(CALLBACK):
        raise RequestError("no_path", f"only refs that begin with {CALLBACK} are answered here; others under /workflows")
    value, client = await any_body(request), await service_of(request).client()
    try:
        await service_of(request).reply(request, client.resume(id, ref, value, headers=trace_of(request)))
    except CommandError as error:
        if error.status in _OVER:
            raise RequestError("nobody_waits", f"{ref} of {id} was answered before, or nobody waits for it any more") from None
        if error.status != "held":
            raise
        return answer(202, Held(id, "held"))
    return answer(204)


ROUTES = [Route("/callbacks/{id}/{ref}", _callback, methods=["POST"])]
