"""The embedded engine is killed before and after each of its writes, in one run for each: the logs come out the same, to the last byte (G1, G3, G6).

RocksDB is real. What dies is the process around it, so the write-ahead log is there for the next process.
"""

import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kwflow import api, durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.core.wire import Output, Record
from kwflow.feeds import Feed
from kwflow.runners.attempts import Attempts
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.groups import Group
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from tests.simulation import workload
from tests.simulation.faults import Crashed
from tests.simulation.world import engine_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TOPICS = ("workflow-resume", "workflow-scheduler", "workflow-result", "workflow-error", "sim-ask", "sim-said", "workflow-engine-dead-letter")
SOURCE = pathlib.Path(__file__).with_name("workflows.py")


class Clock:
    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.ms


class Dying:
    """A database whose process dies at its n-th write, before or after the write is done."""

    def __init__(self, db: Any, count: Callable[[], str]) -> None:
        self._db = db
        self._count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._db[key] = value

    def __getitem__(self, key: Any) -> Any:
        return self._db[key]

    def write(self, *arguments: Any) -> None:
        fate = self._count()
        if fate != "before":
            self._db.write(*arguments)
        if fate:
            raise Crashed


class Run:
    """Run the programs of one seed to their ends. The client answers what is asked whenever the engine has nothing left to do."""

    def __init__(self, directory: pathlib.Path, seed: int, die_at: int = 0, fate: str = "", kind: type[Embedded] = Embedded) -> None:
        self.kind = kind
        self.directory = directory
        self.chance = random.Random(seed)
        self.clock = Clock()
        self.writes = 0
        self.die_at, self.fate = die_at, fate
        self.answered: set[tuple[bytes | None, bytes | None]] = set()
        module = durable.load_source("embedded_sim", SOURCE.read_text(), str(SOURCE))
        self.workflows = Workflows({"main": module.main}, "main")
        self.engine = self._open()

    def _count(self) -> str:
        self.writes += 1
        return self.fate if self.writes == self.die_at else ""

    def _open(self) -> Embedded:
        engine = self.kind(self.directory, sync=False, clock=self.clock)
        engine.incarnation = "store"
        engine.db = Dying(engine.db, self._count)  # type: ignore[assignment]
        config = Config(batch_records_max=3)
        engine.limits = config
        self.processors = [WorkflowProcessor(config, self.workflows, api.declared_topics(), "store"), TimerProcessor(config)]
        return engine

    def again(self, work: Callable[[], Any], done: Callable[[], bool]) -> Any:
        """Do the work. If the process dies of it, its successor goes on, and does the work again unless it was done."""
        try:
            return work()
        except Crashed:
            self.engine.close()
            self.engine = self._open()
            return None if done() else work()

    def append(self, key: bytes, value: bytes) -> None:
        before = self.engine.end("workflow-resume")
        self.again(lambda: self.engine.append("workflow-resume", key, value), lambda: self.engine.end("workflow-resume") > before)

    def play(self) -> None:
        for number in range(4):
            self.append(b"w%d" % number, b"new:" + json.dumps({"program": workload.program(self.chance, calls=False)}).encode())
        for _ in range(60):
            while self.again(lambda: self.engine.step(self.processors, lambda _: None), lambda: False):
                continue
            if not self._answer():
                self.clock.ms += 7_000
        self.engine.close()

    def _answer(self) -> bool:
        asked = [record for record in self.engine.read("sim-ask", 0, 10_000) if (record.key, record.value) not in self.answered]
        for record in asked:
            self.answered.add((record.key, record.value))
            self.append(record.key or b"", json.dumps({"ref": (record.value or b"").decode(), "value": 1}).encode())
        return bool(asked)

    def logs(self) -> dict[str, list[Record]]:
        engine = Embedded(self.directory, sync=False)
        try:
            left = list(EmbeddedStore(engine.db, "workflow-engine-timers-changelog").scan(b"\0due\0"))
            assert left == [], "a timer never fired"
            return {topic: engine.read(topic, 0, 10_000) for topic in TOPICS}
        finally:
            engine.close()


