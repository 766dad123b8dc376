"""How many activity runs a process may begin per second: a token bucket that is full after a second of rest."""

from __future__ import annotations

import math

__all__ = ["Pace"]


class Pace:
    """At most `rate` runs per second, and as many at once after a rest; 0 means no limit."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._most = max(1.0, rate)
        self._tokens = self._most if rate else math.inf
        self._now = now

    def allows(self, now: float) -> bool:
        """Whether one more run may begin.  `now` must not go back."""
        if self._rate:
            self._tokens = min(self._most, self._tokens + (now - self._now) * self._rate)
            self._now = now
        return self._tokens >= 1

    def begun(self) -> None:
        self._tokens -= 1
