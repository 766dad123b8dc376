"""Ending the open transaction of a dead engine: whoever takes its partitions over does it, instead of waiting for its timeout (K1).

1. An engine is killed between `send_offsets_to_transaction` and the end of its commit.
2. Another engine is given its partitions; their committed offsets, or the ends of their changelogs, stay undecided.
3. The broker ends the transaction only after `transaction.timeout.ms`; every instance there would stand still for that long.

`init_transactions` with the dead engine's id ends the transaction at once, and fences that engine for good.  So it is done
only to an engine that is no longer a member of the group, which therefore owns nothing, and only while something waits for the
transaction.  An engine that was merely slow, has finished its transaction and joins again is left alone.
"""

from __future__ import annotations

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition

from kwflow.errors import TransportError
from kwflow.runners.kafka.environment import Producer
from kwflow.runners.kafka.member import LATEST, TRANSACTION_S, Member
from kwflow.runners.kafka.topics import offset_of, partitions_of, transient

__all__ = ["Fencing", "Leftovers"]

_AGAIN_S = 1.0
_ASK_S = 0.1  # the first request aborts the transaction; only the repeated one, half a second later, confirms it, and nobody waits for that
_LOOK_S = 1.0  # transactions of live engines seldom take longer


class Fencing:
    """Ends transactions of dead engines, and remembers which engines it has fenced, so that it does so once."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._next_s: dict[str, float] = {}
        self._asking: dict[str, Producer] = {}

    def end_transaction_of(self, engine: str) -> None:
        """End an engine's open transaction.  Called in each turn until what waits for it goes on; does nothing to an engine that may still commit it."""
        member, now = self._member, self._member.environment.monotonic()
        if engine not in self._asking:
            if engine == member.name or now < self._next_s.get(engine, 0.0):
                return
            self._next_s[engine] = now + _AGAIN_S
            present = member.present()
            if present is None or engine in present:  # without an answer: its transaction then ends by its timeout
                return
            member.on_log(f"{member.group}: {engine} has left the group inside a transaction, which is aborted; if it is still running, it ends")
            settings = member.settings(transactional_id=engine, transaction_timeout_ms=TRANSACTION_S * 1000, retry_backoff_ms=1, retry_backoff_max_ms=100)
            self._asking[engine] = member.environment.producer(settings)
        try:
            self._asking[engine].init_transactions(_ASK_S)
        except KafkaException as error:
            if transient(error.args[0]):
                return
            member.on_log(f"{member.group}: the transaction of {engine} could not be ended: {error.args[0].str()}")
        del self._asking[engine]
        self._next_s[engine] = now + TRANSACTION_S

    def release(self) -> None:
        """Drop all requests, as nothing waits any more: an engine that starts under one of these names must not be fenced by one of them."""
        self._asking.clear()


class Leftovers:
    """Open transactions of engines that are gone, in topics where only readers wait for them.

    1. An engine is killed when some of its outputs are sent, but not its offsets and changelog entries.
    2. Nothing that the next owner needs is undecided, so it goes on.
    3. Readers of the partitions with those outputs see nothing of what the next owner writes, until the transaction times out.

    This client cannot ask the broker whose transaction keeps a partition undecided.  A transaction that is open in two looks
    is taken for that of an engine that went without giving its partitions back.
    """

    def __init__(self, member: Member, fencing: Fencing) -> None:
        self._member = member
        self._fencing = fencing
        self._gone: set[str] = set()
        self._until_s = self._next_s = 0.0
        self._places: list[TopicPartition] = []
        self._seen: set[tuple[TopicPartition, int]] | None = None

    def suspect(self, engine: str) -> None:
        """Note that an engine went without giving a partition back."""
        self._next_s, self._seen = self._member.environment.monotonic(), None
        self._until_s = self._next_s + 2 * TRANSACTION_S  # the broker has ended it by then
        self._gone.add(engine)

    def turn(self) -> bool:
        """Look now and then; true while there is something left to look after."""
        now = self._member.environment.monotonic()
        if not self._gone or now < self._next_s:
            return bool(self._gone)
        self._next_s = now + _LOOK_S
        undecided, seen = self._undecided(), self._seen
        self._seen = undecided
        if undecided and seen and undecided & seen:
            for engine in self._gone:
                self._fencing.end_transaction_of(engine)
        if now > self._until_s or undecided == set() or (undecided and seen is not None and not undecided & seen):
            self._gone.clear()
        return bool(self._gone)

    def _undecided(self) -> set[tuple[TopicPartition, int]] | None:
        """The partitions with an open transaction, each with the offset where it begins; None if the broker does not answer."""
        member = self._member
        try:
            if not self._places:
                there = partitions_of(member.admin, member.config)
                self._places = [TopicPartition(topic, number) for topic in member.written for number in range(there.get(topic, 0))]
            stable, ends = (self._ends(level) for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED))
        except (KafkaException, TransportError):
            return None
        return {(place, offset) for place, offset in stable.items() if offset < ends[place]}

    def _ends(self, level: IsolationLevel) -> dict[TopicPartition, int]:
        asked = self._member.admin.list_offsets(dict.fromkeys(self._places, LATEST), isolation_level=level, request_timeout=2)
        return {place: offset_of(future, 2) for place, future in asked.items()}
