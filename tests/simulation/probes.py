"""What the simulation's workflow tells its world; process state, replaced for each run."""

from collections.abc import Callable

from kwflow.core.step import in_step

outside: list[str] = []  # finally blocks that ran outside a step (G8)
_kill: list[Callable[[], None]] = []


def cleaned(id: str) -> None:
    if not in_step():
        outside.append(id)


def kill() -> None:
    _kill[-1]()


def on_kill(do: Callable[[], None]) -> None:
    _kill[:] = [do]


class Killed(KeyboardInterrupt):
    """What a step is left with when its process is killed in it."""