def differs(directory: pathlib.Path, seed: int, kind: type[Embedded] = Embedded) -> str | None:
    """Return the first kill after which a log differs from the log without a kill."""
    whole = Run(directory / "whole", seed, kind=kind)
    whole.play()
    logs = whole.logs()
    assert len(logs["workflow-result"]) + len(logs["workflow-error"]) >= 2, "some wait for a signal that nobody sends"
    for number in range(1, whole.writes + 1):
        for fate in ("before", "after"):
            run = Run(directory / f"{fate}-{number}", seed, number, fate, kind)
            run.play()
            found = run.logs()
            for topic in TOPICS:
                if found[topic] != logs[topic]:
                    return f"killed {fate} write {number} of {whole.writes}: {topic}"
    return None


class CommitsInTwoWrites(Embedded):
    """It writes the outputs first, then state and position."""

    def _commit(self, store: Any, overlay: Overlay, outputs: Any, consumed: tuple[str, int] | None) -> None:
        super()._commit(store, Overlay(store), outputs, None)
        super()._commit(store, overlay, [], consumed)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_write_the_logs_come_out_the_same(tmp_path: pathlib.Path, seed: int) -> None:
    with engine_process():
        assert differs(tmp_path, seed) is None


def test_a_commit_in_two_writes_is_noticed(tmp_path: pathlib.Path) -> None:
    with engine_process():
        assert differs(tmp_path, 0, CommitsInTwoWrites) is not None


@pytest.fixture
def held(tmp_path: pathlib.Path) -> Iterator[Embedded]:
    """An engine whose second write takes place but fails, and whose process goes on."""
    engine, writes = Embedded(tmp_path, sync=False, clock=Clock()), itertools.count(1)
    engine.db = Dying(engine.db, lambda: "after" if next(writes) == 2 else "")  # type: ignore[assignment]
    yield engine
    engine.close()


def test_after_a_write_that_failed_and_happened_nothing_is_written_over(held: Embedded) -> None:
    """G3: the ends of the logs are remembered while the directory is held."""
    held.append("workflow-resume", b"a", b"1")
    with pytest.raises(Crashed):
        held.append("workflow-resume", b"a", b"2")
    assert held.append("workflow-resume", b"a", b"3") == 2
    assert [record.value for record in held.read("workflow-resume")] == [b"1", b"2", b"3"]


def test_after_a_write_that_failed_and_happened_its_timer_fires(held: Embedded) -> None:
    """K18: the time when something becomes due is remembered, too."""
    timers = TimerProcessor(Config())
    assert held.step([timers]) == 0
    held.append("workflow-scheduler", b"a|{}", b"1000")
    with pytest.raises(Crashed):
        held.step([timers])
    held.clock.ms += 2_000  # type: ignore[attr-defined]
    assert held.step([timers]) == 1
    assert [record.key for record in held.read("workflow-resume")] == [b"a"]


def test_attempts_at_a_record_are_not_counted_for_one_of_another_topic(tmp_path: pathlib.Path) -> None:
    """K19: both records have offset 0."""
    attempts = Attempts(tmp_path)
    for _ in range(3):
        attempts = Attempts(tmp_path)
        attempts.another(0, [Record("workflow-resume", 0, 0, 0, b"bad", b"new:{}")])
    config, said = Config(), list[str]()
    engine = Embedded(tmp_path, config, sync=False)
    engine.append("workflow-resume", b"bad", b"new:{}")
    engine.append("workflow-scheduler", b"a|{}", b"100000")
    timers = TimerProcessor(config)
    processors = [WorkflowProcessor(config, Workflows({}), frozenset(), "store"), timers]
    engine.run(processors, lambda: engine.position("workflow-scheduler") == 1, said.append)
    refused = engine.read("workflow-engine-dead-letter")
    assert [record.key for record in refused] == [b"bad"]
    assert timers.waiting(EmbeddedStore(engine.db, config.timers_changelog_topic)) == 1
    engine.close()


