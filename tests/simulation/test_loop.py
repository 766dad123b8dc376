"""The loop on a simulated broker: its identity, what follows from a refused transaction, what is read again, and how long it waits (K1, K4, K6, K11, K18)."""

import json
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kwflow.core.murmur2 import partition_of
from kwflow.errors import FencedError, TransportError
from kwflow.ports import Decision
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.kafka.transaction import Batch
from kwflow.testing.kafka import Host, Refused
from kwflow.testing.kafka.broker import Made
from kwflow.testing.kafka.log import Entry, Partition, Place, Transaction
from kwflow.testing.kafka.producer import SimulatedProducer
from kwflow.testing.kafka.time import START_MS
from tests.simulation.test_found import Lab, turn


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


class Told(Lab):
    """Its engines keep history."""

    def config(self, name: str, **limits: Any) -> Any:
        return super().config(name, **{**limits, "history_topic": "found-history"})


class Anonymous(Lab):
    """Its engines are not given a name."""

    def config(self, name: str, **limits: Any) -> Any:
        return super().config(name, **limits).model_copy(update={"instance_id": None})


def start(lab: Lab, workflow: str, id: str) -> None:
    lab.send("workflow-resume", id, "new:{}", **{"kwflow-workflow": workflow})


def refuse(lab: Lab, topic: str, code: int, times: int = 10**9) -> None:
    """Make the broker refuse what is written to this topic, this many times."""
    append, left = lab.broker.append, [times]

    def refusing(place: Place, records: Iterable[Made], transaction: Transaction | None) -> list[Entry]:
        if place[0] == topic and left[0] > 0:
            left[0] -= 1
            raise Refused(code, "not taken")
        return append(place, records, transaction)

    lab.broker.append = refusing  # type: ignore[method-assign]


# -- identity ----------------------------------------------------------------------------------------------------
def test_an_identity_lasts_as_long_as_its_directory_and_has_one_process_at_a_time(tmp_path: pathlib.Path) -> None:
    """K1."""
    lab = Anonymous(tmp_path)
    first = lab.engine("one")
    name, known = first.member.name, (first.directory / "instance-id").read_text()
    assert name == f"found-{known}-0" and len(known) == 12, "written before anything is done under it"
    with pytest.raises(TransportError, match="another engine uses") as held:
        lab.engine("one")
    assert not held.value.retryable
    lab.kill(first, "one")
    second = lab.engine("one")
    assert second.member.name == name
    second.run(lambda: True)
    (second.directory / "instance-id").write_text("damaged")
    third = lab.engine("one")
    known = (third.directory / "instance-id").read_text()
    assert third.member.name == f"found-{known}-0" and re.fullmatch("[0-9a-f]{12}", known)
    assert lab.engine("two").member.name != third.member.name


def test_one_that_was_replaced_under_its_name_says_that_it_was_fenced(lab: Lab) -> None:
    """K1: so its supervisor does not start another one."""
    first = lab.engine("one")
    turn(first, lambda: first.owned)
    first._lock.close()
    lab.disks["one"].release()
    second = lab.engine("one")
    turn(second, lambda: second.owned)
    with pytest.raises(FencedError, match="another one has the same identity"):
        turn(first, lambda: False)
    with pytest.raises(FencedError, match="no right$"):  # this is fatal too, but nobody fenced it
        second.transactions._abort(KafkaError(KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, "no right", fatal=True), [], set())


