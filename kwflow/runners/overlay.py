"""What a batch changes before it is committed, and the calm in which it is decided and committed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from kwflow.ports import Store

__all__ = ["Overlay", "collecting_later"]


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """No cyclic collection within: what runs a batch puts its decisions and its commit into this, as it would pass all that they hold, and nearly all of that is freed without one."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Overlay:
    """A store with changes on top: within a batch you read your own writes (K3)."""

    def __init__(self, below: Store) -> None:
        self.below = below
        self.changes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.changes[key] if key in self.changes else self.below.get(key)

    def put(self, key: bytes, value: bytes | None) -> None:
        self.changes[key] = value

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        changed = sorted((key for key in self.changes if key.startswith(prefix) and key >= start), reverse=True)
        for key, value in self.below.scan(prefix, start):
            while changed and changed[-1] <= key:
                mine = changed.pop()
                new = self.changes[mine]
                if new is not None:
                    yield mine, new
            if key not in self.changes:
                yield key, value
        while changed:
            mine = changed.pop()
            new = self.changes[mine]
            if new is not None:
                yield mine, new
