"""The server of a gateway: where it listens, and how it ends.

SIGTERM stops the listening, answers who waits for an outcome, and lets commands have their replies.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing

import uvicorn
from starlette.types import ASGIApp

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import UsageError
from kwflow.gateway.application import application
from kwflow.gateway.service import Look, Service
from kwflow.worker import Lending

__all__ = ["Server", "listening", "serve", "settings", "url_of"]

_DEAD_AFTER_S = 60  # a caller whose machine or line is gone: two sweeps of 30 s, as the affinity service has it (AF-9)
_IDLE_MAX = 1000  # connections beside those whose requests wait
_BACKLOG = 1024


def listening(host: str, port: int) -> socket.socket:
    """A socket whose connections end when nobody is there any more.  Raises UsageError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(found[0], socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {host} --port {port}: {error}") from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _DEAD_AFTER_S // 2), ("TCP_KEEPINTVL", _DEAD_AFTER_S // 4), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", _DEAD_AFTER_S * 1000)):
        if hasattr(socket, name):  # Linux has all; connections inherit them
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        made.bind(found[4])
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        raise UsageError(f"--host {host} --port {port}: {error}") from None
    return made


def settings(served: ASGIApp, connections_max: int, end_s: int) -> uvicorn.Config:
    """Of a server that logs what goes wrong, and ends at most so long after it is asked to."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Config(
        served, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        limit_concurrency=connections_max, timeout_graceful_shutdown=end_s,
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn, with a gateway inside."""

    def __init__(self, service: Service) -> None:
        config = service.config
        self._service = service
        super().__init__(settings(application(service), config.gateway_waits_max + _IDLE_MAX, math.ceil(config.command_timeout_s) + 1))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.end()
        await super().shutdown(sockets)


def serve(config: Config, connect: Callable[[], Client], look: Look, host: str | None, port: int, log: Callable[[str], None], queues: Iterable[str] = ()) -> None:
    """Answer until SIGTERM, and lend the calls of these queues; on every address with tokens and on 127.0.0.1 without, unless `host` says otherwise.

    Raises UsageError if it cannot listen there, TransportError if there is no broker (AF-6), or a topic is missing.
    """
    host, of_this_machine = host or ("0.0.0.0" if config.gateway_tokens else "127.0.0.1"), host is None and not config.gateway_tokens
    with ExitStack() as stack:
        sock = stack.enter_context(closing(listening(host, port)))
        service = stack.enter_context(Service(config, connect, look, [stack.enter_context(Lending(config, queue, log)) for queue in queues], of_this_machine))
        log(f"kwflow gateway listens on {url_of(sock)}")
        if not config.gateway_tokens:
            log("everybody who reaches it may do everything: set gateway_tokens to ask for one")
        Server(service).run([sock])


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
