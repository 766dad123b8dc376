"""The uncommitted changes of a batch, and the pause in garbage collection during which a batch is decided and committed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from kwflow.ports import Store

__all__ = ["Overlay", "collecting_later"]


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Suspend cyclic garbage collection inside of this.

    Runners decide and commit a batch inside of it: a collection would traverse everything that the batch holds, nearly all of which is freed without one.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Overlay:
    """A store with uncommitted changes on top: within a batch you read your own writes (K3)."""

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
