"""State that moves to another log: where an entry belongs there, and how often it has moved (decisions 0064, 0065).

Refs are `<offset>:<n>`, and whoever is called by an activity knows its call by the ref.  After a move the offsets of earlier
calls come again, so the numbers behind them go on where none was before.
"""

from __future__ import annotations

from kwflow.core import dispatch, timers
from kwflow.ports import Changes, Store
from kwflow.runners.checkpoints import of_checkpoint
from kwflow.runners.ended import EXPIRES
from kwflow.runners.parked import of_hold

__all__ = ["MOVES", "Due", "home_of", "moves_in", "moves_of"]

_DIGITS_MAX = 6
_FIELDS = {EXPIRES: 1, dispatch.PREFIX: 2, timers.DUE: 2}  # prefix of an engine's own keys -> how many fields such a key has beside the record key it belongs to
MOVES = b"\0moves"  # key in the state of each partition: how often it was moved to a log whose offsets begin anew; missing if never


def moves_in(state: Store | Changes) -> int:
    return moves_of(state.get(MOVES))


def moves_of(stored: bytes | None) -> int:
    return int(stored) if stored is not None and stored.isdigit() and len(stored) < _DIGITS_MAX else 0


def home_of(key: bytes) -> bytes | None:
    """The record key that decides which partition an entry belongs to; None for entries that each partition has of its own."""
    if (of := of_hold(key) or of_checkpoint(key)) is not None:
        return of
    for prefix, fields in _FIELDS.items():
        if key.startswith(prefix):
            told = key[len(prefix) :].split(b"\0", fields)
            return told[fields] if len(told) > fields else None
    return None if key.startswith(b"\0") else key


class Due:
    """How many of the timers that it sees there are, and which is the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: bytes | None = None

    def see(self, key: bytes) -> None:
        if key.startswith(timers.DUE):
            self.count += 1
            self.first = key if self.first is None else min(self.first, key)

    @property
    def entry(self) -> bytes | None:
        """The value of timers.COUNT; None if there are none."""
        return None if self.first is None else b"%d %s" % (self.count, self.first)
