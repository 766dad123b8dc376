"""One bug for each rule of exactly-once (K1-K20), planted into the runner or what it runs; `test_teeth.py` checks that each of them is caught."""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition

from kwflow import flows, schedules, worker
from kwflow.activities import Retry
from kwflow.core import children, machine, messages, ops, queues, step, wire
from kwflow.core.instance import CLOSING, Instance
from kwflow.core.machine import Machine
from kwflow.core.wire import Record
from kwflow.durable import versions
from kwflow.runners import code, parked
from kwflow.runners.activities.heart import Heart
from kwflow.runners.activities.lent import Lent
from kwflow.runners.attempts import Attempts
from kwflow.runners.commands import copies
from kwflow.runners.kafka import ledger, topics
from kwflow.runners.kafka import runner as kafka
from kwflow.runners.kafka.ledger import Ledger
from kwflow.runners.kafka.member import LATEST, Member, again
from kwflow.runners.kafka.open_calls import AHEAD_MAX, OpenCalls
from kwflow.runners.kafka.queues import QueueRunner
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.kafka.standby import Cleanup, Standby
from kwflow.runners.kafka.state import PartitionStore
from kwflow.runners.kafka.takeover import Takeover
from kwflow.runners.kafka.transaction import Aborted, Batch, Transactions
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor
from tests.simulation.activities import MAIL, QUEUE
from tests.simulation.faults import Faults
from tests.simulation.planned import Handover, Lends, Queued, QueuedGoesBack
from tests.simulation.workers import WORKERS
from tests.simulation.world import World

CRASHES = Faults(crash=0.02)
CRASHES_IN_COMMITS = Faults(crash=0.1, at="commit")
CRASHES_BEFORE_COMMITS = Faults(crash=0.1, at="send_offsets")  # what they leave open holds up readers only, so that heirs do not end it at once
ZOMBIES_WITH_HEIRS = Faults(freeze=0.004, at="commit", freeze_ms=(10_000, 14_000), wake="committed", markers_ms=4000)  # they commit while their heirs look where to begin
ZOMBIES_IN_POLLS = Faults(freeze=0.03, at="consume", freeze_ms=(7_000, 14_000))
ABORTS = Faults(abort=0.1)
REBALANCES = Faults(kill=0.2, stop=0.4, rebalance=0.2)
LATE_REPORTS = Faults(stall=0.2, at="producer-poll")
SLOW_MARKERS = Faults(stop=0.5, wipe=3.0, markers_ms=8000)


@dataclasses.dataclass
class Planted:
    """A bug: what to replace, and the faults that expose it; `first` is the seed that is tried first, for a bug that is seldom noticed, or late."""

    rule: str
    what: str
    faults: Faults = dataclasses.field(default_factory=Faults)
    runner: type[KafkaRunner] = KafkaRunner
    engine: Callable[..., Any] = WorkflowProcessor
    timers: Callable[..., Any] = TimerProcessor
    world: type[World] = World
    patch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    first: int = 0


class NewIdentityEachStart(KafkaRunner):
    def _instance_id(self) -> str:
        return f"{super()._instance_id()}-{uuid.uuid4().hex[:6]}"


class PollsBeforeItCommits(KafkaRunner):
    """And asks for its group metadata after that."""

    def _commit(self, batch: Batch) -> None:
        kept = dict(self.owned)
        stray = self._consumer.poll(2)
        if stray is not None and stray.error() is None:
            self._consumer.seek(TopicPartition(stray.topic() or "", stray.partition() or 0, stray.offset() or 0))
        self.owned.update({number: kept[number] for number in batch.positions if number not in self.owned})
        self._metadata = self._consumer.consumer_group_metadata()
        super()._commit(batch)


