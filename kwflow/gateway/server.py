"""The server of a gateway: where it listens, and how it ends.

On SIGTERM it stops listening, answers the requests that wait for an outcome, and lets commands get their replies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import UsageError
from kwflow.gateway.application import application
from kwflow.gateway.service import Look, Service
from kwflow.gateway.tls import Certificate, certificate_of
from kwflow.worker import Lending

__all__ = ["Ending", "Server", "listening", "serve", "url_of"]

_DEAD_AFTER_S = 60  # for a caller whose machine or line is gone: two sweeps of 30 s, as in the affinity service (AF-9)
_IDLE_MAX = 1000  # connections in addition to those whose requests wait
_BACKLOG = 1024
_GOODBYE_S = 0.5


def listening(host: str, port: int) -> socket.socket:
    """A listening socket whose connections end when the other side is gone.  Raises UsageError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(found[0], socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {host} --port {port}: {error}") from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _DEAD_AFTER_S // 2), ("TCP_KEEPINTVL", _DEAD_AFTER_S // 4), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", _DEAD_AFTER_S * 1000)):
        if hasattr(socket, name):  # Linux has all of these; connections inherit them
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        made.bind(found[4])
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        raise UsageError(f"--host {host} --port {port}: {error}") from None
    return made


class Ending(uvicorn.Server):
    """A uvicorn server that logs only problems, and ends at most `end_s` after it is asked to."""

    def __init__(self, served: ASGIApp, connections_max: int, end_s: int, tls: Certificate | None) -> None:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        files: dict[str, Any] = {} if tls is None else {"ssl_certfile": tls.cert, "ssl_keyfile": tls.key, "ssl_ciphers": ""}  # Python's default ciphers; uvicorn's are those of TLS 1.0
        super().__init__(uvicorn.Config(
            served, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            limit_concurrency=connections_max, timeout_graceful_shutdown=end_s, **files,
        ))  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        leaving = asyncio.ensure_future(self._leave())
        try:
            await super().shutdown(sockets)
        finally:
            leaving.cancel()

    async def _leave(self) -> None:
        """Abort connections that are slow to close.

        A TLS connection is closed only once both sides have said so, but a client that keeps one for later use does not read: the end would take all of `end_s`.
        """
        before: set[Any] = set()
        while True:
            closing = {connection for connection in self.server_state.connections if connection.transport.is_closing()}
            for connection in closing & before:
                connection.transport.abort()
            before = closing
            await asyncio.sleep(_GOODBYE_S)


class Server(Ending):
    """The server of a gateway."""

    def __init__(self, service: Service, tls: Certificate | None = None) -> None:
        config = service.config
        self._service = service
        super().__init__(application(service), config.gateway_waits_max + _IDLE_MAX, math.ceil(config.command_timeout_s) + 1, tls)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.end()
        await super().shutdown(sockets)


def serve(config: Config, connect: Callable[[], Client], look: Look, host: str | None, port: int, log: Callable[[str], None], queues: Iterable[str] = ()) -> None:
    """Serve until SIGTERM, and lend the calls of these queues.

    Unless `host` says otherwise, it listens on every address if there are tokens, and on 127.0.0.1 if not.  Raises UsageError if it cannot listen
    there or its certificate is invalid, TransportError if there is no broker (AF-6) or a topic is missing.
    """
    host, of_this_machine = host or ("0.0.0.0" if config.gateway_tokens else "127.0.0.1"), host is None and not config.gateway_tokens
    tls = certificate_of(config, "gateway")
    with ExitStack() as stack:
        sock = stack.enter_context(closing(listening(host, port)))
        service = stack.enter_context(Service(config, connect, look, [stack.enter_context(Lending(config, queue, log)) for queue in queues], of_this_machine))
        log(f"kwflow gateway listens on {url_of(sock, tls)}")
        if not config.gateway_tokens:
            log("everybody who can reach the gateway may do everything: set gateway_tokens to require a token")
        Server(service, tls).run([sock])


def url_of(sock: socket.socket, tls: Certificate | None = None) -> str:
    scheme, (host, port) = "http" if tls is None else "https", sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
