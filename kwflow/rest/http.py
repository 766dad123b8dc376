"""The activities behind rest.call: one draws the token of a callback, the other sends a request.  This is the only file that knows httpx.

Whatever happens on the network becomes a Response: `calling.py` decides what is tried again, and logs it with the step.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import hashlib
import http.cookiejar
import secrets
import ssl
import time
from typing import Any

import msgspec

from kwflow.activities import activity, find_activity
from kwflow.core.charsets import text_in
from kwflow.core.values import check_levels
from kwflow.errors import ActivityError
from kwflow.rest.values import Cookie, Failure, Response, Sent, place, wrong_header
from kwflow.running import activity_info

__all__ = ["request", "token"]

_SAFE = ("GET", "HEAD", "OPTIONS")  # methods that are safe to repeat
_ERROR_BODY_CHARACTERS_MAX = 2_000  # of the text in a response with an error status
_QUOTED_CHARACTERS_MAX = 200  # of a header or a reason phrase that a failure quotes
_COOKIES_MAX = 50  # RFC 6265 §6.1: how many a client should be able to keep for a host
_COOKIE_CHARACTERS_MAX = 16_384  # of all cookies together, as they are sent with each request
_RETRY_AFTER_S_MAX = 86_400.0


@activity(name="kwflow.rest.token")
def token() -> str:
    """The part of a callback's URL that nobody can guess."""
    return secrets.token_urlsafe(24)


@activity(name="kwflow.rest.request")
async def request(sent: Sent) -> Response:
    """Send one HTTP request, without following redirects.  Raises ActivityError if this engine cannot send requests."""
    try:
        import httpx
    except ImportError:
        raise ActivityError("rest.call needs httpx, which is not installed for this engine: pip install 'kwflow[rest]'", "MissingExtra", final=True) from None

    where = f"{sent.method} {place(sent.url)}"
    headers = await _headers(sent)
    content = _content(sent.body, headers)
    try:
        async with (
            asyncio.timeout(sent.timeout_s),
            httpx.AsyncClient(verify=_tls(), timeout=None, cookies=_jar(sent.cookies)) as client,
            client.stream(sent.method, sent.url, headers=headers, content=content) as response,
        ):
            data = await _read(response, sent.response_bytes_max)
            cookies = _cookies(client.cookies.jar)
            return _response(where, response, data, cookies, sent)
    except TimeoutError:
        return Response(0, failure=Failure("Timeout", f"{where}: no response within {sent.timeout_s:g} s"))
    except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL, UnicodeError) as error:
        return Response(0, failure=Failure("RequestError", f"{where} cannot be sent: {_error_text(error)}"), final=True)
    except httpx.DecodingError as error:
        return Response(0, failure=Failure("ResponseError", f"the response to {where} cannot be read: {_error_text(error)}"), final=True)
    except (httpx.HTTPError, OSError) as error:
        return Response(0, failure=Failure("ConnectionError", f"{where} failed: {_error_text(error)}"))


