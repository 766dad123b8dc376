"""The partitions of one engine, from their assignment to their loss: assigned, restored a slice at a time, owned (K2, K5, K7, K16).

Callbacks run inside poll and consume and only note what happened; `turn` does the work.  This module must not know what is
done with the records of an owned partition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, KafkaException, TopicPartition

from kwflow.errors import TransportError
from kwflow.ports import Worker
from kwflow.runners.attempts import Attempts
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.agreement import Agreement
from kwflow.runners.kafka.code import take_over
from kwflow.runners.kafka.environment import Consumer
from kwflow.runners.kafka.fencing import Fencing, Leftovers
from kwflow.runners.kafka.foreign import Foreign
from kwflow.runners.kafka.member import END_WAIT_MS, TRANSACTION_S, Member, again
from kwflow.runners.kafka.orphans import Orphans
from kwflow.runners.kafka.owners import Owner, Owners
from kwflow.runners.kafka.standby import Cleanup, Copies, Standby
from kwflow.runners.kafka.state import MOVED, POSITION, NoStore, Partition, PartitionStore, Position, Restore, agreed, importing, position_of
from kwflow.runners.moved import moves_in

__all__ = ["Takeover"]

_SLICE_S = 0.1  # K5: a restore keeps the running partitions waiting no longer than this, plus the last action that it began
_ANSWER_S = 0.05  # for a committed offset that is decided; to ask again gives an answer earlier than to wait
_PATIENCE_S = 1.0
_STUCK_S = 0.1
_WAKE_S = 0.01
_IDLE_S = 0.25
_PAUSE_S = 0.02  # until a restore that waits for the broker is looked at again


class Takeover:
    """Takes partitions over and gives them back.

    Invariant: a partition is in at most one of `assigned`, `restoring` (with the group's committed offset) and `owned`.
    `found` has, for assigned partitions, the group's committed offset, and the changelog's begin and end, which were looked up after it.
    """

    def __init__(self, member: Member, owners: Owners, attempts: Attempts, worker: Worker | None, age_max_ms: int) -> None:
        self.member = member
        self.owned: dict[int, Partition] = {}
        self.assigned: list[int] = []
        self.restoring: dict[int, tuple[Restore, int]] = {}
        self.found: dict[int, tuple[int, int, int]] = {}
        self._leaving: dict[int, PartitionStore | NoStore] = {}  # stores that are still open, of partitions that are no longer ours
        self.wait_s = _IDLE_S  # how long the main loop may wait for records
        self.joined = False
        self.generation = 0  # incremented with each rebalance that we are told of, even an empty one
        self._owners = owners
        self._agreement = Agreement(member)
        owners.choices = tuple(self._agreement.choices.items())
        self._former: dict[int, Owner | None] = {}  # the last owners of partitions that are assigned or restoring
        self._stuck_since: dict[int, float] = {}
        self.foreign = None if member.processor.changelog_topic else Foreign(member)
        self._fencing = Fencing(member)
        self._leftovers = Leftovers(member, self._fencing)
        self._attempts = attempts
        self._worker = worker
        self._age_max_ms = age_max_ms
        self._topic, changelog = member.processor.input_topic, member.processor.changelog_topic
        self._partitions = member.partitions
        config, environment = member.config, member.environment
        if changelog:
            self._incarnation = f"{member.incarnation} {member.changelog}"  # both ids, as a reset creates the changelog anew and leaves the input as it is
        standby = Standby(changelog, self._changelog_consumer, self._store, lambda numbers: member.starts(changelog, numbers), member.encryption)
        self.copies = Copies(standby if config.standby and changelog else None, member.partitions, Cleanup(environment, member.directory, config.state_cleanup_s), member.on_log)
        self.consumer = self._new_consumer()
        self._orphans = Orphans(member.admin, environment, member.group, {self._topic: member.partitions})

    @property
    def busy(self) -> bool:
        """Whether there is something to restore."""
        return bool(self.assigned or self.restoring)

    # -- the group -------------------------------------------------------------------------------------------------
    def _new_consumer(self) -> Consumer:
        consumer = self.member.environment.consumer(
            self.member.settings(
                group_id=self.member.group, group_protocol="classic", group_instance_id=self.member.name, enable_auto_commit=False, enable_auto_offset_store=False,
                isolation_level="read_committed", auto_offset_reset="error", partition_assignment_strategy="cooperative-sticky", session_timeout_ms=6000,
                heartbeat_interval_ms=500, fetch_queue_backoff_ms=10, enable_partition_eof=True,
            )
        )  # fmt: skip
        self._subscribe(consumer)
        return consumer

    def _subscribe(self, consumer: Consumer) -> None:
        consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _join_again(self, why: str) -> None:
        """Leave the group and join it again, so that it reassigns all partitions.  Records that are polled meanwhile are read again."""
        self.member.on_log(f"{self.member.group}: {why}; rejoining")
        self.consumer.unsubscribe()
        give_up = self.member.environment.monotonic() + TRANSACTION_S
        while (self.owned or self.busy) and self.member.environment.monotonic() < give_up:
            self.consumer.poll(0.1)
        if self.owned or self.busy:  # records of these that were polled here would be skipped
            raise TransportError(f"{self.member.group}: its partitions were not revoked within {TRANSACTION_S} s of leaving the group")
        self._subscribe(self.consumer)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.joined = True
        self.generation += 1
        for partition in partitions:  # any explicit offset will do: without one, a group with no commit would be an error before we seek
            partition.offset = OFFSET_BEGINNING
        consumer.incremental_assign(partitions)
        if partitions:
            consumer.pause(partitions)
            self.assigned += [partition.partition for partition in partitions]

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Give partitions back cleanly: running activities may end first, so that the next owner need not begin them again (M6.5)."""
        give_up = self.member.environment.monotonic() + self.member.config.activity_grace_s
        for partition in partitions:
            if self._worker is not None:
                self._worker.disown(partition.partition, max(0.0, give_up - self.member.environment.monotonic()))
        self._owners.withdraw([partition.partition for partition in partitions if not self._is_careful(partition.partition)])
        self._drop(partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._orphans.look_again()
        self._drop(partitions)

    def _drop(self, partitions: list[TopicPartition]) -> None:
        self.generation += 1
        self._owners.forget([partition.partition for partition in partitions])
        for partition in partitions:
            if self._worker is not None:
                self._worker.disown(partition.partition)
            self._former.pop(partition.partition, None)
            self._stuck_since.pop(partition.partition, None)
            gone = self.owned.pop(partition.partition, None)
            if gone is not None:  # closed later: closing a store takes 0.01 s, and the next owner of a partition would wait for all of them
                gone.store.leave()
                self._leaving[partition.partition] = gone.store
            self.found.pop(partition.partition, None)
            if partition.partition in self.assigned:
                self.assigned.remove(partition.partition)
            if partition.partition in self.restoring:
                self._cancel_restore(partition.partition)

    def _cancel_restore(self, number: int) -> None:
        restore, _ = self.restoring.pop(number)
        restore.close()
        restore.store.close()

    # -- restore, then own -----------------------------------------------------------------------------------------
    def turn(self) -> None:
        """Restore assigned partitions, a slice at a time, then read them from the committed offset on."""
        if self.foreign is not None:
            self.foreign.check_now_and_then(lambda: self._committed([*self.owned], _ANSWER_S).values())
            self._count_again(self.foreign)
        self._ask_for_former()
        until = self.member.environment.monotonic() + _SLICE_S
        moved = self._restore(until)
        self._find(until)
        moved = moved or bool(self.found)
        self._begin(until)
        self._leave(until)
        self.wait_s = 0.0 if moved else _PAUSE_S if self.busy else _IDLE_S
        if not self._leftovers.turn() and not self._stuck_since:
            self._fencing.release()

    def _count_again(self, foreign: Foreign) -> None:
        """Count the partitions of somebody else's topic again, as it may get more.

        If it was created anew with fewer, a restarted member is still assigned the partitions that it had before, and must join again.
        """
        if max(self.assigned, default=0) < self._partitions:
            return
        self._partitions = foreign.count()
        if max(self.assigned) >= self._partitions:
            self._join_again(f"{self._topic} has only {self._partitions} partitions now")

    def _restore(self, until: float) -> bool:
        """Continue the restores; true if one of them made progress."""
        finished, stuck, moved = [], [], False
        for number, (restore, _) in list(self.restoring.items()):
            reached = restore.reached
            if restore.slice(0):
                finished.append(number)
            elif restore.reached > reached:
                moved = True
                self._stuck_since.pop(number, None)
            elif self._is_stuck(number):
                stuck.append(number)
            if self.member.environment.monotonic() > until:
                break
        if finished:
            self._own(finished)
        for number, undecided in topics.committed_ends(self.member.admin, self.member.processor.changelog_topic, stuck).items():
            if undecided < self.restoring[number][0].end:  # the first open transaction in its changelog begins there
                self._fence_former(number)
        return moved or bool(finished)

    def _find(self, until: float) -> None:
        """Look up what the group has committed, and after that the changelogs' ends: the other order could miss the last transaction."""
        unknown = [number for number in self.assigned if number not in self.found]
        fresh = [number for number in unknown if number not in self._stuck_since]
        self._stuck_since |= dict.fromkeys(fresh, self.member.environment.monotonic())
        committed = self._committed(fresh, _ANSWER_S)
        for number in [number for number in unknown if number not in fresh]:
            found = self._committed([number], min(_PATIENCE_S, max(_ANSWER_S, self._waited_s(number) / 10)))
            committed |= found
            if not found:
                self.assigned.remove(number)  # the next turn asks about the others first
                self.assigned.append(number)
                if self._is_stuck(number):
                    self._fence_former(number)
            if self.member.environment.monotonic() > until:
                break
        if committed:
            topic = self.member.processor.changelog_topic
            if topic and not self.is_same_changelog():
                return  # the broker does not answer that now; the next turn asks again
            ends, starts = (self._changelog_ends(committed), self.member.starts(topic, committed)) if topic else (dict.fromkeys(committed, 0),) * 2
            for number, offset in committed.items():
                self._stuck_since.pop(number, None)
                self.found[number] = offset, starts[number], ends[number]

    def _begin(self, until: float) -> None:
        """Begin restores until the time is over.  Opening a store takes 0.03 s on an idle disk, and cannot be split."""
        for number in list(self.found):
            committed, start, end = self.found.pop(number)
            self.copies.give(number)
            store = self._store(number) if self.member.processor.changelog_topic else NoStore()
            self.assigned.remove(number)
            self.restoring[number] = Restore(store, self._restore_consumer, self.member.processor.changelog_topic, number, start, end, self.member.encryption), committed
            if self.member.environment.monotonic() > until:
                break

    def _leave(self, until: float) -> None:
        for number in list(self._leaving):
            self._leaving.pop(number).close()
            if self.member.environment.monotonic() > until:
                break

    # -- what the last owner has left ------------------------------------------------------------------------------
    def _ask_for_former(self) -> None:
        new = [number for number in self.assigned if number not in self._former]
        if new:
            self._owners.read()
            self._agreement.check(self._owners.others())
        for number in new:
            former = self._former[number] = self._owners.owner(number)
            if former is not None and former.engine != self.member.name:
                self._leftovers.suspect(former.engine)
            suspects = self._owners.attempt(number)
            if suspects is not None:
                self._attempts.learn(number, suspects)

    def _owner_died(self, number: int) -> bool:
        """Whether the last owner went without giving this partition back, and our own directory knows nothing about that (K19)."""
        former = self._former.get(number)
        return former is not None and (former.engine != self.member.name or self._attempts.fresh)

    def _is_careful(self, number: int) -> bool:
        """Whether the record at fault may still lie ahead: then the next owner must learn who died, and how many deaths were counted."""
        partition = self.owned.get(number)
        return partition is not None and partition.position < partition.careful_until

    def _is_stuck(self, number: int) -> bool:
        """Whether this partition has waited for longer than a live engine would make it wait, and had an owner before."""
        return self._waited_s(number) >= _STUCK_S and self._former.get(number) is not None

    def _waited_s(self, number: int) -> float:
        now = self.member.environment.monotonic()
        return now - self._stuck_since.setdefault(number, now)

    def _fence_former(self, number: int) -> None:
        former = self._former.get(number)
        if former is not None:
            self._fencing.end_transaction_of(former.engine)

    def is_same_changelog(self) -> bool:
        """Whether the broker has the changelog that this engine knows; false if it does not tell.  Raises TransportError if it is another topic.

        1. The changelog is deleted and created again while engines run, or are idle.
        2. They continue with their local copies, and write only what changes.
        3. The next owner restores from that alone: all instances that slept meanwhile are lost, and nobody has reported it.
        """
        try:
            found = topics.describe(self.member.admin, self.member.config, self.member.processor.changelog_topic)[0]
        except TransportError:
            return False
        self._check_changelog(found)
        return True

    def _check_changelog(self, id: str) -> None:
        """Raises TransportError unless this is the id of the changelog that this engine knows."""
        if id != self.member.changelog:
            raise TransportError(
                f"{self.member.processor.changelog_topic} was deleted and created again: the instances or timers that it held are gone from the broker. "
                "--accept-offset-reset starts with what it holds now",
                retryable=False,
            )

    def look_after(self) -> None:
        """Look after partitions without an owner, warm copies, and copies that nobody needs."""
        if self._orphans.found():
            self._join_again(f"partitions of {self._topic} belong to nobody")
        if self._orphans.strangers:  # perhaps they were started together with this one, and neither saw the other's entry
            self._orphans.strangers = False
            self._owners.read()
            self._agreement.check(self._owners.others())
        if self.joined:
            self.copies.turn({*self.owned, *self.restoring, *self.assigned, *self._leaving})

    def _changelog_ends(self, numbers: Iterable[int]) -> dict[int, int]:
        return self.member.ends(self.member.processor.changelog_topic, numbers)

    def _committed(self, numbers: list[int], patience_s: float = _PATIENCE_S) -> dict[int, int]:
        """The group's committed offsets; empty while an open transaction contains the offset of one of them.  The next turn asks again, for longer."""
        try:
            found = self.consumer.committed([TopicPartition(self._topic, number) for number in numbers], timeout=patience_s) if numbers else []
        except KafkaException as error:
            if topics.transient(error.args[0]):
                return {}
            raise
        failed = next((where.error for where in found if where.error is not None and not topics.transient(where.error)), None)
        if failed is not None:
            raise KafkaException(failed)
        return {where.partition: self._noted(where) if self.foreign is None else self.foreign.noted(where) for where in found if where.error is None}

    def _noted(self, where: TopicPartition) -> int:
        """The offset, which was committed with the id of the changelog then (by an older kwflow without).  Raises TransportError if that was another topic."""
        if where.metadata and not self.member.config.accept_offset_reset:
            self._check_changelog(where.metadata)
        return where.offset

    def _store(self, number: int) -> PartitionStore:
        member = self.member
        if number in self._leaving:
            self._leaving.pop(number).close()
        return PartitionStore(member.environment, member.directory / str(number), self._incarnation, member.clock, self._age_max_ms)

    def _changelog_consumer(self, **more: object) -> Consumer:
        settings = {"group_id": f"{self.member.group}-restore", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "error", "enable_partition_eof": True}
        return self.member.environment.consumer(self.member.settings(**settings, **more))

    def _restore_consumer(self) -> Consumer:
        """Create a consumer that learns of the end at once: otherwise the broker would hold the request for half a second, while everybody waits for it."""
        return self._changelog_consumer(fetch_wait_max_ms=END_WAIT_MS)

    def _own(self, numbers: list[int]) -> None:
        """Take ownership of these restored partitions."""
        member, ready = self.member, dict[int, Partition]()
        begins, ends = member.starts(self._topic, numbers), member.ends(self._topic, numbers)
        for number in numbers:
            (restore, committed), where, begin, end = self.restoring[number], f"{self._topic}[{number}]", begins[number], ends[number]
            store = restore.store
            known = self._position_of(store, where)
            if importing(known) is not None:
                raise TransportError(f"{where}: an archive was imported only in part; finish it with the same kwflow import, or begin anew with kwflow reset", retryable=False)
            position = None if member.config.accept_offset_reset else agreed(known, committed, member.incarnation, member.partitions, where)
            if position == MOVED:
                if self._committed([number]) == {number: committed}:
                    raise TransportError(
                        f"{where}: the group's offset is {committed}, the state's is another: somebody reset one of them. "
                        f"Delete the offsets of the group {member.group} to continue where the state is; "
                        "--accept-offset-reset starts from the group's offset: records that it skips are lost, and workflows that have ended and been forgotten start again",
                        retryable=False,
                    )
                self._cancel_restore(number)  # this process was suspended while another owner went on: it will be told of the loss, or restores again
                self.assigned.append(number)
                continue
            if position is None:
                position = committed if committed != OFFSET_INVALID else begin
            if self.foreign is not None:
                position = self.foreign.read_on_from(number, position, begin, end)
            if position < begin and not member.config.accept_offset_reset:
                raise TransportError(
                    f"{where}: the next offset is {position}, but the log begins at {begin}: retention has deleted records, applied or not; --accept-offset-reset continues from the beginning",
                    retryable=False,
                )
            take_over(member.processor, store, member.admin, member.config, where)
            suspected = self._attempts.suspected_until(number)
            suspect = self._attempts.unclean or self._owner_died(number) or suspected > position
            careful = min(end, max(suspected, position + member.config.batch_records_max)) if suspect else position
            anew = known is not None and known.topic != member.incarnation
            ready[number] = Partition(number, store, position, end, careful, moves=moves_in(store) + 1 if anew else None)
        self._owners.announce(ready)
        for number, partition in ready.items():
            del self.restoring[number]
            self._former.pop(number, None)
            self._stuck_since.pop(number, None)
            self.owned[number] = partition
            self.seek(number, max(partition.position, begins[number]))
        self._resume(ready)
        for number, partition in ready.items():
            member.on_log(f"{member.group}: owns {self._topic}[{number}] from {partition.position}")

    def _position_of(self, store: PartitionStore | NoStore, where: str) -> Position | None:
        """The position beside the state; None if there is none, or if nobody can read it and that is accepted.  Raises TransportError."""
        try:
            return position_of(store.get(POSITION), where)
        except TransportError:
            if not self.member.config.accept_offset_reset:
                raise
            return None

    def _resume(self, numbers: Iterable[int]) -> None:
        """Resume these partitions, and make librdkafka fetch them at once.

        An idle broker thread of librdkafka looks for new work only after a second, but any request to its broker wakes it.  All partitions are resumed
        before that request: a fetch of only some of them may be held by their leader for half a second, and later requests to it would wait behind that.
        """
        where = [TopicPartition(self._topic, number, 0) for number in numbers]
        self.consumer.resume(where)
        with contextlib.suppress(KafkaException):
            self.consumer.offsets_for_times(where, timeout=_WAKE_S)

    def seek(self, number: int, offset: int) -> None:
        """Continue reading at an offset; repeated while librdkafka is not ready."""
        again(self.member.environment, lambda: self.consumer.seek(TopicPartition(self._topic, number, offset)))

    def close(self, clean: bool) -> None:
        """Leave the group, and close everything that is open.  `clean` says that the next owners need not look after anything."""
        if not clean:
            self._owners.forget([*self.owned])
        self.copies.close()
        if not self.joined:
            # 1. A process is asked to end while it joins, and `close` ends librdkafka's thread for the group.
            # 2. The broker's answer, which was under way, is an assignment, and calls the callback.
            # 3. The callback makes a request to the thread that has ended, and waits forever while it holds the GIL (librdkafka #4041).
            self.consumer.unsubscribe()
            self.consumer.poll(0)
        self.consumer.close()
        for store in (*self._leaving.values(), *(partition.store for partition in self.owned.values())):
            store.close()
        for number in list(self.restoring):
            self._cancel_restore(number)
        self._leaving.clear()
        self.owned.clear()
