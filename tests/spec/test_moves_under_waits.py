"""Moving in place under everything that an instance can wait for: what the world sees of it is what it would have seen without the move (decision 0061)."""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import kwflow as kw
from kwflow import durable, rest
from kwflow.durable import registry
from kwflow.testing import HANGS, WorkflowTester

_count = itertools.count()
BEFORE, AFTER = "deployed before a record", "deployed after it"


class Site:
    """A module whose functions are all edited, and everything that waits is moved, before (BEFORE) or after (AFTER) each record that is applied; or not, to compare with that."""

    def __init__(self, source: str, fakes: dict[str, Callable[..., Any]], when: str = "") -> None:
        self.source, self.fakes, self.when = source, fakes, when
        self.name, self.edits, self.ours = f"under_case_{next(_count)}", 0, set[bytes]()
        self.w = WorkflowTester(self._load().main)
        self._serve()

    def _load(self) -> Any:
        edited = re.sub(r"^( *)((async )?def .*):$", rf"\1\2:\n\1    edit = {self.edits}", self.source.replace("NAME", self.name), flags=re.M)
        return durable.load_source(self.name, f"import contextlib\nimport functools\nimport kwflow as kw\nfrom kwflow import rest\n{edited}", f"{self.name}.py")

    def _serve(self) -> None:
        self.w._workflows.queues = "queue=" in self.source
        for activity, function in self.fakes.items():
            self.w.fake(activity if "." in activity else f"{self.name}.{activity}", function)

    def _deploy(self) -> None:
        self.edits += 1
        self.w.deploy(self._load().main)
        self._serve()

    def apply(self, act: Callable[["Site"], object]) -> None:
        """Let something happen on the code that the instances run; then move them, or look at each, which is a record of the same offset."""
        if self.when == BEFORE:
            self._deploy()
        act(self)
        if self.when == AFTER:
            self._deploy()
        for id in self.w.ids():
            before = self.w.header(id)
            self.ours.add(f"request-{len(self.w.outputs)}".encode())
            reply = self.w.command(id, "migrate", {"in_place": True}) if self.when else self.w.command(id, "query")
            if self.when and before["status"] != "ended":
                after = self.w.header(id)
                assert reply["status"] == ("unchanged" if before["code"] == after["code"] and self.when == BEFORE else "ok"), reply
                assert {code["version"] for reference, code in after["code"].items() if reference.startswith(self.name)} == {registry.modules()[self.name].version}
                assert [wait["ref"] for wait in after["waits"]] == [wait["ref"] for wait in before["waits"]]

    def told(self) -> list[str]:
        """All records that were written, calls that were made, and replies that were sent."""
        records = [(one.topic, one.key, one.value) for one in self.w.outputs if dict(one.headers).get("kwflow-request") not in self.ours]
        replies = [(reply["status"], reply["message"], reply["value"]) for reply in self.w.replies if reply["request"].encode() not in self.ours]
        return [str(one).replace(self.name, "the module") for one in (*records, *self.w.calls, *replies)]

    def handed(self) -> list[dict[str, Any]]:
        """The calls that are in the queue."""
        return [json.loads(one.value) for one in self.w.outputs if one.topic == self.name and one.value is not None]


def start(value: Any = None, id: str = "w") -> Callable[[Site], object]:
    return lambda site: site.w.start(id, value)


def resume(ref: str, value: Any = None, id: str = "w", **error: Any) -> Callable[[Site], object]:
    return lambda site: site.w.resume(id, ref, value, **error)


def worked(call: int, value: Any = None, **error: Any) -> Callable[[Site], object]:
    """A worker answers the call with this number."""
    return lambda site: site.w.resume("w", site.handed()[call]["ref"], value, **error)


def done(value: Any = None, **error: Any) -> Callable[[Site], object]:
    """The engine ends the attempt of an activity that is under way."""
    return lambda site: site.w.resume("w", next(wait["ref"] for wait in site.w.header("w")["waits"] if wait["kind"] == "activity"), value, **error)


def called_back(end: str, value: Any = None) -> Callable[[Site], object]:
    """The service posts to its callback URL."""
    return lambda site: site.w.resume("w", f"callback-TOKEN{end}", value)


def advance(seconds: float) -> Callable[[Site], object]:
    return lambda site: site.w.advance(seconds)


