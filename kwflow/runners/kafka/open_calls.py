"""The calls of one partition of a queue that a worker has read and nobody has answered yet, and in which order they may begin.

After a worker has died (`ledger.py`) one of those that it ran may be why.  So the next one begins a few at a time, each
marked in the group before; whatever is marked when that one dies, too, is not begun a third time (K19).  What came after
the death is not marked: one that has seen a single worker die is begun again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kwflow.core.dispatch import Dispatch, encode, state_key
from kwflow.runners.kafka.ledger import Ledger

__all__ = ["AHEAD_MAX", "ASIDE_MAX", "OpenCalls"]

AHEAD_MAX = 1000  # calls that were read and are not answered; more than run at a time, so that what is taken back is read before it is begun
ASIDE_MAX = 2000  # calls that were read and that this worker does not know; with more, what a note holds of those behind them would be too little
_CAREFUL_MAX = 16  # calls that run at a time after a worker has died: so many others lose an attempt with the one that kills


class _Calls:
    """A Store of the calls that are open in one partition, for a Worker."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        yield from ((key, self.entries[key]) for key in sorted(self.entries) if key.startswith(prefix) and key >= start)


class OpenCalls:
    """What was read of a partition, from when it became ours.

    Invariant: a call of `offsets` (by workflow and ref) waits, or it is in `begun`, which a Worker takes from, or it is `aside`: its activity is
    not known here, and whoever owns the partition next may know it.
    """

    def __init__(self, topic: str, number: int, position: int, note: str, end: int, care: bool = True) -> None:
        """`end`: of the log when it became ours; a worker that had died by then has read nothing behind it."""
        self.topic = topic
        self.number = number
        self.ledger = Ledger(position, note)
        self.committed: tuple[int, str] = (position, "")
        self.begun = _Calls()
        self.offsets: dict[tuple[str, str], list[int]] = {}  # an engine that is at-least-once hands a call out twice
        self.aside: set[tuple[str, str]] = set()
        self._waiting: dict[tuple[str, str], Dispatch] = {}
        self._care = care and self.ledger.died
        self._careful_until = min(position + AHEAD_MAX, end) if self._care else 0

    def open(self, call: Dispatch, offset: int, known: bool = True) -> bool:
        """Whether it may begin, when its turn comes; not what ran when two workers died."""
        offsets = self.offsets.setdefault((call.workflow_id, call.ref), [])
        offsets.append(offset)
        may = not (self._care and self.ledger.suspected(offset))
        if may and len(offsets) == 1 and known:
            self._waiting[call.workflow_id, call.ref] = call
        elif may and not known:
            self.aside.add((call.workflow_id, call.ref))
        return may

    def close(self, id: str, ref: str) -> bool:
        """Whether it was open."""
        offsets = self.offsets.pop((id, ref), [])
        for offset in offsets:
            self.ledger.finish(offset)
        if offsets:
            self._waiting.pop((id, ref), None)
            self.aside.discard((id, ref))
            self.begun.entries.pop(state_key(id, ref), None)
        return bool(offsets)

    @property
    def noted(self) -> bool:
        """Whether the group knows that it is ours."""
        return bool(self.committed[1])

    @property
    def careful(self) -> bool:
        """Whether what may have killed the last worker is still among them."""
        return self.ledger.position < self._careful_until

    def next(self) -> list[Dispatch]:
        """Those that may begin now; with care each is marked, and begins once the group has its mark."""
        some = list(self._waiting.values())[: max(0, _CAREFUL_MAX - len(self.begun.entries)) if self.careful else None]
        for call in some if self.careful else ():
            for offset in self.offsets[call.workflow_id, call.ref]:
                if offset < self._careful_until:
                    self.ledger.suspect(offset)
        return some

    def begin(self, calls: Iterable[Dispatch]) -> None:
        """A Worker may take them from now on."""
        for call in calls:
            del self._waiting[call.workflow_id, call.ref]
            self.begun.entries[state_key(call.workflow_id, call.ref)] = encode(call)

    @property
    def held_back(self) -> bool:
        """Whether some of those that were read do not begin now."""
        return bool(self._waiting)

    @property
    def bytes(self) -> int:
        return sum(len(call.arguments) for call in self._waiting.values()) + sum(len(data) for data in self.begun.entries.values())
