"""A worker's loop on Kafka: it reads activity calls from the topics of queues, and writes their answers to the engines' input topic (M6.6).

At least once: a record is done once its answer is in the log, or nobody waits for it any more; only then the group's
position moves past it (`ledger.py`).  When a worker dies, its open calls go to the others in its group.  A Worker (ports.py),
which knows no log, runs the calls.  Nothing here blocks for longer than the grace period of a partition that leaves.
"""

from __future__ import annotations

import itertools
import queue
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Message, TopicPartition

from kwflow.activities import find_activity
from kwflow.config import Config
from kwflow.core import queues
from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.core.wire import Headers, Record
from kwflow.errors import ActivityError, ProtocolError, TransportError
from kwflow.ports import Clock, Deliver, Worker
from kwflow.runners.activities.answers import failure_record
from kwflow.runners.activities.heart import HEADERS
from kwflow.runners.clock import SystemClock
from kwflow.runners.instances import Instances
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.broker_errors import BrokerErrors, ending
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import LIVE, Consumer, Environment
from kwflow.runners.kafka.open_calls import AHEAD_MAX, ASIDE_MAX, OpenCalls
from kwflow.runners.kafka.orphans import Orphans
from kwflow.runners.kafka.reading import gather
from kwflow.runners.kafka.results import Results
from kwflow.runners.kafka.topics import record_of
from kwflow.runners.logs import Line
from kwflow.runners.parked import dead_letter
from kwflow.runners.stats import Seen, Stats

__all__ = ["QueueRunner"]

_AHEAD_BYTES_MAX = 32_000_000
_GATHER_MAX = 500
_NOT_TAKEN = (KafkaError.OFFSET_METADATA_TOO_LARGE, KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED)  # errors of a commit that would fail in the next turn too
_WAIT_S = 0.05
_COMMIT_S = 1.0
_ASK_S = 10
_LEAVE_S = 15
_LOST = "calls in {topic}[{number}] were deleted by retention before a worker read them, {count} records; their workflows wait until they time out: give the topic a longer retention.ms"
_UNKNOWN = "no activity {name} in this worker; a call of {id} and perhaps others wait in the queue {queue} until a worker has this activity"
_STANDS = "{queues}: no more calls are read, as {count} calls of activities unknown to this worker wait ({activities}); start it with the modules that define them"
_ANEW = "{topic}[{number}] starts again at {offset}: it was deleted and recreated; its earlier calls that have not started are dropped, and their workflows wait until they time out"


def _passing(error: KafkaError) -> bool:
    """Whether it is worth asking again: the client's own errors, such as a lost connection, pass as long as the client is alive."""
    return topics.transient(error) or (error.code() < 0 and not error.fatal())


class _Answer(msgspec.Struct):
    ref: str


