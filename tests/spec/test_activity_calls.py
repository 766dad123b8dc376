"""Activity calls as a workflow sees them (M6), each step through real snapshots."""

import asyncio
import itertools
import re
from typing import Any

import pytest

import kwflow as kw
from kwflow import activities, durable
from kwflow.core import snapshot
from kwflow.core.dispatch import PREFIX
from kwflow.testing import HANGS, WorkflowTester

_count = itertools.count()
HEAD = "import dataclasses\nimport kwflow as kw\ndef activity(**options):\n    return kw.activity(name=__name__ + '.work', **options)\n"


def run(body: str, options: Any = None, fake: Any = None) -> WorkflowTester:
    """A started tester for a module with this text, whose only activity is `work`."""
    name = f"activity_case_{next(_count)}"
    module = durable.load_source(name, HEAD + body, f"{name}.py")
    tester = WorkflowTester(module.main)
    if fake is not None:
        tester.fake(f"{name}.work", fake)
    tester.start("w", options)
    return tester


def error(tester: WorkflowTester) -> Any:
    return tester.values("workflow-error")[-1]


def entries(tester: WorkflowTester) -> int:
    """The calls in the store."""
    return sum(key.startswith(PREFIX) for key in tester.state.entries)


WORK = "@activity()\ndef work(x):\n    return x + 1\n"


def fails(*errors: BaseException) -> Any:
    """Raises these errors, one a call, then returns its argument."""
    left = list(errors)

    def fake(x):
        if left:
            raise left.pop(0)
        return x

    return fake


def test_a_call_is_started_after_the_step_and_its_result_is_what_the_yield_gives() -> None:
    """M6.1, M6.2."""
    w = run(WORK + "def main(o):\n    return (yield work(o)) * 10", 4)
    assert w.result("w") == 50
    assert entries(w) == 0


def test_a_call_begins_when_it_is_made_like_every_wait() -> None:
    """Semantics §1.1: the calls in a list run at the same time."""
    w = run(WORK + "def main(o):\n    a, b = work(1), work(2)\n    yield kw.suspend('gate')\n    return [(yield b), (yield a)]")
    assert [call.arguments for call in w.calls] == [{"x": 1}, {"x": 2}]
    w.resume("w", "gate")
    assert w.result("w") == [3, 2]


def test_all_of_them_run_together_and_the_first_error_of_all_cancels_the_rest() -> None:
    w = run(WORK + "def main(o):\n    return (yield kw.all([work(n) for n in range(5)]))")
    assert w.result("w") == [1, 2, 3, 4, 5]


def test_yield_from_and_async_activities_work_too() -> None:
    """Semantics §1.4."""
    w = run("@activity()\nasync def work(x):\n    return x + 1\ndef main(o):\n    return (yield from work(o))", 1)
    assert w.result("w") == 2


def test_the_test_kit_runs_async_activities_and_fakes_where_the_test_itself_runs_in_a_loop() -> None:
    """M6: `asyncio.run` refuses to run inside a loop, as in a test under pytest-asyncio."""
    text = "import asyncio\n@activity()\nasync def work(x):\n    await asyncio.sleep(0)\n    return x + 1, kw.activity_info().workflow_id\ndef main(o):\n    return (yield work(o))"

    async def fake(x: int) -> int:
        raise kw.BusinessError(f"not {x}")

    async def test() -> None:
        assert run(text, 1).result("w") == [2, "w"]
        assert "not 1" in error(run(text, 1, fake))

    asyncio.run(test())


def test_the_header_tells_name_attempt_and_the_line_of_the_author_who_waits() -> None:
    w = run(WORK + "def main(o):\n    return (yield work(1))", fake=lambda x: HANGS)
    [wait] = w.header("w")["waits"]
    assert (wait["kind"], wait["name"], wait["attempt"], wait["function"], wait["line"]) == ("activity", w.calls[0].activity, 1, "main", 9)
    assert entries(w) == 1


# -- retries and time-outs -----------------------------------------------------------------------------------------------
RETRYING = "@activity(retry=kw.Retry(max_attempts=3, first=10, factor=2, max=60, jitter=0))\ndef work(x):\n    return x\n"


def test_a_failed_attempt_is_made_again_after_its_pause_with_the_same_arguments() -> None:
    """M6.4: the pause is durable, because it is a timer like any other."""
    w = run(RETRYING + "def main(o):\n    return (yield work(7))", fake=fails(ValueError("1"), SystemExit(2)))
    assert [call.attempt for call in w.calls] == [1]
    w.advance(9.9)
    assert len(w.calls) == 1
    w.advance(0.1)
    assert len(w.calls) == 2
    w.advance(20)
    assert [call[2:] for call in w.calls] == [(1, {"x": 7}), (2, {"x": 7}), (3, {"x": 7})]
    assert w.result("w") == 7


