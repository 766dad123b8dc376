"""kill -9 of workers, engines and the broker, and workers that are asked to end: every call is answered, and every workflow ends as in a sequential run (M6.6, G1).

`KWFLOW_SEED` repeats a run, except for the timing of its processes. `make nightly` kills for longer.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.integration.broker import Broker, can_start
from tests.integration.site import ROOT, Site

MODULE = str(pathlib.Path(__file__).parent / "site_of_queues.py")
STEPS, WORKERS = 5, 3
pytestmark = [pytest.mark.broker, pytest.mark.slow]


class Estate(Site):
    """Processes that are killed, and are started again when they are gone."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.own = Broker(directory / "kafka")
        self.own.start()
        super().__init__(self.own.bootstrap, "chaos", directory, modules=(MODULE,), environment={"KWFLOW_WAIT_FOR_BROKER_S": "60"})
        self.live: dict[str, subprocess.Popen[str]] = {}

    def keep(self) -> None:
        """Restart the processes that are gone, as a supervisor does. librdkafka may abort when a broker comes back (an assertion of its own)."""
        for name in ("engine", *(f"worker-{n}" for n in range(WORKERS))):
            if name not in self.live or self.live[name].poll() is not None:
                ended = self.live[name].returncode if name in self.live else 0
                assert ended in (0, 3, -signal.SIGKILL, -signal.SIGABRT), (self.directory / f"{name}.log").read_text()[-2000:]
                self.live[name] = self.engine(name, MODULE) if name == "engine" else self.worker(name)

    def worker(self, name: str) -> "subprocess.Popen[str]":
        with open(self.directory / f"{name}.log", "a") as log:
            self.processes.append(subprocess.Popen([sys.executable, "-m", "kwflow", "worker", MODULE], env=self.environment, cwd=ROOT, stderr=log, text=True))
        return self.processes[-1]

    def disturb(self, chance: random.Random) -> None:
        name = chance.choice(sorted(self.live))
        process = self.live[name]
        if name != "engine" and chance.random() < 0.3:
            process.terminate()
        else:
            process.kill()
        process.wait(60)


def disturbed(directory: pathlib.Path, seed: int, instances: int, moves: int, brokers: int) -> None:
    chance, estate = random.Random(seed), Estate(directory)
    try:
        estate.keep()
        for n in range(instances):
            estate.producer.produce(estate.topic("resume"), f"new:{STEPS}", f"w{n}", headers=[("kwflow-workflow", b"flow")])
        assert estate.producer.flush(20) == 0
        estate.read("chaos-two", 1)
        at = set(chance.sample(range(moves), brokers))
        for move in range(moves):
            if move in at:
                estate.own.kill()
                estate.own.start()
            else:
                estate.disturb(chance)
            estate.keep()
            time.sleep(chance.uniform(0.2, 1.5))  # the seed does not determine which moment is hit
        found: dict[str, str] = {}
        deadline = time.monotonic() + 100
        while len(found) < instances:
            assert time.monotonic() < deadline, (len(found), estate.run("list", "--json")[:3000])
            estate.keep()
            found = dict(read(estate, instances))
        assert {json.dumps(json.loads(value)) for value in found.values()} == {json.dumps([value for n in range(STEPS) for value in (n + 1, n * 2, n + 1)])}
        assert len(read(estate, instances)) == instances, "each result once"
    finally:
        estate.end()
        estate.own.kill()


def read(estate: Estate, count: int) -> list[tuple[str, str]]:
    """Return as many results as there are within a moment."""
    try:
        return estate.read(estate.topic("result"), count, 2)
    except AssertionError:
        return []


@pytest.mark.skipif(not can_start(), reason="NOT TESTED: no broker of its own (java with mvn)")
def test_every_call_is_answered_whoever_is_killed(tmp_path: pathlib.Path) -> None:
    seed = int(os.environ.get("KWFLOW_SEED", "1"))
    print("KWFLOW_SEED", seed)
    disturbed(tmp_path, seed, instances=40, moves=6, brokers=1)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4))
def test_every_call_is_answered_whoever_is_killed_for_long(tmp_path: pathlib.Path, seed: int) -> None:
    disturbed(tmp_path, seed, instances=300, moves=40, brokers=3)
