"""Topics and partitions as a broker keeps them: control markers that use up offsets, aborted records, the last stable offset, compaction.

This module alone decides whether a reader sees an entry.  It must not know clients, groups or time.
"""

from __future__ import annotations

import bisect
import dataclasses
import uuid
from collections.abc import Iterator

__all__ = ["ABORTED", "COMMITTED", "OPEN", "Entry", "Partition", "Place", "Topic", "Transaction"]

OPEN, COMMITTED, ABORTED = "open", "committed", "aborted"
Headers = list[tuple[str, bytes | None]]
Place = tuple[str, int]  # topic, partition
OVERHEAD_BYTES = 70  # roughly, of a record in its batch
_DEFAULTS = {"cleanup.policy": "delete", "delete.retention.ms": "86400000", "max.message.bytes": "1048588", "retention.ms": "604800000", "segment.bytes": "1073741824"}


@dataclasses.dataclass(eq=False, slots=True)
class Transaction:
    """One transaction of one producer epoch.

    It is decided (`state`) at one instant, but becomes visible place by place, as its markers are written.  `places` holds
    each place where it wrote, with its first offset there, until the marker is written.
    """

    producer: str
    epoch: int
    begun_ms: float
    state: str = OPEN
    decided_ms: float = -1.0
    places: dict[Place, int] = dataclasses.field(default_factory=dict)
    groups: dict[str, dict[Place, int]] = dataclasses.field(default_factory=dict)
    notes: dict[Place, str] = dataclasses.field(default_factory=dict)  # the metadata of these offsets


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """One record or control marker.  `transaction` is None if it was written outside a transaction."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    transaction: Transaction | None
    appended_ms: float
    control: bool = False
    cleaned_ms: float | None = None  # of a tombstone: when compaction first passed it and removed the records before it

    @property
    def size_bytes(self) -> int:
        return OVERHEAD_BYTES + len(self.key or b"") + len(self.value or b"") + sum(len(name) + len(value or b"") + 4 for name, value in self.headers)


class Partition:
    """One partition.  Invariant: `entries` are in the order of their offsets (with gaps, after compaction); `start` <= `stable` <= `end`."""

    def __init__(self, topic: str, number: int) -> None:
        self.place: Place = (topic, number)
        self.entries: list[Entry] = []
        self.start = 0
        self.end = 0
        self.unstable: dict[Transaction, int] = {}  # transactions without a marker here yet, and their first offset

    @property
    def stable(self) -> int:
        """The LSO: everything before it is decided."""
        return min(self.unstable.values(), default=self.end)

    def append(self, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: Headers, transaction: Transaction | None, now_ms: float) -> Entry:
        entry = Entry(self.end, timestamp_ms, key, value, headers, transaction, now_ms)
        self.entries.append(entry)
        if transaction is not None and transaction not in self.unstable:
            self.unstable[transaction] = self.end
        self.end += 1
        return entry

    def mark(self, transaction: Transaction, now_ms: float) -> None:
        """Write the control marker of a decided transaction, which makes its records here visible, or finally invisible."""
        self.entries.append(Entry(self.end, int(now_ms), None, None, [], transaction, now_ms, control=True))
        self.end += 1
        self.unstable.pop(transaction, None)

    def visible(self, entry: Entry) -> bool:
        """Whether a read_committed reader sees the entry, which must be before `stable`."""
        return not entry.control and (entry.transaction is None or entry.transaction.state == COMMITTED)

    def read(self, offset: int, committed: bool, limit: int) -> tuple[list[Entry], int]:
        """Return what a reader at this offset gets, and the offset where it is afterwards (past markers and aborted records, too)."""
        until = self.stable if committed else self.end
        found: list[Entry] = []
        for index in range(self._index(offset), len(self.entries)):
            entry = self.entries[index]
            if entry.offset >= until:
                break
            if self.visible(entry) if committed else not entry.control:
                found.append(entry)
                if len(found) == limit:
                    return found, entry.offset + 1
        return found, max(until, offset)

    def committed(self) -> Iterator[Entry]:
        """Return everything that a read_committed reader would get now, from the start."""
        stable = self.stable
        return (entry for entry in self.entries if entry.offset < stable and self.visible(entry))

    def _index(self, offset: int) -> int:
        return bisect.bisect_left(self.entries, offset, key=lambda entry: entry.offset)

    def compact(self, before: int, now_ms: float, retention_ms: float) -> int:
        """Below an offset, keep only the last record of each key; return how many entries were removed.

        A tombstone is kept only for its retention, counted from when compaction first passed it.
        """
        before = min(before, self.stable)
        last = {entry.key: entry.offset for entry in self.entries if entry.offset < self.stable and self.visible(entry)}

        def kept(entry: Entry) -> bool:
            if entry.offset >= before:
                return True
            if not self.visible(entry) or last[entry.key] != entry.offset:
                return False
            if entry.cleaned_ms is None:
                entry.cleaned_ms = now_ms
            return entry.value is not None or now_ms - entry.cleaned_ms < retention_ms

        count = len(self.entries)
        self.entries = [entry for entry in self.entries if kept(entry)]
        return count - len(self.entries)

    def delete_before(self, offset: int) -> None:
        """Apply retention: let the log start at this offset."""
        self.start = max(self.start, min(offset, self.stable))
        del self.entries[: self._index(self.start)]


class Topic:
    """A topic's partitions and configuration.  `id` changes when it is recreated: `which` tells it from others of its name."""

    def __init__(self, name: str, partitions: int, config: dict[str, str] | None = None, which: str = "") -> None:
        self.name = name
        self.id = uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {which}").hex
        self.overridden = frozenset(config or {})
        self.config = {**_DEFAULTS, **(config or {})}
        self.partitions = [Partition(name, number) for number in range(partitions)]
