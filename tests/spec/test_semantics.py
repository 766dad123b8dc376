"""semantics.md rule by rule, where no other file covers it: waiting, cancelling, running again, what a snapshot promises, and time."""

import gc
import importlib
import pathlib
import subprocess
import sys
import threading
import weakref
from datetime import UTC, datetime
from typing import Any

import pytest

import kwflow as kw
from kwflow import durable
from kwflow.core import snapshot
from kwflow.core.contract import Context, Topics, Workflows
from kwflow.core.step import step
from kwflow.core.tasks import Race
from kwflow.core.wire import Record
from kwflow.testing import WorkflowTester

HEAD = "import kwflow as kw\nkw.declare_topics('out')\ndef say(x):\n    kw.output(str(x), 'out')\n"
_count = [0]


def load(body: str) -> Any:
    _count[0] += 1
    return durable.load_source(f"semantics_{_count[0]}", HEAD + body, f"semantics_{_count[0]}.py")


def run(body: str, options: Any = None) -> WorkflowTester:
    tester = WorkflowTester(load(body).main)
    tester.start("w", options)
    return tester


def error(tester: WorkflowTester) -> Any:
    return tester.values("workflow-error")[-1]


# -- §1 waiting ----------------------------------------------------------------------------------------------------------


def test_waits_act_when_called_and_a_generator_is_lazy_until_it_is_used() -> None:
    """§1.1."""
    w = run("""
def child():
    say("child runs")
    yield kw.suspend("c")
def main(o):
    made = child()
    kw.suspend("called")
    kw.sleep(5)
    say("nothing of child yet")
    yield kw.suspend("gate")
    yield made
""")
    assert w.outputs_to("out") == ["nothing of child yet"]
    assert w.waits("w") == ["called", "0:1", "gate"]
    w.resume("w", "gate")
    assert w.outputs_to("out")[-1] == "child runs"


def test_a_generator_is_one_task_however_often_it_is_used() -> None:
    """§1.2: each use gives the result of its one run, also after it has ended."""
    w = run("""
def child():
    say("ran")
    return (yield kw.suspend("c"))
def main(o):
    c = child()
    kw.spawn(c)
    both = yield kw.all([c, c])
    return [both, (yield c), (yield kw.race([c]))]
""")
    w.resume("w", "c", 5)
    assert (w.result("w"), w.outputs_to("out")) == ([[5, 5], 5, 5], ["ran"])


@pytest.mark.parametrize("first", ["kw.spawn(c)", "next(c)"])
def test_yield_from_a_generator_that_has_begun_is_refused(first: str) -> None:
    """§1.2: natively it would be sent None."""
    w = run(f"def child():\n    yield kw.suspend('c')\n    yield kw.suspend('d')\ndef main(o):\n    c = child()\n    {first}\n    yield from c")
    assert "`yield from` of child, which has already started" in error(w)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("(x for x in [1])", "generator expression"),
        ("{'a': kw.suspend()}", "kw.all(...)"),
        ("(1, kw.suspend())", "kw.all(...)"),
        ("print", "did you mean print()"),
        ("kw.all(child())", "not one wait"),
        ("kw.timeout(child, 5)", "did you mean child()"),
        ("kw.spawn([child()])", "a list of waits"),
        ("plain()", "is not durable"),
    ],
)
def test_what_would_wait_for_nothing_is_refused(value: str, said: str) -> None:
    """§1.3."""
    body = f"from tests.spec.test_semantics import plain\ndef child():\n    yield kw.suspend('c')\ndef main(o):\n    yield {value}\n    yield kw.suspend('end')"
    with pytest.warns(UserWarning, match="not durable"):
        w = run(body)
    assert said in error(w)


def plain() -> Any:
    """A native generator function: this module is not durable."""
    yield 1


def test_a_coroutine_of_asyncio_is_refused_with_what_to_use() -> None:
    """§1.3, §6.2."""
    w = run("import asyncio\ndef main(o):\n    c = asyncio.sleep(0)\n    try:\n        yield c\n    finally:\n        c.close()")
    assert "asyncio" in error(w) and "kw.sleep" in error(w)


