"""`confluent_kafka.Producer` on the simulated broker: buffered, with the states of a transactional producer.

After a failed delivery, the transaction can only be aborted, and the producer has sequence numbers that the broker does not
expect: its next transaction fails, whatever it contains.  A fenced producer is unusable for ever.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from confluent_kafka import TIMESTAMP_CREATE_TIME, KafkaError, KafkaException, Message, TopicPartition

from kwflow.core.murmur2 import partition_of
from kwflow.testing.kafka.broker import Broker, Made
from kwflow.testing.kafka.consumer import error_of, failure
from kwflow.testing.kafka.groups import Metadata
from kwflow.testing.kafka.log import ABORTED, COMMITTED, OVERHEAD_BYTES, Place, Transaction
from kwflow.testing.kafka.time import Host
from kwflow.testing.kafka.transactions import Refused

__all__ = ["SimulatedProducer"]

Delivered = Callable[[KafkaError | None, Message], None]
Queued = tuple[Place, Made, Delivered | None]


class SimulatedProducer:
    """A producer.  Settings are those of librdkafka.  Any `partitioner` but murmur2_random puts keys elsewhere (as CRC32 does)."""

    def __init__(self, broker: Broker, host: Host, settings: dict[str, Any]) -> None:
        self._broker = broker
        self._host = host
        self._transactional = "transactional.id" in settings
        self._id = str(settings.get("transactional.id", ""))
        self._timeout_ms = float(settings.get("transaction.timeout.ms", 60_000))
        self._message_bytes_max = int(settings.get("message.max.bytes", 1_000_000))
        self._batch_bytes = int(settings.get("batch.size", 1_000_000))
        self._queue_max = int(settings.get("queue.buffering.max.messages", 100_000))
        self._java = settings.get("partitioner") == "murmur2_random"
        self._epoch = -1
        self._queue: list[Queued] = []
        self._reports: collections.deque[tuple[Delivered, KafkaError | None, Message]] = collections.deque()
        self._state = "new"  # ready, open, committing, broken (to be aborted), fenced
        self._broken: KafkaError | None = None
        self._sequence_lost = False
        self._registered = False  # whether the coordinator knows the open transaction

    def __len__(self) -> int:
        return len(self._queue) + len(self._reports)

    # -- records ---------------------------------------------------------------------------------------------------
    def produce(
        self, topic: str, value: bytes | str | None = None, key: bytes | str | None = None, partition: int = -1, on_delivery: Delivered | None = None, timestamp: int = 0, headers: Any = None
    ) -> None:
        if self._transactional and self._state != "open":
            raise error_of(KafkaError._FENCED if self._state == "fenced" else KafkaError._STATE, f"no transaction is open ({self._state})", fatal=self._state == "fenced")
        key, value = key.encode() if isinstance(key, str) else key, value.encode() if isinstance(value, str) else value
        made: Made = (timestamp or self._host.now_ms(), key, value, [(name, content.encode() if isinstance(content, str) else content) for name, content in headers or []])
        if _bytes(made) - OVERHEAD_BYTES > self._message_bytes_max:
            raise error_of(KafkaError.MSG_SIZE_TOO_LARGE, f"the record is larger than message.max.bytes = {self._message_bytes_max}")
        if len(self) >= self._queue_max or self._host.chance("buffer-full"):
            raise BufferError("Local: Queue full")
        self._queue.append(((topic, partition if partition >= 0 else self._partition(topic, key)), made, on_delivery))
        if self._host.chance("send-early"):
            self._send()

    def _partition(self, topic: str, key: bytes | None) -> int:
        count = len(self._broker.topics[topic].partitions) if topic in self._broker.topics else 1
        if key is None:
            return self._broker.chance.randrange(count)
        return partition_of(key, count) if self._java else sum(key) % count

    def poll(self, timeout: float = 0) -> int:
        """Serve delivery reports; wait up to the timeout for the first one."""
        self._host.call("producer-poll")
        until = self._broker.time.now + 1000 * timeout
        while not self._queue and not self._reports and self._broker.time.now < until:
            self._host.wait(until)
        self._send()
        return self._report()

    def flush(self, timeout: float = -1) -> int:
        self._host.call("flush")
        self._send()
        self._report()
        return len(self)

    def _report(self) -> int:
        count = len(self._reports)
        while self._reports:
            callback, error, message = self._reports.popleft()
            callback(error, message)
        return count

    def _send(self) -> None:
        """Send everything that is queued, in batches of one partition each."""
        queued, self._queue = self._queue, []
        batch: list[Queued] = []
        size = 0
        for item in sorted(queued, key=lambda item: item[0]):
            if batch and (item[0] != batch[0][0] or size + _bytes(item[1]) > self._batch_bytes):
                self._send_batch(batch)
                batch, size = [], 0
            batch.append(item)
            size += _bytes(item[1])
        if batch:
            self._send_batch(batch)

    def _send_batch(self, batch: list[Queued]) -> None:
        place = batch[0][0]
        try:
            transaction = self._begun() if self._transactional else None
            if self._host.chance("abort"):
                raise Refused(KafkaError._MSG_TIMED_OUT, "the batch was not delivered in time")
            if self._sequence_lost:
                raise Refused(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "the broker expected another sequence number")
            written = self._broker.append(place, [made for _, made, _ in batch], transaction)
        except Refused as refused:
            self._fail(refused)
            for _, made, callback in batch:
                if callback is not None:
                    self._reports.append((callback, KafkaError(refused.code, refused.reason), _message(place, made, -1001)))
            return
        for (_, made, callback), entry in zip(batch, written, strict=True):
            if callback is not None:
                self._reports.append((callback, None, _message(place, made, entry.offset)))

    def _begun(self) -> Transaction:
        """Return the transaction at the coordinator.  While the last one is still ending, the client asks again by itself."""
        while True:
            try:
                found = self._broker.transactions.add(self._id, self._epoch)
                self._registered = True
                return found
            except Refused as refused:
                if refused.code != KafkaError.CONCURRENT_TRANSACTIONS:
                    raise
            self._host.wait(self._broker.time.now + 10)

    def _fail(self, refused: Refused) -> None:
        if refused.code == KafkaError._FENCED:
            self._state = "fenced"
            self._broken = KafkaError(KafkaError._FENCED, refused.reason, fatal=True)
        elif self._state in ("open", "committing"):
            self._state = "broken"
            self._sequence_lost = True
            self._broken = KafkaError(refused.code, f"{refused.reason}: the current transaction must be aborted", txn_requires_abort=True)

    # -- transactions ----------------------------------------------------------------------------------------------
    def init_transactions(self, timeout: float = -1) -> None:
        self._host.call("init_transactions")
        until = self._broker.time.now + 1000 * timeout
        while True:
            try:
                self._epoch = self._broker.transactions.init(self._id, self._timeout_ms)
            except Refused as refused:
                if refused.code != KafkaError.CONCURRENT_TRANSACTIONS or self._broker.time.now >= until:
                    raise failure(refused, retriable=refused.code == KafkaError.CONCURRENT_TRANSACTIONS) from None
                self._host.wait(self._broker.time.now + 10)
                continue
            self._answer("init_transactions")
            self._state = "ready"
            return

    def begin_transaction(self) -> None:
        self._check("ready", "begin_transaction")
        self._registered = False
        self._state = "open"

    def send_offsets_to_transaction(self, positions: list[TopicPartition], group_metadata: object, timeout: float = -1) -> None:
        """Add offsets to the transaction.  Without a valid offset, nothing is sent, and the member is not checked."""
        self._host.call("send_offsets")
        self._check("open", "send_offsets_to_transaction")
        offsets = {(position.topic, position.partition): (position.offset, position.metadata or "") for position in positions if position.offset >= 0}
        if not offsets:
            return
        if not isinstance(group_metadata, Metadata):
            raise TypeError("group metadata comes from consumer_group_metadata()")
        try:
            self._broker.group(group_metadata.group).add_offsets(self._begun(), offsets, group_metadata)
        except Refused as refused:
            lost = self._sequence_lost
            self._fail(refused)
            self._sequence_lost = lost  # unchanged, since no record was rejected
            raise KafkaException(self._broken) from None
        self._answer("send_offsets")

    def commit_transaction(self, timeout: float = -1) -> None:
        """Send what is queued, and commit.  This may time out although it succeeds; the same call again then tells how it ended."""
        self._host.call("commit")
        if self._state == "open":
            self._send()
            self._report()
        self._check(("open", "committing"), "commit_transaction")
        self._end(COMMITTED, "committing", "commit")

    def abort_transaction(self, timeout: float = -1) -> None:
        self._host.call("abort")
        for place, made, callback in self._queue:
            if callback is not None:
                self._reports.append((callback, KafkaError(KafkaError._PURGE_QUEUE, "purged"), _message(place, made, -1001)))
        self._queue = []
        self._report()
        self._check(("open", "broken", "aborting"), "abort_transaction")
        self._end(ABORTED, "aborting", "abort")
        self._broken = None

    def _end(self, state: str, between: str, what: str) -> None:
        self._state = between
        try:
            if self._registered:
                self._broker.transactions.end(self._id, self._epoch, state)
        except Refused as refused:
            self._fail(refused)
            raise KafkaException(self._broken or KafkaError(refused.code, refused.reason)) from None
        self._answer(what)
        self._state = "ready"

    def _answer(self, what: str) -> None:
        if not self._host.answered(what):
            raise error_of(KafkaError._TIMED_OUT, f"{what}: no answer in time", retriable=True)

    def _check(self, states: str | tuple[str, ...], what: str) -> None:
        if self._broken is not None and self._state in ("broken", "fenced") and self._state not in states:
            raise KafkaException(self._broken)
        if self._state not in ([states] if isinstance(states, str) else states):
            raise error_of(KafkaError._STATE, f"{what} is not allowed now ({self._state})")


def _bytes(made: Made) -> int:
    _, key, value, headers = made
    return OVERHEAD_BYTES + len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") + 4 for name, content in headers)


def _message(place: Place, made: Made, offset: int) -> Message:
    return Message(place[0], place[1], offset, made[1], made[2], None, None, (TIMESTAMP_CREATE_TIME, made[0]))
