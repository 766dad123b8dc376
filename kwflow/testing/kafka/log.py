"""Topics and partitions as a broker keeps them: control markers that take offsets, aborted records, the last stable offset, compaction.

Whether a reader sees an entry is decided here and nowhere else.  It must not know clients, groups or time.
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
OVERHEAD_BYTES = 70  # of a record in its batch, about
_DEFAULTS = {"cleanup.policy": "delete", "delete.retention.ms": "86400000", "max.message.bytes": "1048588", "retention.ms": "604800000", "segment.bytes": "1073741824"}


@dataclasses.dataclass(eq=False, slots=True)
class Transaction:
    """One transaction of one producer epoch.

    Decided (`state`) at once, visible only place by place as its markers are written: `places` holds where it wrote,
    with its first offset there, until the marker is.
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
    """One record or control marker.  `transaction` None: written outside any."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    transaction: Transaction | None
    appended_ms: float
    control: bool = False
    cleaned_ms: float | None = None  # a tombstone: when compaction first passed it, and removed what was before it

    @property
    def size_bytes(self) -> int:
        return OVERHEAD_BYTES + len(self.key or b"") + len(self.value or b"") + sum(len(name) + len(value or b"") + 4 for name, value in self.headers)


class Partition:
    """Invariant: `entries` is in the order of offsets (with gaps, after compaction); `start` <= `stable` <= `end`."""

    def __init__(self, topic: str, number: int) -> None:
        self.place: Place = (topic, number)
        self.entries: list[Entry] = []
        self.start = 0
        self.end = 0
        self.unstable: dict[Transaction, int] = {}  # not yet marked here -> first offset

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
        """The control marker that makes a decided transaction's records visible, or never so, here."""
        self.entries.append(Entry(self.end, int(now_ms), None, None, [], transaction, now_ms, control=True))
        self.end += 1
        self.unstable.pop(transaction, None)

    def visible(self, entry: Entry) -> bool:
        """To a read_committed reader; the entry lies before `stable`."""
        return not entry.control and (entry.transaction is None or entry.transaction.state == COMMITTED)

    def read(self, offset: int, committed: bool, limit: int) -> tuple[list[Entry], int]:
        """What a reader at this offset gets, and the offset it stands at then (behind markers and aborted records too)."""
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
        """Everything a read_committed reader would get now, from the start."""
        stable = self.stable
        return (entry for entry in self.entries if entry.offset < stable and self.visible(entry))

    def _index(self, offset: int) -> int:
        return bisect.bisect_left(self.entries, offset, key=lambda entry: entry.offset)

    def compact(self, before: int, now_ms: float, retention_ms: float) -> int:
        """Keep the last record of each key below an offset; a tombstone for its retention only, counted from when it was first passed; how many went."""
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
        """Retention: the log starts here now."""
        self.start = max(self.start, min(offset, self.stable))
        del self.entries[: self._index(self.start)]


class Topic:
    """Its partitions and configuration; `id` changes when it is recreated (`number`: how many there were of this name)."""

    def __init__(self, name: str, partitions: int, config: dict[str, str] | None = None, number: int = 0) -> None:
        self.name = name
        self.id = uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {number}" if number else name).hex
        self.config = {**_DEFAULTS, **(config or {})}
        self.partitions = [Partition(name, number) for number in range(partitions)]
