"""Gather, produce one output a record and one state for each key, commit: the engine's loop with no engine in it.  BOOTSTRAP INPUT NAME BYTES."""

from __future__ import annotations

import sys

from confluent_kafka import Consumer, Producer, TopicPartition


def main(bootstrap: str, source: str, name: str, size: int) -> None:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap, "group.id": name, "group.instance.id": name, "isolation.level": "read_committed", "enable.auto.commit": False, "auto.offset.reset": "earliest",
            "fetch.queue.backoff.ms": 10, "log_level": 0, "partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 6000, "heartbeat.interval.ms": 500,
        }
    )  # fmt: skip
    consumer.subscribe([source])
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": name, "partitioner": "murmur2_random", "linger.ms": 100, "retry.backoff.ms": 1, "retry.backoff.max.ms": 100})
    producer.init_transactions(10)
    state = bytes(size)
    while True:
        first = consumer.poll(0.25)
        if first is None:
            continue
        messages = [message for message in [first, *consumer.consume(999, 0)] if message.error() is None]
        if not messages:
            continue
        producer.begin_transaction()
        positions: dict[int, int] = {}
        for message in messages:
            producer.produce(f"{name}-out", message.value(), message.key())
            positions[message.partition() or 0] = (message.offset() or 0) + 1
        for key, partition in {message.key(): message.partition() for message in messages}.items():
            producer.produce(f"{name}-state", state, key, partition=partition or 0)
        producer.send_offsets_to_transaction([TopicPartition(source, number, offset) for number, offset in positions.items()], consumer.consumer_group_metadata())
        producer.commit_transaction()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
