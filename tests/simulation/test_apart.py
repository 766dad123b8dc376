"""Engines of one application that have different settings, and machines whose clocks differ from the broker's."""

import functools
import pathlib
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.errors import TransportError
from kwflow.runners.budget import Budget
from kwflow.runners.kafka.results import Results
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor
from kwflow.testing.kafka import Host
from kwflow.testing.kafka.time import VirtualTime
from tests.simulation.test_found import Lab, turn
from tests.simulation.test_loop import refuse, start
from tests.simulation.test_reading import Service

ONE, TWO = "1" * 32, "2" * 32
HOUR_MS = 3_600_000


class Apart(Lab):
    """Its engines may have settings and a default workflow of their own."""

    def config(self, name: str, **settings: Any) -> Config:
        return Config(application_id="found", state_dir=self.directory / name, instance_id=name, **settings)

    def other(self, name: str, default: str = "main", **settings: Any) -> KafkaRunner:
        config = self.config(name, **settings)
        workflows = Workflows({function: getattr(self.module, function) for function in ("main", "late")}, default)
        return self._made(name, config, "found", lambda incarnation: WorkflowProcessor(config, workflows, frozenset(), incarnation))

    def differences(self) -> list[str]:
        return [line for line in self.said if "all processes of an application" in line or "snapshot" in line or "names no workflow" in line]


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Apart:
    return Apart(tmp_path, partitions=2)


def shared(lab: Apart, first: KafkaRunner, second: KafkaRunner) -> None:
    """Each of them gets one of the partitions."""
    for _ in range(400):
        if len(first.owned) == len(second.owned) == 1:
            return
        first.turn()
        second.turn()
    raise AssertionError(lab.said)


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        ({}, {}, None),
        ({}, {"reply_topic": "found-out"}, "found-one-0 has reply_topic 'workflow-reply', and this process 'found-out'"),
        ({"history_topic": "found-out"}, {}, "found-one-0 has history_topic 'found-out', and this process ''"),
        ({}, {"result_topic": ""}, "found-one-0 has result_topic 'workflow-result', and this process ''"),
        ({}, {"default": "late"}, "a start that names no workflow runs main in found-one-0, and late in this engine"),
        ({"snapshot_keys": [ONE]}, {"snapshot_keys": [TWO, ONE]}, None),
        ({"snapshot_keys": [TWO, ONE]}, {"snapshot_keys": [ONE]}, "which is not in snapshot_keys here"),
        ({"snapshot_keys": [ONE]}, {}, "which is not in snapshot_keys here"),
        ({}, {"snapshot_keys": [ONE]}, "found-one-0 does not sign snapshots"),
        ({}, {"snapshot_keys": [ONE], "snapshot_unsigned": "accept"}, None),
    ],
)  # fmt: skip
def test_an_engine_says_what_differs_from_the_settings_of_another(lab: Apart, mine: dict[str, Any], theirs: dict[str, Any], told: str | None) -> None:
    """Otherwise nobody knows why a start runs something else today, or an answer does not arrive. It is said once, by whoever comes later."""
    first = lab.other("one", **mine)
    turn(first, lambda: len(first.owned) == 2)
    second = lab.other("two", **theirs)
    shared(lab, first, second)
    said = [line for line in lab.differences() if line.startswith("found: ")]
    assert len(said) == (0 if told is None else 1) and all(told in line for line in said if told), said


def test_a_scheduler_that_reads_another_topic_than_engines_write_to_says_so(lab: Apart) -> None:
    """Timers would be written where nobody reads them."""
    engine = lab.other("one")
    turn(engine, lambda: len(engine.owned) == 2)
    config = lab.config("two", scheduler_topic="found-out")
    scheduler = lab._made("two", config, "found-scheduler", lambda _: TimerProcessor(config))
    turn(scheduler, lambda: scheduler.owned)
    assert lab.differences() == ["found-scheduler: found-one-0 has scheduler_topic 'workflow-scheduler', and this process 'found-out': all processes of an application must have the same one"]


def test_an_engine_that_reads_another_topic_than_its_group_ends_before_it_writes_anything(lab: Apart) -> None:
    """K16: both would write to the same changelog. Nothing is there yet that could tell that its state belongs to another topic."""
    first = lab.other("one")
    turn(first, lambda: len(first.owned) == 2)
    second = lab.other("two", resume_topic="found-out")
    with pytest.raises(TransportError, match=r"found-one-0 is in this group and reads workflow-resume, while resume_topic is found-out here") as ended:
        shared(lab, first, second)
    assert not ended.value.retryable and not second.owned
    start(lab, "main", "w")
    turn(first, lambda: first.counts["started"])