def test_yield_from_a_wait_equals_yield_of_it() -> None:
    """§1.4, saved in the middle."""
    w = run("def main(o):\n    a = yield from kw.suspend('a')\n    b = yield from kw.all([kw.suspend('b'), kw.sleep(9)])\n    return [a, b]")
    w.resume("w", "a", 1)
    w.resume("w", "b", 2)
    w.advance(9)
    assert w.result("w") == [1, [2, None]]


def test_combinators_start_every_child_before_they_decide() -> None:
    """§1.5: also those that come after one that has settled already."""
    w = run("""
def at_once(n):
    say(n)
    return n
    yield
def main(o):
    yield kw.all([at_once("many") for _ in range(101)])
    return (yield kw.race([at_once(1), at_once(2), at_once(3)]))
""")
    assert (w.result("w"), w.outputs_to("out")) == (1, [*101 * ["many"], "1", "2", "3"]), "limit nesting_max counts those inside one another"


@pytest.mark.parametrize(("wait", "expected"), [("kw.all([a, b, a])", [1, 2, 1]), ("kw.race([a, a])", 1), ("kw.race([kw.all([a, a]), kw.race([b, a, b])], cancel_rest=False, wait_rest=True)", [1, 1])])
def test_one_wait_may_be_in_a_combinator_several_times(wait: str, expected: Any) -> None:
    """§1.5."""
    w = run(f"def main(o):\n    a, b = kw.suspend('a'), kw.suspend('b')\n    return (yield {wait})")
    w.resume("w", "a", 1)
    w.resume("w", "b", 2)
    assert w.result("w") == expected
    w = run(f"def main(o):\n    a, b = kw.suspend('a'), kw.suspend('b')\n    try:\n        yield {wait}\n    except kw.WorkflowError as error:\n        return error.payload")
    w.resume("w", "a", error="failed")
    w.resume("w", "b", 2)
    assert w.result("w") == "failed"


def test_waiters_go_on_in_the_order_in_which_they_came_and_before_the_losers_clean_up() -> None:
    """§1.5 (in the reference the last goes on first, KW-29)."""
    w = run("""
def waiter(n, x):
    yield x
    say(f"waiter {n}")
def loser():
    try:
        yield kw.suspend("never")
    finally:
        say("loser")
def main(o):
    x = kw.suspend("x")
    tasks = [kw.spawn(waiter(n, x)) for n in range(3)]
    yield kw.race([x, loser()])
    say("main")
    yield kw.all(tasks)
""")
    w.resume("w", "x")
    assert w.outputs_to("out") == ["waiter 0", "waiter 1", "waiter 2", "main", "loser"]


def test_wait_rest_waits_until_the_losers_and_all_below_them_have_ended() -> None:
    """§1.5."""
    w = run("""
def inner():
    try:
        yield kw.suspend("inner")
    finally:
        yield kw.suspend("inner cleanup")
        say("inner ended")
def outer():
    kw.spawn(inner())
    yield kw.suspend("outer")
def main(o):
    yield kw.race([kw.suspend("x"), outer()], wait_rest=True)
    say("main")
""")
    w.resume("w", "x")
    assert w.outputs_to("out") == []
    task = w.header("w")
    assert task is not None
    w.resume("w", "inner")
    w.resume("w", "inner cleanup")
    assert w.outputs_to("out") == ["inner ended", "main"]


@pytest.mark.parametrize(
    ("wait", "answers"),
    [
        ("kw.race([kw.suspend('x'), kw.sleep(60)], wait_rest=True)", ["x"]),
        ("kw.race([ends(), kw.sleep(60)], wait_rest=True)", ["x"]),
        ("kw.timeout(ends(), 60, wait_rest=True)", ["x"]),
        ("kw.race([kw.suspend('x'), kw.suspend('y')], cancel_rest=False, wait_rest=True)", ["x", "y"]),
        ("kw.race([kw.suspend('x'), kw.race([kw.suspend('z'), kw.suspend('y')], cancel_rest=False, wait_rest=True)], cancel_rest=False, wait_rest=True)", ["x", "z", "y"]),
    ],
)
def test_wait_rest_also_notices_the_end_of_losers_that_are_no_tasks(wait: str, answers: list[str]) -> None:
    """§1.5: while another task waited for something else, whoever waited here did so for ever."""
    w = run(f"""
def ends():
    yield kw.suspend("x")
    return "x"
def other():
    yield kw.suspend("never")
def main(o):
    kw.spawn(other())
    return (yield {wait})
""")
    for answer in answers:
        w.resume("w", answer, answer)
    assert w.result("w") == "x"


