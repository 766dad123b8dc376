"""Rules of the core, each through real snapshots: combinators, cancelling, ids, errors and ends (semantics §1, §2, §9)."""

from typing import Any

import pytest

from kwflow import durable
from kwflow.core.wire import Output
from kwflow.testing import WorkflowTester

HEAD = "import kwflow as kw\nkw.declare_topics('out')\ndef say(x):\n    kw.output(str(x), 'out')\n"
_count = [0]


def run(body: str, options: Any = None) -> WorkflowTester:
    """A started tester for a module with this text."""
    _count[0] += 1
    module = durable.load_source(f"core_case_{_count[0]}", HEAD + body, f"core_case_{_count[0]}.py")
    tester = WorkflowTester(module.main)
    tester.start("w", options)
    return tester


def error(tester: WorkflowTester) -> Any:
    return tester.values("workflow-error")[-1]


def test_a_value_that_is_no_wait_comes_back_in_the_same_step() -> None:
    """KW-28, KW-30, semantics §1.3."""
    assert run("def main(o):\n    a = yield 1\n    b = yield 'x'\n    return [a, b, o]", 5).result("w") == [1, "x", 5]


def test_an_answer_that_comes_before_the_yield_is_kept() -> None:
    """KW-18."""
    w = run("def main(o):\n    early = kw.suspend('early')\n    yield kw.suspend('gate')\n    return (yield early)")
    w.resume("w", "early", "kept")
    w.resume("w", "gate")
    assert w.result("w") == "kept"


def test_an_error_answer_is_raised_as_workflow_error_and_its_payload_is_the_error_record() -> None:
    """KW-23, KW-24."""
    w = run("def main(o):\n    yield kw.suspend('r')")
    w.resume("w", "r", error={"code": 7})
    assert error(w) == {"code": 7}


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        ("ValueError('bad')", "ValueError: bad"), ("KeyError", "KeyError"), ("SystemExit(3)", "SystemExit: 3"), ("kw.Cancelled()", "CancelToken"),
        ("Mute()", "Mute: <no message: __str__ failed>"), ("kw.WorkflowError(len)", "WorkflowError: <built-in function len>"),
    ],
)  # fmt: skip
def test_an_uncaught_error_is_type_and_message(raised: str, text: str) -> None:
    """KW-24, semantics §9.4."""
    mute = "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n"
    assert error(run(mute + f"def main(o):\n    yield 1\n    raise {raised}")) == text
    assert error(run(mute + f"def main(o):\n    raise {raised}")) == text, "a plain function"


def test_all_gives_results_in_input_order_and_a_mapping_a_dict() -> None:
    w = run("def main(o):\n    a, b = kw.suspend('a'), kw.suspend('b')\n    return (yield kw.all({'a': a, 'b': b, 'c': 3}))")
    w.resume("w", "b", 2)
    w.resume("w", "a", 1)
    assert w.result("w") == {"a": 1, "b": 2, "c": 3}


def test_the_first_error_of_all_wins_and_the_rest_are_cancelled_after_the_waiter_went_on() -> None:
    """Semantics §1.5."""
    w = run("""
def child(name):
    try:
        yield kw.suspend(name)
    except kw.Cancelled:
        say(name + " cancelled")
        raise
def main(o):
    try:
        yield kw.all([child("a"), child("b"), child("c")])
    except kw.WorkflowError as e:
        say("caught " + e.payload)
    yield kw.suspend("end")
""")
    w.resume("w", "b", error="boom")
    assert w.outputs_to("out") == ["caught boom", "a cancelled", "c cancelled"]
    assert w.waits("w") == ["end"]


def test_race_takes_the_first_settled_and_cancel_rest_false_lets_the_others_run() -> None:
    """KW-33."""
    w = run("def main(o):\n    slow = kw.suspend('slow')\n    first = yield kw.race([slow, kw.suspend('quick')], cancel_rest=False)\n    return [first, (yield slow)]")
    w.resume("w", "quick", "q")
    w.resume("w", "slow", "s")
    assert w.result("w") == ["q", "s"]


def test_timeout_raises_timeout_error_and_cancels() -> None:
    """Semantics §1.6."""
    w = run("def main(o):\n    try:\n        yield kw.timeout(kw.suspend('r'), 5)\n    except TimeoutError:\n        return 'late'")
    w.advance(5)
    assert w.result("w") == "late"


