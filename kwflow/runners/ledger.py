"""Which records of one partition are done, where they may be done in any order, and what a consumer group keeps of that.

A group keeps one position for a partition, before the first record that is open: a call that takes an hour would have all
that were answered behind it done again after a crash.  So which records are open is noted beside the position, in the
text that Kafka keeps with it.  A note that is not ours, or belongs to another position, says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Ledger"]

_NOTE_MAX = 4_000  # characters; offset.metadata.max.bytes is 4,096
_FORMAT = "kwflow1"


class Ledger:
    """Records are taken in the order of their offsets and finished in any.

    Invariant: below `_next`, and below `_noted_end` as far as it was noted, what is not open is done.
    """

    def __init__(self, position: int, note: str = "") -> None:
        self._next = position
        self._open: dict[int, None] = {}  # in the order of the offsets
        self._noted_end, self._noted = _read(position, note)

    def take(self, offset: int) -> bool:
        """Whether this record, the next one that was read, is still to be done."""
        self._next = offset + 1
        if offset < self._noted_end and offset not in self._noted:
            return False
        self._open[offset] = None
        return True

    def finish(self, offset: int) -> None:
        self._open.pop(offset, None)

    @property
    def position(self) -> int:
        """The first offset that is open, or comes next."""
        return next(iter(self._open), self._next)

    def note(self) -> str:
        """What is done behind `position`; of more than a note holds, what comes first."""
        position, end = self.position, max(self._next, self._noted_end)
        parts, length = [], 60
        for offset in self._still_open():
            step = f"{offset - position:x}"
            length += len(step) + 1
            if length > _NOTE_MAX:
                end = offset
                break
            parts.append(step)
        return f"{_FORMAT} {end - position:x} {','.join(parts)}" if end > position + 1 else ""

    def _still_open(self) -> Iterator[int]:
        yield from self._open
        yield from sorted(offset for offset in self._noted if offset >= self._next)


def _read(position: int, note: str) -> tuple[int, frozenset[int]]:
    """Up to which offset the note knows, and which of those are open; total."""
    try:
        form, end, steps = note.split(" ")
        if form != _FORMAT:
            return 0, frozenset()
        return position + int(end, 16), frozenset(position + int(step, 16) for step in steps.split(",") if step)
    except ValueError:
        return 0, frozenset()
