"""Partitions of one engine from their assignment to their loss: assigned, restored a slice at a time, owned (K2, K5, K7, K16).

Callbacks run inside poll and consume and only note what happened; `turn` does the work.  It must not know what is done
with the records of a partition that is owned.
"""

from __future__ import annotations

import contextlib

from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, KafkaException, TopicPartition

from kwflow.errors import TransportError
from kwflow.ports import Worker
from kwflow.runners import topics
from kwflow.runners.attempts import Attempts
from kwflow.runners.environment import Consumer
from kwflow.runners.fencing import Fencing, Leftovers
from kwflow.runners.kafka_code import take_over
from kwflow.runners.kafka_member import END_WAIT_MS, TRANSACTION_S, Member, again
from kwflow.runners.kafka_state import MOVED, POSITION, Partition, PartitionStore, Restore, agreed
from kwflow.runners.orphans import Orphans
from kwflow.runners.owners import Owner, Owners
from kwflow.runners.standby import Cleanup, Copies, Standby

__all__ = ["Takeover"]

_SLICE_S = 0.1  # K5: a restore never keeps the running partitions waiting for longer
_ANSWER_S = 0.05  # for an offset, if it is decided; who asks again hears of it earlier than who waits
_PATIENCE_S = 1.0
_STUCK_S = 0.1