PLAIN = """
import kwflow as kw

def main(opts):
    yield kw.suspend("r")
"""


class Ticking(Clock):
    """Time passes each time it is read, so that a batch has one step."""

    def now_ms(self) -> int:
        self.ms += 1
        return self.ms


def made(directory: pathlib.Path, **limits: int) -> tuple[Embedded, WorkflowProcessor, TimerProcessor]:
    module = durable.load_source("embedded_plain", PLAIN, "embedded_plain.py")
    config = Config(**limits)  # type: ignore[arg-type]
    engine = Embedded(directory, config, sync=False, clock=Clock())
    return engine, WorkflowProcessor(config, Workflows({"main": module.main}, "main"), api.declared_topics(), "store"), TimerProcessor(config)


def start(engine: Embedded, count: int) -> None:
    for number in range(count):
        engine.append("workflow-resume", b"w%d" % number, b"new:{}")


def taken(engine: Embedded, processor: WorkflowProcessor) -> list[int]:
    """Return how many records each batch took."""
    found = []
    while done := engine.step([processor], lambda _: None):
        found.append(done)
    return found


@pytest.mark.parametrize(("limits", "batches"), [({"batch_ms_max": 1}, [1, 1, 1]), ({"batch_bytes_max": 1}, [1, 1, 1]), ({"batch_records_max": 2}, [2, 1]), ({}, [3])])
def test_what_a_batch_left_is_the_next_ones(tmp_path: pathlib.Path, limits: dict[str, int], batches: list[int]) -> None:
    """K15: the position moves past what was stepped, and no further."""
    engine, processor, _ = made(tmp_path, **limits)
    engine.clock = Ticking() if "batch_ms_max" in limits else engine.clock
    start(engine, 3)
    with engine_process():
        assert taken(engine, processor) == batches
        assert engine.counts["started"] == 3 and engine.position("workflow-resume") == 3
    engine.close()


def test_large_records_are_not_heaped_up(tmp_path: pathlib.Path) -> None:
    engine, _, _ = made(tmp_path, batch_bytes_max=100)
    for _ in range(3):
        engine.append("workflow-resume", b"w", b"x" * 60)
    assert [len(record.value or b"") for record in engine._waiting("workflow-resume", 0)] == [60, 60]
    engine.close()


def test_a_timer_whose_cancel_lies_behind_a_full_batch_does_not_fire(tmp_path: pathlib.Path) -> None:
    """K18."""
    engine, _, timers = made(tmp_path, batch_records_max=1)
    engine.append("workflow-scheduler", b"w|1", b"1000")
    assert engine.step([timers]) == 1
    engine.append("workflow-scheduler", b"v|1", b"100000")
    engine.append("workflow-scheduler", b"w|1", None)
    engine.clock.ms += 2_000  # type: ignore[attr-defined]
    while engine.step([timers]):
        continue
    assert engine.read("workflow-resume") == []
    engine.close()


def test_what_a_feed_has_read_is_an_output_and_stays_for_others(tmp_path: pathlib.Path) -> None:
    """Decision 0058."""
    engine, _, _ = made(tmp_path, embedded_retention_ms=1_000)
    processor = FeedProcessor(engine.limits, Feed("numbers", lambda number: None))
    engine.append("numbers", None, b"1")
    with engine_process():
        assert engine.step([processor], lambda _: None) == 1
    engine.clock.ms += 1_000  # type: ignore[attr-defined]
    assert engine.trim([processor]) == 0 and len(engine.read("numbers")) == 1
    engine.close()


