"""The activity calls that wait for their turn: a window of them is in memory, oldest first, and the rest is in the stores.

The store is the queue: a call that a commit dispatches stays there until it is answered.  So ten thousand waiting calls cost
no memory, and a new owner of a partition finds what its predecessor left (at-least-once).  This module must not know what runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from kwflow.core.dispatch import PREFIX, Dispatch, decode, state_key
from kwflow.ports import Store

__all__ = ["Backlog"]

_BYTES_MAX = 16_000_000  # of the arguments of calls that are ready


class _Owned:
    """A partition: its store, the last entry taken into memory (`cursor`), whether `more` follow it, and entries before it that found no room (`late`)."""

    __slots__ = ("cursor", "late", "more", "store")

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cursor = PREFIX
        self.more = True
        self.late: deque[bytes] = deque()


class Backlog:
    """The waiting calls of the owned partitions.  A caller decides whether each call that it is given becomes ready (`room`) before it asks for the next."""

    def __init__(self, ready_max: int, on_log: Callable[[str], None]) -> None:
        self.ready_max = ready_max
        self._on_log = on_log
        self._ready = 0
        self._bytes = 0
        self._owned: dict[int, _Owned] = {}

    def own(self, partition: int, store: Store) -> None:
        self._owned[partition] = _Owned(store)

    def owns(self, partition: int) -> bool:
        return partition in self._owned

    def store(self, partition: int) -> Store:
        return self._owned[partition].store

    @property
    def partitions(self) -> list[int]:
        return list(self._owned)

    def disown(self, partition: int) -> None:
        self._owned.pop(partition, None)

    def room(self, item: Dispatch, taken: int) -> None:
        """Count a call that has become ready (`taken` 1), or is no longer ready (-1)."""
        self._ready += taken
        self._bytes += taken * len(item.arguments)

    @property
    def ready(self) -> int:
        return self._ready

    @property
    def full(self) -> bool:
        return self._ready >= self.ready_max or self._bytes >= _BYTES_MAX

    def offer(self, partition: int, item: Dispatch) -> bool:
        """Whether a new call may become ready at once; if not, it stays in the store.

        If it sorts before the cursor (its record was on a hold and is applied late), its key is kept in `late`, as a scan would not find it again.
        """
        owned, key = self._owned[partition], state_key(item.workflow_id, item.ref)
        if key > owned.cursor:
            if owned.more or self.full:
                owned.more = True
                return False
            owned.cursor = key
        elif owned.late or self.full:
            owned.late.append(key)
            return False
        return True

    def take(self) -> Iterator[tuple[int, Dispatch]]:
        """Yield as many calls as there is room for, once half of the window is free.

        Each partition gets a share, as otherwise one with a long queue would keep the others from beginning.
        """
        waiting = [(partition, owned) for partition, owned in self._owned.items() if owned.more or owned.late]
        room = self.ready_max - self._ready
        if waiting and room > self.ready_max // 2:
            share = max(1, room // len(waiting))
            for partition, owned in waiting:
                for item in self._next(owned, share):
                    yield partition, item

    def _next(self, owned: _Owned, share: int) -> Iterator[Dispatch]:
        while owned.late:
            if self.full or share <= 0:
                return
            share -= 1
            key = owned.late.popleft()
            waiting = owned.store.get(key)
            if waiting is not None:  # None: it was withdrawn meanwhile
                yield from self._read(key, waiting)
        if not owned.more:
            return
        for key, data in owned.store.scan(PREFIX, owned.cursor + b"\0"):
            if self.full or share <= 0:
                return
            share -= 1
            owned.cursor = key
            yield from self._read(key, data)
        owned.more = False

    def _read(self, key: bytes, data: bytes) -> Iterator[Dispatch]:
        """Yield the call of an entry.  One that nobody can read (it was damaged, or forged) stays where it is, and hides no other."""
        try:
            call = decode(data)
        except msgspec.DecodeError as error:
            self._on_log(f"an activity call under {key!r} cannot be read, and is not started: {error}")
        else:
            yield call
