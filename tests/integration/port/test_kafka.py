"""What exactly-once rests on, the same tests on the simulated broker and on a real one: the simulation is worth what this suite says.

Sentences are about Kafka and librdkafka, as measured; each K rule that leans on one is named.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import ConfigResource, ConfigSource, NewPartitions, NewTopic, OffsetSpec, ResourceType

from kwflow.core.murmur2 import partition_of
from kwflow.runners.kafka.environment import LIVE, Environment
from kwflow.runners.kafka.member import again
from kwflow.testing.kafka import Broker, Host, SimulatedEnvironment


class Port:
    """One broker, real or not, with names of its own for topics, groups and identities."""

    def __init__(self, environment: Environment, bootstrap: str) -> None:
        self.environment = environment
        self.bootstrap = bootstrap
        self.name = f"port-{uuid.uuid4().hex[:8]}"
        self.admin = environment.admin(self.settings())
        self.open: list[Any] = []
        self.members: list[Member] = []

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"bootstrap.servers": self.bootstrap, "log_level": 0, **{key if key == "on_commit" else key.replace("_", "."): value for key, value in more.items()}}

    def topic(self, partitions: int = 1, **config: str) -> str:
        name = f"{self.name}-{uuid.uuid4().hex[:4]}"
        new = NewTopic(name, partitions, 1, config={key.replace("_", "."): value for key, value in config.items()})
        for future in self.admin.create_topics([new], operation_timeout=20).values():
            future.result()
        self.until(lambda: name in self.admin.list_topics(timeout=5).topics)
        return name

    def producer(self, **settings: Any) -> Any:
        return self.environment.producer(self.settings(partitioner="murmur2_random", linger_ms=5, **settings))

    def transactional(self, identity: str = "one", **settings: Any) -> Any:
        made = self.producer(transactional_id=f"{self.name}-{identity}", **settings)
        made.init_transactions(20)
        return made

    def consumer(self, group: str = "group", **settings: Any) -> Any:
        made = self.environment.consumer(self.settings(**{"group_id": f"{self.name}-{group}", "enable_auto_commit": False, "isolation_level": "read_committed", **settings}))
        self.open.append(made)
        return made

    def member(self, topic: str, name: str, **settings: Any) -> "Member":
        self.members.append(Member(self, topic, name, settings))
        return self.members[-1]

    def read(self, topic: str, count: int, **settings: Any) -> list[bytes | None]:
        """So many values from the beginning, and that there are no more."""
        consumer = self.consumer("reader", enable_partition_eof=True, **settings)
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        found: list[bytes | None] = []
        ended = False

        def enough() -> bool:
            nonlocal ended
            for message in consumer.consume(100, 0.1):
                if message.error() is None:
                    found.append(message.value())
                ended = message.error() is not None and message.error().code() == KafkaError._PARTITION_EOF
            return ended and len(found) >= count

        self.until(enough)
        assert len(found) == count, found
        return found

    def offset(self, topic: str, spec: Any, isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED) -> int:
        where = TopicPartition(topic, 0)
        return int(self.admin.list_offsets({where: spec}, isolation_level=isolation, request_timeout=10)[where].result().offset)

    def end(self, topic: str, isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED) -> int:
        return self.offset(topic, OffsetSpec.latest(), isolation)

    def until(self, done: Callable[[], object], seconds: float = 30) -> None:
        give_up = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < give_up, "it did not happen in time"
            self.environment.sleep(0.01)


class Member:
    """A group's member that keeps what its callbacks were told."""

    def __init__(self, port: Port, topic: str, name: str, settings: dict[str, Any]) -> None:
        self.told: list[tuple[str, list[int]]] = []
        self.held: set[int] = set()
        self.inside = False
        self.closing = False
        self.consumer = port.consumer(
            **{"partition_assignment_strategy": "cooperative-sticky", "session_timeout_ms": 2000, "heartbeat_interval_ms": 200, "auto_offset_reset": "earliest", "group_instance_id": name, **settings}
        )
        self.consumer.subscribe([topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def _assigned(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        assert self.inside or self.closing, "callbacks run inside poll and consume"
        self.told.append(("assign", [partition.partition for partition in partitions]))
        self.held |= {partition.partition for partition in partitions}
        consumer.incremental_assign(partitions)

    def _revoked(self, _consumer: Any, partitions: list[TopicPartition]) -> None:
        self.told.append(("revoke", [partition.partition for partition in partitions]))
        self.held -= {partition.partition for partition in partitions}

    def _lost(self, _consumer: Any, partitions: list[TopicPartition]) -> None:
        self.told.append(("lost", [partition.partition for partition in partitions]))
        self.held -= {partition.partition for partition in partitions}

    def poll(self) -> Any:
        self.inside = True
        try:
            return self.consumer.poll(0.05)
        finally:
            self.inside = False


@pytest.fixture(params=["simulated", pytest.param("real", marks=[pytest.mark.broker, pytest.mark.slow])])
def port(request: pytest.FixtureRequest) -> Iterator[Port]:
    if request.param == "real":
        made = Port(LIVE, request.getfixturevalue("broker"))
    else:
        broker = Broker()
        made = Port(SimulatedEnvironment(broker, Host(broker.time)), "simulated")
    yield made
    for member in made.members:
        member.closing = True
    for consumer in made.open:
        consumer.close()


def refused(call: Callable[[], Any]) -> KafkaError:
    with pytest.raises(KafkaException) as caught:
        call()
    error: KafkaError = caught.value.args[0]
    return error


# -- transactions --------------------------------------------------------------------------------------------------------


def test_records_of_an_aborted_transaction_reach_nobody_who_reads_committed(port: Port) -> None:
    topic, producer = port.topic(), port.transactional()
    for value, end in ((b"one", producer.abort_transaction), (b"two", producer.commit_transaction)):
        producer.begin_transaction()
        producer.produce(topic, value=value, key=b"k")
        producer.poll(0.1)
        if end == producer.abort_transaction and isinstance(producer, confluent_kafka.Producer):
            producer.flush(10)
        end(20)
    assert port.read(topic, 1) == [b"two"]
    assert port.read(topic, 2, isolation_level="read_uncommitted") == [b"one", b"two"]


def test_the_marker_of_a_transaction_takes_an_offset(port: Port) -> None:
    """K18: so that an end of the log is reached by no position, only by the event that says so."""
    topic, producer = port.topic(), port.transactional()
    producer.begin_transaction()
    producer.produce(topic, value=b"one", key=b"k")
    producer.commit_transaction(20)
    port.until(lambda: port.end(topic) == 2)
    consumer = port.consumer(enable_partition_eof=True)
    consumer.assign([TopicPartition(topic, 0, 0)])
    events: list[Any] = []
    port.until(lambda: events.extend(consumer.consume(10, 0.1)) or any(event.error() is not None for event in events))
    assert [(event.offset(), event.error() is None) for event in events] == [(0, True), (2, False)]
    assert consumer.position([TopicPartition(topic, 0)])[0].offset == 2, "behind the marker, but only once the end was met"


def test_an_open_transaction_hides_what_others_wrote_after_it_and_the_end_of_the_log_only_from_who_asks_for_the_stable_one(port: Port) -> None:
    """K5."""
    topic, holder = port.topic(), port.transactional()
    holder.begin_transaction()
    holder.produce(topic, value=b"open", key=b"k")
    port.until(lambda: holder.poll(0.05) is not None and port.end(topic) == 1)
    other = port.producer()
    other.produce(topic, value=b"plain", key=b"k")
    assert other.flush(10) == 0
    assert port.read(topic, 0) == []
    assert (port.end(topic), port.end(topic, IsolationLevel.READ_COMMITTED)) == (2, 0)
    holder.commit_transaction(20)
    port.until(lambda: port.end(topic, IsolationLevel.READ_COMMITTED) == 3)
    assert port.read(topic, 2) == [b"open", b"plain"]


def test_a_new_producer_with_the_same_identity_fences_the_old_one_and_ends_its_transaction(port: Port) -> None:
    """K1."""
    topic, old = port.topic(), port.transactional()
    old.begin_transaction()
    old.produce(topic, value=b"dead", key=b"k")
    port.until(lambda: old.poll(0.05) is not None and port.end(topic) == 1)
    port.transactional()
    port.until(lambda: port.end(topic, IsolationLevel.READ_COMMITTED) == 2)
    error = refused(lambda: old.commit_transaction(20))
    assert error.code() == KafkaError._FENCED
    assert error.fatal()
    assert port.read(topic, 0) == []


def test_a_transaction_that_takes_too_long_is_ended_and_its_producer_fenced(port: Port) -> None:
    """K4: a time-out at the coordinator looks like another owner."""
    topic, producer = port.topic(), port.transactional(transaction_timeout_ms=1000)
    producer.begin_transaction()
    producer.produce(topic, value=b"late", key=b"k")
    port.until(lambda: producer.poll(0.05) is not None and port.end(topic) == 1)
    port.until(lambda: port.end(topic, IsolationLevel.READ_COMMITTED) == 2, seconds=40)
    assert refused(lambda: producer.commit_transaction(20)).code() == KafkaError._FENCED


# -- offsets in transactions ---------------------------------------------------------------------------------------------


def owning(port: Port, topic: str, name: str = "a", **settings: Any) -> Member:
    member = port.member(topic, name, **settings)
    port.until(lambda: member.poll() is not None or member.held)
    return member


def test_offsets_become_the_group_s_with_the_commit_and_not_with_an_abort(port: Port) -> None:
    """K14."""
    topic, producer = port.topic(), port.transactional()
    member = owning(port, topic)
    where = [TopicPartition(topic, 0)]
    for offset, end in ((5, producer.commit_transaction), (9, producer.abort_transaction)):
        producer.begin_transaction()
        producer.send_offsets_to_transaction([TopicPartition(topic, 0, offset)], member.consumer.consumer_group_metadata(), 10)
        end(20)
    assert member.consumer.committed(where, timeout=10)[0].offset == 5


def test_committed_times_out_while_an_offset_is_pending(port: Port) -> None:
    """K5: whoever takes a partition over must not read an offset that is about to change."""
    topic, producer = port.topic(), port.transactional()
    member = owning(port, topic)
    producer.begin_transaction()
    producer.send_offsets_to_transaction([TopicPartition(topic, 0, 7)], member.consumer.consumer_group_metadata(), 10)
    error = refused(lambda: member.consumer.committed([TopicPartition(topic, 0)], timeout=1))
    assert error.code() == KafkaError._TIMED_OUT
    producer.commit_transaction(20)
    assert member.consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset == 7


def past_generation(port: Port, topic: str) -> Any:
    """What a member knew of its group before another one joined."""
    first = owning(port, topic, "a")
    past = first.consumer.consumer_group_metadata()
    second = port.member(topic, "b")
    port.until(lambda: first.poll() is not None or second.poll() is not None or second.held)
    return past


def test_the_offsets_of_a_past_generation_abort_the_transaction(port: Port) -> None:
    """K2."""
    topic, producer = port.topic(4), port.transactional()
    past = past_generation(port, topic)
    producer.begin_transaction()
    error = refused(lambda: producer.send_offsets_to_transaction([TopicPartition(topic, 0, 1)], past, 10))
    assert error.code() in (KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID)
    assert error.txn_requires_abort()
    producer.abort_transaction(20)


def test_a_transaction_without_valid_offsets_is_not_fenced(port: Port) -> None:
    """K14: an evicted scheduler could fire."""
    topic, producer = port.topic(4), port.transactional()
    past = past_generation(port, topic)
    producer.begin_transaction()
    producer.produce(topic, value=b"fired", partition=3)
    producer.send_offsets_to_transaction([TopicPartition(topic, 0, -1001)], past, 10)
    producer.commit_transaction(20)


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_after_a_refused_record_the_producer_s_next_transaction_fails_whatever_it_holds(port: Port) -> None:
    """K11."""
    topic = port.topic(max_message_bytes="100000")
    producer = port.transactional(message_max_bytes=1_000_000)
    failures: list[int] = []
    producer.begin_transaction()
    producer.produce(topic, value=b"x" * 200_000, key=b"k", on_delivery=lambda error, _: failures.append(error.code() if error else 0))
    error = refused(lambda: producer.commit_transaction(20))
    assert error.txn_requires_abort()
    producer.abort_transaction(20)
    assert failures == [KafkaError.MSG_SIZE_TOO_LARGE]
    producer.begin_transaction()
    producer.produce(topic, value=b"innocent", key=b"k")
    refused(lambda: producer.commit_transaction(20))
    again = port.transactional()
    again.begin_transaction()
    again.produce(topic, value=b"innocent", key=b"k")
    again.commit_transaction(20)
    assert port.read(topic, 1) == [b"innocent"]


def test_a_record_refused_before_the_rest_was_produced_is_reported_by_the_abort(port: Port) -> None:
    """K11: produce says only that no transaction can take records any more."""
    topic = port.topic(max_message_bytes="100000")
    producer = port.transactional(message_max_bytes=1_000_000)
    failures: list[int] = []
    delivered = lambda error, _: failures.append(error.code() if error else 0)
    producer.begin_transaction()
    producer.produce(topic, value=b"x" * 200_000, key=b"k", on_delivery=delivered)

    def broken() -> bool:
        try:
            producer.produce(topic, value=b"more", key=b"k", on_delivery=delivered)
        except KafkaException as error:
            assert error.args[0].code() == KafkaError._STATE
            return True
        if isinstance(port.environment, SimulatedEnvironment):
            producer._send()
        return False

    port.until(broken)
    again(port.environment, lambda: producer.abort_transaction(20))
    assert KafkaError.MSG_SIZE_TOO_LARGE in failures


def test_a_record_over_the_producer_s_own_limit_is_refused_at_once(port: Port) -> None:
    """K11."""
    topic, producer = port.topic(), port.transactional(message_max_bytes=10_000)
    producer.begin_transaction()
    assert refused(lambda: producer.produce(topic, value=b"x" * 20_000, key=b"k")).code() == KafkaError.MSG_SIZE_TOO_LARGE


def test_a_timestamp_more_than_an_hour_ahead_is_refused(port: Port) -> None:
    """K13; before Kafka 4.0 a topic takes any time, unless it is told."""
    topic, producer = port.topic(message_timestamp_after_max_ms="3600000"), port.producer()
    failures: list[int] = []
    now_ms = 1_700_000_000_000 if isinstance(port.environment, SimulatedEnvironment) else int(time.time() * 1000)
    producer.produce(topic, value=b"v", key=b"k", timestamp=now_ms + 2 * 3_600_000, on_delivery=lambda error, _: failures.append(error.code() if error else 0))
    producer.flush(10)
    assert failures == [KafkaError.INVALID_TIMESTAMP]


def test_a_full_queue_refuses_a_record_until_it_is_polled(port: Port) -> None:
    """K15."""
    topic, producer = port.topic(), port.transactional(queue_buffering_max_messages=5, transaction_timeout_ms=30_000)
    producer.begin_transaction()
    with pytest.raises(BufferError):
        for _ in range(1000):
            producer.produce(topic, value=b"v", key=b"k")
    port.until(lambda: producer.poll(0.05) is not None and len(producer) < 5)
    producer.produce(topic, value=b"last", key=b"k")
    producer.commit_transaction(20)


def test_a_key_goes_where_java_s_partitioner_puts_it(port: Port) -> None:
    """K6."""
    topic, producer = port.topic(7), port.producer()
    placed: dict[bytes, int] = {}

    def delivered(_error: Any, message: Any) -> None:
        placed[message.key()] = message.partition()

    for number in range(50):
        producer.produce(topic, value=b"v", key=b"id-%d" % number, on_delivery=delivered)
    assert producer.flush(20) == 0
    assert placed == {b"id-%d" % number: partition_of(b"id-%d" % number, 7) for number in range(50)}


# -- reading -------------------------------------------------------------------------------------------------------------


def test_a_reader_that_meets_nothing_but_a_marker_stands_behind_it_once_it_is_told_of_the_end(port: Port) -> None:
    """K5."""
    topic = port.topic()
    producer = port.transactional()
    producer.begin_transaction()
    producer.produce(topic, b"1")
    producer.commit_transaction(20)
    where = TopicPartition(topic, 0, 1)
    port.until(lambda: port.end(topic, IsolationLevel.READ_COMMITTED) == 2)
    consumer = port.consumer(enable_partition_eof=True)
    consumer.assign([where])
    told: list[Any] = []
    port.until(lambda: told.extend(consumer.consume(10, 0.1)) or told)
    assert [(message.error().code(), message.offset()) for message in told] == [(KafkaError._PARTITION_EOF, 2)]
    assert consumer.position([where])[0].offset == 2


def test_a_reader_of_an_empty_log_has_no_position_but_is_told_of_the_end(port: Port) -> None:
    """K5."""
    topic, consumer = port.topic(), port.consumer(enable_partition_eof=True, auto_offset_reset="error")
    consumer.assign([TopicPartition(topic, 0, 0)])
    events: list[Any] = []
    port.until(lambda: events.extend(consumer.consume(10, 0.1)) or events)
    assert [(event.error().code(), event.offset()) for event in events] == [(KafkaError._PARTITION_EOF, 0)]
    assert consumer.position([TopicPartition(topic, 0)])[0].offset == -1001


def test_an_offset_that_is_not_there_is_an_error_in_the_list(port: Port) -> None:
    """K5, K16: with auto.offset.reset=error."""
    topic, consumer = port.topic(), port.consumer(auto_offset_reset="error")
    consumer.assign([TopicPartition(topic, 0, 42)])
    events: list[Any] = []
    port.until(lambda: events.extend(consumer.consume(10, 0.1)) or events)
    assert events[0].error().code() == KafkaError._AUTO_OFFSET_RESET


def test_a_group_that_never_committed_has_no_offset(port: Port) -> None:
    """K16."""
    topic, consumer = port.topic(), port.consumer()
    assert consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset == -1001


def test_consume_without_time_takes_what_is_there(port: Port) -> None:
    topic, producer = port.topic(), port.producer()
    for number in range(20):
        producer.produce(topic, value=b"%d" % number, key=b"k", partition=0)
    assert producer.flush(10) == 0
    consumer = port.consumer()
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    found: list[Any] = []
    port.until(lambda: found.extend(consumer.consume(7, 0)) or len(found) >= 20)
    assert [message.value() for message in found] == [b"%d" % number for number in range(20)]


# -- groups --------------------------------------------------------------------------------------------------------------


def test_a_second_member_gets_its_share_after_the_first_was_told_inside_poll(port: Port) -> None:
    """K7: cooperative; callbacks also come with empty lists."""
    topic = port.topic(4)
    first = owning(port, topic, "a")
    assert first.held == {0, 1, 2, 3}
    second = port.member(topic, "b")
    port.until(lambda: second.poll() is not None or len(second.held) == 2 or first.poll() is not None)
    assert first.held | second.held == {0, 1, 2, 3}
    assert not first.held & second.held
    assert ("assign", []) in first.told + second.told


def test_a_member_that_does_not_poll_is_never_made_to_give_up_what_it_has(port: Port) -> None:
    """K2: it joins in the background, but a partition moves only after its callback."""
    topic = port.topic(2)
    first = owning(port, topic, "a")
    second = port.member(topic, "b")
    for _ in range(30):
        second.poll()
    assert first.held == {0, 1}
    assert second.held == set()
    port.until(lambda: first.poll() is not None or second.poll() is not None or len(second.held) == 1)


def test_a_member_that_polls_too_rarely_is_told_so_and_joins_again(port: Port) -> None:
    """K7."""
    topic = port.topic(2)
    member = owning(port, topic, "a", session_timeout_ms=1000, max_poll_interval_ms=1000)
    port.environment.sleep(4)
    events: list[Any] = []
    port.until(lambda: events.append(member.poll()) or any(event is not None and event.error() is not None for event in events))
    [error] = [event.error() for event in events if event is not None and event.error() is not None]
    assert error.code() == KafkaError._MAX_POLL_EXCEEDED
    assert not error.fatal()
    port.until(lambda: member.poll() is not None or member.told[-1] == ("assign", [0, 1]))
    assert ("lost", [0, 1]) in member.told


def test_a_static_member_that_was_restarted_gets_what_it_had_and_the_old_one_is_fatally_fenced(port: Port) -> None:
    """K7."""
    topic = port.topic(2)
    old = owning(port, topic, "a")
    new = owning(port, topic, "a")
    assert new.held == {0, 1}
    events: list[Any] = []
    port.until(lambda: events.append(old.poll()) or any(event is not None and event.error() is not None and event.error().code() == KafkaError._FATAL for event in events))
    port.open.remove(old.consumer)


def test_a_seek_is_refused_until_the_partition_is_fetched_so_one_inside_a_callback_has_to_be_made_again(port: Port) -> None:
    """K5: fetching begins once the group's offset has been asked for, which a callback that was held up can see happen."""
    topic = port.topic()
    answers: list[str] = []

    def seek(consumer: Any) -> None:
        try:
            consumer.seek(TopicPartition(topic, 0, 0))
            answers.append("taken")
        except KafkaException as error:
            answers.append(error.args[0].name())

    def assigned(consumer: Any, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        seek(consumer)

    consumer = port.consumer(partition_assignment_strategy="cooperative-sticky", auto_offset_reset="earliest")
    consumer.subscribe([topic], on_assign=assigned)
    port.until(lambda: consumer.poll(0.05) is not None or answers)
    while answers[-1] == "_STATE":
        consumer.poll(0.05)
        seek(consumer)
    assert answers[-1] == "taken"


def test_partitions_given_to_nobody_stay_so_until_their_member_joins_anew(port: Port) -> None:
    """K7 (runners/kafka/orphans.py): a static member restarted between losing a partition and saying so."""
    topic = port.topic(4)
    old = owning(port, topic, "a")
    second = port.member(topic, "b")
    for _ in range(60):
        second.poll()
    new = owning(port, topic, "a")
    for _ in range(60):
        second.poll()
        new.poll()
    assert len(new.held | second.held) == 2, "two are nobody's"
    described = port.admin.describe_consumer_groups([f"{port.name}-group"], request_timeout=10)[f"{port.name}-group"].result()
    assert sum(len(member.assignment.topic_partitions) for member in described.members) == 2
    new.consumer.unsubscribe()
    port.until(lambda: new.poll() is not None or not new.held)
    new.consumer.subscribe([topic], on_assign=new._assigned, on_revoke=new._revoked, on_lost=new._lost)
    port.until(lambda: new.poll() is not None or second.poll() is not None or len(new.held | second.held) == 4)
    port.open.remove(old.consumer)


def test_what_is_written_beside_a_position_is_given_to_the_next_owner_who_asks(port: Port) -> None:
    """M6.6 (runners/kafka/ledger.py): a worker's note of the calls that are open."""
    topic = port.topic(2)
    member = owning(port, topic)
    port.until(lambda: member.poll() is not None or member.held == {0, 1})
    assert member.consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].metadata is None
    member.consumer.commit(offsets=[TopicPartition(topic, 0, 3, "kwflow1 5 0,3! +"), TopicPartition(topic, 1, 4)], asynchronous=False)
    kept = member.consumer.committed([TopicPartition(topic, 0), TopicPartition(topic, 1)], timeout=10)
    assert [(place.offset, place.metadata) for place in kept] == [(3, "kwflow1 5 0,3! +"), (4, None)]
    member.consumer.commit(offsets=[TopicPartition(topic, 0, 2, "back")], asynchronous=False)
    [kept] = port.consumer().committed([TopicPartition(topic, 0)], timeout=10)
    assert (kept.offset, kept.metadata) == (2, "back"), "nobody looks whether it goes forward"


def test_a_note_of_more_than_4096_bytes_is_refused_with_its_position(port: Port) -> None:
    """M6.6: offset.metadata.max.bytes."""
    topic = port.topic(2)
    member = owning(port, topic)
    port.until(lambda: member.poll() is not None or member.held == {0, 1})
    member.consumer.commit(offsets=[TopicPartition(topic, 0, 1, "x" * 4_095)], asynchronous=False)
    error = refused(lambda: member.consumer.commit(offsets=[TopicPartition(topic, 0, 2, "x" * 4_097)], asynchronous=False))
    assert error.code() == KafkaError.OFFSET_METADATA_TOO_LARGE
    assert member.consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset == 1


def test_a_commit_fails_with_one_of_its_positions_and_the_others_are_taken_all_the_same(port: Port) -> None:
    """M6.6."""
    topic = port.topic(2)
    member = owning(port, topic)
    port.until(lambda: member.poll() is not None or member.held == {0, 1})
    error = refused(lambda: member.consumer.commit(offsets=[TopicPartition(topic, 0, 2, "x" * 4_097), TopicPartition(topic, 1, 4, "short")], asynchronous=False))
    assert error.code() == KafkaError.OFFSET_METADATA_TOO_LARGE
    kept = member.consumer.committed([TopicPartition(topic, 0), TopicPartition(topic, 1)], timeout=10)
    assert [place.offset for place in kept] == [-1001, 4]


def test_positions_of_a_past_generation_are_refused(port: Port) -> None:
    """M6.6: a worker that was evicted writes over nobody's note."""
    topic = port.topic(4)
    zombie = owning(port, topic, "a", session_timeout_ms=1000, max_poll_interval_ms=1000)
    port.environment.sleep(4)
    other = owning(port, topic, "b")
    port.until(lambda: other.poll() is not None or other.held == {0, 1, 2, 3})
    other.consumer.commit(offsets=[TopicPartition(topic, 0, 7, "b")], asynchronous=False)
    error = refused(lambda: zombie.consumer.commit(offsets=[TopicPartition(topic, 0, 1, "a")], asynchronous=False))
    assert error.code() in (KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID)
    [kept] = other.consumer.committed([TopicPartition(topic, 0)], timeout=10)
    assert (kept.offset, kept.metadata) == (7, "b")


@pytest.mark.parametrize("name", ["a", None], ids=["static", "dynamic"])
def test_positions_of_an_evicted_member_are_refused_also_by_a_group_without_members(port: Port, name: str | None) -> None:
    """M6.6, K2: such a group takes positions of anybody else. The client forgets its member id, and keeps its generation."""
    topic, producer = port.topic(1), port.transactional()
    where = [TopicPartition(topic, 0, 1)]
    zombie = owning(port, topic, group_instance_id=name, session_timeout_ms=1000, max_poll_interval_ms=1000)
    port.environment.sleep(4)
    assert refused(lambda: zombie.consumer.commit(offsets=where, asynchronous=False)).code() == KafkaError.UNKNOWN_MEMBER_ID
    producer.begin_transaction()
    assert refused(lambda: producer.send_offsets_to_transaction(where, zombie.consumer.consumer_group_metadata(), 10)).code() == KafkaError.UNKNOWN_MEMBER_ID
    producer.abort_transaction(20)


def test_what_becomes_of_a_commit_that_is_not_waited_for_is_told_inside_poll(port: Port) -> None:
    """M6.6."""
    topic = port.topic()
    told: list[Any] = []
    member = owning(port, topic, on_commit=lambda error, places: told.append((error, [place.offset for place in places])))
    member.consumer.commit(offsets=[TopicPartition(topic, 0, 3, "note")])
    assert told == []
    port.until(lambda: member.poll() is not None or told)
    assert told == [(None, [3])]
    assert member.consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].metadata == "note"


def test_who_reads_what_is_committed_is_told_of_an_end_before_what_is_undecided(port: Port) -> None:
    """M6.6: which records a worker that died may have read."""
    topic, producer, open_one = port.topic(), port.transactional("one"), port.transactional("two")
    producer.begin_transaction()
    producer.produce(topic, value=b"decided", partition=0)
    producer.commit_transaction(20)
    port.until(lambda: port.consumer().get_watermark_offsets(TopicPartition(topic, 0), timeout=10) == (0, 2))
    open_one.begin_transaction()
    open_one.produce(topic, value=b"open", partition=0)
    assert open_one.flush(20) == 0
    assert port.consumer().get_watermark_offsets(TopicPartition(topic, 0), timeout=10) == (0, 2)
    open_one.abort_transaction(20)


def test_an_assigned_partition_that_is_paused_in_the_callback_gives_nothing_until_it_was_sought_and_resumed(port: Port) -> None:
    """M6.6: a worker learns where it begins after the callback."""
    topic, producer = port.topic(), port.producer()
    for number in range(5):
        producer.produce(topic, value=b"%d" % number, partition=0)
    assert producer.flush(20) == 0
    assigned: list[Any] = []

    def paused(consumer: Any, places: list[TopicPartition]) -> None:
        consumer.incremental_assign([TopicPartition(place.topic, place.partition, OFFSET_BEGINNING) for place in places])
        consumer.pause(places)
        assigned.extend(places)

    consumer = port.consumer(partition_assignment_strategy="cooperative-sticky", auto_offset_reset="earliest")
    consumer.subscribe([topic], on_assign=paused)
    port.until(lambda: consumer.poll(0.05) is not None or assigned)
    assert consumer.consume(10, 0.5) == []

    def sought() -> bool:
        try:
            consumer.seek(TopicPartition(topic, 0, 3))
        except KafkaException as error:
            assert error.args[0].code() == KafkaError._STATE
            return False
        return True

    port.until(sought)
    consumer.resume(assigned)
    found: list[Any] = []
    port.until(lambda: found.extend(consumer.consume(10, 0.1)) or len(found) >= 2)
    assert [message.value() for message in found] == [b"3", b"4"]


# -- topics that others change -------------------------------------------------------------------------------------------


def test_a_topic_that_was_made_anew_is_read_on_where_the_one_before_was_and_nobody_says_so(port: Port) -> None:
    """Decision 0058: a feed has to ask for the topic's id.  What the group has committed goes with the topic, what is pending in a transaction, too."""
    topic, producer = port.topic(), port.producer()
    for number in range(5):
        producer.produce(topic, value=b"old %d" % number, partition=0)
    assert producer.flush(20) == 0
    consumer = port.consumer(auto_offset_reset="error")
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    found: list[Any] = []
    port.until(lambda: found.extend(consumer.consume(10, 0.1)) or len(found) >= 5)
    first, second = port.transactional("first"), port.transactional("second")
    for identity, offset in ((first, 5), (second, 4)):
        identity.begin_transaction()
        identity.send_offsets_to_transaction([TopicPartition(topic, 0, offset, "a note")], consumer.consumer_group_metadata(), 10)
        if identity is first:
            identity.commit_transaction(20)
            [kept] = consumer.committed([TopicPartition(topic, 0)], timeout=10)
            assert (kept.offset, kept.metadata) == (5, "a note")
    before = str(port.admin.describe_topics(TopicCollection([topic]), request_timeout=10)[topic].result().topic_id)
    port.admin.delete_topics([topic])[topic].result()
    port.until(lambda: topic not in port.admin.list_topics(timeout=5).topics)
    port.admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    port.until(lambda: topic in port.admin.list_topics(timeout=5).topics)
    assert str(port.admin.describe_topics(TopicCollection([topic]), request_timeout=10)[topic].result().topic_id) != before
    second.commit_transaction(20)
    assert consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset == OFFSET_INVALID
    producer = port.producer()
    for number in range(8):
        producer.produce(topic, value=b"new %d" % number, partition=0)
    assert producer.flush(20) == 0
    found.clear()
    port.until(lambda: found.extend(consumer.consume(10, 0.1)) or len(found) >= 3)
    assert [message.value() for message in found] == [b"new 5", b"new 6", b"new 7"]


def test_a_position_in_a_partition_that_is_no_more_ends_the_transaction(port: Port) -> None:
    """Decision 0058: it is made again, at once."""
    topic, producer = port.topic(), port.transactional()
    consumer = port.consumer()
    producer.begin_transaction()
    error = refused(lambda: producer.send_offsets_to_transaction([TopicPartition(topic, 3, 1)], consumer.consumer_group_metadata(), 10))
    assert error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART and error.txn_requires_abort()
    producer.abort_transaction(20)


def test_partitions_that_a_topic_is_given_are_shared_once_clients_know_of_them(port: Port) -> None:
    topic = port.topic()
    member = port.member(topic, "one", topic_metadata_refresh_interval_ms=200)
    port.until(lambda: member.poll() or member.held == {0})
    port.admin.create_partitions([NewPartitions(topic, 3)])[topic].result()
    port.until(lambda: member.poll() or member.held == {0, 1, 2})


# -- administration ------------------------------------------------------------------------------------------------------


def test_topics_are_described_with_an_id_partitions_and_configuration(port: Port) -> None:
    """K12, K16."""
    topic = port.topic(3, cleanup_policy="compact")
    found = port.admin.describe_topics(TopicCollection([topic]), request_timeout=10)[topic].result()
    assert len(found.partitions) == 3
    assert str(found.topic_id)
    resource = ConfigResource(ResourceType.TOPIC, topic)
    settings = port.admin.describe_configs([resource], request_timeout=10)[resource].result()
    assert settings["cleanup.policy"].value == "compact"
    assert int(settings["max.message.bytes"].value) > 100_000
    error = refused(lambda: port.admin.describe_topics(TopicCollection([f"{topic}-none"]), request_timeout=10)[f"{topic}-none"].result())
    assert error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART


def test_an_administrator_is_told_of_offsets_that_are_undecided_only_if_he_asks_for_stable_ones(port: Port) -> None:
    """K5 (runners/kafka/stopped.py): an engine is killed inside a transaction, and its application exported."""
    topic, producer = port.topic(), port.transactional()
    member = owning(port, topic)
    group = f"{port.name}-group"

    def offsets(stable: bool) -> list[tuple[int, int]]:
        asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0)])
        [future] = port.admin.list_consumer_group_offsets([asked], require_stable=stable, request_timeout=10).values()
        return [(place.offset, place.error.code() if place.error else 0) for place in future.result().topic_partitions]

    assert offsets(True) == offsets(False) == [(OFFSET_INVALID, 0)]
    producer.begin_transaction()
    producer.produce(topic, value=b"v", partition=0)
    producer.send_offsets_to_transaction([TopicPartition(topic, 0, 7)], member.consumer.consumer_group_metadata(), 10)
    assert offsets(False) == [(OFFSET_INVALID, 0)] and offsets(True)[0][1] == KafkaError.UNSTABLE_OFFSET_COMMIT
    producer.commit_transaction(20)
    port.until(lambda: offsets(True) == [(7, 0)])
    assert offsets(False) == [(7, 0)]


