"""The exactly-once loop on Kafka: gather, step, commit, settle (K1-K18; one processor, one consumer, one producer).

A batch's outputs, state changes and offsets are one transaction; author code runs before it begins (K15), nobody polls
from the last consume until the commit has returned (K2), and RocksDB is written only after it (K8).
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output, Record, header
from kwflow.durable import set_abandoning
from kwflow.errors import FencedError, TransportError
from kwflow.ports import Clock, Decision, Processor
from kwflow.runners import topics
from kwflow.runners.embedded import SystemClock
from kwflow.runners.kafka_state import PartitionStore
from kwflow.runners.loop import Overlay, dead_letter

__all__ = ["KafkaRunner"]

POSITION = b"\0kwflow"  # K16: {incarnation, next offset, partitions} beside the state it belongs to
_REJECTED = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.INVALID_RECORD,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
}
_IDLE_S = 0.25
_FIRED_MAX = 500
_TRANSACTION_S = 15  # a dead engine with another identity blocks its partitions for this long (K1)
_RETRY_S = 0.02


class Rejected(Exception):
    """The broker will never take one of these records (K11)."""


@dataclass
class Partition:
    """One owned partition.  Invariant: `position` is the offset that the last committed transaction sent."""

    number: int
    store: PartitionStore
    position: int
    fire_from: int  # K18: nothing fires before this input offset is reached


@dataclass
class Batch:
    """What one transaction is to hold, and where each partition's input began."""

    overlays: dict[int, Overlay] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)


