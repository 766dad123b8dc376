"""Which records of a partition are done, where they may finish in any order, and what a consumer group stores about that.

A group stores one position per partition, which is before the first open record.  So after a crash during a call that takes
an hour, all calls behind it that were answered would be repeated.  Therefore the open records are noted beside the position,
in the metadata text that Kafka stores with it, and also whether somebody holds the partition: whoever finds a note that is
still held knows that its writer died.  A note in another format, or for another position, is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Ledger"]

_NOTE_MAX = 4_000  # characters; offset.metadata.max.bytes is 4,096
_FORMAT = "kwflow1"
_HELD, _SUSPECT = "+", "!"


class Ledger:
    """The done and open records of one partition.  Records are taken in the order of their offsets, and finished in any order.

    Invariant: below `next`, which was not read yet, and below `_noted_end` as far as the note goes, a record that is not open is done.  `died` is true
    if the writer of the note did not give the partition back; the records that it had marked as suspects were running then.
    """

    def __init__(self, position: int, note: str = "") -> None:
        self.next = position
        self._open: dict[int, bool] = {}  # offset, in order -> whether it is a suspect
        self._noted_end, self._noted, self.died = _read(position, note)

    def take(self, offset: int) -> bool:
        """Take the next record that was read; false if it is done already."""
        self.next = offset + 1
        if offset < self._noted_end and offset not in self._noted:
            return False
        self._open[offset] = self.suspected(offset)  # a suspect remains one until it is done
        return True

    def pass_marks(self, end: int) -> None:
        """Note that everything before this offset was read: the last offsets may be transaction markers, which are not records."""
        self.next = max(self.next, end)

    def behind(self, offset: int) -> bool:
        """Whether this record is before the read position, so that it must be from another log (the topic was created anew)."""
        return offset < self.next

    def suspected(self, offset: int) -> bool:
        """Whether the record was running, and marked, when the writer of the note died."""
        return self.died and self._noted.get(offset, False)

    def suspect(self, offset: int) -> None:
        """Mark an open record: if this process dies, the record may be why."""
        if offset in self._open:
            self._open[offset] = True

    def finish(self, offset: int) -> None:
        self._open.pop(offset, None)

    @property
    def position(self) -> int:
        """The first open offset, or else the next one."""
        return next(iter(self._open), self.next)

    def note(self, held: bool = True) -> str:
        """The note: what is done behind `position`, and whether the partition is still held.  If there is too much for a note, it covers the first part."""
        position, end = self.position, max(self.next, self._noted_end)
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
        yield from sorted((offset, suspect) for offset, suspect in self._noted.items() if offset >= self.next)


def _read(position: int, note: str) -> tuple[int, dict[int, bool], bool]:
    """Parse a note: the offset up to which it goes, the open records (and which are suspects), and whether it is held.  Never raises."""
    try:
        form, end, steps, held = note.split(" ")
        if form != _FORMAT:
            return 0, {}, False
        opened = {position + int(step.rstrip(_SUSPECT), 16): step.endswith(_SUSPECT) for step in steps.split(",") if step}
        return position + int(end, 16), opened, held == _HELD
    except ValueError:
        return 0, {}, False
