"""Gateways that lend calls of queues, and the programs that fetch these calls (ET-3..ET-21): everything of it but HTTP.

A gateway's machine is one of the world, with the product's reader of queues and its locks.  The programs are outside of all
processes, and do what a call's plan says.  What they were lent, and until when, is noted for the checker (handed_out.py).
"""

import dataclasses
import json
import random
from typing import TYPE_CHECKING, Any

from kwflow.client import Client, CommandError, OutcomeUnknown
from kwflow.config import Config
from kwflow.core.dispatch import Dispatch
from kwflow.errors import TransportError
from kwflow.runners.activities.lent import Lent
from kwflow.runners.kafka.environment import Environment
from kwflow.runners.kafka.queues import QueueRunner
from tests.simulation.asking import Link
from tests.simulation.faults import Crashed
from tests.simulation.workers import Begun

if TYPE_CHECKING:
    from tests.simulation.faults import Process
    from tests.simulation.world import World

__all__ = ["Lease", "Lending"]

_REPLY_S = 20


@dataclasses.dataclass(eq=False)
class Lease:
    """A call as its gateway has read it, once for each time that it was read; who was lent it, and until when nobody else may get it."""

    ms: float
    gateway: str
    call: Dispatch
    to: str
    over_ms: float

    @property
    def reading(self) -> int:
        """Which reading of the call it is."""
        return id(self.call)


class _Desk:
    """What one living gateway lends of one queue."""

    def __init__(self, config: Config, queue: str, process: "Process", environment: Environment) -> None:
        self.queue = queue
        self.process = process
        self.lent = Lent(environment.monotonic)
        self.runner = QueueRunner(config, [queue], lambda _: self.lent, process.log, environment, care=False, clock=process)
        self._config = config
        self._environment = environment
        self._links: dict[str, tuple[Link, Client]] = {}

    def client(self, name: str) -> tuple[Link, Client]:
        """The gateway's client, one for each program: the product's has a thread for all."""
        if name not in self._links:
            link = Link(self._config, self._environment, f"{self.process.name}.{self.queue}.{name}")
            self._links[name] = link, Client(link, self._config)
        return self._links[name]

    @property
    def serves(self) -> bool:
        return self.process.alive and self.process.running


