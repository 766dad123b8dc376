"""Defects that simulated workers have shown, in the fewest turns, and what a worker does when its group does not answer (M6.6)."""

import json
import pathlib

import pytest

from kwflow.config import Config
from kwflow.runners.activities.lent import Lent
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.queues import QueueRunner
from kwflow.testing.kafka import Broker, SimulatedEnvironment
from tests.simulation.test_found import Losing

QUEUE = "found-queue"


class Lab:
    """Workers of one queue that begin nothing by themselves and move turn by turn."""

    def __init__(self, partitions: int) -> None:
        self.broker = Broker()
        self.client = SimulatedEnvironment(self.broker)
        self.config = Config(application_id="found", state_dir=pathlib.Path("none"))
        topics.create(topics.admin(self.config, self.client), self.config, [QUEUE], partitions, 1)
        self.producer = self.client.producer({})
        self.hosts: dict[str, Losing] = {}
        self.lent: dict[str, Lent] = {}
        self.said: list[str] = []

    def worker(self, name: str, care: bool = True) -> QueueRunner:
        """Without `care`, it is a gateway."""
        host = self.hosts[name] = Losing(self.broker, name)
        lent = self.lent[name] = Lent(lambda: self.broker.time.now / 1000)
        config = self.config.model_copy(update={"instance_id": name})
        return QueueRunner(config, [QUEUE], lambda _: lent, self.said.append, SimulatedEnvironment(self.broker, host), care, host)

    def call(self, ref: str) -> None:
        value = {"resume_topic": self.config.resume_topic, "workflow_id": "w", "ref": ref, "activity": "a", "attempt": 1, "idempotency_key": f"w|{ref}", "arguments": {}}
        self.producer.produce(QUEUE, json.dumps(value), f"w|{ref}", 0)
        self.producer.poll(0)

    def begun(self, name: str) -> list[str]:
        return [call.ref for call in self.lent[name].fetch(99, "anybody", 60)]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activity `a`, for the duration of the test."""
    monkeypatch.setattr("kwflow.runners.kafka.queues.find_activity", lambda name: name)


def owned(worker: QueueRunner) -> int:
    return len(worker.seen()[0].owned)


def test_a_queue_left_to_nobody_by_a_restart_in_mid_rebalance_is_found() -> None:
    """K7: a worker with a fixed name was killed before it gave up partitions that belong to another. Calls in those used to wait until some worker came or went."""
    lab = Lab(4)
    first = lab.worker("one")
    while owned(first) < 4:
        first.turn()
    second = lab.worker("two")
    while lab.broker.group("found-workers").generation < 2:
        second.turn()
    for _ in range(20):  # the first is told to give up two partitions, but no longer polls
        second.turn()
    lab.hosts["one"].alive = False
    first = lab.worker("one")
    for _ in range(200):
        first.turn()
        second.turn()
    assert owned(first) == owned(second) == 2
    assert any("belong to nobody; rejoining" in line for line in lab.said)


def test_a_queue_left_to_nobody_by_a_stall_in_mid_rebalance_is_found() -> None:
    """K7: a worker with a fixed name that stalls for too long joins anew, and is given what the group had noted for it, as if it were restarted. Nobody looked any more."""
    lab = Lab(4)
    lab.config = lab.config.model_copy(update={"kafka": {"heartbeat.interval.ms": 1000}})  # so that it has joined anew before its session is over
    first, second = lab.worker("one"), lab.worker("two")

    def turn(seconds: float, *workers: QueueRunner) -> None:
        until_ms = lab.broker.time.now + 1000 * seconds
        while lab.broker.time.now < until_ms:
            for worker in workers:
                worker.turn()

    turn(30, first, second)
    assert owned(first) == owned(second) == 2
    lab.said.clear()
    lab.hosts["two"].running = False
    turn(20, first)
    assert owned(first) == 4
    lab.hosts["two"].running = True
    while not first._consumer._membership._stalled:  # it is told to give up two partitions, but does not poll
        second.turn()
    assert owned(second) == 0
    turn(30, first, second)
    assert owned(first) == owned(second) == 2
    assert any("belong to nobody; rejoining" in line for line in lab.said)


def test_after_a_death_nothing_begins_whose_mark_the_group_did_not_take(known: None) -> None:
    """K19: the call that kills used to begin without a mark, and killed one worker after the other."""
    lab = Lab(1)
    first = lab.worker("one")
    while not owned(first):
        first.turn()
    lab.call("1:1")
    while lab.begun("one") != ["1:1"]:
        first.turn()
    lab.hosts["one"].alive = False
    second, host, notes = lab.worker("two"), lab.hosts["two"], lab.broker.group("found-workers").notes
    asked = []

    def again() -> None:
        """The first commit says that the worker has the partition. The second one marks the call, and so does the third, because nobody has answered the second."""
        asked.append(notes[QUEUE, 0])
        host.before["commit-offsets"] = again
        if len(asked) == 2:
            host.losing["commit-offsets"] = 1
        assert len(asked) > 3 or lab.begun("two") == []

    host.before["commit-offsets"] = again
    while lab.begun("two") != ["1:1"]:
        second.turn()
    assert len(asked) > 2 and "!" in notes[QUEUE, 0]


def test_a_call_that_is_made_again_before_its_old_answer_is_noted_begins(known: None) -> None:
    """M6.6: a workflow is given the answer, goes back (rewind) and makes the call again under the same ref. The worker that had noted only then that the log has the answer dropped the new call."""
    lab = Lab(1)
    worker, lent = lab.worker("one"), lab.lent
    while not owned(worker):
        worker.turn()
    lab.call("1:1")
    while lab.begun("one") != ["1:1"]:
        worker.turn()
    closes = [lent["one"].closing("w", "1:1"), worker.closing("w", "1:1")]
    lab.call("1:1")
    for _ in range(3):
        worker.turn()
    assert lab.begun("one") == [], "the answer may still come"
    for close in closes:
        close()
    while lab.begun("one") != ["1:1"]:
        worker.turn()
    assert worker._owned[0].ledger.position == 1
    worker.closing("w", "1:1")()
    worker.turn()
    assert worker._owned[0].ledger.position == 2 and lent["one"].counts() == {"free": 0, "locked": 0}, "one that was answered through another gateway is not lent any more"


def test_a_gateway_that_dies_is_no_death_of_a_worker(known: None) -> None:
    """K19: it runs nothing. A call that one worker died with after that failed with `WorkerDied`, as if it had killed two."""
    lab = Lab(1)
    gateway = lab.worker("gateway", care=False)
    while not owned(gateway):
        gateway.turn()
    lab.call("1:1")
    while lab.begun("gateway") != ["1:1"]:
        gateway.turn()
    lab.hosts["gateway"].alive = False
    for name in ("one", "two"):
        worker = lab.worker(name)
        while lab.begun(name) != ["1:1"]:
            worker.turn()
        lab.hosts[name].alive = False
    assert "!" in lab.broker.group("found-workers").notes[QUEUE, 0], "the second worker marks it"
    assert lab.said == []
