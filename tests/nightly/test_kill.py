"""kill -9 at random moments, many times: every saga ends once, and every reservation is asked for once (G1, G6)."""

import collections
import json
import os
import pathlib
import random
import signal
import time
from collections.abc import Iterator

import pytest

from kwflow.runners.embedded.socket import submit
from tests.embedded.shell import TRIP, Shell

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]
SAGAS = 200
KILLS = 40


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "state")
    yield shell
    shell.end()


def test_every_saga_ends_once_however_often_the_engine_is_killed(shell: Shell) -> None:
    seed = int(os.environ.get("KWFLOW_SEED", str(random.randrange(1 << 30))))
    print("KWFLOW_SEED", seed)
    chance = random.Random(seed)
    engine = shell.engine(TRIP)
    for n in range(SAGAS):
        submit(shell.directory, "workflow-resume", b"s%d" % n, b'new:{"timeout": 86400000}')
    answered: set[tuple[str, str]] = set()
    for _ in range(KILLS):
        time.sleep(chance.random() * 0.2)  # the moment of the kill is the point of the test; nothing waits for this
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        asked = [(id, ref) for kind in ("car", "hotel", "flight") for _, id, ref in (line.split() for line in shell.records(f"saga-reserve-{kind}"))]
        waiting = [pair for pair in asked if pair not in answered]
        for id, ref in chance.sample(waiting, min(len(waiting), 3 * SAGAS // KILLS + 5)):
            submit(shell.directory, "workflow-resume", id.encode(), json.dumps({"ref": ref, "value": "ok"}).encode())
            answered.add((id, ref))
        engine = shell.engine(TRIP)
    shell.until(lambda: len(shell.records("saga-reserve-flight")) == SAGAS)
    for kind in ("car", "hotel", "flight"):
        for line in shell.records(f"saga-reserve-{kind}"):
            _, id, ref = line.split()
            if (id, ref) not in answered:
                submit(shell.directory, "workflow-resume", id.encode(), json.dumps({"ref": ref, "value": "ok"}).encode())
    shell.until(lambda: len(shell.records("workflow-result")) >= SAGAS)
    for topic in ("workflow-result", "saga-reserve-car", "saga-reserve-hotel", "saga-reserve-flight"):
        counts = collections.Counter(line.split()[1] for line in shell.records(topic))
        assert counts == {f"s{n}": 1 for n in range(SAGAS)}, topic
    assert shell.records("workflow-error") == []
