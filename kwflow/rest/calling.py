"""What happens next in a call of a service: its state, and how each wait that ends changes it.  No I/O and no clock; it runs in steps.

`flows/rest1.py` waits for what `wait` returns, reports a cancel, and calls `go_on`, until the call is `over`.  Snapshots hold a
Calling: a new attribute needs a default in the class, and neither an attribute nor a method that rest1 calls is ever renamed.

The one rule: the callback's ref is awaited from before the first request until the end, so that no answer is ever lost (X-1).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from kwflow.activities import Retry, failure_of
from kwflow.core import typed, wire
from kwflow.core.current import current
from kwflow.core.tasks import FAILED, ActivityWait, Awaitable, Suspension, Timer
from kwflow.core.values import json_dumps
from kwflow.errors import ActivityError, BusinessError, Cancelled, KwflowBug, UsageError, WorkflowError
from kwflow.rest import http
from kwflow.rest.values import Callback, Cookie, Failure, Outcome, Plan, Request, Response, RestCancelled, RestError, Sent, Status, checked, place, wrong_header

__all__ = ["Calling", "gateway_url"]

_RETRIED = (408, 425, 429)  # and 5xx: statuses that another attempt may change (LR-8)
_NO_GATEWAY = (
    "rest.call needs gateway_url for the callback URL, but it is not set: set it to the URL at which the service reaches `kwflow gateway`, "
    "as `url` under [gateway] in kwflow.toml, or as KWFLOW_GATEWAY_URL; or pass callback=False if the HTTP response is the answer"
)
_WAITS = ("token_wait", "answer", "attempt", "beat", "pause", "silence", "limit", "grace")  # in the order in which they are examined: what the service says comes before timers


class Calling:
    """The state of one call.  Invariant: each attribute named in `_WAITS` is a pending wait, or None."""

    token_wait: ActivityWait | None = None  # for the secret of the callback's URL
    attempt: ActivityWait | None = None  # the request that is under way
    answer: Suspension[Any] | None = None  # the callback
    beat: Suspension[Any] | None = None
    pause: Timer | None = None  # until the next attempt
    silence: Timer | None = None  # the time in which the next heartbeat must come
    limit: Timer | None = None  # the timeout of the whole call
    grace: Timer | None = None  # the timeout of the cancel procedure

    over = False
    token = ""
    status: Status | None = None  # CANCELLED, TIMED_OUT or DIED, once that is so
    unwanted = False  # the wait for this call was cancelled
    stopping = False  # the cancel procedure has begun
    sent: Sent | None = None  # the request, while it may be tried again; once `cancel_made`, the one that cancels
    cancel_made = False
    tries = 0  # attempts of the request in `sent`
    key = ""  # the idempotency key of all these attempts
    attempts = 0
    answered = False  # the callback has come
    refused = False  # the callback was an error
    responded = False  # the first request has a response

    initial: Any = None
    called_back: Any = None
    cancel_response: Any = None
    error: Failure | None = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cookies: list[Cookie] = plan.cookies

    # -- what rest1 calls ------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Start the clock, and draw the token of the callback or send the request."""
        if self.plan.timeout_s is not None:
            self.limit = current().sleep(self.plan.timeout_s)
        if self.plan.callback:
            self.token_wait = current().activity(http.token.name, b"{}", 1, "")
        else:
            self._begin()

    def wait(self) -> Awaitable:
        """A wait for the first of all that may happen.

        A cancel is held back while a request is under way, as its response may say how to cancel what it began (LR-16).
        """
        waits = [wait for name in _WAITS if (wait := getattr(self, name)) is not None]
        if not waits:
            raise KwflowBug("a call that is not over waits for nothing")
        first = current().race(waits, False, False)
        held = self.plan.cancel is not None and (self.attempt is not None or self.stopping)
        return current().shield(first) if held else first

    def cancelled(self) -> None:
        """Note that somebody has cancelled the wait and, perhaps with it, the waits of this call.  A second cancel changes nothing."""
        self.unwanted = True
        for name in _WAITS:
            wait = getattr(self, name)
            if wait is not None and (isinstance(wait.value, Cancelled) if wait.settled else current().instance.waits.get(wait.ref) is not wait):
                setattr(self, name, None)
        if not self.stopping:
            self._stop("CANCELLED")

    def failed(self, error: Exception) -> None:
        """A wait has ended with this error, and `go_on` will find it there.  Raises the error if no wait has ended."""
        if not any(wait is not None and wait.settled for wait in (getattr(self, name) for name in _WAITS)):
            raise error

    def go_on(self) -> None:
        """Handle every wait that has ended."""
        for name in _WAITS:
            wait = getattr(self, name)
            if wait is not None and wait.settled and not self.over:
                setattr(self, name, None)
                getattr(self, f"_on_{name}")(wait)

    def close(self) -> None:
        """Drop all waits, so that nothing waits or works for nobody."""
        for name in _WAITS:
            self._drop(name)

    def outcome(self) -> Outcome:
        """The outcome of a SUCCESS.  Raises RestError for every other status, or RestCancelled if the wait was cancelled."""
        status = self.status or ("SYSTEM_ERROR" if self.error is not None else "FAILED" if self.refused else "SUCCESS")
        response = self.called_back if self.answered else self.initial
        if status == "SUCCESS" and self.plan.success is not None and not _called("success", self.plan.success, response):
            status = "FAILED"
        made = Outcome(status, response, self.initial, self.called_back, self.cancel_response, self.error, self.attempts, self.cookies)
        if status == "SUCCESS":
            return made
        said = f"{_where(self.plan)}: {status}" + (f": {self.error.message}" if self.error is not None else "")
        raise RestCancelled(said, made) if self.unwanted else RestError(said, made)

    # -- what has happened ------------------------------------------------------------------------------------------------
    def _on_token_wait(self, wait: ActivityWait) -> None:
        if wait.state == FAILED:
            self._fail(_raised(http.token.name, wait.value))
        else:
            self.token = http.token.decode_result(wait.value)
            self._listen()
            self._begin()

    def _on_attempt(self, wait: ActivityWait) -> None:
        response = _response(wait)
        if response.cookies is not None:
            self.cookies = response.cookies
        failure = response.failure or _status_failure(response)
        if failure is None:
            self._succeeded(response)
        elif self.answered:  # the service has finished or stopped, whatever became of the response
            self._finish()
        elif self.stopping and not self.cancel_made:  # the request is not repeated
            self._send_cancel()
        elif (pause_s := self._pause_s(response, failure)) is not None:
            current().logs.append(f"{failure.message}; next attempt in {pause_s:.3g} s")
            self.pause = current().sleep(pause_s)
        elif self.cancel_made:
            current().logs.append(f"{_where(self.plan)} was not cancelled: {failure.message}")
            self._stopped()
        else:
            self._fail(failure)

    def _succeeded(self, response: Response) -> None:
        if self.cancel_made:
            self.cancel_response = response.body
            self._stopped()
            return
        self.initial, self.responded, self.sent = response.body, True, None
        self.plan = msgspec.structs.replace(self.plan, request=Request(self.plan.request.method, self.plan.request.url))  # body and headers need not be in snapshots for months
        if self.answered or not self.plan.callback:
            self._finish()
        elif self.stopping:
            self._send_cancel()
        else:
            self._watch()

    def _on_pause(self, wait: Timer) -> None:
        self._send()

    def _on_answer(self, wait: Suspension[Any]) -> None:
        self.answered = True
        self.refused = wait.state == FAILED
        self.called_back = wait.value.payload if isinstance(wait.value, WorkflowError) else wait.value
        if self.attempt is None:
            self._finish()

    def _on_beat(self, wait: Suspension[Any]) -> None:
        self._listen()
        if self.silence is not None:
            self._watch()

    def _on_silence(self, wait: Timer) -> None:
        self.status = "DIED"
        self._finish()

    def _on_limit(self, wait: Timer) -> None:
        self._stop("TIMED_OUT")

    def _on_grace(self, wait: Timer) -> None:
        self._finish()

    # -- the request ------------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        self.sent = self._made(self.plan.request)
        self._send()

    def _send(self) -> None:
        """Begin the next attempt, which starts with this step's commit, under the key of the first."""
        if self.sent is None:
            raise KwflowBug("a call without a request")
        self.tries += 1
        if not self.cancel_made:
            self.attempts += 1
        arguments = http.request.encode_arguments((msgspec.structs.replace(self.sent, cookies=self.cookies),), {})
        self.attempt = current().activity(http.request.name, arguments, self.tries, self.key)
        self.key = self.key or self.attempt.ref

    def _made(self, request: Request) -> Sent:
        """Make the request, with what the author's functions return for body and headers.  Raises UsageError for what cannot be sent."""
        body = _called("body", request.body, self._callback()) if callable(request.body) else request.body
        headers = _called("headers", request.headers, self._callback()) if callable(request.headers) else request.headers
        try:
            body = typed.to_plain(body, annotated=True)
            json_dumps(body)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(f"the body of {request.method} {place(request.url)} has no JSON form: {error}") from None
        bytes_max = current().context.limits.activity_bytes_max
        name = request.headers_from if isinstance(request.headers_from, str) else None
        return Sent(request.method, request.url, _checked_headers(headers), body, [], self.plan.request_timeout_s, bytes_max, name)

    def _pause_s(self, response: Response, failure: Failure) -> float | None:
        """Seconds until the next attempt; None if there is none."""
        status = failure.status or 0
        if response.final or (status and status not in _RETRIED and status < 500):
            return None
        pause_s = Retry(**self.plan.retry).pause_s(self.tries, f"{current().instance.id}|{self.key}")
        return None if pause_s is None else max(pause_s, response.retry_after_s or 0)

    # -- the callback -----------------------------------------------------------------------------------------------------
    @property
    def _ref(self) -> str:
        return f"{wire.CALLBACK}{self.token}"

    def _listen(self) -> None:
        """Wait on the refs of the callback, unless that is done already."""
        if self.answer is None and not self.answered:
            self.answer = current().suspend(self._ref)
        if self.beat is None and self.plan.heartbeat_s is not None and not self.stopping:
            self.beat = current().suspend(f"{self._ref}-heartbeat")

    def _callback(self) -> Callback:
        if not self.plan.callback:
            raise UsageError("rest.call(callback=False): without a callback, the request cannot be a function; pass values")
        url = f"{gateway_url()}/callbacks/{quote(current().instance.id, safe='')}/{self._ref}"
        return Callback(url, f"{url}-heartbeat" if self.plan.heartbeat_s is not None else None)

    def _watch(self) -> None:
        """Start the heartbeat timeout, or start it anew (LR-17)."""
        if self.plan.heartbeat_s is not None:
            self._drop("silence")
            self.silence = current().sleep(self.plan.heartbeat_s)

    # -- the end ----------------------------------------------------------------------------------------------------------
    def _stop(self, status: Status) -> None:
        """The time is over, or the call is not wanted any more: tell the service, and give it `cancel_timeout` for a last callback (LR-16)."""
        self.status, self.stopping = status, True
        for name in ("token_wait", "pause", "beat", "silence", "limit"):
            self._drop(name)
        if self.answered and status == "TIMED_OUT":  # the service is done; only the response to the first request is missing
            self.status = None
        if self.answered or self.attempts == 0 or self.plan.cancel is None:
            self._finish()
            return
        if self.attempt is None:
            self._send_cancel()
        if not self.over:
            self.grace = current().sleep(self.plan.cancel_timeout_s)
            if self.token:
                self._listen()  # a cancel may have ended this wait too

    def _send_cancel(self) -> None:
        """Send the cancel request.  Any problem with it is only logged: the status says how the call ended, not how the cancel request did."""
        cancel = self.plan.cancel
        try:
            made = _called("cancel", cancel, self.initial) if callable(cancel) and self.responded else cancel
            if not isinstance(made, Request):
                if made is not None and made is not cancel:
                    raise UsageError(f"rest.call(cancel=...) must return a rest.Request or None, not {made!r}")
                self._finish()  # nobody knows how to cancel it
                return
            self.sent, self.tries, self.key, self.cancel_made = self._made(checked(made)), 0, "", True
            self._send()
        except KwflowBug:
            raise
        except Exception as error:  # an author's function may raise anything
            current().logs.append(f"{_where(self.plan)} was not cancelled: {type(error).__name__}: {error}")
            self._finish()

    def _stopped(self) -> None:
        """The cancel request has ended, successfully or not: keep waiting for the callback, if there is to be one."""
        if self.answered or not self.plan.callback:
            self._finish()

    def _fail(self, failure: Failure) -> None:
        self.error = failure
        self._finish()

    def _finish(self) -> None:
        self.over = True

    def _drop(self, name: str) -> None:
        wait: Suspension | None = getattr(self, name)
        setattr(self, name, None)
        if wait is not None and not wait.settled and current().instance.waits.get(wait.ref) is wait:
            current().cancel(wait)


