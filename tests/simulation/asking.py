"""How a simulated process asks the engines: by the product's client, over a link of the simulation; and how a worker asks for heartbeat details by it, as `kwflow worker` does.

The product's link has a thread of its own, for which its callers wait.  Here whoever asks reads the replies, as an actor must not block.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from confluent_kafka import OFFSET_END, KafkaError, Message, TopicPartition

from kwflow.client import Client, Future
from kwflow.client.futures import fail
from kwflow.config import Config
from kwflow.core.wire import Headers, Output, Record
from kwflow.errors import OutcomeUnknown, TransportError
from kwflow.ports import Listener
from kwflow.runners.kafka.environment import Environment
from kwflow.runners.kafka.reading import gather
from kwflow.worker import _Details

if TYPE_CHECKING:
    from tests.simulation.faults import Process

__all__ = ["Asking", "Link"]

_LOOK_S = 0.2


class Asking(_Details):
    """Looks details up for one worker."""

    def __init__(self, config: Config, environment: Environment, process: "Process") -> None:
        super().__init__(config)
        self._client = _Client(Link(config, environment, process.name), config)


class _Client(Client):
    """A client whose `query` returns once it is answered, or will not be."""

    def __init__(self, link: "Link", config: Config) -> None:
        super().__init__(link, config)
        self._mine = link

    def query(self, id: str, *, start_id: str | None = None, ref: str | None = None) -> Future[dict[str, Any]]:
        future = super().query(id, start_id=start_id, ref=ref)
        self._mine.wait(future, self.config.command_timeout_s)
        return future


class Link:
    """A Link (ports.py).  Its requests have numbers, so that a seed is always the same run."""

    def __init__(self, config: Config, environment: Environment, process: str) -> None:
        self.process = process
        self.address = f"0/{self.process}"
        self._environment = environment
        self._asked: dict[str, str] = {}  # the number of a request -> its id at the client
        self._count = 0
        self._producer = environment.producer({"partitioner": "murmur2_random"})
        self._consumer = environment.consumer({"group.id": f"{config.application_id}-client", "auto.offset.reset": "error"})
        self._consumer.incremental_assign([TopicPartition(config.reply_topic, 0, OFFSET_END)])

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    def append(self, output: Output, failed: Callable[[Exception], None]) -> None:
        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                failed(TransportError(error.str()))

        try:
            self._producer.produce(output.topic, output.value, output.key, headers=self._numbered(output.headers), on_delivery=delivered)
        except BufferError:
            failed(TransportError("the client's queue is full"))

    def _numbered(self, headers: Headers) -> Headers:
        self._count += 1
        number = f"{self.process}-{self._count}"
        self._asked[number] = (dict(headers)["kwflow-request"] or b"").decode()
        return tuple((name, number.encode() if name in ("kwflow-request", "kwflow-id") else value) for name, value in headers)

    def wait(self, future: Future[Any], seconds: float) -> None:
        """Read replies until the future is settled.  It fails if that takes too long."""
        give_up = self._environment.monotonic() + seconds
        while not future.done():
            self._producer.poll(0)
            for message in gather(self._consumer, 100, _LOOK_S):
                self._take(message)
            if self._environment.monotonic() > give_up:
                fail(future, OutcomeUnknown("no engine has answered in time"))

    def _take(self, message: Message) -> None:
        if message.error() is None and message.key() == self.process.encode():
            reply = json.loads(message.value() or b"")
            reply["request"] = self._asked.pop(reply["request"])
            self._listener.on_record(Record(message.topic() or "", 0, message.offset() or 0, 0, message.key(), json.dumps(reply).encode(), ()))

    def follow(self, key: bytes, ready: Callable[[], None]) -> None:
        raise NotImplementedError("workers wait for no outcomes")

    def find(self, key: bytes) -> list[Record]:
        raise NotImplementedError("workers wait for no outcomes")

    def close(self) -> None:
        """Nothing is open: what a process has ends with it."""
