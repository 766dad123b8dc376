"""The same steps in a Faust agent, for those who run Faust already.  This runner is at-least-once.

The broker acknowledges an event's outputs before its state is written to the changelog, and the state before it is written
to the local table and the offset may be committed.  After a crash in between, the event is read again: outputs may then appear
twice, but state does not change twice, because a snapshot says which offset it already contains.  For exactly-once, use the
other runner (`kafka/`).

The table is `<application id>-state`, and its changelog is the same topic as with the other runner, so `kwflow show`, `list`
and `topics create` work as they do there.  Timers are fired by `kwflow scheduler`, which is exactly-once.
"""

from __future__ import annotations

import asyncio
import bisect
import contextvars
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faust
from aiokafka.errors import InvalidTimestampError, MessageSizeTooLargeError, RecordListTooLargeError, TopicAuthorizationFailedError  # type: ignore[import-untyped]
from faust.exceptions import ProducerSendError
from faust.types import TP

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Headers, Output, Record
from kwflow.durable import set_abandoning
from kwflow.errors import UsageError
from kwflow.ports import Decision
from kwflow.runners import parked
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.code import take_over
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay, collecting_later
from kwflow.runners.private import private
from kwflow.runners.stats import Seen, Stats
from kwflow.runners.tracing import end_all

__all__ = ["Agent", "application", "attach"]

_SESSION_S = 10  # with Faust's default of 60 s, the partitions of a killed engine would be stuck for that long
_REJECTED = (InvalidTimestampError, MessageSizeTooLargeError, RecordListTooLargeError, TopicAuthorizationFailedError)
_ALL = 0  # the activities of all partitions of this process are one pool, with this number
_TURN_S = 0.2
_REPLY_ASK_S = 10.0  # as in the Kafka runner
_FORGOTTEN_MAX = 50  # how many entries of ended instances may expire with one event


def application(config: Config, make: Callable[[str], WorkflowProcessor], on_log: Callable[[str], None] = print) -> tuple[faust.App, Agent]:
    """Return a Faust application that runs only workflows, and its agent.  Raises TransportError if the broker or the topic is missing."""
    directory = private(config.state_dir / config.application_id / "faust")
    app = faust.App(
        config.application_id,
        broker=f"kafka://{config.bootstrap_servers.replace(',', ';kafka://')}",
        store="rocksdb://",
        datadir=str(directory),
        web_enabled=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        autodiscover=False,
        broker_session_timeout=_SESSION_S,
        broker_heartbeat_interval=1.0,
    )
    return app, attach(app, config, make, on_log)


def attach(app: faust.App, config: Config, make: Callable[[str], WorkflowProcessor], on_log: Callable[[str], None] = print) -> Agent:
    """Add the workflow agent and its table to your application; the returned agent can be watched (`runners.watch.serve_http`).

    The application's id must be `config.application_id`, and its store RocksDB.  `make` is given the id of the input topic,
    from which snapshots can tell whether they already contain an offset.  Raises UsageError, TransportError.
    """
    if config.cipher_keys:
        raise UsageError("encryption_keys work with kwflow's own runner only: what Faust writes would not be encrypted")
    incarnation, partitions = topics.describe(topics.admin(config), config, config.resume_topic)
    return Agent(app, config, make(incarnation), partitions, on_log)


