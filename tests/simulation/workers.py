"""What the workers of a run were assigned, read and committed, as seen by their group and their log, for the checker (handed_out.py).

Nothing here knows how a worker keeps its notes: it is observed at its consumer, and at the group that accepts the notes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Message, TopicPartition

import kwflow as kw
from kwflow.testing.kafka import SimulatedConsumer, VirtualTime
from kwflow.testing.kafka.groups import Group, Metadata
from kwflow.testing.kafka.log import Place

__all__ = ["WORKERS", "Begun", "Book", "Looked", "Noted", "NotedGroup", "Taken", "WatchedConsumer"]

WORKERS = "sim-workers"


@dataclasses.dataclass(eq=False)
class Taken:
    """One assignment of one partition to one process, from `begun_ms` on; `fetched` is the group's position then, and its note."""

    process: str
    place: Place
    begun_ms: float
    fetched: tuple[int, str] = (0, "")
    fetched_ms: float = -1.0
    looked_ms: float = -1.0  # when it learned where its log ends
    ended_ms: float = float("inf")
    lost: bool = False  # somebody else had the partition already when it ended
    failed: bool = False  # a commit during the assignment was refused, or not answered
    read: dict[int, float] = dataclasses.field(default_factory=dict)  # offset -> when the record was delivered
    turns: dict[int, int] = dataclasses.field(default_factory=dict)  # offset -> in which turn of its reader
    known: dict[int, float] = dataclasses.field(default_factory=dict)  # offset -> when that turn was over


@dataclasses.dataclass(frozen=True)
class Noted:
    """A commit that the group accepted: from whom, its position, and the note beside it."""

    ms: float
    by: Taken | None  # None: a member that was not told yet that it has the partition
    place: Place
    position: int
    note: str


@dataclasses.dataclass(frozen=True)
class Begun:
    """An activity began; by its key and attempt the log tells which call it is."""

    ms: float
    process: str
    idempotency_key: str
    attempt: int


@dataclasses.dataclass(frozen=True)
class Looked:
    """An activity that began has asked an engine for heartbeat details, and was given these."""

    ms: float
    begun: Begun
    runs: list[int]


class Book:
    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self.noted: list[Noted] = []
        self.begun: list[Begun] = []
        self.looked: list[Looked] = []
        self.members: dict[str, WatchedConsumer] = {}

    def begin(self, ms: float, process: str, info: kw.ActivityInfo) -> Begun:
        self.begun.append(Begun(ms, process, info.idempotency_key, info.attempt))
        return self.begun[-1]


class NotedGroup(Group):
    """A group that records every position that it accepts."""

    def __init__(self, time: VirtualTime, places: Callable[[str], list[Place]], book: Book) -> None:
        super().__init__(WORKERS, time, places)
        self._book = book

    def commit(self, offsets: Mapping[Place, tuple[int, str]], metadata: Metadata) -> None:
        super().commit(offsets, metadata)
        mine = self._book.members[metadata.member].holds
        self._book.noted += [Noted(self._time.now, mine.get(place), place, position, note) for place, (position, note) in offsets.items()]


class WatchedConsumer(SimulatedConsumer):
    """A worker's consumer, which records what happens to it."""

    def __init__(self, broker: Any, host: Any, settings: dict[str, Any]) -> None:
        super().__init__(broker, host, settings)
        self.holds: dict[Place, Taken] = {}
        self._book: Book = broker.book
        self._turns = 0

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        super().incremental_assign(partitions)
        for partition in partitions:
            place = (partition.topic, partition.partition)
            self.holds[place] = Taken(self._host.name, place, self._broker.time.now)
            self._book.taken.append(self.holds[place])

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        super().incremental_unassign(partitions)
        for partition in partitions:
            taken = self.holds.pop((partition.topic, partition.partition), None)
            if taken is not None:
                taken.ended_ms = self._broker.time.now

    def committed(self, partitions: list[TopicPartition], timeout: float = -1) -> list[TopicPartition]:
        found = super().committed(partitions, timeout)
        for place in found:
            taken = self.holds[place.topic, place.partition]
            taken.fetched, taken.fetched_ms = (max(0, place.offset), place.metadata or ""), self._broker.time.now
        return found

    def subscribe(self, topics: list[str], on_assign: Any = None, on_revoke: Any = None, on_lost: Any = None) -> None:
        def lost(consumer: Any, places: list[TopicPartition]) -> None:
            for place in places:
                self.holds[place.topic, place.partition].lost = True
            on_lost(consumer, places)

        def revoked(consumer: Any, places: list[TopicPartition]) -> None:
            self._host.call("revoke")  # a process may die when it has been told, and has given nothing back yet
            on_revoke(consumer, places)

        super().subscribe(topics, on_assign, revoked, lost)

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool = True) -> list[TopicPartition] | None:
        mine = [self.holds.get((place.topic, place.partition)) for place in offsets]
        try:
            return super().commit(offsets=offsets, asynchronous=asynchronous)
        except BaseException:  # even if the process dies in it
            for taken in filter(None, mine):
                taken.failed = True
            raise

    def consumer_group_metadata(self) -> Metadata:
        """Note which member this consumer is."""
        found = super().consumer_group_metadata()
        self._book.members[found.member] = self
        return found

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float = -1) -> tuple[int, int]:
        found = super().get_watermark_offsets(partition, timeout)
        self.holds[partition.topic, partition.partition].looked_ms = self._broker.time.now
        return found

    def poll(self, timeout: float = -1) -> Message | None:
        """Poll, with which a worker's turn begins."""
        self._turns += 1
        for taken in self.holds.values():
            taken.known |= dict.fromkeys(taken.read.keys() - taken.known.keys(), self._broker.time.now)
        return super().poll(timeout)

    def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Message]:
        found = super().consume(num_messages, timeout)
        for message in found:
            if message.error() is None:
                taken, offset = self.holds[message.topic() or "", message.partition() or 0], message.offset() or 0
                taken.read[offset], taken.turns[offset] = self._broker.time.now, self._turns
        return found