class Lending:
    """All gateways and programs of a run."""

    def __init__(self, world: "World", chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.programs = [f"program{number}" for number in range(chance.randint(1, 3))]
        self.desks: list[_Desk] = []
        self.leases: list[Lease] = []
        self.ended: dict[int, float] = {}  # the reading of a call -> when its gateway learned that the call has ended
        self.bare: set[tuple[str, str]] = set()  # calls that were answered through a gateway that does not have them, and knows no headers

    def lend(self, config: Config, queue: str, process: "Process", environment: Environment) -> None:
        """A gateway's life."""
        desk = _Desk(config, queue, process, environment)
        self.desks.append(desk)
        try:
            desk.runner.run(lambda: process.stopping or self.world.over)
        finally:
            self.desks.remove(desk)

    def work(self, name: str) -> None:
        """A program's life."""
        world, chance = self.world, self.chance
        while not world.over:
            world.hub.pause(world.time.now + chance.expovariate(1 / 300))
            desks = [desk for desk in self.desks if desk.serves]
            if desks:
                desk, lock_ms = chance.choice(desks), chance.choice([1_000, 4_000, 20_000])
                calls = desk.lent.fetch(chance.randint(1, 3), name, lock_ms / 1000)
                for lease in [self._leased(desk, call, name, lock_ms) for call in calls]:
                    self._do(desk, lease)

    def _leased(self, desk: _Desk, call: Dispatch, name: str, lock_ms: float) -> Lease:
        now_ms = self.world.time.now
        self.world.broker.book.begun.append(Begun(now_ms, desk.process.name, f"{call.workflow_id}|{call.key}", call.attempt))
        self.world.happened["calls lent"] += 1
        self.leases.append(Lease(now_ms, desk.process.name, call, name, now_ms + lock_ms))
        return self.leases[-1]

    def _do(self, desk: _Desk, lease: Lease) -> None:
        """What the call's plan says.  Half of the programs that a call kills or lets hang do not answer, and the others say that it has failed, or was too late."""
        chance, call = self.chance, lease.call
        plan = json.loads(call.arguments)["plan"]
        word = plan[min(call.attempt, len(plan)) - 1]
        if chance.random() < 0.1:
            return self._release(desk, lease)
        self.world.performing += 1
        try:
            self.world.hub.pause(self.world.time.now + (chance.uniform(1_000, 6_000) if word in ("slow", "hang") else 5))
            if word == "slow" and chance.random() < 0.5:
                self._extend(desk, lease)
                self.world.hub.pause(self.world.time.now + chance.uniform(1_000, 6_000))
        finally:
            self.world.performing -= 1
        if word in ("hang", "kill") and chance.random() < 0.5:
            return
        while not self.world.over and not self._answer(desk, lease, word):
            self.world.hub.pause(self.world.time.now + chance.uniform(100, 3_000))
            desks = [other for other in self.desks if other.serves and other.queue == desk.queue]
            if desks:
                desk = chance.choice(desks)

    def _release(self, desk: _Desk, lease: Lease) -> None:
        call = lease.call
        if desk.serves and desk.lent.holder(call.workflow_id, call.ref) == lease.to:
            desk.lent.release(call.workflow_id, call.ref)
            lease.over_ms = self.world.time.now
            self.world.happened["calls released"] += 1

    def _extend(self, desk: _Desk, lease: Lease) -> None:
        if desk.serves and desk.lent.extend(lease.call.workflow_id, lease.call.ref, lease.to, 5):
            lease.over_ms = self.world.time.now + 5_000
            self.world.happened["locks extended"] += 1

    def _keep(self, desk: _Desk, lease: Lease) -> None:
        """As a gateway does for an answer that is on its way, or that nobody has replied to."""
        if desk.lent.keep(lease.call.workflow_id, lease.call.ref, lease.to, _REPLY_S) and desk.process.name == lease.gateway:
            lease.over_ms = max(lease.over_ms, self.world.time.now + 1000 * _REPLY_S)

    def _answer(self, desk: _Desk, lease: Lease, word: str) -> bool:
        """Answer through a gateway.  False if nobody knows what became of it."""
        id, ref = lease.call.workflow_id, lease.call.ref
        if not desk.serves:
            return False
        if desk.lent.holder(id, ref) not in (None, lease.to):
            return True
        headers, closes = desk.lent.headers(id, ref), (desk.lent.closing(id, ref), desk.runner.closing(id, ref))
        if headers != lease.call.headers:
            self.bare.add((id, ref))
            self.world.happened["calls answered through another gateway"] += 1
        answer: dict[str, Any] = {"value": {"attempt": lease.call.attempt}}
        if word in ("fail", "hang", "kill"):
            answer = {"error": {"kind": "activity", "type": "Timeout" if word == "hang" else "ValueError", "message": "as planned"}}
        elif word == "refuse":
            answer = {"error": {"kind": "business", "code": "refused", "message": "as planned"}}
        self.world.performed[f"{id}|{lease.call.key}", lease.call.attempt, word] += 1
        self._keep(desk, lease)
        try:
            link, client = desk.client(lease.to)
            future = client.resume(id, ref, headers=headers, **answer)
            link.wait(future, _REPLY_S)
            future.result(0)
        except (Crashed, TransportError) as error:
            if isinstance(error, OutcomeUnknown):
                self._keep(desk, lease)
            return False
        except CommandError as error:
            if error.status not in ("discarded", "held", "hold_full", "not_found", "unknown_ref"):
                return True
        for close in closes:
            close()
        if desk.process.name == lease.gateway:
            self.ended[lease.reading] = self.world.time.now
        return True
