"""A schedule: sleeps until its next time and starts a child.  Part of the snapshot format: never edited once released."""

from collections.abc import Generator
from typing import Any

from kwflow import api as kw
from kwflow import schedules
from kwflow.errors import ChildError
from kwflow.flows import support


def follow(workflow: str, value: Any, run: str) -> Generator[Any, Any, str]:
    """One run, to its end, whatever that is."""
    try:
        yield kw.start_child(workflow, value, id=run, parent_close="abandon")
    except ChildError as error:
        return error.outcome
    return "result"


def schedule(plan: Any) -> Generator[Any, Any, Any]:
    """Start children when they are due until a signal says that it is removed; runs that are on then go on."""
    state = schedules.begin(plan, support.now_ms())
    runs: dict[str, Any] = {}
    inbox = kw.signals(schedules.SIGNAL)
    while not state["removed"]:
        for run in schedules.due(state, support.now_ms()):
            runs[run] = kw.spawn(follow(state["plan"]["workflow"], state["plan"]["input"], run))
        kw.set_status(schedules.status(state))
        timer, signal = support.timer_of(state), inbox.wait()
        key, value = yield kw.race({"signal": signal, "timer": timer, **{f"run {run}": task for run, task in runs.items()}}, cancel_rest=False)
        kw.cancel(timer)
        kw.cancel(signal)
        if key == "signal":
            support.tell(state, value)
        elif key != "timer":
            run = key[4:]
            del runs[run]
            schedules.ended(state, run, value)
    return schedules.status(state)
