"""Actors in one thread, each a greenlet, scheduled by virtual time and one source of randomness."""

import heapq
import random
from collections.abc import Callable

import greenlet

from kwflow.testing.kafka import VirtualTime


class Actor:
    def __init__(self, name: str, work: Callable[[], None], main: greenlet.greenlet) -> None:
        self.name = name
        self.token = 0  # of its last pause: older entries in the queue are stale
        self.ended = False
        self.greenlet = greenlet.greenlet(self._run, parent=main)
        self._work = work
        self.failure: BaseException | None = None

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # kept for whoever runs the hub
            self.failure = error
        self.ended = True


class Hub:
    """Runs actors until it is told to stop; an actor gives up control only in `pause`."""

    def __init__(self, time: VirtualTime, chance: random.Random) -> None:
        self.time = time
        self.chance = chance
        self.switches = 0
        self._main = greenlet.getcurrent()
        self._queue: list[tuple[float, float, int, Actor]] = []
        self._watching: dict[Actor, None] = {}
        self._version = time.version
        self._current: Actor | None = None
        self.entering: Callable[[str], None] = lambda name: None  # called before an actor goes on

    @property
    def running(self) -> str:
        """The name of the actor that runs; empty outside of `run`."""
        return self._current.name if self._current is not None else ""

    def spawn(self, name: str, work: Callable[[], None], after_ms: float = 0.0) -> Actor:
        actor = Actor(name, work, self._main)
        self._push(actor, self.time.now + after_ms)
        return actor

    def _push(self, actor: Actor, at: float) -> None:
        actor.token += 1
        heapq.heappush(self._queue, (at, self.chance.random(), actor.token, actor))

    def pause(self, until: float, watch: bool = False) -> None:
        """Give up control; continue at that time or, if `watch`, once something has changed."""
        actor = self._current
        assert actor is not None, "pause outside an actor"
        self._push(actor, until)
        if watch:
            self._watching[actor] = None
        self._main.switch()

    def hasten(self, process: str, at: float) -> None:
        """Let the actors of a process that would continue at this time continue now."""
        for actor in [actor for until, _, token, actor in sorted(self._queue) if until == at and token == actor.token and actor.name.startswith(f"{process} ")]:
            self._push(actor, self.time.now)

    def close(self, error: type[BaseException]) -> None:
        """Raise this error in every actor that has not ended."""
        for actor in {entry[3]: None for entry in self._queue}:
            while actor.greenlet:  # started and not ended
                actor.greenlet.throw(error)
        self._queue.clear()

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            while self._queue and self._queue[0][2] != self._queue[0][3].token:
                heapq.heappop(self._queue)
            upcoming = self.time.next_ms()
            if not self._queue or (upcoming is not None and upcoming <= self._queue[0][0]):
                assert upcoming is not None, "nobody has anything left to do"
                self.time.advance(upcoming)
            else:
                at, _, _, actor = heapq.heappop(self._queue)
                self.time.advance(at)
                self._watching.pop(actor, None)
                self._current = actor
                self.switches += 1
                self.entering(actor.name)
                actor.greenlet.switch()
                self._current = None
                if actor.failure is not None:
                    raise actor.failure
            self._notice()

    def _notice(self) -> None:
        if self.time.version != self._version:
            self._version = self.time.version
            for actor in list(self._watching):
                self._push(actor, self.time.now + self.chance.random())
            self._watching.clear()
