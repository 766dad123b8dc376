"""The exactly-once loop on Kafka: gather, step, commit, settle (K1-K18; one processor, one consumer, one producer).

A batch's outputs, state changes and offsets are one transaction; author code runs before it begins (K15), nobody polls
from the last consume until the commit has returned (K2), and RocksDB is written only after it (K8).  A transaction
that was aborted is made again from its first offset; what is fenced, fatal or unknown ends the process (K4).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from confluent_kafka import KafkaError, KafkaException

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output, Record
from kwflow.durable import set_abandoning
from kwflow.errors import FencedError, TransportError
from kwflow.ports import Clock, Decision, Processor
from kwflow.runners.attempts import Attempts
from kwflow.runners.budget import Budget
from kwflow.runners.clock import SystemClock
from kwflow.runners.instances import Instances
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.broker_errors import ending
from kwflow.runners.kafka.environment import LIVE, Environment
from kwflow.runners.kafka.member import RETRY_S, Member
from kwflow.runners.kafka.owners import Owners
from kwflow.runners.kafka.reading import gather
from kwflow.runners.kafka.results import Results
from kwflow.runners.kafka.takeover import Takeover
from kwflow.runners.kafka.topics import record_of
from kwflow.runners.kafka.transaction import Aborted, Batch, Rejected, Transactions
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay, collecting_later
from kwflow.runners.parked import dead, forward, remnant
from kwflow.runners.private import private
from kwflow.runners.rocks import failing
from kwflow.runners.stats import Seen, Stats
from kwflow.runners.timers import TimerProcessor
from kwflow.runners.tracing import end_all

__all__ = ["KafkaRunner"]

_FIRED_MAX = 500
_BYTES_MIN = 16_384
_QUIET_S = 60.0
_DAY_MS = 86_400_000
_REPLY_ASK_S = 10.0  # a reply topic may get more partitions; how often the broker is asked because of an address it does not have


_F = TypeVar("_F", bound=Callable[..., Any])


class _Refused(msgspec.Struct, frozen=True):
    """Why a record is not applied; `topic` is the one that does not take what it makes, where that is known."""

    reason: str
    topic: str = ""


def _mapped(method: _F) -> _F:
    """What no rule expected of the broker ends the process as one line, to be started again: never as a bug of ours."""

    @functools.wraps(method)
    def mapped(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except KafkaException as error:
            raise ending("Kafka", error.args[0]) from error

    return mapped  # type: ignore[return-value]


class KafkaRunner:
    """Runs one processor.  Raises FencedError or TransportError when this process has to end and be started again."""

    @_mapped
    def __init__(
        self,
        config: Config,
        make: Callable[[str], Processor],
        group: str,
        on_log: Callable[[str], None] = print,
        clock: Clock | None = None,
        outputs: Iterable[str] = (),
        environment: Environment = LIVE,
    ) -> None:
        self.config = config
        self.environment = environment
        self.group = group
        self.on_log = on_log
        self.clock = clock or SystemClock()
        self.directory = config.state_dir / config.application_id / str(config.process) / group
        self.instance = self._instance_id()
        self.admin = topics.admin(config, environment)
        self.incarnation, self.partitions = topics.describe(self.admin, config, make("").input_topic)
        self.processor = make(self.incarnation)
        self.processor.partitions = self.partitions
        if isinstance(self.processor, WorkflowProcessor):
            self.processor.queues = True
        self.member = Member(
            config, environment, self.clock, on_log, group, f"{group}-{self.instance}", self.directory, self.admin, self.processor, self.incarnation, self.partitions, frozenset(outputs)
        )  # fmt: skip
        sizes, age_max_ms = self._limits(self.member.written)
        self.results = Results(config, self.processor.input_topic, environment, sizes["batch_size"])
        self.worker = self.processor.work(self.results.deliver)
        self._turns = 0
        self._bytes_max = config.batch_bytes_max  # of a transaction: what is aborted may have been more than its line takes in time, and is made again in halves
        self.stats = Stats()
        self.counts = self.stats.counts
        self._metadata: Any = None  # who we are in the group as of `_generation`; it takes a millisecond to ask, and with what is out of date the commit is refused
        self._generation = -1
        self.owners = Owners(self.member)
        self._attempts = Attempts(self.directory, self.owners.attempted)
        self.transactions = Transactions(self.member, sizes, self.stats)
        self.takeover = Takeover(self.member, self.owners, self._attempts, self.worker, age_max_ms)
        self.owned = self.takeover.owned
        self._consumer = self.takeover.consumer

    # -- who we are (K1) -------------------------------------------------------------------------------------------
    def _instance_id(self) -> str:
        """A UUID in the locked state directory: two processes never share one."""
        path = private(self.directory) / "instance-id"
        self._lock = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransportError(f"another engine uses {self.directory}; give each its own --state-dir", retryable=False) from None
        self._lock.seek(0)
        known = self._lock.read().strip()
        if self.config.instance_id is not None:
            return f"{self.config.instance_id}-{self.config.process}"
        if not re.fullmatch("[0-9a-f]{12}", known):  # new, or the disk has damaged it
            known = uuid.uuid4().hex[:12]
            self._lock.truncate(0)
            self._lock.write(known)
            self._lock.flush()
        return f"{known}-{self.config.process}"

    def _limits(self, names: Iterable[str]) -> tuple[dict[str, int], int]:
        """Producer sizes that every topic takes (K11), and how old a local copy may be (K8)."""
        there = topics.partitions_of(self.admin, self.config)
        self._reply_partitions, self._reply_asked = there.get(self.config.reply_topic, 0), 0.0
        settings = topics.settings_of(self.admin, [name for name in names if name in there])
        retention = int(settings.get(self.processor.changelog_topic, {}).get("delete.retention.ms", _DAY_MS))
        return topics.sizes(settings.values()), retention // 2

    # -- the loop --------------------------------------------------------------------------------------------------
    @_mapped
    def run(self, until: Callable[[], bool]) -> None:
        """Go on until `until()`, asked after each batch; then leave the group.  From here on this process is an engine (semantics §3.3)."""
        set_abandoning(True, everywhere=True)
        clean = False
        try:
            with failing(self.directory):
                while not until():
                    self.turn()
            clean = True
            self._attempts.finished()
        except TransportError:
            self._attempts.finished()  # the broker's fault, or the disk's, not a record's (K19)
            raise
        except KafkaException as error:  # what no place above knows an answer to ends this process (K4)
            self._attempts.finished()
            raise ending(self.group, error.args[0]) from error
        finally:
            if self.worker is not None:
                self.worker.close(self.config.activity_grace_s if clean else 0)
                self.results.close()
            with contextlib.nullcontext() if clean else contextlib.suppress(TransportError):  # of a full disk: what was raised says it
                self.takeover.close(clean)
            self._lock.close()

    def close(self) -> None:
        """Let go of everything, of a runner that is not run after all: a consumer that has joined and was never asked since keeps its process from ending, for ever."""
        self.takeover.close(clean=False)
        self._lock.close()

    def ends_in_a_call(self) -> None:
        """From another thread: this process is ended because a call of the client does not return, which is no record's fault (K19)."""
        self._attempts.interrupted()

    def turn(self) -> None:
        """One transaction of records, then what is due.

        What was gathered and did not fit stays with its partition: between two transactions the group, timers and
        activities get their turn, however slow the steps are.
        """
        self.stats.turned_s = time.monotonic()
        self._gather()
        try:
            with collecting_later():
                self._process()
            self._reached()
            self.takeover.turn()
            self._fire()
            self._pass_marks()
            self._work()
            self.takeover.look_after()
        except Rejected as error:
            raise TransportError(f"{self.group}: the broker does not take what is due by time: {error}", retryable=False) from None
        except Aborted as error:
            self.on_log(f"{self.group}: a transaction was aborted and is made again: {error}")
            self._generation = -1
            self._bytes_max = max(_BYTES_MIN, self._bytes_max // 2)
            for number, partition in self.owned.items():
                if partition.gathered:
                    partition.drop()
                    self.takeover.seek(number, partition.position)
            self.environment.sleep(RETRY_S * 2 ** min(self.transactions.aborts, 5))  # a member that was evicted hears of it with its next heartbeat

    def _work(self) -> None:
        """Activities of a partition begin once all that was in its log at the takeover has been applied: some of it are results."""
        if self.worker is None:
            return
        for number, partition in self.owned.items():
            if partition.caught_up and not self.worker.owns(number):
                self.worker.own(number, partition.store)
        self.worker.turn()

    def _gather(self) -> None:
        """What is here, of partitions that are ours after the last consume (K2): nobody polls again before the commit."""
        waiting = [record for partition in self.owned.values() for record in partition.gathered]
        due = [partition.due_of(self.processor) for partition in self.owned.values() if partition.caught_up]
        wait = min([0.0 if waiting else self.takeover.wait_s, *(max(0.0, (at - self.clock.now_ms()) / 1000) for at in due if at is not None)])
        room = self.config.batch_records_max - len(waiting) if sum([len(record.value or b"") for record in waiting]) < self.config.batch_bytes_max else 1
        messages = gather(self._consumer, room, wait)
        if self._generation != self.takeover.generation:
            self._generation, self._metadata = self.takeover.generation, self._consumer.consumer_group_metadata()
        for message in messages:
            error = message.error()
            if error is None:
                # 1. a partition is assigned, at an offset that is only a placeholder, and paused
                # 2. what was fetched before the pause is delivered here, in the same gather
                # 3. it is restored and owned, and those old records would be stepped again
                partition = self.owned.get(message.partition() or 0)
                if partition is not None and (message.offset() or 0) >= partition.position:
                    partition.gathered.append(record_of(message, self.member.encryption))
            elif error.code() == KafkaError._PARTITION_EOF:
                if (partition := self.owned.get(message.partition() or 0)) is not None:
                    partition.end = message.offset() or 0
            elif error.code() == KafkaError._MAX_POLL_EXCEEDED:
                self.on_log(f"{self.group}: stalled for too long and lost its partitions; it joins again: {error.str()}")
            elif not topics.transient(error) and (self.processor.changelog_topic or error.code() != KafkaError._UNKNOWN_PARTITION):
                if error.code() != KafkaError._FATAL:
                    raise ending(self.group, error)
                raise FencedError(f"{self.group}: {error.str()}{self._like_me() if 'Static consumer fenced' in error.str() else ''}")

    def _like_me(self) -> str:
        where = "instance_id is given twice" if self.config.instance_id else f"{self.directory / 'instance-id'} was copied: delete it in the copy"
        return f"; unless that is a later start of this engine, another one has the same identity, {self.instance}: {where}"

    def _reached(self) -> None:
        """Ends that were read, once everything before them is applied: a batch that was aborted is read again first (K18)."""
        for partition in self.owned.values():
            if not partition.gathered:
                partition.reached = partition.end

    def _process(self) -> None:
        """One transaction; after an unclean stop of a few records only, where the one that killed us may be (K19)."""
        waiting = [partition for partition in self.owned.values() if partition.gathered]
        careful = next((partition for partition in waiting if partition.next_is_careful(self.config.batch_records_max)), None)
        if careful is not None:
            self._process_carefully(careful.number, [record for record in careful.gathered if record.offset < careful.careful_until])
        elif waiting:
            self._turns += 1
            first = self._turns % len(waiting)  # slow steps of one partition leave little of the budget to those after it: each is the first in its turn
            self._transact([record for partition in (*waiting[first:], *waiting[:first]) for record in partition.gathered])

    def _process_carefully(self, number: int, records: list[Record]) -> None:
        some, killed = self._attempts.another(number, records)
        try:
            self._transact(some, None if killed is None else _Refused(killed))
        except (Aborted, TransportError):
            self._attempts.survived(number)
            raise

    def _transact(self, records: list[Record], refused: _Refused | None = None, alone: int = 0) -> list[Record]:
        """One transaction, as large as its budget; those that it left.  A record that the broker rejects alone, twice, is refused; if it takes not even that, next to nothing is left of it (K11)."""
        batch, done = self._step(records, refused, alone > 2)
        taken = [record for mine in done.values() for record in mine]
        why = None
        if len(taken) > 1 and batch.bytes() > self._bytes_max:
            why = _Refused(f"more than {self._bytes_max} bytes (batch_bytes_max, or what was aborted last)")  # known once the states are saved; nothing was produced yet
        else:
            try:
                self._commit(batch)
            except Rejected as error:
                why = _Refused(error.reason, error.topic)
        if why is not None:  # not inside the handler: author code that runs there would have our error as the context of its own
            self._in_halves(taken, refused, why, alone)
        return [record for record in records if record.offset >= batch.positions[record.partition]]

    def _in_halves(self, taken: list[Record], refused: _Refused | None, why: _Refused, alone: int) -> None:
        if alone > 2:
            raise TransportError(f"the broker refuses even the dead letter of {taken[0].topic}[{taken[0].partition}]@{taken[0].offset}: {why.reason}", retryable=False)
        half = len(taken) // 2
        if not half:
            alone = alone if refused is None else 2
            self._transact(taken, why if alone else None, alone + 1)
            return
        for rest in (taken[:half], taken[half:]):
            while rest:
                rest = self._transact(rest)

    def _step(self, records: list[Record], refused: _Refused | None, bare: bool) -> tuple[Batch, dict[int, list[Record]]]:
        """What these records do, up to the budget of one transaction; and which of them, by partition."""
        batch, done = Batch(), {}
        by_partition: dict[int, list[Record]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
        budget = Budget(self._bytes_max, self.config.batch_ms_max, self.clock)
        for number, mine in by_partition.items():
            overlay = batch.overlays[number] = Overlay(self.owned[number].store)
            if refused is None:
                decisions, done[number] = self._decide(overlay, mine, budget)
            elif bare:
                decisions, done[number] = [self._remnant(record, refused.reason) for record in mine], mine
            else:
                decisions, done[number] = [self._refuse(overlay, record, refused) for record in mine], mine
            for made, record in zip(decisions, done[number], strict=True):
                batch.add(number, made, record)
                if made.replies:
                    self._reply(batch, made.replies)
            batch.positions[number] = max([record.offset for record in done[number]]) + 1
        return batch, done

    def _decide(self, overlay: Overlay, records: list[Record], budget: Budget) -> tuple[list[Decision], list[Record]]:
        """The processor's decisions, and for which record each; those on the wrong partition go to the right one first (K6)."""
        now_ms = self.clock.now_ms()
        right = [record for record in records if self._at_home(record)]
        made = self.processor.decide(overlay, right, now_ms, budget) if right else []
        if len(right) == len(records):
            return made, records[: len(made)]
        at_home = set(map(id, right))
        last = right[len(made) - 1].offset if len(made) < len(right) else records[-1].offset
        away = [record for record in records if record.offset <= last and id(record) not in at_home]
        pairs = [*zip(made, right, strict=False), *((forward(self.config, record, self.partitions, now_ms), record) for record in away)]
        pairs.sort(key=lambda pair: pair[1].offset)  # the second half of a batch that is divided must not lie before the first
        return [decision for decision, _ in pairs], [record for _, record in pairs]

    def _at_home(self, record: Record) -> bool:
        return record.key is None or not self.processor.changelog_topic or partition_of(record.key, self.partitions) == record.partition

    def _refuse(self, overlay: Overlay, record: Record, why: _Refused) -> Decision:
        """An instance that it would park is on another partition, if the record should be there, too (K6)."""
        if self._at_home(record):
            return self.processor.refuse(overlay, record, why.reason, why.topic)
        return dead(self.config, record, "refused", why.reason, self.clock.now_ms())

    def _remnant(self, record: Record, why: str) -> Decision:
        """Headers of a topic that is somebody else's are no address of ours: nobody is answered."""
        return remnant(self.config, record if self.processor.changelog_topic else msgspec.structs.replace(record, headers=()), why, self.clock.now_ms())

    def _fire(self) -> None:
        for partition in list(self.owned.values()):
            due_ms, now_ms = partition.due_of(self.processor) if partition.caught_up else None, self.clock.now_ms()
            if due_ms is None or due_ms > now_ms:
                continue
            overlay = Overlay(partition.store)
            made = self.processor.due(overlay, now_ms, _FIRED_MAX)
            if made is not None:
                batch = Batch({partition.number: overlay}, positions={partition.number: partition.position})
                batch.add(partition.number, made)
                self._commit(batch)

    def _pass_marks(self) -> None:
        """Once it is quiet, commit past the marks of transactions at the end of a log.

        1. a timer fires: its record and the mark of its transaction are the last of a partition
        2. nothing more comes, and after a week retention deletes both
        3. whoever takes over has to read on from the mark: that is before the begin of the log now, as if records had been lost
        """
        now = self.environment.monotonic()
        for partition in list(self.owned.values()):
            if partition.gathered or partition.reached <= partition.position:
                continue
            if partition.quiet_since is None:
                partition.quiet_since = now
            elif now - partition.quiet_since >= _QUIET_S:
                self._commit(Batch({partition.number: Overlay(partition.store)}, positions={partition.number: partition.reached}))

    # -- for those who watch ---------------------------------------------------------------------------------------
    @property
    def watched_processors(self) -> tuple[Processor]:
        return (self.processor,)

    def restoring(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(changelog, partition) -> (offset reached, end)."""
        return {(self.processor.changelog_topic, number): (restore.reached, restore.end) for number, (restore, _) in self.takeover.restoring.copy().items()}

    def instances(self) -> Instances | None:
        """Those of the partitions owned now; None in a scheduler."""
        if not isinstance(self.processor, WorkflowProcessor):
            return None
        return Instances(self.member.name, self.partitions, {number: partition.store.page for number, partition in self.owned.copy().items()})

    def seen(self) -> list[Seen]:
        """How it stands now; asks the broker for the input's committed end."""
        topic, owned = self.processor.input_topic, dict(self.owned)
        ends = topics.committed_ends(self.admin, topic, owned)
        lag = {number: max(0, ends.get(number, 0) - max(partition.position, partition.reached)) for number, partition in owned.items()}
        timers = None
        if isinstance(self.processor, TimerProcessor):
            timers = 0
            for partition in owned.values():
                with contextlib.suppress(Exception):  # its store was closed meanwhile
                    timers += self.processor.waiting(partition.store)
        return [Seen(self.group, topic, self.takeover.joined, sorted(owned), sorted(self.takeover.assigned), {number: progress for (_, number), progress in self.restoring().items()}, lag, timers)]

    # -- commit and settle -----------------------------------------------------------------------------------------
    def _commit(self, batch: Batch) -> None:
        """One transaction, then the local stores (K8)."""
        begun_ms = self.clock.now_ms()  # this process may stand still in a commit, and somebody else goes on
        if self.takeover.foreign is not None:
            self.takeover.foreign.same()
        reached = self.transactions.commit(batch, self._metadata)
        self._bytes_max = min(self.config.batch_bytes_max, self._bytes_max * 9 // 8)
        self.counts.update(batch.counts)
        end_all(batch.spans)
        for number, overlay in batch.overlays.items():
            partition = self.owned[number]
            partition.store.settle(overlay.changes, reached.get(number), begun_ms)
            partition.applied(batch.positions[number])
        for line in batch.logs:
            self.on_log(line)
        if self.worker is not None:
            for number, items in batch.dispatch.items():
                self.worker.committed(number, items)

    def _reply(self, batch: Batch, replies: Iterable[Output]) -> None:
        """Replies go with the batch; to a partition that does not exist they would abort it, so they are counted and left out."""
        for reply in replies:
            if (reply.partition or 0) >= self._reply_partitions and self.environment.monotonic() - self._reply_asked >= _REPLY_ASK_S:
                self._reply_asked = self.environment.monotonic()
                self._reply_partitions = topics.partitions_of(self.admin, self.config).get(self.config.reply_topic, 0)
            if (reply.partition or 0) < self._reply_partitions:
                batch.outputs.append(reply)
            else:
                batch.counts.append("reply-gone")
                batch.logs.append(f"a reply to {self.config.reply_topic}[{reply.partition}], which does not exist, was left out")
