"""The local copy of one partition's state (K8), and how it is brought up to its changelog's end (K5).

RocksDB, WAL on, sync off: the changelog is the truth.  Each settle writes the changes and the changelog offset they
reach in one WriteBatch; a copy that belongs to another incarnation of input or changelog, is ahead of the changelog or behind its begin, or is
so old that tombstones may have been compacted away is wiped and restored.
"""

from __future__ import annotations

import bisect
import itertools
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, KafkaError, Message, TopicPartition

from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.ports import Clock, Processor
from kwflow.runners.kafka.encryption import Encryption, Unread
from kwflow.runners.kafka.environment import Consumer, Environment
from kwflow.runners.kafka.reading import gather
from kwflow.runners.kafka.topics import transient

__all__ = ["MOVED", "POSITION", "NoStore", "Partition", "PartitionStore", "Restore", "agreed"]

POSITION = b"\0kwflow"  # K16: {incarnation, next offset, partitions} beside the state it belongs to
MOVED = -1

_STATE, _META = b"s", b"m"
_offset_of = operator.attrgetter("offset")
_SLICE_RECORDS = 2000


class PartitionStore:
    """A Store; `offset` is the changelog offset that the next restore starts from (0: nothing yet)."""

    def __init__(self, environment: Environment, directory: Path, incarnation: str, clock: Clock, age_max_ms: int) -> None:
        self.environment = environment
        self.directory = directory
        self.incarnation = incarnation
        self.clock = clock
        self._age_max_ms = age_max_ms
        self._read_ms = clock.now_ms()
        self._lock = threading.Lock()  # of `page` and `close`: an iterator that another thread has open would keep the database
        self._closed = False
        try:
            self._db = environment.database(directory)
        except OSError:
            raise
        except Exception:  # one damaged store is wiped alone
            environment.wipe(directory)
            self._db = environment.database(directory)
        written_ms = int(self._meta("written") or 0)
        if not written_ms:  # nothing was ever: it is new
            self._begin()
        elif self._meta("incarnation") != incarnation or abs(clock.now_ms() - written_ms) > age_max_ms:  # written by a clock that was far ahead: of any age
            self.wipe()

    def _meta(self, name: str) -> str:
        return (self._db.get(_META + name.encode()) or b"").decode()

    @property
    def offset(self) -> int:
        return int(self._meta("offset") or 0)

    def wipe(self) -> None:
        """Start from nothing."""
        self._db.close()
        self.environment.wipe(self.directory)
        self._db = self.environment.database(self.directory)
        self._begin()

    def is_too_old(self) -> bool:
        """Asked after each read of the changelog, and before that is settled: whether this process stood still for so long that tombstones may be gone."""
        before, self._read_ms = self._read_ms, self.clock.now_ms()
        return abs(self._read_ms - before) > self._age_max_ms

    def next_from(self, start: int) -> int:
        """The offset to read on from in a changelog that begins at `start`; a copy that lacks what was before that is wiped."""
        if 0 < self.offset < start:
            self.wipe()
        return max(self.offset, start)

    def _begin(self) -> None:
        self._db.write([(_META + b"incarnation", self.incarnation.encode())])

    def get(self, key: bytes) -> bytes | None:
        return self._db.get(_STATE + key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._db.scan(_STATE + prefix, _STATE + start):
            yield key[1:], value

    def settle(self, changes: dict[bytes, bytes | None], offset: int | None, as_of_ms: int | None = None) -> None:
        """The changes, and up to where in the changelog they reach; they were all there was then, or now."""
        about = [(_META + b"written", b"%d" % (self.clock.now_ms() if as_of_ms is None else as_of_ms))]
        if offset is not None:
            about.append((_META + b"offset", b"%d" % offset))
        self._db.write(itertools.chain(((_STATE + key, value) for key, value in changes.items()), about))

    def page(self, start: bytes, limit: int) -> list[tuple[bytes, bytes]] | None:
        """For other threads: entries from this key on, at most so many; None once it is closed."""
        with self._lock:
            return None if self._closed else list(itertools.islice(self.scan(b"", start), limit))

    def leave(self) -> None:
        """Other threads are told nothing more."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        self.leave()
        self._db.close()


class NoStore:
    """The copy of a partition whose processor has no state."""

    offset = 0

    def get(self, key: bytes) -> bytes | None:
        return None

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return iter(())

    def settle(self, changes: dict[bytes, bytes | None], offset: int | None, as_of_ms: int | None = None) -> None:
        """Nothing is changed."""

    def next_from(self, start: int) -> int:
        return start

    def wipe(self) -> None:
        """It is empty."""

    def is_too_old(self) -> bool:
        return False

    def page(self, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return []

    def leave(self) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Partition:
    """One owned partition.  Invariants: `position` is the offset that the last committed transaction sent, `gathered` what was read from there on.

    A revoke takes it out of `owned` with what was gathered, a restore puts a new one in its place (K2's epoch).
    """

    number: int
    store: PartitionStore | NoStore
    position: int
    fire_from: int  # K18: nothing fires before this input offset is reached
    careful_until: int  # K19: records before this offset are taken a few at a time
    gathered: list[Record] = field(default_factory=list)
    end: int = 0  # where the consumer saw the log end
    reached: int = 0  # the same once everything before it was applied: there are no records then, only marks of transactions
    quiet_since: float | None = None  # when `reached` was first seen to lie behind `position`, with no commit since
    due_ms: int | None = None  # what `due_of` found last; looked up again once a commit has changed the store
    due_known: bool = False

    def applied(self, position: int) -> None:
        """A transaction with this offset was committed."""
        self.position = position
        self.quiet_since = None
        self.due_known = False
        del self.gathered[: bisect.bisect_left(self.gathered, position, key=_offset_of)]

    def next_is_careful(self, most: int) -> bool:
        """Whether the next record may be of the fatal batch, of at most so many: that batch began with the first record, and there may be none from `position` to `careful_until`."""
        offset = self.gathered[0].offset
        if self.position < self.careful_until <= offset:
            self.careful_until = min(offset + most, self.fire_from)
        return offset < self.careful_until

    def drop(self) -> None:
        """Nothing of what was gathered was applied: it is read again."""
        self.gathered.clear()
        self.end = 0

    def due_of(self, processor: Processor) -> int | None:
        """When something becomes due here; a look into the store only after a change."""
        if not self.due_known:
            self.due_ms, self.due_known = processor.next_due_ms(self.store), True
        return self.due_ms

    @property
    def caught_up(self) -> bool:
        """Whether all that was there when it was taken over has been applied.

        1. An engine sets a timer: its record and the mark of its transaction are the last of the partition
        2. it is killed; the next one's position is the mark, the end is behind it
        3. no record will come from there, so by positions alone it would wait for ever, and fire nothing
        """
        return max(self.position, self.reached) >= self.fire_from


class Restore:
    """Reads one changelog partition into its store, aborted records left out, up to `end`; a slice at a time.

    `consumer` reads committed records only and reports the partition's end (`enable.partition.eof`); closing it is ours.
    """

    def __init__(self, store: PartitionStore | NoStore, consumer: Callable[[], Consumer], topic: str, number: int, start: int, end: int, encryption: Encryption) -> None:
        self.store = store
        self._encryption = encryption
        self._unread = Unread(encryption)
        self.where = TopicPartition(topic, number)
        self.end = end
        if store.offset > end:
            store.wipe()
        self.reached = store.next_from(start)
        self._consumer = consumer() if self.reached < end else None
        if self._consumer is not None:
            self._consumer.assign([TopicPartition(topic, number, self.reached)])

    def slice(self, seconds: float) -> bool:
        """Go on for about this long; whether the end is reached.  Raises TransportError."""
        if self._consumer is None:
            return True
        changes: dict[bytes, bytes | None] = {}
        last, before = None, self.reached
        messages = gather(self._consumer, _SLICE_RECORDS, seconds)
        if self.store.is_too_old():
            self._begin_again(self._consumer)
            return False
        for message in messages:
            error = message.error()
            if error is None:
                key, value = message.key() or b"", self._encryption.decrypt(message.value())
                if not self._unread.passes(key, value):
                    changes[key] = value
                last = message
            elif self._begins_again(error, message):
                last = None
                changes.clear()
        if last is not None:
            self.reached = max(self.reached, (last.offset() or 0) + 1)
        self.reached = max(self.reached, self._consumer.position([self.where])[0].offset)  # -1001 on an empty log
        if changes or self.reached != before:
            self.store.settle(changes, None if self._unread else self.reached)  # while some are unread, the copy has not come so far
        if self.reached < self.end:
            return False
        self.close()
        self._unread.check(self.where.topic)
        return True

    def _begins_again(self, error: KafkaError, message: Message) -> bool:
        """Whether what we had is no longer there and was wiped.  Raises TransportError."""
        if error.code() == KafkaError._PARTITION_EOF:
            self.reached = max(self.reached, message.offset() or 0)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET and self._consumer is not None:
            self._begin_again(self._consumer)
            return True
        elif not transient(error):
            raise TransportError(f"restore of {self.where.topic}[{self.where.partition}]: {error.str()}")
        return False

    def _begin_again(self, consumer: Consumer) -> None:
        self.store.wipe()
        self.reached = 0
        self._unread.clear()
        consumer.assign([TopicPartition(self.where.topic, self.where.partition, OFFSET_BEGINNING)])

    def close(self) -> None:
        """Stop reading; the store stays open."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


def agreed(saved: bytes | None, committed: int, incarnation: str, partitions: int, where: str) -> int | None:
    """The offset that the group and the state both name (K16); None: neither has one; MOVED: they differ.

    Raises TransportError when the state belongs to another topic.
    """
    known = msgspec.json.decode(saved) if saved is not None else None
    if known is not None and (known["topic"] != incarnation or known["partitions"] != partitions):
        raise TransportError(f"{where}: its topic was recreated or its partitions changed since this state was written; --accept-offset-reset starts all the same", retryable=False)
    if committed == OFFSET_INVALID:
        return int(known["next"]) if known is not None else None
    return committed if known is None or known["next"] == committed else MOVED
