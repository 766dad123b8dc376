"""What the runners and what they run expect of each other.  Protocols and plain data only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec

from kwflow.core.wire import Headers, Output, Record

__all__ = ["Budget", "Changes", "Clock", "Decision", "Deliver", "Link", "Listener", "Processor", "Store", "Worker"]


class Store(Protocol):
    """The state of one partition of one processor; keys and values are bytes."""

    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Entries whose key starts with the prefix, in key order; those before `start` are not even passed over."""


class Changes(Store, Protocol):
    """A Store that takes changes, which nobody else sees before they are committed."""

    def put(self, key: bytes, value: bytes | None) -> None:
        """None deletes."""


class Clock(Protocol):
    """Wall-clock time, replaceable in tests."""

    def now_ms(self) -> int: ...


class Decision(msgspec.Struct, frozen=True):
    """What one record (or time) did beside its changes of state.  Nothing has happened yet: state, outputs and offset are committed together, or not at all.

    `replies` are outputs to the partition that somebody waits on; one that is not there (any more) is counted and left
    out.  `logs` are written, `dispatch` is started and `spans` are ended after the commit; `counts` name what was counted.
    """

    outputs: tuple[Output, ...] = ()
    logs: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    replies: tuple[Output, ...] = ()
    dispatch: tuple[object, ...] = ()
    spans: tuple[object, ...] = ()


class Budget(Protocol):
    """What one transaction may hold."""

    def take(self, size: int) -> None:
        """So many bytes more will be written."""

    def spent(self) -> bool:
        """Whether there is no room for another record."""


# (partition, key, value, headers, done): puts one record of the input topic into the log, from any thread; `done(None)` once it is
# there, `done(why)` if it never will be
Deliver: TypeAlias = Callable[[int, bytes, bytes, Headers, Callable[[str | None], None]], None]


class Worker(Protocol):
    """Does what commits hand out, outside of them.  All is called by the engine's thread, and nothing blocks but for a grace period."""

    def own(self, partition: int, store: Store) -> None:
        """Begin with what lies in this store: once every record that was there at the takeover has been applied, for some hold results."""

    def owns(self, partition: int) -> bool: ...

    def committed(self, partition: int, items: Iterable[object]) -> None:
        """A commit has made these: start, or stop, in this order."""

    def turn(self) -> None:
        """Look after what runs, and take more from the stores if there is room; called a few times a second."""

    def hurry(self) -> None:
        """Nothing more comes until some of these are answered: what waits for more of its kind need not."""

    def disown(self, partition: int, grace_s: float = 0.0) -> None:
        """Start nothing more of it; what runs may end within the grace period."""

    def close(self, grace_s: float = 0.0) -> None:
        """End; what runs may end within the grace period."""


class Processor(Protocol):
    """A pure decider over one input topic and its own state; changes of state go to the `Changes` it is given."""

    input_topic: str
    changelog_topic: str
    """Of its state; empty for one that has none, whose records may lie in any partition, and whose input is somebody else's."""
    partitions: int
    """Of the input topic; a runner that has more than one says how many."""

    def taken_over(self, store: Store) -> Mapping[str, str]:
        """Load what the instances of this partition need, before its first record (semantics §9.6).

        The topics that this code declares, each with the version (`<module>@<sha256>`) because of which it was loaded.
        """

    def decide(self, state: Changes, records: Sequence[Record], received_ms: int, budget: Budget | None = None) -> list[Decision]:
        """What these records of one partition do, in order; one Decision each.  Never raises for bad input.

        Once the budget is spent the rest gets no Decision: it belongs to the next transaction.  The first record always gets one.
        """

    def refuse(self, state: Changes, record: Record, reason: str, topic: str = "") -> Decision:
        """What happens to a record whose Decision the log would not take (K11); `topic` is the one that did not, where that is known."""

    def due(self, state: Changes, now_ms: int, limit: int) -> Decision | None:
        """What has become due by time; None when nothing has."""

    def work(self, deliver: Deliver) -> Worker | None:
        """Who does what decisions dispatch, and delivers what comes of it; None when they dispatch nothing."""

    def next_due_ms(self, store: Store) -> int | None:
        """When `due` is to be asked next; None for never."""


class Listener(Protocol):
    """What a Link tells a client, on a thread of its own."""

    def on_record(self, record: Record) -> None:
        """A committed record of the reply, result or error topic; for each partition in order."""

    def on_tick(self) -> None:
        """Several times a second."""

    def on_gap(self) -> None:
        """Records may have been missed."""

    def on_lost(self, error: Exception) -> None:
        """Nothing will come any more."""


class Link(Protocol):
    """How a client reaches the engines of one application: it writes to their log and follows what they write."""

    process: str

    @property
    def address(self) -> str:
        """`kwflow-reply-to` for this process (M1.2)."""

    def listen(self, listener: Listener) -> None:
        """Begin; replies are followed from before this on."""

    def follow(self, key: bytes, ready: Callable[[], None]) -> None:
        """Follow the outcomes of this id from now on; `ready` is called once nothing that is written later can be missed (M1.3)."""

    def append(self, output: Output, failed: Callable[[Exception], None]) -> None:
        """Write one record; returns at once.  `failed` is called if it was not written, or perhaps not."""

    def find(self, key: bytes) -> list[Record]:
        """The result and error records of this id that are still there, oldest first in each topic.  Blocks."""

    def close(self) -> None: ...
