"""A small world whose one fault is a crash: at each kind of request and write, before it is carried out and after, once early and once late."""

import pytest

from tests.simulation.checks import check
from tests.simulation.faults import Faults
from tests.simulation.workload import Clients
from tests.simulation.world import World, engine_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SEED = 4


class Small(World):
    """Two machines, one partition each, and a handful of workflows; the same ones in every run."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(SEED, faults=faults)
        self.chance.seed(SEED)
        self.machines = self.machines[:2]
        self.upcoming = []
        self.clients = Clients(self, ids=3, actions=12, killers=False)


def places() -> dict[str, list[int]]:
    """Before and after which request or write a process may die, and when in a run without faults."""
    with engine_process():
        world = Small(Faults())
        world.run()
        check(world)
        return world.places


def test_a_crash_at_any_request_or_write_changes_nothing() -> None:
    """G1, G6."""
    found = places()
    required = {"before commit", "after commit", "before database-write", "after database-write", "before send_offsets", "before init_transactions", "before consume", "before list_offsets"}
    assert required <= found.keys()
    moments = {(where, at[index]) for where, at in found.items() for index in (len(at) // 3, -1)}
    assert len(moments) > 40
    with engine_process():
        for where, number in sorted(moments):
            world = Small(Faults(crash_call=number))
            world.run()
            check(world)
            assert world.happened[f"crash {where}"] == 1, (where, number, world.happened)