def test_an_engine_that_stood_still_for_too_long_joins_again(lab: Lab) -> None:
    """K7: its partitions belong to another engine meanwhile, or to nobody."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    lab.broker.time.advance(lab.broker.time.now + 301_000)
    turn(engine, lambda: any("stalled for too long" in line for line in lab.said))
    start(lab, "main", "w")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)


# -- what the broker does not take -----------------------------------------------------------------------------------
def test_a_topic_that_takes_more_than_others_is_given_more(lab: Lab) -> None:
    """K11: the largest limit of all topics is the producer's, and a batch's limit is nine tenths of the smallest."""
    start(lab, "big", "big")
    start(lab, "twice", "twice")
    engine = lab.engine("one")
    turn(engine, lambda: [len(value) for value in lab.written("workflow-result")] == [300_002])
    turn(engine, lambda: [len(value) for value in lab.written("found-out")] == [120_000] * 2)
    assert lab.written("found-dead-letter") == []


@pytest.mark.parametrize("code", ["MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE", "INVALID_TIMESTAMP", "INVALID_RECORD", "TOPIC_AUTHORIZATION_FAILED"])
def test_what_the_broker_will_never_take_parks_its_instance_alone(lab: Lab, code: str) -> None:
    """K11."""
    engine = lab.engine("one")
    refuse(lab, "found-out", getattr(KafkaError, code))
    for id in ("a", "bad", "b"):
        start(lab, "late" if id != "bad" else "twice", id)
    turn(engine, lambda: len(lab.written("workflow-scheduler")) == 2)
    assert len(lab.written("found-dead-letter")) == 1
    assert any("message.timestamp.before.max.ms" in line for line in lab.said) == (code == "INVALID_TIMESTAMP"), lab.said


@pytest.mark.parametrize(("refused", "told"), [("found-history", []), ("found-out", ["parked"])])
def test_a_record_is_parked_whole_if_its_event_is_what_the_broker_will_never_take(tmp_path: pathlib.Path, refused: str, told: list[str]) -> None:
    """K11, decision 0059: then it has no event. An event that is not at fault is kept."""
    lab = Told(tmp_path)
    engine = lab.engine("one")
    refuse(lab, refused, KafkaError.MSG_SIZE_TOO_LARGE)
    start(lab, "twice", "w")
    turn(engine, lambda: lab.written("found-dead-letter"))
    assert lab.written("found-dead-letter") == ["new:{}"]
    assert [json.loads(event)["event"] for event in lab.written("found-history")] == told


def test_a_record_is_parked_only_if_it_is_refused_alone_twice(lab: Lab) -> None:
    """K11."""
    engine = lab.engine("one")
    refuse(lab, "found-out", KafkaError.MSG_SIZE_TOO_LARGE, times=1)
    start(lab, "twice", "w")
    turn(engine, lambda: len(lab.written("found-out")) == 2)
    assert lab.written("found-dead-letter") == []


def test_trouble_of_the_broker_parks_nothing_and_ends_the_process_if_it_lasts(lab: Lab) -> None:
    """K4, K11: each transaction that is committed in between resets the count."""
    engine = lab.engine("one")
    for number in range(2):
        refuse(lab, "found-out", KafkaError.NOT_ENOUGH_REPLICAS, times=9)
        start(lab, "twice", f"w{number}")
        turn(engine, lambda number=number: len(lab.written("found-out")) == 2 * number + 2)  # type: ignore[misc]
    assert lab.written("found-dead-letter") == []
    refuse(lab, "found-out", KafkaError.NOT_ENOUGH_REPLICAS, times=10)
    start(lab, "twice", "last")
    with pytest.raises(TransportError, match="10 transactions in a row were aborted: found-out: "):
        turn(engine, lambda: engine.owned[0].position == 3)


def test_what_is_too_large_for_any_topic_is_told_with_the_topic_it_was_for(lab: Lab) -> None:
    """K11: the client does not even queue it, so no topic is reported; the reason used to name every topic of the batch."""
    for topic in lab.broker.topics.values():
        topic.config["max.message.bytes"] = "250000"
    engine = lab.engine("one")
    start(lab, "large", "w")
    turn(engine, lambda: engine.counts["parked"])
    assert any("found-out: " in line and " or " not in line for line in lab.said), lab.said


def test_a_batch_that_a_slow_line_does_not_take_in_time_is_made_again_in_parts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """K4, K15: it used to be repeated in the same size forever."""
    flush, sent = SimulatedProducer.flush, []

    def slow(producer: SimulatedProducer, timeout: float = -1) -> int:
        size = sum(len(made[2] or b"") for _, made, _ in producer._queue)
        sent.append(size)
        return len(producer) if size > 700_000 else flush(producer, timeout)

    monkeypatch.setattr(SimulatedProducer, "flush", slow)
    for number in range(12):
        start(lab, "twice", f"w{number}")
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 12)
    assert len(lab.written("found-out")) == 24
    assert 1 <= sum("within 10 s" in line for line in lab.said) <= 6 and max(sent) > 2_000_000, lab.said


def test_a_dead_letter_that_is_refused_too_ends_the_engine_for_good(lab: Lab) -> None:
    """K10: there is no other place for it."""
    engine = lab.engine("one")
    refuse(lab, "found-dead-letter", KafkaError.TOPIC_AUTHORIZATION_FAILED)
    start(lab, "large", "w")
    with pytest.raises(TransportError, match="refuses even the dead letter") as refused:
        turn(engine, lambda: False)
    assert not refused.value.retryable


@pytest.mark.parametrize("large", ["value", "headers", "key"])
def test_a_record_that_is_too_large_for_a_dead_letter_leaves_one_that_says_where_it_is(lab: Lab, large: str) -> None:
    """K10, K11: a record that a producer without a limit of its own can write to the input must not end all engines."""
    engine = lab.engine("one")
    start(lab, "late", "before")
    producer = lab.client.producer({"partitioner": "murmur2_random", "message.max.bytes": 1_048_588})
    much = "x" * 1_048_300
    producer.produce("workflow-resume", key=much if large == "key" else "w", value=much if large == "value" else "{", headers=[("mine", much)] if large == "headers" else [])
    producer.poll(0)
    start(lab, "late", "after")
    turn(engine, lambda: len(lab.written("workflow-scheduler")) == 2)
    [letter] = lab.broker.topics["found-dead-letter"].partitions[0].committed()
    said = dict(letter.headers)
    assert (letter.key, letter.value) == (None if large == "key" else b"w", None)
    assert (said["kwflow-error-reason"], said["kwflow-error-topic"], said["kwflow-error-offset"]) == (b"refused", b"workflow-resume", b"1")
    assert said["kwflow-error-message"].endswith(b"they exist only in the original record")


def test_a_timestamp_that_the_dead_letters_do_not_take_is_only_in_a_header(lab: Lab) -> None:
    """K11, K13: the input may be configured to accept any timestamp, and accepts any before Kafka 4."""
    engine = lab.engine("one")
    append, late = lab.broker.append, START_MS + 1_800_000

    def timed(place: Place, records: Iterable[Made], transaction: Transaction | None) -> list[Entry]:
        if place[0] != "workflow-resume" and any(made[0] == late for made in records):
            raise Refused(KafkaError.INVALID_TIMESTAMP, "too far ahead")
        return append(place, records, transaction)

    lab.broker.append = timed  # type: ignore[method-assign]
    lab.producer.produce("workflow-resume", key="w", value="{", timestamp=late)
    lab.producer.poll(0)
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)
    [letter] = lab.broker.topics["found-dead-letter"].partitions[0].committed()
    assert dict(letter.headers)["kwflow-error-timestamp"] == str(late).encode() and letter.timestamp_ms < late


def test_what_is_due_and_refused_ends_the_scheduler_with_the_reason(lab: Lab) -> None:
    """K11: there is no record that could be refused; it used to be reported as a bug of kwflow."""
    scheduler = lab.scheduler("one")
    refuse(lab, "workflow-resume", KafkaError.TOPIC_AUTHORIZATION_FAILED)
    lab.send("workflow-scheduler", "w|1", "1")
    with pytest.raises(TransportError, match="refuses records that are due now: workflow-resume: not taken") as refused:
        turn(scheduler, lambda: False)
    assert not refused.value.retryable


def test_a_broker_that_never_answers_ends_the_process(lab: Lab) -> None:
    """K4: within twice the transaction timeout."""
    engine = lab.engine("one")
    start(lab, "main", "w")
    turn(engine, lambda: engine.owned)
    lab.hosts["one"].losing["commit"] = 10**9
    begun_ms = lab.broker.time.now
    with pytest.raises(TransportError, match="found: the coordinator of transactions or of the group, at .*: no answer for 30 s: "):
        turn(engine, lambda: False)
    assert 30_000 <= lab.broker.time.now - begun_ms < 32_000


def test_an_abort_is_soon_over_and_its_records_are_applied_in_order(lab: Lab) -> None:
    """K3, K18: what was read at the end of the log is read again, too."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    start(lab, "main", "w")
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    refuse(lab, "found-out", KafkaError.NOT_ENOUGH_REPLICAS, times=4)
    begun_ms = lab.broker.time.now
    turn(engine, lambda: lab.written("found-out") == ["1"])
    assert engine.counts == {"started": 1, "resumed": 1}
    assert 100 < lab.broker.time.now - begun_ms < 2_000, "the broker is given a moment"