def _error_text(error: Exception) -> str:
    """An error's text without the bytes that h11 quotes: a header or a cookie that it refuses may be a secret."""
    text = str(error).partition(" b'")[0].partition(' b"')[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@functools.cache
def _tls() -> ssl.SSLContext:
    """The TLS context, cached: reading the certificates that the system trusts takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context()


# -- what is sent --------------------------------------------------------------------------------------------------------
async def _headers(sent: Sent) -> dict[str, str]:
    """The author's headers, and defaults for those they leave to us.  Raises ActivityError if the `headers_from` activity returns none that can be sent."""
    headers = dict(sent.headers)
    if sent.headers_from is not None:
        found = find_activity(sent.headers_from)
        if found is None:
            raise ActivityError(f"rest.call(headers_from={sent.headers_from!r}): this engine has no activity of that name", "MissingActivity", final=True)
        given = await found.function() if found.is_async else await asyncio.to_thread(found.function)
        if (wrong := wrong_header(given)) is not None:
            raise ActivityError(f"what activity {sent.headers_from} returned cannot be sent: {wrong}", "BadHeaders", final=True)
        headers |= given
    present = {name.lower() for name in headers}
    if "accept-encoding" not in present:  # a compressed response could exceed the limit before anybody notices
        headers["Accept-Encoding"] = "identity"
    if "accept" not in present:
        headers["Accept"] = "application/json"
    if "idempotency-key" not in present and sent.method not in _SAFE:
        headers["Idempotency-Key"] = hashlib.sha256(activity_info().idempotency_key.encode()).hexdigest()[:32]
    return headers


def _content(body: Any, headers: dict[str, str]) -> bytes | None:
    """The encoded body: JSON, unless it is text and the author gave another Content-Type."""
    if body is None:
        return None
    kind = next((value for name, value in headers.items() if name.lower() == "content-type"), None)
    if kind is None:
        headers["Content-Type"] = "application/json"
    elif isinstance(body, str) and not _is_json(kind):
        return body.encode()
    return msgspec.json.encode(body)


def _is_json(kind: str) -> bool:
    name = kind.partition(";")[0].strip().lower()
    return name == "application/json" or name.endswith("+json")


# -- what comes back -----------------------------------------------------------------------------------------------------
async def _read(response: Any, bytes_max: int) -> bytes | None:
    """Read the body; None if it is larger than `bytes_max`, and then the rest is not read."""
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        if len(data) > bytes_max:
            return None
    return bytes(data)


def _response(where: str, response: Any, data: bytes | None, cookies: list[Cookie], sent: Sent) -> Response:
    status: int = response.status_code
    kept = len(cookies) <= _COOKIES_MAX and sum(len(cookie.name) + len(cookie.value) for cookie in cookies) <= _COOKIE_CHARACTERS_MAX
    problem = None if kept else f"sets more than {_COOKIES_MAX} cookies or {_COOKIE_CHARACTERS_MAX} characters of cookies"
    body: Any = None
    if data is None:
        problem = f"has more than {sent.response_bytes_max} bytes (limit activity_bytes_max)"
    elif data:
        try:
            body = _decoded(data, response)
        except ValueError as error:
            problem = f"does not match its Content-Type {response.headers.get('content-type', 'application/json')[:_QUOTED_CHARACTERS_MAX]!r}: {error}"
            body = None
    if response.is_success:
        failure = Failure("ResponseError", f"the response to {where} {problem}", status) if problem else None
        return Response(status, body, cookies if kept else None, failure=failure, final=failure is not None)
    if body is None and data:
        body = data.decode("utf-8", "replace")
    if isinstance(body, str):
        body = body[:_ERROR_BODY_CHARACTERS_MAX]
    failure = Failure("StatusError", f"{where} was answered with {status} {response.reason_phrase[:_QUOTED_CHARACTERS_MAX]}".rstrip(), status, body)
    return Response(status, None, cookies if kept else None, _retry_after_s(response.headers.get("retry-after")), failure)


def _decoded(data: bytes, response: Any) -> Any:
    """Decode a body as the gateway decodes callbacks: text for a text Content-Type, else JSON, or text if it is no JSON and has another type.  Raises ValueError."""
    kind = response.headers.get("content-type", "application/json")
    if not kind.lower().startswith("text/"):
        try:
            value = msgspec.json.decode(data)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValueError:
            if _is_json(kind):
                raise
        else:
            check_levels(data)
            return value
    try:
        return text_in(data, response.charset_encoding or "utf-8")
    except LookupError as error:
        raise ValueError(str(error)) from None


def _retry_after_s(header: str | None) -> float | None:
    """Parse Retry-After, which has seconds or a date (RFC 9110 §10.2.3); None for anything else."""
    if header is None:
        return None
    try:
        wanted = float(header) if header.strip().isdigit() else email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(wanted, 0.0), _RETRY_AFTER_S_MAX)


def _jar(cookies: list[Cookie]) -> http.cookiejar.CookieJar:
    jar = http.cookiejar.CookieJar()
    for cookie in cookies:
        for_domain = cookie.domain.startswith(".")
        jar.set_cookie(
            http.cookiejar.Cookie(
                0, cookie.name, cookie.value, None, False, cookie.domain, for_domain, for_domain, cookie.path, True,
                cookie.secure, cookie.expires, cookie.expires is None, None, None, {},
            )
        )  # fmt: skip
    return jar


def _cookies(jar: http.cookiejar.CookieJar) -> list[Cookie]:
    """The cookies that are still valid and can be sent.

    Any other would make each later request fail, even the one that cancels (RFC 6265 §4.1.1: ASCII).
    """
    jar.clear_expired_cookies()
    made = [Cookie(cookie.name, cookie.value or "", cookie.domain, cookie.path, bool(cookie.secure), cookie.expires) for cookie in jar]
    return [cookie for cookie in made if wrong_header({"Cookie": f"{cookie.name}={cookie.value}"}) is None]
