"""The workload of the chaos tests: each instance has a plan of its own, drawn from the seed, and its result is known beforehand.

    a  two questions at once      s  two, one after the other    c  one, asked by a child
    n  a nap                      r  a race of a question and a timer that is cancelled
"""

import kwflow as kw

kw.declare_topics("chaos-ask")

MOVES = "aasscnrr"


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


@kw.workflow(name="child")
def child(number):
    return (yield ask(number))


def main(opts):
    """`opts`: {"plan": moves, "rounds": how often, once by default}. Returns the sum of the answers, each of which is the number that was asked for."""
    total = 0
    for number, move in enumerate(opts["plan"] * opts.get("rounds", 1)):
        if move == "a":
            one, two = yield kw.all([ask(2 * number), ask(2 * number + 1)])
            total += one + two
        elif move == "s":
            total += yield ask(number)
            total += yield ask(number + 7)
        elif move == "n":
            total += yield nap(200)
        elif move == "r":
            which, value = yield kw.race({"answer": ask(1000), "late": kw.sleep(3600)})
            total += value
        elif move == "c":
            total += yield kw.start_child("child", number)
    return total


def expected(plan):
    """The result by a sequential model."""
    return sum({"a": 4 * number + 1, "s": 2 * number + 7, "n": 200, "r": 1000, "c": number}[move] for number, move in enumerate(plan))


def asked(plan):
    """The number of questions that one instance and its children ask."""
    return sum({"a": 2, "s": 2, "n": 0, "r": 1, "c": 1}[move] for move in plan)