def test_an_identity_that_the_broker_has_forgotten_is_made_anew_after_one_abort(lab: Lab) -> None:
    """K1: `transactional.id.expiration.ms`, a week without a transaction. The client asks for a new producer id only when it ends a transaction that has begun, but none can begin."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    lab.broker.transactions.expire(engine.member.name)
    start(lab, "main", "w")
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    turn(engine, lambda: lab.written("found-out") == ["1"])
    assert len([line for line in lab.said if "was aborted" in line]) == 1


class Ticking:
    """Time passes each time it is read, so that a batch has one step."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def now_ms(self) -> int:
        self._host.time.advance(self._host.time.now + 1)
        return self._host.now_ms()


def test_a_record_over_the_producers_own_limit_parks_its_instance(lab: Lab) -> None:
    """K11: the client refuses it when it is produced."""
    for topic in lab.broker.topics.values():
        topic.config["max.message.bytes"] = "200000"
    engine = lab.engine("one")
    start(lab, "large", "w")
    turn(engine, lambda: len(lab.written("found-dead-letter")) == 1)


@pytest.mark.parametrize("what", ["send_offsets", "commit", "abort"])
def test_an_answer_that_is_lost_is_asked_for_again_and_nothing_else_happens(lab: Lab, what: str) -> None:
    """K4: by the same call."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    lab.hosts["one"].losing[what] = 2
    if what == "abort":
        refuse(lab, "found-out", KafkaError.NOT_ENOUGH_REPLICAS, times=1)
    start(lab, "twice", "w")
    turn(engine, lambda: len(lab.written("found-out")) == 2)
    assert lab.hosts["one"].losing[what] < 0 and sum("was aborted" in line for line in lab.said) == int(what == "abort")


def test_a_partition_that_is_not_ready_yet_is_sought_again(lab: Lab) -> None:
    """K5: librdkafka reports that for a moment after an assignment."""
    left = [1, 1, 1]
    engine = lab.engine("one")
    lab.hosts["one"].chance = lambda what: what == "not-ready" and bool(left) and bool(left.pop())  # type: ignore[method-assign]
    turn(engine, lambda: engine.owned)
    assert left == []


def test_what_was_fetched_before_a_partition_was_paused_is_not_applied_again(lab: Lab) -> None:
    """K2: the placeholder for its offset is the beginning of the log."""
    start(lab, "main", "w")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.kill(first, "one")
    second = lab.engine("one")
    lab.hosts["one"].chance = lambda what: what == "stale-fetch"  # type: ignore[method-assign]
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    turn(second, lambda: lab.written("found-out") == ["1"])
    assert second.counts["started"] == 0 and lab.written("found-dead-letter") == []


def test_a_partition_without_a_leader_for_a_moment_is_read_on(lab: Lab) -> None:
    """K4."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    place, refusals = lab.broker.partition, [KafkaError.NOT_LEADER_FOR_PARTITION] * 2

    def partition(where: Place) -> Partition:
        if refusals and where[0] == "workflow-resume":
            raise Refused(refusals.pop(), "not now")
        return place(where)

    lab.broker.partition = partition  # type: ignore[method-assign]
    engine.turn()
    assert refusals == []
    start(lab, "main", "w")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)


