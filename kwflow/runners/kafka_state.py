"""The local copy of one partition's state (K8), and how it is brought up to its changelog's end (K5).

RocksDB, WAL on, sync off: the changelog is the truth.  Each settle writes the changes and the changelog offset they
reach in one WriteBatch; a copy that belongs to another topic incarnation, is ahead of the changelog, or is so old that
tombstones may have been compacted away is wiped and restored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, TopicPartition
from rocksdict import Options, Rdict, WriteBatch

from kwflow.errors import TransportError
from kwflow.ports import Clock
from kwflow.runners.embedded import entries

__all__ = ["PartitionStore", "Restore"]

_STATE, _META = b"s", b"m"
_SLICE_RECORDS = 2000


class PartitionStore:
    """A Store; `offset` is the changelog offset that the next restore starts from (0: nothing yet)."""

    def __init__(self, directory: Path, incarnation: str, clock: Clock, age_max_ms: int) -> None:
        self.directory = directory
        self.incarnation = incarnation
        self.clock = clock
        try:
            self._open()
        except Exception:  # one damaged store is wiped alone
            shutil.rmtree(directory)
            self._open()
        written_ms = int(self._meta("written") or 0)
        if self._meta("incarnation") != incarnation or clock.now_ms() - written_ms > age_max_ms:
            self.wipe()

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        self._db = Rdict(str(self.directory), options)

    def _meta(self, name: str) -> str:
        found: bytes | None = self._db.get(_META + name.encode())
        return (found or b"").decode()

    @property
    def offset(self) -> int:
        return int(self._meta("offset") or 0)

    def wipe(self) -> None:
        """Start from nothing."""
        self._db.close()
        shutil.rmtree(self.directory)
        self._open()
        self._db[_META + b"incarnation"] = self.incarnation.encode()

    def get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._db.get(_STATE + key)
        return found

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        for key, value in entries(self._db, _STATE + prefix):
            yield key[1:], value

    def settle(self, changes: dict[bytes, bytes | None], offset: int | None) -> None:
        """The changes, and up to where in the changelog they reach."""
        batch = WriteBatch(raw_mode=True)
        for key, value in changes.items():
            if value is None:
                batch.delete(_STATE + key)
            else:
                batch.put(_STATE + key, value)
        if offset is not None:
            batch.put(_META + b"offset", b"%d" % offset)
        batch.put(_META + b"written", b"%d" % self.clock.now_ms())
        self._db.write(batch)

    def close(self) -> None:
        self._db.close()


class Restore:
    """Reads one changelog partition into its store, aborted records left out, up to `end`; a slice at a time.

    `consumer` reads committed records only and reports the partition's end (`enable.partition.eof`); closing it is ours.
    """

    def __init__(self, store: PartitionStore, consumer: Callable[[], Consumer], topic: str, number: int, start: int, end: int) -> None:
        self.store = store
        self.where = TopicPartition(topic, number)
        self.end = end
        if store.offset > end:
            store.wipe()
        self.reached = max(store.offset, start)
        self._consumer = consumer() if self.reached < end else None
        if self._consumer is not None:
            self._consumer.assign([TopicPartition(topic, number, self.reached)])

    def slice(self, seconds: float) -> bool:
        """Go on for about this long; whether the end is reached.  Raises TransportError."""
        if self._consumer is None:
            return True
        changes: dict[bytes, bytes | None] = {}
        for message in self._consumer.consume(_SLICE_RECORDS, seconds):
            self._take(message, changes)
        self.reached = max(self.reached, self._consumer.position([self.where])[0].offset)  # -1001 on an empty log
        self.store.settle(changes, self.reached)
        if self.reached < self.end:
            return False
        self.close()
        return True

    def _take(self, message: Message, changes: dict[bytes, bytes | None]) -> None:
        error = message.error()
        if error is None:
            changes[message.key() or b""] = message.value()
            self.reached = (message.offset() or 0) + 1
        elif error.code() == KafkaError._PARTITION_EOF:
            self.reached = max(self.reached, message.offset() or 0)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET and self._consumer is not None:  # what we had is no longer there
            self.store.wipe()
            changes.clear()
            self.reached = 0
            self._consumer.assign([TopicPartition(self.where.topic, self.where.partition, OFFSET_BEGINNING)])
        elif error.fatal() or not error.retriable():
            raise TransportError(f"restore of {self.where.topic}[{self.where.partition}]: {error.str()}")

    def close(self) -> None:
        """Stop reading; the store stays open."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