class KafkaRunner:
    """Runs one processor.  Raises FencedError or TransportError when this process has to end and be started again."""

    def __init__(self, config: Config, make: Callable[[str], Processor], group: str, on_log: Callable[[str], None] = print, clock: Clock | None = None) -> None:
        self.config = config
        self.group = group
        self.on_log = on_log
        self.clock = clock or SystemClock()
        self.directory = config.state_dir / config.application_id / group
        self.instance = self._instance_id()
        self.admin = topics.admin(config)
        self.incarnation, self.partitions = self._describe(make("").input_topic)
        self.processor = make(self.incarnation)
        self.owned: dict[int, Partition] = {}
        self._assigned: list[int] = []
        self._epoch = 0
        self._metadata: Any = None
        self._producer = self._new_producer()
        self._consumer = self._new_consumer()

    # -- who we are (K1) -------------------------------------------------------------------------------------------
    def _instance_id(self) -> str:
        """A UUID in the locked state directory: two processes never share one."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.directory / "instance-id"
        self._lock = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransportError(f"another engine uses {self.directory}; give each its own --state-dir", retryable=False) from None
        self._lock.seek(0)
        known = self._lock.read().strip()
        if not known:
            known = uuid.uuid4().hex[:12]
            self._lock.write(known)
            self._lock.flush()
        return known

    def _describe(self, topic: str) -> tuple[str, int]:
        try:
            found = self.admin.describe_topics(TopicCollection([topic]), request_timeout=10)[topic].result()
        except KafkaException as error:
            raise TransportError(f"topic {topic} at {self.config.bootstrap_servers}: {error.args[0].str()}; create topics with: kwflow topics create") from None
        return str(found.topic_id), len(found.partitions)

    def _new_producer(self) -> Producer:
        """init_transactions fences the previous run of this identity and ends its dead transaction."""
        producer = Producer(
            topics.client_config(
                self.config, transactional_id=f"{self.group}-{self.instance}", partitioner="murmur2_random", linger_ms=100, retry_backoff_ms=1, retry_backoff_max_ms=100,
                transaction_timeout_ms=_TRANSACTION_S * 1000,
            )
        )  # fmt: skip
        _again(lambda: producer.init_transactions(10))
        return producer

    def _new_consumer(self) -> Consumer:
        consumer = Consumer(
            topics.client_config(
                self.config, group_id=self.group, group_instance_id=f"{self.group}-{self.instance}", enable_auto_commit=False, enable_auto_offset_store=False,
                isolation_level="read_committed", auto_offset_reset="error", partition_assignment_strategy="cooperative-sticky", session_timeout_ms=6000,
                heartbeat_interval_ms=500, fetch_queue_backoff_ms=10,
            )
        )  # fmt: skip
        consumer.subscribe([self.processor.input_topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)
        return consumer

    # -- ownership (K2, K5, K7) ------------------------------------------------------------------------------------
    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:  # any explicit offset: without one a group with no commit is an error before we seek
            partition.offset = OFFSET_BEGINNING
        consumer.incremental_assign(partitions)
        if partitions:
            consumer.pause(partitions)
            self._assigned += [partition.partition for partition in partitions]

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if partitions:
            self._epoch += 1
        for partition in partitions:
            gone = self.owned.pop(partition.partition, None)
            if gone is not None:
                gone.store.close()
            if partition.partition in self._assigned:
                self._assigned.remove(partition.partition)

    def _take_over(self) -> None:
        """Restore what was assigned, then read from the committed offset on."""
        while self._assigned:
            number = self._assigned.pop(0)
            here = TopicPartition(self.processor.input_topic, number)
            committed = _again(lambda here=here: self._consumer.committed([here], timeout=5))[0].offset  # type: ignore[misc]
            store = PartitionStore(self.directory / str(number), self.incarnation)
            self._restore(store, number)
            position = self._position(store, number, committed)
            end = self._end(self.processor.input_topic, number)
            self.owned[number] = Partition(number, store, position, end)
            self._seek(number, position)
            self._consumer.resume([here])
            self.on_log(f"{self.group}: owns {self.processor.input_topic}[{number}] from {position}")

    def _seek(self, number: int, offset: int) -> None:
        _again(lambda: self._consumer.seek(TopicPartition(self.processor.input_topic, number, offset)))

    def _position(self, store: PartitionStore, number: int, committed: int) -> int:
        """K16: the group's offset and the one stored with the state must agree."""
        saved = store.get(POSITION)
        known = msgspec.json.decode(saved) if saved is not None else None
        if known is not None and (known["topic"] != self.incarnation or known["partitions"] != self.partitions):
            raise TransportError(f"{self.processor.input_topic} was recreated or its partitions changed since this state was written", retryable=False)
        if committed == OFFSET_INVALID:
            return int(known["next"]) if known is not None else self._start(number)
        if known is not None and known["next"] != committed:
            raise TransportError(f"{self.processor.input_topic}[{number}]: the group's offset is {committed}, the state's is {known['next']}: somebody reset one of them", retryable=False)
        return int(committed)

    def _offset(self, topic: str, number: int, spec: Any) -> int:
        where = TopicPartition(topic, number)
        found = self.admin.list_offsets({where: spec}, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=10)
        return int(found[where].result().offset)

    def _end(self, topic: str, number: int) -> int:
        return self._offset(topic, number, OffsetSpec.latest())  # type: ignore[no-untyped-call] # the library has no types here

    def _start(self, number: int) -> int:
        return self._offset(self.processor.input_topic, number, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def _restore(self, store: PartitionStore, number: int) -> None:
        """Read the changelog from where the local copy ends up to its end, aborted records left out."""
        topic = self.processor.changelog_topic
        end = self._end(topic, number)
        if store.offset > end:
            store.wipe()
        if store.offset == end:
            return
        consumer = Consumer(
            topics.client_config(self.config, group_id=f"{self.group}-restore", enable_auto_commit=False, isolation_level="read_committed", auto_offset_reset="error", enable_partition_eof=True)
        )
        try:
            start = max(store.offset, self._offset(topic, number, OffsetSpec.earliest()))  # type: ignore[no-untyped-call]
            consumer.assign([TopicPartition(topic, number, start)])
            reached = start
            while reached < end:
                changes: dict[bytes, bytes | None] = {}
                for message in consumer.consume(2000, 0.2):
                    error = message.error()
                    if error is not None and error.code() == KafkaError._PARTITION_EOF:
                        reached = max(reached, message.offset() or 0)
                    elif error is not None:
                        raise TransportError(f"restore of {topic}[{number}]: {error.str()}")
                    else:
                        changes[message.key() or b""] = message.value()
                        reached = (message.offset() or 0) + 1
                reached = max(reached, consumer.position([TopicPartition(topic, number)])[0].offset)
                store.settle(changes, reached)
        finally:
            consumer.close()

    # -- the loop --------------------------------------------------------------------------------------------------
    def run(self, until: Callable[[], bool]) -> None:
        """Go on until `until()`, asked after each batch; then leave the group.  From here on this process is an engine (semantics §3.3)."""
        set_abandoning(True, everywhere=True)
        try:
            while not until():
                self.turn()
        finally:
            self._consumer.close()
            for partition in self.owned.values():
                partition.store.close()
            self.owned.clear()
            self._lock.close()

    def turn(self) -> None:
        """One batch of records, then what is due."""
        epoch, messages = self._gather()
        if epoch == self._epoch and messages:
            self._process([self._record(message) for message in messages])
        self._take_over()
        self._fire()

    def _gather(self) -> tuple[int, list[Message]]:
        due = [self.processor.next_due_ms(partition.store) for partition in self.owned.values()]
        wait = min([_IDLE_S, *(max(0.0, (at - self.clock.now_ms()) / 1000) for at in due if at is not None)])
        first = self._consumer.poll(wait)
        messages = [first, *self._consumer.consume(self.config.batch_records_max - 1, 0)] if first is not None else []
        epoch = self._epoch
        self._metadata = self._consumer.consumer_group_metadata()
        good = []
        for message in messages:
            error = message.error()
            if error is None:
                # 1. a partition is assigned, at an offset that is only a placeholder, and paused
                # 2. what was fetched before the pause is delivered here, in the same gather
                # 3. it is restored and owned, and those old records would be stepped again
                partition = self.owned.get(message.partition() or 0)
                if partition is not None and (message.offset() or 0) >= partition.position:
                    good.append(message)
            elif error.fatal() or not error.retriable():
                raise FencedError(f"{self.group}: {error.str()}") if error.code() == KafkaError._FENCED else TransportError(f"{self.group}: {error.str()}")
        return epoch, good

    @staticmethod
    def _record(message: Message) -> Record:
        pairs = tuple((name, value if value is None or isinstance(value, bytes) else str(value).encode()) for name, value in cast(list[tuple[str, Any]], message.headers() or []))
        return Record(message.topic() or "", message.partition() or 0, message.offset() or 0, message.timestamp()[1], message.key(), message.value(), pairs)

    def _process(self, records: list[Record], refused: str | None = None) -> None:
        """Step and commit; what the broker rejects is tried in halves, and alone it is refused (K11)."""
        if not records:
            return
        batch = Batch()
        by_partition: dict[int, list[Record]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
        for number, mine in by_partition.items():
            overlay = batch.overlays[number] = Overlay(self.owned[number].store)
            for made in self._decide(overlay, mine) if refused is None else [self.processor.refuse(overlay, record, refused) for record in mine]:
                batch.outputs += made.outputs
                batch.logs += made.logs
            batch.first[number] = mine[0].offset
            batch.positions[number] = mine[-1].offset + 1
        try:
            self._commit(batch)
        except Rejected as error:
            if refused is not None:
                raise TransportError(f"the broker refuses even the dead letter of {records[0]}: {error}", retryable=False) from None
            half = len(records) // 2
            if half:
                self._process(records[:half])
                self._process(records[half:])
            else:
                self._process(records, refused=str(error))

    def _decide(self, overlay: Overlay, records: list[Record]) -> list[Decision]:
        """The processor's decisions; records on the wrong partition go to the right one first (K6)."""
        now_ms = self.clock.now_ms()
        right = [record for record in records if record.key is None or partition_of(record.key, self.partitions) == record.partition]
        made = self.processor.decide(overlay, right, now_ms)
        if len(right) < len(records):
            at_home = set(map(id, right))
            made += [self._forward(record, now_ms) for record in records if id(record) not in at_home]
        return made

    def _forward(self, record: Record, now_ms: int) -> Decision:
        if record.key is None or header(record, "kwflow-forwarded") is not None:
            return Decision((dead_letter(self.config, record, "wrong-partition", "forwarded once already", now_ms),), counts=("dead-letter",))
        headers = (*record.headers, ("kwflow-forwarded", str(record.partition).encode()))
        return Decision((Output(record.topic, record.key, record.value, headers, record.timestamp_ms, partition_of(record.key, self.partitions)),), counts=("forwarded",))

    def _fire(self) -> None:
        for partition in list(self.owned.values()):
            if partition.position < partition.fire_from:
                continue
            overlay = Overlay(partition.store)
            made = self.processor.due(overlay, self.clock.now_ms(), _FIRED_MAX)
            if made is not None:
                number = partition.number
                self._commit(Batch({number: overlay}, list(made.outputs), {number: partition.position}, {number: partition.position}, list(made.logs)))

    # -- commit and settle -----------------------------------------------------------------------------------------
    def _commit(self, batch: Batch) -> None:
        """One transaction (K14: an offset for every partition it touches), then the local stores."""
        reached: dict[int, int] = {}
        failures: list[KafkaError] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                failures.append(error)
            elif message.topic() == self.processor.changelog_topic:
                reached[message.partition() or 0] = max(reached.get(message.partition() or 0, 0), (message.offset() or 0) + 1)

        offsets = [TopicPartition(self.processor.input_topic, number, position) for number, position in batch.positions.items()]
        try:
            self._producer.begin_transaction()
            for output in batch.outputs:
                self._produce(delivered, output.topic, output.key, output.value, output.headers, output.timestamp_ms, output.partition)
            for number, overlay in batch.overlays.items():
                position = {"topic": self.incarnation, "next": batch.positions[number], "partitions": self.partitions}
                overlay.changes[POSITION] = msgspec.json.encode(position)
                for key, value in overlay.changes.items():
                    self._produce(delivered, self.processor.changelog_topic, key, value, (), None, number)
            _again(lambda: self._producer.send_offsets_to_transaction(offsets, self._metadata, 10))
            _again(lambda: self._producer.commit_transaction(30))
        except KafkaException as error:
            self._abort(batch, error.args[0], failures)
        for number, overlay in batch.overlays.items():
            partition = self.owned[number]
            partition.store.settle(overlay.changes, reached.get(number))
            partition.position = batch.positions[number]
        for line in batch.logs:
            self.on_log(line)

    def _produce(self, delivered: Any, topic: str, key: bytes | None, value: bytes | None, headers: Any, timestamp_ms: int | None, partition: int | None) -> None:
        place: dict[str, Any] = {} if partition is None else {"partition": partition}
        if timestamp_ms is not None:
            place["timestamp"] = timestamp_ms
        while True:
            try:
                self._producer.produce(topic, value, key, headers=list(headers), on_delivery=delivered, **place)
                return
            except BufferError:
                self._producer.poll(0.05)

    def _abort(self, batch: Batch, error: KafkaError, failures: list[KafkaError]) -> None:
        """Nothing of the batch has happened.  Raises Rejected for what the broker will never take, else what ends the process."""
        rejected = next((failure for failure in (*failures, error) if failure.code() in _REJECTED), None)
        if error.fatal() and rejected is None:
            raise FencedError(f"{self.group}: {error.str()}")
        if not error.fatal():
            _again(lambda: self._producer.abort_transaction(30))
        self._producer = self._new_producer()
        if rejected is not None:
            raise Rejected(rejected.str())
        for number, offset in batch.first.items():
            if number in self.owned:
                self._seek(number, offset)
        raise TransportError(f"{self.group}: the transaction failed and was aborted: {error.str()}")


def _again(call: Callable[[], Any]) -> Any:
    """The same call again while it is retriable, for twice the transaction timeout (K4); then the process has to end."""
    give_up = time.monotonic() + 2 * _TRANSACTION_S
    while True:
        try:
            return call()
        except KafkaException as error:
            code = error.args[0]
            if code.code() == KafkaError._FENCED:
                raise FencedError(code.str()) from None
            if not (code.retriable() or code.code() in (KafkaError._STATE, KafkaError._TIMED_OUT)):
                raise
            if time.monotonic() > give_up:
                raise TransportError(f"no answer for {2 * _TRANSACTION_S} s: {code.str()}") from None
        time.sleep(_RETRY_S)
