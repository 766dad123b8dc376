"""What a new owner finds: an open transaction of an engine that was killed in it (K1, K5), or a record that kills every engine in turn (K19)."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import types
from concurrent.futures import Future
from typing import Any, cast

import pytest
from confluent_kafka import OFFSET_INVALID, ConsumerGroupState, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from kwflow.errors import TransportError
from kwflow.runners.attempts import Attempts
from kwflow.runners.kafka.code import CodeTopic
from kwflow.runners.kafka.fencing import Fencing
from kwflow.runners.kafka.orphans import Orphans
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.stats import Stats
from kwflow.testing.kafka import Broker, Refused, SimulatedEnvironment
from kwflow.testing.kafka.admin import SimulatedAdmin
from kwflow.testing.kafka.groups import Metadata
from kwflow.testing.kafka.log import Partition, Place
from tests.simulation.test_found import Lab, turn
from tests.simulation.test_loop import refuse, start

SESSION_MS, AIM_MS = 6_000, 2_000


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


def die() -> None:
    raise Killed


def dies_of(engine: KafkaRunner, key: bytes) -> None:
    """Let a record with this key kill the engine's process."""
    decide = engine.processor.decide

    def deadly(state, records, *rest):  # type: ignore[no-untyped-def]
        if any(record.key == key for record in records):
            raise Killed
        return decide(state, records, *rest)

    engine.processor.decide = deadly  # type: ignore[method-assign]


def lost() -> None:
    raise TransportError("the broker is gone")


def killed_at(lab: Lab, runner: KafkaRunner, name: str, what: str) -> None:
    """Kill the runner at its next call of this kind."""
    lab.hosts[name].before[what] = die
    with pytest.raises(Killed):
        for _ in range(50):
            runner.turn()
    lab.kill(runner, name)


@pytest.mark.parametrize("what", ["commit", "send_offsets"])
def test_the_transaction_of_an_engine_that_died_in_it_is_ended_by_whoever_takes_over(lab: Lab, what: str) -> None:
    """K1: within the session timeout and two seconds, and not only after transaction.timeout.ms. Records are sent early, so that the changelog is open too."""
    first = lab.engine("one")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    lab.hosts["one"].chance = lambda what: what == "send-early"  # type: ignore[method-assign]
    killed_at(lab, first, "one", what)
    killed_ms = lab.broker.time.now
    second = lab.engine("two")
    turn(second, lambda: lab.written("found-out") == ["1"], 2000)
    print(f"taken over {lab.broker.time.now - killed_ms - SESSION_MS:.0f} ms after the session timeout")
    assert lab.broker.time.now - killed_ms < SESSION_MS + AIM_MS / 4, "what the takeover itself waits for needs no second look"
    assert any("found-one-0 has left the group inside a transaction" in line for line in lab.said)


@pytest.mark.parametrize("lost", [0, 2])
def test_outputs_that_an_engine_died_over_do_not_keep_their_readers_waiting(lab: Lab, lost: int) -> None:
    """K1: nothing that the next owner needs is undecided, but readers of the outputs would wait for transaction.timeout.ms."""
    first = lab.engine("one")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    produced: list[str] = []

    def chance(what: str) -> bool:
        produced.extend([what] * (what == "send-early"))
        if len(produced) == 2:
            raise Killed
        return what == "send-early"

    lab.hosts["one"].chance = chance  # type: ignore[method-assign]
    with pytest.raises(Killed):
        turn(first, lambda: False)
    lab.kill(first, "one")
    killed_ms, outputs = lab.broker.time.now, lab.broker.partition(("found-out", 0))
    assert (outputs.stable, outputs.end) == (0, 1)
    assert lab.broker.partition(("found-state-changelog", 0)).stable == lab.broker.partition(("found-state-changelog", 0)).end
    second = lab.engine("two")
    turn(second, lambda: second.owned, 2000)
    lab.hosts["two"].losing["list_offsets"] = lost
    turn(second, lambda: lab.written("found-out") == ["1"] and outputs.stable == outputs.end, 2000)
    print(f"readable {lab.broker.time.now - killed_ms - SESSION_MS:.0f} ms after the session timeout")
    assert lab.broker.time.now - killed_ms < SESSION_MS + AIM_MS + 500 * lost, "answers that are lost cost two looks"
    assert any("found-one-0 has left the group inside a transaction" in line for line in lab.said)
    until, asked = lab.broker.time.now + 2_000, list[str]()
    turn(second, lambda: lab.broker.time.now > until)
    lab.hosts["two"].answered = lambda what: not asked.append(what)  # type: ignore[method-assign,func-returns-value]
    turn(second, lambda: lab.broker.time.now > until + 5_000)
    assert asked == [], "once all is readable nobody looks any more"


