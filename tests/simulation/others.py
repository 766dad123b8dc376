"""A topic that belongs to others, who write to it, change it as they like, and know nothing of kwflow; and the feed that reads it (decision 0058).

Each event says what the feed makes of it, so that the checker (fed.py) knows it without running the feed.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import kwflow as kw
from kwflow.core.wire import Record
from kwflow.runners import feeds
from kwflow.runners.letters import note_of
from kwflow.testing.kafka import VirtualTime
from kwflow.testing.kafka.groups import Group, Metadata
from kwflow.testing.kafka.log import Entry, Place, Transaction
from tests.simulation import probes

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["EVENTS", "GROUP", "HUGE", "NOTED", "MovedGroup", "Others", "Sent"]

EVENTS = "sim-events"
GROUP = f"sim-feed-{EVENTS}"
HUGE = "z" * 450_000  # no topic of the simulation accepts it
NOTED = {"program": ["note", "event"]}
_UNREADABLE = ("{not json", '{"kind": "tell"}', '{"number": 1, "kind": "tell", "to": 5}', "[]", None)


@dataclasses.dataclass
class Event:
    number: int
    kind: str
    to: list[str]


@kw.feed(EVENTS)
def fed(event: Event) -> Iterable[Any]:
    """The feed.  An event of kind `late` fails where feeds run, and works when an engine asks the feed again."""
    match event.kind:
        case "tell" | "several":
            return told(event)
        case "start":
            return [kw.Start(event.to[0], {"program": ["sleep", 0.5], "event": f"{event.number}.0"}, "main")]
        case "cancel":
            return [kw.Cancel(event.to[0], f"event {event.number}.0")]
        case "late":
            if probes.feeding():
                raise ValueError("not mended yet")
            return told(event)
        case "half":
            return (message for message in (*told(event), None))
        case "huge":
            return [kw.Start(event.to[0], {"program": ["sleep", 0.5], "event": f"{event.number}.0", "more": HUGE}, "main")]
        case "kill":
            probes.kill()
        case "fail":
            raise ValueError("as told")
    return ()


def told(event: Event) -> Iterator[kw.Signal]:
    for index, id in enumerate(event.to):
        yield kw.Signal(id, "event", {"event": f"{event.number}.{index}"}, start="main", input=NOTED)


@dataclasses.dataclass(eq=False)
class Sent:
    """A record of theirs.

    `topic` is the id of the topic that it was written to, which may be created anew; `lost_ms` is when retention, or the deletion of its topic, removed it.
    """

    number: int
    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    offset: int = -1
    timestamp_ms: int = 0
    lost_ms: float = float("inf")

    def __str__(self) -> str:
        return f"event {self.number} at {EVENTS}[{self.partition}]@{self.offset}"


class MovedGroup(Group):
    """A group that keeps every transaction that sent it a position: a transaction whose events make no messages writes nothing else."""

    def __init__(self, time: VirtualTime, places: Callable[[str], list[Place]], moved: dict[Transaction, None]) -> None:
        super().__init__(GROUP, time, places)
        self._moved = moved

    def add_offsets(self, transaction: Transaction, offsets: Mapping[Place, tuple[int, str]], metadata: Metadata) -> None:
        super().add_offsets(transaction, offsets, metadata)
        self._moved[transaction] = None


class Others:
    """An actor beside the clients, with a random stream of its own.  In calm times it has the feed asked again about each of its dead letters."""

    def __init__(self, world: "World", killers: bool, events: int | None = None, changes: list[str] | None = None) -> None:
        """The number of events, and the changes to the topic, are drawn unless they are given."""
        self.world = world
        self.chance = random.Random(f"events {world.seed}")
        self.sent: list[Sent] = []
        self.finished = False
        self.changed = 0  # how often the topic was changed
        self.retried: set[Sent] = set()  # events whose dead letters were retried
        self._killers = killers
        self._ids = [f"told-by-event{number}" for number in range(self.chance.randint(1, 6))]
        self._count = events or self.chance.randint(15, 60)
        self.changes = changes or self.chance.choice([[], ["add"], ["shorten"], ["shorten", "shorten", "add"], ["anew"], ["anew in a moment"], ["add", "anew in a moment", "shorten"]])
        self._read: dict[int, int] = {}
        self._producer = world.client_environment.producer({})
        self._topics: list[tuple[float, str]] = []  # (since when, topic id)
        self._create(self.chance.randint(1, 4))

    def _create(self, partitions: int) -> None:
        self.world.broker.create(EVENTS, partitions)
        self._topics.append((self.world.time.now, self.world.broker.topics[EVENTS].id))

    def topic_at(self, ms: float) -> str:
        """The topic's id at that time; after a deletion the old id, until the next topic is created."""
        return [topic for since, topic in self._topics if since <= ms][-1]

    def work(self) -> None:
        changes = sorted(self.chance.sample(range(self._count), len(self.changes)))
        for number in range(self._count):
            self._pause(self.chance.expovariate(1 / 250))
            self._retry(0.3)
            if number in changes:
                self._change(self.changes[changes.index(number)])
            for _ in range(self.chance.choice([1, 1, 1, 5, 10]) if self.chance.random() < 0.3 else 1):
                self._send()
            self._producer.flush()
        self.finished = True

    def settle(self) -> bool:
        """Do one round in calm times; true if there was nothing to do."""
        return not self._retry(1.0)

    def unread(self) -> list[str]:
        """The partitions in which the group has not passed everything."""
        offsets, found = self.world.broker.group(GROUP).offsets, []
        for partition in self.world.broker.topics[EVENTS].partitions:
            offset = offsets.get(partition.place, 0)
            if partition.start < partition.end != offset:
                found.append(f"{partition.place} from {offset}")
        return found

    def _pause(self, ms: float) -> None:
        self.world.hub.pause(self.world.time.now + ms)

    # -- what they write -------------------------------------------------------------------------------------------
    def _send(self, partition: int | None = None) -> None:
        """Send an event to any partition, whatever its key; some have no key.  A header with a kwflow name means nothing in this topic."""
        chance, number = self.chance, len(self.sent)
        topic = self.world.broker.topics[EVENTS]
        key = chance.choice([None, f"k{chance.randrange(5)}".encode()])
        headers = [("number", b"%d" % number), *([("kwflow-op", b"terminate")] if chance.random() < 0.1 else [])]
        anywhere = chance.randrange(len(topic.partitions))
        event = Sent(number, topic.id, anywhere if partition is None else partition, key, self._value(number), tuple(headers))
        self.sent.append(event)

        def delivered(error: Any, message: Any) -> None:
            event.offset, event.timestamp_ms = message.offset(), message.timestamp()[1]

        self._producer.produce(EVENTS, event.value, event.key, event.partition, delivered, headers=headers)

    def _value(self, number: int) -> bytes | None:
        chance = self.chance
        kinds = {"tell": 50, "several": 20, "start": 8, "cancel": 4, "nothing": 5, "fail": 3, "late": 4, "half": 2, "huge": 2, "unreadable": 4, "kill": 1.0 if self._killers else 0}
        [kind] = chance.choices(list(kinds), list(kinds.values()))
        if kind == "unreadable":
            value = chance.choice(_UNREADABLE)
            return value.encode() if value is not None else None
        to = [f"started-by-event{number}"] if kind in ("start", "huge") else [chance.choice(self._ids) for _ in range(chance.randint(2, 5) if kind in ("several", "half") else 1)]
        return json.dumps({"number": number, "kind": kind, "to": to}).encode()

    # -- what becomes of the topic -----------------------------------------------------------------------------------
    def _change(self, what: str) -> None:
        world, topic = self.world, self.world.broker.topics[EVENTS]
        self.changed += 1
        self._producer.flush()
        world.say(f"{EVENTS}: {what}")
        world.happened[f"events {what}"] += 1
        if what == "add":
            world.broker.add_partitions(EVENTS, len(topic.partitions) + self.chance.randint(1, 2))
        elif what == "shorten":
            partition = self.chance.choice(topic.partitions)
            read = 0
            if self.chance.random() < 0.5:  # delete events that nobody has read
                self._end_feeds()
                self._send_many(partition.place[1])
                read = world.broker.group(GROUP).offsets.get(partition.place, 0)
            partition.delete_before(self.chance.randint(max(partition.start, min(read, partition.end)), partition.end))
            for event in self._there(topic.id):
                if event.partition == partition.place[1] and event.offset < partition.start:
                    event.lost_ms = min(event.lost_ms, world.time.now)
            world.time.changed()
        else:
            if what == "anew in a moment":  # its readers are restarted too, so quickly that the group takes them for the old members
                self._end_feeds()
            world.broker.delete(EVENTS)
            for event in self._there(topic.id):
                event.lost_ms = min(event.lost_ms, world.time.now)
            if what == "anew":
                self._pause(self.chance.choice([0, 100, 3_000, 10_000]) * self.chance.random())
            self._create(self.chance.randint(1, len(topic.partitions)))
            if self.chance.random() < 0.5:
                self._outgrow([partition.end for partition in topic.partitions])

    def _end_feeds(self) -> None:
        for machine in self.world.machines:
            if "feed" in machine.roles and machine.process is not None:
                machine.process.die()

    def _outgrow(self, ends: list[int]) -> None:
        """Make the new topic longer than the old one, if that was short, before anybody looks."""
        there = self.world.broker.topics[EVENTS].partitions
        for _ in range(20):
            if any(partition.end <= end for partition, end in zip(there, ends, strict=False)):
                self._send_many()

    def _send_many(self, partition: int | None = None) -> None:
        for _ in range(10):
            self._send(partition)
        self._producer.flush()

    def _there(self, topic: str) -> list[Sent]:
        return [event for event in self.sent if event.topic == topic]

    # -- dead letters ------------------------------------------------------------------------------------------------
    def _retry(self, share: float) -> int:
        """Retry dead letters of the feed, once each, except for events that kill or were asked about again already; return how many."""
        config, count = self.world.config, 0
        for partition in self.world.broker.topics[config.dead_letter_topic].partitions:
            number = partition.place[1]
            entries, end = partition.read(self._read.get(number, 0), True, 10_000)
            for entry in entries:
                if self.chance.random() > share:
                    end = min(end, entry.offset)
                    break
                count += self._again(number, entry)
            self._read[number] = end
        return count

    def _again(self, number: int, entry: Entry) -> bool:
        letter = Record(self.world.config.dead_letter_topic, number, entry.offset, entry.timestamp_ms, entry.key, entry.value, tuple(entry.headers))
        headers, clients = dict(entry.headers), self.world.clients
        if "kwflow-error-feed" not in headers or b'"kill"' in (entry.value or b""):
            return False
        event = self.sent[int(headers["number"] or 0)]
        if event in self.retried:
            return False
        asked = feeds.again(self.world.config, letter, functools.partial(note_of, letter))
        assert asked is not None
        clients.send(asked.topic, (asked.key or b"").decode(), asked.value.decode() if asked.value is not None else None, tuple((name, (value or b"").decode()) for name, value in asked.headers))
        clients.flush()
        self.retried.add(event)
        return True
