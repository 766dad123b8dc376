"""A batch as one Kafka transaction: its outputs, its state changes and its offsets, all or nothing (K1, K4, K11, K14).

A failed transaction ends in one of three ways: the broker will never accept it (Rejected); it has not happened and is
repeated (Aborted); or its outcome is unknown, and this process ends (FencedError, TransportError).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from kwflow.core.wire import Headers, Output, Record
from kwflow.errors import FencedError, TransportError
from kwflow.ports import Decision, RunEvent
from kwflow.runners.budget import bytes_of
from kwflow.runners.kafka.broker_errors import TIMED, explained
from kwflow.runners.kafka.environment import Producer
from kwflow.runners.kafka.member import TRANSACTION_S, Member, again
from kwflow.runners.kafka.state import POSITION, Position
from kwflow.runners.logs import lines_of
from kwflow.runners.overlay import Overlay
from kwflow.runners.stats import Stats

__all__ = ["Aborted", "Batch", "Rejected", "Transactions"]

_Report = Callable[[KafkaError | None, Message], None]

_REJECTED = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.INVALID_RECORD,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
}
_MISSING = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
_PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}  # records that our own abort removed, whether they were sent or not
_FENCED = f"; its transaction was open for more than {TRANSACTION_S} s, or another engine ended it"
_LATE_S = 5.0
_SENT_S = 10  # a large batch that is not sent by then is repeated in parts, while its transaction can still be aborted
_LARGE_BYTES = 100_000  # smaller batches are sent with the commit, which saves a round trip
_ANY = -1  # the partition that the record's key gives it
_ABORTS_MAX = 10  # in a row; then this process ends, so that its supervisor sees the trouble


class Aborted(Exception):
    """Nothing in the transaction has happened; its records will be read again.  `missing`: a topic was not there."""

    def __init__(self, why: str, missing: bool = False) -> None:
        super().__init__(why)
        self.missing = missing


class Rejected(Exception):
    """The broker will never accept one of these records (K11); `topic` is the one that it is for, if known, and `timed` says whether its time may be the reason."""

    def __init__(self, reason: str, topic: str = "", timed: bool = False) -> None:
        super().__init__(reason, topic, timed)
        self.reason = reason
        self.topic = topic
        self.timed = timed

    def __str__(self) -> str:
        return self.reason


@dataclass
class Batch:
    """The contents of one transaction; `positions` are the offsets that it sends."""

    overlays: dict[int, Overlay] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
    runs: list[RunEvent] = field(default_factory=list)
    dispatch: dict[int, list[object]] = field(default_factory=dict)
    spans: list[object] = field(default_factory=list)

    def add(self, number: int, made: Decision, record: Record | None = None) -> None:
        """Add a decision, except for its replies."""
        self.outputs += made.outputs
        if made.logs:
            self.logs += made.logs if record is None else lines_of(made, record)
        self.counts += made.counts
        self.spans += made.spans
        self.runs += made.runs
        if made.dispatch:
            self.dispatch.setdefault(number, []).extend(made.dispatch)

    def bytes(self) -> int:
        return bytes_of((change for overlay in self.overlays.values() for change in overlay.changes.items()), self.outputs)


class _Reports:
    """The delivery reports for one transaction's records: why the broker refused some, and how far the changelog's partitions reach."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, KafkaError]] = []
        self.reached: dict[int, int] = {}

    def delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.failures.append((message.topic() or "", error))

    def delivered_last(self, error: KafkaError | None, message: Message) -> None:
        """The report for the last record in a partition of the changelog."""
        self.delivered(error, message)
        self.reached[message.partition() or 0] = (message.offset() or 0) + 1


