"""The local copy of one partition's state (K8), and how it is restored to its changelog's end (K5).

It is a RocksDB with the WAL on and sync off: the changelog is the truth.  Each settle writes the changes, and the changelog
offset that they reach, in one WriteBatch.  A copy is wiped and restored if it belongs to another incarnation of the input or
the changelog, if it is ahead of the changelog or behind its beginning, or if it is so old that tombstones may have been
compacted away.
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
from kwflow.runners.moved import MOVES
from kwflow.runners.overlay import Overlay

__all__ = ["IMPORT", "MOVED", "POSITION", "NoStore", "Partition", "PartitionStore", "Position", "Restore", "agreed", "importing", "position_of"]

POSITION = b"\0kwflow"  # the key of a Position
IMPORT = "import "  # instead of a topic's id, before the id of an archive: a part of it is in the state
MOVED = -1

_STATE, _META = b"s", b"m"
_offset_of = operator.attrgetter("offset")
_SLICE_RECORDS = 2000


class PartitionStore:
    """A Store; `offset` is the changelog offset from which the next restore starts (0: nothing is stored yet)."""

    def __init__(self, environment: Environment, directory: Path, incarnation: str, clock: Clock, age_max_ms: int) -> None:
        self.environment = environment
        self.directory = directory
        self.incarnation = incarnation
        self.clock = clock
        self._age_max_ms = age_max_ms
        self._read_ms = clock.now_ms()
        self._lock = threading.Lock()  # for `page` and `close`: an iterator that another thread has open would keep the database open
        self._closed = False
        try:
            self._db = environment.database(directory)
        except OSError:
            raise
        except Exception:  # a damaged store is wiped; the others are not affected
            environment.wipe(directory)
            self._db = environment.database(directory)
        written_ms = int(self._meta("written") or 0)
        if not written_ms:  # nothing was ever written: it is new
            self._begin()
        elif self._meta("incarnation") != incarnation or abs(clock.now_ms() - written_ms) > age_max_ms:  # abs: if the clock was far ahead when it was written, its age is unknown
            self.wipe()

    def _meta(self, name: str) -> str:
        return (self._db.get(_META + name.encode()) or b"").decode()

    @property
    def offset(self) -> int:
        return int(self._meta("offset") or 0)

    def wipe(self) -> None:
        """Delete everything and start from an empty store."""
        self._db.close()
        self.environment.wipe(self.directory)
        self._db = self.environment.database(self.directory)
        self._begin()

    def is_too_old(self) -> bool:
        """Whether this process was suspended for so long that tombstones may be gone.  Called after each read of the changelog, before the records are settled."""
        before, self._read_ms = self._read_ms, self.clock.now_ms()
        return abs(self._read_ms - before) > self._age_max_ms

    def next_from(self, start: int) -> int:
        """The offset to continue from in a changelog that begins at `start`.  A copy that lacks records from before `start` is wiped."""
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
        """Write changes and the changelog offset that they reach (None: unchanged).  The copy was complete up to there at `as_of_ms`; None: now."""
        about = [(_META + b"written", b"%d" % (self.clock.now_ms() if as_of_ms is None else as_of_ms))]
        if offset is not None:
            about.append((_META + b"offset", b"%d" % offset))
        self._db.write(itertools.chain(((_STATE + key, value) for key, value in changes.items()), about))

    def page(self, start: bytes, limit: int) -> list[tuple[bytes, bytes]] | None:
        """For other threads: at most `limit` entries from this key on; None once the store is closed."""
        with self._lock:
            return None if self._closed else list(itertools.islice(self.scan(b"", start), limit))

    def leave(self) -> None:
        """Give other threads no more entries."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        self.leave()
        self._db.close()


