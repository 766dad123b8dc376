"""Several records as one transaction on Kafka, under a name that one process has at a time: for commands of operators.

1. an operator sends dead letters again, and is killed between a record and the mark that it was sent
2. or two operators send the same ones again at the same time
Here it is record and mark, or neither; and what is read after a SoleWriter was made is nobody else's to write about: it
has fenced whoever had the name, and ended what that one left open.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from kwflow.config import Config
from kwflow.core.wire import Output
from kwflow.errors import TransportError
from kwflow.runners.groups import Group, Undone
from kwflow.runners.kafka.broker_errors import BrokerErrors
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import made
from kwflow.runners.kafka.topics import TOPIC_MS, client_config

__all__ = ["SoleWriter"]

_TIMEOUT_S = 20
_TRANSACTION_MS = 10_000  # so long a writer that was killed keeps readers waiting, if nobody takes its name
_AGAIN_S = 0.05


class SoleWriter:
    """Raises TransportError when there is no broker, or another process has taken the name."""

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self._name = f"{config.application_id}-{name}"
        self._encryption = Encryption(config)
        settings: dict[str, Any] = {"transactional_id": self._name, "transaction_timeout_ms": _TRANSACTION_MS, "retry_backoff_ms": 1, "retry_backoff_max_ms": 100}
        settings["topic_metadata_propagation_max_ms"] = TOPIC_MS
        settings["message_max_bytes"] = max(1_000_000, config.value_bytes_max + config.header_bytes_max)
        self._errors = BrokerErrors()
        self._producer = made(Producer, client_config(config, partitioner="murmur2_random", **settings) | {"error_cb": self._errors})
        self._again(lambda: self._producer.init_transactions(_TIMEOUT_S))

    def write_each(self, groups: Sequence[Group]) -> Iterator[None]:
        """All of each, or none: together in one transaction, or where the broker does not take them together each in its own.  Raises as `write`, at the group at fault."""
        try:
            self.write([output for group in groups for output in group.records])
            yield from [None] * len(groups)
        except Undone:
            for group in groups:
                try:
                    self.write(group.records)
                except Undone:  # it may have met what the one before left behind: the broker misses a number of its sequence
                    self.write(group.records)
                yield

    def write(self, outputs: Sequence[Output]) -> None:
        """All of these, or none; committed when this returns.  Raises Undone, TransportError when another process has the name, or the outcome is not known."""
        failed: list[KafkaError] = []

        def delivered(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                failed.append(error)

        try:
            self._producer.begin_transaction()
            for output in outputs:
                value, headers = self._encryption.encrypt(output.topic, output.value, output.headers, own=True)
                self._producer.produce(output.topic, value, output.key, headers=headers, on_delivery=delivered)
            self._again(lambda: self._producer.commit_transaction(_TIMEOUT_S))
        except KafkaException as error:
            cause = (failed or error.args)[0]  # before the abort, by which the others fail, too
            if error.args[0].fatal():
                raise self._told(cause) from None
            self._again(lambda: self._producer.abort_transaction(_TIMEOUT_S))
            raise Undone(str(self._told(cause))) from None

    def _again(self, call: Callable[[], None]) -> None:
        """The same call again while it is retriable (K4).  Raises KafkaException for what has to be aborted."""
        give_up = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                return call()
            except KafkaException as error:
                cause = error.args[0]
                if cause.txn_requires_abort():
                    raise
                if not cause.retriable() or time.monotonic() > give_up:
                    raise self._told(cause) from None
            time.sleep(_AGAIN_S)

    def _told(self, cause: KafkaError) -> TransportError:
        if cause.code() == KafkaError._FENCED:
            return TransportError(f"another process has begun to do this meanwhile ({self._name}); look again what is left to do", retryable=False)
        with contextlib.suppress(KafkaException):  # what ends the producer is raised by each call of it, this one, too
            self._producer.poll(0)
        return TransportError(f"{self._config.bootstrap_servers} did not take the records: {self._errors.because(cause)}")

    def __enter__(self) -> SoleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        del self._producer
