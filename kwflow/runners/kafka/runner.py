"""The exactly-once loop on Kafka: gather, step, commit, settle (K1-K18; one processor, one consumer, one producer).

A batch's outputs, state changes and offsets are one transaction.  Author code runs before the transaction begins (K15),
nobody polls from the last consume until the commit has returned (K2), and RocksDB is written only after the commit (K8).  An
aborted transaction is repeated from its first offset; an error that is fenced, fatal or unknown ends the process (K4).
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
_REPLY_ASK_S = 10.0  # how often the broker is asked for the reply topic's partitions, which may grow, because of an address that does not exist


_F = TypeVar("_F", bound=Callable[..., Any])


class _Refused(msgspec.Struct, frozen=True):
    """Why a record is not applied; `topic` is the one that refuses its outputs, if known."""

    reason: str
    topic: str = ""


def _mapped(method: _F) -> _F:
    """Turn an unexpected error of the broker into one that ends the process in one log line, to be restarted: never report it as a bug of ours."""

    @functools.wraps(method)
    def mapped(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except KafkaException as error:
            raise ending("Kafka", error.args[0]) from error

    return mapped  # type: ignore[return-value]


class KafkaRunner:
    """Runs one processor.  Raises FencedError or TransportError if this process must end and be restarted."""

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
            config, environment, self.clock, on_log, group, f"{group}-{self.instance}", self.directory, self.admin, self.processor, self.incarnation, self.partitions,
            topics.describe(self.admin, config, self.processor.changelog_topic)[0] if self.processor.changelog_topic else "", frozenset(outputs),
        )  # fmt: skip
        sizes, age_max_ms = self._limits(self.member.written)
        self.results = Results(config, self.processor.input_topic, environment, sizes["batch_size"], on_log)
        self.worker = self.processor.work(self.results.deliver)
        self._turns = 0
        self._bytes_max = config.batch_bytes_max  # of a transaction; halved by an abort, as the batch may have been too large for its network line
        self.stats = Stats()
        self.counts = self.stats.counts
        self._metadata: Any = None  # our group metadata as of `_generation`; asking takes a millisecond, and outdated metadata makes the commit fail
        self._generation = -1
        self._topic_missing = False
        self.owners = Owners(self.member)
        self._attempts = Attempts(self.directory, self.owners.attempted)
        self.transactions = Transactions(self.member, sizes, self.stats)
        self.takeover = Takeover(self.member, self.owners, self._attempts, self.worker, age_max_ms)
        self.owned = self.takeover.owned
        self._consumer = self.takeover.consumer

    # -- who we are (K1) -------------------------------------------------------------------------------------------
    def _instance_id(self) -> str:
        """Return our identity: a UUID in the locked state directory, so that two processes never share one; or the configured instance_id."""
        path = private(self.directory) / "instance-id"
        self._lock = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransportError(f"another engine uses {self.directory}; give each engine its own --state-dir", retryable=False) from None
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
        """Producer sizes that every topic accepts (K11), and how old a local copy may be, in ms (K8)."""
        there = topics.partitions_of(self.admin, self.config)
        self._reply_partitions, self._reply_asked = there.get(self.config.reply_topic, 0), 0.0
        settings = topics.settings_of(self.admin, [name for name in names if name in there])
        retention = int(settings.get(self.processor.changelog_topic, {}).get("delete.retention.ms", _DAY_MS))
        return topics.sizes(settings.values()), retention // 2

    # -- the loop --------------------------------------------------------------------------------------------------
    @_mapped
    def run(self, until: Callable[[], bool]) -> None:
        """Run until `until()`, which is called after each batch, then leave the group.  From here on this process is an engine (semantics §3.3)."""
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
        except KafkaException as error:  # an error that nothing above handles ends this process (K4)
            self._attempts.finished()
            raise ending(self.group, error.args[0]) from error
        finally:
            if self.worker is not None:
                self.worker.close(self.config.activity_grace_s if clean else 0)
                self.results.close()
            with contextlib.nullcontext() if clean else contextlib.suppress(TransportError):  # such as for a full disk, which the error being raised already reports
                self.takeover.close(clean)
            self._lock.close()

    def close(self) -> None:
        """Close everything in a runner that is not run after all: a consumer that has joined, and is never polled again, keeps its process from ending forever."""
        self.takeover.close(clean=False)
        self._lock.close()

    def ends_in_a_call(self) -> None:
        """Note, from another thread, that this process is ended because a call of the client does not return, which is no record's fault (K19)."""
        self._attempts.interrupted()

    def turn(self) -> None:
        """Commit one transaction of records, then fire what is due.

        Gathered records that did not fit stay with their partition: between two transactions the group, timers and activities
        get their turn, however slow the steps are.
        """
        self.stats.turned_s = time.monotonic()
        if self._topic_missing:
            self._topic_missing = not self.takeover.is_same_changelog()
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
            raise TransportError(f"{self.group}: the broker refuses records that are due now: {error}", retryable=error.timed) from None
        except Aborted as error:
            self.on_log(f"{self.group}: a transaction was aborted and is retried: {error}")
            self._topic_missing |= error.missing and bool(self.processor.changelog_topic)
            self._generation = -1
            self._bytes_max = max(_BYTES_MIN, self._bytes_max // 2)
            for number, partition in self.owned.items():
                if partition.gathered:
                    partition.drop()
                    self.takeover.seek(number, partition.position)
            self.environment.sleep(RETRY_S * 2 ** min(self.transactions.aborts, 5))  # an evicted member learns of it with its next heartbeat

    def _work(self) -> None:
        """Run activities.  Those of a partition begin once everything in its log at the takeover has been applied, as some of it may be results."""
        if self.worker is None:
            return
        for number, partition in self.owned.items():
            if partition.caught_up and not self.worker.owns(number):
                self.worker.own(number, partition.store)
        self.worker.turn()

    def _gather(self) -> None:
        """Gather the records that have arrived for partitions that are ours after the last consume (K2); nobody polls again before the commit."""
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
                # 1. A partition is assigned at an offset that is only a placeholder, and paused.
                # 2. Records that were fetched before the pause are delivered here, in the same gather.
                # 3. If they were kept, they would be stepped again once the partition is restored and owned.
                partition = self.owned.get(message.partition() or 0)
                if partition is not None and (message.offset() or 0) >= partition.position:
                    partition.gathered.append(record_of(message, self.member.encryption))
            elif error.code() == KafkaError._PARTITION_EOF:
                if (partition := self.owned.get(message.partition() or 0)) is not None:
                    partition.end = message.offset() or 0
            elif error.code() == KafkaError._MAX_POLL_EXCEEDED:
                self.on_log(f"{self.group}: stalled for too long and lost its partitions; rejoining: {error.str()}")
            elif not topics.transient(error) and (self.processor.changelog_topic or error.code() != KafkaError._UNKNOWN_PARTITION):
                if error.code() != KafkaError._FATAL:
                    raise ending(self.group, error)
                raise FencedError(f"{self.group}: {error.str()}{self._another_like_this() if 'Static consumer fenced' in error.str() else ''}")

    def _another_like_this(self) -> str:
        where = "two engines have this instance_id" if self.config.instance_id else f"{self.directory / 'instance-id'} was copied: delete it in the copy"
        return f"; unless this engine has been restarted, another one has the same identity, {self.instance}: {where}"

    def _reached(self) -> None:
        """Note the ends of logs up to which everything is applied: the records of an aborted batch must be read again first (K18)."""
        for partition in self.owned.values():
            if not partition.gathered:
                partition.reached = partition.end

    def _process(self) -> None:
        """Commit one transaction.  After an unclean stop it has only a few records, as long as the one that killed the process may be among them (K19)."""
        waiting = [partition for partition in self.owned.values() if partition.gathered]
        careful = next((partition for partition in waiting if partition.next_is_careful(self.config.batch_records_max)), None)
        if careful is not None:
            self._process_carefully(careful.number, [record for record in careful.gathered if record.offset < careful.careful_until])
        elif waiting:
            self._turns += 1
            first = self._turns % len(waiting)  # slow steps in one partition leave little budget to the others, so each goes first in turn
            self._transact([record for partition in (*waiting[first:], *waiting[:first]) for record in partition.gathered])

    def _process_carefully(self, number: int, records: list[Record]) -> None:
        some, killed = self._attempts.another(number, records)
        try:
            self._transact(some, None if killed is None else _Refused(killed))
        except (Aborted, TransportError):
            self._attempts.survived(number)
            raise

    def _transact(self, records: list[Record], refused: _Refused | None = None, alone: int = 0) -> list[Record]:
        """Commit one transaction, as large as its budget; return the records that did not fit.

        A record that the broker rejects twice, alone, is refused; if the broker rejects that too, a bare dead letter takes its place (K11).
        """
        batch, done = self._step(records, refused, alone > 2)
        taken = [record for mine in done.values() for record in mine]
        why = None
        if len(taken) > 1 and batch.bytes() > self._bytes_max:
            why = _Refused(f"more than {self._bytes_max} bytes (batch_bytes_max, or what was aborted last)")  # known only now that the states are saved; nothing was produced yet
        else:
            try:
                self._commit(batch)
            except Rejected as error:
                why = _Refused(error.reason, error.topic)
        if why is not None:  # not inside the handler: errors of author code that runs in it would get our error as their context
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
        """Decide what these records do, up to the budget of one transaction; return the batch, and the records in it by partition."""
        batch, done = Batch(), {}
        by_partition: dict[int, list[Record]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
        budget = Budget(self._bytes_max, self.config.batch_ms_max, self.clock)
        for number, mine in by_partition.items():
            overlay = batch.overlays[number] = self.owned[number].changes()
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
        """The processor's decisions, and the record of each.  Records in the wrong partition are forwarded to the right one (K6)."""
        now_ms = self.clock.now_ms()
        right = [record for record in records if self._at_home(record)]
        made = self.processor.decide(overlay, right, now_ms, budget) if right else []
        if len(right) == len(records):
            return made, records[: len(made)]
        at_home = set(map(id, right))
        last = right[len(made) - 1].offset if len(made) < len(right) else records[-1].offset
        away = [record for record in records if record.offset <= last and id(record) not in at_home]
        pairs = [*zip(made, right, strict=False), *((forward(self.config, record, self.partitions, now_ms), record) for record in away)]
        pairs.sort(key=lambda pair: pair[1].offset)  # by offset, as the second half of a batch that is split must not lie before the first
        return [decision for decision, _ in pairs], [record for _, record in pairs]

    def _at_home(self, record: Record) -> bool:
        return record.key is None or not self.processor.changelog_topic or partition_of(record.key, self.partitions) == record.partition

    def _refuse(self, overlay: Overlay, record: Record, why: _Refused) -> Decision:
        """Refuse a record.  If it is in the wrong partition it is dead-lettered, as the instance that it would park is in another one (K6)."""
        if self._at_home(record):
            return self.processor.refuse(overlay, record, why.reason, why.topic)
        return dead(self.config, record, "refused", why.reason, self.clock.now_ms())

    def _remnant(self, record: Record, why: str) -> Decision:
        """A bare dead letter (K11).  Headers from somebody else's topic are not our reply addresses, so nobody is answered."""
        return remnant(self.config, record if self.processor.changelog_topic else msgspec.structs.replace(record, headers=()), why, self.clock.now_ms())

    def _fire(self) -> None:
        for partition in list(self.owned.values()):
            due_ms, now_ms = partition.due_of(self.processor) if partition.caught_up else None, self.clock.now_ms()
            if due_ms is None or due_ms > now_ms:
                continue
            overlay = partition.changes()
            made = self.processor.due(overlay, now_ms, _FIRED_MAX)
            if made is not None:
                batch = Batch({partition.number: overlay}, positions={partition.number: partition.position})
                batch.add(partition.number, made)
                self._commit(batch)

    def _pass_marks(self) -> None:
        """Once a partition is quiet, commit past the transaction markers at the end of its log.

        1. A timer fires: its record and its transaction's marker are the last in a partition.
        2. Nothing more arrives, and after a week retention deletes both.
        3. The next owner would have to read on from the marker, which is before the beginning of the log now, as if records had been lost.
        """
        now = self.environment.monotonic()
        for partition in list(self.owned.values()):
            if partition.gathered or partition.reached <= partition.position:
                continue
            if partition.quiet_since is None:
                partition.quiet_since = now
            elif now - partition.quiet_since >= _QUIET_S:
                self._commit(Batch({partition.number: partition.changes()}, positions={partition.number: partition.reached}))

    # -- for those who watch ---------------------------------------------------------------------------------------
    @property
    def watched_processors(self) -> tuple[Processor]:
        return (self.processor,)

    def restoring(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(changelog, partition) -> (offset reached, end), for each running restore."""
        return {(self.processor.changelog_topic, number): (restore.reached, restore.end) for number, (restore, _) in self.takeover.restoring.copy().items()}

    def instances(self) -> Instances | None:
        """The instances in the partitions that are owned now; None if the processor is not that of workflows."""
        if not isinstance(self.processor, WorkflowProcessor):
            return None
        return Instances(self.member.name, self.partitions, {number: partition.store.page for number, partition in self.owned.copy().items()})

    def seen(self) -> list[Seen]:
        """The present state; asks the broker for the input's committed end."""
        topic, owned = self.processor.input_topic, dict(self.owned)
        ends = topics.committed_ends(self.admin, topic, owned)
        lag = {number: max(0, ends.get(number, 0) - max(partition.position, partition.reached)) for number, partition in owned.items()}
        timers = None
        if isinstance(self.processor, TimerProcessor):
            timers = 0
            for partition in owned.values():
                with contextlib.suppress(Exception):  # the store may have been closed meanwhile
                    timers += self.processor.waiting(partition.store)
        return [Seen(self.group, topic, self.takeover.joined, sorted(owned), sorted(self.takeover.assigned), {number: progress for (_, number), progress in self.restoring().items()}, lag, timers)]

    # -- commit and settle -----------------------------------------------------------------------------------------
    def _commit(self, batch: Batch) -> None:
        """Commit one transaction, then write to the local stores (K8)."""
        begun_ms = self.clock.now_ms()  # before the commit: this process may be suspended in it while another owner goes on
        if self.takeover.foreign is not None:
            self.takeover.foreign.check()
        reached = self.transactions.commit(batch, self._metadata)
        self._bytes_max = min(self.config.batch_bytes_max, self._bytes_max * 9 // 8)
        self.stats.count(batch.counts, batch.runs)
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
        """Add replies to the batch.  One to a partition that does not exist would abort the batch, so it is counted and left out."""
        for reply in replies:
            if (reply.partition or 0) >= self._reply_partitions and self.environment.monotonic() - self._reply_asked >= _REPLY_ASK_S:
                self._reply_asked = self.environment.monotonic()
                self._reply_partitions = topics.partitions_of(self.admin, self.config).get(self.config.reply_topic, 0)
            if (reply.partition or 0) < self._reply_partitions:
                batch.outputs.append(reply)
            else:
                batch.counts.append("reply-gone")
                batch.logs.append(f"a reply to {self.config.reply_topic}[{reply.partition}], which does not exist, was skipped")
