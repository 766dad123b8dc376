"""One simulated run: machines with engines and schedulers, clients, an operator who breaks things, and one seed.

Everything happens in one thread, in virtual time, in an order that the seed determines.  The runner is the real one.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import kwflow as kw
from kwflow import durable
from kwflow.config import Config
from kwflow.core.dispatch import PREFIX
from kwflow.core.timers import DUE
from kwflow.errors import FencedError, TransportError
from kwflow.feeds import registered_feeds
from kwflow.ports import Deliver, Processor
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.activities.heart import kept
from kwflow.runners.code import CodeStore
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.code import CodeTopic
from kwflow.runners.kafka.queues import QueueRunner
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.kafka.standby import Copies
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.parked import is_parked
from kwflow.runners.timers import TimerProcessor
from kwflow.testing.kafka import Broker, Disk, Host, SimulatedConsumer, SimulatedEnvironment, VirtualTime
from kwflow.testing.kafka.broker import Made
from kwflow.testing.kafka.groups import Group
from kwflow.testing.kafka.log import Entry, Place, Transaction
from tests.simulation import probes, releases
from tests.simulation.activities import MAIL, QUEUE
from tests.simulation.asking import Asking
from tests.simulation.faults import Actors, Crashed, Faults, Process
from tests.simulation.hub import Hub
from tests.simulation.lending import Lending
from tests.simulation.others import EVENTS, GROUP, MovedGroup, Others
from tests.simulation.workers import WORKERS, Begun, Book, Looked, NotedGroup, WatchedConsumer
from tests.simulation.workload import Clients

OUTPUTS = frozenset({"sim-ask", "sim-said"})
RECORD_BYTES_MAX = 200_000  # of sim-said; other topics allow more, so that it is the broker that refuses a record


class Failed(AssertionError):
    """A seed that shows a defect."""


class JournalingBroker(Broker):
    """A broker that keeps everything that was ever appended, in order, whatever compaction does; and what workers did (`book`)."""

    def __init__(self, time: VirtualTime, seed: int) -> None:
        super().__init__(time, seed)
        self.journal: list[tuple[Place, Entry]] = []
        self.book = Book()
        self.moved: dict[Transaction, None] = {}  # transactions of the feed

    def group(self, name: str) -> Group:
        if name == WORKERS and name not in self.groups:
            self.groups[name] = NotedGroup(self.time, self.places, self.book)
        if name == GROUP and name not in self.groups:
            self.groups[name] = MovedGroup(self.time, self.places, self.moved)
        return super().group(name)

    def append(self, place: Place, records: Iterable[Made], transaction: Transaction | None) -> list[Entry]:
        written = super().append(place, records, transaction)
        self.journal += [(place, entry) for entry in written]
        return written


class _Environment(SimulatedEnvironment):
    """The environment of one process; what it created is cut off when the process is gone."""

    def __init__(self, broker: Broker, host: Host, disk: Disk) -> None:
        super().__init__(broker, host, disk)
        self._consumers: list[SimulatedConsumer] = []
        self._runners: list[KafkaRunner] = []

    def runner(self, kind: type[KafkaRunner], *arguments: Any) -> KafkaRunner:
        """Create a runner that is registered before its constructor runs, as the process may die in that."""
        made = kind.__new__(kind)
        self._runners.append(made)
        made.__init__(*arguments, self)  # type: ignore[misc]
        return made

    def consumer(self, settings: dict[str, Any]) -> Any:
        kind = WatchedConsumer if settings["group.id"] == WORKERS else SimulatedConsumer
        made = kind(self.broker, self.host, settings)
        self._consumers.append(made)
        return made

    def database(self, directory: pathlib.Path) -> Any:
        directory.mkdir(parents=True, exist_ok=True)  # Cleanup looks at directories
        return super().database(directory)

    def wipe(self, directory: pathlib.Path) -> None:
        if directory in self.disk.databases and self.disk.databases[directory].held:
            raise Failed(f"{directory} is wiped while it is open")
        super().wipe(directory)
        shutil.rmtree(directory, ignore_errors=True)

    def release(self) -> None:
        for consumer in self._consumers:
            consumer.__dict__.clear()
        for runner in self._runners:
            if "_lock" in runner.__dict__:
                runner._lock.close()
        self.disk.release()


@dataclasses.dataclass(eq=False)
class Machine:
    """A machine on which processes run, one after the other; its disk and clock outlive them."""

    name: str
    roles: tuple[str, ...]  # engine, scheduler, feed; or worker, or gateway (one for each queue)
    directory: pathlib.Path
    disk: Disk = dataclasses.field(default_factory=Disk)
    skew_ms: int = 0
    identity: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its engine or worker, in addition to those that all have
    queues: list[str] = dataclasses.field(default_factory=list)  # of its worker or gateways
    release: releases.Release = releases.Release()  # of its next process
    process: Process | None = None
    open: set[pathlib.Path] = dataclasses.field(default_factory=set)  # databases, at the end of the run
    lives: list["Life"] = dataclasses.field(default_factory=list)

    @property
    def instance(self) -> str:
        return f"{self.name}.{self.identity}"


@dataclasses.dataclass
class Life:
    """The life of a process: when it began, under which instance id, with which code, and when it ended."""

    begun: float
    instance: str
    release: releases.Release
    ended: float = float("inf")


@contextlib.contextmanager
def engine_process() -> Iterator[None]:
    """Inside of this, the test's process forgets generators as an engine does, until everything from the runs is gone."""
    before = durable.set_abandoning(True, everywhere=True)
    try:
        yield
    finally:
        releases.forget()
        gc.collect()
        durable.set_abandoning(before, everywhere=True)