def test_a_sleep_that_is_left_is_cancelled_at_the_scheduler() -> None:
    w = run("def main(o):\n    yield kw.race([kw.sleep(60), kw.suspend('r')])\n    yield kw.suspend('end')")
    w.resume("w", "r")
    assert [(o.key, o.value) for o in w.outputs if o.topic == "workflow-scheduler"] == [(b'w|{"ref":"0:1"}', b"60000"), (b'w|{"ref":"0:1"}', b"0")]


def test_a_shielded_wait_ends_before_the_cancel_is_raised() -> None:
    """Semantics §1.6."""
    w = run("""
def worker():
    try:
        yield kw.shield(kw.suspend("work"))
        say("not here")
    except kw.Cancelled:
        say("cancelled after the work")
def main(o):
    t = kw.spawn(worker())
    yield kw.suspend("go")
    kw.cancel(t)
    yield t
    return "done"
""")
    w.resume("w", "go")
    assert w.outputs_to("out") == []
    w.resume("w", "work")
    assert w.outputs_to("out") == ["cancelled after the work"]
    assert w.result("w") == "done"


def test_when_main_ends_the_other_tasks_are_cancelled_and_the_instance_closes_when_they_have_ended() -> None:
    """KW-26, semantics §2.4."""
    w = run("""
def helper():
    try:
        yield kw.suspend("never")
    finally:
        yield kw.suspend("cleanup")
        say("cleaned")
def main(o):
    kw.spawn(helper())
    return "early"
""")
    assert w.result("w") == "early"
    assert (w.header("w") or {})["status"] == "closing"
    w.start("w")
    assert w.counts[-1] == "duplicate-start"
    w.resume("w", "cleanup")
    assert w.outputs_to("out") == ["cleaned"]
    assert w.header("w") is None
    assert len(w.values("workflow-result")) == 1


@pytest.mark.parametrize("undo", ["release()", "kw.all([release(), kw.sleep(5)])", "kw.timeout(kw.spawn(release()), 60)"])
def test_the_end_of_main_leaves_alone_what_a_cleanup_that_runs_waits_for(undo: str) -> None:
    """Semantics §2.4: each task is cancelled once, so the end of main must not reach a cleanup through the tasks that it waits for."""
    w = run(f"""
def release():
    yield kw.suspend("released")
    say("released")
def booked():
    try:
        yield kw.suspend("never")
    finally:
        yield {undo}
        say("cleaned")
def main(o):
    try:
        yield kw.timeout(booked(), 60)
    except TimeoutError:
        yield kw.suspend("told")
        return "late"
""")
    w.advance(60)
    w.resume("w", "told")
    assert (w.result("w"), (w.header("w") or {})["status"]) == ("late", "closing")
    w.resume("w", "released")
    w.advance(60)
    assert w.outputs_to("out") == ["released", "cleaned"]
    assert w.header("w") is None


@pytest.mark.parametrize("undo", ["release()", "kw.shield(release())"])
def test_the_end_of_main_leaves_alone_the_rest_that_a_decided_wait_of_a_cleanup_waits_for(undo: str) -> None:
    """Semantics §2.4: with `wait_rest`, the cleanup waits for the whole rest, also for what is no task."""
    w = run(f"""
def release():
    yield kw.race([kw.suspend("released"), kw.sleep(50)], cancel_rest=False, wait_rest=True)
    say("released")
def booked():
    try:
        yield kw.suspend("never")
    finally:
        yield {undo}
def main(o):
    task = kw.spawn(booked())
    kw.cancel(task)
    kw.sleep(70)
    yield kw.suspend("end")
""")
    w.resume("w", "released")
    w.resume("w", "end")
    assert w.waits("w") == ["0:2"], "the timer that nobody waits for is cancelled"
    w.advance(49)
    assert (w.outputs_to("out"), w.header("w")["status"]) == ([], "closing")
    w.advance(1)
    assert (w.outputs_to("out"), w.header("w")) == (["released"], None)


def test_a_timeout_may_wait_until_what_it_cancelled_has_cleaned_up() -> None:
    w = run("""
def booked():
    try:
        yield kw.suspend("never")
    finally:
        yield kw.suspend("released")
        say("released")
def main(o):
    try:
        yield kw.timeout(booked(), 60, wait_rest=True)
    except TimeoutError:
        say("late")
""")
    w.advance(60)
    assert w.outputs_to("out") == []
    w.resume("w", "released")
    assert w.outputs_to("out") == ["released", "late"]
    assert w.header("w") is None


