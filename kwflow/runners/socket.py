"""How other processes reach the engine that holds an embedded directory: a Unix socket in it, JSON lines.

One request a connection: {"topic", "key", "value", "headers"}; the answer is {"offset"}.  The socket's address goes
through /proc/self/fd because a path may have 107 bytes only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kwflow.errors import TransportError
from kwflow.runners.embedded import Embedded

__all__ = ["serve", "submit"]

_NAME = "engine.sock"
_REQUEST_BYTES_MAX = 16 * 1024 * 1024
Headers = tuple[tuple[str, bytes | None], ...]


class _Request(msgspec.Struct):
    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@contextlib.contextmanager
def _address(directory: Path) -> Iterator[str]:
    plain = str(directory / _NAME)
    if len(os.fsencode(plain)) < 100 or not os.path.isdir("/proc/self/fd"):
        yield plain
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{fd}/{_NAME}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def serve(engine: Embedded) -> Iterator[None]:
    """Take appends from other processes while inside."""
    (engine.directory / _NAME).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _address(engine.directory) as address:
        listener.bind(address)
    listener.listen(64)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                _answer(engine, connection)

    thread = threading.Thread(target=accept, name="kwflow-socket", daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        (engine.directory / _NAME).unlink(missing_ok=True)


def _answer(engine: Embedded, connection: socket.socket) -> None:
    connection.settimeout(5)
    try:
        request = msgspec.json.decode(_line(connection), type=_Request)
        offset = engine.append(request.topic, request.key, request.value, request.headers)
        connection.sendall(msgspec.json.encode({"offset": offset}) + b"\n")
    except (OSError, msgspec.DecodeError) as error:
        with contextlib.suppress(OSError):
            connection.sendall(msgspec.json.encode({"error": str(error)}) + b"\n")


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part or len(data) > _REQUEST_BYTES_MAX:
            raise OSError("the request is too long or was cut off")
        data += part
    return data


def submit(directory: Path, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> int:
    """Append one record: through the engine that runs, else directly.  Raises TransportError."""
    if not (directory / _NAME).exists():
        engine = Embedded(directory)
        try:
            return engine.append(topic, key, value, headers)
        finally:
            engine.close()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    with connection:
        try:
            with _address(directory) as address:
                connection.connect(address)
        except ConnectionRefusedError:  # left behind by a killed engine
            (directory / _NAME).unlink(missing_ok=True)
            return submit(directory, topic, key, value, headers)
        except OSError as error:
            raise TransportError(f"cannot reach the engine of {directory}: {error}") from None
        connection.sendall(msgspec.json.encode(_Request(topic, key, value, headers)) + b"\n")
        answer = msgspec.json.decode(_line(connection))
    if "offset" not in answer:
        raise TransportError(f"the engine of {directory} refused the record: {answer.get('error')}")
    return int(answer["offset"])