class Transactions:
    """The transactions of one engine, one after the other.  The producer is replaced when there is no other way to go on."""

    def __init__(self, member: Member, sizes: dict[str, int], stats: Stats) -> None:
        """`sizes` are producer settings that every topic accepts (K11).  Raises FencedError, TransportError."""
        self.member = member
        self.stats = stats
        self.aborts = 0  # in a row
        self._sizes = sizes
        self._producer = self._new_producer()

    def commit(self, batch: Batch, group: Any) -> dict[int, int]:
        """Commit a batch; return partition -> the changelog's offset after it.

        `group` is the consumer's metadata.  An offset is sent for every partition that the batch touches (K14).
        Raises Rejected, Aborted, FencedError, TransportError.
        """
        member, changelog = self.member, self.member.processor.changelog_topic
        reports = _Reports()
        delivered = reports.delivered
        note = member.changelog or member.incarnation  # the id of a topic that somebody may delete and create again; the next owner compares it
        offsets = [TopicPartition(member.processor.input_topic, number, position, note) for number, position in batch.positions.items()]
        begun = time.perf_counter()
        try:
            self._producer.begin_transaction()
            for output in batch.outputs:
                self._produce(reports, output.topic, output.value, output.key, output.partition, delivered, output.headers, output.timestamp_ms)
            for number, overlay in batch.overlays.items() if changelog else ():
                for key, value in overlay.changes.items():
                    self._produce(reports, changelog, value, key, number, delivered)
                overlay.changes[POSITION] = position = msgspec.json.encode(Position(member.incarnation, batch.positions[number], member.partitions))
                self._produce(reports, changelog, position, POSITION, number, reports.delivered_last)
            self._send(batch, reports)
            self._again(lambda: self._producer.send_offsets_to_transaction(offsets, group, 10), 10)
            self._again(lambda: self._producer.commit_transaction(30))
        except KafkaException as error:
            self._abort(error.args[0], reports.failures, {output.topic for output in batch.outputs} | ({changelog} if changelog else set()) or {member.processor.input_topic})
        self.aborts = 0
        self.stats.commits.observe(time.perf_counter() - begun)
        return reports.reached

    def _new_producer(self) -> Producer:
        """Create a producer.  init_transactions fences the previous run with this identity, and ends its open transaction."""
        producer = self.member.environment.producer(
            self.member.settings(
                transactional_id=self.member.name, partitioner="murmur2_random", linger_ms=100, retry_backoff_ms=1, retry_backoff_max_ms=100,
                transaction_timeout_ms=TRANSACTION_S * 1000, **self._sizes,
            )
        )  # fmt: skip
        self._again(lambda: producer.init_transactions(10), 10)
        return producer

    def _produce(
        self, reports: _Reports, topic: str, value: bytes | None, key: bytes | None, partition: int | None, report: _Report, headers: Headers = (), timestamp_ms: int | None = None
    ) -> None:
        encrypted, sent = self.member.encryption.encrypt(topic, value, headers)
        more: dict[str, Any] = {}  # what few records have
        if sent:
            more["headers"] = sent
        if timestamp_ms is not None:
            more["timestamp"] = timestamp_ms
        while True:
            try:
                self._producer.produce(topic, encrypted, key, _ANY if partition is None else partition, report, **more)
                return
            except BufferError:
                self._producer.poll(0.05)
            except KafkaException as error:
                if error.args[0].code() in _REJECTED:  # it was not even queued, so no delivery report names the topic
                    reports.failures.append((topic, error.args[0]))
                raise

    def _send(self, batch: Batch, reports: _Reports) -> None:
        """Wait until the broker has a large batch.  Raises KafkaException.

        1. The line carries 200 KB a second, and a batch has 12 MB.
        2. The request for the group's coordinator is queued behind all that, so the call that sends the offsets returns a minute after its timeout.
        3. The process ends, or the broker ends its transaction; the next process makes the same batch, and so on forever.
        """
        size = batch.bytes()
        if size > _LARGE_BYTES and (left := self._again(lambda: self._producer.flush(_SENT_S), _SENT_S)):
            late = KafkaError(KafkaError._MSG_TIMED_OUT, f"the broker has not accepted {left} records of a transaction of {size:,} bytes within {_SENT_S} s")
            reports.failures.insert(0, (self.member.group, late))
            raise KafkaException(late)

    def _abort(self, error: KafkaError, failures: list[tuple[str, KafkaError]], written: set[str]) -> None:
        """Abort a batch that wrote to these topics, so that nothing in it has happened.

        Always raises: Rejected if the broker will never accept a record, Aborted, or an error that ends the process.
        """
        if not error.fatal():
            self._again(lambda: self._producer.abort_transaction(30))  # this also serves delivery reports: a record may have been refused before the last one was produced
        places = [*failures, (" or ".join(sorted(written)), error)]
        rejected = next(
            (Rejected(f"{where}: {explained(failure)}", where if where in written else "", failure.code() in TIMED) for where, failure in places if failure.code() in _REJECTED), None
        )
        lost = [f"{topic}: {failure.str()}" for topic, failure in failures if failure.code() not in _PURGED]
        if error.fatal() and rejected is None:
            raise FencedError(f"{self.member.group}: {error.str()}{_FENCED if error.code() == KafkaError._FENCED else ''}")
        if rejected is not None or lost or error.code() == KafkaError.INVALID_PRODUCER_ID_MAPPING:
            # Its sequence numbers are lost or, after a week without a transaction, its producer id: the next transaction would fail, even a good one.
            self._producer = self._new_producer()
        if rejected is not None and rejected.timed and rejected.topic == self.member.processor.changelog_topic:  # no record is to blame: states have this machine's time
            raise TransportError(f"{self.member.group}: {rejected}")
        if rejected is not None:
            raise rejected
        self.aborts += 1
        why = lost[0] if lost else error.str()
        if self.aborts >= _ABORTS_MAX:
            raise TransportError(f"{self.member.group}: {_ABORTS_MAX} transactions in a row were aborted: {why}")
        raise Aborted(why, any(failure.code() in _MISSING for _, failure in places))

    def _again(self, call: Callable[[], Any], within_s: float = 30) -> Any:
        """Repeat a call as K4 says.  `back_by_s` says when it should return, so that a call that ignores its own timeout is noticed and the process ended."""

        def timed() -> Any:
            self.stats.back_by_s = time.monotonic() + within_s + _LATE_S
            return call()

        try:
            return again(self.member.environment, timed)
        except FencedError as error:
            raise FencedError(f"{self.member.group}: {error}{_FENCED}") from None
        except TransportError as error:
            raise TransportError(f"{self.member.group}: the coordinator of transactions or of the group, at {self.member.config.bootstrap_servers}: {error}") from None
        finally:
            self.stats.back_by_s = 0.0
