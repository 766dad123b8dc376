"""The arguments and results of a call of a service.  Snapshots hold these: new fields go to the end, with a default, and none is ever renamed.

All are plain data; a workflow may return an Outcome as its result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec

from kwflow.activities import Activity
from kwflow.errors import Cancelled, KwflowError, UsageError

__all__ = [
    "Body", "Callback", "Cookie", "Failure", "Headers", "HeadersFrom", "Outcome", "Plan", "Request", "Response", "RestCancelled", "RestError", "Sent", "Status", "checked", "place", "wrong_header",
]  # fmt: skip

Status: TypeAlias = Literal["SUCCESS", "FAILED", "CANCELLED", "TIMED_OUT", "DIED", "SYSTEM_ERROR"]


class Callback(msgspec.Struct, frozen=True):
    """The URL that the service calls back once, with its answer as JSON (POST); `heartbeat_url` is None without a heartbeat_timeout."""

    url: str
    heartbeat_url: str | None = None


Body: TypeAlias = Any  # JSON, or a function of the Callback that returns it
Headers: TypeAlias = Mapping[str, str] | Callable[[Callback], Mapping[str, str]]
HeadersFrom: TypeAlias = Activity[[], Any] | str | None  # an activity that returns a mapping, or its name


class Request(msgspec.Struct, frozen=True):
    """The request that tells the service to stop.  `body`, `headers` and `headers_from` are as in rest.call, but none of that call's are taken over."""

    method: str
    url: str
    body: Body = None
    headers: Headers = msgspec.field(default_factory=dict)
    headers_from: HeadersFrom = None


class Cookie(msgspec.Struct, frozen=True):
    """A cookie that the service has set.  It is sent only to the hosts and paths that it is for."""

    name: str
    value: str
    domain: str
    path: str = "/"
    secure: bool = False
    expires: int | None = None


class Failure(msgspec.Struct, frozen=True):
    """What went wrong.  `type` is ConnectionError, Timeout, StatusError, ResponseError, RequestError, or what an activity raised.

    `status` and `body` are those of a response with an error status.
    """

    type: str
    message: str
    status: int | None = None
    body: Any = None


class Outcome(msgspec.Struct, frozen=True):
    """How a call ended.  `response` is the callback's JSON, or without a callback that of the HTTP response (None for an empty one).

    `error` is set if status is SYSTEM_ERROR; `attempts` counts the requests sent, except those that cancel; `cookies` are for
    further calls of the same service.  What `response` means is the service's own affair (LR-22).
    """

    status: Status
    response: Any = None
    initial_response: Any = None
    callback_response: Any = None
    cancel_response: Any = None
    error: Failure | None = None
    attempts: int = 0
    cookies: list[Cookie] = msgspec.field(default_factory=list)


class Sent(msgspec.Struct, frozen=True):
    """One HTTP request: the argument of the activity `kwflow.rest.request`."""

    method: str
    url: str
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    body: Any = None
    cookies: list[Cookie] = msgspec.field(default_factory=list)
    timeout_s: float = 30.0
    response_bytes_max: int = 256_000
    headers_from: str | None = None


class Response(msgspec.Struct, frozen=True):
    """What came back: the result of the activity `kwflow.rest.request`.  `cookies` are all that are valid now; None: unchanged.

    If there is no response, or one that cannot be read, `failure` says why, and `final` whether another attempt is useless.
    """

    status: int
    body: Any = None
    cookies: list[Cookie] | None = None
    retry_after_s: float | None = None
    failure: Failure | None = None
    final: bool = False


class Plan(msgspec.Struct, frozen=True):
    """The arguments of one rest.call, checked."""

    request: Request
    callback: bool
    cookies: list[Cookie]
    retry: dict[str, Any]
    request_timeout_s: float
    timeout_s: float | None
    heartbeat_s: float | None
    success: Callable[[Any], object] | None
    cancel: Callable[[Any], Request | None] | Request | None
    cancel_timeout_s: float


class RestError(KwflowError):
    """A call did not succeed: `outcome` says how it ended, and what the service had answered until then."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message, outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        return str(self.args[0])


class RestCancelled(Cancelled):
    """The wait for a call was cancelled, and the service was told so if the call says how; `outcome` is that of the call."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message, outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        return str(self.args[0])


def checked(request: Request) -> Request:
    """Return the request with its method in capitals, and an activity replaced by its name.  Raises UsageError for what cannot be sent."""
    method, url, given = request.method, request.url, request.headers_from
    if not isinstance(method, str) or not method.isascii() or not method.isalpha():
        raise UsageError(f"rest: a method must be a word such as POST, not {method!r}")
    if not isinstance(url, str) or not place(url):
        shown = re.sub("//[^/]*@", "//", url.partition("?")[0]) if isinstance(url, str) else url
        raise UsageError(f"rest: a URL must begin with http:// or https:// and name a host, not {shown!r}")
    name = given.name if isinstance(given, Activity) else given
    if name is not None and not isinstance(name, str):
        raise UsageError(f"rest: headers_from must be an activity (a function decorated with @kw.activity) or its name, not {given!r}")
    return Request(method.upper(), url, request.body, request.headers, name)


def place(url: str) -> str:
    """Scheme, host and path of a URL, for messages, which must not show a query or a password; "" for what is no URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not host or any(character.isspace() for character in url):
        return ""
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path}"


def wrong_header(headers: object) -> str | None:
    """Say which of these headers cannot be sent, without its value, which may be a secret; None if all can.

    A line break in a value, for example, would begin another header.
    """
    if not isinstance(headers, Mapping):
        return f"headers must be a mapping of str to str, not a {type(headers).__name__}"
    for name, value in headers.items():
        if not isinstance(name, str) or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            return f"header {name!r}: a name must consist of letters, digits and hyphens"
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            return f"header {name!r}: its value is not printable ASCII (encode other characters; strip a line break at the end)"
        if value != value.strip():
            return f"header {name!r}: its value begins or ends with a space; strip it"
    return None