@pytest.mark.parametrize(
    "call", ["yield work(o)", "yield kw.timeout(work(o), 900)", "yield kw.all([kw.suspend('other'), work(o)])", "yield from [work(o)]", "a = work(o)\n    yield kw.suspend('other')"]
)
def test_the_header_says_of_a_pause_which_attempt_of_which_activity_comes_after_it(call: str) -> None:
    """M3: for that timer and no other. The facts come from variables of kwflow's own code, in a restored instance as in one that was never saved."""
    w = run(f"@activity(timeout=100, retry=kw.Retry(first=60, factor=1, jitter=0))\ndef work(x): ...\ndef main(o):\n    {call}", 4, fails(ValueError(), ValueError()))
    for attempt in (2, 3):
        pauses = [wait for wait in w.header("w")["waits"] if wait["kind"] == "timer" and wait.keys() & {"name", "attempt"}]
        assert [(wait["name"].rpartition(".")[2], wait["attempt"], wait["due"] - wait["since"]) for wait in pauses] == [("work", attempt, 60_000)]
        w.advance(60)
    header = w.header("w")
    assert header is None or not [wait for wait in header["waits"] if "attempt" in wait]


def test_the_timers_of_attempts_and_of_authors_are_no_pauses() -> None:
    """Nor is a timer that an author's function of that name waits for."""
    body = "def attempts(name, number):\n    yield kw.sleep(1)\ndef main(o):\n    yield kw.all([work(1), attempts('work', 1), kw.sleep(5)])"
    w = run(f"@activity(timeout=100)\ndef work(x): ...\n{body}", fake=lambda x: HANGS)
    assert [sorted(wait.keys() & {"name", "attempt"}) for wait in w.header("w")["waits"]] == [["attempt", "name"], [], [], []]


def test_the_last_attempt_raises_activity_error_with_type_message_and_details() -> None:
    """M6.3."""
    body = "def main(o):\n    try:\n        yield work(7)\n    except kw.ActivityError as e:\n        return [str(e), e.type, e.details]"
    w = run(RETRYING + body, fake=fails(*(kw.ActivityError("no line", "Busy", {"n": n}) for n in range(3))))
    w.finish("w")
    assert w.result("w") == ["no line", "Busy", {"n": 2}]


def test_uncaught_it_is_the_error_record() -> None:
    w = run("@activity(retry=kw.Retry(max_attempts=1))\ndef work(x):\n    raise KeyError('k')\ndef main(o):\n    yield work(1)")
    assert error(w) == "ActivityError: 'k'"


def test_a_business_error_passes_as_such_and_is_never_tried_again() -> None:
    """M6.3."""
    body = "def main(o):\n    try:\n        yield work(7)\n    except kw.BusinessError as e:\n        return [e.code, e.message, e.variables]"
    w = run(RETRYING + body, fake=fails(kw.BusinessError("declined", "no funds", {"left": 3})))
    assert w.result("w") == ["declined", "no funds", {"left": 3}]


def test_an_error_that_is_final_is_not_tried_again() -> None:
    w = run(RETRYING + "def main(o):\n    yield work(7)", fake=fails(kw.ActivityError("key revoked", "Auth", final=True)))
    assert error(w) == "ActivityError: key revoked"


LIMITED = "@activity(timeout=30, retry=kw.Retry(max_attempts=2, first=5, jitter=0))\ndef work(x):\n    return x\n"


def test_an_attempt_over_its_time_is_made_again_and_its_late_answer_is_ignored() -> None:
    """M6.4: the result races the timer."""
    answers = iter([HANGS, "second"])
    w = run(LIMITED + "def main(o):\n    return (yield work(7))", fake=lambda x: next(answers))
    [first, _timer] = w.waits("w")
    w.advance(30)
    assert entries(w) == 0
    w.resume("w", first, "late")
    assert w.counts[-1] == "unknown-ref"
    w.advance(5)
    assert w.result("w") == "second"


def test_when_all_attempts_are_over_their_time_the_error_says_timeout() -> None:
    w = run(LIMITED + "def main(o):\n    try:\n        yield work(7)\n    except kw.ActivityError as e:\n        return [str(e), e.type, kw.now().timestamp()]", fake=lambda x: HANGS)
    begun = w.now_ms / 1000
    w.finish("w")
    message, kind, ended = w.result("w")
    assert (kind, ended - begun) == ("Timeout", 65)
    assert "had no result within 30 s" in message
    assert w.logs.count(f"w: {message}") == 2  # the running activity is only told that nobody waits any more