def test_a_call_of_the_client_has_a_time_by_which_it_is_back_and_between_calls_there_is_none(lab: Lab) -> None:
    """K4: the thread that ends this process then looks at this time."""
    engine = lab.engine("one")
    start(lab, "main", "w")
    back: list[bool] = []
    for what in ("send_offsets", "commit"):
        lab.hosts["one"].before[what] = lambda: back.append(engine.stats.back_by_s > time.monotonic() + 10)
    begun_s = time.monotonic()
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)
    assert back == [True, True] and engine.stats.back_by_s == 0 and engine.stats.turned_s >= begun_s


def test_what_two_records_of_a_partition_hand_out_is_handed_out_after_one_commit() -> None:
    """M6: what is left out would wait for the next owner of the partition."""
    batch = Batch()
    for number, items in ((0, ("a",)), (1, ("b",)), (0, ("c", "d")), (0, ())):
        batch.add(number, Decision(dispatch=items))
    assert batch.dispatch == {0: ["a", "c", "d"], 1: ["b"]}


# -- records on the wrong partition ----------------------------------------------------------------------------------
def test_a_batch_that_ends_early_forwards_only_what_lies_before_its_end(tmp_path: pathlib.Path) -> None:
    """K6: the position moves past what is forwarded, and so past everything before it that was not stepped."""
    lab = Lab(tmp_path, partitions=2)
    ids = [f"w{number}" for number in range(12)]
    home, away = ([id for id in ids if partition_of(id.encode(), 2) == number] for number in range(2))
    for id in (away[0], home[0], away[1], home[1], away[2], None):
        lab.producer.produce("workflow-resume", value=b"new:{}", key=id and id.encode(), partition=0)
    lab.producer.poll(0)
    engine = lab.engine("one", batch_ms_max=1)
    engine.clock = Ticking(lab.hosts["one"])
    turn(engine, lambda: engine.owned and engine.owned[0].position == 6)
    turn(engine, lambda: engine.counts["started"] == 5)
    letters = lab.written("found-dead-letter")
    assert len(letters) == 1, "what has no key belongs nowhere else"


