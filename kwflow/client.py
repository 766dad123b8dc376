"""Producing records to a running application on Kafka.  (Futures for outcomes are not here yet.)"""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from kwflow.config import Config
from kwflow.errors import TransportError
from kwflow.runners.topics import client_config

__all__ = ["send"]

_TIMEOUT_S = 20


def send(config: Config, topic: str, key: bytes, value: bytes, headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
    """One record, acknowledged by the broker when this returns.  Raises TransportError."""
    failed: list[str] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(error.str())

    try:
        producer = Producer(client_config(config, partitioner="murmur2_random", enable_idempotence=True, message_timeout_ms=_TIMEOUT_S * 1000))
        producer.produce(topic, value, key, headers=list(headers), on_delivery=delivered)
    except KafkaException as error:
        raise TransportError(f"{config.bootstrap_servers}: {error.args[0].str()}") from None
    if producer.flush(_TIMEOUT_S + 5) or failed:
        raise TransportError(f"{config.bootstrap_servers} did not take the record: {failed[0] if failed else 'no answer'}")
