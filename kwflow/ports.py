"""The interfaces between the runners and what they run.  Protocols and plain data only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec

from kwflow.core.wire import Headers, Output, Record

__all__ = ["Budget", "Changes", "Clock", "Decision", "Deliver", "Link", "Listener", "Processor", "RunEvent", "Store", "Worker"]


class Store(Protocol):
    """The state of one partition of one processor; keys and values are bytes."""

    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield the entries whose key starts with the prefix, in key order.  Those before `start` are not even read."""


class Changes(Store, Protocol):
    """A Store that can be changed; nobody else sees the changes before they are committed."""

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set a value; None deletes the entry."""


class Clock(Protocol):
    """Wall-clock time, which tests can replace."""

    def now_ms(self) -> int: ...


class RunEvent(msgspec.Struct, frozen=True):
    """What happened to a run of a workflow: it was started or parked, or has ended with this outcome, after so many seconds."""

    workflow: str
    event: str
    seconds: float | None = None

    @classmethod
    def ended(cls, workflow: str, outcome: str, began_ms: float, ended_ms: float) -> RunEvent:
        return cls(workflow, outcome, max(0.0, ended_ms - began_ms) / 1000)


class Decision(msgspec.Struct, frozen=True):
    """What one record (or the passing of time) did, besides its changes of state.

    Nothing has happened yet: state, outputs and offset are committed together, or not at all.  `replies` are outputs to the partition on
    which somebody waits; a reply to a partition that does not exist (any more) is counted and left out.  `logs` are written, `dispatch` is
    started and `spans` are ended after the commit.  `counts` are the names of the counters to increment, and `runs` is counted by workflow.
    """

    outputs: tuple[Output, ...] = ()
    logs: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    replies: tuple[Output, ...] = ()
    dispatch: tuple[object, ...] = ()
    spans: tuple[object, ...] = ()
    runs: tuple[RunEvent, ...] = ()


class Budget(Protocol):
    """What one transaction may hold."""

    def take(self, size: int) -> None:
        """Note that `size` more bytes will be written."""

    def spent(self) -> bool:
        """Whether there is no room for another record."""


# (partition, key, value, headers, done): write one record to the input topic, from any thread.  It calls `done(None)` once the record
# is in the log, or `done(why)` if it never will be.
Deliver: TypeAlias = Callable[[int, bytes, bytes, Headers, Callable[[str | None], None]], None]


class Worker(Protocol):
    """Does the work that commits hand out, outside of them.  The engine's thread calls all methods; none of them blocks, except for a grace period."""

    def own(self, partition: int, store: Store) -> None:
        """Begin with the calls in this store; called once every record present at the takeover has been applied, since some of these hold results."""

    def owns(self, partition: int) -> bool: ...

    def committed(self, partition: int, items: Iterable[object]) -> None:
        """Start, or stop, what a commit has handed out, in this order."""

    def turn(self) -> None:
        """Look after the running calls, and take more from the stores if there is room; called a few times a second."""

    def hurry(self) -> None:
        """No more calls will come until some of these are answered, so a call that waits for others of its kind need not wait any longer."""

    def disown(self, partition: int, grace_s: float | None = None) -> None:
        """Start no more calls of this partition; running ones may finish within the grace period.  Without one, others own it already."""

    def close(self, grace_s: float = 0.0) -> None:
        """Stop; running calls may finish within the grace period."""


class Processor(Protocol):
    """A pure decider over one input topic and its own state.  It writes changes of state to the `Changes` that it is given."""

    input_topic: str
    changelog_topic: str
    """Of its state; empty for one that has none, whose records may lie in any partition, and whose input is somebody else's."""
    partitions: int
    """Of the input topic; a runner that has more than one says how many."""

    def taken_over(self, store: Store) -> Mapping[str, str]:
        """Load the code that the instances of this partition need, before its first record (semantics §9.6).

        Return the topics that this code declares, each with the version (`<module>@<sha256>`) because of which it was loaded.
        """

    def decide(self, state: Changes, records: Sequence[Record], received_ms: int, budget: Budget | None = None) -> list[Decision]:
        """Return what these records of one partition do, in order, as one Decision for each.  Never raises for bad input.

        Once the budget is spent, the remaining records get no Decision: they belong to the next transaction.  The first record always gets one.
        """

    def refuse(self, state: Changes, record: Record, reason: str, topic: str = "") -> Decision:
        """Return what happens to a record whose Decision the log has rejected (K11); `topic` is the topic that did, if that is known."""

    def due(self, state: Changes, now_ms: int, limit: int) -> Decision | None:
        """Return what has become due by time; None if nothing has."""

    def work(self, deliver: Deliver) -> Worker | None:
        """Return the Worker that does what decisions dispatch, and delivers the results; None if they dispatch nothing."""

    def next_due_ms(self, store: Store) -> int | None:
        """Return when `due` is to be called next; None for never."""


class Listener(Protocol):
    """What a Link tells a client, on a thread of its own."""

    def on_record(self, record: Record) -> None:
        """Called with a committed record of the reply, result or error topic; in order for each partition."""

    def on_tick(self) -> None:
        """Called several times a second."""

    def on_gap(self) -> None:
        """Called when records may have been missed."""

    def on_lost(self, error: Exception) -> None:
        """Called when no more records will come."""


class Link(Protocol):
    """How a client reaches the engines of one application: it writes to their log and follows what they write."""

    process: str

    @property
    def address(self) -> str:
        """The `kwflow-reply-to` of this process (M1.2)."""

    def listen(self, listener: Listener) -> None:
        """Begin to call the listener; replies are followed from a point before this call."""

    def follow(self, key: bytes, ready: Callable[[], None]) -> None:
        """Follow the outcomes of this id from now on; `ready` is called once no record that is written later can be missed (M1.3)."""

    def append(self, output: Output, failed: Callable[[Exception], None]) -> None:
        """Write one record, and return at once.  `failed` is called if it was not written, or possibly not."""

    def find(self, key: bytes) -> list[Record]:
        """Return the result and error records of this id that still exist, oldest first in each topic.  Blocks."""

    def close(self) -> None: ...