class NoStore:
    """The store of a partition whose processor has no state."""

    offset = 0

    def get(self, key: bytes) -> bytes | None:
        return None

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return iter(())

    def settle(self, changes: dict[bytes, bytes | None], offset: int | None, as_of_ms: int | None = None) -> None:
        """Do nothing: there is no state."""

    def next_from(self, start: int) -> int:
        return start

    def wipe(self) -> None:
        """Do nothing: it is always empty."""

    def is_too_old(self) -> bool:
        return False

    def page(self, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return []

    def leave(self) -> None:
        """Do nothing: nobody reads it."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


@dataclass
class Partition:
    """One owned partition.

    Invariants: `position` is the offset that the last committed transaction sent; `gathered` holds the records that were read from there on.
    A revoke removes it from `owned` together with its gathered records; a later restore puts a new object in its place (K2's epoch).
    """

    number: int
    store: PartitionStore | NoStore
    position: int
    fire_from: int  # K18: nothing fires before this input offset is reached
    careful_until: int  # K19: records before this offset are taken a few at a time
    gathered: list[Record] = field(default_factory=list)
    end: int = 0  # where the consumer saw the end of the log
    reached: int = 0  # equal to `end` once everything before it was applied: between `position` and it there are only transaction markers
    quiet_since: float | None = None  # when `reached` was first seen to be greater than `position`, with no commit since
    moves: int | None = None  # to be noted in the state by the first transaction, as the input was created again (decision 0064)
    due_ms: int | None = None  # the last result of `due_of`; looked up again once a commit has changed the store
    due_known: bool = False

    def changes(self) -> Overlay:
        """The store, to which a transaction adds its changes."""
        overlay = Overlay(self.store)
        if self.moves is not None:
            overlay.put(MOVES, b"%d" % self.moves)
        return overlay

    def applied(self, position: int) -> None:
        """Note that a transaction with this offset was committed."""
        self.position = position
        self.moves = None
        self.quiet_since = None
        self.due_known = False
        del self.gathered[: bisect.bisect_left(self.gathered, position, key=_offset_of)]

    def next_is_careful(self, most: int) -> bool:
        """Whether the next record may be one of the fatal batch, which had at most `most` records.

        That batch began with the first record there is, and between `position` and `careful_until` there may be none.
        """
        offset = self.gathered[0].offset
        if self.position < self.careful_until <= offset:
            self.careful_until = min(offset + most, self.fire_from)
        return offset < self.careful_until

    def drop(self) -> None:
        """Drop the gathered records, none of which was applied; they are read again."""
        self.gathered.clear()
        self.end = 0

    def due_of(self, processor: Processor) -> int | None:
        """When something becomes due here, in ms since the epoch; None for never.  Reads the store only after a change."""
        if not self.due_known:
            self.due_ms, self.due_known = processor.next_due_ms(self.store), True
        return self.due_ms

    @property
    def caught_up(self) -> bool:
        """Whether every record that was there at the takeover has been applied.

        1. An engine sets a timer: the record and its transaction's marker are the last in the partition.
        2. The engine is killed.  The position of the next one is the marker's offset, and the end of the log is after it.
        3. No record will come from there, so judged by `position` alone it would wait forever, and fire nothing.
        """
        return max(self.position, self.reached) >= self.fire_from


class Restore:
    """Reads one changelog partition, without aborted records, into its store up to `end`, a slice at a time.

    `consumer` creates a consumer of committed records that reports the partition's end (`enable.partition.eof`); Restore closes it.
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
        """Continue for about this long; true once the end is reached.  Raises TransportError."""
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
            self.store.settle(changes, None if self._unread else self.reached)  # while some values are unread, the copy is not complete up to here
        if self.reached < self.end:
            return False
        self.close()
        self._unread.check(self.where.topic)
        return True

    def _begins_again(self, error: KafkaError, message: Message) -> bool:
        """Handle an error; true if our position is no longer in the log, so that the store was wiped.  Raises TransportError."""
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


class Position(msgspec.Struct, frozen=True):
    """What a state says of the partition that it belongs to (K16): the id of its topic and the number of partitions, and the offset of the next record."""

    topic: str
    next: int
    partitions: int


def position_of(saved: bytes | None, where: str) -> Position | None:
    """The position beside a state; None if there is none.  Raises TransportError if nobody can read it, as any guess would apply records twice, or never."""
    try:
        return msgspec.json.decode(saved, type=Position) if saved is not None else None
    except msgspec.DecodeError as error:
        raise TransportError(f"{where}: the position in its changelog cannot be read ({error}); --accept-offset-reset starts at the position of the group", retryable=False) from None


def importing(known: Position | None) -> str | None:
    """The id of the archive whose import into the state with this position has not ended; None if there is none."""
    return known.topic.removeprefix(IMPORT) if known is not None and known.topic.startswith(IMPORT) else None


def agreed(known: Position | None, committed: int, incarnation: str, partitions: int, where: str) -> int | None:
    """The offset on which the group and the state agree (K16); None if neither has one; MOVED if they differ.

    Raises TransportError if the state belongs to another topic.
    """
    if known is not None and (known.topic, known.partitions) != (incarnation, partitions):
        raise TransportError(
            f"{where}: its topic was recreated or its partitions changed since this state was written; --accept-offset-reset starts anyway. If it is the wrong topic, correct its setting",
            retryable=False,
        )
    if committed == OFFSET_INVALID:
        return known.next if known is not None else None
    return committed if known is None or known.next == committed else MOVED
