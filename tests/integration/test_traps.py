"""Traps of exactly-once, each made to happen: what an evicted, stalled or replaced engine still tries to write (K1-K5, K14, K16)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition

from kwflow.core import wire
from kwflow.core.wire import Record
from kwflow.errors import FencedError, TransportError
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka.runner import Aborted, KafkaRunner
from tests.integration.lab import Handle, Lab, stop, turn

pytestmark = [pytest.mark.broker, pytest.mark.slow]


def gather(runner: KafkaRunner) -> bool:
    """Whether there was any record in what it owns."""
    runner._gather()
    return any(partition.gathered for partition in runner.owned.values())


def gather_some(runner: KafkaRunner) -> None:
    deadline = time.monotonic() + 60
    while not gather(runner):
        assert time.monotonic() < deadline


def test_a_stalled_engine_whose_partition_moved_commits_nothing_although_it_heartbeats(lab: Lab) -> None:
    """K2: trap 1. It stalls between its last poll and its commit, while its client goes on in the background."""
    id = lab.base["application_id"]
    first = lab.engine("one")
    turn(first, lambda: first.owned)
    lab.send("resume", id, "new:{}")
    turn(first, lambda: first.owned[0].position == 1)
    lab.send("resume", id, '{"ref": "r", "value": "once"}')
    gather_some(first)
    second = lab.engine("two")
    turn(second, lambda: second.owned and second.owned[0].position == 2)
    with pytest.raises(Aborted):
        first._process()
    assert lab.written("trap-out", id) == ["once"]
    stop(second)
    lab.send("resume", id, '{"ref": "end"}')
    turn(first, lambda: lab.written(lab.base["result_topic"], id))
    assert lab.written("trap-out", id) == ["once"], "back again, the first goes on from what the second committed"


def test_an_evicted_scheduler_fires_nothing(lab: Lab) -> None:
    """K14: trap 2. A transaction without offsets would not be refused."""
    id = lab.base["application_id"]
    first = lab.scheduler("one")
    turn(first, lambda: first.owned)
    lab.send("scheduler", f"{id}|due", "60000")
    turn(first, lambda: first.owned[0].position == 1)
    second = lab.scheduler("two")
    turn(second, lambda: second.owned)
    lab.clock.ms += 120_000
    turn(second, lambda: lab.written(lab.base["resume_topic"], id))
    with pytest.raises((Aborted, FencedError)):
        first._fire()
    assert lab.written(lab.base["resume_topic"], id) == ["due"]


def test_a_zombie_with_the_same_identity_is_refused(lab: Lab) -> None:
    """K1, G6."""
    id = lab.base["application_id"]
    first = lab.engine("one", instance_id="pod-0")
    turn(first, lambda: first.owned)
    lab.send("resume", id, "new:{}")
    gather_some(first)
    lab.engine("two", instance_id="pod-0")
    with pytest.raises(FencedError):
        first._process()


def test_one_whose_state_directory_was_copied_is_told_whose_identity_it_has_in_no_line_of_the_clients_own(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    """K1; section "Watching" of OPERATIONS: librdkafka logs fatal errors at its lowest level, which no log_level turns off."""
    first = lab.engine("one")
    turn(first, lambda: first.owned)
    known = first.directory / "instance-id"
    copy = lab.directory / "two" / known.relative_to(lab.directory / "one")
    copy.parent.mkdir(parents=True)
    copy.write_text(known.read_text())
    second = lab.engine("two")
    turn(second, lambda: second.owned)
    with pytest.raises(FencedError, match=f"identity, {known.read_text()}-0: {known} was copied: delete it in the copy"):
        turn(first, lambda: False)
    assert capfd.readouterr().err == ""


def test_a_first_start_on_an_empty_changelog_applies_what_was_waiting(lab: Lab) -> None:
    """K5: trap 5. The position of a reader stays -1001 on an empty log."""
    id = lab.base["application_id"]
    lab.send("resume", id, "new:{}")
    lab.send("resume", id, '{"ref": "r", "value": "early"}')
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 2)
    assert lab.written("trap-out", id) == ["early"]


def test_records_that_come_before_the_restore_wait_for_it(lab: Lab) -> None:
    """K5: trap 5. Stepped on an empty state, they would be ignored as records of unknown ids, and lost."""
    id = lab.base["application_id"]
    first = lab.engine("one")
    lab.send("resume", id, "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    first._consumer.close()
    second = lab.engine("two")
    deadline = time.monotonic() + 60
    while not second.takeover.assigned:  # assigned, but not restored
        assert not gather(second)
        assert time.monotonic() < deadline
    lab.send("resume", id, '{"ref": "r", "value": "waited"}')
    assert not gather(second)
    turn(second, lambda: second.owned and second.owned[0].position == 2)
    assert lab.written("trap-out", id) == ["waited"]


def test_offsets_that_somebody_reset_stop_the_engine_unless_accepted(lab: Lab) -> None:
    """K16."""
    id, topic = lab.base["application_id"], lab.base["resume_topic"]
    first = lab.engine("one")
    lab.send("resume", id, "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    stop(first)
    deadline = time.monotonic() + 60
    while True:  # it is refused as long as the group has a member
        [future] = first.admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(id, [TopicPartition(topic, 0, 0)])]).values()
        try:
            if future.result().topic_partitions[0].error is None:
                break
        except KafkaException:
            assert time.monotonic() < deadline
    second = lab.engine("two")
    with pytest.raises(TransportError, match="--accept-offset-reset"):
        turn(second, lambda: second.owned)
    stop(second)
    third = lab.engine("two", accept_offset_reset=True)
    turn(third, lambda: third.owned and third.owned[0].position == 1)


def test_a_record_that_killed_the_engine_three_times_is_refused(lab: Lab) -> None:
    """K19: each run dies in the same record. Then the record is dead-lettered and the engine goes on."""
    id = lab.base["application_id"]
    lab.send("resume", id, "new:{}")
    lab.send("resume", f"{id}-other", "new:{}")
    for run in range(4):  # the first run takes no care yet
        engine = lab.engine("one")
        turn(engine, lambda: engine.owned)
        if run:
            alone = [Record(lab.base["resume_topic"], 0, 0, 0, id.encode(), b"new:{}")]
            assert engine._attempts.another(0, alone) == (alone, None), "what the loop does before it steps the record that kills it"
        stop(engine)
    last = lab.engine("one")
    turn(last, lambda: last.owned and last.owned[0].position == 2)
    letters = kafka_link.read(lab.config("any"), lab.config("any").dead_letter_topic)
    assert [record.key for record in letters] == [id.encode()]


class Hurried(Handle):
    """A clock on which a whole batch_ms_max has passed each time it is read."""

    def now_ms(self) -> int:
        self.ms += 100
        return self.ms


def test_what_was_gathered_and_not_applied_goes_with_its_partition(lab: Lab) -> None:
    """K2: a gather of slow steps becomes many transactions. The group is served between them, and the next owner applies the rest once."""
    lab.clock = Hurried()
    first = lab.engine("one")
    turn(first, lambda: first.owned)
    for number in range(10):
        lab.send("resume", f"id-{number}", "new:{}")
    turn(first, lambda: first.owned[0].gathered)
    assert first.owned[0].position + len(first.owned[0].gathered) <= 10 and sum(first.stats.commits.counts) == first.counts["started"] > 0, "one transaction a turn"
    second = lab.engine("two")
    turn(second, lambda: second.owned and second.owned[0].position == 10)  # the first has not polled for too long
    stop(second)
    turn(first, lambda: first.owned and first.owned[0].position == 10)
    assert first.counts["started"] + second.counts["started"] == 10 and first.counts["duplicate-start"] == second.counts["duplicate-start"] == 0


def test_a_record_too_large_for_a_dead_letter_is_told_of_without_its_value(lab: Lab) -> None:
    """K10, K11: the dead letter has more headers than the record had."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    lab.producer = Producer({"bootstrap.servers": lab.base["bootstrap_servers"], "log_level": 0, "message.max.bytes": 1_048_588})
    lab.send("resume", "w", "x" * 1_048_400)
    lab.send("resume", "w", "new:{}")
    turn(engine, lambda: engine.counts["started"] == 1)
    assert lab.written(engine.config.dead_letter_topic, "w") == [""]