class Takeover:
    """Invariant: a partition is in at most one of `assigned`, `restoring` (with the group's committed offset) and `owned`."""

    def __init__(self, member: Member, owners: Owners, attempts: Attempts, worker: Worker | None, age_max_ms: int) -> None:
        self.member = member
        self.owned: dict[int, Partition] = {}
        self.assigned: list[int] = []
        self.restoring: dict[int, tuple[Restore, int]] = {}
        self.joined = False
        self.generation = 0  # goes up with each rebalance that we are told of, an empty one included
        self._owners = owners
        self._former: dict[int, Owner | None] = {}  # who had what was assigned and is not owned yet
        self._stuck_since: dict[int, float] = {}
        self._fencing = Fencing(member)
        self._leftovers = Leftovers(member, self._fencing)
        self._attempts = attempts
        self._worker = worker
        self._age_max_ms = age_max_ms
        self._topic, changelog = member.processor.input_topic, member.processor.changelog_topic
        config, environment = member.config, member.environment
        self._incarnation = f"{member.incarnation} {topics.describe(member.admin, config, changelog)[0]}"  # a reset makes the changelog anew, and leaves the input as it is
        standby = Standby(changelog, self._changelog_consumer, self._store, lambda number: member.start(changelog, number))
        self.copies = Copies(standby if config.standby else None, member.partitions, Cleanup(environment, member.directory, config.state_cleanup_s), member.on_log)
        self.consumer = self._new_consumer()
        self._orphans = Orphans(member.admin, environment, member.group, self._topic, member.partitions)

    @property
    def busy(self) -> bool:
        """Whether there is something to restore."""
        return bool(self.assigned or self.restoring)

    # -- the group -------------------------------------------------------------------------------------------------
    def _new_consumer(self) -> Consumer:
        consumer = self.member.environment.consumer(
            self.member.settings(
                group_id=self.member.group, group_instance_id=self.member.name, enable_auto_commit=False, enable_auto_offset_store=False,
                isolation_level="read_committed", auto_offset_reset="error", partition_assignment_strategy="cooperative-sticky", session_timeout_ms=6000,
                heartbeat_interval_ms=500, fetch_queue_backoff_ms=10, enable_partition_eof=True,
            )
        )  # fmt: skip
        self._subscribe(consumer)
        return consumer

    def _subscribe(self, consumer: Consumer) -> None:
        consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _join_again(self) -> None:
        """Leave the group and join it, so that it shares all partitions anew; what is polled meanwhile is read again."""
        self.member.on_log(f"{self.member.group}: partitions of {self._topic} belong to nobody; joining again")
        self.consumer.unsubscribe()
        give_up = self.member.environment.monotonic() + TRANSACTION_S
        while (self.owned or self.busy) and self.member.environment.monotonic() < give_up:
            self.consumer.poll(0.1)
        if self.owned or self.busy:  # what was polled of these would be passed over
            raise TransportError(f"{self.member.group}: its partitions were not revoked within {TRANSACTION_S} s of leaving the group")
        self._subscribe(self.consumer)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.joined = True
        self.generation += 1
        for partition in partitions:  # any explicit offset: without one a group with no commit is an error before we seek
            partition.offset = OFFSET_BEGINNING
        consumer.incremental_assign(partitions)
        if partitions:
            consumer.pause(partitions)
            self.assigned += [partition.partition for partition in partitions]

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """A clean one: activities that run may end first, so that the next owner need not begin them again (M6.5)."""
        give_up = self.member.environment.monotonic() + self.member.config.activity_grace_s
        for partition in partitions:
            if self._worker is not None:
                self._worker.disown(partition.partition, max(0.0, give_up - self.member.environment.monotonic()))
        self._owners.withdraw([partition.partition for partition in partitions if not self._is_careful(partition.partition)])
        self._on_lost(consumer, partitions)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.generation += 1
        self._owners.forget([partition.partition for partition in partitions])
        for partition in partitions:
            if self._worker is not None:
                self._worker.disown(partition.partition)
            self._former.pop(partition.partition, None)
            self._stuck_since.pop(partition.partition, None)
            gone = self.owned.pop(partition.partition, None)
            if gone is not None:
                gone.store.close()
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
        """Restore what was assigned, a slice at a time, then read from the committed offset on."""
        self._ask_for_former()
        for number in list(self.assigned):
            self._begin_restore(number)
        until = self.member.environment.monotonic() + _SLICE_S
        for number, (restore, committed) in list(self.restoring.items()):
            reached = restore.reached
            if restore.slice(_SLICE_S / 2):
                del self.restoring[number]
                self._stuck_since.pop(number, None)
                self._own(number, restore.store, committed)
            elif restore.reached > reached:
                self._stuck_since.pop(number, None)
            elif self._is_stuck(number) and self._undecided(number) < restore.end:
                self._fence_former(number)
            if self.member.environment.monotonic() > until:
                break
        if not self._leftovers.turn() and not self._stuck_since:
            self._fencing.release()

    # -- what the last owner has left ------------------------------------------------------------------------------
    def _ask_for_former(self) -> None:
        new = [number for number in self.assigned if number not in self._former]
        if new:
            self._owners.read()
        for number in new:
            former = self._former[number] = self._owners.owner(number)
            if former is not None and former.engine != self.member.name:
                self._leftovers.suspect(former.engine)
            suspects = self._owners.attempt(number)
            if suspects is not None:
                self._attempts.learn(number, suspects)

    def _has_died(self, number: int) -> bool:
        """Whether who had this partition before went without giving it back, and our own directory knows nothing of it (K19)."""
        former = self._former.get(number)
        return former is not None and (former.engine != self.member.name or self._attempts.fresh)

    def _is_careful(self, number: int) -> bool:
        """Whether the record at fault may still lie ahead: then the next owner has to know of who died, and of what was counted."""
        partition = self.owned.get(number)
        return partition is not None and partition.position < partition.careful_until

    def _is_stuck(self, number: int) -> bool:
        """Whether this has waited for longer than an engine that lives would let it, and somebody had it before."""
        return self._waited_s(number) >= _STUCK_S and self._former.get(number) is not None

    def _waited_s(self, number: int) -> float:
        now = self.member.environment.monotonic()
        return now - self._stuck_since.setdefault(number, now)

    def _undecided(self, number: int) -> int:
        """Where the first transaction of its changelog begins that is open, or the end."""
        changelog = self.member.processor.changelog_topic
        found = topics.committed_ends(self.member.admin, changelog, [number])
        return found[number] if number in found else self.restoring[number][0].end

    def _fence_former(self, number: int) -> None:
        former = self._former.get(number)
        if former is not None:
            self._fencing.end_transaction_of(former.engine)

    def look_after(self) -> None:
        """Partitions that nobody has, warm copies, and copies that nobody needs."""
        if self._orphans.found():
            self._join_again()
        if self.joined:
            self.copies.turn({*self.owned, *self.restoring, *self.assigned})

    def _begin_restore(self, number: int) -> None:
        """First what the group has committed, then the changelog's end: the other order could miss the last transaction."""
        committed = self._committed(number, max(_SLICE_S / len(self.assigned), _ANSWER_S) if self._waited_s(number) < _PATIENCE_S else _PATIENCE_S)
        if committed is None:
            if self._is_stuck(number):
                self._fence_former(number)
            return
        self._stuck_since.pop(number, None)
        topic = self.member.processor.changelog_topic
        end, start = self._changelog_end(number), self.member.start(topic, number)
        self.copies.give(number)
        store = self._store(number)
        self.assigned.remove(number)
        self.restoring[number] = Restore(store, self._restore_consumer, topic, number, start, end), committed

    def _changelog_end(self, number: int) -> int:
        return self.member.end(self.member.processor.changelog_topic, number)

    def _committed(self, number: int, patience_s: float = _PATIENCE_S) -> int | None:
        """The group's offset; None while a transaction with offsets is open (asked again in the next turn, and for longer)."""
        try:
            return int(self.consumer.committed([TopicPartition(self._topic, number)], timeout=patience_s)[0].offset)
        except KafkaException as error:
            if topics.transient(error.args[0]):
                return None
            raise

    def _store(self, number: int) -> PartitionStore:
        member = self.member
        return PartitionStore(member.environment, member.directory / str(number), self._incarnation, member.clock, self._age_max_ms)

    def _changelog_consumer(self, **more: object) -> Consumer:
        settings = {"group_id": f"{self.member.group}-restore", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "error", "enable_partition_eof": True}
        return self.member.environment.consumer(self.member.settings(**settings, **more))

    def _restore_consumer(self) -> Consumer:
        """Told of the end at once: the broker would keep the request for half a second otherwise, and everybody waits for it."""
        return self._changelog_consumer(fetch_wait_max_ms=END_WAIT_MS)

    def _own(self, number: int, store: PartitionStore, committed: int) -> None:
        member, where = self.member, f"{self._topic}[{number}]"
        position = None if member.config.accept_offset_reset else agreed(store.get(POSITION), committed, member.incarnation, member.partitions, where)
        if position == MOVED:
            if self._committed(number) == committed:
                raise TransportError(f"{where}: the group's offset is {committed}, the state's is another: somebody reset one of them; --accept-offset-reset starts from the group's", retryable=False)
            store.close()  # this process stood still while another owner went on; it will hear of that, or restores again
            self.assigned.append(number)
            return
        begin = member.start(self._topic, number)
        if position is None:
            position = committed if committed != OFFSET_INVALID else begin
        if position < begin and not member.config.accept_offset_reset:
            raise TransportError(
                f"{where}: {position} would be next, and its log begins at {begin}: retention has deleted what was there, applied or not; --accept-offset-reset goes on from the begin",
                retryable=False,
            )
        take_over(member.processor, store, member.admin, member.config, where)
        end = member.end(self._topic, number)
        suspected = self._attempts.suspected_until(number)
        suspect = self._attempts.unclean or self._has_died(number) or suspected > position
        careful = min(end, max(suspected, position + member.config.batch_records_max)) if suspect else position
        self._former.pop(number, None)
        self._owners.announce(number)
        self.owned[number] = Partition(number, store, position, end, careful)
        self.seek(number, max(position, begin))
        self._resume(number)
        member.on_log(f"{member.group}: owns {where} from {position}")

    def _resume(self, number: int) -> None:
        """Fetched at once: librdkafka's thread of that broker, if it has nothing else to do, looks a second later; any request to it wakes it."""
        where = TopicPartition(self._topic, number)
        self.consumer.resume([where])
        with contextlib.suppress(KafkaException):
            self.consumer.get_watermark_offsets(where, timeout=_SLICE_S, cached=False)

    def seek(self, number: int, offset: int) -> None:
        """Read on from there; again while librdkafka says that it is not ready."""
        again(self.member.environment, lambda: self.consumer.seek(TopicPartition(self._topic, number, offset)))

    def close(self, clean: bool) -> None:
        """Leave the group, and let go of everything that is open; `clean` when nothing of it needs to be looked after."""
        if not clean:
            self._owners.forget([*self.owned])
        self.copies.close()
        self.consumer.close()
        for partition in self.owned.values():
            partition.store.close()
        for number in list(self.restoring):
            self._cancel_restore(number)
        self.owned.clear()