def test_two_engines_that_begin_together_on_different_topics_end(lab: Apart) -> None:
    """K16: neither sees an entry of the other in time."""
    first, second = lab.other("one"), lab.other("two", resume_topic="found-out")
    for each in (first, second):
        each.owners.read = functools.partial(setattr, each.owners, "read", each.owners.read)  # type: ignore[method-assign] # the first time, nothing is there yet
    with pytest.raises(TransportError, match=r"is in this group and reads (workflow-resume|found-out)"):
        for _ in range(400):
            first.turn()
            second.turn()


def test_a_topic_that_an_engine_has_left_does_not_keep_another_one_from_its_own(lab: Apart) -> None:
    """The entry of an engine that was killed says nothing of who is in the group."""
    first = lab.other("one", resume_topic="found-out")
    turn(first, lambda: first.owned)
    lab.kill(first, "one")
    lab.broker.time.advance(lab.broker.time.now + 10_000)
    second = lab.other("two")
    turn(second, lambda: len(second.owned) == 2, 400)


# -- clocks ----------------------------------------------------------------------------------------------------------
def test_an_engine_whose_clock_is_too_far_ahead_blames_no_record_and_ends_to_be_started_again(lab: Apart) -> None:
    """K11: states have this machine's time, which the broker does not take. It used to end for good, with a remedy for something else."""
    engine = lab.other("one")
    turn(engine, lambda: len(engine.owned) == 2)
    lab.hosts["one"].ahead_ms = 2 * HOUR_MS
    start(lab, "main", "w")
    with pytest.raises(TransportError, match="found-state-changelog: a timestamp is more than an hour ahead; .* set the clock") as ended:
        turn(engine, lambda: False)
    assert ended.value.retryable and lab.written("found-dead-letter") == []
    lab.kill(engine, "one")
    again = lab.other("one")
    turn(again, lambda: again.counts["started"] == 1)


def test_a_scheduler_whose_clock_is_too_far_ahead_ends_to_be_started_again_and_its_timers_stay(lab: Apart) -> None:
    """K11."""
    engine, scheduler = lab.other("one"), lab.scheduler("two")
    start(lab, "late", "w")
    turn(engine, lambda: engine.counts["started"])
    turn(scheduler, lambda: scheduler.counts["timer"])
    lab.hosts["two"].ahead_ms = 2 * HOUR_MS
    with pytest.raises(TransportError, match="set the clock") as ended:
        turn(scheduler, lambda: False)
    assert ended.value.retryable
    lab.kill(scheduler, "two")
    again = lab.scheduler("two")
    turn(again, lambda: again.counts["fired"] == 1)


def test_a_result_whose_time_is_refused_waits_for_the_clock(lab: Apart) -> None:
    """M6.3: it was written again as fast as it could be, without a word; or, as one of several, the activity failed although it had not."""
    told, said = list[str | None](), list[str]()
    environment = Service(lab)
    results = Results(lab.config("three"), "workflow-resume", environment, on_log=said.append)
    refuse(lab, "workflow-resume", KafkaError.INVALID_RECORD, times=1)
    results.deliver(0, b"k", b"1", (), told.append)
    [producer] = environment.producers
    producer.poll(0)
    refuse(lab, "workflow-resume", KafkaError.INVALID_TIMESTAMP, times=3)
    begun = lab.broker.time.now
    for _ in range(5):
        producer.poll(0)
    assert told == [None] and lab.written("workflow-resume") == ["1"] and lab.broker.time.now - begun >= 3_000
    assert len(said) == 1 and "this machine's clock is wrong: workflow-resume" in said[0]


def test_a_batch_ends_when_the_clock_is_set_back() -> None:
    """`batch_ms_max`: it could otherwise go on for as long as the clock was set back."""
    host = Host(VirtualTime())
    budget = Budget(1_000, 100, host)
    assert not budget.spent()
    host.ahead_ms = -1
    assert budget.spent()


def test_a_timer_fires_once_by_the_clock_of_its_scheduler_which_may_be_set_back(lab: Apart) -> None:
    """One that was set before fires when that clock has come to its time again; one that is set later fires at its time."""
    engine, scheduler = lab.other("one"), lab.scheduler("two")
    start(lab, "late", "before")
    turn(engine, lambda: engine.counts["started"] == 1)
    turn(scheduler, lambda: scheduler.counts["timer"] == 1)
    lab.hosts["one"].ahead_ms = lab.hosts["two"].ahead_ms = -HOUR_MS
    start(lab, "late", "after")
    turn(engine, lambda: engine.counts["started"] == 2)
    turn(scheduler, lambda: scheduler.counts["fired"] == 1)
    lab.hosts["two"].ahead_ms = 0
    turn(scheduler, lambda: scheduler.counts["fired"] == 2)
    turn(engine, lambda: engine.counts["resumed"] == 2)
    assert len(lab.written("workflow-error")) == 2 and engine.counts["unknown-ref"] == 0
