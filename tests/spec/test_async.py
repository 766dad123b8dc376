"""semantics.md §6: `async def` in a durable module is a second spelling of the same workflow."""

import asyncio
import inspect
import re
import sys
import warnings
from typing import Any

import pytest

import kwflow as kw
from kwflow import durable
from kwflow.errors import LostCallWarning, NotDurableWarning
from kwflow.testing import WorkflowTester

HEAD = "import contextlib\nimport kwflow as kw\nkw.declare_topics('out')\ndef say(x):\n    kw.output(str(x), 'out')\n"
_count = [0]


def load(body: str) -> Any:
    _count[0] += 1
    return durable.load_source(f"asyncs_{_count[0]}", HEAD + body, f"asyncs_{_count[0]}.py")


def run(body: str, options: Any = None) -> WorkflowTester:
    tester = WorkflowTester(load(body).main)
    tester.start("w", options)
    return tester


SAGA = """
kw.declare_topics(*(f"saga-{step}-{kind}" for step in ("reserve", "cancel") for kind in ("car", "hotel", "flight")))

def reserve(kind):
    resume = kw.suspend()
    kw.output(resume.id, f"saga-reserve-{kind}")
    try:
        yield resume
    except kw.Cancelled:
        kw.output(resume.id, f"saga-cancel-{kind}")
        raise
    return {"id": resume.id}

def release(kind, item):
    kw.output(item["id"], f"saga-cancel-{kind}")
    yield kw.sleep(0.001)

def deadline(ms):
    yield kw.sleep(ms / 1000)
    raise kw.WorkflowError("timeout")

def main(opts):
    undo = []

    def book(kind):
        item = yield reserve(kind)
        undo.append(lambda: release(kind, item))
        if kind == opts.get("fail"):
            raise kw.WorkflowError("something is wrong")
        return item

    try:
        booked = kw.all([book("car"), book("hotel"), book("flight")], wait_rest=True)
        car, hotel, flight = yield kw.race([booked, deadline(opts.get("timeout", 1000))], wait_rest=True)
        return {"car": car, "hotel": hotel, "flight": flight}
    except BaseException:
        yield kw.all([u() for u in undo])
        raise
"""
ASYNC_SAGA = re.sub(r"\byield\b", "await", re.sub(r"\bdef (reserve|release|deadline|main|book)\b", r"async def \1", SAGA))


def saga_record(source: str, options: Any, answers: int, seconds: float) -> list[Any]:
    tester = WorkflowTester(load(source).main)
    tester.start("trip", options)
    for kind in ("car", "hotel", "flight")[:answers]:
        [ref] = tester.outputs_to(f"saga-reserve-{kind}")
        tester.resume("trip", ref or "", "booked")
    tester.advance(seconds)
    return [(output.topic, output.key, output.value, [header for header in output.headers if b"asyncs_" not in (header[1] or b"")]) for output in tester.outputs]


@pytest.mark.parametrize(("options", "answers"), [({}, 3), ({}, 1), ({"fail": "hotel"}, 2), ({"fail": "car"}, 1), ({"timeout": 5}, 0)])
def test_the_same_saga_in_both_spellings_writes_the_same_records(options: Any, answers: int) -> None:
    """§6, G1: outputs, refs, timers, result or error, in the same order."""
    assert "yield" not in ASYNC_SAGA
    expected = saga_record(SAGA, options, answers, 2)
    assert saga_record(ASYNC_SAGA, options, answers, 2) == expected
    assert expected[-1][0] in ("workflow-result", "workflow-error", "workflow-scheduler")


def test_await_runs_a_fresh_call_inline_and_waits_for_one_that_is_a_task() -> None:
    """§6.1: a fresh call does not become a task."""
    w = run("""
async def child(name):
    say(name + " begins")
    return name, await kw.suspend(name)
async def main(o):
    inline = await child("a")
    task = kw.spawn(child("b"))
    made = child("c")
    await kw.race([made, kw.suspend("gate")])
    return inline, await task, await made, await made
""")
    w.resume("w", "a", 1)
    assert w.waits("w") == ["b", "gate", "c"]
    w.resume("w", "c", 3)
    w.resume("w", "b", 2)
    assert w.result("w") == [["a", 1], ["b", 2], ["c", 3], ["c", 3]]


def test_a_call_that_was_cancelled_before_it_began_is_cancelled_when_it_is_awaited() -> None:
    """§6.1, §1.2: the cancel was its first use."""
    w = run("""
async def child():
    say("never")
async def main(o):
    made = child()
    kw.cancel(made)
    try:
        await made
    except kw.Cancelled:
        return "cancelled"
""")
    assert w.result("w") == "cancelled"
    assert w.outputs_to("out") == []


def test_await_of_a_plain_value_is_a_type_error_as_natively() -> None:
    """§6.1."""
    source, plain = "async def main(o):\n    await 5\n", {}
    exec(source, plain)
    with pytest.raises(TypeError) as native:
        plain["main"](None).send(None)
    assert run(source).values("workflow-error") == [f"TypeError: {native.value}"]


