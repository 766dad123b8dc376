"""What must not grow: the cost of a step with the number of earlier steps, of waiting timers, or of timers that have fired."""

from __future__ import annotations

import pathlib
import time

from rocksdict import WriteBatch

from benchmarks.common import INSTANCES, figure, processor, share, workflow
from benchmarks.embedded import put
from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.wire import Record
from kwflow.durable import set_abandoning
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore

HISTORY = share(100_000)
TIMERS = share(1_000_000)
FIRED = share(20_000)
STEPS = share(2_000)
TURNS = 10
TIMERS_CHANGELOG = Config().timers_changelog_topic


def measure(directory: pathlib.Path) -> None:
    workflow()
    set_abandoning(True, everywhere=True)
    figure(f"a step after {HISTORY:,} of one workflow / after 100", ratio(Lifetime(HISTORY), Lifetime(100)), "<= 1.10")
    waiting(directory)


class Lifetime:
    """One workflow that has made this many steps."""

    def __init__(self, steps: int) -> None:
        self.processor, self.store, self.offset = processor(Config(), "incarnation"), MemoryStore(), 0
        self.batch(1, b"new:{}")
        while self.offset < steps:
            self.batch(min(1000, steps - self.offset))

    def batch(self, count: int, value: bytes = b'{"ref":"r","value":7}') -> float:
        """Make `count` steps, saved once; return the seconds of CPU."""
        overlay = Overlay(self.store)
        records = [Record("workflow-resume", 0, self.offset + n, 1000, b"one", value) for n in range(count)]
        self.offset += count
        begun = time.thread_time()
        self.processor.decide(overlay, records, 1000)
        spent = time.thread_time() - begun
        self.store.apply(overlay.changes)
        return spent

    def cost(self) -> float:
        """us of CPU per step, with a save every ten steps."""
        return sum(self.batch(10) for _ in range(20)) / 200 * 1e6


def waiting(directory: pathlib.Path) -> None:
    """Compare the embedded engine's steps without timers, with a million, and after many have fired."""
    plain, crowded = (Bench(directory / name) for name in ("plain", "crowded"))
    begun = time.perf_counter()
    fill(crowded.held, crowded.config, crowded.clock.now_ms())
    figure("timers put into the table, a second", TIMERS / (time.perf_counter() - begun))
    figure(f"a step with {TIMERS:,} timers waiting / with none", ratio(crowded, plain), "<= 1.10")
    crowded.clock.ms += FIRED
    begun = time.thread_time()
    fired = 0
    while fired < FIRED and (made := crowded.held._fire(crowded.processors[1], print)):
        fired += made
    figure("a timer that fires, us of CPU", 1e6 * (time.thread_time() - begun) / fired)
    crowded.drain()
    figure(f"a step after {fired:,} of them have fired / with none", ratio(crowded, plain), "<= 1.10")
    for bench in (plain, crowded):
        bench.held.close()


def ratio(one: Lifetime | Bench, other: Lifetime | Bench) -> float:
    """The ratio of the CPU of their steps: the best of each, measured in turns, so that both meet the same machine."""
    costs = [(one.cost(), other.cost()) for _ in range(TURNS)]
    return min(cost for cost, _ in costs) / min(cost for _, cost in costs)


class Bench:
    """An embedded engine with waiting instances, under a clock that stands still."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.config, self.clock = Config(), Hand()
        self.held = Embedded(directory, self.config, sync=False)
        self.held.clock = self.clock
        self.processors = [processor(self.config, self.held.incarnation), TimerProcessor(self.config)]
        put(self.held, [(b"i%d" % n, b"new:{}") for n in range(INSTANCES)])
        self.drain()

    def drain(self) -> None:
        while self.held.step(self.processors, lambda _: None):
            pass

    def cost(self) -> float:
        """us of CPU per step, in batches of a hundred, each with a look at the timers."""
        begun = time.thread_time()
        for first in range(0, STEPS, 100):
            put(self.held, [(b"i%d" % (n % INSTANCES), b'{"ref":"r","value":1}') for n in range(first, first + 100)])
            self.held.step(self.processors, lambda _: None)
            self.processors[1].next_due_ms(EmbeddedStore(self.held.db, TIMERS_CHANGELOG))
        return 1e6 * (time.thread_time() - begun) / STEPS


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.ms


def fill(held: Embedded, config: Config, now_ms: int) -> None:
    """Write the entries of a million timers directly, as if they had been set; one is due each ms."""
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
    held._due.clear()  # the engine remembers when something is due until it changes a table itself
