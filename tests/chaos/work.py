"""The workload of the chaos tests: rounds of questions, timers, and races that both end; the result is known beforehand."""

import kwflow as kw

kw.declare_topics("chaos-ask")


def ask(what):
    answer = kw.suspend()
    kw.output(f"{answer.id} {what}", "chaos-ask")
    return (yield answer)


def nap(ms):
    begun = kw.now()
    yield kw.sleep(ms / 1000)
    if (kw.now() - begun).total_seconds() * 1000 < ms - 1:
        raise AssertionError("a timer fired early")
    return ms


def main(opts):
    """`opts`: {"rounds": n}.  Returns the sum of the answers, each the number that was asked for."""
    total = 0
    for round in range(opts["rounds"]):
        one, two = yield kw.all([ask(2 * round), ask(2 * round + 1)])
        total += one + two
        if round % 3 == 0:
            total += yield nap(200)
        if round % 3 == 1:
            which, value = yield kw.race({"answer": ask(1000), "late": kw.sleep(3600)})
            total += value
    return total


def expected(rounds):
    """The sequential model."""
    return sum(4 * round + 1 + (200 if round % 3 == 0 else 1000 if round % 3 == 1 else 0) for round in range(rounds))


def asked(rounds):
    """How many questions one instance asks."""
    return sum(2 + (round % 3 == 1) for round in range(rounds))


def timers(rounds):
    """How many timers of one instance fire."""
    return sum(round % 3 == 0 for round in range(rounds))
