"""A service over HTTP for tests of rest.call: it notes what it is asked, and answers as the test says; it calls back when the test says so."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from kwflow.testing import WorkflowTester


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    data: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.data)


@dataclass
class Answer:
    """What is sent back; `body` is JSON unless it is bytes, None is none."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Service:
    """`answers`: path -> an Answer, several to be given one after the other (the last one again and again), or a function of what was asked."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.asked: list[Asked] = []
        self.answers: dict[str, Any] = {}

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    def last(self, path: str) -> Asked:
        return [asked for asked in self.asked if asked.path == path][-1]

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        found = self.answers.get(asked.path, Answer(status=404))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        made: Answer = found(asked) if callable(found) else found
        return made

    def call_back(self, tester: WorkflowTester, path: str, value: Any = None, name: str = "callbackUrl") -> None:
        """What the gateway does of a POST to the URL that came with the last request of this path."""
        _, _, id, ref = urlsplit(self.last(path).body[name]).path.split("/")
        tester.resume(unquote(id), unquote(ref), value)

    def beat(self, tester: WorkflowTester, path: str) -> None:
        self.call_back(tester, path, None, "heartBeatUrl")


@contextmanager
def serving(answer: Callable[[Asked], Answer]) -> Iterator[str]:
    """A server on a free port; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            made = answer(Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, data))
            body = made.body if isinstance(made.body, bytes) else b"" if made.body is None else json.dumps(made.body).encode()
            self.send_response(made.status)
            for name, value in ({} if isinstance(made.body, (bytes, type(None))) else {"Content-Type": "application/json"}).items() | made.headers.items():
                self.send_header(name, value)
            if made.status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = handle_one

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def service() -> Iterator[Service]:
    made = Service("")
    with serving(made.answer) as base:
        made.base = base
        yield made


def nowhere() -> str:
    """A URL at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/"
