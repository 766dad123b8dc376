"""Admission to the application, before any route: which requests may enter, how many at a time, and the counts of all.

This module must not know what a route does.  It uses paths as they were sent: an id may contain a slash (%2F), and the path
that is checked here must be the one that is routed.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kwflow.gateway.problems import RequestError, problem_of
from kwflow.gateway.requests import refusal
from kwflow.gateway.service import Service

__all__ = ["CALLBACKS", "HEALTH", "Gate", "is_local", "known"]

_HUNG_UP = 499  # nginx's status for a caller that hung up before it was answered
HEALTH = "/health"
CALLBACKS = "/callbacks/"  # the refs in these paths are their own permission
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:@/\[\]\s]+)(?::[0-9]{1,5})?")
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


class Gate:
    """An ASGI application around another one; `template` names the route of a request for metrics."""

    def __init__(self, service: Service, inner: ASGIApp, template: Callable[[Scope], str], registry: CollectorRegistry) -> None:
        self._service = service
        self._inner = inner
        self._template = template
        self._tokens = [token.get_secret_value().encode() for token in service.config.gateway_tokens]
        self._count = Counter("kwflow_gateway_requests", "Requests that were answered; 499: the caller hung up first.", ["method", "path", "status"], registry=registry)
        Gauge("kwflow_gateway_waiting", "Requests that are being answered.", registry=registry).set_function(lambda: service.waiting)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"] = scope["raw_path"].decode("ascii", "replace")
        path = path.removeprefix(scope.get("root_path", ""))
        status = _HUNG_UP

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counted = path != HEALTH  # a health check is answered, however many requests wait
        try:
            refused = self._refused(Request(scope), path)
            if refused is not None:
                await refusal(problem_of(refused))(scope, receive, sent)
                return
            self._service.waiting += counted
            try:
                await self._inner(scope, receive, sent)
            finally:
                self._service.waiting -= counted
        finally:
            self._count.labels(scope["method"] if scope["method"] in _METHODS else "other", self._template(scope), str(status)).inc()

    def _refused(self, request: Request, path: str) -> RequestError | None:
        """Why the request may not enter; None if it may."""
        if path == HEALTH:
            return None
        if not path.startswith(CALLBACKS):
            if self._tokens and not self._knows(request.headers.get("authorization", "")):
                return RequestError("unauthorized", "every path except /health and /callbacks needs a token")
            if not self._tokens and "origin" in request.headers:  # a page from anywhere, open in the browser of somebody who can reach this address
                return RequestError("web_page", f"the request comes from {request.headers['origin'][:200]!r}")
            if self._service.of_this_machine and not is_local(request.headers.get("host", "")):  # a page whose own name resolves to us (DNS rebinding) need not send an Origin
                return RequestError("web_page", f"the gateway serves this machine only, and is not called {request.headers.get('host', '')[:200]!r}")
        most = self._service.config.gateway_waits_max
        return RequestError("busy", f"{most} requests are already waiting here (limit gateway_waits_max)") if self._service.waiting >= most else None

    def _knows(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        return known(self._tokens, token.strip().encode("latin-1", "replace")) and scheme.lower() == "bearer"


def known(tokens: Sequence[bytes], given: bytes) -> bool:
    """Whether this is one of the tokens.  All are compared completely, so that the time reveals nothing about them."""
    return any([hmac.compare_digest(given, token) for token in tokens])


def is_local(host: str) -> bool:
    """Whether a Host is an IP address or `localhost`, with or without a port: no one else can get such a name from DNS."""
    found = _HOST.fullmatch(host)
    if found is None or found[1].lower() == "localhost":
        return found is not None
    try:
        ipaddress.ip_address(found[1].strip("[]"))
    except ValueError:
        return False
    return True
