"""How the simulation's workflow and activities call into their world; this is process state, which is replaced for each run."""

from collections.abc import Callable

import kwflow as kw
from kwflow.core.step import in_step
from tests.simulation.workers import Begun

outside: list[str] = []  # finally blocks that ran outside a step (G8)
_kill: list[Callable[[], None]] = []
_begin: list[Callable[[kw.ActivityInfo], Begun]] = []
_continues: list[Callable[[kw.ActivityInfo, list[int]], None]] = []
_looked: list[Callable[[Begun, list[int]], None]] = []
_feeding: list[Callable[[], bool]] = []
_perform: list[Callable[[kw.ActivityInfo, str], None]] = []


def cleaned(id: str) -> None:
    if not in_step():
        outside.append(id)


def kill() -> None:
    _kill[-1]()


def begin(info: kw.ActivityInfo) -> Begun:
    return _begin[-1](info)


def continues(info: kw.ActivityInfo, runs: list[int]) -> None:
    """An attempt begins, and these attempts have begun before, by the heartbeats that it finds."""
    _continues[-1](info, runs)


def looked(begun: Begun, runs: list[int]) -> None:
    """The same in a worker, which has asked an engine after it had begun."""
    _looked[-1](begun, runs)


def perform(info: kw.ActivityInfo, what: str) -> None:
    _perform[-1](info, what)


def feeding() -> bool:
    """Whether the caller is a process that runs feeds, not an engine."""
    return _feeding[-1]()


def ask(
    kill: Callable[[], None], begin: Callable[[kw.ActivityInfo], Begun], continues: Callable[[kw.ActivityInfo, list[int]], None], looked: Callable[[Begun, list[int]], None],
    perform: Callable[[kw.ActivityInfo, str], None], feeding: Callable[[], bool],
) -> None:  # fmt: skip
    """Set the functions that this run's workflows and activities call."""
    _kill[:] = [kill]
    _begin[:] = [begin]
    _continues[:] = [continues]
    _looked[:] = [looked]
    _perform[:] = [perform]
    _feeding[:] = [feeding]


class Killed(KeyboardInterrupt):
    """Raised in a step to end it when its process is killed."""
