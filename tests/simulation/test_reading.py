"""Reading a topic up to its present end, and results that are written outside of transactions (K4, K5, M6.3)."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from kwflow.errors import TransportError
from kwflow.runners.kafka.reading import read_to
from kwflow.runners.kafka.results import Results
from kwflow.testing.kafka import Refused, SimulatedEnvironment
from tests.simulation.test_found import Lab
from tests.simulation.test_loop import refuse

TOPIC = "found-out"


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


def transaction(lab: Lab, name: str, *values: bytes, timeout_ms: int = 60_000) -> Any:
    """A transaction of somebody else that is left open."""
    writer = lab.client.producer({"transactional.id": name, "transaction.timeout.ms": timeout_ms})
    writer.init_transactions(1)
    writer.begin_transaction()
    for value in values:
        writer.produce(TOPIC, value, b"k", partition=0)
    writer.poll(0)
    return writer


def read(lab: Lab, start: int = 0) -> list[bytes | None]:
    end = lab.broker.partition((TOPIC, 0)).end
    return [record.value for record in read_to(lab.client, lab.config("any"), TOPIC, {0: end}, {0: start} if start else {})]


def test_all_that_is_committed_is_read_and_nothing_else_though_the_end_is_a_marker(lab: Lab) -> None:
    """K5."""
    assert read(lab) == []
    transaction(lab, "a", b"1", b"2").commit_transaction(1)
    transaction(lab, "b", b"gone").abort_transaction(1)
    lab.broker.time.advance(lab.broker.time.now + 100)
    lab.send(TOPIC, "k", "3")
    assert read(lab) == [b"1", b"2", b"3"]
    assert read(lab, start=1) == [b"2", b"3"]
    transaction(lab, "a", b"4").commit_transaction(1)
    lab.broker.time.advance(lab.broker.time.now + 100)
    assert read(lab, start=5) == [b"3", b"4"]
    begun_ms = lab.broker.time.now
    assert read(lab, start=lab.broker.partition((TOPIC, 0)).end) == [] and lab.broker.time.now == begun_ms, "nothing is asked for nothing"


def test_what_lies_behind_an_open_transaction_is_waited_for(lab: Lab) -> None:
    """K5: the end of its partition, as a reader of committed records sees it, is before it."""
    transaction(lab, "a", b"1", timeout_ms=15_000)
    lab.send(TOPIC, "k", "2")
    begun_ms = lab.broker.time.now
    assert read(lab) == [b"2"]
    assert 14_000 < lab.broker.time.now - begun_ms < 16_000


def test_an_open_transaction_is_not_waited_for_for_ever(lab: Lab) -> None:
    transaction(lab, "a", b"1", timeout_ms=900_000)
    lab.broker.time.after(30_000, lambda: None)
    begun_ms = lab.broker.time.now
    with pytest.raises(TransportError, match="could not be read to its end"):
        read(lab)
    assert 40_000 <= lab.broker.time.now - begun_ms < 41_000


def test_as_long_as_records_come_there_is_no_end_to_patience(lab: Lab) -> None:
    """Reading a long topic takes longer than anybody waits for a single record."""
    for number in range(3):
        transaction(lab, f"t{number}", b"%d" % number, timeout_ms=30_000 * (number + 1))
        lab.send(TOPIC, "k", f"after {number}")
    assert read(lab) == [b"after 0", b"after 1", b"after 2"]


@pytest.mark.parametrize(("code", "read_all_the_same"), [(KafkaError.NOT_LEADER_FOR_PARTITION, True), (KafkaError.TOPIC_AUTHORIZATION_FAILED, False)])
def test_a_reader_goes_on_after_trouble_that_passes(lab: Lab, code: int, read_all_the_same: bool) -> None:
    """K4."""
    lab.send(TOPIC, "k", "1")
    place, refusals = lab.broker.partition, [code]
    end = place((TOPIC, 0)).end

    def partition(where: Any) -> Any:
        if refusals:
            raise Refused(refusals.pop(), "not now")
        return place(where)

    found = read_to(lab.client, lab.config("any"), TOPIC, {0: end}, {})
    consumer = lab.client.consumer

    def made(settings: Any) -> Any:
        reader = consumer(settings)
        assign = reader.assign

        def assigned(partitions: Any) -> None:
            assign(partitions)
            lab.broker.partition = partition  # type: ignore[method-assign]

        reader.assign = assigned  # type: ignore[method-assign]
        return reader

    lab.client.consumer = made  # type: ignore[method-assign]
    if read_all_the_same:
        assert [record.value for record in found] == [b"1"]
    else:
        with pytest.raises(TransportError, match=TOPIC):
            list(found)


# -- results -----------------------------------------------------------------------------------------------------------
class Service(SimulatedEnvironment):
    """An environment whose delivery reports are served when the test calls for it."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.broker)
        self.producers: list[Any] = []
        self.served: list[Callable[[], None]] = []
        self.joined = 0

    def producer(self, settings: Any) -> Any:
        self.producers.append(super().producer(settings))
        return self.producers[-1]

    def background(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        self.served.append(work)

        def join() -> None:
            self.joined += 1

        return join


@pytest.mark.parametrize("code", [KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE, KafkaError.INVALID_RECORD, KafkaError.TOPIC_AUTHORIZATION_FAILED])
def test_a_result_that_the_broker_will_never_take_is_given_back(lab: Lab, code: int) -> None:
    """M6.3: its sender then writes that it failed. An invalid record is sent once more, as others that were sent with it may be the reason."""
    results, told = Results(lab.config("any"), TOPIC, environment := Service(lab)), list[str | None]()
    refuse(lab, TOPIC, code, times=1 + (code == KafkaError.INVALID_RECORD))
    results.deliver(0, b"k", b"1", (), told.append)
    for _ in range(3):
        environment.producers[0].poll(0)
    assert len(told) == 1 and told[0] is not None and lab.written(TOPIC) == []


def test_a_result_that_did_not_arrive_is_written_again_but_not_after_the_end(lab: Lab) -> None:
    """M6.3: after the end, it stays with its call, which is in the store."""
    results, told = Results(lab.config("any"), TOPIC, environment := Service(lab)), list[str | None]()
    refuse(lab, TOPIC, KafkaError.NOT_ENOUGH_REPLICAS, times=3)
    results.deliver(0, b"k", b"1", (), told.append)
    for _ in range(5):
        environment.producers[0].poll(0)
    assert told == [None] and lab.written(TOPIC) == ["1"] and len(environment.producers) == 1
    refuse(lab, TOPIC, KafkaError.NOT_ENOUGH_REPLICAS, times=1)
    results.deliver(0, b"k", b"2", (), told.append)
    results.close()
    for _ in range(3):
        environment.producers[0].poll(0)
    assert told == [None] and lab.written(TOPIC) == ["1"]
    assert environment.joined == 1 and len(environment.producers) == 1
    environment.served[0]()  # it comes to an end


@pytest.mark.parametrize("in_between", [False, True], ids=["a report comes first", "a result comes first"])
def test_a_producer_that_broke_is_replaced_once(lab: Lab, in_between: bool) -> None:
    """M6.3: all of its records are written again with the next one. As in librdkafka, one poll raises, then what was queued is reported, and the producer accepts nothing more."""
    results, told = Results(lab.config("any"), TOPIC, environment := Service(lab)), list[str | None]()
    results.deliver(0, b"k", b"0", (), told.append)
    broken = environment.producers[0]
    queued = [on_delivery for _, _, on_delivery in broken._queue]
    broken._queue = []

    def poll(_timeout: float) -> int:
        if broken.produce is not refusing:
            broken.produce = refusing
            broken._reports.extend((on_delivery, KafkaError(KafkaError._PURGE_QUEUE), None) for on_delivery in queued)
            raise KafkaException(KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "out of order", fatal=True))
        return int(broken._report())

    def refusing(*_: Any, **__: Any) -> None:
        raise KafkaException(KafkaError(KafkaError._FATAL, "broken"))

    broken.poll = poll
    if in_between:
        with pytest.raises(KafkaException):
            broken.poll(0)
        results.deliver(0, b"k", b"1", (), told.append)
    environment.served[0]()
    assert len(environment.producers) == 2
    environment.producers[1].poll(0)
    assert sorted(lab.written(TOPIC)) == ["0", "1"][: 1 + in_between] and told == [None] * (1 + in_between)


