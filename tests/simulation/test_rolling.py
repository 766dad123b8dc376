"""Rolling deployments and roll-backs, one engine after the other, with faults in between: each instance goes on in its own code wherever it lands (G10)."""

import collections
import dataclasses
import random
from typing import Any

import pytest

from kwflow.runners.code import CodeStore
from tests.simulation.checks import check
from tests.simulation.faults import Faults
from tests.simulation.releases import Release
from tests.simulation.workload import Clients
from tests.simulation.world import Failed, Machine, World, engine_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SEEDS = range(6)
FAULTS = Faults(crash=0.001, lost=0.01, kill=0.02, stop=0.03, abort=0.01, rebalance=0.02, wipe=0.3, freeze=0.001)
NEW, NEWER, HELPER = Release(1), Release(2), Release(2, 1)


class Rolling(World):
    """Three engines, and releases that come before the last one has reached all of them."""

    machines_min = 3
    release_ms = 10_000

    def __init__(self, seed: int) -> None:
        super().__init__(seed, faults=dataclasses.replace(FAULTS))
        self.upcoming = [NEW, Release(), NEWER, NEW, HELPER, dataclasses.replace(NEWER, newer=True), HELPER, dataclasses.replace(HELPER, newer=True)]
        self.clients = Clients(self, ids=120, actions=300, killers=False)

    def _while_down(self, machine: Machine) -> None:
        """Often stay down so long that others own its partitions meanwhile."""
        super()._while_down(machine)
        if not self.calm and self._rollout.random() < 0.5:
            self.hub.pause(self.time.now + 8_000)


def _all_hold(kind: type[Rolling], seeds: range) -> collections.Counter[str]:
    """Run and check a world of this kind for each seed; return what happened in them."""
    happened: collections.Counter[str] = collections.Counter()
    with engine_process():
        for seed in seeds:
            world = kind(seed)
            try:
                world.run()
                check(world)
            except Failed as failed:
                raise Failed(f"seed {seed}: {failed}\n{world.story(30)}") from None
            happened.update(world.happened)
    print(dict(happened))
    return happened


class Movers(Clients):
    """Clients, and an operator who moves instances in place onto whatever their engine runs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.moving = random.Random(f"moves {self.world.seed}")

    def _act(self) -> None:
        super()._act()
        if self._started and self.moving.random() < 0.3:
            id = self.moving.choice([*self._started, *self.special.accounts])
            self.world.moved.add(id.encode())
            self.send(self.world.config.resume_topic, id, '{"in_place": true}', (("kwflow-op", "migrate"),))


class Moving(Rolling):
    queue_share = 1.0

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.clients = Movers(self, ids=120, actions=300, killers=False)


def test_instances_that_are_moved_in_place_between_any_two_releases_lose_nothing_and_do_nothing_twice() -> None:
    """Decision 0061: a move is one record, applied exactly once, parked and paused or not, whatever dies in between."""
    happened = _all_hold(Moving, SEEDS[:3])
    for what in ("roll", "kill", "crash before consume", "was moved", "ended on moved code", *(f"was moved while it waited for: {kind}" for kind in ("job", "update", "signal", "timer"))):
        assert happened[what], (what, happened)


def test_whatever_is_deployed_and_rolled_back_one_engine_after_the_other_an_instance_keeps_to_its_code() -> None:
    """All guarantees hold for engines that may each run another release: for instances that moved to engines with older code, with newer code, and to new helpers."""
    happened = _all_hold(Rolling, SEEDS)
    for what in ("roll", "kill", "stop", "crash before consume", "went on in newer code", "went on in old code", "took over new helpers"):
        assert happened[what], (what, happened)


def test_an_engine_that_looks_for_stored_code_only_at_its_start_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine, with a newer release, has stored the code since. An instance that needs it would be parked until somebody restarts the engine."""
    monkeypatch.setattr(CodeStore, "__call__", lambda store, key: store.entries.get(key))
    with engine_process():
        for seed in (17, *range(40)):  # seeds that are known to show it come first
            world = Rolling(seed)
            try:
                world.run()
                check(world)
            except Failed as failed:
                print(f"seed {seed}: {str(failed)[:300]}")
                return
            finally:
                world.__dict__.clear()
    raise AssertionError("no seed noticed it")
