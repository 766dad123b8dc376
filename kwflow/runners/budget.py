"""The limits of one transaction: the bytes it writes and the time its steps take.

The limits are soft, because some sizes are known only after a step: a batch stops after the record that exceeds its
budget, and one record always fits.  This module must not know what the records are.
"""

from __future__ import annotations

from collections.abc import Iterable

from kwflow.core.wire import Output
from kwflow.ports import Clock

__all__ = ["Budget", "bytes_of"]


class Budget:
    """Counts what a batch has produced so far; `spent` returns true once there is no room for another record."""

    __slots__ = ("_begun_ms", "_bytes_left", "_clock", "_until_ms")

    def __init__(self, bytes_max: int, ms_max: int, clock: Clock) -> None:
        self._bytes_left = bytes_max
        self._begun_ms = clock.now_ms()
        self._until_ms = self._begun_ms + ms_max
        self._clock = clock

    def take(self, size: int) -> None:
        self._bytes_left -= size

    def spent(self) -> bool:
        """Also once the clock was set back, as the time that has passed is then unknown."""
        return self._bytes_left <= 0 or not self._begun_ms <= self._clock.now_ms() < self._until_ms


def bytes_of(changes: Iterable[tuple[bytes, bytes | None]], outputs: Iterable[Output]) -> int:
    """The bytes of keys and values that a transaction writes.  Headers are not counted: they are few and have their own limit."""
    states = sum([len(key) + len(value or b"") for key, value in changes])
    return states + sum([len(output.key or b"") + len(output.value or b"") for output in outputs])
