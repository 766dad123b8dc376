"""The console's application and its server."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import closing

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kwflow.console import acting, pages
from kwflow.console.gate import Gate
from kwflow.console.problems import answered
from kwflow.console.site import Site
from kwflow.console.sources import Sources
from kwflow.errors import KwflowError, UsageError
from kwflow.gateway.server import Ending, listening, url_of
from kwflow.gateway.tls import Certificate, certificate_of

__all__ = ["application", "serve", "server_of"]

_CONNECTIONS_MAX = 100
_END_S = 5


def application(site: Site) -> ASGIApp:
    inner = Starlette(routes=[*pages.ROUTES, *acting.ROUTES], exception_handlers={KwflowError: answered, HTTPException: answered, Exception: answered})
    inner.state.site, inner.state.sources = site, Sources(site.config, site.embedded, site.directory)
    inner.router.redirect_slashes = False
    return Gate(site, inner)


def serve(site: Site, host: str, port: int, log: Callable[[str], None]) -> None:
    """Serve until SIGTERM.  Raises UsageError if it cannot or must not listen there, or if its certificate is invalid."""
    tls = certificate_of(site.config, "console")
    if not site.config.console_tokens and not _loopback(host):
        raise UsageError(f"--host {host}: without tokens the console answers on 127.0.0.1 only; set console_tokens (tokens in [console], made with: openssl rand -hex 32)")
    with closing(listening(host, port)) as sock:
        log(f"kwflow console listens on {url_of(sock, tls)}")
        server_of(site, tls).run([sock])


def server_of(site: Site, tls: Certificate | None = None) -> Ending:
    return Ending(application(site), _CONNECTIONS_MAX, _END_S, tls)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
