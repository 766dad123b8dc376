"""`<app>-owners`: which engine owns which partition, at which address it answers, and at which record it may die (K1, K19).

This is a compacted topic with one partition.  An engine writes to it outside of transactions, before it does anything with
a partition that it took over.  Entries may be outdated: whoever acts on one asks the group, or the engine itself, whether it
still holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from kwflow.runners.attempts import Suspects
from kwflow.runners.kafka.environment import Consumer, Producer
from kwflow.runners.kafka.member import END_WAIT_MS, TRANSACTION_S, Member
from kwflow.runners.kafka.reading import gather
from kwflow.runners.kafka.topics import transient

__all__ = ["Attempt", "Owner", "Owners", "owner_key"]

_ATTEMPTS = b"/attempts"
_TIMEOUT_S = 5.0  # then an engine goes on without this topic: its takeovers are slower, and others do not find it
_GOODBYE_S = 1.0
_QUIET_S = 60.0  # after a failure nothing waits for this topic for so long: otherwise every record that is taken with care would wait for it


_T = TypeVar("_T")


class Owner(msgspec.Struct, frozen=True):
    """The owner of a partition.

    `engine` is its `transactional.id` and `group.instance.id`; `address` is HOST:PORT if it answers over HTTP; `since` is in ms since the epoch.
    `group` and `choices` (agreement.py) are empty if an earlier version wrote it.
    """

    engine: str
    address: str | None
    since: int
    group: str = ""
    choices: tuple[tuple[str, str], ...] = ()


class Attempt(msgspec.Struct, frozen=True):
    """Suspects (attempts.py) among the records of the topic whose id is `topic`."""

    topic: str
    offset: int
    count: int
    until: int


def owner_key(topic: str, number: int) -> bytes:
    """The key of the entry for a partition of an input topic."""
    return f"{topic}/{number}".encode()


class Owners:
    """One engine's view of the topic.  Nothing here raises if the broker does not answer."""

    def __init__(self, member: Member) -> None:
        self.address: str | None = None
        self.choices: tuple[tuple[str, str], ...] = ()
        self._member = member
        self._topic = member.config.owners_topic
        self._entries: dict[bytes, bytes] = {}
        self._announced: set[int] = set()
        self._made: Producer | None = None
        self._quiet_until = 0.0

    # -- what is there ---------------------------------------------------------------------------------------------
    def read(self) -> None:
        """Read the topic to its present end.  If that fails, the entries stay as they are."""
        environment = self._member.environment
        settings = {"group_id": f"{self._member.group}-owners", "enable_auto_commit": False, "auto_offset_reset": "earliest", "enable_partition_eof": True, "fetch_wait_max_ms": END_WAIT_MS}
        consumer = environment.consumer(self._member.settings(**settings))
        latest: dict[bytes, bytes] = {}
        try:
            consumer.assign([TopicPartition(self._topic, 0, 0)])
            patience_s = _GOODBYE_S if self._quiet else _TIMEOUT_S
            give_up = environment.monotonic() + patience_s
            while not self._take(consumer, latest):
                if environment.monotonic() > give_up:
                    self._complain(f"no answer within {patience_s:g} s")
                    return
        except KafkaException as error:
            self._complain(error.args[0].str())
            return
        finally:
            consumer.close()
        self._entries = {key: value for key, value in latest.items() if value}

    def _take(self, consumer: Consumer, latest: dict[bytes, bytes]) -> bool:
        """Take what has arrived; true once the end is reached.  Raises KafkaException."""
        for message in gather(consumer, 1000, 0.05):
            error = message.error()
            if error is None:
                latest[message.key() or b""] = message.value() or b""
            elif error.code() == KafkaError._PARTITION_EOF:
                return True
            elif not transient(error):
                raise KafkaException(error)
        return False

    def owner(self, number: int) -> Owner | None:
        """The last owner, if it did not give the partition back."""
        return self._decoded(owner_key(self._member.processor.input_topic, number), Owner)

    def others(self) -> Iterator[tuple[str, Owner]]:
        """Each entry of another engine, with the topic that it is about."""
        for key in self._entries:
            owner = None if key.endswith(_ATTEMPTS) else self._decoded(key, Owner)
            if owner is not None and owner.engine != self._member.name:
                yield key.rpartition(b"/")[0].decode("utf-8", "replace"), owner

    def attempt(self, number: int) -> Suspects | None:
        """The records that may have killed the last owner; None if there are none."""
        found = self._decoded(self._attempt_key(number), Attempt)
        return Suspects(found.offset, found.count, found.until) if found is not None and found.topic == self._member.incarnation else None

    def _decoded(self, key: bytes, kind: type[_T]) -> _T | None:
        try:
            return msgspec.json.decode(self._entries[key], type=kind) if key in self._entries else None
        except msgspec.DecodeError:
            return None

    # -- what we say -----------------------------------------------------------------------------------------------
    def announce(self, numbers: Iterable[int]) -> None:
        """Announce that these partitions are ours.  Returns once the broker has it, so that the next owner knows whose transaction may be open."""
        for number in numbers:
            self._announced.add(number)
            owner = Owner(self._member.name, self.address, self._member.clock.now_ms(), self._member.group, self.choices)
            self._write(owner_key(self._member.processor.input_topic, number), msgspec.json.encode(owner))
        self._flush(_TIMEOUT_S)

    def withdraw(self, numbers: list[int]) -> None:
        """Remove the entries of partitions that are given back with nothing open: the next owner need not look after anything."""
        mine = self._announced.intersection(numbers)
        for number in sorted(mine):
            self._write(owner_key(self._member.processor.input_topic, number), None)
            self._write(self._attempt_key(number), None)
        self._announced -= mine
        if mine:
            self._flush(_GOODBYE_S)

    def forget(self, numbers: list[int]) -> None:
        """Forget partitions that were lost, without a write: another engine may have written its name already."""
        self._announced.difference_update(numbers)

    def attempted(self, number: int, suspects: Suspects | None) -> None:
        """Note the records of a step that may kill this process, before the step; None removes the note."""
        self._write(self._attempt_key(number), msgspec.json.encode(Attempt(self._member.incarnation, suspects.offset, suspects.count, suspects.until)) if suspects else None)
        self._flush(_TIMEOUT_S)

    def _attempt_key(self, number: int) -> bytes:
        return owner_key(self._member.processor.input_topic, number) + _ATTEMPTS

    def _write(self, key: bytes, value: bytes | None) -> None:
        if self._made is None:
            # Not idempotent, as that would wait half a second for a producer id.  One request at a time keeps the order, and duplicate entries do no harm.
            self._made = self._member.environment.producer(self._member.settings(linger_ms=0, max_in_flight=1, message_timeout_ms=int(_TIMEOUT_S * 1000)))
        try:
            self._made.produce(self._topic, value, key, on_delivery=self._delivered)
        except (BufferError, KafkaException) as error:
            self._complain(str(error))

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._complain(error.str())
        else:
            self._quiet_until = 0.0

    def _flush(self, seconds: float) -> None:
        if self._made is not None and self._quiet:
            self._made.poll(0)  # it may have answered meanwhile
        elif self._made is not None and self._made.flush(seconds):
            self._complain(f"no answer within {seconds:g} s")

    @property
    def _quiet(self) -> bool:
        return self._member.environment.monotonic() < self._quiet_until

    def _complain(self, why: str) -> None:
        if not self._quiet:
            self._quiet_until = self._member.environment.monotonic() + _QUIET_S
            self._member.on_log(f"{self._member.group}: {self._topic}: {why}; without it, a takeover may wait up to {TRANSACTION_S} s. It is tried again after {_QUIET_S:g} s")