def test_a_workflow_with_nothing_left_to_wait_for_ends_with_an_error() -> None:
    """G9, KW-27."""
    w = run("""
def one(box):
    yield kw.suspend("go")
    yield box["two"]
def two(box):
    yield kw.suspend("go too")
    yield box["one"]
def main(o):
    box = {}
    box["one"], box["two"] = kw.spawn(one(box)), kw.spawn(two(box))
    try:
        yield box["one"]
    finally:
        say("cleanup runs")
""")
    w.resume("w", "go")
    w.resume("w", "go too")
    assert error(w).startswith("StuckError")
    assert w.outputs_to("out") == ["cleanup runs"]
    assert w.header("w") is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("yield kw.all(undo)", "did you mean undo()"),
        ("yield kw.all([undo])", "did you mean undo()"),
        ("yield [kw.suspend()]", "kw.all(...)"),
        ("yield kw.all(kw.suspend())", "not one wait"),
        ("yield kw.race(kw.suspend('a'), kw.suspend('b'))", "one list of waits; did you mean [...] around them?"),
        ("kw.suspend('1:1')", "reserved"),
        ("kw.suspend('x'), kw.suspend('x')", "already pending"),
        ("kw.output(5, 'out')", "kw.output_json"),
        ("kw.set_status([undo])", "an object of class function has no JSON form; pass its values"),
        ("return {'undo': object()}", "an object of class object has no JSON form; pass its values"),
        ("kw.declare_topics('late')", "module level"),
        ("kw.cancel(5)", "not a wait"),
        ("kw.suspend(5)", "a ref id must be a non-empty str, not 5"),
        ("kw.suspend('')", "a ref id must be a non-empty str, not ''"),
        ("kw.spawn(5)", "kw.spawn takes a call of a durable generator function, not 5"),
        ("kw.spawn(kw.sleep(5))", "<timer 0:1 pending>; it has already started: keep it in a variable"),
        ("return {'undo': undo()}", "the generator undo has no JSON form, as nobody has waited for it; write `yield` or `await` before its call"),
        ("return {'end': kw.sleep(5)}", "<timer 0:1 pending> has no JSON form, as nobody has waited for it"),
        ("kw.set_status(kw.all([kw.sleep(5)]))", "has no JSON form, as nobody has waited for it"),
        ("kw.race('ab')", "a list or mapping of waits, not 'ab'"),
        ("kw.all(5)", "a list or mapping of waits, not 5"),
        ("g = undo(); next(g); yield g", "undo has already run outside the engine"),
        ("g = undo(); list(g); yield g", "undo has already run outside the engine"),
        ("yield asyncs().__anext__()", "write `await` before it"),
        ("kw.output('x', 'out', key=5)", "a record key must be str or bytes, not int"),
        ("kw.output('x', 'out', headers={'a': 5})", "header 'a' must be str, bytes or None, not int"),
        ("kw.output('x', 'out', headers={'a': chr(0xd800)})", "header 'a': its text cannot be encoded as UTF-8; pass bytes"),
        ("kw.output('x', 'out', headers=5)", "headers must be a mapping, or pairs of a name and a value, not 5"),
        ("kw.output('x', 'out', headers=['a'])", "headers must be a mapping, or pairs of a name and a value, not ['a']"),
        ("kw.output('x', 'out', headers={'kwflow-id': 'a'})", "'kwflow-id': kwflow-* headers belong to the engine"),
        ("kw.output('x', 'workflow-resume', headers={'kwflow-parent': 'a'})", "'kwflow-parent': kwflow-* headers belong to the engine"),
        ("kw.sleep('soon')", "timedelta"),
        ("kw.timeout(kw.suspend(), 316224000.001)", "at most ten years"),
        ("kw.output('x', 'out', timestamp_ms=10 ** 15)", "an hour ahead"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_with_what_was_meant(line: str, said: str) -> None:
    """KW-20, semantics §1.3, §1.8, §9."""
    assert said in error(run(f"def undo():\n    yield\nasync def asyncs():\n    yield 1\ndef main(o):\n    {line}\n    yield kw.suspend('end')"))


def test_closures_cells_and_exceptions_survive_every_step() -> None:
    w = run("""
def main(o):
    total = 0
    def add(n):
        nonlocal total
        total += n
        return total
    undo = [lambda: add(-1)]
    try:
        add((yield kw.suspend("a")))
        raise ValueError("held")
    except ValueError as e:
        add((yield kw.suspend("b")))
        text = str(e)
    undo[0]()
    for n in range(2):
        add((yield kw.suspend(f"c{n}")))
    return [total, text]
""")
    for ref, value in (("a", 1), ("b", 10), ("c0", 100), ("c1", 1000)):
        w.resume("w", ref, value)
    assert w.result("w") == [1110, "held"]


def test_headers_travel_except_ours_and_a_result_names_its_start() -> None:
    """KW-10, semantics §9.3."""
    w = run("def main(o):\n    yield kw.suspend('r')\n    say('x')")
    w.send("w", b'{"ref":"r"}', {"trace": "7", "kwflow-x": "no"})
    headers = dict(next(o for o in w.outputs if o.topic == "out").headers)
    assert headers == {"trace": b"7"}


def test_headers_are_read_where_they_arrive() -> None:
    """semantics §9.3: the headers of the record that started this step, as text. A timer carries those of the step that set it."""
    w = run("def main(o):\n    first = kw.headers()\n    yield kw.sleep(1)\n    again = kw.headers()\n    yield kw.suspend('r')\n    return [first, again, kw.headers()]")
    w._log(Output(w.config.resume_topic, b"x", b"new:1", (("a", b"1"), ("a", b"2"), ("b", b"\xff"), ("c", None), ("kwflow-x", b"no")), w.now_ms))
    w.advance(1)
    w.resume("x", "r")
    assert w.result("x") == [{"a": "2", "b": "\\xff", "c": None}] * 2 + [{}]


def test_damaged_bytes_park_only_that_instance() -> None:
    w = run("def main(o):\n    yield kw.suspend('r')")
    w.start("x")
    w.state.entries[b"w"] = w.state.entries[b"w"][:-1] + b"?"
    w.resume("w", "r")
    assert (w.header("w") or {})["parked"]["reason"] == "CorruptSnapshotError"
    w.resume("x", "r")
    assert w.header("x") is None




def test_a_start_of_a_running_id_begins_anew_only_where_restart_is_declared() -> None:
    """G5, KW-6: the old run is terminated, its timers are cancelled, and its cleanup does not run."""
    source = HEAD + '''
@kw.workflow(name="restarting", restart=True)
def main(o):
    try:
        yield kw.race([kw.suspend("r"), kw.sleep(60)])
    finally:
        say(f"ended {o}")
    return o
'''
    module = durable.load_source("restarting", source, "restarting.py")
    w = WorkflowTester(module.main)
    w.start("w", 1)
    w.start("w", 2)
    assert (w.values("workflow-error"), w.outputs_to("out"), w.counts[-3:]) == (["Terminated: restarted"], [], ["restarted", "timer", "timer"])
    w.resume("w", "r")
    assert (w.result("w"), w.outputs_to("out")) == (2, ["ended 2"])
    w.advance(60)
    assert "unknown-id" not in w.counts  # the first run's timer was cancelled
    w.start("v", 3, **{"kwflow-start-id": "once"})
    w.start("v", 3, **{"kwflow-start-id": "once"})
    assert w.counts[-1] == "duplicate-start"


def test_a_timer_that_could_not_be_asked_for_is_not_waited_for() -> None:
    """G9: a wait that can never be answered would keep the workflow for ever."""
    w = run("def main(o):\n    for _ in range(10_000):\n        kw.output('x', 'out')\n    try:\n        kw.sleep(1)\n    except kw.UsageError:\n        pass\n    yield kw.all([kw.suspend('r')])")
    assert w.waits("w") == ["r"]


def test_the_longest_sleep_is_taken_by_the_scheduler() -> None:
    """SC-1: a delay that the scheduler refuses is a dead letter, and its workflow would wait for ever."""
    w = run("def main(o):\n    yield kw.sleep(316224000)\n    return 'awake'")
    w.advance(316224000)
    assert w.result("w") == "awake" and w.outputs_to(w.config.dead_letter_topic) == []


def test_a_wait_below_thousands_of_combinators_is_saved() -> None:
    """G4: to find its task, whose line is in the header, the search goes up a limited number of levels."""
    w = run("""
def main(o):
    wait = kw.suspend("r")
    for _ in range(5000):
        wait = kw.all([wait])
    found = yield wait
    while isinstance(found, list):
        [found] = found
    return found
""")
    w.resume("w", "r", 7)
    assert w.result("w") == 7
