"""Calls of HTTP services that answer at once, or much later at a callback URL; durable from the request to the callback.

Authors use `call`.  `values.py` has its arguments and results, `calling.py` decides what happens next, `http.py` sends one
request, and `flows/rest1.py` waits.  Nothing here loads httpx before a request is sent.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from kwflow import flows
from kwflow.activities import Activity, Retry
from kwflow.core.current import current
from kwflow.core.tasks import Awaitable
from kwflow.errors import UsageError
from kwflow.rest.calling import gateway_url
from kwflow.rest.http import request, token
from kwflow.rest.values import Body, Callback, Cookie, Failure, Headers, HeadersFrom, Outcome, Plan, Request, Response, RestCancelled, RestError, Sent, checked, place

__all__ = ["Callback", "Cookie", "Failure", "Outcome", "Request", "Response", "RestCancelled", "RestError", "Sent", "call", "request", "token"]

def call(
    method: str,
    url: str,
    *,
    body: Body = None,
    headers: Headers | None = None,
    headers_from: HeadersFrom = None,
    cookies: Sequence[Cookie] = (),
    callback: bool = True,
    retry: Retry | None = None,
    request_timeout: timedelta | float = 30,
    timeout: timedelta | float | None = None,
    heartbeat_timeout: timedelta | float | None = None,
    success: Callable[[Any], object] | None = None,
    cancel: Callable[[Any], Request | None] | Request | None = None,
    cancel_timeout: timedelta | float = 30,
) -> Awaitable[Outcome]:
    """Send a request with this step's commit, and wait until the service calls back.  Returns a wait whose result is an Outcome.

    `body` (JSON, or text with a Content-Type of your own that is not JSON) and `headers` are values, or plain functions of the
    Callback, which has the URLs.  With `callback=False` the HTTP response is the answer.  `success` decides whether an answer is a success.

    After connection problems and the statuses 408, 425, 429 and 5xx, the request is tried again as `retry` says (kw.Retry() by default),
    under one Idempotency-Key.  One request may take `request_timeout`, and the whole call `timeout`; `heartbeat_timeout` limits the
    silence between two POSTs to the heartbeat URL, once the service has answered.  When the time is over, or the wait is cancelled,
    the request `cancel` is sent, which may be a function of the response to the first request, and the callback is awaited for
    `cancel_timeout` more.  Times are seconds or timedeltas.  `headers_from` is an activity without parameters that is called where the
    request is sent: what it returns is also sent as headers, and stored nowhere.  `cookies` are those of an earlier Outcome.

    Raises UsageError at once for what cannot be sent; at the wait, RestError for every status but SUCCESS, and RestCancelled (a
    Cancelled) if the wait was cancelled.  Source: reference-systems LR-1 to LR-22.
    """
    made = Plan(
        request=checked(Request(method, url, body, headers or {}, headers_from)), callback=callback, cookies=list(cookies), retry=_retry(retry),
        request_timeout_s=_positive("request_timeout", request_timeout), timeout_s=None if timeout is None else _positive("timeout", timeout),
        heartbeat_s=None if heartbeat_timeout is None else _positive("heartbeat_timeout", heartbeat_timeout),
        success=success, cancel=cancel, cancel_timeout_s=_positive("cancel_timeout", cancel_timeout),
    )  # fmt: skip
    _check_functions(made)
    if callback:
        gateway_url()
    gen = flows.rest().call(made)
    gen.__qualname__ = f"rest.call {made.request.method} {place(made.request.url)}"
    return current().spawn(gen)


def _positive(name: str, given: timedelta | float) -> float:
    value = given.total_seconds() if isinstance(given, timedelta) else given
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UsageError(f"rest.call({name}=...) must be a timedelta or a number of seconds above 0, not {given!r}")
    return value


def _retry(retry: Retry | None) -> dict[str, Any]:
    """The retry policy as plain values: if snapshots held our Retry class, it could not get another field."""
    if retry is not None and not isinstance(retry, Retry):
        raise UsageError(f"rest.call(retry=...) must be a kw.Retry, not {retry!r}; for a single attempt, use kw.Retry(max_attempts=1)")
    return dataclasses.asdict(retry or Retry())


def _check_functions(made: Plan) -> None:
    for name, value in (("body", made.request.body), ("headers", made.request.headers), ("success", made.success), ("cancel", made.cancel)):
        if isinstance(value, Activity) or inspect.isgeneratorfunction(value) or inspect.iscoroutinefunction(value):
            raise UsageError(f"rest.call({name}=...) takes a plain function, which runs in a step; {getattr(value, '__qualname__', value)} is not one: wait before rest.call, and use the result here")
    told = callable(made.request.body) or callable(made.request.headers)
    if made.callback and not told:
        raise UsageError('rest.call: the service is not given a URL to call back; write body=lambda callback: {"callbackUrl": callback.url, ...}, or callback=False if the HTTP response is the answer')
    if told and not made.callback:
        raise UsageError("rest.call(callback=False): without a callback, body and headers cannot be functions; pass values")
    if made.heartbeat_s is not None and not made.callback:
        raise UsageError("rest.call(callback=False) does not wait for heartbeats; leave out heartbeat_timeout")
