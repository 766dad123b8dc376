"""`confluent_kafka.Consumer` on the simulated broker.

Callbacks run inside poll and consume, errors are items of the list, records that were fetched before a pause may still
arrive, and a seek in a partition that was just assigned may fail because it is not ready (`_STATE`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, OFFSET_INVALID, OFFSET_STORED, TIMESTAMP_CREATE_TIME, KafkaError, KafkaException, Message, TopicPartition

from kwflow.testing.kafka.broker import Broker
from kwflow.testing.kafka.groups import Metadata
from kwflow.testing.kafka.log import Entry, Place
from kwflow.testing.kafka.membership import Membership
from kwflow.testing.kafka.time import Host
from kwflow.testing.kafka.transactions import Refused

__all__ = ["SimulatedConsumer"]

Callback = Callable[[Any, list[TopicPartition]], None]
_FETCHED = 100  # records of one partition that are fetched in advance


@dataclasses.dataclass(eq=False, slots=True)
class _Fetch:
    """One assigned partition, read from `begun` on.  `offset` is fetched next; `position` follows what the application has received (-1001: nothing yet)."""

    place: Place
    offset: int
    begun: int = 0
    position: int = OFFSET_INVALID
    paused: bool = False
    queue: collections.deque[Entry] = dataclasses.field(default_factory=collections.deque)
    eof_at: int = -1
    stopped: bool = False
    missing_since: float | None = None  # since when there is no such partition; the application is told once the client has refreshed the metadata
    told: bool = False


def failure(refused: Refused, **flags: bool) -> KafkaException:
    return KafkaException(KafkaError(refused.code, refused.reason, **flags))


def error_of(code: int, reason: str, **flags: bool) -> KafkaException:
    return KafkaException(KafkaError(code, reason, **flags))


class SimulatedConsumer:
    """A consumer.  Settings are those of librdkafka; those that matter here are used, all others are accepted and ignored."""

    def __init__(self, broker: Broker, host: Host, settings: dict[str, Any]) -> None:
        self._broker = broker
        self._host = host
        self._group = str(settings["group.id"])
        self._instance = settings.get("group.instance.id")
        self._committed = settings.get("isolation.level", "read_committed") == "read_committed"
        self._reset = str(settings.get("auto.offset.reset", "latest"))
        self._eof = bool(settings.get("enable.partition.eof", False))
        self._times = {
            "session": float(settings.get("session.timeout.ms", 45_000)), "heartbeat": float(settings.get("heartbeat.interval.ms", 3_000)),
            "poll": float(settings.get("max.poll.interval.ms", 300_000)), "refresh": float(settings.get("topic.metadata.refresh.interval.ms", 300_000)),
        }  # fmt: skip
        self._fetches: dict[Place, _Fetch] = {}
        self._membership: Membership | None = None
        self._callbacks: dict[str, Callback | None] = {}
        self._on_commit = settings.get("on_commit")
        self._committed_later: collections.deque[tuple[KafkaError | None, list[TopicPartition]]] = collections.deque()  # what `on_commit` is still to be told
        self._turn = 0
        self._in_callback = False
        self._closed = False

    # -- assignment ------------------------------------------------------------------------------------------------
    def subscribe(self, topics: list[str], on_assign: Callback | None = None, on_revoke: Callback | None = None, on_lost: Callback | None = None) -> None:
        self._callbacks = {"assign": on_assign, "revoke": on_revoke, "lost": on_lost or on_revoke}
        self._membership = Membership(self._broker, self._host, self._group, self._instance, tuple(topics), self._times)

    def unsubscribe(self) -> None:
        """Leave the group; what was held is revoked in the next poll."""
        if self._membership is not None:
            self._membership.leave()

    def assign(self, partitions: list[TopicPartition]) -> None:
        self._fetches = {}
        self.incremental_assign(partitions)

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            place = (partition.topic, partition.partition)
            fetch = self._fetches[place] = _Fetch(place, 0)
            self._start_at(fetch, partition.offset)
            if self._host.chance("stale-fetch"):
                self._fetch(fetch)  # these records arrive although the partition is paused a moment later

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self._fetches.pop((partition.topic, partition.partition), None)

    def assignment(self) -> list[TopicPartition]:
        return [TopicPartition(*place) for place in self._fetches]

    def _start_at(self, fetch: _Fetch, offset: int) -> None:
        if offset in (OFFSET_INVALID, OFFSET_STORED):
            offset = self._broker.group(self._group).offsets.get(fetch.place, OFFSET_INVALID)
        if offset == OFFSET_INVALID:
            offset = {"earliest": OFFSET_BEGINNING, "latest": OFFSET_END}.get(self._reset, OFFSET_INVALID)
        if offset in (OFFSET_BEGINNING, OFFSET_END):
            try:
                partition = self._broker.partition(fetch.place)
                offset = partition.start if offset == OFFSET_BEGINNING else partition.end
            except Refused:  # the application is told when the partition is fetched
                offset = 0
        fetch.offset = fetch.begun = offset

    def pause(self, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self._of(partition).paused = True

    def resume(self, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self._of(partition).paused = False

    def seek(self, partition: TopicPartition) -> None:
        fetch = self._of(partition)
        if self._in_callback or self._host.chance("not-ready"):
            raise error_of(KafkaError._STATE, "the partition is not being fetched yet")
        fetch.queue.clear()
        fetch.stopped = False
        fetch.eof_at = -1
        self._start_at(fetch, partition.offset)

    def _of(self, partition: TopicPartition) -> _Fetch:
        found = self._fetches.get((partition.topic, partition.partition))
        if found is None:
            raise error_of(KafkaError._STATE if self._closed else KafkaError._UNKNOWN_PARTITION, f"{partition.topic}[{partition.partition}] is not assigned")
        return found

    def position(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        return [TopicPartition(partition.topic, partition.partition, self._of(partition).position) for partition in partitions]

    # -- reading ---------------------------------------------------------------------------------------------------
    def poll(self, timeout: float = -1) -> Message | None:
        found = self.consume(1, timeout if timeout >= 0 else 3_600)
        return found[0] if found else None

    def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Message]:
        self._host.call("consume" if self._membership is not None else "consume-assigned")
        if self._closed:
            raise RuntimeError("Consumer closed")
        until = self._broker.time.now + 1000 * timeout
        found: list[Message] = []
        while True:
            self._serve()
            self._report()
            self._take(found, num_messages)
            if len(found) >= num_messages or self._broker.time.now >= until:
                return found
            self._host.wait(until)

    def _serve(self) -> None:
        """Call the callbacks, in the order of the events."""
        membership = self._membership
        if membership is None:
            return
        membership.polled()
        while membership.events:
            event = membership.events.popleft()
            kind, places = event
            partitions = [TopicPartition(*place) for place in places]
            callback = self._callbacks[kind]
            self._in_callback = True
            try:
                if callback is not None:
                    callback(self, partitions)
                if kind == "assign":
                    self.incremental_assign([partition for partition in partitions if (partition.topic, partition.partition) not in self._fetches])
                else:
                    self.incremental_unassign(partitions)
            finally:
                self._in_callback = False
            membership.served(event)

    def _take(self, found: list[Message], limit: int) -> None:
        if self._membership is not None:
            while self._membership.errors and len(found) < limit:
                found.append(Message(error=self._membership.errors.popleft()))
        fetches = list(self._fetches.values())
        self._turn += 1
        for number in range(len(fetches)):
            fetch = fetches[(number + self._turn) % len(fetches)]
            if len(found) >= limit:
                return
            if not fetch.queue and not fetch.paused and not fetch.stopped:
                self._fetch(fetch, found)
            while fetch.queue and len(found) < limit:
                entry = fetch.queue.popleft()
                fetch.position = entry.offset + 1
                found.append(message_of(fetch.place, entry))
            if self._eof and not fetch.queue and not fetch.paused and not fetch.stopped and len(found) < limit:
                self._end(fetch, found)

    def _fetch(self, fetch: _Fetch, found: list[Message] | None = None) -> None:
        try:
            partition = self._broker.partition(fetch.place)
        except Refused as refused:
            if found is not None and (refused.code != KafkaError.UNKNOWN_TOPIC_OR_PART or self._is_told(fetch)):
                code = KafkaError._UNKNOWN_PARTITION if refused.code == KafkaError.UNKNOWN_TOPIC_OR_PART and fetch.place[0] in self._broker.topics else refused.code
                found.append(Message(fetch.place[0], fetch.place[1], error=KafkaError(code, refused.reason)))
            return
        fetch.missing_since, fetch.told = None, False
        if partition.start <= fetch.offset <= partition.end:
            entries, fetch.offset = partition.read(fetch.offset, self._committed, _FETCHED)
            fetch.queue.extend(entries)
        elif self._reset in ("earliest", "latest"):
            fetch.offset = partition.start if self._reset == "earliest" else partition.end
        elif found is not None:
            fetch.stopped = True
            found.append(Message(fetch.place[0], fetch.place[1], fetch.offset, error=KafkaError(KafkaError._AUTO_OFFSET_RESET, f"offset {fetch.offset} is not there")))

    def _is_told(self, fetch: _Fetch) -> bool:
        """Whether to tell the application now, once, that there is no such partition."""
        now = self._broker.time.now
        fetch.missing_since = fetch.missing_since if fetch.missing_since is not None else now
        told, fetch.told = fetch.told, now - fetch.missing_since >= self._times["refresh"]
        return fetch.told and not told

    def _end(self, fetch: _Fetch, found: list[Message]) -> None:
        try:
            partition = self._broker.partition(fetch.place)
        except Refused:
            return
        if fetch.offset >= (partition.stable if self._committed else partition.end) and fetch.eof_at != fetch.offset:
            fetch.eof_at = fetch.offset
            if fetch.position >= 0 or fetch.offset > fetch.begun:  # past markers and aborted records
                fetch.position = max(fetch.position, fetch.offset)
            found.append(Message(fetch.place[0], fetch.place[1], fetch.offset, error=KafkaError(KafkaError._PARTITION_EOF, "end of partition")))

    # -- the group -------------------------------------------------------------------------------------------------
    def committed(self, partitions: list[TopicPartition], timeout: float = -1) -> list[TopicPartition]:
        """Return committed offsets.  Times out while one of them is pending in a transaction (RequireStable)."""
        self._host.call("committed")
        group = self._broker.group(self._group)
        until = self._broker.time.now + 1000 * timeout
        while any(group.unstable((partition.topic, partition.partition)) for partition in partitions):
            if self._broker.time.now >= until:
                raise error_of(KafkaError._TIMED_OUT, "Failed to fetch committed offsets: offsets are pending in a transaction", retriable=True)
            self._host.wait(until)
        if not self._host.answered("committed"):
            raise error_of(KafkaError._TIMED_OUT, "Failed to fetch committed offsets: no answer", retriable=True)
        places = [(partition.topic, partition.partition) for partition in partitions]
        return [_kept(place, group.offsets.get(place, OFFSET_INVALID), group.notes.get(place, "")) for place in places]

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool = True) -> list[TopicPartition] | None:
        """Commit offsets.  For an asynchronous commit, `on_commit` is called in a later poll.  A commit may be carried out and fail nevertheless."""
        self._host.call("commit-offsets")
        error: KafkaError | None = None
        try:
            wanted = {(place.topic, place.partition): (place.offset, place.metadata or "") for place in offsets}
            self._broker.group(self._group).commit(wanted, self.consumer_group_metadata())
        except Refused as refused:
            error = KafkaError(refused.code, refused.reason)
        if not self._host.answered("commit-offsets"):
            error = KafkaError(KafkaError._TIMED_OUT, "commit-offsets: no answer in time", retriable=True)
        if asynchronous:
            self._committed_later.append((error, offsets))
            return None
        if error is not None:
            raise KafkaException(error)
        return offsets

    def _report(self) -> None:
        while self._committed_later:
            error, places = self._committed_later.popleft()
            if self._on_commit is not None:
                self._on_commit(error, places)

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float = -1) -> tuple[int, int]:
        """Return the start of a partition, and its end as this reader sees it."""
        self._host.call("watermarks")
        found = self._broker.partition((partition.topic, partition.partition))
        if not self._host.answered("watermarks"):
            raise error_of(KafkaError._TIMED_OUT, "Failed to get watermark offsets: no answer", retriable=True)
        return found.start, found.stable if self._committed else found.end

    def consumer_group_metadata(self) -> Metadata:
        """Return the identity that this client has now, whatever the application has been told."""
        return self._membership.metadata() if self._membership is not None else Metadata(self._group, "", self._instance, -1)

    def memberid(self) -> str:
        return self.consumer_group_metadata().member

    def offsets_for_times(self, partitions: list[TopicPartition], timeout: float = -1) -> list[TopicPartition]:
        """Return the offset of the first record in each partition that is not older than the given time."""
        self._host.call("offsets_for_times")
        try:
            found = [(partition, self._broker.partition((partition.topic, partition.partition)).entries) for partition in partitions]
        except Refused as refused:
            raise failure(refused) from None
        return [TopicPartition(old.topic, old.partition, next((entry.offset for entry in entries if entry.timestamp_ms >= old.offset), OFFSET_END)) for old, entries in found]

    def close(self) -> None:
        """Leave the group; the application is told that what it held is revoked."""
        if self._closed:
            return
        membership = self._membership
        if membership is not None:
            held = [TopicPartition(*place) for place in sorted(membership.held)]
            callback = self._callbacks["revoke"]
            if held and callback is not None:
                callback(self, held)
            membership.close()
        self._closed = True
        self._fetches = {}


def _kept(place: Place, offset: int, note: str) -> TopicPartition:
    return TopicPartition(*place, offset, note) if note else TopicPartition(*place, offset)


def message_of(place: Place, entry: Entry) -> Message:
    return Message(place[0], place[1], entry.offset, entry.key, entry.value, list(entry.headers) if entry.headers else None, None, (TIMESTAMP_CREATE_TIME, entry.timestamp_ms))
