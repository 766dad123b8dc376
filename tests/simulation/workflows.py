"""The workflow of the simulation: it interprets a program that came with its start.  Loaded as a durable module.

A program is a list [word, argument ...]; a new kind of node is a function in NODES here and a line in `workload.py`.
"""

import json
import threading

import kwflow as kw
from tests.simulation import activities, probes

kw.declare_topics("sim-ask", "sim-said")
HELPER = 0  # another one in another release (releases.py)


def helper():
    return HELPER


def say(*words):
    kw.output(" ".join(map(str, words)), "sim-said")


def ask(tag):
    answer = kw.suspend()
    kw.output(answer.id, "sim-ask")
    try:
        value = yield answer
    except kw.Cancelled:
        say("cancelled", tag)
        raise
    finally:
        probes.cleaned(kw.workflow_id())
    say("answered", tag, value)
    return value


def sleep(seconds):
    yield kw.sleep(seconds)
    say("slept", seconds)
    return seconds


def every(*nodes):
    return (yield kw.all([run(node) for node in nodes]))


def first(*nodes):
    return (yield kw.race([run(node) for node in nodes], wait_rest=len(nodes) > 2))


def limit(node, seconds, wait_rest=False):
    try:
        return (yield kw.timeout(run(node), seconds, wait_rest=wait_rest))
    except TimeoutError:
        say("late")
        return "late"


def child(node, after):
    task = kw.spawn(run(node))
    then = yield run(after)
    return [then, (yield task)]


def stop(node, after):
    task = kw.spawn(run(node))
    yield run(after)
    kw.cancel(task)
    try:
        return (yield task)
    except kw.Cancelled:
        return "stopped"


def shield(node):
    return (yield kw.shield(run(node)))


def sequence(*nodes):
    found = []
    for node in nodes:
        found.append((yield run(node)))
    return found


def rescue(node):
    try:
        return (yield run(node))
    except Exception as error:
        say("rescued", type(error).__name__)
        return "rescued"


def undo(node, cleanup):
    """However this ends, something that waits, too, is done then."""
    try:
        return (yield run(node))
    finally:
        done = yield run(cleanup)
        say("undone", json.dumps(done))


def slots(number, *nodes):
    """So many of them at a time; the others wait until one of these has ended, however it does."""
    free = number

    def one(node):
        nonlocal free
        yield kw.wait_condition(lambda: free > 0)
        free -= 1
        say("slot", free)
        try:
            return (yield run(node))
        finally:
            free += 1

    return (yield kw.all([one(node) for node in nodes]))


def saga(*tags):
    undo = []

    def book(tag):
        value = yield run(["ask", tag])
        undo.append(lambda: say("undo", tag, value))
        return value

    try:
        return (yield kw.timeout(kw.all([book(tag) for tag in tags]), 30))
    except BaseException as error:
        for step in reversed(undo):
            step()
        say("saga failed", type(error).__name__)
        raise


def fail(what):
    raise ValueError(what)
    yield


def stuck():
    """Nothing can wake it (G9)."""
    yield kw.race([])


def lock(tag):
    """Cannot be saved while it waits (G4).  Shielded, so that no record of the same batch ends the wait before it is saved: one alone would find it parked."""
    held = threading.Lock()
    value = yield kw.shield(ask(tag))
    return [value, held is None]


def large(tag):
    """Its snapshot is larger than one may be."""
    held = "x" * 200_000
    value = yield kw.shield(ask(tag))
    return [value, len(held)]


def huge():
    """The broker takes no such record (K11)."""
    say("y" * 250_000)
    return (yield 1)


def kill():
    """The process does not survive this step (K19)."""
    probes.kill()
    return (yield 1)


def kid(node, policy, after):
    """A workflow of its own; what becomes of it when this one goes on without it is its policy."""
    other = kw.start_child("main", {"program": node}, parent_close=policy)
    try:
        return (yield kw.race([other, run(after)]) if after else other)
    except kw.ChildError as error:
        say("child", error.outcome)
        return error.outcome


def hear(name, node):
    """A signal, or what the node gives; what loses is heard by the next."""
    found = yield kw.race({"signal": kw.wait_signal(name), "node": run(node)})
    say("heard", *found)
    return [*found, kw.signals("rest").take()]


def tell(other, name, value, start):
    """A signal to whoever has that id, itself too; `start` is what runs there if nobody has it."""
    begun = {"start": main if value % 2 else "main", "input": {"program": start}} if start else {}
    kw.send_signal(other, name, {"from": kw.workflow_id(), "value": value}, **begun)
    return (yield value)


def judge(node):
    """Answers what it is asked while something goes on: what is odd is rejected, and some of it only after a while."""

    def later(update):
        with update:
            yield kw.sleep(0.5)
            if update.value % 5:
                kw.reply(update, -update.value)
            if update.value % 4:
                raise ValueError(f"{update.value} is not divided by four")

    asked, work = kw.on_update("judge"), kw.spawn(run(node))
    while True:
        what, found = yield kw.race({"asked": asked, "work": work}, cancel_rest=False)
        if what == "work":
            return found
        if found.value % 3 == 0:
            kw.spawn(later(found))
        elif found.value % 2:
            say("rejected", found.value)
            kw.reject(found, f"{found.value} is odd")
        else:
            kw.reply(found, -found.value)


def call(kind, plan):
    """An activity; how it ended is said with its plan, which tells how it must end."""
    try:
        outcome = (yield activities.KINDS[kind](plan))["attempt"]
    except kw.ActivityError as error:
        outcome = error.type
    except kw.BusinessError as error:
        outcome = error.code
    say("called", kind, json.dumps(plan), json.dumps(outcome))
    return outcome


def note(name):
    """Whatever comes, in order, for ever."""
    told = kw.signals(name)
    while True:
        say("noted", (yield told.wait())["event"])


def positive(value):
    if value < 0:
        raise ValueError("it is negative")


def account():
    """The sum of what it is told, by signals and by updates, until it is told nothing; now and then it is busy, and both kinds wait to be read."""
    total, heard = 0, 0
    deposits, orders = kw.signals("add"), kw.on_update("add", validator=positive)

    def add(told):
        nonlocal total, heard
        value = getattr(told, "value", told)
        total, heard = total + value, heard + 1
        if told is not value:
            kw.reply(told, 2 * value)
        kw.set_status(total)
        return value

    while True:
        one = kw.race([deposits.wait()])  # a combinator, so that it is the first that waits
        two = kw.all([deposits.wait(), kw.wait_signal("never")])  # never; what it took is given back each time
        _, told = yield kw.race({"signal": one, "two": two, "update": orders.wait()})
        if told is None:
            for rest in (*deposits.take(), *orders.take()):
                add(rest)
            return [total, heard]
        if add(told) % 3 == 0:
            yield kw.sleep(1)


NODES = {
    "account": account, "all": every, "ask": ask, "call": call, "child": child, "fail": fail, "hear": hear, "huge": huge, "judge": judge, "kid": kid, "kill": kill, "large": large,
    "limit": limit, "lock": lock, "note": note, "race": first, "rescue": rescue, "saga": saga, "sequence": sequence, "shield": shield, "sleep": sleep, "slots": slots, "stop": stop,
    "stuck": stuck, "tell": tell, "undo": undo,
}  # fmt: skip


def run(node):
    return (yield from NODES[node[0]](*node[1:]))


def main(opts):
    say("started", kw.workflow_id())
    began = "main 0"
    found = yield run(opts["program"])
    return {"found": found, "began": began, "ended": "main 0", "helper": helper()}
