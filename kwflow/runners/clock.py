"""The wall clock of every runner that was not given another."""

from __future__ import annotations

import time

__all__ = ["SystemClock"]


class SystemClock:
    """A Clock (ports.py)."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000
