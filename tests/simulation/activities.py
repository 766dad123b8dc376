"""The activities of the simulation: what an attempt does is said by its plan, so that the outcome of a call is known in advance.

A plan has a word for each attempt, the last one for all that follow: ok, slow, fail (tried again), refuse (a
BusinessError, which is not), hang (no answer before the timeout).
"""

import kwflow as kw
from tests.simulation import probes

ATTEMPTS_MAX = 3


def attempt(plan: list[str]) -> dict[str, int]:
    info = kw.activity_info()
    what = plan[min(info.attempt, len(plan)) - 1]
    probes.perform(info, what)
    if what == "fail":
        raise ValueError("as planned")
    if what == "refuse":
        raise kw.BusinessError("refused", "as planned")
    return {"attempt": info.attempt}


@kw.activity(name="sim-work", retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def work(plan: list[str]) -> dict[str, int]:
    """As long as it takes."""
    return attempt(plan)


@kw.activity(name="sim-timed", timeout=4, retry=kw.Retry(max_attempts=ATTEMPTS_MAX, first=0.5, jitter=0.5))
def timed(plan: list[str]) -> dict[str, int]:
    """Each attempt has four seconds; a slow one may need more."""
    return attempt(plan)


KINDS = {"timed": timed, "work": work}
