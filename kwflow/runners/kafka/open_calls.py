"""The open calls of one partition of a queue: read by a worker and not yet answered; and the order in which they may begin.

After a worker has died (`ledger.py`), one of the calls that it ran may be the cause.  So the next worker begins a few calls
at a time, and marks each in the group beforehand.  If that worker dies too, the marked calls are not begun a third time
(K19).  Calls that arrived after the first death are not marked: a call during which a single worker died is begun again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kwflow.core.dispatch import Dispatch, encode, state_key
from kwflow.runners.kafka.ledger import Ledger

__all__ = ["AHEAD_MAX", "ASIDE_MAX", "OpenCalls"]

AHEAD_MAX = 1000  # calls that are read and not answered; more than can run at a time, so that a withdrawal is read before its call begins
ASIDE_MAX = 2000  # calls that are read, but whose activity this worker does not know; with more, a note would have too little room for the calls behind them
_CAREFUL_MAX = 16  # calls that run at a time after a worker has died: so many, at most, lose an attempt together with the one that kills


class _Calls:
    """A Store of the begun calls of one partition, for a Worker."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        yield from ((key, self.entries[key]) for key in sorted(self.entries) if key.startswith(prefix) and key >= start)


class OpenCalls:
    """The calls that were read from a partition since it became ours.

    Invariant: a call in `offsets` (by workflow and ref) is waiting, or it is in `begun`, from which a Worker takes calls, or it is `aside`: its activity
    is not known here, but the next owner of the partition may know it.
    """

    def __init__(self, topic: str, number: int, position: int, note: str, end: int, care: bool = True) -> None:
        """`end` is the end of the log when the partition became ours: a worker that had died by then has read nothing beyond it."""
        self.topic = topic
        self.number = number
        self.ledger = Ledger(position, note)
        self.committed: tuple[int, str] = (position, "")
        self.begun = _Calls()
        self.offsets: dict[tuple[str, str], list[int]] = {}  # several for a call that an at-least-once engine has handed out twice, or that was made again by a workflow that went back
        self.aside: set[tuple[str, str]] = set()
        self._waiting: dict[tuple[str, str], Dispatch] = {}
        self._again: dict[tuple[str, str], tuple[Dispatch, bool]] = {}  # the last of several, and whether its activity is known
        self._care = care and self.ledger.died
        self._careful_until = min(position + AHEAD_MAX, end) if self._care else 0

    def open(self, call: Dispatch, offset: int, known: bool = True) -> bool:
        """Add a call.  False if it may not begin, because two workers died while it ran."""
        offsets = self.offsets.setdefault((call.workflow_id, call.ref), [])
        offsets.append(offset)
        may = not (self._care and self.ledger.suspected(offset))
        if may and len(offsets) == 1:
            self._add(call, known)
        elif may:
            self._again[call.workflow_id, call.ref] = call, known
        return may

    def _add(self, call: Dispatch, known: bool) -> None:
        if known:
            self._waiting[call.workflow_id, call.ref] = call
        else:
            self.aside.add((call.workflow_id, call.ref))

    def close(self, id: str, ref: str, before: int | None = None) -> bool:
        """Remove a call that is withdrawn, or was answered when the records `before` this offset had been read.  False if it was not open.

        If it is made again later, by a workflow that went back, the answer is not for that one: it may begin now.
        """
        offsets = self.offsets.pop((id, ref), [])
        closed = offsets if before is None else [offset for offset in offsets if offset < before]
        for offset in closed:
            self.ledger.finish(offset)
        if closed:
            self._waiting.pop((id, ref), None)
            self.aside.discard((id, ref))
            self.begun.entries.pop(state_key(id, ref), None)
            again = self._again.pop((id, ref), None)
            if again is not None and len(closed) < len(offsets):
                self._add(*again)
        if len(closed) < len(offsets):
            self.offsets[id, ref] = offsets[len(closed) :]
        return bool(closed)

    @property
    def noted(self) -> bool:
        """Whether the group's note says that the partition is ours."""
        return bool(self.committed[1])

    @property
    def careful(self) -> bool:
        """Whether a call that may have killed the last worker is still open."""
        return self.ledger.position < self._careful_until

    def next(self) -> list[Dispatch]:
        """The calls that may begin now.  In careful mode each is marked, and must begin only once the group has its mark."""
        some = list(self._waiting.values())[: max(0, _CAREFUL_MAX - len(self.begun.entries)) if self.careful else None]
        for call in some if self.careful else ():
            for offset in self.offsets[call.workflow_id, call.ref]:
                if offset < self._careful_until:
                    self.ledger.suspect(offset)
        return some

    def begin(self, calls: Iterable[Dispatch]) -> None:
        """Hand calls over to the Worker."""
        for call in calls:
            del self._waiting[call.workflow_id, call.ref]
            self.begun.entries[state_key(call.workflow_id, call.ref)] = encode(call)

    @property
    def held_back(self) -> bool:
        """Whether some calls were read that do not begin yet."""
        return bool(self._waiting)

    @property
    def bytes(self) -> int:
        return sum(len(call.arguments) for call in self._waiting.values()) + sum(len(data) for data in self.begun.entries.values())