NAMED_BY_BYTES = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return b"\\xff"

async def send(broker, topic, value):
    async with AIOKafkaProducer(bootstrap_servers=broker) as producer:
        await producer.send_and_wait(topic, value.encode(), key=b"w", headers=[(Name("x"), b"v")], partition=0)

asyncio.run(send(*sys.argv[1:]))
"""


@pytest.mark.skipif(importlib.util.find_spec("aiokafka") is None, reason="NOT TESTED: no client is here that sends such a header (kwflow[faust])")
def test_a_record_with_a_header_whose_name_is_not_utf_8_is_a_dead_letter(lab: Lab) -> None:
    """G3, K19: the library cannot return its headers. It ended every engine in turn, before any of its records was looked at."""
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    for number in range(100):  # a call that has become fast does not show the error that it left behind
        lab.send("resume", f"before-{number}", "new:{}")
    turn(engine, lambda: engine.counts["started"] == 100)
    for value in ("new:{}", "no json"):
        subprocess.run([sys.executable, "-c", NAMED_BY_BYTES, lab.base["bootstrap_servers"], lab.base["resume_topic"], value], env={**os.environ, "AIOKAFKA_NO_EXTENSIONS": "1"}, check=True)
    lab.send("resume", "w", "new:{}")
    turn(engine, lambda: engine.counts["started"] == 101)
    assert lab.written(engine.config.dead_letter_topic, "w") == ["new:{}", "no json"]
    [reason, _] = [wire.header(record, "kwflow-error-reason") for record in kafka_link.read(engine.config, engine.config.dead_letter_topic)]
    assert reason == "bad-header"


def test_large_records_are_not_heaped_up_while_steps_are_slow(lab: Lab) -> None:
    """When the waiting records have the bytes of a batch, each turn reads at most one more."""
    lab.clock = Hurried()
    runner = lab.engine("one", batch_bytes_max=300_000)
    turn(runner, lambda: runner.owned)
    for number in range(12):
        lab.send("resume", f"id-{number}", "new:" + json.dumps("x" * 200_000))
    turn(runner, lambda: len(runner.owned[0].gathered) > 1)
    while len(waiting := list(runner.owned[0].gathered)) > 1:
        runner.turn()
        assert len(runner.owned[0].gathered) <= len(waiting)
    turn(runner, lambda: runner.counts["started"] == 12)


def test_a_batch_is_split_over_transactions_by_its_bytes_and_nothing_is_left_out(lab: Lab) -> None:
    """The states of twenty instances turn out larger than a transaction may be. Each is stepped once."""
    for number in range(20):
        lab.send("resume", f"id-{number}", "new:" + json.dumps("x" * 2000))
    runner = lab.engine("one", batch_bytes_max=9_000)
    turn(runner, lambda: runner.counts["started"] == 20)
    assert sum(runner.stats.commits.counts) >= 20 * 2000 / 9_000
    for number in range(20):
        lab.send("resume", f"id-{number}", '{"ref": "r", "value": "done"}')
    turn(runner, lambda: runner.counts["resumed"] == 20)
    assert [lab.written("trap-out", f"id-{number}") for number in range(20)] == [["done"]] * 20


def test_an_identity_that_the_disk_has_damaged_is_replaced_by_a_new_one(lab: Lab) -> None:
    """K1."""
    (directory := lab.directory / "one" / lab.base["application_id"] / "0" / lab.base["application_id"]).mkdir(parents=True)
    (directory / "instance-id").write_bytes(b"\x85\x00\xff")
    runner = lab.engine("one")
    known = (directory / "instance-id").read_bytes()
    assert re.fullmatch(b"[0-9a-f]{12}", known) and runner.instance == f"{known.decode()}-0"


@pytest.mark.parametrize("setting", ["session.timeout.ms", "transaction.timeout.ms"])
def test_a_time_that_the_broker_does_not_allow_ends_the_engine_for_good_with_where_it_is_set(lab: Lab, setting: str) -> None:
    """With exit code 3, a supervisor would start it again for ever."""
    lab.base["kafka"] |= {setting: 500 if setting == "session.timeout.ms" else 10_000_000}
    with pytest.raises(TransportError, match=re.escape(f'[kafka] "{setting}"')) as ended:
        turn(lab.engine("one"), lambda: False)
    assert not ended.value.retryable


def test_an_engine_that_meets_another_program_in_its_group_says_so_and_may_be_started_again(lab: Lab) -> None:
    group = lab.base["application_id"]
    other = Consumer({"bootstrap.servers": lab.base["bootstrap_servers"], "group.id": group, "log_level": 0})
    other.subscribe([lab.base["resume_topic"]])
    deadline = time.monotonic() + 30
    while not other.assignment():
        assert time.monotonic() < deadline
        other.poll(0.1)
    with pytest.raises(TransportError, match=f"^{group}: .*; a program that is not an engine is in this consumer group") as ended:
        turn(lab.engine("one"), lambda: False)
    other.close()
    assert ended.value.retryable