def gateway_url() -> str:
    """The URL where services call back, without a slash at its end.  Raises UsageError, which says where to set it."""
    found = current().context.gateway_url
    if found is None:
        raise UsageError(_NO_GATEWAY)
    return found


def _where(plan: Plan) -> str:
    return f"rest.call {plan.request.method} {place(plan.request.url)}"


def _called(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the author's, in this step.  Raises what it raises, and UsageError if it returns a wait."""
    value = function(*arguments)
    if inspect.isgenerator(value) or inspect.isawaitable(value) or isinstance(value, Awaitable):
        raise UsageError(f"rest.call({name}=...) takes a plain function, but this one returns a wait; wait before rest.call, and use the result here")
    return value


def _checked_headers(headers: object) -> dict[str, str]:
    """The headers as a dict.  Raises UsageError, which names the header or the limit."""
    wrong = wrong_header(headers)
    if wrong is not None or not isinstance(headers, Mapping):
        raise UsageError(f"rest.call: {wrong}")
    size, size_max = sum(len(name) + len(value) for name, value in headers.items()), current().context.limits.header_bytes_max
    if size > size_max:
        raise UsageError(f"the headers of rest.call have {size} bytes, more than {size_max} (limit header_bytes_max); put the data into the body, or raise the limit")
    return dict(headers)


def _response(wait: ActivityWait) -> Response:
    """The response of an attempt; an activity that raised, such as one that an engine ended, becomes a failure."""
    if wait.state != FAILED:
        try:
            found: Response = http.request.decode_result(wait.value)
            return found
        except ActivityError as error:  # somebody has answered in the activity's place (kwflow resume)
            return Response(0, failure=Failure(error.type, str(error)), final=True)
    told = wait.value.payload if isinstance(wait.value, WorkflowError) else None
    final = isinstance(told, dict) and (told.get("final") is True or told.get("kind") == "business")
    return Response(0, failure=_raised(http.request.name, wait.value), final=final)


def _raised(activity: str, error: object) -> Failure:
    made = failure_of(activity, error.payload if isinstance(error, WorkflowError) else str(error))
    if isinstance(made, BusinessError):
        return Failure(made.code, str(made))
    return Failure(made.type or "ActivityError", str(made))


def _status_failure(response: Response) -> Failure | None:
    """A failure for a status outside 200-299 that a fake returned without one (LR-8)."""
    if 200 <= response.status < 300:
        return None
    return Failure("StatusError", f"the request was answered with {response.status}", response.status, response.body)
