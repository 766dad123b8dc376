"""A batch saves the state at its end. How records are cut into batches may decide whether a state has to be savable, and nothing else (K15, decision 0044)."""

import itertools
import random

import pytest

from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.values import json_dumps
from kwflow.core.wire import Record
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore

WAITS = 3
SOURCE = f"""
import threading
import kwflow as kw
kw.declare_topics("out")

def main(options):
    unsavable, failing = options
    for number in range({WAITS}):
        if number == failing:
            raise MemoryError
        held = threading.Lock() if number in unsavable else None
        kw.output(str(number), "out")
        yield kw.suspend(f"r{{number}}")
    return "ended"
"""
RECORDS = WAITS + 1
CUTS = [cut for number in range(RECORDS) for cut in itertools.combinations(range(1, RECORDS), number)]


class Engine:
    """A processor over a store in memory, and what it has written."""

    def __init__(self, cached: int) -> None:
        module = durable.load_source("batches", SOURCE, "batches.py")
        self.processor = WorkflowProcessor(Config(instances_cached_max=cached), Workflows({"main": module.main}, "main"), frozenset({"out"}))
        self.store = MemoryStore()
        self.written: list[str] = []
        self.events: list[str] = []  # of the runs, as they are counted
        self.offset = 0

    def batch(self, values: list[bytes], headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
        overlay = Overlay(self.store)
        records = [Record("workflow-resume", 0, self.offset + number, 1, b"w", value, headers) for number, value in enumerate(values)]
        self.offset += len(values)
        for made in self.processor.decide(overlay, records, 1):
            self.written += [(output.value or b"").decode() for output in made.outputs if output.topic in ("out", "workflow-result")]
            self.events += [run.event for run in made.runs]
        self.store.apply(overlay.changes)

    @property
    def parked_at(self) -> int | None:
        stored = self.store.get(b"w")
        header = snapshot.read_header(stored) if stored is not None else {}
        return header["parked"]["offset"] if "parked" in header else None


def values(unsavable: tuple[int, ...], failing: int | None) -> list[bytes]:
    return [b"new:" + json_dumps([unsavable, failing]), *(b'{"ref":"r%d"}' % number for number in range(WAITS))]


def at_fault(unsavable: tuple[int, ...], failing: int | None, cut: tuple[int, ...]) -> int | None:
    """The record that parks it, in the first batch in which a step fails or the last state cannot be saved: the first record whose state cannot be saved, or whose step fails."""
    for begin, end in itertools.pairwise((0, *cut, RECORDS)):
        if failing is not None and failing < end:
            return min(number for number in (*unsavable, failing) if begin <= number <= failing)
        if end - 1 in unsavable:
            return min(number for number in unsavable if number >= begin)
    return None


@pytest.mark.parametrize("cached", [0, 10])
@pytest.mark.parametrize("failing", [None, 2])
@pytest.mark.parametrize("unsavable", [kinds for number in range(WAITS + 1) for kinds in itertools.combinations(range(WAITS), number)], ids=str)
def test_a_state_between_two_records_of_a_batch_need_not_be_savable_and_whatever_is_written_is_what_one_run_writes(unsavable: tuple[int, ...], failing: int | None, cached: int) -> None:
    """With every way to cut the records into batches, what is written is a prefix of what they would write if all could be saved,
    up to the record at fault. After a retry it is all of it, if no step fails. A run is counted as started, parked and ended as often as it was.
    """
    everything = [*map(str, range(WAITS)), '"ended"']
    for cut in CUTS:
        engine = Engine(cached)
        for begin, end in itertools.pairwise((0, *cut, RECORDS)):
            engine.batch(values(unsavable, failing)[begin:end])
        fault = at_fault(unsavable, failing, cut)
        assert engine.parked_at == fault, cut
        assert engine.written == everything[:fault], cut
        assert engine.events == (["started"] if fault != 0 else []) + (["parked"] if fault is not None else ["result"]), cut
        if fault is not None:
            engine.batch([b"null"], (("kwflow-op", b"retry"),))  # what was held becomes one batch, which ends it, or fails as before
            assert (engine.parked_at, engine.written) == ((None, everything) if failing is None else (fault, everything[:fault])), cut
            again = ["parked"] if failing is not None else ["result"] if fault else ["started", "result"]
            assert engine.events == [*(["started"] if fault else []), "parked", *again], cut


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_finds_what_the_store_will_hold_after_it(seed: int) -> None:
    """K3: from any key on, with any prefix."""
    chance = random.Random(seed)
    keys = [bytes(chance.choices(b"ab", k=chance.randrange(1, 5))) for _ in range(8)]
    store = MemoryStore()
    store.apply({key: b"old" for key in chance.sample(keys, 4)})
    overlay = Overlay(store)
    for key in chance.sample(keys, 4):
        overlay.put(key, chance.choice([None, b"new"]))
    after = MemoryStore()
    after.apply({**store.entries, **overlay.changes})
    assert [overlay.get(key) for key in keys] == [after.get(key) for key in keys]
    for prefix, start in itertools.product((b"", b"a", b"ab"), (b"", *keys)):
        assert list(overlay.scan(prefix, start)) == list(after.scan(prefix, start))