def test_an_offset_that_was_set_after_a_transaction_s_stays_when_that_is_committed(port: Port) -> None:
    """`reset`, after an engine was killed in a commit."""
    topic, producer = port.topic(), port.transactional()
    member = owning(port, topic)
    producer.begin_transaction()
    producer.send_offsets_to_transaction([TopicPartition(topic, 0, 7)], member.consumer.consumer_group_metadata(), 10)
    member.consumer.commit(offsets=[TopicPartition(topic, 0, 3)], asynchronous=False)
    producer.commit_transaction(20)
    assert member.consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset == 3


def test_an_administrator_sets_offsets_of_a_group_without_members_alone(port: Port) -> None:
    topic = port.topic()
    member, group = owning(port, topic), f"{port.name}-group"

    def alter(offset: int) -> int:
        [future] = port.admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, offset)])], request_timeout=10).values()
        [place] = future.result().topic_partitions
        return place.error.code() if place.error else 0

    assert alter(3) == KafkaError.UNKNOWN_MEMBER_ID
    port.open.remove(member.consumer)
    port.members.remove(member)
    member.closing = True
    member.consumer.close()
    port.until(lambda: alter(3) == 0)
    assert port.consumer().committed([TopicPartition(topic, 0)], timeout=10)[0].offset == 3


def test_settings_of_a_topic_are_told_from_the_broker_s(port: Port) -> None:
    """`reset` creates changelogs again with the former."""
    resource = ConfigResource(ResourceType.TOPIC, port.topic(cleanup_policy="compact"))
    settings = port.admin.describe_configs([resource], request_timeout=10)[resource].result()
    own = {name for name, entry in settings.items() if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}
    assert own == {"cleanup.policy"} and "retention.ms" in settings


def test_a_compacted_topic_takes_no_record_without_a_key(port: Port) -> None:
    topic, producer = port.topic(cleanup_policy="compact"), port.producer()
    failures: list[int] = []
    producer.produce(topic, value=b"v", on_delivery=lambda error, _: failures.append(error.code() if error else 0))
    producer.flush(10)
    assert failures == [KafkaError.INVALID_RECORD]
