"""Planted bugs of feeds (decision 0058), like those in `planted.py`."""

import contextlib
from typing import Any
from unittest import mock

from kwflow.runners.kafka.fencing import Fencing
from kwflow.runners.kafka.foreign import Foreign
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.kafka.takeover import Takeover
from kwflow.runners.kafka.transaction import Batch
from tests.simulation.faults import Faults
from tests.simulation.planted import ABORTS, CRASHES_IN_COMMITS, Planted
from tests.simulation.world import Machine, World

ZOMBIES_IN_TRANSACTIONS = Faults(freeze=0.3, at="send_offsets", freeze_ms=(500, 5_000))


class Fed(World):
    """A world in which each seed has a feed."""

    feed_share = 1.0
    rest_ms = 200_000
    switches_max = 100_000


class Changed(Fed):
    """A world in which others make every kind of change to their topic."""

    changes = ("shorten", "anew", "add", "shorten", "anew in a moment")

    def _add_feeds(self) -> None:
        super()._add_feeds()
        assert self.others is not None
        self.others.changes = [*self.changes]


class Shortened(Changed):
    """It loses records again and again, in half of the cases when all readers restart and have not read some of the records."""

    changes = ("shorten",) * 5


class Smaller(Changed):
    """It is created anew with fewer partitions while its readers restart, so that they are given those of the topic before."""

    changes = ("add", "anew in a moment") * 3


class Pair(Fed):
    """Two feeds: one that dies is away for longer than its transaction may be open, and the other one goes on."""

    def _add_feeds(self) -> None:
        super()._add_feeds()
        self.machines = [*self.machines[:1], *(Machine(f"feed{number}", ("feed",), self.directory / f"feed{number}") for number in range(2))]

    def _while_down(self, machine: Machine) -> None:
        self.hub.pause(self.time.now + (30_000 if "feed" in machine.roles and not self.calm else 100))


class FeedsWithoutPositions(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        with contextlib.nullcontext() if self.processor.changelog_topic else mock.patch.object(self.transactions._producer, "send_offsets_to_transaction", lambda *_: None):
            super()._commit(batch)


class FeedsBeforeItCommits(KafkaRunner):
    def _commit(self, batch: Batch) -> None:
        if not self.processor.changelog_topic:
            producer = self.environment.producer({"partitioner": "murmur2_random"})
            for output in batch.outputs:
                with contextlib.suppress(BufferError):
                    producer.produce(output.topic, output.value, output.key, headers=list(output.headers))
            producer.flush(10)
            batch.outputs = []
        super()._commit(batch)


class FeedsOnBehindAnAbort(KafkaRunner):
    def turn(self) -> None:
        seek = self.takeover.seek
        with mock.patch.object(self.takeover, "seek", lambda number, offset: seek(number, offset + 1 if self.transactions.aborts and not self.processor.changelog_topic else offset)):
            super().turn()


def _nobody_ends_what_the_dead_left() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Fencing, "end_transaction_of", lambda *_: None)


def _read_from_the_end() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Foreign, "read_on_from", lambda _, number, position, begin, end: position if begin <= position <= end else end)


def _kept_although_it_is_no_more() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Takeover, "_count_again", lambda *_: None)


def _read_on_in_another_topic() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Foreign, "check", lambda _: None)


def _any_position_is_taken() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Foreign, "noted", lambda _, where: where.offset)


FED = [
    Planted("K16", "a feed's position is not part of its transaction", runner=FeedsWithoutPositions, world=Fed),
    Planted("G1", "a feed's messages are no part of its transaction", ABORTS, FeedsBeforeItCommits, world=Fed),
    Planted("K3", "a feed that was aborted reads on behind its batch", ABORTS, FeedsOnBehindAnAbort, world=Fed),
    Planted("K1", "nobody ends the transaction that a feed died in", CRASHES_IN_COMMITS, patch=_nobody_ends_what_the_dead_left, world=Pair, first=3),
    Planted("G3", "what is there still of a topic that was shortened is passed over", Faults(kill=0.2), patch=_read_from_the_end, world=Shortened),
    Planted("G3", "a topic that was made anew is read on where the one before was", patch=_read_on_in_another_topic, world=Changed, first=4),
    Planted("G3", "a position in a topic that was deleted is taken for one in the next", ZOMBIES_IN_TRANSACTIONS, patch=_any_position_is_taken, world=Changed, first=6),
    Planted("K7", "partitions that are no more are kept by who was given them", patch=_kept_although_it_is_no_more, world=Smaller, first=12),
]
