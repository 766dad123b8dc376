"""A gateway or a console on a thread of the test, listening on a real socket, and who reads a stream of its."""

import contextlib
import functools
import json
import pathlib
import queue
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import httpx

from kwflow.client import Client
from kwflow.config import Config
from kwflow.console.server import server_of
from kwflow.console.site import Site
from kwflow.gateway.server import Server, listening, url_of
from kwflow.gateway.service import Service
from kwflow.gateway.tls import Certificate, certificate_of
from kwflow.runners import outside
from kwflow.worker import Lending
from tests.described import check

DEADLINE_S = 30


class Serving:
    """Answers from its beginning to `close`; `http` is a client of it, `service` what is inside."""

    def __init__(self, config: Config, connect: Callable[[], Client], lendings: Iterable[Lending] = (), embedded: pathlib.Path | None = None, of_this_machine: bool = False) -> None:
        tls = certificate_of(config, "gateway")
        self.sock = listening("127.0.0.1", 0)
        self.url = url_of(self.sock, tls)
        self.service = Service(config, connect, functools.partial(outside.asked, config, embedded), lendings, of_this_machine)
        self.server = Server(self.service, tls)
        self._thread = threading.Thread(target=self.server.run, args=([self.sock],), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False, verify=verified(tls), event_hooks={"response": [check]})

    def close(self) -> None:
        self.http.close()
        self.end()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.service.close()

    def end(self) -> None:
        """What SIGTERM does."""
        self.server.should_exit = True

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def verified(tls: Certificate | None) -> ssl.SSLContext | bool:
    """What a client takes: this certificate and no other."""
    return ssl.create_default_context(cafile=tls.cert) if tls is not None else True


class Stream:
    """Reads Server-Sent Events on a thread."""

    def __init__(self, serving: Serving, *ids: str, **options: str) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.http = httpx.Client(base_url=serving.url, timeout=DEADLINE_S, trust_env=False, verify=verified(certificate_of(serving.service.config, "gateway")), event_hooks={"response": [check]})
        self.answer = self.http.send(self.http.build_request("GET", "/outcomes", params=[*(("id", id) for id in ids), *options.items()]), stream=True)
        assert (self.answer.status_code, self.answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(httpx.HTTPError):
            for line in self.answer.iter_lines():
                if line.startswith("data: "):
                    self.events.put(json.loads(line.removeprefix("data: ")))
                elif line.startswith(":"):
                    self.events.put(line)
            self.events.put(None)

    def next(self) -> Any:
        return self.events.get(timeout=DEADLINE_S)


@contextlib.contextmanager
def console(site: Site) -> Iterator[httpx.Client]:
    """A client of a console; what it sends bears the Origin of the console's own pages."""
    tls = certificate_of(site.config, "console")
    with contextlib.closing(listening("127.0.0.1", 0)) as sock:
        url, server = url_of(sock, tls), server_of(site, tls)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        with httpx.Client(base_url=url, headers={"Origin": url}, timeout=DEADLINE_S, trust_env=False, verify=verified(tls)) as http:
            yield http
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
