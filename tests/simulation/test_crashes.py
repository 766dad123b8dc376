"""A small world whose only fault is a crash: at each kind of request and write, before it is carried out and after it, once early and once late."""

import pytest

from tests.simulation.checks import check
from tests.simulation.faults import Faults
from tests.simulation.others import Others
from tests.simulation.workload import Clients
from tests.simulation.world import Machine, World, engine_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SEED = 4


class Small(World):
    """Two machines with one partition each, a worker, and a handful of workflows; the same ones in every run."""

    queue_share = 1.0

    def __init__(self, faults: Faults) -> None:
        super().__init__(SEED, faults=faults)
        self.chance.seed(SEED)
        self.machines = [*[machine for machine in self.machines if not machine.queues][:2], *([self._worker(0)] if self.queues else [])]
        self.upcoming = []
        self.clients = Clients(self, ids=3, actions=12, killers=False)


class SmallFed(Small):
    """One engine and one feed. Only the feed may die."""

    queue_share = 0.0
    feed_share = 1.0

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.machines = [*self.machines[:1], Machine("feed0", ("feed",), self.directory / "feed0")]
        self.others = Others(self, killers=False, events=10, changes=["shorten"])
        self.clients = Clients(self, ids=1, actions=2, killers=False)

    def _add_feeds(self) -> None:
        """Feeds are added once there is a plan."""

    def counts(self, process: str) -> bool:
        return process.startswith("feed")


def places(kind: type[Small]) -> dict[str, list[int]]:
    """Return the places where a process may die, before and after which request or write, and at which calls of a run without faults they come."""
    with engine_process():
        world = kind(Faults())
        world.run()
        check(world)
        assert world.happened["calls answered"] > 2 or world.happened["events fed"] > 2
        return world.places


def died(kind: type[Small], required: set[str]) -> int:
    """Check a run for each place, and return how many runs that were."""
    found = places(kind)
    assert required <= found.keys()
    moments = {(where, at[index]) for where, at in found.items() for index in (len(at) // 3, -1)}
    with engine_process():
        for where, number in sorted(moments):
            world = kind(Faults(crash_call=number))
            world.run()
            check(world)
            assert world.happened[f"crash {where}"] == 1, (where, number, world.happened)
    return len(moments)


def test_a_crash_at_any_request_or_write_changes_nothing() -> None:
    """G1, G6, M6.6."""
    required = {
        "before commit", "after commit", "before database-write", "after database-write", "before send_offsets", "before init_transactions", "before consume", "before list_offsets",
        "before commit-offsets", "after commit-offsets", "before watermarks", "before committed",
    }  # fmt: skip
    assert died(Small, required) > 40


def test_a_feed_that_dies_at_any_request_reads_each_record_once() -> None:
    """G1, decision 0058."""
    required = {
        "before commit", "after commit", "before send_offsets", "after send_offsets", "before init_transactions", "before consume", "before list_offsets", "before committed",
        "before describe_topics", "after describe_topics", "before flush",
    }  # fmt: skip
    assert died(SmallFed, required) > 25
