"""Workflows of a chaos test: calls of two queues, one after the other and together. Some fail at first, and one queue is done in batches."""

import time

import kwflow as kw

_RETRY = kw.Retry(max_attempts=20, first=0.1, max=1.0)


@kw.activity(queue="chaos-one", timeout=30, retry=_RETRY)
def one(n: int) -> int:
    time.sleep(0.01)
    if n % 7 == 3 and kw.activity_info().attempt == 1:
        raise ValueError(n)
    return n + 1


@kw.activity(queue="chaos-two", retry=_RETRY)
def two(n: int) -> int: ...


@kw.batch_of(two, size=20, within=0.2)
def twos(calls):
    return [call.arguments["n"] * 2 for call in calls]


@kw.workflow
def flow(steps):
    sums = []
    for n in range(steps):
        sums.append((yield one(n)))
        sums += yield kw.all([two(n), one(n)])
    return sums
