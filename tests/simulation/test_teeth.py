"""The simulation has teeth: a bug planted against each rule is caught, and without it the same seed passes."""

import contextlib
import dataclasses

import pytest

from kwflow.runners.kafka.runner import KafkaRunner
from tests.simulation.checks import check
from tests.simulation.planted import HANDED_OUT, PLANTED, SHARED, Planted
from tests.simulation.planted_feeds import FED
from tests.simulation.world import Failed, World, engine_process

SEEDS = 40
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def caught(seed: int, planted: Planted | None, faults: Planted) -> str | None:
    """Return what the run of this seed was found to do wrong, if anything."""
    bug = planted or Planted("", "")
    with engine_process(), bug.patch():
        kind = faults.world if planted is not None or faults.runner is not KafkaRunner or faults.patch is not contextlib.nullcontext else World  # a world that is itself the bug
        world = kind(seed, bug.runner, dataclasses.replace(faults.faults), bug.engine, bug.timers)
        try:
            world.run()
            check(world)
        except Failed as failed:
            return str(failed)
        finally:
            world.__dict__.clear()
    return None


@pytest.mark.parametrize("planted", [*PLANTED, *SHARED, *HANDED_OUT, *FED], ids=lambda planted: f"{planted.rule}: {planted.what}")
def test_a_planted_bug_is_caught(planted: Planted) -> None:
    for seed in (planted.first, *range(SEEDS)):
        found = caught(seed, planted, planted)
        if found is not None:
            print(f"seed {seed}: {found[:300]}")
            assert caught(seed, None, planted) is None, "it fails without the bug, too"
            return
    raise AssertionError(f"{SEEDS} seeds did not notice that {planted.what}")


def test_every_rule_has_a_planted_bug() -> None:
    assert {planted.rule for planted in PLANTED} == {f"K{number}" for number in range(1, 21)}