class KeepsTheOverlayAfterAnAbort(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        try:
            super()._commit(batch)
        except Aborted:
            for number, overlay in batch.overlays.items():
                if number in self.owned:
                    self.owned[number].store.settle(overlay.changes, None)
            raise


class SeeksBehindTheBatchAfterAnAbort(KafkaRunner):
    def turn(self) -> None:
        seek = self.takeover.seek
        with mock.patch.object(self.takeover, "seek", lambda number, offset: seek(number, offset + 1 if number in self.owned and self.transactions.aborts else offset)):
            super().turn()


def _begun_anew_after_a_timeout() -> contextlib.AbstractContextManager[Any]:
    """Re-initialises the producer in place and repeats the batch, although the commit may have succeeded."""
    again = Transactions._again

    def once(transactions: Transactions, call: Callable[[], Any], within_s: float = 30) -> Any:
        try:
            return call()
        except KafkaException as error:
            if "commit" not in error.args[0].str():
                return again(transactions, call, within_s)
        transactions._producer = transactions._new_producer()
        raise Aborted("no answer in time")

    return mock.patch.object(Transactions, "_again", once)


def _restored_to_the_stable_offset_only() -> contextlib.AbstractContextManager[Any]:
    def ends(member: Member, topic: str, numbers: Iterable[int]) -> dict[int, int]:
        asked = {TopicPartition(topic, number): LATEST for number in numbers}
        found: dict[int, int] = again(
            member.environment,
            lambda: {where.partition: future.result().offset for where, future in member.admin.list_offsets(asked, isolation_level=IsolationLevel.READ_COMMITTED).items()},
        )
        return found

    return mock.patch.object(Member, "ends", ends)


def _asks_for_the_end_first() -> contextlib.AbstractContextManager[Any]:
    """Looks up the changelog's end first, then what the group has committed."""
    find = Takeover._find

    def ends_first(takeover: Takeover, until: float) -> None:
        known = takeover._changelog_ends(takeover.assigned)
        with mock.patch.object(takeover, "_changelog_ends", lambda _: known):
            find(takeover, until)

    return mock.patch.object(Takeover, "_find", ends_first)


def _owns_what_was_revoked() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Takeover, "_on_revoke", lambda *_: None)