def test_outputs_are_trimmed_if_they_have_a_retention_but_no_dead_letters_and_nothing_that_a_feed_has_not_read(tmp_path: pathlib.Path) -> None:
    """Otherwise the directory grows for ever. An old record behind a younger one waits for that."""
    engine, _, _ = made(tmp_path, embedded_outputs_retention_ms=1_000, batch_records_max=1)
    processor = FeedProcessor(engine.limits, Feed("numbers", lambda number: None))
    old = engine.clock.now_ms()
    for topic in ("numbers", "numbers", "workflow-result", "workflow-result", engine.limits.dead_letter_topic, engine.limits.code_topic, "workflow-resume"):
        engine.append(topic, b"w", b"1")
    with engine_process():
        assert engine.step([processor], lambda _: None) == 1
    engine.clock.ms += 1_000  # type: ignore[attr-defined]
    engine.append_all([Group((Output("workflow-result", b"w", b"2"), Output("workflow-result", b"w", b"3", timestamp_ms=old)))])
    assert (engine.trim([processor]), engine.trim([processor])) == (3, 0)
    assert [record.offset for record in engine.read("numbers")] == [1]
    assert [record.value for record in engine.read("workflow-result")] == [b"2", b"3"]
    assert [len(engine.read(topic)) for topic in (engine.limits.dead_letter_topic, engine.limits.code_topic, "workflow-resume")] == [1, 1, 1]
    engine.close()
    engine, _, _ = made(tmp_path, embedded_outputs_retention_ms=1_000)
    engine.clock.ms += 2_000  # type: ignore[attr-defined]
    assert (engine.trim([processor]), engine.read("workflow-result"), engine.end("workflow-result")) == (2, [], 4)
    engine.close()


def test_records_that_nobody_has_applied_are_not_trimmed_however_old_and_applied_ones_once(tmp_path: pathlib.Path) -> None:
    """G1."""
    engine, processor, timers = made(tmp_path, embedded_retention_ms=1_000, batch_records_max=2)
    start(engine, 4)
    with engine_process():
        assert engine.step([processor], lambda _: None) == 2
    assert engine.trim([processor, timers]) == 0, "not old enough"
    engine.clock.ms += 1_000  # type: ignore[attr-defined]
    assert engine.trim([processor, timers]) == 2
    assert engine.trim([processor, timers]) == 0
    assert [record.offset for record in engine.read("workflow-resume")] == [2, 3]
    with engine_process():
        assert engine.step([processor], lambda _: None) == 2
    assert engine.trim([processor, timers]) == 2 and engine.read("workflow-resume") == []
    assert engine.trim([processor, timers]) == 0
    engine.close()
    engine = Embedded(tmp_path, engine.limits, sync=False, clock=engine.clock)
    start(engine, 1)
    assert engine.trim([processor, timers]) == 0 and [record.offset for record in engine.read("workflow-resume")] == [4]
    engine.close()


def test_a_reply_to_a_partition_that_an_embedded_topic_does_not_have_is_counted_and_left_out(tmp_path: pathlib.Path) -> None:
    """M1."""
    engine, processor, _ = made(tmp_path)
    start(engine, 1)
    for number in range(2):
        headers = (("kwflow-op", b"query"), ("kwflow-request", b"q"), ("kwflow-reply-to", b"%d/me" % number))
        engine.append("workflow-resume", b"w0", b"null", headers)
    with engine_process():
        taken(engine, processor)
    assert len(engine.read(engine.limits.reply_topic)) == 1 and engine.counts["reply-gone"] == 1
    engine.close()


def test_compaction_keeps_the_newest_of_each_key_that_has_a_value(tmp_path: pathlib.Path) -> None:
    engine, _, _ = made(tmp_path)
    for key, value in ((b"a", b"1"), (b"b", b"1"), (b"a", b"2"), (b"b", None)):
        engine.append("t", key, value)
    assert engine.compact("t") == 3
    assert [(record.key, record.value) for record in engine.read("t")] == [(b"a", b"2")]
    engine.close()


def test_who_follows_an_engine_is_not_kept_waiting_for_what_was_written_already(tmp_path: pathlib.Path) -> None:
    engine, _, _ = made(tmp_path)
    seen = engine.wait_written(-1, 60)
    engine.append("t", b"a", b"1")
    assert engine.wait_written(seen, 60) == seen + 1
    engine.wake()
    engine.run([], iter([False, True]).__next__)
    assert not Attempts(tmp_path).unclean
    engine.close()