def test_the_end_of_a_task_looks_once_at_each_wait_that_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """§1.5: with 2,000 of them, each was looked up among all of them, 13 ms at each step."""
    w = run("""
def loser(n):
    try:
        yield kw.suspend(f"never {n}")
    finally:
        yield kw.suspend(f"cleanup {n}")
def joining(n):
    return (yield kw.race([kw.suspend(f"go {n}"), loser(n)], wait_rest=True))
def main(o):
    return (yield kw.all([joining(n) for n in range(40)]))
""")
    for n in range(40):
        w.resume("w", f"go {n}", n)
    compared = []
    monkeypatch.setattr(Race, "__eq__", lambda one, other: compared.append(one) or one is other)
    w.resume("w", "cleanup 39")
    assert 0 < len(compared) <= 40
    for n in range(39):
        w.resume("w", f"cleanup {n}")
    assert w.result("w") == list(range(40))


def test_race_of_a_mapping_tells_a_time_out_from_none() -> None:
    """§1.5."""
    w = run("def main(o):\n    return (yield kw.race({'answer': kw.suspend('a'), 'late': kw.sleep(5)}))")
    w.resume("w", "a", None)
    assert w.result("w") == ["answer", None]


def test_a_childs_error_that_nobody_awaits_is_reported_and_harms_nobody() -> None:
    """§1.7."""
    w = run("def child():\n    yield kw.suspend('c')\n    raise ValueError('lost')\ndef main(o):\n    kw.spawn(child())\n    return (yield kw.suspend('m'))")
    w.resume("w", "c")
    assert any("nobody awaits it" in line and "lost" in line for line in w.logs)
    w.resume("w", "m", 7)
    assert w.result("w") == 7
    w = run("def child():\n    yield kw.suspend('c')\ndef main(o):\n    kw.cancel(kw.spawn(child()))\n    yield kw.suspend('m')")
    assert (w.waits("w"), w.logs) == (["m"], []), "a cancel is no error"


def test_an_error_of_a_class_that_takes_no_attributes_goes_through_tasks_and_waits_as_any_other() -> None:
    """A frozen dataclass refuses even what the interpreter sets: its traceback and its context."""
    w = run("""
import dataclasses
@dataclasses.dataclass(frozen=True)
class Refused(Exception):
    code: int
def one():
    yield kw.suspend("a")
    raise Refused(1)
async def other():
    try:
        await kw.suspend("b")
        raise Refused(2)
    finally:
        await kw.suspend("c")
def main(o):
    try:
        yield one()
    except Refused as first:
        try:
            yield from other()
        except Refused as second:
            yield kw.suspend("d")
            return [first.code, second.code, second.__context__ is first]
""")
    for ref in "abcd":
        w.resume("w", ref)
    assert w.result("w") == [1, 2, True]


def test_the_api_works_in_a_running_step_only() -> None:
    """§1.8: not during an import, not on another thread."""
    with pytest.raises(kw.UsageError, match="inside a running workflow step"):
        kw.suspend()
    found: list[str] = []

    def elsewhere() -> None:
        try:
            kw.output("x", "out")
        except kw.UsageError as refused:
            found.append(str(refused))

    def main(_: object) -> Any:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        yield 1

    native(main)
    assert len(found) == 1


def native(main: Any) -> Any:
    """One step of a workflow that is not saved."""
    context = Context(1000, topics=Topics(declared=frozenset({"out"})), workflows=Workflows({"main": main}, "main"), native=True)
    return step(None, Record("workflow-resume", 0, 0, 1000, b"w", b"new:null"), context)


@pytest.mark.parametrize("name", ["bad \ud800", "cut\0off", 5])
def test_a_header_name_that_no_record_can_bear_is_an_error_at_the_call(name: object) -> None:
    """K11: on Kafka, half a surrogate pair in the name ended the process, and a NUL cut the name off."""
    tester = run(f"def main(opts):\n    kw.output('x', 'out', headers=[({name!r}, 'v')])\n")
    assert error(tester).startswith(f"UsageError: header {name!r}: a name must be UTF-8 text")
    assert tester.values("out") == []


