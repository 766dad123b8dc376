"""The processor of timers, one more processor on every runner's loop (K18): it keeps the table of the scheduler topic, and fires what is due.

`core/timers.py` decides what a record means and what fires; this module keeps the table in the state.
"""

from __future__ import annotations

from collections.abc import Sequence

from kwflow.config import Config
from kwflow.core import timers, wire
from kwflow.core.wire import Output, Record
from kwflow.errors import ProtocolError
from kwflow.ports import Budget, Changes, Decision, Deliver, Store
from kwflow.runners import parked
from kwflow.runners.stats import DURATIONS, Histogram

__all__ = ["TimerProcessor"]


class TimerProcessor:
    """The timer table of the scheduler topic; `due` fires timers."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.partitions = 1
        self.input_topic = config.scheduler_topic
        self.changelog_topic = config.timers_changelog_topic
        self.lateness = Histogram(DURATIONS)

    def taken_over(self, store: Store) -> dict[str, str]:
        return {}

    def decide(self, state: Changes, records: Sequence[Record], received_ms: int, budget: Budget | None = None) -> list[Decision]:
        made: list[Decision] = []
        table, changed = self._table(state), False
        for record in records:
            decision, after = self._decide(state, record, received_ms, table)
            changed = changed or after is not table
            table = after
            made.append(decision)
            if budget is not None and budget.spent():
                break
        if changed:
            self._put_table(state, *table)
        return made

    def waiting(self, state: Store) -> int:
        """How many timers are set."""
        return self._table(state)[0]

    @staticmethod
    def _table(state: Store) -> tuple[int, bytes]:
        """How many timers are set, and a lower bound of their due keys."""
        count, _, first = (state.get(timers.COUNT) or b"").partition(b" ")
        if first or count == b"0":
            return int(count), first
        keys = [key for key, _ in state.scan(timers.DUE)]  # once, for a table that an earlier version wrote, or what is left of one whose changelog was lost
        return len(keys), keys[0] if keys else b""

    @staticmethod
    def _put_table(state: Changes, count: int, low: bytes) -> None:
        """Store the count and the lower bound.  The bound stays when its timer is cancelled, until its time has come, because:

        1. A workflow cancels its timeout; that of the next workflow is due at another time, and is cancelled too.
        2. The store keeps deleted entries until it is compacted.
        3. If each cancellation looked for the next entry, it would pass thousands of deleted ones, again and again.
        """
        state.put(timers.COUNT, b"%d %s" % (count, low if count else b""))

    def _decide(self, state: Changes, record: Record, received_ms: int, table: tuple[int, bytes]) -> tuple[Decision, tuple[int, bytes]]:
        """What the record does, and the table's count and lower bound after it."""
        try:
            wire.check_size(record, self.config.value_bytes_max, self.config.header_bytes_max)
            stored = state.get(record.key) if record.key else None
            changes = timers.cancel_or_set(record, stored)
        except ProtocolError as error:
            return parked.dead(self.config, record, error.reason, str(error), received_ms), table
        for key, value in changes.items():
            state.put(key, value)
        if not changes:
            return Decision(counts=("timer",)), table
        count, low = table
        count -= stored is not None
        added = changes.get(record.key or b"")
        if added is not None:
            low = min(low, added) if count else added
            count += 1
        return Decision(counts=("timer",)), (count, low)

    def refuse(self, state: Changes, record: Record, reason: str, topic: str = "") -> Decision:
        return parked.dead(self.config, record, "refused", reason, record.timestamp_ms)

    def due(self, state: Changes, now_ms: int, limit: int) -> Decision | None:
        count, low = self._table(state)
        outputs: list[Output] = []
        fired: dict[bytes, bytes | None] = {}
        following = b""
        for due_key, headers in state.scan(timers.DUE, low) if count else ():
            following, due_ms = due_key, timers.due_entries(due_key)[0]
            if due_ms > now_ms or len(outputs) >= limit:
                break
            self.lateness.observe((now_ms - due_ms) / 1000)
            changes, output = timers.fire(due_key, headers, self.config.resume_topic, now_ms)
            fired |= changes
            outputs.append(output)
            following = b""
        if not outputs and following in (low, b""):
            return None
        for key, value in fired.items():
            state.put(key, value)
        self._put_table(state, count - len(outputs), following)
        return Decision(tuple(outputs), counts=("fired",) * len(outputs))

    def work(self, deliver: Deliver) -> None:
        return None

    def next_due_ms(self, store: Store) -> int | None:
        count, low = self._table(store)
        return timers.due_entries(low)[0] if count else None