def test_an_engine_that_is_a_member_of_the_group_is_never_fenced(lab: Lab) -> None:
    """What the owners topic says may be outdated: the named engine may own other partitions by now."""
    first = lab.engine("one")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    fencing = Fencing(lab.engine("two").member)
    lab.hosts["one"].before["commit"] = lambda: fencing.end_transaction_of(first.member.name)
    turn(first, lambda: lab.written("found-out") == ["1"])
    lab.send("workflow-resume", "w", '{"ref": "nobody"}')
    turn(first, lambda: first.owned and first.owned[0].position == 3)


def test_whom_nobody_can_ask_about_is_not_fenced_and_asked_about_once_a_second(lab: Lab) -> None:
    """K1: its transaction ends by itself."""
    first, second = lab.engine("one"), lab.engine("two")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    fencing, asked = Fencing(second.member), list[str]()

    def answered(what: str) -> bool:
        asked.append(what)
        return what != "describe_groups"

    lab.hosts["two"].answered = answered  # type: ignore[method-assign]
    lab.hosts["one"].before["commit"] = lambda: [fencing.end_transaction_of(first.member.name) for _ in range(20)] and None  # type: ignore[func-returns-value]
    turn(first, lambda: lab.written("found-out") == ["1"])
    assert asked == ["describe_groups"]
    lab.broker.time.advance(lab.broker.time.now + 1_000)
    fencing.end_transaction_of(first.member.name)
    assert asked == ["describe_groups"] * 2


def test_what_is_known_of_who_had_a_partition_goes_with_it(lab: Lab) -> None:
    """K1: the partition comes back when another engine has owned it, and died over it."""
    second = lab.engine("two")
    lab.hosts["two"].losing["committed"] = 10**9
    turn(second, lambda: second.takeover.assigned and second.takeover._former)
    lab.hosts["two"].running = False
    first = lab.engine("one")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1, 2000)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    killed_at(lab, first, "one", "commit")
    killed_ms = lab.broker.time.now
    lab.hosts["two"].running = True
    lab.hosts["two"].losing.clear()
    turn(second, lambda: lab.written("found-out") == ["1"], 3000)
    assert lab.broker.time.now - killed_ms < SESSION_MS + AIM_MS
    assert any("found-one-0 has left the group inside a transaction" in line for line in lab.said)


class Watched(SimulatedEnvironment):
    """An environment that remembers the consumers it has made."""

    def consumer(self, settings: Any) -> Any:
        made = super().consumer(settings)
        self.__dict__.setdefault("made", []).append(made)
        return made


@pytest.mark.parametrize("what", ["assigned", "restoring", "owned"])
def test_nothing_is_left_open_of_a_partition_that_was_lost(lab: Lab, what: str) -> None:
    """K2, K5: a revoke cancels a restore. The copy is opened again when the partition comes back."""
    [changelog] = lab.broker.topics["found-state-changelog"].partitions
    lab.broker.append(changelog.place, [(0, b"w%d" % number, b"1", []) for number in range(2_000)], None)
    engine = lab.engine("one", Watched, batch_records_max=20)
    lab.hosts["one"].losing["committed"] = 2
    where = [TopicPartition("workflow-resume", 0)]
    turn(engine, lambda: getattr(engine.takeover, what))
    engine.takeover._on_lost(engine._consumer, where)
    assert not engine.takeover.busy and not engine.owned
    engine.turn()
    assert not engine.takeover.busy
    assert not any(database.held for database in lab.disks["one"].databases.values())
    assert [consumer for consumer in cast(Watched, engine.environment).__dict__["made"] if not consumer._closed] == [engine._consumer]
    engine.takeover._on_assign(engine._consumer, where)
    turn(engine, lambda: engine.owned)
    assert len(list(engine.owned[0].store.scan(b"w"))) == 2_000