class World:
    """`run()` plays one seed to its end; `checks.check(world)` checks what is left."""

    machines_min = 1
    queue_share = 0.2  # of the seeds
    lend_share = 0.4  # of those with queues
    feed_share = 0.15
    clean_shares: tuple[float, ...] = (0, 0, 0, 0.4)  # of the programs: those with cleanups that wait; one of them for each seed
    slot_shares: tuple[float, ...] = (0, 0, 0, 0.4)  # the same of programs whose tasks wait for each other
    rewind_shares: tuple[float, ...] = (0, 0, 0, 0, 0.4)  # of the clients' turns; one of them for each seed
    release_ms = 5_000  # from one release to the next, and from one machine to the next, on average
    rest_ms = 900_000  # in the calm at the end, everything must be done within this time
    jump_ms = 60_000
    truncated = False  # whether changelogs lose the part at their beginning that compaction has emptied
    switches_max = 400_000  # in each half of a run; a run that needs more never comes to rest

    def __init__(
        self, seed: int, runner: type[KafkaRunner] = KafkaRunner, faults: Faults | None = None, engine: Callable[..., Processor] = WorkflowProcessor, timers: Callable[..., Processor] = TimerProcessor
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.time = VirtualTime()
        self.broker = JournalingBroker(self.time, seed)
        self.hub = Hub(self.time, self.chance)
        self.faults = faults or Faults.draw(self.chance)
        if faults is None and self.faults.freeze and random.Random(f"zombies {seed}").random() < 0.3:  # a stream of its own
            self.faults.wake = "committed"
        self.calm = False
        self.over = False
        self.calls = self.crashes = 0
        self.places: dict[str, list[int]] = {}  # place (before or after which request or write) -> the numbers of these `calls`
        self.happened: collections.Counter[str] = collections.Counter()  # faults and other events that happened
        self.performing = 0
        self.performed: collections.Counter[tuple[str, int, str]] = collections.Counter()  # (call's key, attempt, word of the plan) -> how often it ran to its end
        self.forgotten: list[str] = []  # attempts that did not find the heartbeats of the ones before them
        self.log: list[str] = []
        self.runner = runner
        self.make_engine, self.make_timers = engine, timers
        memory = pathlib.Path("/dev/shm")
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="kwflow-sim-", dir=memory if memory.is_dir() else None))
        self.partitions = self.chance.randint(1, 4)
        self.grace_s = self.chance.choice([0, 2])
        self.config = self._base_config()
        releases.forget()  # from the previous run
        self._queueing = random.Random(f"workers {seed}")  # a stream of its own: a seed without workers is the same run as before there were any
        self.queues = [QUEUE, MAIL] if self._queueing.random() < self.queue_share and (faults is None or self.queue_share == 1) else []
        self.outputs = OUTPUTS | frozenset(self.queues)
        self.code: dict[str, releases.Code] = {}  # of each process
        self.hub.entering = self._enter
        self.client_environment = SimulatedEnvironment(self.broker)
        self._create_topics()
        self.broker.transactions.marker_delay_ms = self.faults.markers_ms
        self.rewinding = random.Random(f"rewinds {seed}")  # also a stream of its own
        self.rewind_share = self.rewinding.choice(self.rewind_shares)
        self.checkpoints = self.rewinding.choice([2, 100]) if self.rewind_share else 0
        self.clients = Clients(self, ids=self.chance.randint(5, 30), actions=self.chance.randint(40, 160), killers=self.chance.random() < 0.3)
        self._rollout = random.Random(seed)  # a stream of its own, so that everything else in a seed depends on it as little as possible
        self.upcoming = releases.with_rollbacks(releases.draw(self.chance), self._rollout)
        self.deployed = [releases.Release()]
        self.moved: set[bytes] = set()  # the ids of instances that somebody wants to move in place
        self.machines = [Machine(f"m{number}", self._roles(number), self.directory / f"m{number}") for number in range(self.chance.randint(self.machines_min, 3))]
        if faults is None:
            self._draw_copies(random.Random(f"copies {seed}"))
        self.others: Others | None = None
        self._feeding = random.Random(f"feeds {seed}")  # also a stream of its own
        if self._feeding.random() < self.feed_share and (faults is None or self.feed_share == 1):
            self._add_feeds()
        if self.queues:
            self.machines += [self._worker(number) for number in range(self._queueing.choice([1, 1, 2, 2, 3]))]
        lending = random.Random(f"gateways {seed}")  # also a stream of its own
        self.lending = Lending(self, lending) if self.queues and lending.random() < self.lend_share else None
        if self.lending is not None:
            self.machines += [self._gateway(number, lending) for number in range(lending.choice([1, 1, 2]))]

    def _gateway(self, number: int, chance: random.Random) -> Machine:
        """Draw a gateway that lends the calls of one queue, or of both."""
        queues, name = chance.choice([self.queues, self.queues[:1], self.queues[1:]]), f"gateway{number}"
        return Machine(name, tuple(f"gateway {queue}" for queue in queues), self.directory / name, queues=queues)

    def _add_feeds(self) -> None:
        """Add feeds, on machines of their own or beside an engine in its process."""
        chance = self._feeding
        self.others = Others(self, killers=chance.random() < 0.3)
        beside = self.machines[:1] if chance.random() < 0.3 else []
        added = [Machine(f"feed{number}", (), self.directory / f"feed{number}") for number in range(chance.choice([0, 1] if beside else [1, 1, 2, 2]))]
        for machine in [*beside, *added]:
            machine.roles = (*machine.roles, "feed")
            machine.settings = {**machine.settings, "kafka": {"max.poll.interval.ms": chance.choice([15_000, 300_000]), "topic.metadata.refresh.interval.ms": chance.choice([500, 2_000, 20_000])}}
        self.machines += added

    def _worker(self, number: int) -> Machine:
        """Draw a worker.  The first one serves all queues; one without an instance id leaves the group when it ends."""
        chance = self._queueing
        name = f"worker{number}"
        settings: dict[str, Any] = {"activity_concurrency": chance.randint(1, 4), "activity_grace_s": chance.choice([0, 2, 8])}
        settings |= {"instance_id": None} if chance.random() < 0.5 else {}
        return Machine(name, ("worker",), self.directory / name, settings=settings, queues=self.queues if number == 0 else chance.choice([self.queues, self.queues[:1]]))

    def _draw_copies(self, chance: random.Random) -> None:
        """Draw who keeps warm copies, and how long copies and tombstones are kept; from a stream of its own, so that a seed without them is unchanged."""
        if chance.random() < 0.4:
            for machine in self.machines:
                machine.settings = {"standby": chance.random() < 0.7, "state_cleanup_s": chance.choice([0, 2, 10, 600])}
            if chance.random() < 0.5:
                self.age(chance.choice([20_000, 60_000]))
            self.truncated = chance.random() < 0.3

    def age(self, retention_ms: int) -> None:
        """Remove tombstones so soon that a process may be suspended for longer; clocks are not off far enough to matter."""
        for name in (self.config.changelog_topic, self.config.timers_changelog_topic):
            self.broker.topics[name].config["delete.retention.ms"] = str(retention_ms)
        self.faults.freeze_ms = (retention_ms // 2, 3 * retention_ms)
        self.jump_ms = retention_ms // 8

    def _roles(self, number: int) -> tuple[str, ...]:
        return ("engine", "scheduler") if number == 0 or self.chance.random() < 0.5 else ("engine",)

    def _config(self, instance: str, directory: pathlib.Path, **settings: Any) -> Config:
        return self.config.model_copy(update={"state_dir": directory, "instance_id": instance, **settings})

    def _base_config(self) -> Config:
        return Config(
            application_id="sim", state_dir=pathlib.Path("none"), instance_id="none", snapshot_bytes_max=100_000, hold_max=20, batch_records_max=20, ended_retention_ms=10**12,
            kafka={"max.poll.interval.ms": 15_000}, step_abort_ms=60_000, activity_concurrency=3, activity_grace_s=self.grace_s,
        )  # fmt: skip

    def _create_topics(self) -> None:
        topics.create(topics.admin(self.config, self.client_environment), self.config, self.outputs, self.partitions, 1)
        for name, topic in self.broker.topics.items():
            topic.config["max.message.bytes"] = str(RECORD_BYTES_MAX if name == "sim-said" else 2 * RECORD_BYTES_MAX)

    def counts(self, process: str) -> bool:
        """Whether requests of this process are counted in `calls`."""
        return True

    def say(self, line: str) -> None:
        self.log.append(f"{self.time.now:10.1f} {line}")

    # -- the run ---------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Play the seed.  Raises Failed."""
        probes.outside.clear()
        probes.ask(self._kill_running, self._begun, self._continues, self._looked, self._perform, lambda: self.hub.running.endswith(" feed"))
        try:
            for machine in self.machines:
                self.hub.spawn(machine.name, lambda machine=machine: self._operate(machine), self.chance.random() * 3000)
            self.hub.spawn("clients", self.clients.work)
            self.hub.spawn("operator", self._break_things)
            self.hub.spawn("deployer", self._deploy_all)
            if self.others is not None:
                self.hub.spawn("others", self.others.work)
            for program in self.lending.programs if self.lending is not None else ():
                self.hub.spawn(program, lambda program=program: self.lending.work(program))
            self._until(lambda: self.clients.finished and (self.others is None or self.others.finished), "the clients never come to an end")
            self.calm = True
            self.deploy(self.upcoming[-1] if self.upcoming else self.deployed[-1], at_once=True)
            self.say("calm")
            give_up = self.time.now + self.rest_ms
            self.hub.spawn("settling", lambda: self._settle(give_up))
            self._until(lambda: self.over, "it does not come to rest")
        finally:
            self.over = True
            for machine in self.machines:
                if machine.process is not None:
                    machine.process.alive = False
            self.hub.close(Crashed)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _until(self, done: Callable[[], bool], complaint: str) -> None:
        limit = self.hub.switches + self.switches_max

        def enough() -> bool:
            if self.hub.switches > limit:
                raise Failed(complaint)
            return done()

        self.hub.run(enough)

    def _settle(self, give_up: float) -> None:
        """Answer and discard until nothing is left to do, nothing is due, and everything is read."""
        quiet = 0
        while quiet < 3:
            self.hub.pause(self.time.now + 3_000)
            settled = self.others is None or self.others.settle()
            quiet = quiet + 1 if self.clients.settle() and settled and not self.unread() else 0
            if self.time.now > give_up:
                raise Failed(f"after {self.rest_ms / 1000:g} calm seconds there is still: {self.unread() or 'something to answer or to discard'}")
        for machine in self.machines:
            machine.open = {directory for directory, content in machine.disk.databases.items() if content.held}
        self.over = True

    def unread(self, waiting: bool = True) -> list[str]:
        """What engines and schedulers still have to do; with `waiting`, including what timers and activities will cause."""
        found = ["an activity runs"] if waiting and self.performing else []
        for topic, group, changelog in ((self.config.resume_topic, "sim", self.config.changelog_topic), (self.config.scheduler_topic, "sim-scheduler", self.config.timers_changelog_topic)):
            for partition in self.broker.topics[topic].partitions:
                offset = self.broker.group(group).offsets.get(partition.place, 0)
                left, _ = partition.read(offset, True, 1)
                if left or partition.unstable:
                    found.append(f"{topic}[{partition.place[1]}] from {offset}")
                if waiting:
                    replayed = {entry.key or b"": entry.value for entry in self.broker.partition((changelog, partition.place[1])).committed()}
                    found += self._waiting({key: value for key, value in replayed.items() if value is not None})
        found += self.others.unread() if self.others is not None else []
        return found + (self._open_calls() if waiting else [])

    def _open_calls(self) -> list[str]:
        """Where records of queues are left that workers have not passed."""
        found = []
        for partition in [partition for queue in self.queues for partition in self.broker.topics[queue].partitions]:
            offset = self.broker.group(WORKERS).offsets.get(partition.place, 0)
            if partition.read(offset, True, 1)[0] or partition.unstable:
                found.append(f"{partition.place} from {offset}")
        return found

    def _waiting(self, state: dict[bytes, bytes]) -> list[str]:
        """Timers that are set, and activity calls that are not answered, except for parked or paused instances, which may hold the answer."""
        timers = [f"timer {key!r}" for key in state if key.startswith(DUE)]
        return timers + [f"activity {key!r}" for key in state if key.startswith(PREFIX) and not is_parked(self.config, state.get(key.rpartition(b"\0")[2]))]

    def _kill_running(self) -> None:
        """Called by author code in a step: kill the process that it runs in."""
        name = self.hub.running.partition(" ")[0]
        for machine in self.machines:
            if machine.process is not None and machine.process.name == name:
                machine.process.die()
                self.say(f"{name} is killed by a record")
        raise probes.Killed

    def _process(self) -> Process:
        """The process that is running now.  Raises Crashed if it is gone."""
        name = self.hub.running.partition(" ")[0]
        process = next((machine.process for machine in self.machines if machine.process is not None and machine.process.name == name), None)
        if process is None:
            raise Crashed
        return process

    def _begun(self, info: kw.ActivityInfo) -> Begun:
        return self.broker.book.begin(self.time.now, self._process().name, info)

    def _looked(self, begun: Begun, runs: list[int]) -> None:
        self.broker.book.looked.append(Looked(self.time.now, begun, runs))

    def _continues(self, info: kw.ActivityInfo, runs: list[int]) -> None:
        """Called by an attempt that finds these runs in its heartbeat details: the attempt before it was one of them, and said so before it failed."""
        self.happened["details of a run that died"] += runs[-1:] == [info.attempt]
        self.happened["details of an attempt that failed"] += info.attempt > 1 and runs[-1:] == [info.attempt - 1]
        if info.attempt > 1 and (not runs or runs[-1] < info.attempt - 1):
            self.forgotten.append(f"{info.idempotency_key} in attempt {info.attempt} knows of {runs}")

    def _perform(self, info: kw.ActivityInfo, what: str) -> None:
        """Called by an activity: do what its plan says, which takes time, and dies with its process."""
        process = self._process()
        self.performing += 1
        try:
            if what == "kill":
                process.work(5)
                self.say(f"{process.name} is killed by a call of {info.workflow_id}")
                self.happened["killed by a call"] += 1
                process.die()
                raise Crashed
            if what == "hang":
                until = self.time.now + 60_000
                while self.time.now < until and not info.cancelled:
                    process.work(500)
            else:
                process.work(self.chance.uniform(1_000, 6_000) if what == "slow" else 5)
        finally:
            self.performing -= 1
        self.performed[info.idempotency_key, info.attempt, what] += 1

    # -- releases --------------------------------------------------------------------------------------------------
    def _deploy_all(self) -> None:
        while self.upcoming and not self.calm:
            self.hub.pause(self.time.now + self.chance.expovariate(1 / self.release_ms))
            if not self.calm:
                self.deploy(self.upcoming.pop(0), at_once=self._rollout.random() < 0.2)

    def deploy(self, release: releases.Release, at_once: bool) -> None:
        """Deploy a release: processes end one after the other, or all at once, and the next ones run this release."""
        if release != self.deployed[-1]:
            self.deployed.append(release)
            self.happened["deploy"] += 1
            self.say(f"{release} is deployed{' at once' if at_once else ''}")
        for machine in self._rollout.sample(self.machines, len(self.machines)):
            if machine.release == release:
                continue
            machine.release = release
            if machine.process is not None and machine.process.alive and self.code[machine.process.name].release != release:
                self._end_for_release(machine.process, at_once)
            if not at_once:
                self.happened["roll"] += 1
                self.hub.pause(self.time.now + self._rollout.expovariate(1 / self.release_ms))
                if self.calm:
                    return

    def _end_for_release(self, process: Process, at_once: bool) -> None:
        if at_once or self._rollout.random() < 0.5:
            process.die()
        else:
            process.stopping = True
        self.say(f"{process.name} {'is stopped' if process.alive else 'is killed'} for a release")

    def release_of(self, transaction: Transaction) -> releases.Release:
        """The release of the process that made a transaction."""
        machine = next(machine for machine in self.machines if f"-{machine.name}." in transaction.producer)
        return [life for life in machine.lives if life.begun <= transaction.begun_ms][-1].release

    def _enter(self, actor: str) -> None:
        """Load the code of this actor's process."""
        code = self.code.get(actor.partition(" ")[0])
        if code is not None:
            code.enter()

    # -- machines --------------------------------------------------------------------------------------------------
    def _operate(self, machine: Machine) -> None:
        """Start a machine's process again and again, as a supervisor does."""
        while not self.over:
            process = machine.process = Process(self, f"{machine.name}/{len(machine.lives)}", lambda: machine.skew_ms)
            self.code[process.name] = releases.Code(machine.release, self.checkpoints)
            machine.lives.append(Life(self.time.now, machine.instance, machine.release))
            self.say(f"{process.name} starts as {machine.instance}")
            environment = _Environment(self.broker, process, machine.disk)
            left = list(machine.roles)

            def live(role: str, process: Process = process, left: list[str] = left, environment: _Environment = environment) -> None:
                try:
                    self._live(machine, process, role, environment)
                finally:
                    left.remove(role)

            for role in machine.roles:
                self.hub.spawn(f"{process.name} {role}", lambda role=role: live(role))
            while left and not self.over:
                self.hub.pause(self.time.now + 50)
            process.alive = False
            machine.lives[-1].ended = self.time.now
            environment.release()
            if not self.over:
                self._while_down(machine)

    def _live(self, machine: Machine, process: Process, role: str, environment: _Environment) -> None:
        config = self._config(machine.instance, machine.directory, **machine.settings)
        try:
            if role == "engine":
                sources = functools.cache(lambda: CodeStore(CodeTopic(config, environment).read))

                def make(incarnation: str) -> Processor:
                    made = self.make_engine(config, self.code[process.name].workflows, self.outputs, incarnation, process.log, sources())
                    limits = config.activity_concurrency, config.activity_limit_s
                    made.work = lambda deliver: Dispatcher(deliver, process.log, *limits, threads=Actors(process), details=kept(config.signing_keys))  # type: ignore[method-assign]
                    return made

                runner = environment.runner(self.runner, config, make, "sim", process.log, process, self.outputs)
            elif role == "worker":
                return self._serve(machine, process, config, environment)
            elif self.lending is not None and role.startswith("gateway"):
                return self.lending.lend(config, role.split()[1], process, environment)
            elif role == "feed":
                runner = environment.runner(self.runner, config, lambda _: FeedProcessor(config, registered_feeds()[EVENTS], process.log), GROUP, process.log, process, frozenset())
            else:
                runner = environment.runner(self.runner, config, lambda _: self.make_timers(config), "sim-scheduler", process.log, process, self.outputs)
            self._count_copies(runner.takeover.copies)
            runner.run(lambda: process.stopping or self.over)
        except (Crashed, probes.Killed):
            process.alive = False
        except (FencedError, TransportError) as error:
            self.say(f"{process.name} {role} ends: {type(error).__name__}: {error}")
            process.stopping = True
            if self.faults == Faults(markers_ms=self.faults.markers_ms) and len(self.deployed) == 1 and not (self.others is not None and self.others.changed):
                raise Failed(f"{process.name} ends although nothing was broken: {error}") from error
            if not error.retryable and not isinstance(error, FencedError):
                raise Failed(f"{process.name} cannot go on: {error}") from error

    def _serve(self, machine: Machine, process: Process, config: Config, environment: _Environment) -> None:
        """A worker's life."""

        details = Asking(config, environment, process)

        def work(deliver: Deliver) -> Dispatcher:
            return Dispatcher(deliver, process.log, config.activity_concurrency, config.activity_limit_s, threads=Actors(process), ends_late=True, details=details.look)

        QueueRunner(config, machine.queues, work, process.log, environment, clock=process).run(lambda: process.stopping or self.over)

    def _count_copies(self, copies: Copies) -> None:
        give, look = copies.give, copies._cleanup.look

        def given(number: int) -> None:
            self.happened["promoted"] += copies.standby is not None and number in copies.standby.stores
            give(number)

        def looked(used: set[int]) -> list[pathlib.Path]:
            deleted = look(used)
            self.happened["deleted copy"] += len(deleted)
            return deleted

        copies.give, copies._cleanup.look = given, looked  # type: ignore[method-assign]

    def _while_down(self, machine: Machine) -> None:
        chance, faults = self.chance, self.faults
        if not self.calm:
            if chance.random() < faults.wipe * 0.3:
                self.say(f"{machine.name} loses its state directory")
                self.happened["wipe"] += 1
                machine.disk.databases.clear()
                shutil.rmtree(machine.directory, ignore_errors=True)
                machine.identity += chance.randrange(2)  # sometimes it keeps its configured name
            for content in machine.disk.databases.values():
                if chance.random() < faults.damage * 0.3:
                    content.damaged = True
                    self.happened["damage"] += 1
            self.hub.pause(self.time.now + chance.choice([10, 500, 2_000, 15_000]) * chance.random())
        else:
            self.hub.pause(self.time.now + 100)

    def _break_things(self) -> None:
        chance, faults = self.chance, self.faults
        while not self.calm:
            self.hub.pause(self.time.now + 1000 * chance.random())
            machine = chance.choice(self.machines)
            process = machine.process
            if self.calm:
                break
            if process is not None and process.alive:
                if chance.random() < faults.kill:
                    self.say(f"{process.name} is killed from outside")
                    self.happened["kill"] += 1
                    process.die()
                elif chance.random() < faults.stop:
                    self.say(f"{process.name} is stopped")
                    self.happened["stop"] += 1
                    process.stopping = True
                elif chance.random() < 0.02 * bool(faults.freeze):
                    process.freeze(chance.choice([3_000, 12_000]) * chance.random())
            if chance.random() < faults.jump:
                machine.skew_ms = chance.randint(-self.jump_ms, self.jump_ms)
                self.happened["jump"] += 1
                self.say(f"the clock of {machine.name} is {machine.skew_ms} ms off")
            if chance.random() < faults.compact:
                self.compact()

    def compact(self) -> None:
        for name in (self.config.changelog_topic, self.config.timers_changelog_topic, self.config.code_topic):
            topic = self.broker.topics[name]
            for partition in topic.partitions:
                self.happened["compacted"] += partition.compact(partition.end - self.chance.randint(0, 20), self.time.now, int(topic.config["delete.retention.ms"]))
                if self.truncated and partition.entries:
                    partition.delete_before(partition.entries[0].offset)

    def wake_zombies(self) -> None:
        """Let processes go on that are frozen inside a transaction and were evicted from its group, as somebody asks for the offsets in it."""
        for group in self.broker.groups.values():
            for transaction in [transaction for transaction in group.pending if transaction.producer not in group.static]:
                for process in [machine.process for machine in self.machines if machine.process is not None and f"-{machine.name}." in transaction.producer and not machine.process.running]:
                    self.say(f"{process.name} goes on, as its heir looks where to begin")
                    self.happened["woken"] += 1
                    process.wake()

    def rebalance(self) -> None:
        """Let a stranger join a group and leave it soon: the generation changes while members are in the middle of a batch."""
        name, topic = self.chance.choice([("sim", self.config.resume_topic), ("sim-scheduler", self.config.scheduler_topic)])
        if self.hub.running.endswith(" feed"):
            name, topic = GROUP, EVENTS
        group = self.broker.group(name)
        stranger = group.join("", None, (topic,), 3_000, 1_000, set())
        self.time.after(1_000, lambda: group.leave(stranger))
        self.happened["rebalance"] += 1

    def rebalance_workers(self) -> None:
        group = self.broker.group(WORKERS)
        stranger = group.join("", None, tuple(self.queues), 3_000, 1_000, set())
        self.time.after(1_000, lambda: group.leave(stranger))
        self.happened["rebalance of workers"] += 1

    def summary(self) -> dict[str, Any]:
        return {"seed": self.seed, "virtual s": round(self.time.now / 1000), "calls": self.calls, "crashes": self.crashes, "records": len(self.broker.journal), "sent": self.clients.sent}

    def story(self, lines: int = 60) -> str:
        return "\n".join([json.dumps(self.summary()), repr(self.faults), *self.log[-lines:]])
