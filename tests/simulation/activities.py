"""The activities of the simulation.  A call's plan says what each attempt does, so that its outcome is known in advance.

A plan has a word for each attempt, and the last one holds for all that follow: ok, slow, fail (which is tried again), refuse (a
BusinessError, which is not), hang (no answer before the timeout), kill (the process that runs it).
"""

from typing import Any

import kwflow as kw
from tests.simulation import probes

ATTEMPTS_MAX = 3
QUEUE, MAIL = "sim-queue", "sim-mail"


def attempt(plan: list[str]) -> dict[str, int]:
    info = kw.activity_info()
    probes.begin(info)
    return outcome(info, plan)


def outcome(info: kw.ActivityInfo, plan: list[str]) -> dict[str, int]:
    what = plan[min(info.attempt, len(plan)) - 1]
    probes.perform(info, what)
    if what == "fail":
        raise ValueError("as planned")
    if what == "refuse":
        raise kw.BusinessError("refused", "as planned")
    return {"attempt": info.attempt}


@kw.activity(name="sim-work", heartbeat=120, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def work(plan: list[str]) -> dict[str, int]:
    """An activity that may take any time.  The details of its heartbeats are the attempts that have begun, as far as it knows."""
    info = kw.activity_info()
    probes.begin(info)
    runs = info.heartbeat_details or []
    probes.continues(info, runs)
    info.heartbeat([*runs, info.attempt])
    return outcome(info, plan)


@kw.activity(name="sim-timed", timeout=4, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def timed(plan: list[str]) -> dict[str, int]:
    """An activity whose attempts have four seconds each; a slow one may need more."""
    return attempt(plan)


@kw.activity(name="sim-queued", queue=QUEUE, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def queued(plan: list[str]) -> dict[str, int]:
    """An activity that workers run."""
    return attempt(plan)


@kw.activity(name="sim-queued-beating", queue=QUEUE, heartbeat=120, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def queued_beating(plan: list[str]) -> dict[str, int]:
    """The same in a worker, which asks an engine for the details.  An attempt that fails gives some more just before that."""
    info = kw.activity_info()
    begun = probes.begin(info)
    runs = info.heartbeat_details or []
    probes.looked(begun, runs)
    info.heartbeat([*runs, info.attempt])
    try:
        return outcome(info, plan)
    except ValueError:
        info.heartbeat([*runs, info.attempt, info.attempt])
        raise


@kw.activity(name="sim-queued-timed", queue=QUEUE, timeout=4, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def queued_timed(plan: list[str]) -> dict[str, int]:
    return attempt(plan)


@kw.activity(name="sim-mailed", queue=MAIL, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def mailed(plan: list[str]) -> dict[str, int]: ...


@kw.batch_of(mailed, size=3, within=0.5)
def mailed_together(calls: list[kw.Call]) -> list[Any]:
    """Run the calls one after the other; slow ones are answered at once, the others by the list that is returned."""
    for call in calls:
        probes.begin(call.info)
    found: list[Any] = []
    for call in calls:
        try:
            found.append(outcome(call.info, call.arguments["plan"]))
        except Exception as error:
            found.append(error)
        else:
            if "slow" in call.arguments["plan"]:
                call.complete(found[-1])
    return found


KINDS = {"mailed": mailed, "queued": queued, "queued-beating": queued_beating, "queued-timed": queued_timed, "timed": timed, "work": work}
QUEUES = {"mailed": MAIL, "queued": QUEUE, "queued-beating": QUEUE, "queued-timed": QUEUE}
