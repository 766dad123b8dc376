"""What must not grow: a step's cost with the steps before it, with the timers that wait, with the ones that have fired."""

from __future__ import annotations

import os
import pathlib
import time

from rocksdict import WriteBatch

from benchmarks.common import INSTANCES, figure, processor, workflow
from benchmarks.embedded import put
from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.wire import Record
from kwflow.durable import set_abandoning
from kwflow.runners.embedded import Embedded
from kwflow.runners.embedded_state import EmbeddedStore
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore

HISTORY = 100_000
TIMERS = int(os.environ.get("KWFLOW_BENCH_TIMERS", "1000000"))
FIRED = 20_000
STEPS = 10_000
TIMERS_CHANGELOG = Config().timers_changelog_topic


def measure(directory: pathlib.Path) -> None:
    workflow()
    set_abandoning(True, everywhere=True)
    early, late = history()
    figure(f"a step after {HISTORY:,} of one workflow / after 100", late / early, "<= 1.10")
    waiting(directory)


def history() -> tuple[float, float]:
    """us of CPU for a step of one workflow, saved each ten steps: early, and much later."""
    made, store, offset = processor(Config(), "incarnation"), MemoryStore(), 0

    def batch(count: int, value: bytes = b'{"ref":"r","value":7}') -> float:
        nonlocal offset
        overlay = Overlay(store)
        records = [Record("workflow-resume", 0, offset + n, 1000, b"one", value) for n in range(count)]
        offset += count
        begun = time.thread_time()
        made.decide(overlay, records, 1000)
        spent = time.thread_time() - begun
        store.apply(overlay.changes)
        return spent

    def cost() -> float:
        return min(sum(batch(10) for _ in range(20)) for _ in range(10)) / 200 * 1e6

    batch(1, b"new:{}")
    batch(99)
    early = cost()
    while offset < HISTORY:
        batch(1000)
    return early, cost()


def waiting(directory: pathlib.Path) -> None:
    """The embedded engine's steps with no timer and with a million, and with many that have fired; us of this thread's CPU each."""
    config = Config()
    held = Embedded(directory / "timers", config, sync=False)
    clock = Hand()
    held.clock = clock
    processors = [processor(config, held.incarnation), TimerProcessor(config)]
    put(held, [(b"i%d" % n, b"new:{}") for n in range(INSTANCES)])
    drain(held, processors)
    without = steps(held, processors)
    begun = time.perf_counter()
    fill(held, config, clock.now_ms())
    figure("timers put into the table, a second", TIMERS / (time.perf_counter() - begun))
    figure(f"a step with {TIMERS:,} timers waiting / with none", steps(held, processors) / without, "<= 1.10")
    clock.ms += FIRED
    begun = time.thread_time()
    fired = 0
    while fired < FIRED and (made := held._fire(processors[1], print)):
        fired += made
    figure("a timer that fires, us of CPU", 1e6 * (time.thread_time() - begun) / fired)
    drain(held, processors)
    figure(f"a step after {fired:,} of them have fired / with none", steps(held, processors) / without, "<= 1.10")
    held.close()


class Hand:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.ms


def fill(held: Embedded, config: Config, now_ms: int) -> None:
    """Entries as setting them would leave behind; one due each ms from a second on."""
    prefix = b"S" + config.timers_changelog_topic.encode() + b"\0"
    for first in range(0, TIMERS, 10_000):
        batch = WriteBatch(raw_mode=True)
        for n in range(first, min(TIMERS, first + 10_000)):
            record = Record(config.scheduler_topic, 0, n, now_ms, b"nobody%d|{}" % n, b"%d" % (n + 1))
            for key, value in timers.cancel_or_set(record, None).items():
                batch.put(prefix + key, value or b"")
        if first == 0:
            batch.put(prefix + timers.COUNT, b"%d %s" % (TIMERS, timers.cancel_or_set(Record(config.scheduler_topic, 0, 0, now_ms, b"nobody0|{}", b"1"), None)[b"nobody0|{}"]))
        held.db.write(batch)


def drain(held: Embedded, processors: list[object]) -> None:
    while held.step(processors, lambda _: None):  # type: ignore[arg-type] # both are Processors
        pass


def steps(held: Embedded, processors: list[object]) -> float:
    """us of CPU for a step, in batches of a hundred, each with a look at the timers."""
    best = float("inf")
    for _ in range(3):
        begun = time.thread_time()
        for first in range(0, STEPS // 3, 100):
            put(held, [(b"i%d" % (n % INSTANCES), b'{"ref":"r","value":1}') for n in range(first, first + 100)])
            held.step(processors, lambda _: None)  # type: ignore[arg-type]
            processors[1].next_due_ms(EmbeddedStore(held.db, TIMERS_CHANGELOG))  # type: ignore[attr-defined]
        best = min(best, 1e6 * (time.thread_time() - begun) / (STEPS // 3))
    return best