@pytest.mark.parametrize("until", ["restoring", "owned"])
def test_nothing_is_left_open_of_an_engine_that_ended(lab: Lab, until: str) -> None:
    lab.broker.append(("found-state-changelog", 0), [(0, b"w%d" % number, b"1", []) for number in range(2_000)], None)
    engine = lab.engine("one", Watched, standby=True)
    turn(engine, lambda: getattr(engine.takeover, until))
    engine.run(lambda: True)
    assert not any(database.held for database in lab.disks["one"].databases.values())
    assert all(consumer._closed for consumer in cast(Watched, engine.environment).__dict__["made"])
    assert not Attempts(engine.directory).unclean


def test_a_rebalance_that_leaves_an_engine_what_it_has_aborts_no_transaction(tmp_path: pathlib.Path) -> None:
    """K2: the group is at its next generation although no partition has moved, and a commit under the last generation is refused."""
    lab = Lab(tmp_path, partitions=2)
    first = lab.engine("one")
    turn(first, lambda: len(first.owned) == 2)
    engines = [first]
    for name in ("two", "three"):
        engines.append(lab.engine(name))
        until = lab.broker.time.now + 5_000
        turn(engines[-1], lambda until=until: [engine.turn() for engine in engines[:-1]] and lab.broker.time.now > until, 2000)  # type: ignore[misc]
        for number in range(10):
            lab.send("workflow-resume", f"{name}{number}", "new:{}")
        turn(engines[-1], lambda name=name: [engine.turn() for engine in engines[:-1]] and sum(engine.counts["started"] for engine in engines) == 10 * len(engines) - 10, 2000)  # type: ignore[misc]
    assert not any("aborted" in line for line in lab.said)


def test_partitions_that_have_to_wait_keep_those_that_run_waiting_for_a_tenth_of_a_second(tmp_path: pathlib.Path) -> None:
    """K5: a transaction of somebody else is open in all changelogs."""
    lab = Lab(tmp_path, partitions=8)
    writer = lab.client.producer({"transactional.id": "other", "transaction.timeout.ms": 60_000})
    writer.init_transactions(1)
    writer.begin_transaction()
    for number in range(8):
        writer.produce("found-state-changelog", b"1", b"w", partition=number)
    writer.poll(0)
    engine = lab.engine("one")
    turn(engine, lambda: len(engine.takeover.restoring) == 8)
    for _ in range(5):
        begun_ms = lab.broker.time.now
        engine.takeover.turn()
        assert lab.broker.time.now - begun_ms < 200
    writer.abort_transaction(1)
    turn(engine, lambda: len(engine.owned) == 8)


def test_offsets_that_have_to_wait_keep_those_that_run_waiting_for_a_tenth_of_a_second(tmp_path: pathlib.Path) -> None:
    """K5: a transaction that nobody may end is open over all offsets. Each offset used to be asked for, for a second, in one turn."""
    lab = Lab(tmp_path, partitions=8)
    engine = lab.engine("one")
    writer = lab.client.producer({"transactional.id": "other", "transaction.timeout.ms": 60_000})
    writer.init_transactions(1)
    writer.begin_transaction()
    writer.send_offsets_to_transaction([TopicPartition("workflow-resume", number, 0) for number in range(8)], Metadata("found", "", None, -1), 1)
    turn(engine, lambda: len(engine.takeover.assigned) == 8)
    until_ms = lab.broker.time.now + 1_500
    while lab.broker.time.now < until_ms:
        begun_ms = lab.broker.time.now
        engine.takeover.turn()
        assert lab.broker.time.now - begun_ms < 300
        engine._gather()
    writer.abort_transaction(1)
    turn(engine, lambda: len(engine.owned) == 8)


