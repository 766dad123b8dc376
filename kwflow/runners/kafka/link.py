"""A client's link to an application on Kafka: it sends records, and receives committed records.

It has one consumer without a group, which is assigned numeric offsets that were looked up before anything is produced (M1.3):
`OFFSET_END` is resolved late and would miss a fast outcome.  The consumer follows the one reply partition of this process,
and those partitions of the result and error topics that hold the ids somebody waits for.  Which partition holds an id
depends on each topic's own partition count.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output, Record
from kwflow.errors import CommandError, OutcomeUnknown, TransportError
from kwflow.ports import Listener
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.broker_errors import BrokerErrors, explained
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import LIVE, made
from kwflow.runners.kafka.member import LATEST, offsets
from kwflow.runners.kafka.reading import Kept, gather, latest_of, read_to, unchanged
from kwflow.runners.kafka.topics import TOPIC_MS, client_config, record_of, transient

__all__ = ["KafkaLink", "each_latest", "ends_in_a_transaction", "latest", "partition_for", "read", "send"]

_Places = tuple[tuple[str, int], ...]  # (topic, partition) of an id's outcome, in the result and in the error topic
_TIMEOUT_S = 20
_SEND_SHARE = 0.75  # of a command's timeout; librdkafka checks for expired records once a second
_SEND_S_MIN = 5  # the first connection may take some time
_COUNT_S = 30  # maximum delay until added partitions are noticed
_PERHAPS_TAKEN = {  # a broker that is frozen, or leads without in-sync followers, has the record and may still append it
    KafkaError._MSG_TIMED_OUT,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._PURGE_INFLIGHT,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
}
_POLL_S = 0.05  # maximum delay until the first request for a partition, a delivery report or a timeout is noticed


class KafkaLink:
    """A Link (ports.py).  Raises TransportError within `client_connect_s` if there is no broker, or if topics are missing (AF-6)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.process = uuid.uuid4().hex
        self._encryption = Encryption(config)
        self._listener: Listener | None = None
        self._asked: queue.SimpleQueue[tuple[_Places, Callable[[], None]]] = queue.SimpleQueue()
        self._followed: set[tuple[str, int]] = set()
        self._pending: Counter[_Places] = Counter()  # how many calls wait in `_asked`, so that records for the same places keep the order of the calls
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kwflow-client", daemon=True)
        self._ends = [topic for topic in (config.result_topic, config.error_topic) if topic]
        try:
            settings: dict[str, Any] = {"group_id": f"{config.application_id}-client", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "error"}
            self._consumer = made(Consumer, client_config(config, **settings, fetch_queue_backoff_ms=10))
            self._producer = self._new_producer()
            self._partitions, self._count_next = self._count_partitions(), time.monotonic() + _COUNT_S
            self._reply_partition = zlib.crc32(self.process.encode()) % self._partitions[config.reply_topic]
            self._assign(config.reply_topic, self._reply_partition)
        except KafkaException as error:
            raise TransportError(f"{config.bootstrap_servers}: {error.args[0].str()}") from None

    def _count_partitions(self) -> dict[str, int]:
        there = topics.partitions_of(topics.admin(self.config), self.config)
        needed = [self.config.resume_topic, self.config.reply_topic, *self._ends]
        missing = [topic for topic in needed if topic not in there]
        if missing:
            raise TransportError(f"{self.config.bootstrap_servers} has no topic {', '.join(missing)}; create what is missing with kwflow topics create, unless an ACL hides it", retryable=False)
        return {topic: there[topic] for topic in needed}

    def _assign(self, topic: str, number: int) -> None:
        """Follow a partition from its present end, as read_committed readers see it, so that the outcome in a transaction that is still open is not missed."""
        give_up = time.monotonic() + self.config.client_connect_s
        while True:
            try:
                _, end = self._consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=self.config.client_connect_s, cached=False)
                break
            except KafkaException:  # a new partition, or a new leader, is not known everywhere at once; the error is not marked as retriable
                if time.monotonic() > give_up:
                    raise
            time.sleep(_POLL_S)
        self._consumer.incremental_assign([TopicPartition(topic, number, end)])

    @property
    def address(self) -> str:
        return f"{self._reply_partition}/{self.process}"

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        self._thread.start()

    def _places(self, key: bytes | None) -> _Places:
        return tuple((topic, partition_of(key or b"", self._partitions[topic])) for topic in self._ends)

    def follow(self, key: bytes, ready: Callable[[], None]) -> None:
        self._in_order(self._places(key), True, ready)

    def append(self, output: Output, failed: Callable[[Exception], None]) -> None:
        self._in_order(self._places(output.key), False, lambda: self._produce(output, failed))

    def _in_order(self, places: _Places, follow: bool, call: Callable[[], None]) -> None:
        """Make the call now or, if these places are not followed yet, on our thread, after the calls that already wait for them."""
        ours = threading.current_thread() is self._thread  # when called from a callback
        with self._lock:
            later = bool(self._pending[places]) or (follow and not self._followed.issuperset(places))
            if later and not ours:
                self._pending[places] += 1
                self._asked.put((places, call))
                return
        if follow and ours:
            self._follow(places)
        call()

    def _produce(self, output: Output, failed: Callable[[Exception], None]) -> None:
        def delivered(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                failed(self._not_taken(output, error, True) if error.code() not in _PERHAPS_TAKEN else self._perhaps_taken(output, error))

        producer = self._producer
        try:
            value, headers = self._encryption.encrypt(output.topic, output.value, output.headers)
            producer.produce(output.topic, value, output.key, headers=headers, on_delivery=delivered)
        except BufferError:
            failed(TransportError("the client's queue is full: the broker accepts records more slowly than they are written"))
        except KafkaException as error:
            if error.args[0].code() == KafkaError._FATAL:
                self._replace(producer)
                return self._produce(output, failed)
            failed(self._not_taken(output, error.args[0], False))
        self._serve()

    def _not_taken(self, output: Output, error: KafkaError, retryable: bool) -> Exception:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            said = f"the record for {output.topic} is larger than the broker accepts; send a reference instead, or raise message.max.bytes in [kafka] and max.message.bytes of the topic"
            return CommandError("too_large", said, (output.key or b"").decode())
        return TransportError(f"{self.config.bootstrap_servers} did not accept the record for {output.topic}: {explained(error)}", retryable)

    def _perhaps_taken(self, output: Output, error: KafkaError) -> OutcomeUnknown:
        return OutcomeUnknown(f"{self.config.bootstrap_servers} did not acknowledge the record for {output.topic}: {error.str()}")

    def _new_producer(self) -> Producer:
        """Create a producer that gives a record up before its command times out.  The command then fails as not acknowledged, not as unanswered by an engine."""
        return _producer(self.config, min(_TIMEOUT_S, max(_SEND_S_MIN, _SEND_SHARE * self.config.command_timeout_s)))

    def _serve(self) -> None:
        with contextlib.suppress(KafkaException):  # a broken producer says so here, once; the next record goes through a new one
            self._producer.poll(0)

    def _replace(self, broken: Producer) -> None:
        """Replace a broken producer.  The flush tells the senders of its queued records that they failed.

        A broker that has lost its last records, such as by a power failure, accepts no more records from the same idempotent producer.
        """
        with self._lock:
            if self._producer is broken:
                self._producer = self._new_producer()
        with contextlib.suppress(KafkaException):
            broken.flush(1)

    def find(self, key: bytes) -> list[Record]:
        return [record for topic, number in self._places(key) for record in read(self.config, topic, number) if record.key == key]

    def close(self) -> None:
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(10)
        with contextlib.suppress(KafkaException):
            self._producer.flush(1)
        self._consumer.close()

    # -- its thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        assert self._listener is not None
        listener = self._listener
        try:
            while not self._stopped.is_set():
                self._follow_asked()
                for message in gather(self._consumer, 500, _POLL_S):
                    self._take(message, listener)
                self._serve()
                self._recount(listener)
                listener.on_tick()
        except (KafkaException, TransportError) as error:
            text = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            listener.on_lost(TransportError(f"{self.config.bootstrap_servers}: {text}"))

    def _follow_asked(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                places, call = self._asked.get_nowait()
                self._follow(places)
                call()
                with self._lock:
                    self._pending[places] -= 1

    def _follow(self, places: _Places) -> None:
        for place in places:
            if place not in self._followed:
                self._assign(*place)
                self._followed.add(place)

    def _recount(self, listener: Listener) -> None:
        """Notice that a topic was given more partitions, which moves ids to other partitions.

        All of its partitions are followed from then on, the new ones from their beginning, and callers that wait are told to ask for what they missed.
        """
        if time.monotonic() < self._count_next:
            return
        self._count_next = time.monotonic() + _COUNT_S
        for topic in self._ends:
            known = self._partitions[topic]
            try:
                count = len(self._consumer.list_topics(topic, timeout=1).topics[topic].partitions)
            except KafkaException:  # try again the next time
                return
            if count > known:
                self._consumer.incremental_assign([TopicPartition(topic, number, 0) for number in range(known, count)])
                self._followed.update((topic, number) for number in range(known, count))
                self._follow(tuple((topic, number) for number in range(known)))
                self._partitions[topic] = count
                listener.on_gap()

    def _take(self, message: Message, listener: Listener) -> None:
        error = message.error()
        if error is None:
            listener.on_record(record_of(message, self._encryption))
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # retention overtook this reader: follow from the end again, and report the gap
            where = TopicPartition(message.topic() or "", message.partition() or 0)
            self._consumer.incremental_unassign([where])
            self._assign(where.topic, where.partition)
            listener.on_gap()
        elif not transient(error):
            raise TransportError(error.str())


def _producer(config: Config, timeout_s: float = _TIMEOUT_S, **more: Any) -> Producer:
    settings: dict[str, Any] = {"enable_idempotence": True, "message_timeout_ms": round(timeout_s * 1000), "linger_ms": 0, "topic_metadata_propagation_max_ms": TOPIC_MS}
    return made(Producer, client_config(config, partitioner="murmur2_random", **settings) | more)


def send(config: Config, topic: str, key: bytes | None, value: bytes | None, headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
    """Send one record; the broker has acknowledged it when this returns.  Raises TransportError."""
    failed: list[str] = []
    errors = BrokerErrors()

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(errors.with_cause(error))

    try:
        producer = _producer(config, error_cb=errors)
        encrypted, sent = Encryption(config).encrypt(topic, value, headers)
        producer.produce(topic, encrypted, key, headers=sent, on_delivery=delivered)
    except KafkaException as error:
        raise TransportError(f"{config.bootstrap_servers}: {error.args[0].str()}") from None
    if producer.flush(_TIMEOUT_S + 5) or failed:
        raise TransportError(f"{config.bootstrap_servers} did not accept the record for {topic}: {failed[0] if failed else 'no answer'}")


def read(config: Config, topic: str, partition: int | None = None, start: int = 0) -> Iterator[Record]:
    """Yield the committed records of one partition, or of all, from `start` to the present end of the topic.  Raises TransportError."""
    admin = topics.admin(config)
    there = topics.partitions_of(admin, config)
    if topic not in there:
        raise TransportError(f"{config.bootstrap_servers} has no topic {topic} (is --application-id right? kwflow topics create creates missing topics)", retryable=False)
    try:
        ends = offsets(LIVE, config, admin, topic, range(there[topic]) if partition is None else [partition], LATEST)
    except KafkaException as error:
        raise TransportError(f"{config.bootstrap_servers}: {error.args[0].str()}") from None
    yield from read_to(LIVE, config, topic, ends, dict.fromkeys(ends, start))


def ends_in_a_transaction(config: Config, topic: str) -> bool:
    """Whether the last offset of any partition is a transaction marker, which is not a record.  Raises TransportError."""
    admin = topics.admin(config)
    ends = offsets(LIVE, config, admin, topic, range(topics.describe(admin, config, topic)[1]), LATEST)
    before = {number: end - 1 for number, end in ends.items() if end}
    return before.keys() != {record.partition for record in read_to(LIVE, config, topic, ends, before)}


def latest(config: Config, topic: str, partition: int | None = None, kept: Kept = unchanged) -> dict[bytes, bytes]:
    """`latest_of` the records of one partition, or of all.  Raises TransportError."""
    return latest_of(config, topic, read(config, topic, partition), kept)


def each_latest(config: Config, topic: str, kept: Kept) -> Iterator[bytes]:
    """Yield the values of `latest` partition by partition, with only one partition in memory.  Raises TransportError."""
    for number in range(topics.partitions_of(topics.admin(config), config).get(topic, 1)):
        yield from latest(config, topic, number, kept).values()


def partition_for(config: Config, topic: str, key: bytes) -> int | None:
    """The partition of a topic that holds this key; None if there is no such topic."""
    partitions = topics.partitions_of(topics.admin(config), config).get(topic, 0)
    return partition_of(key, partitions) if partitions else None
