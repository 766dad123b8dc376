"""How many runs of activities a process may begin in a second: a bucket of tokens, full after a second of rest."""

from __future__ import annotations

import math

__all__ = ["Pace"]


class Pace:
    """At most `rate` a second, and as many at once after a rest; no limit for 0."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._most = max(1.0, rate)
        self._tokens = self._most if rate else math.inf
        self._now = now

    def allows(self, now: float) -> bool:
        """Whether one more may begin; times do not go back."""
        if self._rate:
            self._tokens = min(self._most, self._tokens + (now - self._now) * self._rate)
            self._now = now
        return self._tokens >= 1

    def begun(self) -> None:
        self._tokens -= 1
