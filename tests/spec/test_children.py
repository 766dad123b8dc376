"""Children (M5): start, outcome, refusal and policies, each through real snapshots."""

from typing import Any

import pytest

from kwflow.testing import WorkflowTester
from tests.spec.test_messages import run, status

CHILD = """
def double(n):
    if n == "wait":
        try:
            n = yield kw.suspend("n")
        except kw.Cancelled:
            say("child cancelled")
            raise
    if n == "fail":
        raise ValueError("no number")
    yield kw.sleep(1)
    return 2 * n
"""
ASK = CHILD + """
def main(o):
    try:
        return (yield kw.start_child("double", o, id="c"))
    except kw.ChildError as e:
        return [e.id, e.outcome, e.error, str(e)]
"""


def headers(w: WorkflowTester, op: str) -> list[dict[str, Any]]:
    """The headers of every command with this op that was written."""
    return [dict(output.headers) for output in w.outputs if dict(output.headers).get("kwflow-op") == op.encode()]


def test_a_child_is_a_workflow_of_its_own_whose_result_the_yield_gives() -> None:
    """M5."""
    w = run(ASK, 21)
    assert [(wait["kind"], wait["child"], wait["workflow"]) for wait in (w.header("w") or {})["waits"]] == [("child", "c", "double")]
    assert ((w.header("c") or {})["parent"], (w.header("c") or {})["start_id"]) == ("w|0:1", "w|0:1")
    w.advance(1)
    assert w.result("w") == w.result("c") == 42


def test_the_default_id_is_the_parents_and_the_ref_and_a_function_names_its_workflow() -> None:
    w = run(CHILD + "def main(o):\n    return (yield kw.all([kw.start_child(double, n) for n in (1, 2)]))")
    assert [w.waits(id) for id in ("w/0:1", "w/0:2")] == [["1:1"], ["2:1"]]
    w.advance(1)
    assert w.result("w") == [2, 4]


def test_the_childs_outcome_and_the_parents_answer_are_of_one_decision() -> None:
    """M5: in one transaction."""
    w = run(ASK, 1)
    w.advance(1)
    written = [(output.topic, output.key) for output in w.outputs]
    at = written.index(("workflow-result", b"c"))
    assert written[at + 1] == ("workflow-resume", b"w")


@pytest.mark.parametrize(
    ("act", "outcome", "error"),
    [
        (lambda w: w.resume("c", "n", "fail"), "error", "ValueError: no number"),
        (lambda w: w.resume("c", "n", error={"code": 7}), "error", {"code": 7}),
        (lambda w: w.command("c", "cancel"), "cancelled", "CancelToken"),
        (lambda w: w.command("c", "terminate", {"reason": "by hand"}), "terminated", "Terminated: by hand"),
    ],
)
def test_a_child_without_a_result_raises_child_error(act: Any, outcome: str, error: Any) -> None:
    """M5: a parent never waits for an answer that cannot come."""
    w = run(ASK, "wait")
    act(w)
    assert w.result("w") == ["c", outcome, error, f"child c: {outcome}: {error}"]


def test_a_child_error_that_is_not_caught_is_the_error_of_the_parent() -> None:
    w = run(CHILD + "def main(o):\n    yield kw.start_child('double', 'fail', id='c')")
    assert w.values("workflow-error")[-1] == {"kind": "child", "id": "c", "outcome": "error", "error": "ValueError: no number"}


def test_a_child_whose_id_runs_already_is_answered_exists_and_that_one_is_left_alone() -> None:
    """M5: the start is refused."""
    body = "def main(o):\n    if o == 'idle':\n        return (yield kw.suspend('r'))\n    try:\n        yield kw.start_child('double', 1, id='w')\n"
    w = run(CHILD + body + "    except kw.ChildError as e:\n        return e.outcome", "idle")
    w.start("other", 1)
    assert w.result("other") == "exists"
    assert w.waits("w") == ["r"]


