"""Instances kept alive between batches, so that a busy one need not be unpickled (K3)."""

from __future__ import annotations

from typing import Any

from kwflow.config import Config
from kwflow.core.instance import Instance

__all__ = ["Live", "LiveInstances"]


class Live:
    """An instance that may be ahead of its stored bytes.

    `base` is what the state holds for it; `ahead` tells whether it made a step since; `met` lists the numbers of the batch's
    records that it has received since; `old` tells whether it was loaded on old code.  `checkpoints` is what the header of an
    ended run says of them, if this is to be the next one under the id; `changed` tells whether `base` is worth one.
    """

    __slots__ = ("ahead", "base", "changed", "checkpoints", "instance", "met", "old")

    def __init__(self, base: bytes | None, instance: Instance | None, checkpoints: Any = None) -> None:
        self.base = base
        self.instance = instance
        self.checkpoints = checkpoints
        self.old = instance is not None and bool(instance.pins)
        self.ahead = self.changed = False
        self.met: list[int] = []

    def forget(self) -> None:
        if self.instance is not None:
            self.instance.forget()


class LiveInstances:
    """A cache of limited size; the least recently used instances are dropped first, without running their cleanup (G8).

    An instance is used only if its bytes are still those that are stored, so nobody has to tell the cache about aborts and takeovers.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hits = self.misses = 0
        self._sleeping: dict[bytes, Live] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sleeping)

    def awake(self, key: bytes, stored: bytes) -> Live | None:
        """Take out and return the live instance of exactly these bytes; None if it is not here."""
        live = self._sleeping.pop(key, None)
        if live is not None:
            self._bytes -= len(live.base or b"")
            if live.base == stored:
                self.hits += 1
                return live
            live.forget()  # its batch was aborted, or its partition was elsewhere meanwhile
        self.misses += 1
        return None

    def keep(self, key: bytes, live: Live) -> None:
        """Keep an instance for the next batch, unless it ran on old code, even if this step moved it to the current code.

        Such an instance is loaded again, so that before each step it is decided anew which code it holds, the same as after a restore (semantics §8.2).
        """
        self.drop(key)  # an earlier run whose batch was aborted
        if live.old:
            return live.forget()
        live.ahead, live.changed, live.met = False, False, []
        self._sleeping[key] = live
        self._bytes += len(live.base or b"")
        while len(self._sleeping) > self.config.instances_cached_max or self._bytes > self.config.instances_cached_bytes_max:
            self._let_go(next(iter(self._sleeping)))

    def drop(self, key: bytes) -> None:
        """Forget the instance of this id, if it is here: nobody needs it any more."""
        if key in self._sleeping:
            self._let_go(key)

    def _let_go(self, key: bytes) -> None:
        live = self._sleeping.pop(key)
        self._bytes -= len(live.base or b"")
        live.forget()

    def forget(self) -> None:
        """Drop all instances; what is stored is the truth."""
        for live in self._sleeping.values():
            live.forget()
        self._sleeping.clear()
        self._bytes = 0
