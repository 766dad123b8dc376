"""Everything that a run has written, for the checkers."""

import collections
from collections.abc import Iterator

from kwflow.testing.kafka.log import COMMITTED, Entry, Place, Transaction
from tests.simulation.world import World

__all__ = ["Ledger"]


class Ledger:
    """Every record that was ever written, even if compaction has removed it since."""

    def __init__(self, world: World) -> None:
        self.entries: dict[Place, list[Entry]] = collections.defaultdict(list)
        self._by_transaction: dict[Transaction, list[tuple[Place, Entry]]] = {}
        for place, entry in world.broker.journal:
            self.entries[place].append(entry)
            if entry.transaction is not None:
                self._by_transaction.setdefault(entry.transaction, []).append((place, entry))

        for transaction in world.broker.moved:
            self._by_transaction.setdefault(transaction, [])

    def transactions(self) -> Iterator[tuple[Transaction, list[tuple[Place, Entry]]]]:
        """The committed transactions, in the order in which they were decided."""
        done = [(transaction, entries) for transaction, entries in self._by_transaction.items() if transaction.state == COMMITTED]
        return iter(sorted(done, key=lambda pair: pair[0].decided_ms))

    def all(self) -> list[Transaction]:
        return list(self._by_transaction)

    def visible(self, place: Place) -> list[Entry]:
        return [entry for entry in self.entries[place] if entry.transaction is None or entry.transaction.state == COMMITTED]