def test_results_that_are_too_much_together_are_written_all_the_same(lab: Lab) -> None:
    """K11: the broker refuses a batch that is larger than its topic accepts, and all of the batch used to fail."""
    lab.broker.topics["workflow-resume"].config["max.message.bytes"] = "300000"
    results, told = lab.engine("one").results, list[str | None]()
    results.environment = environment = Service(lab)
    for _ in range(5):
        results.deliver(0, b"k", b"x" * 100_000, (), told.append)
    environment.producers[0].poll(0)
    assert told == [None] * 5


def test_a_result_that_cannot_even_be_queued_is_given_back(lab: Lab) -> None:
    """M6.3: its workflow used to wait until the next restart."""
    results, told = Results(lab.config("any", value_bytes_max=2_000), TOPIC, Service(lab)), list[str | None]()
    results.deliver(0, b"k", b"x" * 4_000, (), told.append)
    assert len(told) == 1 and told[0] is not None


def test_a_full_queue_is_waited_for(lab: Lab) -> None:
    results, told = Results(lab.config("any"), TOPIC, environment := Service(lab)), list[str | None]()
    producer = results._current()
    full = [True, True]
    environment.host.chance = lambda what: what == "buffer-full" and bool(full) and full.pop()  # type: ignore[method-assign]
    results.deliver(0, b"k", b"1", (), told.append)
    producer.poll(0)
    assert told == [None]