def test_a_record_that_the_right_partition_does_not_take_parks_nothing_on_the_wrong_one(tmp_path: pathlib.Path) -> None:
    """K6, K11: neither its instance is there, nor anything that could retry it."""
    lab = Lab(tmp_path, partitions=2)
    [away, *_] = [f"w{number}" for number in range(12) if partition_of(b"w%d" % number, 2) == 1]
    lab.producer.produce("workflow-resume", value=b"new:{}", key=away.encode(), partition=0)
    lab.producer.poll(0)
    refuse(lab, "workflow-resume", KafkaError.INVALID_TIMESTAMP)
    engine = lab.engine("one")
    turn(engine, lambda: len(engine.owned) == 2 and engine.owned[0].position == 1)
    assert list(engine.owned[0].store.scan(away.encode())) == [], "an instance"
    [letter] = [entry for partition in lab.broker.topics["found-dead-letter"].partitions for entry in partition.committed()]
    assert (letter.key, letter.value, dict(letter.headers)["kwflow-error-reason"]) == (away.encode(), b"new:{}", b"refused")


def test_a_half_that_ends_early_goes_on_with_what_it_left(lab: Lab) -> None:
    """K11: the next half would otherwise move the position past it."""
    engine = lab.engine("one", batch_ms_max=1)
    for id in ("a", "b", "c"):
        start(lab, "main", id)
    start(lab, "large", "bad")

    def slow() -> None:
        engine.clock = Ticking(lab.hosts["one"])

    lab.hosts["one"].before["abort"] = slow
    turn(engine, lambda: engine.owned and engine.owned[0].position == 4)
    assert engine.counts["started"] >= 3 and all(engine.owned[0].store.get(id) for id in (b"a", b"b", b"c", b"bad"))


