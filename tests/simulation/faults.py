"""The faults of one seed: which kinds happen, and how often; and the processes that they happen to."""

import contextlib
import dataclasses
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kwflow.runners.activities.threads import Threads
from kwflow.testing.kafka import Host
from tests.simulation import probes

if TYPE_CHECKING:
    from tests.simulation.world import World


_SELDOM = {"commit-offsets": 10, "watermarks": 5, "revoke": 20}  # calls that a worker makes only once a second or less -> how many times as often they go wrong
_WITH_HEIRS = 20  # how many times as often a process freezes before it commits, in seeds in which zombies go on just when their heirs come


class Crashed(BaseException):
    """Raised where the process is killed."""


@dataclasses.dataclass
class Faults:
    """Rates for each request or write (`crash`, `slow`, `stall`, `freeze`, `lost`), and for each second of the run (the others)."""

    crash: float = 0.0
    slow: float = 0.0
    stall: float = 0.0  # the application stands still, but its client's background thread does not
    freeze: float = 0.0  # the whole process stands still, and is a zombie when it continues
    lost: float = 0.0  # the request is carried out, but the answer is lost
    abort: float = 0.0  # a batch is not delivered in time
    kill: float = 0.0
    stop: float = 0.0
    jump: float = 0.0  # of a machine's clock
    wipe: float = 0.0  # of a state directory, while its machine is down (probability)
    damage: float = 0.0  # of one database, also while its machine is down
    compact: float = 0.0
    rebalance: float = 0.0  # of each send_offsets: a stranger joins the group while a batch is being committed
    trickle: float = 0.0  # of each read of a restore, which then takes long
    at: str = ""  # crash, stall and freeze happen only at this call
    wake: str = ""  # a zombie goes on when its heir makes this request, with which it looks where to begin
    crash_call: int = 0  # if not 0, crash at the n-th request, write or answer, and at no other
    freeze_ms: tuple[int, int] = (0, 40_000)
    markers_ms: float = 2.0  # how long after the decision a transaction's markers come

    @classmethod
    def draw(cls, chance: random.Random) -> "Faults":
        """Draw faults: each kind happens in about half of the seeds, with a rate of its own."""
        most = {
            "crash": 0.01, "slow": 0.05, "stall": 0.002, "freeze": 0.002, "lost": 0.03, "abort": 0.02, "kill": 0.1, "stop": 0.05, "jump": 0.1, "wipe": 0.5, "damage": 0.3, "compact": 0.5,
            "rebalance": 0.03, "trickle": 0.2,
        }  # fmt: skip
        rates = {name: chance.random() * rate for name, rate in most.items() if chance.random() < 0.5}
        return cls(**rates, markers_ms=chance.choice([0.0, 2.0, 50.0, 500.0, 4000.0]))