class QueueRunner:
    """Serves these queues, as one of an application's workers.  `work` creates the Worker that runs the calls, and is given where to deliver answers.

    Raises TransportError if a topic is missing.  Invariant: a number stands for one assignment of one partition, and never
    for a later one, so that a late answer closes nothing.
    """

    def __init__(
        self, config: Config, names: Sequence[str], work: Callable[[Deliver], Worker], on_log: Callable[[str], None] = print, environment: Environment = LIVE, care: bool = True,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.environment = environment
        self.clock = clock or SystemClock()
        self.names = list(names)
        self._care = care  # true if calls run in this process, so that one of them may kill it; the death of any other tells nothing of them
        self.on_log = on_log
        self.stats = Stats()
        self._encryption = Encryption(config)
        self._count = itertools.count()
        self._owned: dict[int, OpenCalls] = {}
        self._assigned: list[TopicPartition] = []  # assigned, but not owned yet
        self._delivered: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # work for our thread, now that something is in the log
        self._joined = self._paused = False
        self._unknown: set[str] = set()
        self._committed_s = 0.0
        self._admin = topics.admin(config, environment)
        sizes = topics.sizes(topics.settings_of(self._admin, [config.resume_topic, config.dead_letter_topic]).values())
        self._results = Results(config, config.resume_topic, environment, sizes["batch_size"], on_log)
        self._letters = Results(config, config.dead_letter_topic, environment, sizes["batch_size"], on_log)
        self.worker = work(self._deliver)
        settings: dict[str, Any] = {
            "group_id": config.workers_group, "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "earliest",
            "partition_assignment_strategy": "cooperative-sticky", "session_timeout_ms": 6000, "enable_partition_eof": True, "fetch_queue_backoff_ms": 10,
            "topic_metadata_propagation_max_ms": topics.TOPIC_MS,
        }  # fmt: skip
        if config.instance_id is not None and care:  # as in an engine (K1): a restarted worker has its partitions at once; unique per set of queues on a machine
            settings["group_instance_id"] = f"{config.workers_group}-{config.instance_id}-{config.process}-{zlib.crc32(' '.join(sorted(names)).encode()):08x}"
        self._consumer = environment.consumer(topics.client_config(config, **settings) | {"error_cb": BrokerErrors(on_log), "on_commit": self._on_commit})
        self._orphans: Orphans | None = None
        if "group_instance_id" in settings:
            there = topics.partitions_of(self._admin, config)
            self._orphans = Orphans(self._admin, environment, config.workers_group, {name: there.get(name, 0) for name in self.names})
        self._subscribe()

    def _subscribe(self) -> None:
        self._consumer.subscribe(self.names, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    # -- the loop --------------------------------------------------------------------------------------------------
    def run(self, until: Callable[[], bool]) -> None:
        """Run until `until()`; then let running calls finish, within the grace period, and leave the group.  Raises TransportError if it must be restarted."""
        try:
            while not until():
                self.turn()
            self._give_back(list(self._owned), self.config.activity_grace_s)
        except KafkaException as error:
            raise ending(self.config.workers_group, error.args[0]) from error
        finally:
            self.worker.close()
            self._results.close()
            self._letters.close()
            self._consumer.close()

    def turn(self) -> None:
        """Read as many calls as there is room for, run them, and note those that were answered."""
        self.stats.turned_s = time.monotonic()
        if self._assigned:
            self._take_over()
        self._make_room()
        if not all(partition.noted for partition in self._owned.values()):
            self._note(self._owned.values())
        for message in gather(self._consumer, 1 if self._paused else _GATHER_MAX, _WAIT_S):
            self._take(message)
        self._begin()
        self.worker.turn()
        if self._paused or any(partition.held_back for partition in self._owned.values()):
            self.worker.hurry()
        self._settle()
        if self.environment.monotonic() - self._committed_s > _COMMIT_S:
            self._commit(self._owned.values())
        if self._orphans is not None and self._orphans.found():
            self._join_again()

    def _make_room(self) -> None:
        """Pause reading while too much is open.  The consumer is still polled, as it would otherwise lose its partitions."""
        aside = sum(len(partition.aside) for partition in self._owned.values())
        ahead = sum(len(partition.offsets) for partition in self._owned.values()) - aside
        full = ahead >= AHEAD_MAX or aside >= ASIDE_MAX or (ahead > 1 and sum(partition.bytes for partition in self._owned.values()) >= _AHEAD_BYTES_MAX)
        if full != self._paused:
            self._paused = full
            places = [TopicPartition(partition.topic, partition.number) for partition in self._owned.values()]
            self._consumer.pause(places) if full else self._consumer.resume(places)
            if full and aside >= ASIDE_MAX:
                self.on_log(Line.of(_STANDS.format(queues=", ".join(self.names), count=aside, activities=", ".join(sorted(self._unknown)[:9])), "error"))

    def _take(self, message: Message) -> None:
        error = message.error()
        if error is None:
            record = record_of(message, self._encryption)
            number = self._number_of(record.topic, record.partition)
            if number is not None:  # if None, it was fetched before the partition left
                number = self._begun_anew(number, record)
                self._read(number, self._owned[number], record)
        elif error.code() == KafkaError._PARTITION_EOF:
            number = self._number_of(message.topic(), message.partition())
            if number is not None:
                self._owned[number].ledger.pass_marks(message.offset() or 0)
        elif error.code() == KafkaError._MAX_POLL_EXCEEDED:
            self.on_log(f"{self.config.workers_group}: stalled for too long and lost its partitions; rejoining: {error.str()}")
        elif not topics.transient(error):
            raise ending(self.config.workers_group, error)

    def _number_of(self, topic: str | None, partition: int | None) -> int | None:
        """The number of the assignment by which a partition is ours now; None if it is not ours."""
        return next((number for number, mine in self._owned.items() if (mine.topic, mine.number) == (topic, partition)), None)

    def _begun_anew(self, number: int, record: Record) -> int:
        """Start afresh if the topic was deleted and created again; return the assignment's number.

        What was noted about offsets of the old topic would make us skip calls that nobody has done.
        """
        partition = self._owned[number]
        if not partition.ledger.behind(record.offset):
            return number
        self.on_log(Line.of(_ANEW.format(topic=record.topic, number=record.partition, offset=record.offset), "warning"))
        self.worker.disown(number)
        del self._owned[number]
        return self._own(TopicPartition(record.topic, record.partition, record.offset), "", record.offset)

    def _read(self, number: int, partition: OpenCalls, record: Record) -> None:
        if not partition.ledger.take(record.offset):
            self.stats.counts["answered-before"] += 1
            return
        try:
            asked = queues.read(record, self.config.resume_topic)
        except ProtocolError as error:
            return self._refuse(partition, record, error)
        if isinstance(asked, Dispatch):
            self.stats.counts["taken"] += 1
            known = not self._care or find_activity(asked.name) is not None
            if not partition.open(asked, record.offset, known):
                self._fail(number, asked)
            elif not known and asked.name not in self._unknown and len(self._unknown) < AHEAD_MAX:
                self._unknown.add(asked.name)
                self.on_log(Line.of(_UNKNOWN.format(name=asked.name, id=asked.workflow_id, queue=record.topic), "warning"))
            return
        partition.ledger.finish(record.offset)
        if asked is None:
            self.stats.counts["of-another-application"] += 1
        else:
            self._close(number, asked, None, "withdrawn")

    def _begin(self) -> None:
        """Begin the calls that were read in this turn and not withdrawn in it.

        A call that kills one worker kills the next one too.  So in careful mode calls are noted before they begin, and fail after the second death (K19).
        """
        fresh = {number: calls for number, partition in self._owned.items() if partition.noted and (calls := partition.next())}
        careful = [partition for number in fresh if (partition := self._owned[number]).careful]
        if careful:
            self._note(careful)
        for number, calls in fresh.items():
            if self._owned[number].noted:  # if not, the group did not accept the note now, and the calls wait
                self._owned[number].begin(calls)
                self.worker.committed(number, calls)

    def _fail(self, number: int, call: Dispatch) -> None:
        """Fail an attempt of a call that was running when two workers died, one after the other."""
        said = f"two workers died while activity {call.name} of {call.workflow_id} (attempt {call.attempt}) ran, perhaps out of memory or by a crash in C"
        self.stats.counts["worker-died"] += 1
        self.on_log(Line.of(f"{said}; the attempt has failed", "error"))
        record = failure_record(call, ActivityError(said, "WorkerDied"), self.config.value_bytes_max)
        self._deliver(number, call.workflow_id.encode(), record, call.headers, lambda _: None)

    def _refuse(self, partition: OpenCalls, record: Record, error: ProtocolError) -> None:
        """Dead-letter a record; it is done once the letter is in its topic."""
        letter = dead_letter(self.config, record, error.reason, str(error), self.clock.now_ms())
        self.stats.counts["dead-letter"] += 1
        self.on_log(Line.about(f"dead letter {record.topic}[{record.partition}]@{record.offset}: {error}", record, "warning"))

        def done(refused: str | None) -> None:
            if refused is not None:
                self.on_log(Line.about(f"{self.config.dead_letter_topic} refuses {record.topic}[{record.partition}]@{record.offset}: {refused}; the record stays where it is", record, "error"))
            else:
                self._delivered.put(lambda: partition.ledger.finish(record.offset))

        self._letters.deliver(0, letter.key, letter.value, letter.headers, done)

    # -- answers -----------------------------------------------------------------------------------------------------
    def _deliver(self, number: int, key: bytes, value: bytes, headers: Headers, done: Callable[[str | None], None]) -> None:
        """Deliver a call's answer, which closes the call, or its heartbeat, which does not.  May be called from any thread."""
        close = self.closing(key.decode(), msgspec.json.decode(value, type=_Answer).ref, number) if headers != HEADERS else None

        def delivered(refused: str | None) -> None:
            if refused is None and close is not None:
                close()
            done(refused)

        self._results.deliver(0, key, value, headers, delivered)

    def closing(self, id: str, ref: str, number: int | None = None) -> Callable[[], None]:
        """Return what closes a call of this assignment, or of any, once an answer that is sent after now is in the log, or nobody waits for it any more.

        Both may be called from any thread.

        1. A workflow is given the answer, goes back (rewind), and makes the same call again, under the same ref.
        2. This worker reads the new call, and only then learns that the answer is in the log: it closes what had been read before the answer was sent.
        """
        before = {mine: partition.ledger.next for mine, partition in self._owned.copy().items() if number in (None, mine)}

        def close() -> None:
            for mine, offset in before.items():
                self._close(mine, Withdraw(id, ref), offset, "answered")

        return lambda: self._delivered.put(close)

    def _close(self, number: int, call: Withdraw, before: int | None, why: str) -> None:
        partition = self._owned.get(number)
        if partition is not None and partition.close(call.workflow_id, call.ref, before):
            self.stats.counts[why] += 1
            self.worker.committed(number, [call])

    def _settle(self) -> None:
        while not self._delivered.empty():
            self._delivered.get()()

    def _note(self, partitions: Iterable[OpenCalls]) -> None:
        """Commit the notes of these partitions, and wait for it.  If the group refuses it now, because its members change, the next turn does it."""
        try:
            self._commit(partitions, wait=True)
        except KafkaException as error:
            if error.args[0].code() in _NOT_TAKEN:
                raise
            self._forget_notes()

    def _forget_notes(self) -> None:
        for partition in self._owned.values():
            partition.committed = (-1, "")

    def _commit(self, partitions: Iterable[OpenCalls], wait: bool = False, held: bool = True) -> None:
        self._committed_s = self.environment.monotonic()
        changed = []
        for partition in partitions:
            now = partition.ledger.position, partition.ledger.note(held and self._care)
            if now != partition.committed:
                partition.committed = now
                changed.append(TopicPartition(partition.topic, partition.number, now[0], now[1]))
        if changed and wait:
            self._consumer.commit(offsets=changed, asynchronous=False)
        elif changed:
            self._consumer.commit(offsets=changed)

    def _on_commit(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """Repeat a failed commit with the next one.  An evicted member learns of that by losing its partitions."""
        if error is not None:
            self._forget_notes()

    # -- the group ---------------------------------------------------------------------------------------------------
    def _on_assign(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        """Note assigned partitions.  Where to begin is looked up in the next turn, not in this callback:

        1. A broker stops, and the group's members rebalance.
        2. A request made in here fails, and its error passes through the client's C code, after which no `except` catches it.
        3. The thread of this loop would be gone, without a word.
        """
        self._joined = True
        where = [TopicPartition(place.topic, place.partition, OFFSET_BEGINNING) for place in places]
        consumer.incremental_assign(where)
        if where:
            consumer.pause(where)  # _take_over resumes it: the client keeps a partition paused for its next owner, which may be us
        self._assigned += where

    def _join_again(self) -> None:
        """Leave the group and join it again, so that it reassigns all partitions.  Records that are polled meanwhile are read again by the next owners."""
        self.on_log(f"{self.config.workers_group}: partitions of {', '.join(self.names)} belong to nobody; rejoining")
        self._consumer.unsubscribe()
        give_up = self.environment.monotonic() + self.config.activity_grace_s + _LEAVE_S
        while self._owned or self._assigned:
            self._consumer.poll(_WAIT_S)
            if self.environment.monotonic() > give_up:
                raise TransportError(f"{self.config.workers_group}: its partitions were not revoked within {_LEAVE_S} s of leaving the group")
        self._subscribe()

    def _take_over(self) -> None:
        """Own the assigned partitions, from the group's positions on.  If the broker does not answer now, the next turn asks again."""
        places = [TopicPartition(place.topic, place.partition) for place in self._assigned]
        try:
            known = {(place.topic, place.partition): place for place in self._consumer.committed(places, timeout=_ASK_S)}
            bounds = [self._consumer.get_watermark_offsets(place, timeout=_ASK_S) for place in places]
            failed = next((place.error for place in known.values() if place.error is not None), None)
            if failed is not None:
                raise KafkaException(failed)
            for place, (begin, _) in zip(places, bounds, strict=True):
                kept = known[place.topic, place.partition]
                place.offset = max(kept.offset, begin)
                self._consumer.seek(place)
        except KafkaException as error:
            if not _passing(error.args[0]):
                raise
            return
        self._assigned = []
        for place, (begin, end) in zip(places, bounds, strict=True):
            kept = known[place.topic, place.partition]
            if 0 <= kept.offset < begin:
                self.on_log(Line.of(_LOST.format(topic=place.topic, number=place.partition, count=begin - kept.offset), "error"))
            self._own(place, (kept.metadata or "") if place.offset == kept.offset else "", end)
        if not self._paused:
            self._consumer.resume(places)

    def _own(self, place: TopicPartition, note: str, end: int) -> int:
        number = next(self._count)
        partition = self._owned[number] = OpenCalls(place.topic, place.partition, place.offset, note, end, self._care)
        self.worker.own(number, partition.begun)
        return number

    def _on_revoke(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        self._give_back(self._numbers(places), self.config.activity_grace_s)
        self._unassign(consumer, places)

    def _unassign(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        left = {(place.topic, place.partition) for place in places}
        self._assigned = [place for place in self._assigned if (place.topic, place.partition) not in left]
        consumer.incremental_unassign(places)

    def _on_lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        """Drop partitions that others own already."""
        if self._orphans is not None:
            self._orphans.look_again()
        for number in self._numbers(places):
            del self._owned[number]
            self.worker.disown(number)
        self._unassign(consumer, places)

    def _numbers(self, places: list[TopicPartition]) -> list[int]:
        left = {(place.topic, place.partition) for place in places}
        return [number for number, partition in self._owned.items() if (partition.topic, partition.number) in left]

    def _give_back(self, numbers: list[int], grace_s: float) -> None:
        """Let running calls end, all within the grace period, and note for the next owner which ones were answered."""
        give_up = self.environment.monotonic() + grace_s
        for number in numbers:
            self.worker.disown(number, max(0.0, give_up - self.environment.monotonic()))
        self._settle()
        try:
            self._commit([self._owned[number] for number in numbers], wait=True, held=False)
        except KafkaException as error:  # they have a new owner already, or the broker is unreachable: calls that were answered will run again
            self.on_log(Line.of(f"{self.config.workers_group}: the last answered calls could not be recorded: {error.args[0].str()}", "warning"))
        for number in numbers:
            del self._owned[number]

    # -- for those who watch (watch.Watched) -----------------------------------------------------------------------
    @property
    def watched_processors(self) -> Sequence[object]:
        return (self.worker,)

    def seen(self) -> list[Seen]:
        """The present state of each queue; asks the broker for its ends."""
        owned = list(self._owned.copy().values())
        found = []
        for name in self.names:
            mine = {partition.number: partition for partition in owned if partition.topic == name}
            ends = topics.committed_ends(self._admin, name, mine)
            lag = {number: max(0, ends.get(number, 0) - partition.ledger.position) for number, partition in mine.items()}
            found.append(Seen(self.config.workers_group, name, self._joined, sorted(mine), [], {}, lag))
        return found

    def instances(self) -> Instances | None:
        return None

    def ends_in_a_call(self) -> None:
        """Nothing to note: a call that kills workers ends when its attempts are used up."""
