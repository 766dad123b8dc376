"""How other processes reach the engine that holds an embedded directory: a Unix socket in that directory, with JSON lines.

There is one request per connection.  {"groups"} appends, for each group, all of its records or none; the answer is {"offsets"}.
{"follow": {topic: offset}} is answered with the records from these offsets on, as they are committed, and now and then with an
empty line, so that either side notices when the other has gone.  The socket's address goes through /proc/self/fd if needed,
because the path of a socket may have only 107 bytes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kwflow.core.wire import Headers, Output, Record
from kwflow.errors import TransportError
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.groups import Group

__all__ = ["Follower", "is_served", "serve", "submit", "submit_all"]

_NAME = "engine.sock"
_REQUEST_BYTES_MAX = 16 * 1024 * 1024
_FOLLOWED_MAX = 500  # records of one topic that are sent at once
_SIGN_S = 0.5  # how often a follower is told that the engine is alive when there is nothing to read
_GONE_S = 5.0
_AGAIN_S = 0.05


class _Request(msgspec.Struct, omit_defaults=True):
    groups: tuple[Group, ...] = ()
    follow: dict[str, int] | None = None


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
    """Serve requests of other processes while inside of this."""
    (engine.directory / _NAME).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _address(engine.directory) as address:
        listener.bind(address)
    listener.listen(64)

    stopped = threading.Event()
    threads: set[threading.Thread] = set()

    def answer(connection: socket.socket) -> None:
        with connection:
            _answer(engine, connection, stopped)
        threads.discard(threading.current_thread())

    def accept() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:  # stopped, or no file descriptor is free at the moment
                stopped.wait(_AGAIN_S)
                continue
            worker = threading.Thread(target=answer, args=(connection,), name="kwflow-socket", daemon=True)
            threads.add(worker)
            worker.start()

    thread = threading.Thread(target=accept, name="kwflow-socket", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for worker in (thread, *threads):
            worker.join(5)
        if not engine.place.is_left():
            (engine.directory / _NAME).unlink(missing_ok=True)


def _answer(engine: Embedded, connection: socket.socket, stopped: threading.Event) -> None:
    connection.settimeout(5)
    try:
        request = msgspec.json.decode(_line(connection), type=_Request)
        if request.follow is not None:
            _follow(engine, connection, request.follow, stopped)
            return
        records = [record for group in request.groups for record in group.records]
        if not records or not all(record.topic for record in records):
            raise OSError("the request has no record, or one without a topic")
        offsets = engine.append_all(request.groups)
        connection.sendall(msgspec.json.encode({"offsets": offsets}) + b"\n")
    except (OSError, TransportError, msgspec.DecodeError) as error:
        with contextlib.suppress(OSError):
            connection.sendall(msgspec.json.encode({"error": str(error)}) + b"\n")


def _follow(engine: Embedded, connection: socket.socket, positions: dict[str, int], stopped: threading.Event) -> None:
    """Send records until either side goes away; what was written before this one does is sent."""
    seen, sign_at, last = -1, 0.0, False
    while not last:
        last = stopped.is_set()
        seen = engine.wait_written(seen, 0 if last else _SIGN_S)
        lines: list[bytes] = []
        for topic, position in positions.items():
            records = engine.read(topic, position, _FOLLOWED_MAX)
            if len(records) == _FOLLOWED_MAX:
                seen = -1  # do not wait: more records are there already
            lines += [msgspec.json.encode(record) for record in records]
            if records:
                positions[topic] = records[-1].offset + 1
        if lines or time.monotonic() >= sign_at:  # even while everything that is written goes to other topics
            connection.sendall(b"\n".join(lines) + b"\n")
            sign_at = time.monotonic() + _SIGN_S


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part or len(data) > _REQUEST_BYTES_MAX:
            raise OSError("the request is too long or was cut off")
        data += part
    return data


def is_served(directory: Path) -> bool:
    """Whether an engine holds the directory and takes requests."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        try:
            with _address(directory) as address:
                connection.connect(address)
        except OSError:
            return False
        return True


def submit(directory: Path, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> int:
    """Append one record, through the running engine or else directly; return its offset.  Raises TransportError."""
    return submit_all(directory, [Group((Output(topic, key, value, headers),))])[0][0]


def submit_all(directory: Path, groups: Sequence[Group]) -> list[list[int]]:
    """Append groups in one batch; return the offsets of each group's records, none for a group whose mark is already there.  Raises TransportError."""
    if not (directory / _NAME).exists():
        engine = Embedded(directory)
        try:
            return engine.append_all(groups)
        finally:
            engine.close()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    with connection:
        try:
            with _address(directory) as address:
                connection.connect(address)
            connection.sendall(msgspec.json.encode(_Request(tuple(groups))) + b"\n")
            answer = msgspec.json.decode(_line(connection))
        except ConnectionRefusedError:  # the socket was left behind by a killed engine
            (directory / _NAME).unlink(missing_ok=True)
            return submit_all(directory, groups)
        except (OSError, msgspec.DecodeError) as error:
            raise TransportError(f"cannot reach the engine of {directory}: {error}") from None
    if "offsets" not in answer:
        raise TransportError(f"the engine of {directory} refused the record: {answer.get('error')}")
    return msgspec.convert(answer["offsets"], list[list[int]])


class Follower:
    """The records that a running engine commits to some topics, from these offsets on.  Raises OSError if no engine runs there."""

    def __init__(self, directory: Path, positions: dict[str, int]) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._data = b""
        self._heard = time.monotonic()
        try:
            with _address(directory) as address:
                self._connection.connect(address)
            self._connection.sendall(msgspec.json.encode(_Request(follow=positions)) + b"\n")
        except OSError:
            self._connection.close()
            raise

    def read(self, seconds: float) -> Iterator[Record]:
        """Yield the records that have arrived, after waiting at most `seconds`.  Raises OSError if the engine has gone, TransportError if it refuses."""
        self._connection.settimeout(seconds)
        try:
            part = self._connection.recv(1 << 20)
        except TimeoutError:
            if time.monotonic() - self._heard > _GONE_S:
                raise OSError("nothing has been heard from the engine for a while") from None
            return
        if not part:
            raise OSError("the engine has stopped")
        self._heard = time.monotonic()
        *lines, self._data = (self._data + part).split(b"\n")
        for line in lines:
            if line:
                yield _record(line)

    def close(self) -> None:
        self._connection.close()


def _record(line: bytes) -> Record:
    try:
        return msgspec.json.decode(line, type=Record)
    except msgspec.DecodeError:
        raise TransportError(f"the engine refused to be followed: {line[:200]!r}") from None
