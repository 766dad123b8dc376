"""Defects that the simulation found, each as the shortest sequence that shows it. The real runner runs on the simulated broker."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.murmur2 import partition_of
from kwflow.durable import canonical_bytes
from kwflow.errors import TransportError
from kwflow.runners.attempts import Attempts
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import WorkflowTester
from kwflow.testing.kafka import Broker, Disk, Host, SimulatedEnvironment
from kwflow.testing.kafka.log import COMMITTED

SOURCE = """
import kwflow as kw
kw.declare_topics("found-out")

def main(opts):
    value = yield kw.suspend("r")
    kw.output(str(value), "found-out")
    yield kw.suspend("end")

def large(opts):
    kw.output("x" * 300_000, "found-out")
    yield kw.suspend("r")

def big(opts):
    yield from ()
    return "x" * 300_000

def twice(opts):
    for _ in range(2):
        kw.output("x" * 120_000, "found-out")
    yield kw.suspend("r")

def late(opts):
    yield kw.timeout(kw.suspend("never"), 10)

def told(opts):
    while (said := (yield kw.wait_signal("say"))) != "end":
        kw.output(said, "found-out")

def handled(opts):
    try:
        raise ValueError("mine")
    except ValueError as error:
        kept = error
    value = yield kw.suspend("r")
    return [value, kept.__context__ is None]

def failing(opts):
    kw.spawn(cleaning())
    yield kw.suspend("r")
    raise ValueError("mine")

def cleaning():
    try:
        yield kw.suspend("c")
    finally:
        yield kw.suspend("d")
        yield kw.suspend("e")

def child():
    return (yield from inner())

def inner():
    yield kw.suspend("c")

def stopped(opts):
    task = kw.spawn(child())
    yield kw.suspend("r")
    kw.cancel(task)
    try:
        yield task
    except kw.Cancelled:
        pass
    yield kw.suspend("end")