class Process(Host):
    """One life of one process.  Every request that it makes, and every batch that it writes, passes through `call` and `answered`."""

    def __init__(self, world: "World", name: str, skew: Callable[[], int]) -> None:
        super().__init__(world.time, name)
        self.world = world
        self.stopping = False
        self._skew = skew
        self._thaw_ms = 0.0

    def now_ms(self) -> int:
        return super().now_ms() + self._skew()

    def call(self, what: str) -> None:
        chance, faults = self.world.chance, self.world.faults
        self._pause(self.time.now + chance.expovariate(3.0))
        if self.world.calm:
            return
        if what == faults.wake:
            self.world.wake_zombies()
        self._count(f"before {what}")
        if faults.at in ("", what) and chance.random() < faults.crash * _SELDOM.get(what, 1):
            self.crash(f"before {what}")
        if chance.random() < faults.slow:
            self.world.happened["slow"] += 1
            self._pause(self.time.now + chance.expovariate(0.02))
        if faults.at in ("", what) and chance.random() < faults.stall:
            self.world.say(f"{self.name} stalls before {what}")
            self.world.happened["stall"] += 1
            self._pause(self.time.now + chance.choice([1_000, 8_000, 20_000]) * chance.random())
        if what == "consume-assigned" and chance.random() < faults.trickle:
            self.world.happened["trickle"] += 1
            self._pause(self.time.now + 1_500 * chance.random())
        if what == "send_offsets" and chance.random() < faults.rebalance:
            self.world.rebalance()
            self._pause(self.time.now + 1_500)
        if what == "commit-offsets" and chance.random() < faults.rebalance:
            self.world.rebalance_workers()
            self._pause(self.time.now + 1_500 * chance.random())
        if faults.at in ("", what) and chance.random() < faults.freeze * (_WITH_HEIRS if faults.wake and what == "commit" else _SELDOM.get(what, 1)):
            low, high = faults.freeze_ms
            self.freeze(low + (high - low) * chance.random() ** 2)
            self._pause(self.time.now)

    def answered(self, what: str) -> bool:
        chance, faults = self.world.chance, self.world.faults
        if self.world.calm:
            return True
        self._count(f"after {what}")
        if faults.at in ("", what) and chance.random() < faults.crash * _SELDOM.get(what, 1):
            self.crash(f"after {what}")
        lost = chance.random() < faults.lost * _SELDOM.get(what, 1)
        if lost:
            self.world.happened[f"lost {what}"] += 1
        return not lost

    def _count(self, where: str) -> None:
        if not self.world.counts(self.name):
            return
        self.world.calls += 1
        if self.world.calls == self.world.faults.crash_call:
            self.crash(where)
        if not self.world.faults.crash_call:
            self.world.places.setdefault(where, []).append(self.world.calls)

    def chance(self, what: str) -> bool:
        self._check()
        rates = {"abort": 0.0 if self.world.calm else self.world.faults.abort, "buffer-full": 0.005, "send-early": 0.05, "stale-fetch": 0.3, "not-ready": 0.2}
        happens = self.world.chance.random() < rates[what]
        self.world.happened[what] += happens
        return happens

    def wait(self, until: float) -> None:
        self._pause(until, watch=True)

    def work(self, ms: float) -> None:
        """Work that takes this long."""
        self._pause(self.time.now + ms)

    def background(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        def while_alive() -> None:
            with contextlib.suppress(Crashed, probes.Killed):
                work()

        actor = self.world.hub.spawn(f"{self.name} {name}", while_alive)

        def join() -> None:
            while self.alive and not actor.ended:
                self._pause(self.time.now + 10)

        return join

    def log(self, line: str) -> None:
        self.world.say(f"{self.name}: {line}")

    def crash(self, where: str) -> None:
        self.world.say(f"{self.name} is killed {where}")
        self.world.happened[f"crash {where}"] += 1
        self.die()
        raise Crashed

    def die(self) -> None:
        self.alive = False
        self.world.crashes += 1

    def freeze(self, ms: float) -> None:
        self.world.say(f"{self.name} freezes for {ms:.0f} ms")
        self.world.happened["freeze"] += 1
        self.running = False
        self._thaw_ms = self.time.now + ms

    def wake(self) -> None:
        """Go on now, if it is frozen."""
        if self.alive and not self.running:
            self.running = True
            self.world.hub.hasten(self.name, self._thaw_ms)

    def _pause(self, until: float, watch: bool = False) -> None:
        self._check()
        self.world.hub.pause(until, watch)
        while self.alive and not self.running:
            if self.time.now >= self._thaw_ms or self.world.calm:
                self.running = True
                if self.world.chance.random() < 0.5:  # its background thread goes on first
                    self.world.hub.pause(self.time.now + 600)
            else:
                self.world.hub.pause(self._thaw_ms)
        self._check()

    def _check(self) -> None:
        if not self.alive:
            raise Crashed


class Actors(Threads):
    """The threads on which a simulated process runs activities: each is an actor of its own, which ends with the process."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def run(self, call: Callable[[], None]) -> None:
        self._process.background("activity", call)

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        self._process.wait(self._process.time.now + 1000 * seconds)

    def monotonic(self) -> float:
        return self._process.time.now / 1000