# -- §2 cancelling -------------------------------------------------------------------------------------------------------


def test_cancelling_what_has_settled_does_nothing_and_what_has_not_started_never_runs() -> None:
    """§2.1."""
    w = run("""
def child():
    say("ran")
    yield kw.suspend("c")
def done():
    return 5
    yield
def main(o):
    finished, unstarted = kw.spawn(done()), child()
    kw.cancel(finished)
    kw.cancel(unstarted)
    try:
        yield unstarted
    except kw.Cancelled:
        say("cancelled")
    return (yield finished)
""")
    assert (w.result("w"), w.outputs_to("out")) == (5, ["cancelled"])


def test_a_cancel_of_a_running_task_is_delivered_at_its_next_wait_that_blocks() -> None:
    """§2.1: also a cancel of itself and of its parent. It is recorded, so it is never lost."""
    w = run("""
def child(box):
    kw.cancel(box["self"])
    kw.cancel(box["main"])
    got = yield 3
    say(f"still {got}")
    try:
        yield kw.suspend("c")
    except kw.Cancelled:
        say("child cancelled")
        raise
def body(box):
    yield kw.suspend("gate")
    box["self"] = child(box)
    try:
        yield box["self"]
    except kw.Cancelled:
        say("body cancelled")
    yield kw.suspend("on")
    return "swallowed"
def main(o):
    box = {}
    box["main"] = body(box)
    return (yield box["main"])
""")
    w.resume("w", "gate")
    assert w.outputs_to("out") == ["still 3", "child cancelled", "body cancelled"]
    w.resume("w", "on")
    assert w.result("w") == "swallowed"


def test_a_cancel_that_was_swallowed_is_over_and_a_later_one_interrupts_the_cleanup() -> None:
    """§2.1."""
    w = run("""
def stubborn():
    try:
        yield kw.suspend("a")
    except kw.Cancelled:
        try:
            yield kw.suspend("cleanup")
        except kw.Cancelled:
            say("interrupted")
    return (yield kw.suspend("b"))
def main(o):
    task = kw.spawn(stubborn())
    for _ in range(2):
        yield kw.suspend("again")
        kw.cancel(task)
        kw.cancel(task)
    return (yield task)
""")
    w.resume("w", "again")
    assert w.outputs_to("out") == []
    w.resume("w", "again")
    assert w.outputs_to("out") == ["interrupted"]
    w.resume("w", "b", 9)
    assert w.result("w") == 9


def test_cancelling_a_waiter_cancels_what_it_waits_on_for_all_its_waiters() -> None:
    """§2.2."""
    w = run("""
def waiter(n, x):
    try:
        yield x
    except kw.Cancelled:
        say(n)
def main(o):
    x = kw.suspend("x")
    one, two = kw.spawn(waiter(1, x)), kw.spawn(waiter(2, x))
    kw.cancel(one)
    yield kw.all([one, two])
""")
    assert w.outputs_to("out") == ["1", "2"]
    assert w.result("w") is None


def test_a_timeout_that_is_cancelled_ends_when_what_it_waited_for_has_cleaned_up() -> None:
    """§2.2: its timer is cancelled at once. That is no timeout and decides nothing."""
    w = run("""
def child():
    try:
        yield kw.suspend("never")
    finally:
        yield kw.suspend("clean")
        say("cleaned")
def waiter():
    yield kw.timeout(child(), 60)
def main(o):
    t = kw.spawn(waiter())
    yield kw.suspend("go")
    kw.cancel(t)
    try:
        yield t
    except kw.Cancelled:
        say("cancelled")
""")
    w.resume("w", "go")
    assert (w.outputs_to("workflow-scheduler"), w.waits("w"), w.outputs_to("out")) == (["60000", "0"], ["clean"], [])
    w.resume("w", "clean")
    assert w.outputs_to("out") == ["cleaned", "cancelled"]