def slow_opening(lab: Lab, name: str) -> None:
    """Make RocksDB's opening and queries about offsets as slow as measured."""
    call = lab.hosts[name].call
    lab.hosts[name].call = lambda what: (call(what), lab.broker.time.advance(lab.broker.time.now + {"database-open": 30, "list_offsets": 5}.get(what, 0)))[0]  # type: ignore[method-assign,func-returns-value]


def test_a_takeover_of_many_partitions_keeps_those_that_run_waiting_for_a_tenth_of_a_second(tmp_path: pathlib.Path) -> None:
    """K5: on a real broker, all of them used to be begun in one turn, which took 3.3 s for forty and 5.7 s for a hundred and twenty."""
    lab = Lab(tmp_path, partitions=40)
    first, second = lab.engine("one"), lab.engine("two")
    turn(first, lambda: len(first.owned) == 40)
    turn(second, lambda: first.turn() or len(second.owned) == 20)
    lab.kill(second, "two")
    while not first.takeover.assigned:
        first._gather()
    slow_opening(lab, "one")
    begun_ms, turns = lab.broker.time.now, []
    while len(first.owned) < 40:
        turn_ms = lab.broker.time.now
        first.takeover.turn()
        turns.append(lab.broker.time.now - turn_ms)
        first._gather()
    assert max(turns) < 150
    assert lab.broker.time.now - begun_ms < 20 * 30 * 1.3, "nothing is asked for each of them alone, and nothing is waited for"


class SlowClosing(SimulatedEnvironment):
    """An environment whose databases close as slowly as RocksDB's were measured to."""

    def database(self, directory: pathlib.Path) -> Any:
        made = super().database(directory)
        close = made.close
        made.close = lambda: (self.host.time.advance(self.host.time.now + 15), close())[1]  # type: ignore[method-assign,func-returns-value]
        return made


def test_giving_many_partitions_away_keeps_neither_those_that_run_nor_their_next_owner_waiting(tmp_path: pathlib.Path) -> None:
    """K5, K7: on a real broker, the copies of sixty partitions used to be closed before the group heard that they are free, 0.9 s later."""
    lab = Lab(tmp_path, partitions=40)
    first = lab.engine("one", SlowClosing)
    turn(first, lambda: len(first.owned) == 40)
    second = lab.engine("two")
    longest = 0.0
    for _ in range(200):
        begun_ms = lab.broker.time.now
        first.takeover.turn()
        first.takeover.wait_s = 0.0
        first._gather()
        longest = max(longest, lab.broker.time.now - begun_ms)
        second.turn()
    assert (len(first.owned), len(second.owned)) == (20, 20)
    assert longest < 150
    assert sum(database.held for database in lab.disks["one"].databases.values()) == 20


def test_a_copy_that_is_new_is_opened_once(lab: Lab) -> None:
    """K8: there is nothing in it to wipe. That used to be half of a first start with many partitions."""
    engine = lab.engine("one")
    lab.hosts["one"].before["database-wipe"] = lambda: pytest.fail("it is empty")
    turn(engine, lambda: engine.owned)


def test_an_answer_without_an_offset_is_asked_for_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """K5, G6: librdkafka answers so for a partition whose leader has just moved. A changelog "ending at -1001" used to be restored by wiping the copy, and its workflows were unknown from then on."""
    engine = lab.engine("one")
    start(lab, "main", "w")
    turn(engine, lambda: engine.owned and engine.owned[0].store.get(b"w"))
    lab.kill(engine, "one")
    asked, left = SimulatedAdmin.list_offsets, [6]

    def led_by_nobody(admin: SimulatedAdmin, places: dict[TopicPartition, Any], **more: Any) -> dict[TopicPartition, Future[Any]]:
        answers = asked(admin, places, **more)
        left[0] -= 1
        for answer in answers.values() if left[0] > 0 else ():
            answer.result().offset = OFFSET_INVALID
        return answers

    monkeypatch.setattr(SimulatedAdmin, "list_offsets", led_by_nobody)
    again = lab.engine("one")
    turn(again, lambda: again.owned)
    assert again.owned[0].store.get(b"w") is not None
    assert left[0] <= 0