def test_retries_draw_no_chance_two_runs_pause_alike() -> None:
    """Semantics §4.1: jitter is a hash of workflow id, ref and attempt, not a random number."""
    body = "@activity(retry=kw.Retry(jitter=1))\ndef work(x):\n    raise ValueError\ndef main(o):\n    yield kw.all([work(n) for n in range(20)])"
    delays = []
    for _ in range(2):
        w = run(body)
        delays.append([int(output.value or b"") for output in w.outputs if output.topic == "workflow-scheduler"])
    assert delays[0] == delays[1]
    assert len(set(delays[0])) > 10


# -- cancelling ----------------------------------------------------------------------------------------------------------
def test_a_cancelled_call_is_withdrawn_from_the_store_also_while_it_pauses() -> None:
    w = run(RETRYING + "def main(o):\n    call = work(1)\n    yield kw.suspend('gate')\n    kw.cancel(call)\n    yield kw.suspend('end')", fake=lambda x: HANGS)
    assert entries(w) == 1
    w.resume("w", "gate")
    assert (entries(w), w.waits("w")) == (0, ["end"])
    w = run(RETRYING + "def main(o):\n    call = work(1)\n    yield kw.suspend('gate')\n    kw.cancel(call)\n    yield kw.suspend('end')", fake=fails(ValueError()))
    w.resume("w", "gate")
    assert w.waits("w") == ["end"]
    assert w.outputs_to("workflow-scheduler") == ["10000", "0"]


def test_a_call_made_and_cancelled_in_one_step_never_runs() -> None:
    w = run(WORK + "def main(o):\n    yield kw.race([work(1), 'at once'])\n    yield kw.suspend('end')")
    assert (w.calls, entries(w)) == ([], 0)


def test_terminate_and_the_end_of_main_leave_no_call_behind() -> None:
    """M3."""
    w = run(WORK + "def main(o):\n    yield work(1)", fake=lambda x: HANGS)
    assert (w.command("w", "terminate") or {})["status"] == "ok"
    assert entries(w) == 0
    w = run(WORK + "def main(o):\n    work(1)\n    yield 1\n    return 'done'", fake=lambda x: HANGS)
    assert (w.result("w"), entries(w), w.header("w")) == ("done", 0, None)


QUEUED = "@activity(queue='q')\ndef work(x):\n    return x + 1\n"


@pytest.mark.parametrize("work", [WORK, QUEUED, WORK.replace("activity()", "activity(timeout=5)")], ids=["activity", "job", "limited"])
def test_a_call_that_nobody_awaited_before_main_ended_is_told_of(work: str) -> None:
    """M3: the end of main cancels the call and logs it. Without the log, a forgotten `yield` looked like a call that was done."""
    w = run(work + "def main(o):\n    work(1)\n    return 'done'\n    yield", fake=lambda x: HANGS)
    assert (w.result("w"), entries(w), w.calls) == ("done", 0, [])
    [said] = w.logs
    assert re.fullmatch(r"w: main has ended, which cancels calls that nobody has awaited: activity \S+work; write `yield` or `await` before the call", said), said


def test_a_call_that_pauses_between_two_attempts_is_told_of_too() -> None:
    w = run(WORK + "def main(o):\n    work(1)\n    return (yield kw.suspend('end'))", fake=fails(ValueError("not now")))
    w.resume("w", "end")
    assert "main has ended, which cancels calls that nobody has awaited: activity" in w.logs[-1]


def test_so_is_a_call_of_a_service() -> None:
    w = run("from kwflow import rest\ndef main(o):\n    rest.call('GET', 'https://a.example/b', callback=False)\n    return 1\n    yield")
    assert "nobody has awaited: rest.call GET https://a.example/b; write" in w.logs[0]


def test_so_are_children_and_pauses_and_of_many_some() -> None:
    """M3, M5: a child that is to continue by itself is detached, or its policy is to abandon it."""
    begun = ["kw.sleep(5)", "kw.start_child('c', id='a')", "kw.start_child('c', id='b', parent_close='abandon')", "kw.start_child('c', detach=True)", "kw.suspend('s')"]
    w = run(f"def main(o):\n    {'; '.join(begun)}\n    return 1\n    yield")
    assert w.logs[0] == "w: main has ended, which cancels calls that nobody has awaited: child a, kw.sleep (0:1); write `yield` or `await` before the call"
    w = run(WORK + "def main(o):\n    for n in range(7):\n        work(n)\n    return 1\n    yield", fake=lambda x: HANGS)
    assert len(w.logs) == 1 and w.logs[0].count("work") == 5 and "and 2 more; write" in w.logs[0]