class WritesTheStoreBeforeTheCommit(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        for number, overlay in batch.overlays.items():
            self.owned[number].store.settle(overlay.changes, None)
        super()._commit(batch)


class StepsBackwards(KafkaRunner):
    def _decide(self, overlay: Any, records: list[Record], budget: Any) -> Any:
        made, done = super()._decide(overlay, records[::-1], budget)
        return made, done


class DropsDeadLetters(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        batch.outputs = [output for output in batch.outputs if output.topic != self.config.dead_letter_topic]
        super()._commit(batch)


def _producer_kept_after_a_refusal() -> contextlib.AbstractContextManager[Any]:
    made = Transactions._new_producer
    return mock.patch.object(Transactions, "_new_producer", lambda transactions: transactions._producer if hasattr(transactions, "_producer") else made(transactions))


class RefusesTheWholeBatch(KafkaRunner):
    def _in_halves(self, taken: list[Record], refused: Any, why: Any, alone: int) -> None:
        self._transact(taken, why)


def _outputs_stamped_with_now() -> contextlib.AbstractContextManager[Any]:
    produce = Transactions._produce

    def now(transactions: Transactions, reports: Any, topic: str, value: bytes | None, key: bytes | None, partition: int | None, report: Any, headers: Any = (), _at: Any = None) -> None:
        produce(transactions, reports, topic, value, key, partition, report, headers)

    return mock.patch.object(Transactions, "_produce", now)


class FiresWithoutOffsets(KafkaRunner):
    def _fire(self) -> None:
        producer = self.transactions._producer
        send = producer.send_offsets_to_transaction
        with mock.patch.object(producer, "send_offsets_to_transaction", lambda _offsets, *rest: send([], *rest)):
            super()._fire()


def _what_the_queue_does_not_take_is_dropped() -> contextlib.AbstractContextManager[Any]:
    """Only half of a step stays in the transaction."""
    produce = Transactions._produce

    def dropping(transactions: Transactions, *arguments: Any, **place: Any) -> None:
        with mock.patch.object(transactions._producer, "poll", side_effect=InterruptedError), contextlib.suppress(InterruptedError):
            produce(transactions, *arguments, **place)

    return mock.patch.object(Transactions, "_produce", dropping)


class SkipsSendOffsets(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        with mock.patch.object(self.transactions._producer, "send_offsets_to_transaction", lambda *_: None):
            super()._commit(batch)


class LosesTheHold(WorkflowProcessor):
    def decide(self, state: Any, records: Sequence[Record], received_ms: int, budget: Any = None) -> Any:
        for record in records:
            if wire.header(record, "kwflow-op") in ("retry", "discard"):
                for key, _ in list(state.scan(b"\0hold\0" + (record.key or b"") + b"\0"))[1:]:
                    state.put(key, None)
        return super().decide(state, records, received_ms, budget)


def _fires_before_the_backlog() -> contextlib.AbstractContextManager[Any]:
    own = Takeover._own

    def owned(takeover: Takeover, numbers: list[int]) -> None:
        own(takeover, numbers)
        for number in takeover.owned.keys() & numbers:
            takeover.owned[number].fire_from = 0

    return mock.patch.object(Takeover, "_own", owned)


class FiresEarly(TimerProcessor):
    def due(self, state: Any, now_ms: int, limit: int) -> Any:
        return super().due(state, now_ms + 400, limit)


class ForgetsWhoStarted(WorkflowProcessor):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.ended.keep = lambda state, key, header: state.put(key, None)  # type: ignore[method-assign]


class ShortChangelogs(World):
    """cleanup.policy=delete: old records are deleted, even the last one of a key."""

    def compact(self) -> None:
        for partition in self.broker.topics[self.config.changelog_topic].partitions:
            partition.delete_before(partition.end - 5)


class Impatient(World):
    switches_max = 25_000


class Crowd(World):
    machines_min = 3
    rest_ms = 200_000


class Warm(Crowd):
    """Each engine keeps copies of the others' partitions, and tombstones are removed soon."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.age(4_000)
        for one in self.machines:
            one.settings = {"standby": True, "state_cleanup_s": 5}


@contextlib.contextmanager
def _local_forwarding() -> Iterator[None]:
    with mock.patch.object(kafka, "partition_of", lambda key, count: 0 if count == 1 else _Anything()):
        yield


class _Anything(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def _other_partitioner() -> contextlib.AbstractContextManager[Any]:
    made = topics.client_config
    return mock.patch.object(topics, "client_config", lambda config, **settings: made(config, **{**settings, "partitioner": "consistent_random"} if "transactional_id" in settings else settings))


def _copies_follow_undecided_transactions() -> contextlib.AbstractContextManager[Any]:
    follow = Standby.follow

    def followed(standby: Standby, numbers: set[int]) -> None:
        follow(standby, numbers)
        if standby._consumer is not None:
            standby._consumer._committed = False  # type: ignore[attr-defined]

    return mock.patch.object(Standby, "follow", followed)


def _promoted_copies_stay_open() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Standby, "give", lambda standby, number: standby.stores.pop(number, None))


def _copies_pass_tombstones() -> contextlib.AbstractContextManager[Any]:
    take = Standby._take
    return mock.patch.object(Standby, "_take", lambda standby, message, *rest: None if message.error() is None and message.value() is None else take(standby, message, *rest))


def _copies_never_age() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(PartitionStore, "is_too_old", lambda _: False)


def _open_copies_are_cleaned_up() -> contextlib.AbstractContextManager[Any]:
    look = Cleanup.look
    return mock.patch.object(Cleanup, "look", lambda cleanup, used: look(cleanup, set()))


def _newer_snapshots_are_taken() -> contextlib.AbstractContextManager[Any]:
    loads = versions.loads
    return mock.patch.object(versions, "loads", lambda body, code, sources, lowering: loads(body, code, sources, min(lowering, versions.LOWERING_VERSION)))


def _active_runs_are_forgotten() -> contextlib.AbstractContextManager[Any]:
    due = schedules.due
    return mock.patch.object(schedules, "due", lambda state, now_ms: due({**state, "active": {}}, now_ms))


def _last_loser_first() -> contextlib.AbstractContextManager[Any]:
    leave = Machine._leave
    return mock.patch.object(Machine, "_leave", lambda machine, combinator: leave(machine, combinator)[::-1])


def _nobody_is_told_of_the_end() -> contextlib.AbstractContextManager[Any]:
    def close(machine: Machine) -> None:
        machine.instance.status = CLOSING

    return mock.patch.object(Machine, "close", close)


def _failures_are_cancellations() -> contextlib.AbstractContextManager[Any]:
    answer = children.answer
    return mock.patch.object(children, "answer", lambda parent, id, outcome, *more: answer(parent, id, "cancelled" if outcome == "error" else outcome, *more))


def _no_attempts() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Attempts, "another", lambda _, number, records: (records, None))


# -- workers -----------------------------------------------------------------------------------------------------------
class HandsOutBeforeTheCommit(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        handed = [output for output in batch.outputs if output.topic in (QUEUE, MAIL)]
        batch.outputs = [output for output in batch.outputs if output.topic not in (QUEUE, MAIL)]
        producer = self.environment.producer({"partitioner": "murmur2_random"})
        for output in handed:
            with contextlib.suppress(BufferError):
                producer.produce(output.topic, output.value, output.key)
        producer.flush(10)
        super()._commit(batch)


@contextlib.contextmanager
def _positions_pass_open_calls() -> Iterator[None]:
    """Like a consumer that commits what it has read."""
    with mock.patch.object(Ledger, "position", property(lambda ledger: ledger.next)), mock.patch.object(Ledger, "_still_open", lambda _: ()):
        yield


def _notes_forget_what_is_open() -> contextlib.AbstractContextManager[Any]:
    still_open = Ledger._still_open
    return mock.patch.object(Ledger, "_still_open", lambda ledger: list(still_open(ledger))[:1])


def _given_back_as_if_done() -> contextlib.AbstractContextManager[Any]:
    give_back = QueueRunner._give_back

    def given(runner: QueueRunner, numbers: list[int], grace_s: float) -> None:
        for number in numbers:
            runner._owned[number].ledger._open.clear()
        give_back(runner, numbers, grace_s)

    return mock.patch.object(QueueRunner, "_give_back", given)


def _nothing_is_taken_back() -> contextlib.AbstractContextManager[Any]:
    read = queues.read
    return mock.patch.object(queues, "read", lambda record, topic: read(record, topic) if record.value is not None else None)


def _done_before_the_answer_is_there() -> contextlib.AbstractContextManager[Any]:
    deliver = QueueRunner._deliver

    def delivered(runner: QueueRunner, number: int, key: bytes, value: bytes, *rest: Any) -> None:
        runner.closing(key.decode(), json.loads(value)["ref"], number)()
        deliver(runner, number, key, value, *rest)

    return mock.patch.object(QueueRunner, "_deliver", delivered)


def _answers_close_what_came_later() -> contextlib.AbstractContextManager[Any]:
    close = OpenCalls.close
    return mock.patch.object(OpenCalls, "close", lambda calls, id, ref, before=None: close(calls, id, ref))


def _lent_calls_stay_free() -> contextlib.AbstractContextManager[Any]:
    fetch = Lent.fetch

    def fetched(lent: Lent, *arguments: Any) -> Any:
        found = fetch(lent, *arguments)
        lent._free.update({(call.workflow_id, call.ref): None for call in found})
        return found

    return mock.patch.object(Lent, "fetch", fetched)


def _locks_are_not_extended() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Lent, "extend", lambda lent, id, ref, *_: (id, ref) in lent._loans)


def _gateways_keep_what_has_left() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Lent, "disown", lambda lent, partition, grace_s=None: lent._owned.discard(partition))


def _notes_are_not_read() -> contextlib.AbstractContextManager[Any]:
    read = ledger._read
    return mock.patch.object(ledger, "_read", lambda position, note: (0, {}, read(position, note)[2]))


def _deaths_of_all_that_was_open() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Ledger, "suspected", lambda ledger, offset: ledger.died and offset in ledger._noted)


def _blames_what_came_after_a_death() -> contextlib.AbstractContextManager[Any]:
    made = OpenCalls.__init__

    def init(calls: OpenCalls, topic: str, number: int, position: int, note: str, end: int, care: bool = True) -> None:
        made(calls, topic, number, position, note, position + AHEAD_MAX, care)

    return mock.patch.object(OpenCalls, "__init__", init)


def _no_care() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(OpenCalls, "careful", property(lambda _: False))


def _held_when_given_back() -> contextlib.AbstractContextManager[Any]:
    note = Ledger.note
    return mock.patch.object(Ledger, "note", lambda ledger, held=True: note(ledger))


def _reads_what_is_undecided() -> contextlib.AbstractContextManager[Any]:
    made = topics.client_config
    undecided = {"isolation_level": "read_uncommitted"}
    return mock.patch.object(topics, "client_config", lambda config, **settings: made(config, **{**settings, **(undecided if settings.get("group_id") == WORKERS else {})}))


def _nobody_shares_orphans() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(QueueRunner, "_join_again", lambda _: None)


def _worker_asks_nobody() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(worker._Details, "look", lambda *_: lambda: None)


def _first_heartbeat_counts() -> contextlib.AbstractContextManager[Any]:
    really = ops.heartbeats
    return mock.patch.object(ops, "heartbeats", lambda header, given, now_ms: really(header, given, now_ms) if given.ref not in ops.heartbeats_of(header) else ops.heartbeats_of(header))


def _last_heartbeat_is_not_sent() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Heart, "flush", lambda *_: None)


class Cleans(World):
    """Many programs have cleanups that wait."""

    clean_shares = (0.6,)


def _cleanups_lose_what_they_wait_for() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Machine, "_cleaning", lambda self: {task for task in self.instance.tasks.values() if task.cancel_step})


class Slots(World):
    """Many programs have tasks that wait for each other."""

    slot_shares = (0.6,)


def _all_that_is_met_goes_on() -> contextlib.AbstractContextManager[Any]:
    def met(machine: Machine) -> bool:
        found = [(condition, outcome) for condition in machine.instance.conditions.values() if condition.waiters and (outcome := machine.host.ask(condition)) is not None]
        for condition, outcome in found:
            machine.settle(condition, *outcome)
        return bool(found)

    return mock.patch.object(Machine, "_met", met)


def _without_conditions(instance: Instance, graph: dict[str, Any], really: Any = Instance.set_graph) -> None:
    really(instance, graph)
    instance.conditions = {}


class GoesBack(World):
    rewind_shares = (0.3,)


def _nothing_is_given_up() -> contextlib.AbstractContextManager[Any]:
    really = ops.rewind
    return mock.patch.object(ops, "rewind", lambda header, *others: really({**header, "waits": []}, *others))


def _goes_back_too_far() -> contextlib.AbstractContextManager[Any]:
    really = copies._checkpoint
    return mock.patch.object(copies, "_checkpoint", lambda batch, name, header, number: really(batch, name, header, max(0, number - 1)))


PLANTED = [
    Planted("K1", "a new identity each start, so that the dead transaction is awaited", CRASHES_BEFORE_COMMITS, NewIdentityEachStart, world=Crowd, first=4),
    Planted("K2", "polls between the last consume and the commit, and asks who it is after that", ZOMBIES_IN_POLLS, PollsBeforeItCommits, world=Crowd, first=1),
    Planted("K3", "the overlay is kept after an abort", ABORTS, KeepsTheOverlayAfterAnAbort, first=1),
    Planted("K3", "a batch that was aborted is not read again from its first record", ABORTS, SeeksBehindTheBatchAfterAnAbort),
    Planted("K4", "an unknown outcome is taken for a failure, and the producer made anew in place", Faults(lost=0.1), patch=_begun_anew_after_a_timeout, first=2),
    Planted("K5", "restored up to the last stable offset only", SLOW_MARKERS, patch=_restored_to_the_stable_offset_only, world=Crowd),
    Planted("K5", "the changelog's end is asked for before the group's offset", ZOMBIES_WITH_HEIRS, patch=_asks_for_the_end_first, world=Crowd, first=10),
    Planted("K6", "another partitioner", Faults(), patch=_other_partitioner),
    Planted("K6", "a record on the wrong partition is applied there", Faults(), patch=_local_forwarding, first=8),
    Planted("K7", "what was revoked is still owned", REBALANCES, patch=_owns_what_was_revoked, world=Crowd),
    Planted("K8", "the local store is written before the commit", CRASHES_IN_COMMITS, WritesTheStoreBeforeTheCommit, first=8),
    Planted("K8", "a copy goes on where it stood although tombstones may be gone", Faults(freeze=0.004, compact=1.0), patch=_copies_never_age, world=Warm, first=4),
    Planted("K8", "a copy is deleted while it is open", Faults(kill=0.1), patch=_open_copies_are_cleaned_up, world=Warm),
    Planted("K5", "a copy follows transactions that are aborted", CRASHES_IN_COMMITS, patch=_copies_follow_undecided_transactions, world=Warm, first=9),
    Planted("K5", "a copy that is promoted stays open", Faults(kill=0.2, stop=0.2), patch=_promoted_copies_stay_open, world=Warm),
    Planted("K5", "a copy passes tombstones over", Faults(), patch=_copies_pass_tombstones, world=Warm),
    Planted("K9", "records are stepped backwards", Faults(slow=0.3), StepsBackwards),
    Planted("K10", "dead letters are logged and dropped", Faults(), DropsDeadLetters),
    Planted("K11", "the producer is kept after a refusal", Faults(), patch=_producer_kept_after_a_refusal, world=Impatient, first=6),
    Planted("K11", "all of a refused batch is parked", Faults(slow=0.3), RefusesTheWholeBatch, first=7),
    Planted("K12", "the changelog deletes what is old", Faults(kill=0.2, stop=0.2, wipe=3.0, compact=0.5), world=ShortChangelogs),
    Planted("K13", "outputs are stamped with now", Faults(), patch=_outputs_stamped_with_now),
    Planted("K14", "timers fire without an offset", Faults(), FiresWithoutOffsets),
    Planted("K15", "half of a step stays in its transaction", Faults(), patch=_what_the_queue_does_not_take_is_dropped, first=1),
    Planted("K16", "offsets are not part of the transaction", Faults(), SkipsSendOffsets),
    Planted("K17", "the hold is lost when it is drained", Faults(), engine=LosesTheHold, first=7),
    Planted("K18", "timers fire before the backlog is read", Faults(kill=0.3, stop=0.3), patch=_fires_before_the_backlog),
    Planted("K18", "timers fire early", Faults(), timers=FiresEarly, first=3),
    Planted("K19", "attempts are not counted", Faults(), world=Impatient, patch=_no_attempts, first=10),
    Planted("K20", "a start that ended is begun again by its repetition", Faults(), engine=ForgetsWhoStarted),
]

# Bugs in code that the runner and the model share, so that only outcomes that are known without both can reveal them (meaning.py).
SHARED = [
    Planted("G7", "what a newer kwflow saved is taken for its own", patch=_newer_snapshots_are_taken, first=4),
    Planted("G10", "an instance goes on in changed code", patch=lambda: mock.patch.object(versions, "changed_units", lambda *_: []), first=2),
    Planted("G10", "sources are not stored", patch=lambda: mock.patch.object(code, "offer", lambda *_: [])),
    Planted("M1", "a command that is repeated is done again", patch=lambda: mock.patch.object(messages, "applied_before", lambda *_: None)),
    Planted("M3", "a signal that a race did not take is lost", patch=lambda: mock.patch.object(machine, "give_back", lambda *_: []), first=10),
    Planted("semantics 1.5", "losers are cancelled in the wrong order", patch=_last_loser_first, first=3),
    Planted("semantics 1.5", "wait_rest waits for nobody", patch=lambda: mock.patch.object(Machine, "_joins", lambda *_: False), first=6),
    Planted("semantics 1.8", "a timer that is left is not cancelled", patch=lambda: mock.patch.dict(step._TELL, {"timer": lambda *_: None})),
    Planted("semantics 2.4", "what goes on when main has ended is not cancelled", patch=_nobody_is_told_of_the_end, first=7),
    Planted("semantics 2.4", "the end of main cancels what a cleanup waits for", world=Cleans, patch=_cleanups_lose_what_they_wait_for),
    Planted("0067", "all conditions that are met go on before any is looked at again", world=Slots, patch=_all_that_is_met_goes_on),
    Planted("0067", "conditions are forgotten when a workflow is restored", world=Slots, patch=lambda: mock.patch.object(Instance, "set_graph", _without_conditions), first=1),
    Planted("M5", "a parent is told that its child was cancelled when it failed", patch=_failures_are_cancellations, first=4),
    Planted("M6.5", "an answer that is held is forgotten by the next engine", Faults(kill=0.2), patch=lambda: mock.patch.object(parked, "_note_answer", lambda *_: None), first=32),
    Planted("M6", "activities are not tried again", patch=lambda: mock.patch.object(Retry, "pause_s", lambda *_: None), first=1),
    Planted("0063", "an attempt does not hand its heartbeat details on to the next", patch=lambda: mock.patch.dict(flows.attempts(True).__globals__, heartbeat_of=lambda _: None), first=1),
    Planted("0062", "what is waited for only now goes on when a workflow goes back", world=GoesBack, patch=_nothing_is_given_up, first=4),
    Planted("0062", "a workflow goes back to the state before the one that is meant", world=GoesBack, patch=_goes_back_too_far),
    Planted("schedules", "runs overlap although they must not", world=Impatient, patch=_active_runs_are_forgotten, first=4),
]

# Bugs in what workers do (M6.6).
HANDED_OUT = [
    Planted("M6.6", "calls are handed out before the commit", ABORTS, HandsOutBeforeTheCommit, world=Queued),
    Planted("M6.6", "a position passes open calls", patch=_positions_pass_open_calls, world=Queued),
    Planted("M6.6", "a note forgets what is open", patch=_notes_forget_what_is_open, world=Queued, first=2),
    Planted("M6.6", "what is open when a partition is given back is taken for done", Faults(stop=0.3, rebalance=0.2), patch=_given_back_as_if_done, world=Queued),
    Planted("M6.6", "what is taken back begins all the same", patch=_nothing_is_taken_back, world=Queued, first=1),
    Planted("M6.6", "a call is done before its answer is in the log", ABORTS, patch=_done_before_the_answer_is_there, world=Queued, first=1),
    Planted("M6.6", "what is done behind the position is begun again", Faults(kill=0.3), patch=_notes_are_not_read, world=Queued, first=2),
    Planted("M6.6", "calls of transactions that are aborted are begun", ABORTS, patch=_reads_what_is_undecided, world=Queued, first=2),
    Planted("M6.6", "an answer closes the call that is made again after it", LATE_REPORTS, patch=_answers_close_what_came_later, world=QueuedGoesBack, first=33),
    Planted("ET-6", "a call that is lent is lent to others", patch=_lent_calls_stay_free, world=Lends, first=3),
    Planted("ET-18", "a lock that was extended ends as before", patch=_locks_are_not_extended, world=Lends, first=7),
    Planted("M6.6", "a gateway lends calls of a partition that has left", Faults(stop=0.3, rebalance=0.2), patch=_gateways_keep_what_has_left, world=Lends, first=33),
    Planted("K7", "queues that nobody has stay so", Faults(crash=1.0, at="revoke"), patch=_nobody_shares_orphans, world=Handover, first=1),
    Planted("0063", "a worker asks nobody where to continue", patch=_worker_asks_nobody, world=Queued, first=1),
    Planted("0063", "heartbeats do not replace those before them", patch=_first_heartbeat_counts, world=Queued, first=6),
    Planted("0063", "an attempt fails before its last heartbeat is in the log", patch=_last_heartbeat_is_not_sent, world=Queued, first=5),
    Planted("K19", "all that was open when a worker died has failed", Faults(kill=0.2), patch=_deaths_of_all_that_was_open, world=Queued, first=4),
    Planted("K19", "a call that came after a death is blamed for it", Faults(kill=0.3), patch=_blames_what_came_after_a_death, world=Queued, first=2),
    Planted("K19", "nothing is marked after a death", patch=_no_care, world=Queued),
    Planted("K19", "who gives a partition back is taken for dead", Faults(stop=0.3), patch=_held_when_given_back, world=Queued, first=2),
]
