"""`kw.wait_condition` (decision 0067): waiting for what other tasks of the same workflow do.  Each through real snapshots."""

from typing import Any

import pytest

from kwflow.testing import WorkflowTester
from tests.spec.test_messages import run


def error(w: WorkflowTester) -> str:
    [told] = w.values("workflow-error")
    return str(told)


def waits(w: WorkflowTester) -> list[Any]:
    return [(wait["kind"], wait["function"], wait["line"]) for wait in (w.header("w") or {})["waits"] if wait["kind"] == "condition"]


def test_a_condition_is_met_by_what_another_task_does_in_the_same_step() -> None:
    w = run("""
def fill(box):
    box.append((yield kw.wait_signal('put')))
    say('filled')
def main(o):
    box = []
    kw.spawn(fill(box))
    found = yield kw.wait_condition(lambda: box and box[0])
    return found""")
    assert [kind for kind, *_ in waits(w)] == ["condition"] and waits(w)[0][1] == "main"
    w.signal("w", "put", {"n": 7})
    assert (w.outputs_to("out"), w.result("w")) == (["filled"], {"n": 7}), "the value of the function is that of the wait"


def test_a_condition_that_is_met_already_waits_for_its_turn_and_for_no_record() -> None:
    w = run("""
def other():
    say('other')
    yield kw.suspend('never')
def main(o):
    condition = kw.wait_condition(lambda: True)
    kw.spawn(other())
    yield condition
    say('main')
    yield kw.suspend('r')""")
    assert w.outputs_to("out") == ["other", "main"]


def test_one_goes_on_at_a_time_in_the_order_in_which_they_were_made_so_that_nobody_takes_what_is_gone() -> None:
    """Also those that ask again at once come behind those that have waited."""
    w = run("""
def one(name, slots):
    for _ in range(2):
        yield kw.wait_condition(lambda: slots[0] > 0)
        slots[0] -= 1
        say(f'{name} has it, {slots[0]} left')
        try:
            yield kw.wait_signal('next')
        finally:
            slots[0] += 1
def main(o):
    slots = [2]
    yield kw.all([one(name, slots) for name in 'abc'])
    return slots""")
    for _ in range(6):
        w.signal("w", "next")
    assert [said[0] for said in w.outputs_to("out")] == ["a", "b", "c", "a", "b", "c"]
    assert {said[-6] for said in w.outputs_to("out")} <= {"1", "0"} and w.result("w") == [2]


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("kw.wait_condition(lambda: 1 / 0)", "ZeroDivisionError: division by zero"),
        ("kw.wait_condition(lambda: kw.now())", "UsageError: kw.* functions work only inside a running workflow step, not in the function of a kw.wait_condition"),
        ("kw.wait_condition(lambda: asked())", "UsageError: the function of a kw.wait_condition must be a plain one"),
        ("kw.wait_condition(asked)", "UsageError: kw.wait_condition takes a plain function that returns whether the condition is met, such as `lambda: done`, not <function asked"),
        ("kw.wait_condition(True)", "UsageError: kw.wait_condition takes a plain function that returns whether the condition is met, such as `lambda: done`, not True"),
        ("kw.wait_condition(lambda: False)", "StuckError: the workflow is stuck: nothing can wake it any more"),
        ("kw.all([kw.wait_condition(lambda: []), kw.wait_condition(lambda: None)])", "StuckError: the workflow is stuck: nothing can wake it any more"),
    ],
)
def test_a_condition_that_nothing_can_meet_or_that_fails_is_an_error_at_the_wait(condition: str, said: str) -> None:
    """G9."""
    w = run(f"def asked():\n    return (yield kw.suspend('r'))\ndef main(o):\n    try:\n        yield {condition}\n    finally:\n        say('cleanup')")
    assert error(w).startswith(said)
    assert w.outputs_to("out") == ["cleanup"]


def test_the_function_is_called_when_all_tasks_wait_again_and_at_no_other_time() -> None:
    w = run("""
def main(o):
    n, asked = [0], []
    def met():
        asked.append(n[0])
        return n[0] == 2
    def counting():
        while True:
            yield kw.wait_signal('more')
            n[0] += 1
    kw.spawn(counting())
    yield kw.wait_condition(met)
    return asked""")
    w.advance(1000)
    w.signal("w", "more")
    w.signal("w", "more")
    assert w.result("w") == [0, 1, 2]


