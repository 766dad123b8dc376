"""The step alone, the embedded engine compared with the same reads and writes without an engine, and how late timers fire."""

from __future__ import annotations

import gc
import pathlib
import time

from rocksdict import WriteBatch, WriteOptions

from benchmarks.common import INSTANCES, STEPS, figure, percentiles, processor, workflow
from kwflow.config import Config
from kwflow.core.wire import Output, Record
from kwflow.durable import set_abandoning
from kwflow.runners import rocks
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.overlay import Overlay, collecting_later
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore

BATCH = 500
SINGLE = 2000


def measure(directory: pathlib.Path) -> None:
    workflow()
    set_abandoning(True, everywhere=True)
    gc.set_threshold(20_000, 20, 20)  # as in an engine
    figure("step core, us of CPU, saved at each step", min(core(BATCH) for _ in range(3)), "part of 60")
    figure("step core, us of CPU, four steps a save", min(core(4 * INSTANCES) for _ in range(3)))
    best = dict.fromkeys(("engine", "bare", "engine alone", "bare alone"), 0.0)
    size = 0
    for turn in range(3):  # in turns, so that both meet the same machine
        rate, size = engine(directory / f"engine{turn}", BATCH, STEPS)
        best["engine"] = max(best["engine"], rate)
        best["bare"] = max(best["bare"], bare(directory / f"bare{turn}", size, BATCH, STEPS))
        best["engine alone"] = max(best["engine alone"], engine(directory / f"alone{turn}", 1, SINGLE)[0])
        best["bare alone"] = max(best["bare alone"], bare(directory / f"barealone{turn}", size, 1, SINGLE))
    figure("snapshot bytes", size)
    figure("embedded steps/s, each on disk before the next", best["engine alone"])
    figure("bare RocksDB loop steps/s, each on disk before the next", best["bare alone"])
    figure("embedded / bare, each on disk before the next", best["engine alone"] / best["bare alone"], ">= 0.5")
    figure("embedded steps/s", best["engine"])
    figure("bare RocksDB loop steps/s", best["bare"])
    figure("embedded / bare", best["engine"] / best["bare"], ">= 0.5")
    lateness(directory / "timers")


def core(per: int) -> float:
    """us of this thread's CPU for one step: decode, run, save.  Nothing is written anywhere."""
    made = processor(Config(), "incarnation")
    store, offset, spent, steps = MemoryStore(), 0, 0.0, 0
    for turn in range(12):
        value = b"new:{}" if turn == 0 else b'{"ref":"r","value":7}'
        records = [Record("workflow-resume", 0, offset + n, 1000, b"i%d" % (n % INSTANCES), value) for n in range(per)]
        offset += per
        overlay = Overlay(store)
        begun = time.thread_time()
        with collecting_later():
            made.decide(overlay, records, 1000)
        if turn > 1:
            spent += time.thread_time() - begun
            steps += per
        store.apply(overlay.changes)
    return 1e6 * spent / steps


def engine(directory: pathlib.Path, batch: int, steps: int) -> tuple[float, int]:
    """(steps per second, bytes of a snapshot) for a backlog of answers."""
    config = Config(batch_records_max=batch)
    held = Embedded(directory, config)
    processors = [processor(config, held.incarnation), TimerProcessor(config)]
    put(held, [(b"i%d" % n, b"new:{}") for n in range(INSTANCES)])
    while held.step(processors):
        pass
    size = len(held.db.get(b"S" + config.changelog_topic.encode() + b"\0i0") or b"")
    put(held, [(b"i%d" % (n % INSTANCES), b'{"ref":"r","value":%d}' % n) for n in range(steps)])
    begun = time.perf_counter()
    while held.step(processors):
        pass
    rate = steps / (time.perf_counter() - begun)
    held.close()
    return rate, size


def put(held: Embedded, records: list[tuple[bytes, bytes]]) -> None:
    batch = WriteBatch(raw_mode=True)
    marks: dict[bytes, int] = {}
    for key, value in records:
        held._put(batch, marks, Output("workflow-resume", key, value))
    held._done(batch, marks, held._write)


def bare(directory: pathlib.Path, size: int, per: int, steps: int) -> float:
    """Steps per second of a loop that reads and writes the same bytes in the same batches with the same sync."""
    directory.mkdir()
    db = rocks.opened(directory, Config().rocksdb_bytes_max)
    sync = WriteOptions()
    sync.sync = True
    state, record = bytes(size), bytes(120)
    for n in range(steps):
        db[b"R%020d" % n] = record
    begun = time.perf_counter()
    for first in range(0, steps, per):
        batch = WriteBatch(raw_mode=True)
        found = 0
        for _ in db.items(from_key=b"R%020d" % first):
            found += 1
            if found == per:
                break
        for n in range(first, first + per):
            db.get(b"S%d" % (n % INSTANCES))
            batch.put(b"L%020d" % n, record)
        for n in range(first, first + min(per, INSTANCES)):
            batch.put(b"S%d" % (n % INSTANCES), state)
        batch.put(b"P", b"%d" % first)
        db.write(batch, sync)
    rate = steps / (time.perf_counter() - begun)
    db.close()
    return rate


def lateness(directory: pathlib.Path) -> None:
    """Measure how late timers fire on an idle engine."""
    config = Config()
    held = Embedded(directory, config)
    for n in range(20):
        held.append(config.scheduler_topic, b"t|%d" % n, b"%d" % (50 + 37 * n))
    held.run([TimerProcessor(config)], lambda: held.end(config.resume_topic) >= 20)
    asked = held.read(config.scheduler_topic)
    late = [(record.timestamp_ms - asked[n].timestamp_ms - (50 + 37 * n)) / 1000 for record in held.read(config.resume_topic) for n in [int(record.value or b"0")]]
    percentiles("timer lateness", late)
    held.close()