@pytest.mark.parametrize(
    "body",
    ["yield kw.race([work(1), 'at once'])", "a = work(1)\n    yield kw.race([a, 'at once'], cancel_rest=False)", "kw.cancel(work(1))", "work(1)\n    raise ValueError", "kw.shield(work(1))"],
)
def test_a_call_that_lost_was_cancelled_or_fell_with_its_workflow_is_nothing_to_tell_of(body: str) -> None:
    w = run(WORK + f"def main(o):\n    {body}\n    return 'done'\n    yield", fake=lambda x: HANGS)
    assert not [line for line in w.logs if "nobody awaited it" in line]


# -- bad input -----------------------------------------------------------------------------------------------------------
def test_an_answer_that_somebody_else_sends_is_taken_as_one_and_a_strange_error_is_an_activity_error() -> None:
    w = run("@activity(retry=kw.Retry(max_attempts=1))\ndef work(x):\n    return x\ndef main(o):\n    yield work(1)", fake=lambda x: HANGS)
    w.resume("w", w.waits("w")[0], error="strange")
    assert error(w).endswith("strange")


def test_a_result_that_is_not_as_annotated_is_an_activity_error_at_the_yield() -> None:
    w = run("@activity()\ndef work(x) -> int:\n    return x\ndef main(o):\n    try:\n        yield work(1)\n    except kw.ActivityError as e:\n        return e.type", fake=lambda x: "no int")
    assert w.result("w") == "BadResult"


@pytest.mark.parametrize("hint", ["P", "M"])
def test_the_error_of_a_result_that_is_not_as_annotated_is_held_over_a_wait_as_any_other(hint: str) -> None:
    """M6.3, G4: its cause, an error of msgspec or pydantic, could not be saved and parked the workflow that was compensating."""
    classes = "import pydantic\nclass M(pydantic.BaseModel):\n    n: int\n@dataclasses.dataclass\nclass P:\n    n: int\n"
    main = "def main(o):\n    try:\n        yield work(1)\n    except kw.ActivityError as e:\n        yield kw.suspend('undone')\n        return e.type\n"
    w = run(f"{classes}@activity()\ndef work(x) -> {hint}:\n    return x\n{main}", fake=lambda x: None)
    w.resume("w", "undone")
    assert w.result("w") == "BadResult"


def test_results_come_back_as_annotated() -> None:
    points = "@dataclasses.dataclass\nclass P:\n    n: int\n@activity()\ndef work(p: P) -> list[P]:\n    return [p, P(p.n + 1)]\n"
    w = run(points + "def main(o):\n    ps = yield work(P(1))\n    return [type(p).__name__ + str(p.n) for p in ps]")
    assert w.result("w") == ["P1", "P2"]


@pytest.mark.parametrize(("call", "said"), [
    ("work()", "TypeError: activity .*work: missing a required argument: 'x'"),
    ("work(1, timeout=5)", "TypeError: activity .*work: got an unexpected keyword argument 'timeout'; set its timeout and retries in @kw.activity"),
    ("work(object())", "UsageError: argument 'x' of activity .* cannot be sent: a value of class object needs an annotation"),
    ("work('x' * 300_000)", "UsageError: the arguments of activity .* more than 256000 .limit activity_bytes_max."),
])  # fmt: skip
def test_wrong_arguments_are_an_error_at_the_call(call: str, said: str) -> None:
    w = run(WORK + f"def main(o):\n    yield {call}")
    assert re.match(said, error(w)), error(w)


def test_a_workflow_whose_activity_is_gone_from_the_code_is_parked_and_goes_on_when_it_is_back() -> None:
    """G10."""
    w = run(WORK + "def main(o):\n    return (yield work(1))", fake=lambda x: HANGS)
    [ref], name = w.waits("w"), w.calls[0].activity
    kept = activities._activities.pop(name)
    w.resume("w", ref, 5)
    header = w.header("w")
    assert header is not None
    assert header["status"] == "parked"
    assert f"no activity '{name}'" in header["parked"]["message"]
    activities._activities[name] = kept
    w.command("w", "retry")
    assert w.result("w") == 5


