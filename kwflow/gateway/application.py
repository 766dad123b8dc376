"""The application: all routes, and the answers when one of them raises."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from kwflow.errors import KwflowError, TransportError
from kwflow.gateway import callbacks, messages, queues, streams, workflows
from kwflow.gateway.answers import Health
from kwflow.gateway.gate import HEALTH, Gate
from kwflow.gateway.openapi import document
from kwflow.gateway.operations import Operation, Text
from kwflow.gateway.problems import RequestError, problem_of
from kwflow.gateway.requests import Options, answer, options, refusal, service_of
from kwflow.gateway.service import Gone, Service
from kwflow.runners.stats import DURATIONS
from kwflow.worker import Lending

__all__ = ["ROUTES", "application"]


@Operation("get_health", {200: Health, 503: Health}, None)
async def _health(request: Request) -> Response:
    """200 while it takes requests; it asks no engine and no broker."""
    service, said = service_of(request), ""
    try:
        await service.client()  # replaces a client whose link was lost, even if no other request comes
    except TransportError as error:
        said = str(error)
    if service.ending:
        said = "it ends"
    return answer(503 if said else 200, Health(not said, service.waiting, said or msgspec.UNSET))


def _count(lending: Lending, state: str) -> float:
    return lending.lent.counts()[state]


def _refused(request: Request, error: Exception) -> Response:
    return refusal(problem_of(error))


def _unrouted(request: Request, error: Exception) -> Response:
    """Answer what routing itself refuses."""
    status = getattr(error, "status_code", 400)
    made = refusal(problem_of(RequestError({404: "no_path", 405: "no_method"}.get(status, "usage"), f"{request.method} {request.scope['path'][:200]}")))
    made.headers.update(getattr(error, "headers", None) or {})  # Allow
    return made


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody receives it


_METRICS = Text("text/plain", "In the Prometheus text format.", "kwflow_gateway_waiting 1.0\n")


@Operation("get_metrics", {200: _METRICS}, None)
async def _metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


@functools.cache
def _document() -> bytes:
    return msgspec.json.encode(document(ROUTES))


@Operation("get_openapi", {200: dict[str, Any]})
async def _openapi(request: Request) -> Response:
    """This document, the same of every gateway of a version."""
    options(request, Options)
    return Response(_document(), media_type="application/json")


ROUTES = [
    Route(HEALTH, _health), Route("/metrics", _metrics), Route("/openapi.json", _openapi), *workflows.ROUTES, *messages.ROUTES, *callbacks.ROUTES, *queues.ROUTES, *streams.ROUTES,
]  # fmt: skip


def application(service: Service) -> ASGIApp:
    """The application for a server, which must call `service.end()` before it stops."""
    registry = CollectorRegistry()
    calls = Gauge("kwflow_gateway_calls", "Calls of a queue that this gateway has read: free, or locked by a worker.", ["queue", "state"], registry=registry)
    waits = Histogram("kwflow_gateway_wait_seconds", "Time from a call of a queue until a worker has it.", ["queue"], buckets=DURATIONS, registry=registry)
    for queue, lending in service.lendings.items():
        for state in lending.lent.counts():
            calls.labels(queue, state).set_function(functools.partial(_count, lending, state))

    templates = {route.endpoint: route.path for route in ROUTES}
    inner = Starlette(routes=ROUTES, exception_handlers={KwflowError: _refused, HTTPException: _unrouted, Gone: _gone, Exception: _refused})
    inner.state.service, inner.state.registry, inner.state.waits = service, registry, waits
    inner.router.redirect_slashes = False

    def template(scope: Scope) -> str:
        return templates[scope["endpoint"]] if scope.get("endpoint") in templates else "other"

    return Gate(service, inner, template, registry)
