"""A broker in memory with Kafka's rules for transactions, groups and compaction (tests/integration/port compares it with a real one).

It runs in virtual time and serves the simulated clients in this package.  A test or a simulation may look at `topics` and
`groups` directly.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable

from confluent_kafka import KafkaError

from kwflow.testing.kafka.groups import Group
from kwflow.testing.kafka.log import Entry, Headers, Partition, Place, Topic, Transaction
from kwflow.testing.kafka.time import START_MS, VirtualTime
from kwflow.testing.kafka.transactions import Coordinator, Refused

__all__ = ["Broker"]

_AHEAD_MS = 3_600_000  # log.message.timestamp.after.max.ms
Made = tuple[int, bytes | None, bytes | None, Headers]  # timestamp, key, value, headers


class Broker:
    """Topics, groups and transactions.  `wall_ms` is its own wall clock, against which timestamps are checked."""

    def __init__(self, time: VirtualTime | None = None, seed: int = 0) -> None:
        self.time = time or VirtualTime()
        self.chance = random.Random(seed)
        self._seed = seed
        self.topics: dict[str, Topic] = {}
        self.groups: dict[str, Group] = {}
        self._deleted: collections.Counter[str] = collections.Counter()  # how often each topic was deleted
        self.transactions = Coordinator(self.time, self.chance, self.partition, lambda group, transaction: self.group(group).settle(transaction))

    def wall_ms(self) -> int:
        return START_MS + int(self.time.now)

    def create(self, name: str, partitions: int, config: dict[str, str] | None = None) -> None:
        if name in self.topics:
            raise Refused(KafkaError.TOPIC_ALREADY_EXISTS, f"topic {name} exists")
        self.topics[name] = Topic(name, partitions, config, f"{self._seed} {self._deleted[name]}")
        self.time.changed()

    def add_partitions(self, name: str, count: int) -> None:
        """Add partitions until the topic has `count` of them."""
        known = self.topics[name].partitions
        known += [Partition(name, number) for number in range(len(known), count)]
        self.time.changed()

    def delete(self, name: str) -> None:
        """Delete a topic, with the offsets that groups have committed for it."""
        del self.topics[name]
        self._deleted[name] += 1
        for group in self.groups.values():
            group.forget(name)
        self.time.changed()

    def partition(self, place: Place) -> Partition:
        topic = self.topics.get(place[0])
        if topic is None or not 0 <= place[1] < len(topic.partitions):
            raise Refused(KafkaError.UNKNOWN_TOPIC_OR_PART, f"no partition {place}")
        return topic.partitions[place[1]]

    def group(self, name: str) -> Group:
        if name not in self.groups:
            self.groups[name] = Group(name, self.time, self.places)
        return self.groups[name]

    def places(self, topic: str) -> list[Place]:
        """Return the partitions of a topic; none if it does not exist."""
        return [partition.place for partition in self.topics[topic].partitions] if topic in self.topics else []

    def append(self, place: Place, records: Iterable[Made], transaction: Transaction | None) -> list[Entry]:
        """Append one batch: all of it, or Refused.  The size limit applies to the batch."""
        partition = self.partition(place)
        limit = int(self.topics[place[0]].config["max.message.bytes"])
        made = [Entry(0, timestamp, key, value, headers, transaction, self.time.now) for timestamp, key, value, headers in records]
        if sum(entry.size_bytes for entry in made) > limit:
            raise Refused(KafkaError.MSG_SIZE_TOO_LARGE, f"the batch is larger than max.message.bytes = {limit}")
        if any(entry.timestamp_ms > self.wall_ms() + _AHEAD_MS for entry in made):
            raise Refused(KafkaError.INVALID_TIMESTAMP, "a timestamp is more than an hour ahead")
        if self.topics[place[0]].config["cleanup.policy"] == "compact" and any(entry.key is None for entry in made):
            raise Refused(KafkaError.INVALID_RECORD, "a record without a key on a compacted topic")
        written = [partition.append(entry.timestamp_ms, entry.key, entry.value, entry.headers, transaction, self.time.now) for entry in made]
        if transaction is not None and written:
            self.transactions.wrote(transaction, place, written[0].offset)
        self.time.changed()
        return written