class Agent:
    """The agent of the resume topic.  Invariant: steps run on one thread, one at a time, in the order of the stream."""

    def __init__(self, app: faust.App, config: Config, processor: WorkflowProcessor, partitions: int, on_log: Callable[[str], None]) -> None:
        self.app = app
        self.config = config
        self.processor = processor
        processor.at_least_once = processor.queues = True
        processor.partitions = partitions
        self.partitions = partitions
        self.on_log = on_log
        self.stats = Stats()
        self.watched_processors: Sequence[object] = (processor,)
        self.table = app.Table("state", key_type=bytes, value_type=bytes, partitions=partitions)
        self._state = _Table(self.table, partitions)
        self._steps = ThreadPoolExecutor(1, "kwflow-step")
        self._joined = False
        self._restored = False  # all partitions of the last assignment are restored, and the code that they need is loaded
        self._stepping = False
        self._reply_partitions, self._reply_asked = 0, -_REPLY_ASK_S
        self._applied: dict[int, int] = {}  # partition -> the offset after the last one applied here
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = processor.work(self._deliver)
        topic = app.topic(config.resume_topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
        app.agent(topic, name="kwflow", concurrency=1)(self._run)
        app.on_partitions_assigned.connect(self._moved)
        self.table.on_recover(self._recovered)
        app.timer(_TURN_S, name="kwflow-activities")(self._turn)
        set_abandoning(True, everywhere=True)

    async def _moved(self, *_: Any, **__: Any) -> None:
        self._state.forget()
        self._joined, self._restored = True, False
        self._applied.clear()
        self._worker.disown(_ALL)

    async def _recovered(self) -> None:
        """Load the code of the assigned partitions before their first record (semantics §9.6).  An error ends the process: Faust would go on after it."""
        self._state.forget()
        admin = topics.admin(self.config)
        try:
            await asyncio.get_running_loop().run_in_executor(self._steps, take_over, self.processor, self._state, admin, self.config, f"{self.config.application_id}-state")
        except Exception as error:
            await self.app.crash(error)
            raise
        self._restored = True

    def _deliver(self, _pool: int, key: bytes, value: bytes, headers: Headers, done: Callable[[str | None], None]) -> None:
        """Send what an activity returned; called from its thread.  If the process dies before, the next one runs the activity again."""

        async def send() -> None:
            while not self.app.should_stop:
                try:
                    await (await self._produce(Output(self.config.resume_topic, key, value, headers)))
                    return done(None)
                except Exception as error:  # the broker's or Faust's
                    refused = _rejected(error)
                    if refused is not None:
                        return done(refused)
                await asyncio.sleep(_TURN_S)

        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(send(), self._loop)

    async def _turn(self) -> None:
        """Start the activities that the table still holds, at first and after each rebalance, and end those that took too long."""
        if not self._stepping:
            self.stats.turned_s = time.monotonic()
        if self._restored and not self._worker.owns(_ALL):  # not during a restore: calls that are not in the table yet would not be looked for again
            self._worker.own(_ALL, self._state)
        self._worker.turn()

    async def _run(self, stream: Any) -> None:
        """Apply each event.  An error ends the process: Faust itself would go on with the next event and lose this one."""
        self._loop = asyncio.get_running_loop()
        async for event in stream.noack().events():
            self._stepping, self.stats.turned_s = True, time.monotonic()
            try:
                await self._apply(event.message)
                self._stepping = False
            except Exception as error:
                await self.app.crash(error)
                raise
            event.ack()

    async def _apply(self, message: Any) -> None:
        """Apply one record.  If the broker refuses its outputs, the record is refused; if it refuses that too, a bare dead letter takes its place (K11)."""
        record = _record(message)
        self._state.partition = record.partition
        refused = None
        for bare in (False, False, True):
            overlay = Overlay(self._state)
            decide = functools.partial(contextvars.copy_context().run, self._decide, overlay, record, time.time_ns() // 1_000_000, refused, bare)
            made = await asyncio.get_running_loop().run_in_executor(self._steps, decide)
            begun = time.perf_counter()
            try:
                await self._send(made)
                await self._state.write(overlay.changes)
            except (ProducerSendError, *_REJECTED) as error:
                refused = _rejected(error)
                if refused is None or bare:
                    raise
                continue
            self.stats.commits.observe(time.perf_counter() - begun)
            return self._done(record, made)

    def _done(self, record: Record, made: Iterable[Decision]) -> None:
        """Do what follows once the broker has everything: counts, logs, activities, spans."""
        self._applied[record.partition] = record.offset + 1
        for decision in made:
            self.stats.count(decision.counts, decision.runs)
            for line in decision.logs:
                self.on_log(line)
            self._worker.committed(_ALL, decision.dispatch)
            end_all(decision.spans)

    def _decide(self, overlay: Overlay, record: Record, now_ms: int, refused: str | None, bare: bool) -> list[Decision]:
        with collecting_later():  # in CPython 3.11 a collection inside ast.parse may let another thread format a traceback, whose ast.parse breaks this one
            if refused is not None:
                return [parked.remnant(self.config, record, refused, now_ms) if bare else self.processor.refuse(overlay, record, refused)]
            if record.key is not None and partition_of(record.key, self.partitions) != record.partition:
                return [parked.forward(self.config, record, self.partitions, now_ms)]
            expired = self.processor.due(overlay, now_ms, _FORGOTTEN_MAX)
            return [*self.processor.decide(overlay, [record], now_ms), *([expired] if expired is not None else [])]

    async def _send(self, made: Iterable[Decision]) -> None:
        """Send the outputs and replies; the broker has acknowledged them when this returns."""
        sent = [await self._produce(output) for decision in made for output in (*decision.outputs, *[reply for reply in decision.replies if await self._answerable(reply)])]
        if sent:
            await asyncio.gather(*sent)

    async def _answerable(self, reply: Output) -> bool:
        """Whether the reply's partition exists.  A reply to a missing one would end every engine, so it is counted and left out."""
        asked, place = self.config.reply_topic, reply.partition or 0
        if place >= self._reply_partitions and time.monotonic() - self._reply_asked >= _REPLY_ASK_S:
            self._reply_asked = time.monotonic()
            there = await asyncio.get_running_loop().run_in_executor(None, topics.partitions_of, topics.admin(self.config), self.config)
            self._reply_partitions = there.get(asked, 0)
        if place < self._reply_partitions:
            return True
        self.stats.counts["reply-gone"] += 1
        self.on_log(f"a reply to {asked}[{place}], which does not exist, was skipped")
        return False

    async def _produce(self, output: Output) -> Any:
        headers = [(name, value if value is not None else b"") for name, value in output.headers]
        at = None if output.timestamp_ms is None else (output.timestamp_ms + 0.5) / 1000  # Faust rounds down to ms
        return await self.app.send(
            output.topic, output.key, output.value, partition=output.partition, timestamp=at, headers=headers, key_serializer="raw", value_serializer="raw"
        )  # fmt: skip

    def seen(self) -> list[Seen]:
        """The present state.  The lag covers partitions of which a record was applied here."""
        topic = self.config.resume_topic
        mine = sorted(place.partition for place in self.app.consumer.assignment() if place.topic == topic) if self._joined else []
        ends = {number: self.app.consumer.highwater(TP(topic, number)) for number in mine if number in self._applied}
        lag = {number: max(0, end - self._applied[number]) for number, end in ends.items() if end is not None}
        return [Seen("faust", topic, self._joined, mine if self._restored else [], [] if self._restored else mine, {}, lag)]

    def instances(self) -> None:
        """None: Faust's table cannot be read in order from another thread, so `kwflow list` and `show` read its changelog."""
        return


def _rejected(error: BaseException) -> str | None:
    """Why the broker will never accept an output; None if it may accept it later.  Faust wraps the cause when its own producer refuses."""
    cause = error.__cause__ if isinstance(error, ProducerSendError) else error
    return str(cause) or type(cause).__name__ if isinstance(cause, _REJECTED) else None


def _record(message: Any) -> Record:
    headers = message.headers.items() if hasattr(message.headers, "items") else message.headers or ()
    return Record(message.topic, message.partition, message.offset, round(message.timestamp * 1000), message.key, message.value, tuple(headers))


class _Table:
    """A Store over the table's entries of the partition that is being stepped.

    Faust's stores cannot be scanned by prefix.  So the engine's own keys, the few that begin with NUL, are kept sorted in
    memory; they are read from the table once after each rebalance.
    """

    def __init__(self, table: Any, partitions: int) -> None:
        self._table = table
        self._partitions = partitions
        self._own: list[bytes] | None = None
        self.partition = 0

    def forget(self) -> None:
        self._own = None

    def get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._table.get(key)
        return found

    async def write(self, changes: dict[bytes, bytes | None]) -> None:
        """Write changes to the changelog, and to the table only once the broker has them.

        A change that a crash or a refusal left in the table alone would pass for applied when the event is read again.
        New keys of the engine's own come first and deletions of such keys last: if a crash cuts the changes short, nothing is lost when they are repeated.
        """
        topic, table = self._table.changelog_topic, self._table
        ordered = sorted(changes.items(), key=lambda change: 1 if not change[0].startswith(b"\0") else 0 if change[1] is not None else 2)
        sent = []
        for key, value in ordered:
            how = {"key_serializer": table.key_serializer, "value_serializer": "raw" if value is None else table.value_serializer}
            sent.append(await topic.send(key=key, value=value, partition=self.partition, force=True, **how))
        written = await asyncio.gather(*sent)
        for key, value in ordered:
            self._put(key, value)
        if written:
            last = max(written, key=lambda one: one.offset)
            table.data.set_persisted_offset(last.topic_partition, last.offset)

    def _put(self, key: bytes, value: bytes | None) -> None:
        own = self._keys()
        place = bisect.bisect_left(own, key)
        known = own[place : place + 1] == [key]
        if value is None:
            self._table.data.pop(key, None)
            if known:
                del own[place]
        else:
            self._table.data[key] = value
            if key.startswith(b"\0") and not known:
                own.insert(place, key)

    def _keys(self) -> list[bytes]:
        if self._own is None:
            self._own = sorted(key for key in self._table.keys() if key.startswith(b"\0"))
        return self._own

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        own = self._keys() if prefix.startswith(b"\0") else sorted(self._table.keys())  # a scan of all keys is rare: only when something is wrong
        place = bisect.bisect_left(own, max(prefix, start))
        for key in own[place:]:
            if not key.startswith(prefix):
                return
            value = self.get(key)  # None: an entry of another partition
            if value is not None:
                yield key, value
