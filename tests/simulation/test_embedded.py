"""The embedded engine, killed before and after every one of its writes, one run for each: the logs come out the same, to the last byte (G1, G3, G6).

RocksDB is the real one; what dies is the process around it, so the write-ahead log is there for the next one.
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
from kwflow.core.wire import Record
from kwflow.runners.attempts import Attempts
from kwflow.runners.embedded import Embedded
from kwflow.runners.embedded_state import EmbeddedStore
from kwflow.runners.loop import Overlay, WorkflowProcessor
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
    """A database whose process dies at its n-th write, before or after it is done."""

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
    """Programs of one seed to their ends; the client answers what is asked when the engine has nothing left to do."""

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
        """Do it; if the process dies of it, its next one goes on, and does it again unless it was done."""
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
    """The first kill after which a log is not what it is without one."""
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
    """Outputs first, then state and position."""

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
    """Its second write happens and fails all the same, and its process goes on."""
    engine, writes = Embedded(tmp_path, sync=False, clock=Clock()), itertools.count(1)
    engine.db = Dying(engine.db, lambda: "after" if next(writes) == 2 else "")  # type: ignore[assignment]
    yield engine
    engine.close()


def test_after_a_write_that_failed_and_happened_nothing_is_written_over(held: Embedded) -> None:
    """G3: ends are remembered while the directory is held."""
    held.append("workflow-resume", b"a", b"1")
    with pytest.raises(Crashed):
        held.append("workflow-resume", b"a", b"2")
    assert held.append("workflow-resume", b"a", b"3") == 2
    assert [record.value for record in held.read("workflow-resume")] == [b"1", b"2", b"3"]


def test_after_a_write_that_failed_and_happened_its_timer_fires(held: Embedded) -> None:
    """K18: when something becomes due is remembered, too."""
    timers = TimerProcessor(Config())
    assert held.step([timers]) == 0
    held.append("workflow-scheduler", b"a|{}", b"1000")
    with pytest.raises(Crashed):
        held.step([timers])
    held.clock.ms += 2_000  # type: ignore[attr-defined]
    assert held.step([timers]) == 1
    assert [record.key for record in held.read("workflow-resume")] == [b"a"]


def test_attempts_at_a_record_are_not_counted_for_one_of_another_topic(tmp_path: pathlib.Path) -> None:
    """K19: both have offset 0."""
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