# -- replies ---------------------------------------------------------------------------------------------------------
CLIENT = next(name for name in map(str, range(9)) if partition_of(name.encode(), 2) == 0)


def ask(lab: Lab, partition: int) -> None:
    lab.send("workflow-resume", "w", "null", **{"kwflow-op": "query", "kwflow-request": "q", "kwflow-reply-to": f"{partition}/{CLIENT}"})


def test_a_reply_to_a_partition_that_does_not_exist_is_left_out_until_it_does(lab: Lab) -> None:
    """M1: otherwise it would abort the transaction of everybody else. The broker is asked at most every ten seconds."""
    engine = lab.engine("one")
    start(lab, "main", "w")
    ask(lab, 0)
    turn(engine, lambda: engine.owned and engine.owned[0].position == 2)
    asked: list[str] = []
    lab.hosts["one"].answered = lambda what: not asked.append(what)  # type: ignore[method-assign,func-returns-value]
    lab.broker.time.advance(lab.broker.time.now + 10_000)
    for number in range(3):
        ask(lab, 1)
        turn(engine, lambda number=number: engine.owned[0].position == 3 + number)  # type: ignore[misc]
    assert engine.counts["reply-gone"] == 3 and asked.count("list_topics") == 1
    topic = lab.broker.topics["workflow-reply"] if "workflow-reply" in lab.broker.topics else lab.broker.topics["found-reply"]
    topic.partitions.append(Partition(topic.name, 1))
    lab.broker.time.advance(lab.broker.time.now + 10_000)
    ask(lab, 1)
    turn(engine, lambda: [len(list(partition.committed())) for partition in topic.partitions] == [1, 1])


# -- waiting ---------------------------------------------------------------------------------------------------------
def elapsed_ms(lab: Lab, runner: KafkaRunner, until: Callable[[], object]) -> float:
    begun_ms = lab.broker.time.now
    turn(runner, until)
    return lab.broker.time.now - begun_ms


def test_nothing_that_could_be_done_waits_for_more_to_come(lab: Lab) -> None:
    """Neither what was gathered and did not fit, nor a partition that is to be restored."""
    for number in range(10):
        start(lab, "main", f"w{number}")
    engine = lab.engine("one", batch_ms_max=1)
    engine.clock = Ticking(lab.hosts["one"])
    lab.hosts["one"].losing["committed"] = 3
    assert elapsed_ms(lab, engine, lambda: engine.takeover.joined) < 300
    assert elapsed_ms(lab, engine, lambda: engine.owned) < 100
    assert elapsed_ms(lab, engine, lambda: engine.owned[0].position == 10) < 200


def test_slow_steps_of_one_partition_leave_the_others_their_turn(tmp_path: pathlib.Path) -> None:
    """Each partition comes first in its turn, because what it leaves of the budget may be nothing."""
    lab = Lab(tmp_path, partitions=2)
    for number in range(120):
        start(lab, "main", f"w{number}")
    engine = lab.engine("one", batch_ms_max=8)
    turn(engine, lambda: len(engine.owned) == 2)
    engine.clock = Ticking(lab.hosts["one"])
    for _ in range(6):
        engine.turn()
    positions = sorted(partition.position for partition in engine.owned.values())
    assert positions[1] < 2 * positions[0] and sum(positions) < 120


def test_a_timer_that_what_has_come_cancels_does_not_fire(lab: Lab) -> None:
    """K18: even if it is due by the time the scheduler looks."""
    scheduler = lab.scheduler("two")
    lab.send("workflow-scheduler", "w|1", "1000")
    turn(scheduler, lambda: scheduler.owned and scheduler.owned[0].position == 1)
    lab.producer.produce("workflow-scheduler", key=b"w|1", value=None)
    lab.producer.poll(0)
    lab.broker.time.advance(lab.broker.time.now + 2_000)
    turn(scheduler, lambda: scheduler.owned and scheduler.owned[0].position >= 2)
    until = lab.broker.time.now + 2_000
    turn(scheduler, lambda: lab.broker.time.now > until)
    assert lab.written("workflow-resume") == []


