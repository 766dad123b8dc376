"""Which calls of activities wait for their turn: a window of them in memory, oldest first, all else in the stores.

The store is the queue: what a commit hands out lies there until it is answered.  So ten thousand waiting calls cost no
memory, and a new owner of a partition finds what its predecessor left (at-least-once).  It must not know what runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from kwflow.core.dispatch import PREFIX, Dispatch, decode, state_key
from kwflow.ports import Store

__all__ = ["Backlog"]

_BYTES_MAX = 16_000_000  # of the arguments of what is ready


class _Owned:
    """A partition: its store, the last entry taken into memory, whether more lies behind it, and what lies before it and found no room."""

    __slots__ = ("cursor", "late", "more", "store")

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cursor = PREFIX
        self.more = True
        self.late: deque[bytes] = deque()


class Backlog:
    """The calls of the partitions that are owned.  Whoever asks makes what it is given ready (`room`), or not, before it asks for more."""

    def __init__(self, ready_max: int) -> None:
        self.ready_max = ready_max
        self._ready = 0
        self._bytes = 0
        self._owned: dict[int, _Owned] = {}

    def own(self, partition: int, store: Store) -> None:
        self._owned[partition] = _Owned(store)

    def owns(self, partition: int) -> bool:
        return partition in self._owned

    @property
    def partitions(self) -> list[int]:
        return list(self._owned)

    def disown(self, partition: int) -> None:
        self._owned.pop(partition, None)

    def room(self, item: Dispatch, taken: int) -> None:
        """It has become ready (1), or is no more (-1)."""
        self._ready += taken
        self._bytes += taken * len(item.arguments)

    @property
    def ready(self) -> int:
        return self._ready

    @property
    def full(self) -> bool:
        return self._ready >= self.ready_max or self._bytes >= _BYTES_MAX

    def offer(self, partition: int, item: Dispatch) -> bool:
        """Whether it may be ready at once; else it is left where it lies.  Of what sorts before the cursor (a record of a hold, applied late) the key is kept, as it would not be found again."""
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
        """What there is room for once half of it is free; a share for each partition, or one with a long queue would keep the others from beginning."""
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
            waiting = owned.store.get(owned.late.popleft())
            if waiting is not None:  # it was not withdrawn meanwhile
                yield decode(waiting)
        if not owned.more:
            return
        for key, data in owned.store.scan(PREFIX, owned.cursor + b"\0"):
            if self.full or share <= 0:
                return
            share -= 1
            owned.cursor = key
            yield decode(data)
        owned.more = False