def command(op: str, id: str = "w", /, **arguments: Any) -> Callable[[Site], object]:
    return lambda site: site.w.command(id, op, arguments or None)


class Case(NamedTuple):
    source: str
    acts: list[Callable[[Site], object]]
    result: Any
    fakes: dict[str, Callable[..., Any]] = {}


QUEUED = """
@kw.activity(name="NAME.work", queue="NAME", retry=kw.Retry(max_attempts=3, first=10, jitter=0), timeout=60)
def work(n: int) -> int: ...
"""
LOCAL = """
@kw.activity(name="NAME.work", retry=kw.Retry(max_attempts=3, first=10, jitter=0), timeout=60)
def work(n: int) -> int: ...
"""
REST = """
def built(name):
    def asked(callback):
        return {"name": name, "url": callback.url}
    def undone(response):
        return rest.Request("DELETE", f"https://builder.example/{response['id']}", name)
    def fine(answer):
        return answer["ok"]
    return rest.call("POST", "https://builder.example/", body=asked, cancel=undone, success=fine, timeout=200, heartbeat_timeout=100, retry=kw.Retry(first=5, jitter=0))
"""
FAILED = {"message": "no", "type": "ValueError"}
CASES = {
    "a call in a queue": Case(QUEUED + "def main(n):\n    return (yield work(n))", [start(1), worked(0, 5)], 5),
    "a call in a queue that is over its time, pauses, fails, and is answered at its third attempt": Case(
        QUEUED + "def leg(n):\n    return (yield work(n)) + 1\ndef main(n):\n    return (yield from leg(n)) * 10",
        [start(1), advance(60), worked(0, 3), advance(10), worked(1, error=FAILED), advance(20), worked(2, 5), worked(2, 6)],
        60,
    ),
    "a call in a queue that fails for good": Case(
        QUEUED + "def main(n):\n    try:\n        yield work(n)\n    except kw.ActivityError as error:\n        yield kw.suspend('told')\n        return error.type",
        [start(1), worked(0, error={**FAILED, "final": True}), resume("told")],
        "ValueError",
    ),
    "calls in a queue of which one is cancelled by the code that was moved": Case(
        QUEUED + "def main(n):\n    one, two = work(1), work(2)\n    yield kw.suspend('go')\n    kw.cancel(one)\n    return (yield two)",
        [start(), resume("go"), worked(0, 1), worked(1, 2)],
        2,
    ),
    "an activity in the engine, in each of its attempts and pauses": Case(
        LOCAL + "def main(n):\n    try:\n        return (yield work(n))\n    except kw.ActivityError as error:\n        return error.type",
        [start(1), advance(60), advance(10), advance(60), advance(20), advance(60)],
        "Timeout",
        {"work": lambda n: HANGS},
    ),
    "activities in the engine of which one is late": Case(
        LOCAL + "def main(n):\n    found = yield kw.race({'work': work(n), 'late': kw.sleep(30)})\n    yield kw.suspend('go')\n    return found",
        [start(1), advance(30), resume("0:1", 7), resume("go")],
        ["late", None],
        {"work": lambda n: HANGS},
    ),
    "updates that wait for their answers": Case(
        """
def positive(value):
    if value <= 0:
        raise ValueError("not positive")
def main(opts):
    limit = [3]
    def small(value):
        if value > limit[0]:
            raise ValueError(f"over {limit[0]}")
    def handle(update):
        answer = yield kw.suspend(f"ask-{update.value}")
        kw.reply(update, [answer, limit[0]])
        return answer
    one, two = kw.on_update("one", validator=positive), kw.on_update("two", validator=small)
    tasks = []
    while len(tasks) < 3:
        _, update = yield kw.race({"one": one, "two": two})
        limit[0] += 1
        kw.set_status(limit[0])
        tasks.append(kw.spawn(handle(update)))
    return (yield kw.all(tasks))
""",
        [
            start(), command("update", name="one", value=0), command("update", name="one", value=5), command("update", name="two", value=5), command("update", name="two", value=4),
            command("update", name="one", value=6), resume("ask-4", "b"), resume("ask-6", "c"), command("query"), resume("ask-5", "a"),
        ],
        ["a", "b", "c"],
    ),  # fmt: skip
    "signals that nobody has read": Case(
        """
def main(opts):
    inbox = kw.signals("n")
    lost = yield kw.race({"n": inbox, "go": kw.suspend("go")})
    yield kw.suspend("more")
    first = yield inbox.wait()
    later = yield kw.wait_signal("other")
    return [lost, first, later, inbox.take(), len(inbox)]
""",
        [start(), resume("go", 0), *(command("signal", name="n", value=n) for n in (1, 2)), command("signal", name="other", value=3), command("signal", name="n", value=4), resume("more")],
        [["go", 0], 1, 3, [2, 4], 0],
    ),
    "children, one of them detached": Case(
        """
@kw.workflow(name="NAME-child")
def child(n):
    got = yield kw.suspend("go")
    return [n, got]
def main(opts):
    kw.start_child(child, 0, id="alone", detach=True)
    found = yield kw.all({n: kw.start_child(child, n, id=f"c{n}") for n in ("1", "2")})
    try:
        yield kw.timeout(kw.start_child(child, 3, id="c3"), 60)
    except TimeoutError:
        return found
""",
        [start(), resume("go", "b", "c2"), resume("go", "a", "c1"), advance(60), resume("go", "x", "c3"), resume("go", "z", "alone")],
        {"1": ["1", "a"], "2": ["2", "b"]},
    ),
    "combinators of tasks, and compensations that wait in a finally": Case(
        """
def leg(name, undone):
    try:
        return (yield kw.suspend(name))
    finally:
        yield kw.shield(kw.suspend(f"undo-{name}"))
        undone.append(name)
def main(opts):
    undone = []
    legs = [leg("a", undone), leg("b", undone)]
    try:
        yield kw.timeout(kw.all([kw.race(legs), kw.shield(leg("c", undone)), kw.sleep(5)], wait_rest=True), 60)
    except (TimeoutError, kw.Cancelled) as error:
        yield kw.shield(kw.suspend("last"))
        return [type(error).__name__, sorted(undone)]
""",
        [start(), resume("a"), advance(5), command("cancel", reason="enough"), resume("undo-b"), resume("undo-a"), resume("c"), resume("undo-c"), resume("last"), advance(60)],
        ["Cancelled", ["b", "c"]],
    ),
    "a workflow that has ended and cleans up": Case(
        """
def rest_of(name):
    try:
        yield kw.suspend("never")
    finally:
        yield kw.suspend(name)
        kw.output_json(name, "workflow-result", "cleaned")
def main(opts):
    kw.spawn(rest_of("one"))
    yield kw.suspend("go")
    return "ended"
""",
        [start(), resume("go"), resume("one")],
        "ended",
    ),
    "tasks that wait for each other": Case(
        """
def leg(name, slots, order):
    yield kw.wait_condition(lambda: slots[0] > 0)
    slots[0] -= 1
    order.append(name)
    try:
        return (yield kw.suspend(name))
    finally:
        slots[0] += 1
def main(opts):
    slots, order = [1], []
    def all_done():
        return len(order) == 3 and slots[0]
    legs = [kw.spawn(leg(name, slots, order)) for name in "abc"]
    yield kw.wait_condition(all_done)
    return [order, (yield kw.all(legs))]
""",
        [start(), resume("b", "early"), resume("a", 1), resume("b", 2), resume("c", 3)],
        [["a", "b", "c"], [1, 2, 3]],
    ),
    "what is paused": Case(
        "def main(opts):\n    total = 0\n    while total < 6:\n        total += yield kw.wait_signal('n')\n    return total",
        [start(), command("pause", reason="audit"), *(command("signal", name="n", value=n) for n in (1, 2)), command("unpause"), command("signal", name="n", value=3)],
        6,
    ),
    "an instance beside its fork": Case(
        LOCAL
        + """
def main(opts):
    seen = []
    with_cells = lambda: seen
    both = yield kw.all([work(1), kw.sleep(30)])
    seen.append((yield kw.suspend("r")))
    return [both, with_cells()]
""",
        [start(), command("fork", id="copy"), resume("0:1", 1), resume("0:1", 2, "copy"), advance(30), resume("r", "b", "copy"), resume("r", "a")],
        [[1, None], ["a"]],
        {"work": lambda n: HANGS},
    ),
    "async code": Case(
        LOCAL
        + """
class Booking:
    def __init__(self, log):
        self.log = log
    async def __aenter__(self):
        self.log.append(await kw.suspend("enter"))
        return self
    async def __aexit__(self, *error):
        self.log.append(await kw.suspend("leave"))
async def numbers(last):
    for n in range(last):
        yield n, await kw.suspend(f"n{n}")
async def main(opts):
    log = []
    async with Booking(log), contextlib.AsyncExitStack() as stack:
        async def undo(n):
            log.append(["undone", n, await kw.suspend("undo")])
        stack.push_async_callback(undo, 1)
        async for n, got in numbers(2):
            log.append([n, got, await kw.timeout(work(n), 1000)])
    return log
""",
        [start(), resume("enter", 1), resume("n0", 2), done(3), resume("n1", 4), advance(60), advance(10), done(6), resume("undo", 7), resume("leave", 8)],
        [1, [0, 2, 3], [1, 4, 6], ["undone", 1, 7], 8],
        {"work": lambda n: HANGS},
    ),
    "generators and functions that objects and containers hold": Case(
        """
class Desk:
    def __init__(self, rate):
        self.rate, self.seen = rate, []
        self.work = self.serve(2)
        self.price = functools.partial(price, rate=rate)
    def serve(self, times):
        for _ in range(times):
            self.seen.append((yield kw.suspend(f"at-{len(self.seen)}")))
        return len(self.seen)
    def total(self, more):
        return sum(self.seen) * self.rate + more
def price(n, rate):
    return n * rate
def counts(n):
    while True:
        n += 1
        yield n
def main(opts):
    desk, kept, undo = Desk(10), {"count": counts(5), "rows": (n * 2 for n in range(5))}, contextlib.ExitStack()
    def add(n, by=[3]):
        nonlocal opts
        opts += n + by[0]
    with undo:
        undo.callback(add, 1)
        kept["total"], kept["add"] = desk.total, functools.partial(add, 2)
        next(kept["count"]), next(kept["rows"])
        served = yield from desk.work
        kept["add"]()
        yield kw.suspend("late")
    return [served, kept["total"](1), desk.price(4), next(kept["count"]), next(kept["rows"]), opts]
""",
        [start(100), resume("at-0", 1), resume("at-1", 2), resume("late")],
        [2, 31, 40, 7, 2, 109],
    ),
    "a service that is asked again, sends heartbeats and calls back": Case(
        REST + "def main(opts):\n    done = yield built(opts)\n    return done.response",
        [start("x"), advance(5), called_back("-heartbeat"), advance(90), called_back("-heartbeat"), advance(90), called_back("", {"ok": True})],
        {"ok": True},
        {"kwflow.rest.token": lambda: "TOKEN", "kwflow.rest.request": lambda sent: rest.Response(503 if kw.activity_info().attempt == 1 else 200, {"id": 7})},
    ),
    "a service that is cancelled when its time is over": Case(
        REST + "def main(opts):\n    try:\n        yield built(opts)\n    except rest.RestError as error:\n        yield kw.suspend('told')\n        return error.outcome.status",
        [start("x"), called_back("-heartbeat"), advance(90), called_back("-heartbeat"), advance(90), called_back("-heartbeat"), advance(20), advance(30), resume("told")],
        "TIMED_OUT",
        {"kwflow.rest.token": lambda: "TOKEN", "kwflow.rest.request": lambda sent: rest.Response(503) if sent.method == "DELETE" else rest.Response(200, {"id": 7})},
    ),
    "a resource that is acquired again": Case(
        """
class Desk:
    def __init__(self, name):
        self.name = name
    def __enter__(self):
        return self.name
    def __exit__(self, *error):
        pass
def main(opts):
    def opened(more):
        return Desk(opts + more)
    with kw.reacquire(opened, "!") as name:
        yield kw.suspend("go")
        return name
""",
        [start("desk"), resume("go")],
        "desk!",
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", [BEFORE, AFTER])
@pytest.mark.parametrize("case", CASES)
def test_a_move_after_each_record_changes_nothing_that_the_world_sees(case: str, when: str) -> None:
    source, acts, result, fakes = CASES[case]
    left, moved = Site(source, fakes), Site(source, fakes, when)
    for act in acts:
        left.apply(act)
        moved.apply(act)
    assert left.w.result("w") == result
    assert moved.told() == left.told()
