"""Which records of one partition are done, where they may be done in any order, and what a consumer group keeps of that.

A group keeps one position for a partition, before the first record that is open: a call that takes an hour would have all
that were answered behind it done again after a crash.  So which records are open is noted beside the position, in the
text that Kafka keeps with it, and whether somebody holds the partition: who finds a note that was not given back knows
that its writer died.  A note that is not ours, or belongs to another position, says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Ledger"]

_NOTE_MAX = 4_000  # characters; offset.metadata.max.bytes is 4,096
_FORMAT = "kwflow1"
_HELD, _SUSPECT = "+", "!"


class Ledger:
    """Records are taken in the order of their offsets and finished in any.

    Invariant: below `_next`, and below `_noted_end` as far as it was noted, what is not open is done.  `died`: who wrote
    the note did not give the partition back; what it had marked as suspects ran at that time.
    """

    def __init__(self, position: int, note: str = "") -> None:
        self._next = position
        self._open: dict[int, bool] = {}  # in the order of the offsets -> whether it is a suspect
        self._noted_end, self._noted, self.died = _read(position, note)

    def take(self, offset: int) -> bool:
        """Whether this record, the next one that was read, is still to be done."""
        self._next = offset + 1
        if offset < self._noted_end and offset not in self._noted:
            return False
        self._open[offset] = self.suspected(offset)  # it stays one until it is done
        return True

    def pass_marks(self, end: int) -> None:
        """All before this offset was read; the last of it may be marks of transactions, which are no records."""
        self._next = max(self._next, end)

    def behind(self, offset: int) -> bool:
        """Whether this record lies before what was read, or was done when we began: it is of another log."""
        return offset < self._next

    def suspected(self, offset: int) -> bool:
        """Whether it ran, and was marked, when the writer of the note died."""
        return self.died and self._noted.get(offset, False)

    def suspect(self, offset: int) -> None:
        """Mark one that is open: should we die, it may be why."""
        if offset in self._open:
            self._open[offset] = True

    def finish(self, offset: int) -> None:
        self._open.pop(offset, None)

    @property
    def position(self) -> int:
        """The first offset that is open, or comes next."""
        return next(iter(self._open), self._next)

    def note(self, held: bool = True) -> str:
        """What is done behind `position`, and whether this partition is held still; of more than a note holds, what comes first."""
        position, end = self.position, max(self._next, self._noted_end)
        parts, length = [], 60
        for offset, suspect in self._still_open():
            step = f"{offset - position:x}{_SUSPECT if suspect and held else ''}"
            length += len(step) + 1
            if length > _NOTE_MAX:
                end = offset
                break
            parts.append(step)
        return f"{_FORMAT} {end - position:x} {','.join(parts)} {_HELD if held else ''}"

    def _still_open(self) -> Iterator[tuple[int, bool]]:
        yield from self._open.items()
        yield from sorted((offset, suspect) for offset, suspect in self._noted.items() if offset >= self._next)


def _read(position: int, note: str) -> tuple[int, dict[int, bool], bool]:
    """Up to which offset the note knows, which of those are open (and suspects), and whether it was held; total."""
    try:
        form, end, steps, held = note.split(" ")
        if form != _FORMAT:
            return 0, {}, False
        opened = {position + int(step.rstrip(_SUSPECT), 16): step.endswith(_SUSPECT) for step in steps.split(",") if step}
        return position + int(end, 16), opened, held == _HELD
    except ValueError:
        return 0, {}, False
