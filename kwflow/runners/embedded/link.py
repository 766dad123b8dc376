"""A client's link to an embedded engine: in the process that holds it, or through its socket.

Every embedded topic has one partition, so a client follows the whole reply, result and error topics, from numeric offsets that
were looked up when it was created (M1.3).  If an engine is killed, a client of its socket reconnects to the next one and continues.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from kwflow.config import Config
from kwflow.core.wire import Output, Record
from kwflow.errors import TransportError
from kwflow.ports import Listener
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import Follower, submit, submit_all
from kwflow.runners.embedded.state import STORE_ID, ends_of, read_only, records_of
from kwflow.runners.groups import Group

__all__ = ["EmbeddedLink", "SocketLink"]

_TICK_S = 0.2
_AGAIN_S = 0.05
_TOGETHER_MAX, _TOGETHER_BYTES_MAX = 200, 1_000_000  # records in one request, during which an engine does nothing else
_APPEND_S = 10.0  # how long a record is offered to an engine that is being started


def _followed(config: Config) -> list[str]:
    return [topic for topic in (config.reply_topic, config.result_topic, config.error_topic) if topic]


class _Link:
    """What both links have in common: one thread that follows topics."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.process = uuid.uuid4().hex
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return f"0/{self.process}"

    def listen(self, listener: Listener) -> None:
        self._thread = threading.Thread(target=self._run, args=(listener,), name="kwflow-client", daemon=True)
        self._thread.start()

    def follow(self, key: bytes, ready: Callable[[], None]) -> None:
        ready()

    def _run(self, listener: Listener) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._stopped.set()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(5)


class EmbeddedLink(_Link):
    """A link to the engine that this process holds.  Close the client before the engine."""

    def __init__(self, engine: Embedded, config: Config) -> None:
        super().__init__(config)
        self._engine = engine
        self._positions = {topic: engine.end(topic) for topic in _followed(config)}

    def append(self, output: Output, failed: Callable[[Exception], None]) -> None:
        try:
            self._engine.append(output.topic, output.key, output.value, output.headers)
        except TransportError as error:
            failed(error)

    def find(self, key: bytes) -> list[Record]:
        return [record for topic in _followed(self.config)[1:] for record in records_of(self._engine.db, topic) if record.key == key]

    def _run(self, listener: Listener) -> None:
        seen = -1
        while not self._stopped.is_set():
            seen = self._engine.wait_written(seen, _TICK_S)
            for topic, position in self._positions.items():
                while records := self._engine.read(topic, position):
                    for record in records:
                        listener.on_record(record)
                    position = self._positions[topic] = records[-1].offset + 1
            listener.on_tick()


class SocketLink(_Link):
    """A link to whichever process holds the directory.  While none does, records are written to it directly, and wait for an engine."""

    def __init__(self, directory: Path, config: Config) -> None:
        super().__init__(config)
        self._directory = directory
        self._positions, self._log = self._ends()
        self._unsent: queue.SimpleQueue[tuple[Output, Callable[[Exception], None]] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="kwflow-client-send", daemon=True)

    def _ends(self) -> tuple[dict[str, int], bytes | None]:
        """The end of each topic, and the id of the log."""
        if not (self._directory / "CURRENT").exists():
            return dict.fromkeys(_followed(self.config), 0), None
        with contextlib.closing(read_only(self._directory)) as db:
            return ends_of(db, _followed(self.config)), db.get(STORE_ID)

    def listen(self, listener: Listener) -> None:
        super().listen(listener)
        self._sender.start()

    def append(self, output: Output, failed: Callable[[Exception], None]) -> None:
        self._unsent.put((output, failed))

    def _send(self) -> None:
        """Send records in order, and all that wait in one request; they are on disk before the request is answered.

        If the answer is lost, the records are written again, which is harmless because of their ids (M1.4).
        """
        while (item := self._unsent.get()) is not None:
            items, size = [item], len(item[0].value or b"")
            while len(items) < _TOGETHER_MAX and size < _TOGETHER_BYTES_MAX and not self._unsent.empty():
                item = self._unsent.get()
                if item is None:
                    self._unsent.put(None)
                    break
                items.append(item)
                size += len(item[0].value or b"")
            try:
                submit_all(self._directory, [Group((output,)) for output, _ in items])
            except TransportError:  # perhaps because of one of the records
                give_up = time.monotonic() + _APPEND_S
                for output, failed in items:
                    self._send_one(output, failed, give_up)

    def _send_one(self, output: Output, failed: Callable[[Exception], None], give_up: float) -> None:
        while True:
            try:
                submit(self._directory, output.topic, output.key, output.value, output.headers)
                return
            except TransportError as error:
                if time.monotonic() > give_up or self._stopped.wait(_AGAIN_S):
                    return failed(error)

    def find(self, key: bytes) -> list[Record]:
        with contextlib.closing(read_only(self._directory)) as db:
            return [record for topic in _followed(self.config)[1:] for record in records_of(db, topic) if record.key == key]

    def _run(self, listener: Listener) -> None:
        follower: Follower | None = None
        while not self._stopped.is_set():
            try:
                if follower is None:
                    follower = Follower(self._directory, self._positions)
                    _, log = self._ends()
                    if log != self._log:
                        self._begin_anew(log, listener)
                        raise TransportError("it is not the same log as before")
                for record in follower.read(_TICK_S):
                    self._positions[record.topic] = record.offset + 1
                    listener.on_record(record)
            except (OSError, TransportError):  # no engine runs, it was killed, or its log is another one; the next connection continues from these positions
                if follower is not None:
                    follower.close()
                    follower = None
                self._stopped.wait(_AGAIN_S)
            listener.on_tick()
        if follower is not None:
            follower.close()

    def _begin_anew(self, log: bytes | None, listener: Listener) -> None:
        """Begin at offset 0: somebody has deleted the directory, and what is there now is another log, of which nothing was seen yet."""
        self._positions = dict.fromkeys(self._positions, 0)
        if self._log is not None:
            listener.on_gap()
        self._log = log

    def close(self) -> None:
        super().close()
        self._unsent.put(None)
        if self._sender.is_alive():
            self._sender.join(5)
