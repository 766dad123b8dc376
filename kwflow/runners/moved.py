"""How often the state of a partition was moved to a log whose offsets begin anew: an import, or more partitions (decision 0064).

Refs are `<offset>:<n>`, and whoever is called by an activity knows its call by the ref.  After a move the offsets of earlier
calls come again, so the numbers behind them go on where none was before.
"""

from __future__ import annotations

from kwflow.ports import Changes, Store

__all__ = ["MOVES", "moves_in", "moves_of"]

_DIGITS_MAX = 6
MOVES = b"\0moves"  # key in the state of each partition; missing if it was never moved


def moves_in(state: Store | Changes) -> int:
    return moves_of(state.get(MOVES))


def moves_of(stored: bytes | None) -> int:
    return int(stored) if stored is not None and stored.isdigit() and len(stored) < _DIGITS_MAX else 0