def test_what_loses_a_race_is_not_asked_any_more_and_a_deadline_is_a_timeout() -> None:
    w = run("""
def main(o):
    n = []
    found = yield kw.race({'met': kw.wait_condition(lambda: n.append(1) or len(n) > 5), 'go': kw.wait_signal('go')})
    before = len(n)
    yield kw.wait_signal('again')
    yield kw.wait_signal('again')
    try:
        yield kw.timeout(kw.wait_condition(lambda: False), 60)
    except TimeoutError:
        return [found[0], len(n) - before]""")
    for name in ("go", "again", "again"):
        w.signal("w", name)
    assert len(waits(w)) == 1
    w.advance(60)
    assert w.result("w") == ["go", 0]


def test_a_condition_that_did_not_decide_a_race_is_asked_while_the_race_waits_for_the_rest() -> None:
    """Semantics §1.5."""
    w = run("""
def main(o):
    seen = []
    def other():
        seen.append((yield kw.suspend('x')))
        yield kw.suspend('y')
    kw.spawn(other())
    condition = kw.wait_condition(lambda: seen and seen[0])
    first = yield kw.race([kw.suspend('a'), condition], cancel_rest=False, wait_rest=True)
    return [first, (yield condition)]""")
    w.resume("w", "a", 1)
    w.resume("w", "x", 2)
    assert w.result("w") == [1, 2]


def test_a_cancel_ends_the_wait_and_what_has_ended_waits_for_no_condition() -> None:
    """Semantics 2.4: an instance that only its own tasks could wake, of which none can go on, is forgotten."""
    w = run("""
def guarded():
    try:
        yield kw.wait_condition(lambda: False)
    finally:
        say('cleaned')
        yield kw.wait_condition(lambda: False)
def main(o):
    kw.spawn(guarded())
    yield kw.wait_signal('end')""")
    w.signal("w", "end")
    assert w.outputs_to("out") == ["cleaned"] and w.header("w") is None and w.values("workflow-result") == [None]
    assert "guarded was forgotten" in " ".join(w.logs)


def test_a_record_for_its_ref_does_not_meet_a_condition() -> None:
    w = run("def main(o):\n    yield kw.race([kw.wait_condition(lambda: False), kw.wait_signal('end')])")
    [ref] = [wait["ref"] for wait in (w.header("w") or {})["waits"] if wait["kind"] == "condition"]
    w.resume("w", ref, 1)
    assert len(waits(w)) == 1


def test_a_fork_and_a_workflow_that_goes_back_have_conditions_of_their_own() -> None:
    w = run("""
@kw.workflow(checkpoints=10)
def main(o):
    n = []
    def fill():
        while True:
            n.append((yield kw.wait_signal('n')))
    kw.spawn(fill())
    yield kw.wait_condition(lambda: len(n) == 2)
    return n""")
    w.signal("w", "n", 1)
    w.command("w", "fork", {"id": "copy"})
    assert w.command("w", "rewind", {"to": 0})["status"] == "ok"
    w.signal("copy", "n", 2)
    assert w.result("copy") == [1, 2]
    w.signal("w", "n", 3)
    w.signal("w", "n", 4)
    assert w.result("w") == [3, 4]


def test_a_semaphore_is_a_class_of_five_lines() -> None:
    w = run("""
class Slots:
    def __init__(self, free):
        self.free = free
    async def __aenter__(self):
        await kw.wait_condition(lambda: self.free)
        self.free -= 1
    async def __aexit__(self, *error):
        self.free += 1
async def one(slots, n):
    async with slots:
        say(f'{n} of {slots.free}')
        await kw.suspend(f'r{n}')
async def main(o):
    slots = Slots(2)
    await kw.all([one(slots, n) for n in range(4)])
    return slots.free""")
    for n in range(4):
        assert len(w.outputs_to("out")) == min(4, n + 2)
        w.resume("w", f"r{n}")
    assert w.result("w") == 2
