"""A batch that is to become one transaction of the Kafka runner, and the ways in which it can fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from kwflow.core.wire import Output, Record
from kwflow.ports import Decision
from kwflow.runners.budget import bytes_of
from kwflow.runners.logs import lines_of
from kwflow.runners.loop import Overlay

__all__ = ["Aborted", "Batch", "Rejected"]


class Aborted(Exception):
    """Nothing of the transaction has happened; its records will be read again."""


class Rejected(Exception):
    """The broker will never take one of these records (K11)."""


@dataclass
class Batch:
    """What one transaction is to hold; `positions` are the offsets it sends."""

    overlays: dict[int, Overlay] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
    dispatch: dict[int, list[object]] = field(default_factory=dict)
    spans: list[object] = field(default_factory=list)

    def add(self, number: int, made: Decision, record: Record | None = None) -> None:
        """All of a decision but its replies."""
        self.outputs += made.outputs
        if made.logs:
            self.logs += made.logs if record is None else lines_of(made, record)
        self.counts += made.counts
        self.spans += made.spans
        if made.dispatch:
            self.dispatch.setdefault(number, []).extend(made.dispatch)

    def bytes(self) -> int:
        return bytes_of((change for overlay in self.overlays.values() for change in overlay.changes.items()), self.outputs)