def test_a_child_of_an_unknown_workflow_is_dead_lettered_and_answered() -> None:
    """M5."""
    w = run("def main(o):\n    try:\n        yield kw.start_child('nothing')\n    except kw.ChildError as e:\n        return [e.outcome, e.error]")
    assert w.result("w")[0] == "unknown_workflow"
    assert len(w.outputs_to(w.config.dead_letter_topic)) == 1
    w.send(None, b"new:1", {"kwflow-parent": "w|5:1"})
    assert (w.outputs[-1].key, b'"outcome":"null_key"' in (w.outputs[-1].value or b"")) == (b"w", True), "a start without a key, too"


BROKEN = """
import threading
def broken(o):
    lock = threading.Lock()
    yield kw.suspend("r")
def main(o):
    try:
        yield kw.start_child("broken", id="c")
    except kw.ChildError as e:
        return e.outcome
"""


@pytest.mark.parametrize(("op", "outcome"), [("discard", "discarded"), ("terminate", "terminated")])
def test_a_child_whose_first_step_failed_is_answered_when_somebody_gives_it_up(op: str, outcome: str) -> None:
    """M5, K17."""
    w = run(BROKEN)
    assert (w.header("c") or {})["status"] == "parked"
    assert w.waits("w")
    assert status(w.command("c", op)) == "ok"
    assert w.result("w") == outcome


def test_a_child_whose_start_is_held_behind_another_run_is_answered_when_that_is_terminated() -> None:
    """M5, K17: held records are dropped with that run, and the parent would wait for ever."""
    w = run(BROKEN)
    w.start("other")
    assert w.waits("other") and w.counts[-1] == "held"
    w.command("c", "terminate")
    assert (w.result("w"), w.result("other")) == ("terminated", "terminated")
    assert sum(output.key in (b"w", b"other") and b'"ref"' in (output.value or b"") for output in w.outputs) == 2


def test_a_result_too_large_for_the_parents_record_is_an_error_there() -> None:
    """At the limit and one past it."""
    body = "def big(n):\n    yield\n    return 'x' * n\ndef main(o):\n    try:\n        return len((yield kw.start_child('big', o))) if o else 0\n"
    w = run(body + "    except kw.ChildError as e:\n        return e.outcome")
    edge = next(n for n in range(999_900, 1_000_000) if _answer(w, n) == "too_large")
    assert _answer(w, edge - 1) == edge - 1


def _answer(w: WorkflowTester, n: int) -> Any:
    w.start(f"w{n}", n)
    return w.result(f"w{n}")


# -- what becomes of a child when nobody waits for it any more ---------------------------------------------------------------
def ends(policy: str, end: str = "return 'over'") -> WorkflowTester:
    w = run(CHILD + f"def main(o):\n    kw.start_child('double', 'wait', id='c', parent_close='{policy}')\n    yield kw.suspend('go')\n    {end}")
    w.resume("w", "go")
    return w


def test_at_the_end_of_the_parent_a_child_is_cancelled_by_default() -> None:
    """M5."""
    w = ends("cancel")
    assert w.outputs_to("out") == ["child cancelled"]
    assert headers(w, "cancel")[0]["kwflow-start-id"] == b"w|0:1"


def test_or_terminated_or_left_alone() -> None:
    """M5."""
    w = ends("terminate")
    assert (w.outputs_to("out"), w.values("workflow-error")) == ([], ["Terminated: its parent w no longer waits for it"])
    w = ends("abandon")
    assert w.waits("c") == ["n"]


def test_a_child_that_loses_a_race_is_told_what_its_policy_says() -> None:
    w = run(CHILD + "def main(o):\n    yield kw.race([kw.start_child('double', 'wait', id='c'), kw.sleep(5)])\n    yield kw.suspend('end')")
    w.advance(5)
    assert w.outputs_to("out") == ["child cancelled"]
    assert w.waits("w") == ["end"]


def test_a_child_in_a_combinator_that_no_task_waits_for_is_told_too() -> None:
    w = run(CHILD + "def main(o):\n    kw.all([kw.start_child('double', 'wait', id='c')])\n    yield kw.suspend('go')")
    w.resume("w", "go")
    assert w.outputs_to("out") == ["child cancelled"]