"""


class Losing(Host):
    """A process that loses the next answers to one kind of request."""

    def __init__(self, broker: Broker, name: str = "host") -> None:
        super().__init__(broker.time, name)
        self.losing: dict[str, int] = {}
        self.before: dict[str, Callable[[], None]] = {}

    def call(self, what: str) -> None:
        super().call(what)
        do = self.before.pop(what, None)
        if do is not None:
            do()

    def answered(self, what: str) -> bool:
        self.losing[what] = self.losing.get(what, 0) - 1
        return self.losing[what] < 0


class Lab:
    """One application on a simulated broker. Its runners move turn by turn."""

    def __init__(self, directory: pathlib.Path, partitions: int = 1, seed: int = 0) -> None:
        self.broker = Broker(seed=seed)
        self.directory = directory
        self.partitions = partitions
        self.module = durable.load_source("found_workflows", SOURCE, "found_workflows.py")
        self.client = SimulatedEnvironment(self.broker)
        topics.create(topics.admin(self.config("any"), self.client), self.config("any"), ["found-out"], partitions, 1)
        self.broker.topics["found-out"].config["max.message.bytes"] = "200000"  # other topics accept more, so that the refusal comes from the broker
        self.producer = self.client.producer({"partitioner": "murmur2_random"})
        self.said: list[str] = []
        self.disks: dict[str, Disk] = {}
        self.hosts: dict[str, Losing] = {}

    def config(self, name: str, **limits: Any) -> Config:
        return Config(application_id="found", state_dir=self.directory / name, instance_id=name, **limits)

    def engine(self, name: str, environment: type[SimulatedEnvironment] = SimulatedEnvironment, **limits: Any) -> KafkaRunner:
        config = self.config(name, **limits)
        functions = {function: getattr(self.module, function) for function in ("main", "large", "big", "twice", "late", "told", "handled", "stopped")}
        return self._made(name, config, "found", lambda incarnation: WorkflowProcessor(config, Workflows(functions, "main"), frozenset({"found-out"}), incarnation), environment)

    def scheduler(self, name: str, **limits: Any) -> KafkaRunner:
        config = self.config(name, **limits)
        return self._made(name, config, "found-scheduler", lambda _: TimerProcessor(config))

    def _made(self, name: str, config: Config, group: str, make: Any, environment: type[SimulatedEnvironment] = SimulatedEnvironment) -> KafkaRunner:
        host = self.hosts[name] = Losing(self.broker, name)
        return KafkaRunner(config, make, group, self.said.append, host, ("found-out",), environment(self.broker, host, self.disks.setdefault(name, Disk())))

    def kill(self, runner: KafkaRunner, name: str) -> None:
        self.hosts[name].alive = False
        runner._lock.close()
        self.disks[name].release()

    def send(self, topic: str, key: str, value: str, **headers: str) -> None:
        self.producer.produce(topic, value=value.encode(), key=key.encode(), headers=list(headers.items()))
        self.producer.poll(0)

    def written(self, topic: str) -> list[str]:
        return [(entry.value or b"").decode() for partition in self.broker.topics[topic].partitions for entry in partition.committed()]


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


def turn(runner: KafkaRunner, until: Callable[[], object], turns: int = 200) -> None:
    for _ in range(turns):
        if until():
            return
        runner.turn()
    raise AssertionError(f"it did not happen; owned: {runner.owned}, restoring: {runner.takeover.restoring}")


def test_timers_fire_after_a_restart_although_the_log_ends_with_a_marker(lab: Lab) -> None:
    """K18. What engines write ends with a transaction marker, which occupies an offset that no position ever reaches."""
    engine = lab.engine("one")
    lab.producer.produce("workflow-resume", value=b"new:{}", key=b"w", headers=[("kwflow-workflow", "late")])
    lab.producer.poll(0)
    turn(engine, lambda: lab.written("workflow-scheduler"))
    first = lab.scheduler("two")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.kill(first, "two")
    second = lab.scheduler("two")
    turn(second, lambda: '{"ref":"0:1"}' in lab.written("workflow-resume"))


def test_a_lost_answer_of_list_offsets_is_asked_for_again(lab: Lab) -> None:
    """K4, K5: it used to end the process with a bare KafkaException."""
    engine = lab.engine("one")
    lab.hosts["one"].losing["list_offsets"] = 3
    turn(engine, lambda: engine.owned)


def test_a_record_refused_before_the_last_one_of_its_batch_was_produced_parks_its_instance_alone(lab: Lab) -> None:
    """K11: the refusal is reported only during the abort, and the producer is of no use after it."""
    engine = lab.engine("one")
    lab.hosts["one"].chance = lambda what: what == "send-early"  # type: ignore[method-assign]
    lab.send("workflow-resume", "good", "new:{}")
    lab.producer.produce("workflow-resume", value=b"new:{}", key=b"bad", headers=[("kwflow-workflow", "large")])
    lab.send("workflow-resume", "good", '{"ref": "r", "value": 1}')
    turn(engine, lambda: engine.owned and engine.owned[0].position == 3)
    turn(engine, lambda: lab.written("found-out") == ["1"])
    assert len(lab.written("found-dead-letter")) == 1


def test_a_batch_that_is_divided_loses_no_record_that_is_forwarded(tmp_path: pathlib.Path) -> None:
    """K6, K11: forwarded records used to be last in the batch, so that its first half moved the position past them."""
    lab = Lab(tmp_path, partitions=2)
    ids = [f"w{number}" for number in range(12)]
    home, away = ([id for id in ids if partition_of(id.encode(), 2) == number] for number in range(2))
    sent = [home[0], away[0], home[1], away[1], home[2]]
    for id in sent:
        headers = [("kwflow-workflow", "large")] if id == home[1] else []
        lab.producer.produce("workflow-resume", value=b"new:{}", key=id.encode(), headers=headers, partition=0)
    lab.producer.poll(0)
    engine = lab.engine("one")
    commits = []
    settle = engine._commit

    def commit(batch: Any) -> None:
        """If the process dies after this commit, its successor goes on at the position: records before it have been forwarded or are lost."""
        settle(batch)
        there = {entry.key for entry in lab.broker.partition(("workflow-resume", 1)).entries if entry.transaction is not None and entry.transaction.state == COMMITTED}
        passed = [id for id in sent[: batch.positions.get(0, 0)] if id in away]
        commits.append([id for id in passed if id.encode() not in there])

    engine._commit = commit  # type: ignore[method-assign]
    turn(engine, lambda: len(engine.owned) == 2 and engine.owned[0].position == 5)
    assert len(commits) > 2 and not any(commits)
    turn(engine, lambda: len(lab.written("workflow-resume")) == 7)


def test_a_discard_whose_rest_the_broker_refuses_drops_at_least_the_head(lab: Lab) -> None:
    """K11, K17: the command used to join the held records, which then could never be emptied."""
    engine = lab.engine("one")
    for _ in range(2):
        lab.producer.produce("workflow-resume", value=b"new:{}", key=b"bad", headers=[("kwflow-workflow", "large")])
    lab.producer.poll(0)
    turn(engine, lambda: engine.owned and engine.owned[0].position == 2)
    for number in range(2):
        lab.producer.produce("workflow-resume", value=b"null", key=b"bad", headers=[("kwflow-op", "discard")])
        lab.producer.poll(0)
        turn(engine, lambda number=number: engine.owned[0].position == 3 + number)  # type: ignore[misc]
    assert engine.owned[0].store.get(b"bad") is None
    assert list(engine.owned[0].store.scan(b"\0hold\0")) == []


def test_a_retry_whose_decision_the_broker_refuses_drops_nothing(lab: Lab) -> None:
    """K11, K17: only a discard is meant to drop something. The command alone becomes a dead letter."""
    engine = lab.engine("one")
    lab.producer.produce("workflow-resume", value=b"new:{}", key=b"bad", headers=[("kwflow-workflow", "large")])
    lab.producer.produce("workflow-resume", value=b"null", key=b"bad", headers=[("kwflow-op", "retry")])
    lab.producer.poll(0)
    turn(engine, lambda: lab.written("found-dead-letter") == ["new:{}", "null"])
    assert len(list(engine.owned[0].store.scan(b"\0hold\0"))) == 1


def test_a_broker_in_trouble_is_no_record_s_fault(lab: Lab) -> None:
    """K19: a process that ends because the broker does not answer leaves no attempt behind."""
    engine = lab.engine("one")
    lab.hosts["one"].losing["committed"] = 10**9
    with pytest.raises(TransportError):
        engine.run(lambda: (_ for _ in ()).throw(TransportError("no answer")) if lab.broker.time.now > 5000 else False)  # type: ignore[arg-type]
    assert not Attempts(engine.directory).unclean


def test_an_engine_that_stood_still_while_another_went_on_does_not_blame_the_operator(lab: Lab) -> None:
    """K16: the engine read the committed offset, stood still, and then read the end of the changelog, which another engine had moved meanwhile."""
    lab.send("workflow-resume", "w", "new:{}")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.kill(first, "one")
    second = lab.engine("two")

    def another_goes_on() -> None:
        lab.broker.group("found").offsets[("workflow-resume", 0)] = 2
        lab.broker.append(("found-state-changelog", 0), [(0, b"\0kwflow", b'{"topic":"%s","next":2,"partitions":1}' % lab.broker.topics["workflow-resume"].id.encode(), [])], None)

    lab.hosts["two"].before["list_offsets"] = another_goes_on
    turn(second, lambda: second.owned and second.owned[0].position == 2)


def test_a_partition_left_to_nobody_by_a_restart_in_mid_rebalance_is_found(tmp_path: pathlib.Path) -> None:
    """K7: also seen on Kafka 4.1 (tests/integration/port)."""
    lab = Lab(tmp_path, partitions=4)
    first = lab.engine("one")
    turn(first, lambda: len(first.owned) == 4)
    second = lab.engine("two")
    for _ in range(20):  # the first is told to give up two partitions, but no longer polls
        second.turn()
    assert not second.owned
    lab.kill(first, "one")
    first = lab.engine("one")
    for _ in range(200):
        first.turn()
        second.turn()
    assert sorted([*first.owned, *second.owned]) == [0, 1, 2, 3]
    assert len(first.owned) == len(second.owned) == 2, "whoever left the group has joined it again"


def test_a_partition_left_to_nobody_by_a_stall_in_mid_rebalance_is_found(tmp_path: pathlib.Path) -> None:
    """K7: an engine with a fixed name that stalls for too long joins anew, and is given what the group had noted for it, as if it were restarted. Nobody looked any more."""
    lab = Lab(tmp_path, partitions=4)
    first, second = lab.engine("one", kafka={"heartbeat.interval.ms": 1000}), lab.engine("two")

    def turn(seconds: float, *engines: KafkaRunner) -> None:
        until_ms = lab.broker.time.now + 1000 * seconds
        while lab.broker.time.now < until_ms:
            for engine in engines:
                engine.turn()

    turn(30, first, second)
    lab.hosts["two"].running = False
    turn(20, first)
    assert len(first.owned) == 4
    lab.hosts["two"].running = True
    while not first._consumer._membership._stalled:  # type: ignore[attr-defined]  # it is told to give up two partitions, but does not poll
        second.turn()
    assert not second.owned
    turn(30, first, second)
    assert len(first.owned) == len(second.owned) == 2


def test_steps_that_are_made_again_raise_without_our_errors_as_context(tmp_path: pathlib.Path) -> None:
    """G4: they used to run inside the handler of a refusal. Its exception was saved with the author's, or could not be saved."""
    lab = Lab(tmp_path)
    engine = lab.engine("one")
    lab.producer.produce("workflow-resume", value=b"new:{}", key=b"handled", headers=[("kwflow-workflow", "handled")])
    lab.producer.produce("workflow-resume", value=b"new:{}", key=b"bad", headers=[("kwflow-workflow", "large")])
    lab.producer.produce("workflow-resume", value=b'{"ref": "r", "value": 1}', key=b"handled")
    lab.producer.poll(0)
    turn(engine, lambda: engine.owned and engine.owned[0].position == 3)
    turn(engine, lambda: lab.written("workflow-result") == ["[1,true]"])


@pytest.mark.parametrize(("name", "refs"), [("stopped", ["r"]), ("failing", ["r", "d"])])
def test_what_ended_with_an_error_leaves_the_same_snapshot_restored_or_not(name: str, refs: list[str]) -> None:
    """Semantics §4.1: the traceback of an error kept the generator that had ended alive, so it was saved."""
    module = durable.load_source("found_workflows", SOURCE, "found_workflows.py")
    forms = []
    for cached in (0, 10):
        tester = WorkflowTester(getattr(module, name))
        tester._workflows.config = tester.config.model_copy(update={"instances_cached_max": cached})
        tester.start("w")
        for ref in refs:
            tester.resume("w", ref)
        forms.append(canonical_bytes(snapshot.split(tester.state.entries[b"w"])[1]))
    assert forms[0] == forms[1]


def test_an_os_error_says_the_same_after_it_was_saved() -> None:
    """T-KW-5: TimeoutError is an OSError. Attributes that were never set used to be restored as None, and shown."""
    kept = durable.loads(durable.dumps([TimeoutError("kw.timeout"), FileNotFoundError(2, "gone", "x.txt")]))
    assert [str(error) for error in kept] == ["kw.timeout", "[Errno 2] gone: 'x.txt'"]
