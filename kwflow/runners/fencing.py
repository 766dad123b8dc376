"""The transaction of an engine that died in it is ended by whoever takes its partitions over, not by its time-out (K1).

1. an engine is killed between `send_offsets_to_transaction` and the end of its commit
2. another one is given its partitions; their offsets, or the end of their changelogs, stay undecided
3. the broker ends the transaction only after `transaction.timeout.ms`: every instance there would stand still for so long

`init_transactions` with the dead one's id ends it at once, and fences that engine for good.  So it is done only to an
engine that is no member of the group any more, which owns nothing, and only while something does wait for it: one that was
merely slow, has finished its transaction, and joins again, is left alone.
"""

from __future__ import annotations

from confluent_kafka import KafkaException

from kwflow.runners.environment import Producer
from kwflow.runners.kafka_member import TRANSACTION_S, Member
from kwflow.runners.topics import told, transient

__all__ = ["Fencing"]

_AGAIN_S = 1.0
_ASK_S = 0.1  # the first request aborts; only the answer to its repetition, half a second later, says so, and nobody waits for that
_ANSWER_S = 5.0


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
