"""Admission to the application, before any page.

A console without tokens is for the user of this machine, whose browser opens pages from anywhere.  So it answers only under a name that no page from
elsewhere can have (DNS rebinding), and accepts a form only from one of its own pages.  Paths are used as they were sent: an id may contain a slash (%2F).
"""

from __future__ import annotations

import base64
import binascii

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kwflow.console.site import Site
from kwflow.gateway.gate import is_local, known

__all__ = ["Gate"]

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser would send forms without an Origin
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ASK = {"WWW-Authenticate": 'Basic realm="kwflow console", charset="UTF-8"'}


class Gate:
    """An ASGI application around another one."""

    def __init__(self, site: Site, inner: ASGIApp) -> None:
        self._site = site
        self._inner = inner
        self._tokens = [token.get_secret_value().encode() for token in site.config.console_tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["path"] = scope["raw_path"].decode("ascii", "replace")
        request = Request(scope)
        status, title, remedy = self._refused(request)
        headers = {**_HEADERS, **(_ASK if status == 401 else {})}

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.lower().encode(), value.encode()) for name, value in headers.items())]
            await send(message)

        if status:
            await self._site.page("problem.html", status, title=title, detail="", remedy=remedy, bare=True)(scope, receive, sent)
        else:
            await self._inner(scope, receive, sent)

    def _refused(self, request: Request) -> tuple[int, str, str]:
        """The status (0 if the request may enter), why it may not, and what to do."""
        host = request.headers.get("host", "")
        if self._tokens and not self._knows(request.headers.get("authorization", "")):
            return 401, "This console needs a token", "enter one of console_tokens as the password, with any user name"
        if not self._tokens and not is_local(host):
            return 403, f"Without tokens, this console does not answer as {host[:200]!r}", "open it as localhost or by its IP address; or set console_tokens: then it answers under any name"
        if request.method == "POST" and self._site.read_only:
            return 403, "This console is read-only", "start it without --read-only, or use the command line"
        if request.method == "POST" and not _own(request, host):
            return 403, "This form was not sent by a page of this console", "open the page of the instance here and use its form; a proxy in front must not change Host or Sec-Fetch-Site"
        return 0, "", ""

    def _knows(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
        return known(self._tokens, given) and scheme.lower() == "basic"


def _own(request: Request, host: str) -> bool:
    """Whether a form comes from a page of this console.  Browsers say where a form comes from, and no page can say otherwise.

    1. The console speaks TLS, or a proxy on this machine does and says so (X-Forwarded-Proto).
    2. An attacker on the line answers http:// under the same name, with a page that sends a form.
    3. That form's Origin has this host, but not this scheme.  Behind a proxy that does not say so, https looks like http here, so https is accepted too.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "").lower()
    return site == "same-origin" if site is not None else host != "" and origin in {f"{scheme}://{host.lower()}" for scheme in (request.scope["scheme"], "https")}
