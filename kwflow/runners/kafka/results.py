"""Writing results of activities into the input topic: idempotently, outside of any transaction (M6.3).

A result may be written twice, or by a former owner; then the ref that it answers is gone, and it is ignored.  So this
producer needs no fencing.  A broken producer is replaced, and its records are written again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException, Message

from kwflow.config import Config
from kwflow.core.wire import Headers
from kwflow.runners.kafka.broker_errors import TIMED
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import Environment, Producer
from kwflow.runners.kafka.topics import client_config
from kwflow.runners.logs import Line

__all__ = ["Results"]

_REFUSED = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE, KafkaError.INVALID_RECORD, KafkaError.TOPIC_AUTHORIZATION_FAILED}
_POLL_S = 0.1
_CLOCK_S = 1.0  # until a result is written again whose time, which is this machine's, the broker does not take
_QUIET_S = 60.0
_KEY_BYTES_MAX = 1_000  # of an id, which counts towards the producer's limit too


class Results:
    """A producer that is created with the first result, and a background task that serves its delivery reports."""

    def __init__(self, config: Config, topic: str, environment: Environment, batch_size: int = 1_000_000, on_log: Callable[[str], None] = print) -> None:
        """`batch_size` is a size that every topic accepts (K11)."""
        self._on_log = on_log
        self._quiet_until = 0.0
        self.config = config
        self.batch_size = batch_size
        self.topic = topic
        self.environment = environment
        self._encryption = Encryption(config)
        self._lock = threading.Lock()
        self._producer: Producer | None = None
        self._served: Callable[[], None] | None = None
        self._closed = False

    def deliver(self, _partition: int, key: bytes | None, value: bytes | None, headers: Headers, done: Callable[[str | None], None]) -> None:
        """Produce a record until the broker has it or refuses it for good.  Raises KafkaException if this record cannot even be queued."""
        self._deliver(key, value, headers, done, invalid=False)

    def _deliver(self, key: bytes | None, value: bytes | None, headers: Headers, done: Callable[[str | None], None], invalid: bool) -> None:
        """`invalid`: the broker has called it an invalid record before, perhaps only because of the clock."""

        def delivered(error: KafkaError | None, _message: Message) -> None:
            code = error.code() if error is not None else None
            if error is None:
                done(None)
            elif code in _REFUSED and not (code in TIMED and not invalid):
                done(error.str())
            elif not self._closed:
                if code in TIMED:
                    self._wait_for_the_clock(error)
                self._deliver(key, value, headers, done, code == KafkaError.INVALID_RECORD)

        encrypted, sent = self._encryption.encrypt(self.topic, value, headers)
        while True:
            producer = self._current()
            try:
                producer.produce(self.topic, encrypted, key, headers=sent, on_delivery=delivered)
                return
            except BufferError:
                self.environment.sleep(_POLL_S)
            except KafkaException as error:
                if error.args[0].code() in _REFUSED:
                    return done(error.args[0].str())
                if error.args[0].code() != KafkaError._FATAL:
                    raise
                self._replace(producer)

    def _wait_for_the_clock(self, error: KafkaError) -> None:
        """Pause before a record is written again, alone: then the broker tells whether its time is the reason."""
        now = self.environment.monotonic()
        if now >= self._quiet_until and error.code() == KafkaError.INVALID_TIMESTAMP:
            self._quiet_until = now + _QUIET_S
            self._on_log(Line.of(f"results of activities wait, as this machine's clock is wrong: {self.topic}: {error.str()}; set the clock", "error"))
        self.environment.sleep(_CLOCK_S)

    def _current(self) -> Producer:
        with self._lock:
            if self._producer is None:
                sizes = {"message_max_bytes": self.config.value_bytes_max + _KEY_BYTES_MAX, "batch_size": self.batch_size}
                self._producer = self.environment.producer(client_config(self.config, partitioner="murmur2_random", enable_idempotence=True, linger_ms=2, message_timeout_ms=0, **sizes))
                producer = self._producer
                self._served = self.environment.background("kwflow-results", lambda: self._serve(producer))
            return self._producer

    def _replace(self, broken: Producer) -> None:
        with self._lock:
            if self._producer is broken:
                self._producer = None

    def _serve(self, producer: Producer) -> None:
        while not self._closed and (self._producer is producer or len(producer)):
            try:
                producer.poll(_POLL_S)
            except KafkaException:  # it broke: librdkafka raises this once, in any call that serves its events; the next calls report the queued records as failed
                self._replace(producer)

    def close(self) -> None:
        """Stop.  Results that are not delivered yet are lost, but their calls are still in the store."""
        self._closed = True
        if self._served is not None:
            self._served()
        self._producer = None
