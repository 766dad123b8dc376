"""Writing several records in one transaction on Kafka, under a name that only one process has at a time: for operators' commands.

It prevents two failures:
1. An operator sends dead letters again, and is killed between a record and the mark that it was sent.
2. Two operators send the same dead letters again at the same time.
Here record and mark are written together or not at all.  And once a SoleWriter is made, it has fenced the former owner of its
name and ended that one's open transaction: nobody else can act any more on what is read from then on.
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
_TRANSACTION_MS = 10_000  # a writer that was killed keeps readers waiting for this long, unless another one takes its name
_AGAIN_S = 0.05


class SoleWriter:
    """The only writer under a name.  Raises TransportError if there is no broker, or if another process has taken the name."""

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
        """Write each group completely or not at all, in one transaction or, if the broker refuses that, each group in its own; yield after each group.

        Raises what `write` raises, at the group at fault.
        """
        try:
            self.write([output for group in groups for output in group.records])
            yield from [None] * len(groups)
        except Undone:
            for group in groups:
                try:
                    self.write(group.records)
                except Undone:  # the refused group before it may be the cause, as it leaves a gap in the sequence numbers that the broker expects
                    self.write(group.records)
                yield

    def write(self, outputs: Sequence[Output]) -> None:
        """Write all of these, or none; committed when this returns.  Raises Undone, or TransportError if another process has the name or the outcome is unknown."""
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
            cause = (failed or error.args)[0]  # taken before the abort, which makes the other records fail too
            if error.args[0].fatal():
                raise self._error_of(cause) from None
            self._again(lambda: self._producer.abort_transaction(_TIMEOUT_S))
            raise Undone(str(self._error_of(cause))) from None

    def _again(self, call: Callable[[], None]) -> None:
        """Repeat a call while its error is retriable (K4).  Raises KafkaException if the transaction must be aborted, else TransportError."""
        give_up = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                return call()
            except KafkaException as error:
                cause = error.args[0]
                if cause.txn_requires_abort():
                    raise
                if not cause.retriable() or time.monotonic() > give_up:
                    raise self._error_of(cause) from None
            time.sleep(_AGAIN_S)

    def _error_of(self, cause: KafkaError) -> TransportError:
        if cause.code() == KafkaError._FENCED:
            return TransportError(f"another process has started to do this meanwhile ({self._name}); check what is left to do", retryable=False)
        with contextlib.suppress(KafkaException):  # the error that ended the producer is raised by each of its calls, even this one
            self._producer.poll(0)
        return TransportError(f"{self._config.bootstrap_servers} did not accept the records: {self._errors.with_cause(cause)}")

    def __enter__(self) -> SoleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        del self._producer