def test_both_spellings_call_each_other() -> None:
    w = run("""
def old(n):
    got = yield kw.suspend(f"old-{n}")
    return got
async def new(n):
    return n, await old(n)
def main(o):
    first = yield new(1)
    second = yield from new(2)
    third, fourth = yield kw.all(new(n) for n in (3, 4))
    return [first, second, third, fourth]
""")
    for n in (1, 2, 3, 4):
        w.resume("w", f"old-{n}", n * 10)
    assert w.result("w") == [[1, 10], [2, 20], [3, 30], [4, 40]]


def test_async_with_async_for_and_comprehensions_wait_and_are_saved() -> None:
    w = run("""
async def numbers(n):
    for i in range(n):
        got = await kw.suspend(f"number-{i}")
        yield got
@contextlib.asynccontextmanager
async def room(name):
    await kw.suspend("open")
    try:
        yield name
    finally:
        await kw.suspend("close")
async def main(o):
    async with room("r") as name:
        doubled = [x * 2 async for x in numbers(2)]
        async for x in numbers(1):
            say(x)
    return name, doubled
""")
    for ref in ("open", "number-0", "number-1", "number-0", "close"):
        assert w.waits("w") == [ref]
        w.resume("w", ref, len(ref))
    assert w.result("w") == ["r", [16, 16]]


def test_async_for_reads_a_mailbox_message_by_message() -> None:
    """M3: those that were there already, those that come later, and updates in the same way."""
    w = run("""
async def main(o):
    renamed, said = kw.on_update("rename"), []
    await kw.suspend("go")
    async for word in kw.signals("said"):
        if word == "stop":
            break
        said.append(word)
    said += [await anext(kw.signals("said"))]
    async for update in renamed:
        kw.reply(update, said)
        if update.value == "last":
            return [word async for word in first(kw.signals("said"), 2)]

async def first(inbox, count):
    async for word in inbox:
        yield word
        count -= 1
        if not count:
            return
""")
    for word in ("a", "b"):
        w.command("w", "signal", {"name": "said", "value": word})
    w.resume("w", "go")
    assert [(wait["kind"], wait["name"]) for wait in w.header("w")["waits"]] == [("signal", "said")]
    for word in ("stop", "after", "c", "d"):
        w.command("w", "signal", {"name": "said", "value": word})
    assert w.command("w", "update", {"name": "rename", "value": "first"})["value"] == ["a", "b", "after"]
    assert w.command("w", "update", {"name": "rename", "value": "last"})["value"] == ["a", "b", "after"]
    assert w.result("w") == ["c", "d"]


BELOW_ACTIVITIES = """
import asyncio
from kwflow import durable
seen = []

@contextlib.asynccontextmanager
async def session():
    await asyncio.sleep(0)
    try:
        yield "session"
    finally:
        await asyncio.sleep(0)
        seen.append("left")

async def numbers(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i

async def fetch(n):
    async with session() as found, asyncio.Lock(), asyncio.timeout(60):
        return [found, sum([x async for x in numbers(n)])]

class Pages:
    async def __aenter__(self):
        return await inner(self)
    async def __aexit__(self, *_):
        seen.append("closed")

async def inner(x):
    await asyncio.get_running_loop().run_in_executor(None, str, 1)
    return x

async def slow():
    try:
        await asyncio.sleep(3600)
    finally:
        seen.append("cancelled")

async def all_of_it():
    first = await fetch(3)
    more = await asyncio.gather(fetch(1), asyncio.wait_for(fetch(2), 60), *[asyncio.ensure_future(inner(n)) for n in (7, 8)])
    async with Pages() as pages:
        seen.append(type(pages).__name__)
    try:
        await asyncio.wait_for(slow(), 0.01)
    except TimeoutError:
        seen.append("late")
    async for x in native():
        seen.append(x)
    return first, more

@durable.native
async def native():
    yield await asyncio.sleep(0, "native")

async def main(o):
    return await kw.suspend("r")
"""


def test_an_event_loop_runs_async_functions_of_a_durable_module() -> None:
    """M6: helpers of activities stand in the same module. They were refused there, in words that were meant for workflows."""
    module = load(BELOW_ACTIVITIES)

    async def activity() -> Any:
        return await module.all_of_it()

    assert asyncio.run(activity()) == (["session", 3], [["session", 0], ["session", 1], 7, 8])
    assert module.seen == ["left"] * 3 + ["Pages", "closed", "cancelled", "late", "native"]


def test_a_step_inside_a_running_event_loop_is_a_step_all_the_same() -> None:
    """§6.2: as in a test that is a coroutine itself."""
    module = load(BELOW_ACTIVITIES + "async def sleeps(o):\n    await asyncio.sleep(0)\n")

    async def test() -> WorkflowTester:
        tester = WorkflowTester(module.main, sleeps=module.sleeps)
        tester.start("w")
        tester.resume("w", "r", 5)
        tester.start("refused", workflow="sleeps")
        return tester

    tester = asyncio.run(test())
    assert tester.result("w") == 5
    assert tester.values("workflow-error") == ["UsageError: asyncio's sleep cannot be awaited in a workflow, which has no event loop; use kw.sleep(seconds)"]


