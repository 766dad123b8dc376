"""The application: all routes, and what is answered when one of them raises."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from kwflow.errors import KwflowError, TransportError
from kwflow.gateway import callbacks, messages, queues, streams, workflows
from kwflow.gateway.gate import Gate
from kwflow.gateway.problems import RequestError, problem_of
from kwflow.gateway.requests import answer, refusal, service_of
from kwflow.gateway.service import Gone, Service
from kwflow.worker import Lending

__all__ = ["application"]


async def _health(request: Request) -> Response:
    """200 while it takes requests; it asks no engine and no broker."""
    service, said = service_of(request), ""
    try:
        await service.client()  # one whose link was lost is made anew, also when nobody else comes
    except TransportError as error:
        said = str(error)
    if service.ending:
        said = "it ends"
    return answer(503 if said else 200, {"live": not said, "waiting": service.waiting, **({"message": said} if said else {})})


def _count(lending: Lending, state: str) -> float:
    return lending.lent.counts()[state]


def _refused(request: Request, error: Exception) -> Response:
    return refusal(problem_of(error))


def _unrouted(request: Request, error: Exception) -> Response:
    """What routing itself refuses."""
    status = getattr(error, "status_code", 400)
    made = refusal(problem_of(RequestError({404: "no_path", 405: "no_method"}.get(status, "usage"), f"{request.method} {request.scope['path'][:200]}")))
    made.headers.update(getattr(error, "headers", None) or {})  # Allow
    return made


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody hears it


def application(service: Service) -> ASGIApp:
    """What a server runs; `service.end()` comes before it stops."""
    registry = CollectorRegistry()
    calls = Gauge("kwflow_gateway_calls", "Calls of a queue that this gateway has read: free, or locked by a worker.", ["queue", "state"], registry=registry)
    for queue, lending in service.lendings.items():
        for state in lending.lent.counts():
            calls.labels(queue, state).set_function(functools.partial(_count, lending, state))

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [Route("/health", _health), Route("/metrics", metrics), *workflows.ROUTES, *messages.ROUTES, *callbacks.ROUTES, *queues.ROUTES, *streams.ROUTES]
    templates = {route.endpoint: route.path for route in routes}
    inner = Starlette(routes=routes, exception_handlers={KwflowError: _refused, HTTPException: _unrouted, Gone: _gone, Exception: _refused})
    inner.state.service = service
    inner.router.redirect_slashes = False

    def template(scope: Scope) -> str:
        return templates[scope["endpoint"]] if scope.get("endpoint") in templates else "other"

    return Gate(service, inner, template, registry)
