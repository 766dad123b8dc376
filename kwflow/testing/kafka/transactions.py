"""The transaction coordinator: producer epochs and fencing, decided transactions whose markers are written later, time-outs.

A transaction is decided at one instant, but each partition, and the offsets of each group, learn of it by their own marker,
at their own time; in between, one is visible and another is not.  Errors are raised as `Refused`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable

from confluent_kafka import KafkaError

from kwflow.errors import KwflowBug
from kwflow.testing.kafka.log import ABORTED, COMMITTED, OPEN, Partition, Place, Transaction
from kwflow.testing.kafka.time import VirtualTime

__all__ = ["Coordinator", "Refused"]


class Refused(Exception):
    """The broker refuses a request; `code` is Kafka's error code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


@dataclasses.dataclass(slots=True)
class Identity:
    """One transactional id.  It is `ending` until every marker of its decided transaction is written."""

    name: str
    epoch: int = -1
    timeout_ms: float = 60_000
    current: Transaction | None = None
    expired: bool = False
    ended: str | None = None  # how the last transaction of this epoch ended, since a repeated EndTxn gets the same answer

    @property
    def ending(self) -> bool:
        return self.current is not None and self.current.state != OPEN


class Coordinator:
    """The transaction coordinator.  It calls `settle_offsets(group, transaction)` when the marker reaches the offsets of a group."""

    def __init__(self, time: VirtualTime, chance: random.Random, partition: Callable[[Place], Partition], settle_offsets: Callable[[str, Transaction], None]) -> None:
        self._time = time
        self._chance = chance
        self._partition = partition
        self._settle_offsets = settle_offsets
        self._identities: dict[str, Identity] = {}
        self.marker_delay_ms = 20.0  # at most, between the decision and each marker; most are written much sooner

    def init(self, name: str, timeout_ms: float) -> int:
        """Fence whoever has this id, end its transaction, and return the new epoch."""
        known = self._identities.setdefault(name, Identity(name))
        known.timeout_ms, known.expired = timeout_ms, False
        if known.current is not None and known.current.state == OPEN:
            known.epoch += 1
            self._decide(known, ABORTED)
        if known.ending:
            raise Refused(KafkaError.CONCURRENT_TRANSACTIONS, "the last transaction of this id is still ending")
        known.epoch += 1
        known.ended = None
        return known.epoch

    def _known(self, name: str, epoch: int) -> Identity:
        known = self._identities[name]
        if known.expired:
            raise Refused(KafkaError.INVALID_PRODUCER_ID_MAPPING, "the producer id is not assigned to this transactional id")
        if epoch != known.epoch:
            raise Refused(KafkaError._FENCED, "a newer producer with this transactional id is active, or its transaction timed out")
        return known

    def expire(self, name: str) -> None:
        """Forget an id, as after `transactional.id.expiration.ms` without a transaction; a producer that initializes it again can continue."""
        assert self._identities[name].current is None
        self._identities[name].expired = True

    def add(self, name: str, epoch: int) -> Transaction:
        """Return the open transaction; begin one if there is none."""
        known = self._known(name, epoch)
        if known.ending:
            raise Refused(KafkaError.CONCURRENT_TRANSACTIONS, "markers of the last transaction are still being written")
        if known.current is None:
            transaction = known.current = Transaction(name, epoch, self._time.now)
            self._time.after(known.timeout_ms, lambda: self._timed_out(known, transaction))
        return known.current

    def wrote(self, transaction: Transaction, place: Place, offset: int) -> None:
        transaction.places.setdefault(place, offset)

    def end(self, name: str, epoch: int, state: str) -> None:
        """Decide the transaction as `COMMITTED` or `ABORTED`.  A repeated request gets the same answer."""
        known = self._known(name, epoch)
        if known.current is None or known.ending:
            ended = known.current.state if known.current is not None else known.ended
            if ended is not None and ended != state:
                raise Refused(KafkaError.INVALID_TXN_STATE, f"the transaction was {ended}")
            return
        self._decide(known, state)

    def decided(self, name: str) -> bool:
        """Whether every marker of this id's last transaction is written."""
        return not self._identities[name].ending

    def _timed_out(self, known: Identity, transaction: Transaction) -> None:
        if known.current is transaction and transaction.state == OPEN:
            known.epoch += 1  # its producer is fenced
            self._decide(known, ABORTED)

    def _decide(self, known: Identity, state: str) -> None:
        transaction = known.current
        assert transaction is not None
        transaction.state = known.ended = state
        transaction.decided_ms = self._time.now
        left: set[object] = {*transaction.places, *transaction.groups}

        def marked(what: object) -> None:
            if isinstance(what, str):
                self._settle_offsets(what, transaction)
            else:
                with contextlib.suppress(Refused):  # the topic was deleted meanwhile
                    self._partition(what).mark(transaction, self._time.now)  # type: ignore[arg-type] # a Place
            left.discard(what)
            if not left:
                known.current = None
            self._time.changed()

        most = self.marker_delay_ms * (1.0 if self._chance.random() < 0.1 else 0.01)
        for what in sorted(left, key=repr):
            self._time.after(most * self._chance.random(), lambda what=what: marked(what))  # type: ignore[misc]
        if not left:
            known.current = None
        if state not in (COMMITTED, ABORTED):
            raise KwflowBug(f"a transaction is ended as {state}")