def test_activities_are_values_a_workflow_may_keep_over_a_yield() -> None:
    """They are saved by name, as in a dict of tools in a local variable."""
    w = run(WORK + "def main(o):\n    tools = {'w': work}\n    yield kw.suspend('gate')\n    return (yield tools['w'](1))")
    w.resume("w", "gate")
    assert w.result("w") == 2


def test_a_waiting_call_takes_few_bytes() -> None:
    """Fan-out: 1,000 pending calls of one instance fit into a snapshot with much room to spare."""
    w = run(WORK + "def main(o):\n    yield kw.all([work(n) for n in range(1000)])", fake=lambda x: HANGS)
    stored = w.state.get(b"w")
    assert stored is not None
    assert len(stored) < 500_000, len(stored)
    assert entries(w) == 1000


def test_an_activity_called_from_an_activity_is_the_plain_function() -> None:
    """M6.1."""
    w = run("@activity()\ndef work(x):\n    return x if x == 1 else work(1) + x\ndef main(o):\n    return (yield work(5))")
    assert w.result("w") == 6


def test_the_code_header_names_our_durable_module_beside_the_authors() -> None:
    """Semantics §8: kwflow's own frames are units of their own module, so neither module pins the other."""
    w = run(WORK + "def main(o):\n    yield work(1)", fake=lambda x: HANGS)
    stored = w.state.get(b"w")
    assert stored is not None
    code = snapshot.read_header(stored)["code"]
    assert set(code) == {w.calls[0].activity.removesuffix(".work"), "kwflow.flows.attempts1"}
    assert list(code["kwflow.flows.attempts1"]["units"]) == ["attempts"]


def test_an_instance_that_finishes_on_old_code_calls_the_activity_that_is_deployed_now() -> None:
    """Semantics §8.4: an old version of a module registers nothing that the current code also has."""
    text = "import kwflow as kw\n@kw.activity(name='of-versions')\ndef work(x):\n    return [x, '{0}']\ndef main(o):\n    yield kw.suspend('gate')\n    return ['{0}', (yield work(1))]"
    module = durable.load_source("activity_versions", text.format("old"), "activity_versions.py")
    w = WorkflowTester(module.main)
    w.start("w")
    durable.load_source("activity_versions", text.format("new"), "activity_versions.py")
    w.resume("w", "gate")
    assert w.result("w") == ["old", [1, "new"]]


def test_async_workflows_await_activities() -> None:
    """Semantics §6. An `async def` activity of the same module stays an asyncio coroutine."""
    body = "import asyncio\n@activity()\nasync def work(x):\n    await asyncio.sleep(0)\n    return x + 1\n"
    body += "async def main(o):\n    call = work(1)\n    return [await call, await work(2), await kw.all([work(3), call])]"
    assert run(body).result("w") == [2, 3, [4, 2]]


def test_an_activity_that_is_not_called_is_refused_where_a_wait_is_expected() -> None:
    """Semantics §1.3: natively it would be returned at once, as a plain value."""
    assert error(run(WORK + "def main(o):\n    yield work")) == "UsageError: work is a function, not a wait; did you mean work()?"
    assert error(run(WORK + "def main(o):\n    yield kw.all([work])")) == "UsageError: work is a function, not a wait; did you mean work()?"


# -- results that park their instance ------------------------------------------------------------------------------------
HOLDING = "        held = __import__('threading').Lock()\n        yield kw.suspend('x')\n"


def test_a_call_whose_result_is_discarded_fails_for_the_workflow_waits_for_it() -> None:
    """Semantics §7, M6: otherwise nobody would answer it until the next restart, which would start it again."""
    body = "def main(o):\n    try:\n        yield work(o)\n" + HOLDING + "    except kw.ActivityError as error:\n        return [error.type, error.final]"
    w = run(WORK + body, 1)
    assert (w.header("w") or {})["parked"]["reason"] == "UnsavableError"
    w.command("w", "discard")
    assert w.result("w") == ["Discarded", True]
    assert (entries(w), len(w.calls)) == (0, 1)


def test_a_call_whose_failure_is_discarded_too_is_worked_for_no_more() -> None:
    body = "def main(o):\n    while True:\n        try:\n            yield work(o)\n        except kw.ActivityError:\n            pass\n" + HOLDING
    w = run(WORK + body, 1)
    for _ in range(2):
        assert (w.header("w") or {})["status"] == "parked"
        w.command("w", "discard")
    assert (w.header("w") or {})["status"] == "waiting"
    assert (entries(w), len(w.calls)) == (0, 1)
    assert [wait["kind"] for wait in (w.header("w") or {})["waits"]] == ["activity"]
