"""Producing records to a running application on Kafka, and reading what is committed.  (Futures for outcomes are not here yet.)"""

from __future__ import annotations

from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.runners.topics import client_config, record_of

__all__ = ["read", "send", "state_of"]

_TIMEOUT_S = 20


def send(config: Config, topic: str, key: bytes | None, value: bytes | None, headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
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


def read(config: Config, topic: str, partition: int | None = None) -> Iterator[Record]:
    """The committed records of a topic from its begin to its end of now; one partition, or all.  Raises TransportError."""
    settings = {"group_id": f"{config.application_id}-read", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "earliest"}
    consumer = Consumer(client_config(config, **settings, enable_partition_eof=True))
    try:
        known = consumer.list_topics(topic, timeout=10).topics[topic]
        if known.error is not None:
            raise TransportError(f"topic {topic} at {config.bootstrap_servers}: {known.error.str()}", retryable=False)
        left = set(known.partitions) if partition is None else {partition}
        consumer.assign([TopicPartition(topic, number, 0) for number in left])
        while left:
            for message in consumer.consume(1000, 0.2):
                error = message.error()
                if error is None:
                    yield record_of(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition() or 0)
                elif not error.retriable():
                    raise TransportError(f"topic {topic} at {config.bootstrap_servers}: {error.str()}")
    except KafkaException as error:
        raise TransportError(f"{config.bootstrap_servers}: {error.args[0].str()}") from None
    finally:
        consumer.close()


def state_of(config: Config, id: str) -> bytes | None:
    """The stored snapshot of one instance, from the changelog partition that holds it."""
    consumer = Consumer(client_config(config, group_id=f"{config.application_id}-read"))
    try:
        partitions = len(consumer.list_topics(config.changelog_topic, timeout=10).topics[config.changelog_topic].partitions)
    except KafkaException as error:
        raise TransportError(f"{config.bootstrap_servers}: {error.args[0].str()}") from None
    finally:
        consumer.close()
    key, found = id.encode(), None
    for record in read(config, config.changelog_topic, partition_of(key, partitions) if partitions else None):
        if record.key == key:
            found = record.value
    return found
