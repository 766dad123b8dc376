"""The transaction of an engine that died in it is ended by whoever takes its partitions over, not by its time-out (K1).

1. an engine is killed between `send_offsets_to_transaction` and the end of its commit
2. another one is given its partitions; their offsets, or the end of their changelogs, stay undecided
3. the broker ends the transaction only after `transaction.timeout.ms`: every instance there would stand still for so long

`init_transactions` with the dead one's id ends it at once, and fences that engine for good.  So it is done only to an
engine that is no member of the group any more, which owns nothing, and only while something does wait for it: one that was
merely slow, has finished its transaction, and joins again, is left alone.
"""

from __future__ import annotations

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition

from kwflow.errors import TransportError
from kwflow.runners.kafka.environment import Producer
from kwflow.runners.kafka.member import LATEST, TRANSACTION_S, Member
from kwflow.runners.kafka.topics import offset_of, partitions_of, told, transient

__all__ = ["Fencing", "Leftovers"]

_AGAIN_S = 1.0
_ASK_S = 0.1  # the first request aborts; only the answer to its repetition, half a second later, says so, and nobody waits for that
_ANSWER_S = 5.0
_LOOK_S = 1.0  # transactions of engines that live seldom take longer


class Fencing:
    """Remembers whom it has asked to be fenced, so that it is done once."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._next_s: dict[str, float] = {}
        self._asking: dict[str, Producer] = {}

    def end_transaction_of(self, engine: str) -> None:
        """Asked in each turn until what waits for it goes on; does nothing to an engine that may still commit it."""
        member, now = self._member, self._member.environment.monotonic()
        if engine not in self._asking:
            if engine == member.name or now < self._next_s.get(engine, 0.0):
                return
            self._next_s[engine] = now + _AGAIN_S
            if self._is_member(engine):
                return
            member.on_log(f"{member.group}: {engine} has left the group inside a transaction, which is aborted; should it still run, it ends")
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
        """Nothing waits any more: whoever starts under one of these names is not to be fenced by a request that goes on."""
        self._asking.clear()

    def _is_member(self, engine: str) -> bool:
        """Also when nobody knows: then its transaction ends by itself."""
        try:
            found = told(self._member.admin.describe_consumer_groups([self._member.group], request_timeout=_ANSWER_S)[self._member.group], _ANSWER_S)
        except KafkaException:
            return True
        return any(known.group_instance_id == engine for known in found.members)


class Leftovers:
    """Open transactions of engines that are gone, in topics where only readers wait for them.

    1. an engine is killed when some of its outputs are sent already, and its offsets and changelog are not
    2. nothing that the next owner needs is undecided, so it goes on
    3. readers of those outputs' partitions see nothing of what it does, until the transaction times out

    Whose transaction it is that keeps a partition undecided is not to be asked of the broker with this client.  One that is
    open in two looks is taken for that of an engine that went without giving back what it had.
    """

    def __init__(self, member: Member, fencing: Fencing) -> None:
        self._member = member
        self._fencing = fencing
        self._gone: set[str] = set()
        self._until_s = self._next_s = 0.0
        self._places: list[TopicPartition] = []
        self._seen: set[tuple[TopicPartition, int]] | None = None

    def suspect(self, engine: str) -> None:
        """It went without giving back a partition."""
        self._next_s, self._seen = self._member.environment.monotonic(), None
        self._until_s = self._next_s + 2 * TRANSACTION_S  # the broker has ended it by then
        self._gone.add(engine)

    def turn(self) -> bool:
        """Look now and then; whether there is anything left to look after."""
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
        """Partitions with an open transaction, and where it begins; None when the broker does not tell."""
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
