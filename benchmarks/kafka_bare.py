"""The engine's loop without an engine: the upper limit to compare with.  Arguments: BOOTSTRAP INPUT NAME BYTES.

It gathers records, reads each key's state, produces one output per record and one state per key, commits with the offsets, and
settles in RocksDB: the same calls, records and marks as `kwflow.runners.kafka.runner`, but without any decision.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from rocksdict import WriteBatch

from kwflow.config import Config
from kwflow.runners import rocks

MARK = b"\0kwflow"


class Loop:
    """The loop, with `size` bytes per state, and as many records per transaction as the engine may take."""

    def __init__(self, bootstrap: str, source: str, name: str, size: int, directory: Path) -> None:
        config = Config()
        self.source, self.name, self.records_max = source, name, config.batch_records_max
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap, "group.id": name, "group.instance.id": name, "isolation.level": "read_committed", "enable.auto.commit": False, "auto.offset.reset": "earliest",
                "fetch.queue.backoff.ms": 10, "log_level": 0, "partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 6000, "heartbeat.interval.ms": 500,
            }
        )  # fmt: skip
        self.consumer.subscribe([source])
        self.producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": name, "partitioner": "murmur2_random", "linger.ms": 100, "retry.backoff.ms": 1, "retry.backoff.max.ms": 100})
        self.producer.init_transactions(10)
        self.state, self.mark = bytes(size), bytes(70)
        self.reached: dict[int, int] = {}
        self.stores = {number: rocks.opened(directory / str(number), config.rocksdb_bytes_max) for number in self.consumer.list_topics(source, timeout=10).topics[source].partitions}

    def turn(self) -> None:
        first = self.consumer.poll(0.25)
        messages = [message for message in [first, *self.consumer.consume(self.records_max - 1, 0)] if message.error() is None] if first is not None else []
        metadata = self.consumer.consumer_group_metadata()
        if not messages:
            return
        changes: dict[int, dict[bytes, bytes]] = {}
        positions: dict[int, int] = {}
        for message in messages:
            number, key = message.partition() or 0, message.key() or b""
            positions[number] = (message.offset() or 0) + 1
            if key not in changes.setdefault(number, {MARK: self.mark}):
                self.stores[number].get(b"s" + key)
                changes[number][key] = self.state
        self.producer.begin_transaction()
        for message in messages:
            self.producer.produce(f"{self.name}-out", message.value(), message.key(), headers=[], timestamp=message.timestamp()[1], on_delivery=self.delivered)
        for number, mine in changes.items():
            for key, value in mine.items():
                self.producer.produce(f"{self.name}-state", value, key, headers=[], partition=number, on_delivery=self.delivered)
        self.producer.send_offsets_to_transaction([TopicPartition(self.source, number, offset) for number, offset in positions.items()], metadata)
        self.producer.commit_transaction()
        for number, mine in changes.items():
            batch = WriteBatch(raw_mode=True)
            for key, value in mine.items():
                batch.put(b"s" + key, value)
            batch.put(b"moffset", b"%d" % self.reached[number])
            self.stores[number].write(batch)

    def delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is None and message.topic() == f"{self.name}-state":
            self.reached[message.partition() or 0] = (message.offset() or 0) + 1


def main(bootstrap: str, source: str, name: str, size: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        loop = Loop(bootstrap, source, name, int(size), Path(directory))
        while True:
            loop.turn()


if __name__ == "__main__":
    main(*sys.argv[1:])