def test_a_cancel_reaches_who_waits_for_the_rest_of_a_race_that_is_decided_and_who_waits_for_nothing() -> None:
    """§1.5, §2.2: a result that was decided before does not replace the cancel."""
    w = run("""
def loser():
    try:
        yield kw.suspend("loses")
    finally:
        yield kw.suspend("clean")
def joins():
    say((yield kw.race([kw.suspend("wins"), loser()], wait_rest=True)))
def nothing():
    yield kw.race([])
def main(o):
    tasks = [kw.spawn(joins()), kw.spawn(nothing())]
    yield kw.suspend("go")
    for task in tasks:
        kw.cancel(task)
        try:
            yield task
        except kw.Cancelled:
            say("cancelled")
""")
    w.resume("w", "wins")
    w.resume("w", "go")
    assert (w.waits("w"), w.outputs_to("out")) == ([], ["cancelled", "cancelled"])
    assert w.header("w") is None


def test_except_exception_does_not_see_a_cancel() -> None:
    """§2.3."""
    w = run("""
def child():
    try:
        yield kw.suspend("a")
    except Exception:
        say("wrong")
    except BaseException as e:
        say(type(e).__name__)
        yield kw.suspend("in cleanup")
        say("waited in cleanup")
def main(o):
    task = kw.spawn(child())
    kw.cancel(task)
    yield task
""")
    w.resume("w", "in cleanup")
    assert w.outputs_to("out") == ["Cancelled", "waited in cleanup"]


def test_a_start_while_the_instance_is_closing_is_a_duplicate_and_there_is_one_result() -> None:
    """§2.4."""
    w = run("""
def child():
    try:
        yield kw.suspend("c")
    finally:
        yield kw.suspend("cleanup")
def main(o):
    kw.spawn(child())
    return "done"
    yield
""")
    assert w.header("w")["status"] == "closing"  # type: ignore[index]
    w.start("w")
    assert w.counts[-1] == "duplicate-start"
    w.resume("w", "cleanup")
    assert w.header("w") is None
    assert w.values("workflow-result") == ["done"]


@pytest.mark.parametrize("swallow", ["except BaseException:\n        yield kw.suspend('undo')", "finally:\n        return 5"])
def test_a_keyboard_interrupt_aborts_the_step_even_if_author_code_swallowed_it(swallow: str) -> None:
    """§2.5."""
    source = load(f"def main(o):\n    try:\n        yield 1\n        raise KeyboardInterrupt\n    {swallow}")
    with pytest.raises(KeyboardInterrupt):
        native(source.main)


@pytest.mark.parametrize("where", ["def main(o):\n    raise {}", "def main(o):\n    yield 1\n    raise {}", "def no(value):\n    raise {}\ndef main(o):\n    yield kw.on_update('u', no)"])
@pytest.mark.parametrize("error", ["MemoryError", "StepTimeout", "KwflowBug"])
def test_what_is_no_outcome_of_author_code_parks_the_instance_wherever_it_comes_up(error: str, where: str) -> None:
    """§2.5, G4: in a generator, a plain function or a validator."""
    w = run("from kwflow.errors import KwflowBug, StepTimeout\n" + where.format(error))
    if "on_update" in where:
        w.command("w", "update", {"name": "u"})
    assert ((w.header("w") or {})["parked"]["reason"], w.values("workflow-error")) == (error, [])


def test_at_the_end_of_main_what_is_shielded_goes_on_and_who_waits_for_it_is_cancelled_then() -> None:
    """§1.6, §2.4."""
    w = run("""
def work():
    yield kw.suspend("work")
    say("worked")
def waiter():
    try:
        yield kw.shield(work())
    except kw.Cancelled:
        say("cancelled")
def main(o):
    kw.spawn(waiter())
    return "early"
    yield
""")
    assert (w.result("w"), w.waits("w"), w.outputs_to("out")) == ("early", ["work"], [])
    w.resume("w", "work")
    assert (w.outputs_to("out"), w.header("w")) == (["worked", "cancelled"], None)


# -- §3 running again, forgetting ------------------------------------------------------------------------------------------


def test_lines_of_kw_log_are_carried_in_the_transition() -> None:
    """§3.1: the runner writes them after the commit."""

    def main(_: object) -> Any:
        kw.log("booked", 3)
        yield 1

    assert native(main).logs == ("booked 3",)


