"""What the runners and what they run expect of each other.  Protocols and plain data only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from kwflow.core.wire import Output, Record

__all__ = ["Clock", "Decision", "Processor", "Store"]


class Store(Protocol):
    """The state of one partition of one processor; keys and values are bytes."""

    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries whose key starts with the prefix, in key order."""


class Clock(Protocol):
    """Wall-clock time, replaceable in tests."""

    def now_ms(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What one record (or a due timer) did.  Nothing has happened yet: state, outputs and offset are committed together, or not at all.

    `state` maps keys to new values, None deletes; `logs` are written after the commit, `counts` name what was counted.
    """

    state: dict[bytes, bytes | None] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    logs: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()


class Processor(Protocol):
    """A pure decider over one input topic and its own state."""

    input_topic: str
    changelog_topic: str

    def decide(self, store: Store, record: Record, received_ms: int) -> Decision:
        """What this record does.  Never raises for bad input."""

    def refuse(self, store: Store, record: Record, reason: str) -> Decision:
        """What happens to a record whose Decision the log would not take (K11)."""

    def due(self, store: Store, now_ms: int, limit: int) -> Decision | None:
        """What has become due by time; None when nothing has."""

    def next_due_ms(self, store: Store) -> int | None:
        """When `due` is to be asked next; None for never."""
