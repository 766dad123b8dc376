"""How tests wait for what another process or thread does: they look again and again, with a pause in between."""

import time
from collections.abc import Callable

__all__ = ["until"]

_PAUSE_S = 0.03  # without one, a test that waits takes the processor from what it waits for


def until(found: Callable[[], object], seconds: float = 60, told: Callable[[], str] = lambda: "") -> None:
    """Return once this finds something.  Raises AssertionError, with what is `told`, if that takes longer."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s\n{told()}"
        time.sleep(_PAUSE_S)
