"""A small world whose one fault is a crash: at each kind of request and write, before it is carried out and after, once early and once late."""

import pytest

from tests.simulation.checks import check
from tests.simulation.faults import Faults
from tests.simulation.workload import Clients
from tests.simulation.world import World, engine_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SEED = 4


class Small(World):
    """Two machines, one partition each, a worker, and a handful of workflows; the same ones in every run."""

    queue_share = 1.0

    def __init__(self, faults: Faults) -> None:
        super().__init__(SEED, faults=faults)
        self.chance.seed(SEED)
        self.machines = [*[machine for machine in self.machines if not machine.queues][:2], self._worker(0)]
        self.upcoming = []
        self.clients = Clients(self, ids=3, actions=12, killers=False)


def places() -> dict[str, list[int]]:
    """Before and after which request or write a process may die, and when in a run without faults."""
    with engine_process():
        world = Small(Faults())
        world.run()
        check(world)
        assert world.happened["calls answered"] > 2
        return world.places


def test_a_crash_at_any_request_or_write_changes_nothing() -> None:
    """G1, G6, M6.6."""
    found = places()
    required = {
        "before commit", "after commit", "before database-write", "after database-write", "before send_offsets", "before init_transactions", "before consume", "before list_offsets",
        "before commit-offsets", "after commit-offsets", "before watermarks", "before committed",
    }  # fmt: skip
    assert required <= found.keys()
    moments = {(where, at[index]) for where, at in found.items() for index in (len(at) // 3, -1)}
    assert len(moments) > 40
    with engine_process():
        for where, number in sorted(moments):
            world = Small(Faults(crash_call=number))
            world.run()
            check(world)
            assert world.happened[f"crash {where}"] == 1, (where, number, world.happened)