def test_the_end_of_the_log_that_was_seen_before_an_abort_is_not_reached(lab: Lab) -> None:
    """K18: what comes before it is read again, which takes a moment."""
    first = lab.scheduler("two")
    lab.send("workflow-scheduler", "w|1", "1000")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.kill(first, "two")
    lab.producer.produce("workflow-scheduler", key=b"w|1", value=None)
    lab.producer.poll(0)
    lab.broker.time.advance(lab.broker.time.now + 2_000)
    scheduler = lab.scheduler("two")
    lab.hosts["two"].chance = lambda what: what == "abort" and not any("aborted" in line for line in lab.said)  # type: ignore[method-assign]
    turn(scheduler, lambda: any("aborted" in line for line in lab.said))
    poll, nothing = scheduler._consumer.poll, [None, None]
    scheduler._consumer.poll = lambda timeout: nothing.pop() if nothing else poll(timeout)  # type: ignore[method-assign]
    turn(scheduler, lambda: scheduler.owned and scheduler.owned[0].position >= 2)
    assert nothing == [] and lab.written("workflow-resume") == []


def test_a_timer_fires_when_it_is_due_and_an_engine_at_rest_asks_for_nothing_but_records(lab: Lab) -> None:
    """K18; the checks that follow a start or a takeover stop once all is well."""
    engine, scheduler = lab.engine("one"), lab.scheduler("two")
    turn(engine, lambda: engine.owned)
    turn(scheduler, lambda: scheduler.owned)
    now_ms = lab.hosts["two"].now_ms()
    for wait_ms in (3_090, 60_000):
        lab.send("workflow-scheduler", f"w|{wait_ms}", str(wait_ms))
    turn(scheduler, lambda: lab.written("workflow-resume"))
    fired = next(lab.broker.partition(("workflow-resume", 0)).committed())
    assert 0 <= START_MS + fired.appended_ms - now_ms - 3_090 < 20
    until = lab.broker.time.now + 10_000
    for runner in (engine, scheduler):
        turn(runner, lambda: lab.broker.time.now > until)
        until = lab.broker.time.now + 10_000
    asked: list[str] = []
    for name, runner in (("one", engine), ("two", scheduler)):
        lab.hosts[name].answered = lambda what: not asked.append(what)  # type: ignore[method-assign,func-returns-value]
        until = lab.broker.time.now + 10_000
        turns = [0]
        turn(runner, lambda turns=turns: turns.append(1) or lab.broker.time.now > until)  # type: ignore[misc]
        assert len(turns) < 60, "it does not turn without end"
    assert asked == []


def test_a_mark_that_retention_took_with_all_before_it_keeps_nobody_from_taking_over(lab: Lab) -> None:
    """K16: after a quiet week, every engine used to end at its start, as if records had been lost."""
    engine, scheduler = lab.engine("one"), lab.scheduler("two")
    start(lab, "late", "w")
    turn(engine, lambda: lab.written("workflow-scheduler"))
    turn(scheduler, lambda: len(lab.written("workflow-resume")) == 2)
    log = lab.broker.partition(("workflow-resume", 0))
    turn(engine, lambda: engine.owned[0].position == log.end - 1)
    transactions = sum(engine.stats.commits.counts)
    quiet = lab.broker.time.now
    turn(engine, lambda: engine.owned[0].position == log.end, 1000)
    assert lab.broker.time.now - quiet > 50_000, "not with each record"
    until = lab.broker.time.now + 200_000
    turn(engine, lambda: lab.broker.time.now > until, 2000)
    assert sum(engine.stats.commits.counts) == transactions + 1, "and once"
    log.delete_before(log.end)
    engine.run(lambda: True)
    second = lab.engine("three")
    turn(second, lambda: second.owned)
    start(lab, "main", "v")
    turn(second, lambda: second.counts["started"] == 1)