def test_terminating_the_parent_tells_its_children_without_author_code() -> None:
    """M3, M5."""
    w = run(CHILD + "def main(o):\n    try:\n        yield kw.start_child('double', 'wait', id='c')\n    finally:\n        say('parent ran')")
    w.command("w", "terminate")
    assert w.outputs_to("out") == ["child cancelled"]


def test_a_later_run_of_the_childs_id_is_not_touched() -> None:
    """M1.5: the command is for the run that this parent started."""
    w = run(CHILD + "def main(o):\n    yield kw.race([kw.start_child('double', 'wait', id='c'), kw.suspend('go')])\n    yield kw.suspend('end')")
    w.command("c", "pause")
    w.command("c", "terminate")
    w = run(CHILD + "def main(o):\n    kw.start_child('double', 'fail', id='c', parent_close='terminate')\n    yield kw.suspend('go')")
    w.start("c", "wait", workflow="double")
    w.resume("w", "go")
    assert w.waits("c") == ["n"]


def test_a_detached_child_gives_its_id_at_once_and_lives_on() -> None:
    """M5."""
    w = run(CHILD + "def main(o):\n    return kw.start_child('double', 'wait', detach=True)\n    yield")
    assert w.result("w") == "w/0:1"
    assert w.waits("w/0:1") == ["n"]
    assert "parent" not in (w.header("w/0:1") or {})


def test_a_repeated_start_of_a_child_that_has_ended_answers_again() -> None:
    """K20: such a record can come from a dead letter that is retried."""
    w = run(ASK, 1)
    start = next(output for output in w.outputs if output.key == b"c" and (output.value or b"").startswith(b"new:"))
    w.advance(1)
    before = len(w.outputs)
    w.send("c", start.value, {name: (value or b"").decode() for name, value in start.headers})
    assert [output.value for output in w.outputs[before + 1 :]] == [b'{"ref":"0:1","value":2}']


def test_a_repeated_start_of_a_child_whose_outcome_was_too_large_to_be_kept_says_so() -> None:
    """K20, M4: at the limit and one past it."""
    for size, said in ((65_534, b'"value":"xx'), (65_535, b'"outcome":"too_large"')):
        w = run("def big(n):\n    yield\n    return 'x' * n\ndef main(o):\n    return len((yield kw.start_child('big', o, id='c')))", size)
        assert w.result("w") == size
        start = next(output for output in w.outputs if output.key == b"c" and (output.value or b"").startswith(b"new:"))
        w.send("c", start.value, {name: (value or b"").decode() for name, value in start.headers})
        assert said in (w.outputs[-1].value or b""), size


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("kw.start_child(5)", "takes the name of a workflow"),
        ("kw.start_child(say)", "takes the name of a workflow"),
        ("kw.start_child('double', id='w')", "'w' is this workflow"),
        ("kw.start_child('double', id='a|b')", "must not contain"),
        ("kw.start_child('double', id='x' * 513)", "1 to 512 bytes"),
        ("kw.start_child('double', id='')", "1 to 512 bytes"),
        ("kw.start_child('double', id='\\ud800')", "not UTF-8"),
        ("kw.start_child('double', id=7)", "a workflow id must be a str"),
        ("kw.start_child('double', object())", "TypeError"),
        ("kw.start_child('double', parent_close='kill')", "parent_close is one of cancel, terminate, abandon"),
    ],
)
def test_wrong_calls_are_named_and_start_nothing(call: str, said: str) -> None:
    w = run(CHILD + f"def main(o):\n    try:\n        {call}\n    except Exception as e:\n        return type(e).__name__ + ': ' + str(e)\n    yield")
    assert said in w.result("w")
    assert not [output for output in w.outputs[1:] if output.topic == "workflow-resume"]


@pytest.mark.slow
def test_a_tree_of_1000_children() -> None:
    """M5: three levels of ten, each of which sums the level below."""
    node = "def node(depth):\n    if not depth:\n        return 1\n    return sum((yield kw.all([kw.start_child('node', depth - 1) for _ in range(10)])))\n"
    w = run(node + "def main(o):\n    return (yield kw.start_child('node', 3))")
    assert w.result("w") == 1000
    assert all(b'"status":"ended"' in value for key, value in w.state.entries.items() if not key.startswith(b"\0"))
