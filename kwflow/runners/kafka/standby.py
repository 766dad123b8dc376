"""Warm copies of partitions that other engines own, and the deletion of copies that nobody needs (kafka.md §4).

A standby follows the changelogs and writes them to the very stores that a takeover restores, so that a restore begins near
the end.  Without a standby, the store of a partition that has left is kept for a while, in case it returns, and then deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from confluent_kafka import KafkaError, Message, TopicPartition

from kwflow.errors import TransportError
from kwflow.runners.kafka.encryption import Encryption, Unread
from kwflow.runners.kafka.environment import Consumer, Environment
from kwflow.runners.kafka.state import PartitionStore
from kwflow.runners.kafka.topics import transient

__all__ = ["Cleanup", "Copies", "Standby"]

_LOOK_S = 1.0
_RECORDS_MAX = 2000  # in one turn: a standby must not keep the running partitions waiting
_OPENED_MAX = 3  # stores opened in one turn, for the same reason


class Standby:
    """Follows partitions of one changelog.  Invariant: a store is open either here or in the runner, never in both."""

    def __init__(
        self, topic: str, consumer: Callable[[], Consumer], open_store: Callable[[int], PartitionStore], starts: Callable[[Iterable[int]], dict[int, int]], encryption: Encryption
    ) -> None:
        self.stores: dict[int, PartitionStore] = {}
        self._followed: set[int] = set()
        self._topic = topic
        self._make_consumer = consumer
        self._consumer: Consumer | None = None
        self._open_store = open_store
        self._starts = starts
        self._unread: dict[int, Unread] = {}
        self._encryption = encryption

    def follow(self, numbers: set[int]) -> None:
        """Follow these partitions and no others from now on.  Each turn opens only a few of those that are new."""
        for number in self.stores.keys() - numbers:
            self.give(number)
        if self._consumer is not None and (gone := self._followed - self.stores.keys()):
            self._consumer.incremental_unassign([TopicPartition(self._topic, number) for number in gone])
        new = sorted(numbers - self.stores.keys())[:_OPENED_MAX]
        if new:
            if self._consumer is None:
                self._consumer = self._make_consumer()
            starts = self._starts(new)
            self.stores.update({number: self._open_store(number) for number in new})
            self._consumer.incremental_assign([TopicPartition(self._topic, number, self.stores[number].next_from(starts[number])) for number in new])
        self._followed = set(self.stores)

    def give(self, number: int) -> None:
        """Close the store of a partition that somebody else is about to open.  Records of it that still arrive are ignored."""
        self._unread.pop(number, None)
        if number in self.stores:
            self.stores.pop(number).close()

    def turn(self) -> None:
        """Store what has arrived.  Raises TransportError."""
        if self._consumer is None or not self.stores:
            return
        changes: dict[int, dict[bytes, bytes | None]] = {}
        reached: dict[int, int] = {}
        messages = self._consumer.consume(_RECORDS_MAX, 0)
        for number in [number for number, store in self.stores.items() if store.is_too_old()]:
            self._begin_again(number)
        for message in messages:
            self._take(message, changes, reached)
        for number, mine in changes.items():
            self.stores[number].settle(mine, None if self._unread[number] else reached[number])

    def _take(self, message: Message, changes: dict[int, dict[bytes, bytes | None]], reached: dict[int, int]) -> None:
        number, error = message.partition() or 0, message.error()
        if number not in self.stores:
            return
        if error is None:
            mine, key, value = changes.setdefault(number, {}), message.key() or b"", self._encryption.decrypt(message.value())
            if not self._unread.setdefault(number, Unread(self._encryption)).passes(key, value):
                mine[key] = value
            reached[number] = (message.offset() or 0) + 1
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # our position is no longer in the log
            changes.pop(number, None)
            self._begin_again(number)
        elif error.code() != KafkaError._PARTITION_EOF and not transient(error):
            raise TransportError(f"standby of {self._topic}[{number}]: {error.str()}")

    def _begin_again(self, number: int) -> None:
        """Wipe the store and let the next turn follow the partition from the beginning."""
        self.stores[number].wipe()
        self.give(number)

    def close(self) -> None:
        for store in self.stores.values():
            store.close()
        self.stores.clear()
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


class Cleanup:
    """Deletes stores that nobody has needed for `delay_s`."""

    def __init__(self, environment: Environment, directory: Path, delay_s: float) -> None:
        self._environment = environment
        self._directory = directory
        self.delay_s = delay_s
        self._next = 0.0
        self._unused_since: dict[int, float] = {}

    def look(self, used: set[int]) -> list[Path]:
        """Delete the stores that are due, looking at most once a second; return those that were deleted."""
        now = self._environment.monotonic()
        if now < self._next:
            return []
        self._next = now + _LOOK_S
        there = {int(path.name) for path in self._directory.iterdir() if path.name.isdigit()}
        self._unused_since = {number: self._unused_since.get(number, now) for number in there - used}
        due = [self._directory / str(number) for number, since in self._unused_since.items() if now - since >= self.delay_s]
        for path in due:
            self._environment.wipe(path)
        return due


class Copies:
    """Standby and Cleanup as the runner uses them: each turn says which partitions are its own."""

    def __init__(self, standby: Standby | None, partitions: int, cleanup: Cleanup, on_log: Callable[[str], None]) -> None:
        self.standby = standby
        self._partitions = partitions
        self._cleanup = cleanup
        self._on_log = on_log

    def turn(self, mine: set[int]) -> None:
        used = mine
        if self.standby is not None:
            used = set(range(self._partitions))  # including those that are not opened yet
            self.standby.follow(used - mine)
            self.standby.turn()
        for path in self._cleanup.look(used):
            self._on_log(f"deleted {path}, a copy not needed for {self._cleanup.delay_s:g} s")

    def give(self, number: int) -> None:
        """Release this partition's store, as the runner opens it now."""
        if self.standby is not None:
            self.standby.give(number)

    def close(self) -> None:
        if self.standby is not None:
            self.standby.close()
