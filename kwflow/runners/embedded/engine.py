"""The engine without a server: log, state, timers and positions are in one RocksDB directory, and a transaction is one WriteBatch.

Records, the rules for offsets, and the processors are the same as on Kafka; every topic has one partition.  One process holds
the directory; others reach it through `submit` (runners/embedded/socket.py), or read beside it.  If the process is killed, at
any moment, the next one continues from the last committed batch.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
from rocksdict import Rdict, WriteBatch, WriteOptions

from kwflow.config import Config
from kwflow.core.wire import Headers, Output, Record
from kwflow.durable import set_abandoning
from kwflow.errors import TransportError, UsageError
from kwflow.ports import Clock, Decision, Deliver, Processor, Worker
from kwflow.runners import rocks
from kwflow.runners.attempts import Attempts
from kwflow.runners.budget import Budget, bytes_of
from kwflow.runners.clock import SystemClock
from kwflow.runners.embedded.state import LOG, NEXT, POSITION, STORE_ID, EmbeddedStore, check_imported, records_of
from kwflow.runners.groups import Group
from kwflow.runners.instances import Instances
from kwflow.runners.logs import lines_of
from kwflow.runners.overlay import Overlay, collecting_later
from kwflow.runners.private import private
from kwflow.runners.stats import Seen, Stats
from kwflow.runners.timers import TimerProcessor
from kwflow.runners.tracing import end_all

__all__ = ["Embedded"]

_IDLE_S = 0.5  # how long an idle engine sleeps, unless an append or a timer wakes it
_FIRED_MAX = 1000
_TRIM_S = 5
_HELD_S = 1.0
_REPLY_MS = 3_600_000
_TRIMMED_MAX = 10_000  # outputs of a topic that are looked at in one turn


class Embedded:
    """An engine that holds one directory.  Raises UsageError; TransportError, which names the holder, if another process has the directory."""

    def __init__(self, directory: Path, config: Config | None = None, sync: bool = True, clock: Clock | None = None, imports: bool = False) -> None:
        self.limits = config or Config()
        if self.limits.cipher_keys:
            raise UsageError(f"encryption_keys are for data on a broker, but {directory} is on a local disk: encrypt that disk, and do not set them here")
        with rocks.failing(directory):
            self.directory = private(directory)
        self.clock = clock or SystemClock()
        self.stats = Stats()
        self.counts = self.stats.counts
        self.watched_processors: Sequence[Processor] = ()
        self.woken = threading.Condition()
        self._appended = False
        self._written = threading.Condition()
        self._writes = 0
        self._marks: dict[bytes, int] = {}  # ends and positions as in the database, to which nobody else writes while we hold it
        self._due: dict[str, int | None] = {}  # changelog -> when something becomes due; looked up again once a commit has changed the tables
        self._first: dict[str, int] = {}  # topic -> the offset of its first record that was not trimmed
        self._trim_next = 0.0
        self._workers: dict[str, tuple[Worker, int]] = {}  # input topic -> (the Worker for what commits dispatch, the position from which on it begins)
        self._attempts: Attempts | None = None
        self._careful: dict[str, int] = {}  # K19: records before this offset are taken a few at a time
        self._lock = threading.RLock()
        holder = directory / "engine.pid"
        try:
            self.db = self._open(time.monotonic() + _HELD_S)
        except Exception as error:
            pid = holder.read_text().strip() if holder.exists() else "unknown"
            why = f"is held by another process (pid {pid})" if "lock" in str(error).lower() else "cannot be opened"
            raise TransportError(f"{directory} {why}: {error}", retryable=False) from None
        if not imports:
            check_imported(self.db, directory)
        self.place = rocks.Place(directory)
        holder.write_text(str(os.getpid()))
        self._write = WriteOptions()
        self._write.sync = sync
        if self.db.get(STORE_ID) is None:
            self.db[STORE_ID] = uuid.uuid4().hex.encode()
        self.incarnation = cast(bytes, self.db[STORE_ID]).decode()

    def _open(self, give_up: float) -> Rdict:
        """Open the database, with retries: others hold it for a moment when they append a record while no engine runs."""
        while True:
            try:
                return rocks.opened(self.directory, self.limits.rocksdb_bytes_max)
            except Exception:
                if time.monotonic() > give_up:
                    raise
            time.sleep(0.02)

    def close(self) -> None:
        with rocks.failing(self.directory), self._lock:
            if not self.place.is_left():
                (self.directory / "engine.pid").unlink(missing_ok=True)
            self.place.close(self.db)

    def _check_place(self) -> None:
        if self.place.is_left():
            raise TransportError(f"{self.directory} was removed, moved or replaced while the engine ran in it; its state is where the directory is now: start the engine there", retryable=False)

    # -- the log ---------------------------------------------------------------------------------------------------
    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: tuple[tuple[str, bytes | None], ...] = ()) -> int:
        """Write one record durably; return its offset."""
        return self.append_all([Group((Output(topic, key, value, headers),))])[0][0]

    def append_all(self, groups: Sequence[Group]) -> list[list[int]]:
        """Write groups durably, in one batch; return the offsets of each group's records, none for a group whose mark is already there.  Raises TransportError."""
        with rocks.failing(self.directory), self._lock:
            self._check_place()
            batch, marks, borne = WriteBatch(raw_mode=True), dict[bytes, int](), set[bytes]()
            offsets = [self._put_group(batch, marks, borne, group) for group in groups]
            self._done(batch, marks, self._write)
        self._notify_waiting()
        self.wake()
        return offsets

    def _put_group(self, batch: WriteBatch, marks: dict[bytes, int], borne: set[bytes], group: Group) -> list[int]:
        mark = group.unless
        if mark is not None and (mark.key in borne or mark.is_in(self.db)):
            return []
        offsets = []
        for output in group.records:
            offsets.append(self._put(batch, marks, output))
            if mark is not None and mark.is_on(output):
                batch.put(mark.key, b"%d" % offsets[-1])
                borne.add(mark.key)
        return offsets

    def deliver(self, topic: str) -> Deliver:
        """Return the function that writes results of activities to this topic.

        It does not sync: if a crash of the machine loses a result, the activity runs again, as its call is still in the state.
        """

        def write(_partition: int, key: bytes, value: bytes, headers: Headers, done: Callable[[str | None], None]) -> None:
            with self._lock:
                batch, marks = WriteBatch(raw_mode=True), dict[bytes, int]()
                self._put(batch, marks, Output(topic, key, value, headers))
                self._done(batch, marks, WriteOptions())
            done(None)
            self.wake()

        return write

    def _put(self, batch: WriteBatch, marks: dict[bytes, int], output: Output) -> int:
        """Add a record to a batch, and its topic's new end to `marks`; return its offset."""
        topic = output.topic
        end = NEXT + topic.encode()
        offset = marks[end] if end in marks else self._mark(end)
        marks[end] = offset + 1
        timestamp = output.timestamp_ms if output.timestamp_ms is not None else self.clock.now_ms()
        record = Record(topic, 0, offset, timestamp, output.key, output.value, output.headers)
        batch.put(LOG + topic.encode() + b"\0%020d" % offset, msgspec.msgpack.encode(record))
        return offset

    def _done(self, batch: WriteBatch, marks: dict[bytes, int], options: WriteOptions) -> None:
        """Write a batch, and the ends and positions that hold after it."""
        for key, offset in marks.items():
            batch.put(key, b"%d" % offset)
            self._marks.pop(key, None)  # a write that fails may have happened all the same: then the database is asked again
        self.db.write(batch, options)
        self._marks |= marks

    def _mark(self, key: bytes) -> int:
        known = self._marks.get(key)
        if known is not None:
            return known
        with self._lock:  # not while another thread writes it: we must remember the value that the thread has written
            return self._marks.setdefault(key, int(self.db.get(key) or 0))

    def end(self, topic: str) -> int:
        """The offset that the next record of this topic will get."""
        return self._mark(NEXT + topic.encode())

    def read(self, topic: str, offset: int = 0, limit: int = 1000) -> list[Record]:
        """At most `limit` records from this offset on."""
        return list(itertools.islice(records_of(self.db, topic, offset), limit))

    def compact(self, topic: str) -> int:
        """Keep only the newest record of each key, and delete that too if it has no value; return how many records were deleted."""
        newest: dict[bytes | None, int] = {}
        records = self.read(topic, 0, self.end(topic))
        for record in records:
            newest[record.key] = record.offset
        gone = [record.offset for record in records if record.value is None or newest[record.key] != record.offset]
        for offset in gone:
            self.db.delete(LOG + topic.encode() + b"\0%020d" % offset)
        return len(gone)

    def position(self, topic: str) -> int:
        """The offset of the first record in an input topic that no committed batch contains."""
        return self._mark(POSITION + topic.encode())

    # -- the engine ------------------------------------------------------------------------------------------------
    def step(self, processors: Sequence[Processor], on_log: Callable[[str], None] = print) -> int:
        """Apply waiting records and fire what is due, for each processor in atomic batches; return how much was done."""
        done = 0
        for processor in processors:
            with collecting_later():
                done += self._apply(processor, on_log) + self._fire(processor, on_log)
        return done

    def _apply(self, processor: Processor, on_log: Callable[[str], None]) -> int:
        topic = processor.input_topic
        position = self.position(topic)
        records = self._waiting(topic, position) if position < self.end(topic) else []
        if not records:
            return 0
        store = EmbeddedStore(self.db, processor.changelog_topic)
        refused = None
        if self._attempts is not None and records[0].offset < self._careful[topic]:
            records, refused = self._attempts.another(self.watched_processors.index(processor), records)
        while True:
            overlay = Overlay(store)
            if refused is None:
                made = processor.decide(overlay, records, self.clock.now_ms(), Budget(self.limits.batch_bytes_max, self.limits.batch_ms_max, self.clock))
            else:
                made = [processor.refuse(overlay, records[0], refused)]
            outputs = [output for decision in made for output in (*decision.outputs, *decision.replies)]
            if len(made) == 1 or bytes_of(overlay.changes.items(), outputs) <= self.limits.batch_bytes_max:
                break
            records = records[: len(made) // 2]  # the saved states turned out to be larger than one transaction may be
        logs = [line for decision, record in zip(made, records, strict=False) if decision.logs for line in lines_of(decision, record)]
        self._perform(processor, made, store, overlay, (topic, records[len(made) - 1].offset + 1))
        for line in logs:
            on_log(line)
        return len(made)

    def _waiting(self, topic: str, position: int) -> list[Record]:
        """As many waiting records as a batch may have; the last one may exceed its bytes."""
        records: list[Record] = []
        room = self.limits.batch_bytes_max
        for record in itertools.islice(records_of(self.db, topic, position), self.limits.batch_records_max):
            records.append(record)
            room -= len(record.value or b"")
            if room <= 0:
                break
        return records

    def _fire(self, processor: Processor, on_log: Callable[[str], None]) -> int:
        """Fire what is due, but not while records wait that may cancel it (K18); return how many outputs that made."""
        if self.position(processor.input_topic) < self.end(processor.input_topic):
            return 0
        due_ms, now_ms = self._due_of(processor), self.clock.now_ms()
        if due_ms is None or due_ms > now_ms:
            return 0
        store = EmbeddedStore(self.db, processor.changelog_topic)
        overlay = Overlay(store)
        made = processor.due(overlay, now_ms, _FIRED_MAX)
        if made is None:
            return 0
        self._perform(processor, [made], store, overlay, None)
        for line in made.logs:
            on_log(line)
        return len(made.outputs)

    def _due_of(self, processor: Processor) -> int | None:
        """When something of a processor becomes due, in ms since the epoch; None for never."""
        name = processor.changelog_topic
        if name not in self._due:
            self._due[name] = processor.next_due_ms(EmbeddedStore(self.db, name))
        return self._due[name]

    def _perform(self, processor: Processor, made: Sequence[Decision], store: EmbeddedStore, overlay: Overlay, consumed: tuple[str, int] | None) -> None:
        """Commit decisions, then do what follows a commit.  Every topic has one partition here, so a reply to another partition is counted and left out."""
        outputs: list[Output] = []
        for decision in made:
            outputs += decision.outputs
            for reply in decision.replies:
                if reply.partition == 0:
                    outputs.append(reply)
                else:
                    self.counts["reply-gone"] += 1
        begun = time.perf_counter()
        if any(key[:1] == b"\0" for key in overlay.changes):  # keys of the tables begin with NUL; ids and keys of timers do not
            self._due.pop(processor.changelog_topic, None)
        self._commit(store, overlay, outputs, consumed)
        self.stats.commits.observe(time.perf_counter() - begun)
        dispatch: list[object] = []
        for decision in made:
            self.stats.count(decision.counts, decision.runs)
            dispatch += decision.dispatch
            end_all(decision.spans)
        if dispatch and processor.input_topic in self._workers:
            self._workers[processor.input_topic][0].committed(0, dispatch)

    def _commit(self, store: EmbeddedStore, overlay: Overlay, outputs: list[Output], consumed: tuple[str, int] | None) -> None:
        with self._lock:
            batch = WriteBatch(raw_mode=True)
            for key, value in overlay.changes.items():
                if value is None:
                    batch.delete(store.prefix + key)
                else:
                    batch.put(store.prefix + key, value)
            marks: dict[bytes, int] = {}
            for output in outputs:
                self._put(batch, marks, output)
            if consumed is not None:
                marks[POSITION + consumed[0].encode()] = consumed[1]
            self._done(batch, marks, self._write)
        self._notify_waiting()

    def _notify_waiting(self) -> None:
        with self._written:
            self._writes += 1
            self._written.notify_all()

    def wait_written(self, seen: int, seconds: float) -> int:
        """Wait at most this long until there were more writes than `seen`; return their number.  For threads that follow topics."""
        with self._written:
            if self._writes == seen:
                self._written.wait(seconds)
            return self._writes

    def run(self, processors: Sequence[Processor], until: Callable[[], bool], on_log: Callable[[str], None] = print) -> None:
        """Run until `until()`, which is called after every batch.  From here on this process is an engine (semantics §3.3)."""
        set_abandoning(True, everywhere=True)
        self.watched_processors = processors
        for processor in processors:
            processor.taken_over(EmbeddedStore(self.db, processor.changelog_topic))
            worker = processor.work(self.deliver(processor.input_topic))
            if worker is not None:
                self._workers[processor.input_topic] = worker, self.end(processor.input_topic)
        self._attempts = Attempts(self.directory)
        for number, topic in enumerate(processor.input_topic for processor in processors):
            careful = max(self._attempts.suspected_until(number), self.position(topic) + self.limits.batch_records_max)
            self._careful[topic] = min(self.end(topic), careful) if self._attempts.unclean else 0
        try:
            with rocks.failing(self.directory):
                self._run(processors, until, on_log)
            self._attempts.finished()
        except TransportError:
            self._attempts.finished()  # the disk's fault, not a record's (K19)
            raise
        finally:
            for worker, _ in self._workers.values():
                worker.close(self.limits.activity_grace_s)
            self._workers.clear()

    def _work(self, processors: Sequence[Processor]) -> None:
        """Run activities once everything that was in the log at the start has been applied, as some of it may be results (M6.5)."""
        for processor in processors:
            worker, begin = self._workers.get(processor.input_topic, (None, 0))
            if worker is None:
                continue
            if not worker.owns(0) and self.position(processor.input_topic) >= begin:
                worker.own(0, EmbeddedStore(self.db, processor.changelog_topic))
            worker.turn()

    def _run(self, processors: Sequence[Processor], until: Callable[[], bool], on_log: Callable[[str], None]) -> None:
        while not until():
            self.stats.turned_s = time.monotonic()
            self._check_place()
            busy = self.step(processors, on_log)
            self._work(processors)
            if time.monotonic() >= self._trim_next:
                self.trim(processors)
            if busy:
                continue
            due = [at for at in map(self._due_of, processors) if at is not None]
            wait = min([_IDLE_S, *(max(0.0, (at - self.clock.now_ms()) / 1000) for at in due)])
            with self.woken:
                if not self._appended:
                    self.woken.wait(wait)
                self._appended = False

    def instances(self) -> Instances:
        """All instances, in one partition."""
        store = EmbeddedStore(self.db, self.limits.changelog_topic)
        return Instances("embedded", 1, {0: lambda start, limit: list(itertools.islice(store.scan(b"", start), limit))})

    def seen(self) -> list[Seen]:
        """The present state: one partition for each processor, and nothing to restore."""
        made = []
        for processor in self.watched_processors:
            topic = processor.input_topic
            timers = processor.waiting(EmbeddedStore(self.db, processor.changelog_topic)) if isinstance(processor, TimerProcessor) else None
            made.append(Seen("embedded", topic, True, [0], [], {}, {0: self.end(topic) - self.position(topic)}, timers))
        return made

    def trim(self, processors: Sequence[Processor]) -> int:
        """Delete consumed input records, history events and outputs older than their retention, and replies older than an hour, each as one range; return how many.

        Without a retention of their own, outputs stay for their readers, including those that a feed has read.
        """
        self._trim_next = time.monotonic() + _TRIM_S
        own = [processor.input_topic for processor in processors if processor.changelog_topic]
        inputs = sum(self._trim(topic, self.position(topic), self.limits.embedded_retention_ms) for topic in own)
        history = self._trim(self.limits.history_topic, self.end(self.limits.history_topic), self.limits.embedded_retention_ms) if self.limits.history_topic else 0
        outputs = self._trim_outputs(processors) if self.limits.embedded_outputs_retention_ms else 0
        return inputs + history + outputs + self._trim(self.limits.reply_topic, self.end(self.limits.reply_topic), _REPLY_MS)

    def _trim_outputs(self, processors: Sequence[Processor]) -> int:
        """Trim outputs, but nothing that a feed has not read.  Dead letters stay until somebody deals with them.

        An output has the time of the record that it follows from, or one that the author gave.  So times do not rise with offsets, and the first record to keep ends it.
        """
        config = self.limits
        kept, gone = self.clock.now_ms() - config.embedded_outputs_retention_ms, 0
        fed = {processor.input_topic for processor in processors if not processor.changelog_topic}
        others = (config.resume_topic, config.scheduler_topic, config.reply_topic, config.history_topic, config.code_topic, config.dead_letter_topic)
        for topic in (key[len(NEXT) :].decode() for key, _ in rocks.entries(self.db, NEXT)):
            if topic in others:
                continue
            first = low = self._first_of(topic)
            end = self.position(topic) if topic in fed else self.end(topic)
            for record in itertools.islice(records_of(self.db, topic, first), _TRIMMED_MAX):
                if record.offset >= end or record.timestamp_ms > kept:
                    break
                low = record.offset + 1
            else:  # there may be more: go on in the next turn
                self._trim_next = 0.0 if low > first else self._trim_next
            gone += self._delete(topic, first, low)
        return gone

    def _trim(self, topic: str, end: int, retention_ms: int) -> int:
        """Trim one topic.  Timestamps in a log rise with its offsets, so the first record to keep is found by binary search."""
        kept = self.clock.now_ms() - retention_ms
        first = self._first_of(topic)
        low, high = first, end
        while low < high:
            middle = (low + high) // 2
            found = self.read(topic, middle, 1)
            if found and found[0].offset < end and found[0].timestamp_ms <= kept:
                low = middle + 1
            else:
                high = middle
        return self._delete(topic, first, low)

    def _delete(self, topic: str, first: int, end: int) -> int:
        """Delete the records from `first`, the first one that is there, up to `end`; return how many offsets that are."""
        if end > first:
            prefix = LOG + topic.encode() + b"\0"
            self.db.delete_range(prefix + b"%020d" % first, prefix + b"%020d" % end)
            self._first[topic] = end
        return end - first

    def _first_of(self, topic: str) -> int:
        if topic not in self._first:
            there = self.read(topic, 0, 1)
            self._first[topic] = there[0].offset if there else self.position(topic)
        return self._first[topic]

    def wake(self) -> None:
        """Wake `run` from its idle wait."""
        with self.woken:
            self._appended = True
            self.woken.notify_all()