def test_a_partition_s_committed_offset_that_could_not_be_told_is_asked_for_again(lab: Lab) -> None:
    """K5: the library reports it beside the others' offsets, with an error in it, instead of raising one."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    start(lab, "main", "w")
    turn(engine, lambda: engine.owned[0].position == 1)
    told, left = engine._consumer.committed, [3]

    def committed(places: list[TopicPartition], **more: Any) -> list[TopicPartition]:
        found = told(places, **more)
        left[0] -= 1
        return [types.SimpleNamespace(topic=place.topic, partition=place.partition, offset=OFFSET_INVALID, error=KafkaError(KafkaError.NOT_COORDINATOR)) for place in found] if left[0] >= 0 else found  # type: ignore[misc]

    engine._consumer.committed = committed  # type: ignore[method-assign]
    while (found := engine.takeover._committed([0])) == {}:
        continue
    assert (found, left[0]) == ({0: 1}, -1)


def test_a_group_that_may_not_be_asked_ends_the_engine(lab: Lab) -> None:
    """K4: what will never be answered is not waited for."""

    def committed(*_: Any, **__: Any) -> Any:
        raise KafkaException(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED, "not this group"))

    engine = lab.engine("one")
    engine._consumer.committed = committed  # type: ignore[method-assign]
    with pytest.raises(TransportError, match="not this group"):
        engine.run(lambda: bool(engine.owned) or lab.broker.time.now > 10_000)


class Described:
    """An AdminClient that answers in turn: whether the group is stable, and which of two partitions have an owner."""

    def __init__(self, *answers: tuple[bool, set[int]]) -> None:
        self.answers = list(answers)

    def describe_consumer_groups(self, names: list[str], request_timeout: float) -> dict[str, Future[Any]]:
        stable, had = self.answers.pop(0)
        member = types.SimpleNamespace(assignment=types.SimpleNamespace(topic_partitions=[TopicPartition("other", 1), *(TopicPartition("in", number) for number in had)]))
        future: Future[Any] = Future()
        future.set_result(types.SimpleNamespace(state=ConsumerGroupState.STABLE if stable else ConsumerGroupState.PREPARING_REBALANCING, members=[member]))
        return dict.fromkeys(names, future)


def test_a_partition_belongs_to_nobody_if_it_did_in_two_looks_in_a_row(lab: Lab) -> None:
    """K7: in a rebalance it may be on its way to an owner, and an engine that leaves the group because of it causes another rebalance."""
    admin = Described((True, {0}), (True, {1}), (False, set()), (True, {1}), (False, set()), (True, {1}), (True, {1}), (True, {0, 1}))
    lab.broker.time.advance(60_000)
    orphans = Orphans(cast(AdminClient, admin), lab.client, "g", {"in": 2})
    assert not orphans.found() and len(admin.answers) == 8
    found = []
    for _ in range(10):
        lab.broker.time.advance(lab.broker.time.now + 2_000)
        found.append(orphans.found() or orphans.found())
    assert found == [False] * 6 + [True] + [False] * 3, "and once all is well nobody looks any more"


def test_an_engine_that_was_evicted_with_nothing_open_is_not_fenced(lab: Lab) -> None:
    """It was slow, comes back, and goes on."""
    first = lab.engine("one")
    turn(first, lambda: first.owned)
    lab.hosts["one"].running = False
    second = lab.engine("two")
    turn(second, lambda: second.owned, 2000)
    lab.hosts["one"].running = True
    lab.kill(second, "two")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1, 2000)
    assert not any("inside a transaction" in line for line in lab.said)


def test_a_partition_that_was_given_back_has_no_owner(lab: Lab) -> None:
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    assert '"engine":"found-one-0"' in lab.written("found-owners")[-1]
    engine.run(lambda: True)
    assert [entry.value for entry in lab.broker.partition(("found-owners", 0)).committed()][-2:] == [None, None]
    engine = lab.engine("two")
    turn(engine, lambda: engine.owned)
    assert engine.owned[0].careful_until == engine.owned[0].position, "nobody died"


@pytest.mark.parametrize("visitors", [0, 1])
def test_a_record_that_kills_every_engine_in_turn_is_refused_whoever_tried_it(lab: Lab, visitors: int) -> None:
    """K19: each engine has its own state directory, but the attempts are in the log. Also if another engine had the partition in between and gave it back before that record."""
    lab.send("workflow-resume", "bad", "new:{}")
    lab.send("workflow-resume", "good", "new:{}")
    deaths = 0
    for number in range(8):
        for visitor in range(visitors):
            engine = lab.engine(f"visitor{visitor}")
            turn(engine, lambda engine=engine: engine.owned, 2000)  # type: ignore[misc]
            engine.run(lambda: True)
        name = f"engine{number}"  # each with a name and a disk of its own
        engine = lab.engine(name)
        turn(engine, lambda engine=engine: engine.owned, 2000)  # type: ignore[misc]
        dies_of(engine, b"bad")
        try:
            turn(engine, lambda engine=engine: engine.owned[0].position == 2)  # type: ignore[misc]
            break
        except Killed:
            deaths += 1
            lab.kill(engine, name)
    assert deaths == 5, "one that was not careful yet, one with others, and three alone"
    assert len(lab.written("found-dead-letter")) == 1
    assert engine.owned[0].store.get(b"good") is not None


def test_a_record_that_kills_every_engine_is_refused_although_more_than_a_batch_was_aborted_before_it(lab: Lab) -> None:
    """K19: care used to be taken for as many offsets as a batch has records. None of these offsets had a record, so the process died of it forever."""
    firing = lab.client.producer({"transactional.id": "firing"})
    firing.init_transactions()
    firing.begin_transaction()
    for number in range(10):
        firing.produce("workflow-resume", value=b"{}", key=b"w%d" % number)
    firing.flush(1)
    firing.abort_transaction()
    for id in ("good", "bad", "better"):
        lab.send("workflow-resume", id, "new:{}")
    for _ in range(8):
        engine = lab.engine("one", batch_records_max=5)
        turn(engine, lambda engine=engine: engine.owned)  # type: ignore[misc]
        dies_of(engine, b"bad")
        try:
            turn(engine, lambda engine=engine: engine.owned[0].store.get(b"better"))  # type: ignore[misc]
            break
        except Killed:
            lab.kill(engine, "one")
    assert len(lab.written("found-dead-letter")) == 1
    assert engine.owned[0].store.get(b"good") is not None


def test_what_cannot_be_read_of_owners_or_tells_of_another_topic_is_passed_over(lab: Lab) -> None:
    """K19: the topic is written to outside of transactions, and outlives the input that it is about."""
    key = b"workflow-resume/0"
    lab.send("workflow-resume", "w", "new:{}")
    lab.broker.append(("found-owners", 0), [(0, key, b"{", []), (0, key + b"/attempts", b'{"topic":"another","offset":0,"count":9,"until":1}', [])], None)
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)
    assert engine.owned[0].careful_until == 0 and lab.written("found-dead-letter") == []


class Silent:
    """A consumer that receives nothing."""

    def __init__(self, environment: SimulatedEnvironment) -> None:
        self._environment = environment

    def assign(self, _partitions: Any) -> None:
        pass

    def poll(self, timeout: float) -> None:
        self._environment.sleep(timeout)

    def close(self) -> None:
        pass


class OwnersAreSilent(SimulatedEnvironment):
    def consumer(self, settings: Any) -> Any:
        return Silent(self) if settings["group.id"].endswith("-owners") else super().consumer(settings)


def test_an_owners_topic_that_cannot_be_read_is_waited_for_once(tmp_path: pathlib.Path) -> None:
    """K19: five seconds, then one second for each partition that comes within a minute."""
    lab = Lab(tmp_path)
    engine = lab.engine("one", OwnersAreSilent)
    begun_ms = lab.broker.time.now
    turn(engine, lambda: engine.owned)
    assert 5_000 < lab.broker.time.now - begun_ms < 6_500
    engine.takeover._on_lost(engine._consumer, [TopicPartition("workflow-resume", 0)])
    engine.owners._complain("still")
    engine.takeover._on_assign(engine._consumer, [TopicPartition("workflow-resume", 0)])
    begun_ms = lab.broker.time.now
    turn(engine, lambda: engine.owned)
    assert lab.broker.time.now - begun_ms < 6_500
    assert sum("without it, a takeover may wait" in line for line in lab.said) <= 2


def test_an_engine_that_ends_in_trouble_leaves_its_name_and_its_successor_takes_care_up_to_the_end(lab: Lab) -> None:
    """K1, K19: its transaction may be open. Records that come later have killed nobody."""
    first = lab.engine("one")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)

    def trouble() -> None:
        raise TransportError("no broker")

    lab.hosts["one"].before["commit"] = trouble
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    with pytest.raises(TransportError):
        first.run(lambda: False)
    assert not Attempts(first.directory).unclean, "it was no record's fault"
    assert '"engine":"found-one-0"' in lab.written("found-owners")[-1]
    second = lab.engine("two")
    turn(second, lambda: second.owned, 2000)
    assert second.owned[0].careful_until == 2
    turn(second, lambda: lab.written("found-out") == ["1"], 2000)


class Away:
    """A producer whose topic has no leader."""

    def __init__(self, environment: SimulatedEnvironment) -> None:
        self._environment = environment

    def produce(self, *_: Any, **__: Any) -> None:
        pass

    def poll(self, _timeout: float) -> int:
        return 0

    def flush(self, timeout: float) -> int:
        self._environment.sleep(timeout)
        return 1


class WithoutOwners(SimulatedEnvironment):
    """An environment where the owners topic cannot be written: it is the only one that is written outside of transactions."""

    def producer(self, settings: Any) -> Any:
        return super().producer(settings) if "transactional.id" in settings else Away(self)


def test_an_engine_that_lost_its_disk_with_its_life_takes_care_too(lab: Lab) -> None:
    """K19: it has the same name as before, and its directory knows nothing of its death, but the owners topic does."""
    first = lab.engine("one")
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    killed_at(lab, first, "one", "commit")
    shutil.rmtree(lab.directory / "one")
    del lab.disks["one"]
    again = lab.engine("one")
    turn(again, lambda: again.owned, 2000)
    assert (again.owned[0].position, again.owned[0].careful_until) == (1, 2)


def test_attempts_at_a_record_of_a_topic_that_was_made_anew_count_nothing(lab: Lab) -> None:
    """K19, K16: the same offset is a different record now."""
    noted = json.dumps({"topic": "the one before", "offset": 0, "count": 3, "until": 1}).encode()
    lab.producer.produce("found-owners", value=noted, key=b"workflow-resume/0/attempts")
    lab.send("workflow-resume", "w", "new:{}")
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)
    assert dict(engine.counts) == {"started": 1}


def test_an_owners_topic_that_does_not_answer_is_waited_for_once(lab: Lab) -> None:
    """K19: each record to be stepped with care used to wait five seconds for it. The count on the disk protects as well."""
    for number in range(300):
        lab.send("workflow-resume", f"id{number}", "new:{}")
    engine = lab.engine("one")
    killed_at(lab, engine, "one", "commit")
    engine = lab.engine("one", WithoutOwners)
    begun_ms = lab.broker.time.now
    turn(engine, lambda: engine.owned and engine.owned[0].position == 300, 2000)
    assert lab.broker.time.now - begun_ms < 2 * SESSION_MS + AIM_MS
    assert sum("found-owners" in line for line in lab.said) == 1


@pytest.mark.parametrize("ended", [False, True], ids=["killed meanwhile", "ended by it"])
def test_what_a_broker_in_trouble_interrupts_is_no_attempt_for_the_next_engine(lab: Lab, ended: bool) -> None:
    """K19: the record was stepped. Then its process went on, or ended because the step could not be committed."""
    append = lab.broker.append
    lab.send("workflow-resume", "w", "new:{}")
    for number in range(5):
        name = f"engine{number}"
        engine = lab.engine(name)
        turn(engine, lambda engine=engine: engine.owned, 2000)  # type: ignore[misc]
        if ended:
            lab.hosts[name].before["commit"] = lost
        else:
            refuse(lab, "found-state-changelog", KafkaError.NOT_ENOUGH_REPLICAS)  # but not what is written to found-owners
        with pytest.raises(TransportError) if ended else contextlib.nullcontext():
            for _ in range(3):
                engine.turn()
        lab.broker.append = append  # type: ignore[method-assign]
        lab.kill(engine, name)
    last = lab.engine("last")
    turn(last, lambda: last.owned and last.owned[0].position == 1, 2000)
    assert lab.written("found-dead-letter") == []


def test_a_commit_that_never_returns_is_no_death_of_its_record(lab: Lab) -> None:
    """K19, K4: the record was stepped well. The process is ended because the client hangs."""
    lab.send("workflow-resume", "w", "new:{}")
    killed_at(lab, lab.engine("one"), "one", "commit")
    for number in range(5):
        engine = lab.engine("one")
        turn(engine, lambda engine=engine: engine.owned, 2000)  # type: ignore[misc]
        assert number or engine.owned[0].careful_until > engine.owned[0].position

        def hang(engine: KafkaRunner = engine) -> None:
            engine.ends_in_a_call()
            raise Killed

        lab.hosts["one"].before["commit"] = hang
        with pytest.raises(Killed):
            for _ in range(50):
                engine.turn()
        lab.kill(engine, "one")
    last = lab.engine("one")
    turn(last, lambda: last.owned and last.owned[0].position == 1, 2000)
    assert lab.written("found-dead-letter") == []


class Moving:
    """A broker whose partitions have no leader yet when an admin client asks."""

    def __init__(self, broker: Broker, refusals: list[int]) -> None:
        self._broker = broker
        self._refusals = refusals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    def partition(self, place: Place) -> Partition:
        if self._refusals:
            raise Refused(self._refusals.pop(), "its leader is another, or none yet")
        return self._broker.partition(place)


class Unsettled(SimulatedEnvironment):
    def __init__(self, broker: Broker, code: int) -> None:
        super().__init__(broker)
        self.refusals = [code] * 3

    def admin(self, settings: Any) -> AdminClient:
        return cast(AdminClient, SimulatedAdmin(cast(Broker, Moving(self.broker, self.refusals)), self.host))


@pytest.mark.parametrize("code", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.FENCED_LEADER_EPOCH])
def test_a_leader_that_is_not_known_yet_is_asked_again(lab: Lab, code: int) -> None:
    """K4: topics that were just created, and brokers that were just restarted, answer so for a moment. An engine used to end."""
    unsettled = Unsettled(lab.broker, code)
    assert CodeTopic(lab.config("any"), unsettled).read(0) == []
    assert unsettled.refusals == []
    lab.send("workflow-resume", "w", "new:{}")
    unsettled = Unsettled(lab.broker, code)
    member = dataclasses.replace(lab.engine("one").member, environment=unsettled, admin=unsettled.admin({}))
    assert member.ends("workflow-resume", [0]) == {0: 1}
    assert unsettled.refusals == []


def test_a_loop_that_does_not_come_back_is_seen() -> None:
    """K4: librdkafka has calls that ignore their own timeouts when a broker dies under them. The process is ended then."""
    stats = Stats()
    assert not stats.is_late(1e9, 300), "it has not begun"
    stats.turned_s = 1_000.0
    assert not stats.is_late(1_299, 300)
    assert stats.is_late(1_301, 300)
    stats.back_by_s = 1_015.0
    assert not stats.is_late(1_014, 300)
    assert stats.is_late(1_016, 300)