ASYNCIO = {
    "asyncio.sleep(0)": "kw.sleep",
    "asyncio.wait_for(asyncio.sleep(1), 1)": "kw.timeout",
    "asyncio.Queue().get()": "kw.wait_condition(lambda: ...), or kw.suspend()",
    "asyncio.Lock().acquire()": "no lock around code without waits",
    "asyncio.Semaphore().__aenter__()": "kw.wait_condition",
    "asyncio.to_thread(print)": "activity",
}


@pytest.mark.parametrize("expression", ASYNCIO)
@pytest.mark.parametrize("how", ["await {}", "await kw.all([{}])", "await kw.race([{}, kw.suspend()])", "await helper({})"])
def test_what_belongs_to_asyncio_is_refused_with_the_name_of_what_to_write(expression: str, how: str) -> None:
    """§6.2: otherwise asyncio.sleep(0), an uncontended Lock and Queue.get would work, and nothing would say that they are wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = run(f"import asyncio\nasync def helper(x):\n    return await x\nasync def main(o):\n    {how.format(expression)}\n")
    [told] = w.values("workflow-error")
    assert told.startswith("UsageError: asyncio's ")
    assert ASYNCIO[expression] in told


@pytest.mark.parametrize("body", ["    async with asyncio.Lock():\n        pass\n", "    async with asyncio.timeout(1):\n        pass\n", "    async for x in native():\n        pass\n"])
def test_asyncio_managers_and_native_async_generators_are_refused(body: str) -> None:
    """§6.2."""
    w = run(f"import asyncio\nfrom kwflow import durable\n@durable.native\nasync def native():\n    yield 1\nasync def main(o):\n{body}")
    [told] = w.values("workflow-error")
    assert told.startswith(("UsageError: ", "RuntimeError: no running event loop"))


def test_steps_run_where_no_event_loop_is() -> None:
    """§6.2."""
    w = run("import asyncio\nasync def main(o):\n    asyncio.get_running_loop()\n")
    assert w.values("workflow-error") == ["RuntimeError: no running event loop"]


def test_a_coroutine_of_code_that_is_not_durable_is_refused_by_name_and_place() -> None:
    w = run("from kwflow import durable\n@durable.native\nasync def native():\n    pass\nasync def main(o):\n    await native()\n")
    [told] = w.values("workflow-error")
    assert "native (asyncs_" in told
    assert "not durable" in told


def test_forgetting_an_async_workflow_says_nothing_of_coroutines_never_awaited() -> None:
    """§6.2, G8."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = load("async def child():\n    say('never')\nasync def main(o):\n    made = child()\n    await kw.suspend('x')\n")
        gen = module.main({})
        durable.discard(gen)
        tester = WorkflowTester(module.main)
        tester.start("w")
        del gen, tester


def test_a_yield_in_async_main_is_told_what_it_makes() -> None:
    w = run("async def main(o):\n    x = yield kw.suspend()\n")
    assert "async generator" in w.values("workflow-error")[0]
    assert "`await`" in w.values("workflow-error")[0]


def test_a_thrown_away_call_of_an_async_function_is_warned_about_with_await() -> None:
    """§1.4."""
    with pytest.warns(LostCallWarning, match="write `await book"):
        load("async def book():\n    pass\nasync def main(o):\n    book()\n    await kw.sleep(1)\n")


def test_a_coroutine_function_of_other_code_in_a_durable_module_is_warned_about() -> None:
    """§5.3."""
    with pytest.warns(NotDurableWarning, match="sleep is a coroutine function of asyncio.tasks"):
        load("from asyncio import sleep\n")


def test_where_an_async_workflow_waits_is_told_down_to_the_async_generator() -> None:
    """KW-7: in the waits of the header."""
    w = run("async def inner():\n    await kw.suspend('deep')\n    yield 1\nasync def main(o):\n    async for x in inner():\n        say(x)\n")
    [wait] = (w.header("w") or {})["waits"]
    assert wait["function"].endswith("inner")
    assert wait["line"] == 7


@pytest.mark.skipif(sys.version_info < (3, 12), reason="NOT TESTED: before 3.12 a function cannot be marked as a coroutine function")
def test_inspect_calls_an_async_def_a_coroutine_function() -> None:
    assert inspect.iscoroutinefunction(load("async def main(o):\n    pass\n").main)


def test_async_functions_register_as_workflows() -> None:
    module = load("@kw.workflow(name='async-registered')\nasync def flow(o):\n    return await kw.suspend('x')\n")
    assert kw.registered_workflows()["async-registered"] is module.flow
    tester = WorkflowTester()
    tester.start("w", workflow="async-registered")
    tester.resume("w", "x", 7)
    assert tester.result("w") == 7
