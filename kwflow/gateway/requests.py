"""The parts of a request: ids from its path, options from its query, one JSON value from its body.

The body is always the value, and options are always in the query.  Every check of them is here; whatever is wrong raises a
UsageError or RequestError that names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote_to_bytes

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kwflow.core import wire
from kwflow.core.charsets import text_in
from kwflow.core.values import check_levels
from kwflow.errors import UsageError
from kwflow.gateway.problems import Problem, RequestError
from kwflow.gateway.service import Gone, Service

__all__ = [
    "CommandId", "Options", "Seconds", "StartId", "Wait", "answer", "any_body", "body", "checked_json", "key_of_request", "no_body", "options", "outcome_path", "query", "refusal", "segment",
    "service_of", "trace_of", "workflow_path",
]  # fmt: skip

_T = TypeVar("_T", bound="Options")
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Wait = Annotated[Seconds, msgspec.Meta(description="Seconds to wait before answering, at most gateway_wait_s_max (300).")]
StartId = Annotated[str, msgspec.Meta(description="Only for this run of the workflow.", extra_json_schema={"minLength": 1, "maxLength": wire.ID_CHARACTERS_MAX})]
CommandId = Annotated[str, msgspec.Meta(description="With the same key it is done once, however often it is sent.", extra_json_schema={"minLength": 1, "maxLength": wire.ID_CHARACTERS_MAX})]
_READ_S = 30  # for the body: a slower sender would take a place from others
_TRACE_CHARACTERS_MAX = 1_000
_NULL = msgspec.Raw(b"null")


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of one route: its query may have these fields and no others."""


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def segment(request: Request, name: str) -> str:
    """A part of the path, decoded.  The application sees paths as they were sent, so that an id may contain a slash (%2F).  Raises UsageError."""
    try:
        return unquote_to_bytes(request.path_params[name]).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"the {name} in the path is not UTF-8") from None


def query(request: Request) -> list[tuple[str, str]]:
    """The names and values in the query.  Raises UsageError if it is not UTF-8: if it were read leniently, two ids could become one."""
    try:
        unquote_to_bytes(request.scope["query_string"]).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError("the query is not UTF-8") from None
    return request.query_params.multi_items()


def options(request: Request, kind: type[_T]) -> _T:
    """Decode the query's options.  Raises UsageError for one that is unknown, given twice, or has a wrong value."""
    given: dict[str, str] = {}
    for name, value in query(request):
        if name in given:
            raise UsageError(f"{name} is given twice")
        given[name] = value
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"options: {error}; there are: {', '.join(kind.__struct_fields__) or 'none'}") from None


def trace_of(request: Request) -> dict[str, str]:
    """The caller's trace context (W3C Trace Context), which continues in the workflow."""
    return {name: value for name in ("traceparent", "tracestate") if len(value := request.headers.get(name, "")[: _TRACE_CHARACTERS_MAX + 1]) in range(1, _TRACE_CHARACTERS_MAX + 1)}


def key_of_request(request: Request, given: str | None, option: str) -> str | None:
    """The key that makes the request idempotent: this option, or the header Idempotency-Key.  Raises UsageError if they differ."""
    header = request.headers.get("idempotency-key")
    if header is not None and len(header) > 1 and header[0] == header[-1] == '"':  # a quoted string, as the header's draft says
        header = header[1:-1]
    if given is not None and header is not None and given != header:
        raise UsageError(f"{option} and Idempotency-Key differ; send only one of them")
    key = header if given is None else given
    if key is not None and not 1 <= len(key) <= wire.ID_CHARACTERS_MAX:
        raise UsageError(f"{option} (or Idempotency-Key) has 1 to {wire.ID_CHARACTERS_MAX} characters, not {len(key)}")
    return key


async def _read(request: Request) -> bytes:
    """Read the body, up to `value_bytes_max`.  Raises RequestError, Gone."""
    most, parts, size = service_of(request).config.value_bytes_max, [], 0
    try:
        async with asyncio.timeout(_READ_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise RequestError("too_large", f"the body has more than {most} bytes (limit value_bytes_max)")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError("slow", f"the body did not arrive within {_READ_S} s") from None


def checked_json(data: bytes, what: str) -> msgspec.Raw:
    """Return the same bytes.  Raises RequestError, which names `what`, if they are not JSON that an engine accepts."""
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("bad_json", f"{what} is not JSON: {error}") from None
    try:
        check_levels(data)
    except ValueError as error:
        raise RequestError("bad_json", f"{what} is nested too deeply: {error}") from None
    return msgspec.Raw(data)


async def body(request: Request) -> msgspec.Raw:
    """The value in the body; an empty body is null.  Raises RequestError, Gone."""
    data = await _read(request)
    return checked_json(data, "the body") if data.strip() else _NULL


async def no_body(request: Request) -> None:
    """Check that there is no body.  Raises UsageError if there is one, as its sender expects it to have an effect."""
    if await _read(request):
        raise UsageError("this path takes no body; pass options in the query")


async def any_body(request: Request) -> Any:
    """The value from a sender that does not know kwflow.  Raises RequestError, Gone.

    A JSON content type must have JSON, `text/*` is text, and anything else is JSON if it can be read so, else text.
    """
    data = await _read(request)
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    kind = kind.strip()
    if not data.strip():
        return _NULL
    if kind == "application/json" or kind.endswith("+json"):
        return checked_json(data, "the body")
    if not kind.startswith("text/"):
        try:
            return checked_json(data, "the body")
        except RequestError:
            """It is text, then."""
    charset = parameters.partition("charset=")[2].partition(";")[0].strip(' "') or "utf-8"
    try:
        return text_in(data, charset)
    except (LookupError, ValueError):
        raise RequestError("bad_json", f"the body is neither JSON nor text in {charset[:100]}") from None


def workflow_path(request: Request, id: str) -> str:
    return f"{request.scope.get('root_path', '')}/workflows/{quote(id, safe='')}"


def outcome_path(request: Request, id: str, start_id: str | None) -> str:
    return f"{workflow_path(request, id)}/outcome" + (f"?start_id={quote(start_id, safe='')}" if start_id else "")


def answer(http: int, value: object = None, headers: Iterable[tuple[str, str]] = ()) -> Response:
    """An answer in JSON, or without a body for 204."""
    content = msgspec.json.encode(value) if http != 204 else None
    return Response(content, http, dict(headers), media_type="application/json" if http != 204 else None)


def refusal(problem: Problem) -> Response:
    return Response(msgspec.json.encode(problem.body), problem.http, problem.headers, media_type="application/problem+json")