def test_collecting_garbage_is_off_in_a_step_and_on_again_after_it() -> None:
    """§3.3: a collection could run another workflow's `finally` inside this step."""
    found: list[bool] = []

    def main(_: object) -> Any:
        found.append(gc.isenabled())
        yield 1

    native(main)
    assert (found, gc.isenabled()) == ([False], True)


def test_a_cycle_that_is_dropped_in_another_instances_step_runs_nothing() -> None:
    """§3.3, G8."""
    module = load("""
kept = []
def main(o):
    box = []
    def child():
        try:
            yield kw.suspend("c")
        finally:
            kept.append("cleanup of another")
    box.append(child())
    kw.spawn(box[0])
    yield kw.suspend("m")
""")
    tester = WorkflowTester(module.main)
    tester.globals_check.active = False
    before = durable.set_abandoning(True)  # as in an engine
    try:
        tester.start("one")
        tester.start("two")
        gc.collect()
        tester.resume("two", "m")
        gc.collect()
    finally:
        durable.set_abandoning(before)
    assert module.kept == ["cleanup of another"]  # two's own child, cancelled when two ended, and nothing that was dropped


def test_the_test_kit_fails_a_step_that_changed_a_module_global() -> None:
    """§3.4: globals are neither saved nor rolled back, so a workflow that counts in one counts wrongly."""
    counting = "COUNT = 0\nSEEN = {'ids': []}\ndef main(o):\n    yield kw.suspend('a')\n"
    with pytest.raises(AssertionError, match=r"semantics_\d+\.COUNT"):
        run(counting + "    global COUNT\n    COUNT += 1").resume("w", "a")
    with pytest.raises(AssertionError, match=r"semantics_\d+\.SEEN"):
        run(counting + "    SEEN['ids'].append(kw.workflow_id())").resume("w", "a")
    run(counting + "    dict(SEEN)").resume("w", "a")
    with pytest.raises(AssertionError, match=r"semantics_\d+\.NAN"):
        run("NAN = float('nan')\ndef main(o):\n    global NAN\n    NAN = float('nan')\n    yield kw.suspend('a')\n")


def test_the_test_kit_takes_a_nan_and_a_module_that_a_step_imports_for_no_change(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """§3.4: neither is state of a workflow."""
    package = "semantics_package"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("from math import nan\nNOTHING = [nan]\n")
    (tmp_path / package / "flow.py").write_text("import kwflow as kw\ndef main(o):\n    from . import models\n    yield kw.suspend('a')\n    return models.RATE\n")
    (tmp_path / package / "models.py").write_text("RATE = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    durable.install([package])
    w = WorkflowTester(importlib.import_module(f"{package}.flow").main)
    w.start("w")
    w.resume("w", "a")
    assert w.result("w") == 4


@pytest.mark.skipif((3, 13) <= sys.version_info < (3, 13, 6), reason="NOT TESTED: this Python crashes on frames that outlive their generators (gh-125723)")
def test_what_is_forgotten_lets_its_variables_go_also_when_its_frame_is_held() -> None:
    """§3.3: a context manager may keep the frame that entered it (`sys._getframe`), and a traceback keeps those that it passed through."""
    made = load("class Held:\n    pass\ndef gen():\n    held = Held()\n    yield held\n").gen()
    held = weakref.ref(next(made))
    frame = made.gi_frame
    durable.discard(made)
    assert held() is None
    assert frame.f_locals == {}


# -- §4 what a snapshot promises -------------------------------------------------------------------------------------------


def test_a_global_object_is_the_same_one_after_a_restore_and_a_container_a_copy() -> None:
    """§4.3."""
    w = run("""
class Client:
    def __init__(self):
        self.lock = open(__file__) if False else object()
CLIENT, LIMITS = Client(), [1, 2]
def main(o):
    client, limits = CLIENT, LIMITS
    yield kw.suspend("a")
    return [client is CLIENT, limits is LIMITS, limits]
""")
    w.resume("w", "a")
    assert w.result("w") == [True, False, [1, 2]]


def test_whatever_kw_has_is_held_over_a_wait_also_what_is_called_with_the_value_of_one() -> None:
    """§4: a call with a wait among its arguments holds the function meanwhile. Types for annotations are excepted."""
    w = run("""
def main(o):
    held = {name: getattr(kw, name) for name in kw.__all__ if name not in ("Gen", "Wait")}
    yield kw.sleep((yield kw.suspend("s")))
    return [name for name in held if held[name] is not getattr(kw, name)]
""")
    assert w.waits("w") == ["s"], w.logs
    w.resume("w", "s", 5)
    w.advance(5)
    assert w.result("w") == []


def test_a_pure_function_of_the_standard_library_is_called_with_the_value_of_a_wait() -> None:
    """docs/LOCALS.md."""
    w = run("""
import dataclasses, json, math
@dataclasses.dataclass(frozen=True)
class Order:
    status: str
    items: int
def main(o):
    order = dataclasses.replace(Order("new", math.ceil((yield kw.suspend("a")))), status=(yield kw.suspend("b")))
    return json.loads(json.dumps(dataclasses.asdict((yield order))))
""")
    w.resume("w", "a", 1.5)
    w.resume("w", "b", "paid")
    assert w.result("w") == {"status": "paid", "items": 2}


def test_an_assert_with_a_yield_is_kept_when_python_optimizes() -> None:
    """§4.2: durable modules are compiled with optimize=0."""
    script = """
from kwflow import durable
g = durable.load_source("m", "def g():\\n    assert (yield 1)\\n    yield 2\\n").g()
next(g)
try:
    g.send(0)
except AssertionError:
    print("asserted")
"""
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "asserted\n"


def test_the_header_alone_tells_where_an_instance_waits_relative_to_its_module() -> None:
    """§4.4."""
    w = run("def main(o):\n    yield kw.suspend('a')")
    stored = w.state.get(b"w")
    assert stored is not None
    [wait] = snapshot.read_header(stored)["waits"]
    assert (wait["ref"], wait["function"], wait["file"], wait["line"]) == ("a", "main", f"semantics_{_count[0]}.py", 6)


# -- §9 time, ids, wire ------------------------------------------------------------------------------------------------------


def test_now_is_aware_utc_and_never_goes_back() -> None:
    """§9.1: the later of the record's timestamp and the instance's last one."""
    w = run("""
def main(o):
    times = []
    while len(times) < 3:
        times.append(kw.now())
        yield kw.suspend("a")
    return [times[0].tzinfo is not None, [t.timestamp() for t in times]]
""")
    begun = w.now_ms
    w.now_ms -= 5000
    w.resume("w", "a")
    w.now_ms += 9000
    w.resume("w", "a")
    w.resume("w", "a")
    assert w.result("w") == [True, [begun / 1000, begun / 1000, (begun + 4000) / 1000]]
    assert datetime.fromtimestamp(begun / 1000, UTC)


def test_an_engine_id_is_not_given_twice() -> None:
    """§9.2, decision 0064: offsets start again when a topic is recreated."""
    module = load("def main(o):\n    a = kw.suspend()\n    yield kw.suspend('go')\n    b = kw.suspend()\n    yield kw.all([a, b])")
    context = Context(1000, "first", Topics(), workflows=Workflows({"main": module.main}, "main"))
    made = step(None, Record("workflow-resume", 0, 0, 1, b"w", b"new:null"), context)
    again = Context(1000, "recreated", Topics(), workflows=context.workflows)
    made = step(made.state.instance, Record("workflow-resume", 0, 0, 2, b"w", b'{"ref":"go"}'), again)  # type: ignore[union-attr]
    assert list(made.state.instance.waits) == ["0:1", "0:1000001"]  # type: ignore[union-attr]


def test_a_tombstone_and_bytes_are_outputs_and_anything_else_names_output_json() -> None:
    """§9.5, KW-21."""
    w = run("def main(o):\n    kw.output(None, 'out')\n    kw.output(b'raw', 'out', key='k')\n    kw.output_json({'b': 1, 'a': [1, 2]}, 'out')\n    yield kw.suspend('x')")
    assert w.outputs_to("out") == [None, "raw", '{"b":1,"a":[1,2]}']
    assert [output.key for output in w.outputs if output.topic == "out"] == [b"w", b"k", b"w"]
