"""Batches of calls of an activity (spec BW-1..BW-16), with real threads and a real event loop."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kwflow as kw
from kwflow.runners.activities.answers import conclude
from kwflow.runners.activities.threads import Threads
from tests.unit.test_dispatch import Engine

_names = itertools.count()


class Stopped(Threads):
    """A clock that advances only when the test advances it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Batching(Engine):
    """An engine with a clock of its own. It records the batches that it began."""

    def __init__(self, concurrency: int = 4) -> None:
        super().__init__(concurrency)
        self.threads = Stopped()
        self.dispatcher._threads = self.threads
        self.dispatcher.own(0, self.store)
        self.batches: list[list[Any]] = []
        self._refs = itertools.count()

    def activity(self, size: int, within: float = 1.0, then: Callable[[list[kw.Call]], Any] | None = None, **options: Any) -> Any:
        """An activity that takes a number. Its batches are recorded, and each call is answered with ten times its number, or as `then` does."""

        def one(n: int) -> int: ...

        activity = kw.activity(name=f"batched-{next(_names)}", **options)(one)

        def many(calls: list[kw.Call]) -> Any:
            self.batches.append([call.arguments["n"] for call in calls])
            return [call.arguments["n"] * 10 for call in calls] if then is None else then(calls)

        kw.batch_of(activity, size=size, within=within)(many)
        return activity

    def push(self, activity: Any, *numbers: int) -> None:
        for number in numbers:
            self.start(activity, number, id=f"w{number}", ref=f"{next(self._refs)}:1")

    def pass_s(self, seconds: float) -> None:
        self.threads.now += seconds
        self.dispatcher.turn()


@pytest.fixture
def engine() -> Iterator[Batching]:
    engine = Batching()
    yield engine
    engine.dispatcher.close()


def test_calls_are_done_together_as_soon_as_there_are_enough(engine: Batching) -> None:
    """BW-1, vector A: 1, 2 and 3 are done at once; 4 waits for its time."""
    activity = engine.activity(3, within=1)
    engine.push(activity, 1, 2)
    assert engine.batches == [] and engine.dispatcher.counts() == {"running": 0, "ready": 2, "left-behind": 0}
    engine.push(activity, 3)
    assert [engine.answer(f"w{n}")["value"] for n in (1, 2, 3)] == [10, 20, 30]
    engine.push(activity, 4)
    engine.pass_s(0.9)
    assert engine.batches == [[1, 2, 3]]
    engine.pass_s(0.2)
    assert engine.answer("w4")["value"] == 40
    assert engine.batches == [[1, 2, 3], [4]]


def test_the_time_of_a_batch_begins_with_its_first_call_and_with_none_nothing_is_called(engine: Batching) -> None:
    """BW-2, vector C: the reference calls its handler with nothing."""
    activity = engine.activity(2, within=1)
    engine.pass_s(5)
    engine.push(activity, 1)
    engine.pass_s(0.6)
    engine.push(activity, 2)
    engine.answer("w2")
    engine.push(activity, 3)
    engine.pass_s(0.6)
    assert engine.batches == [[1, 2]], "the first batch was full, and its time is no longer counted"
    engine.pass_s(0.6)
    engine.answer("w3")
    engine.pass_s(5)
    assert engine.batches == [[1, 2], [3]]


def test_a_batch_has_at_most_its_size_and_without_a_time_what_is_there_goes_at_once(engine: Batching) -> None:
    """BW-3: the reference drains whatever was fetched, but a service has its limit. BW-5."""
    activity = engine.activity(3)
    engine.push(activity, *range(7))
    engine.answer("w5")
    assert sorted(map(len, engine.batches)) == [3, 3]
    engine.pass_s(2)
    engine.answer("w6")
    engine.push(engine.activity(3, within=0), 7)
    assert engine.answer("w7")["value"] == 70


def test_what_comes_while_a_batch_runs_is_in_the_next_one(engine: Batching) -> None:
    """BW-4: no call is lost, and none is done twice."""
    gate = threading.Event()
    activity = engine.activity(2, then=lambda calls: gate.wait(10) and None or [0] * len(calls))
    engine.push(activity, 1, 2, 3, 4)
    engine.until(lambda: len(engine.batches) == 2)
    gate.set()
    assert [engine.answer(f"w{n}")["value"] for n in (1, 2, 3, 4)] == [0, 0, 0, 0]
    assert sorted(itertools.chain(*engine.batches)) == [1, 2, 3, 4]


def test_each_call_is_answered_by_itself_and_only_once(engine: Batching) -> None:
    """BW-7, BW-9: a second answer raises an error where it is given, and is not sent."""
    second: list[str] = []

    def then(calls: list[kw.Call]) -> None:
        one, two, three = calls
        one.complete("done")
        two.fail(kw.BusinessError("sold-out", "none left"))
        with pytest.raises(kw.UsageError, match="was answered before"):
            one.fail(ValueError("again"))
        second.append(repr(one))
        assert [call.answered for call in calls] == [True, True, False]
        assert engine.answer("w1") == {"ref": "0:1", "value": "done"}, "it waits for no other"

    activity = engine.activity(3, then=then)
    engine.push(activity, 1, 2, 3)
    assert engine.answer("w2")["error"] == {"kind": "business", "code": "sold-out", "message": "none left", "variables": None}
    left = engine.answer("w3")["error"]
    assert (left["type"], left["final"]) == ("NotAnswered", False)
    assert second == [f"<call of {activity.name} for w1, attempt 1, answered>"]


def test_a_list_answers_all_in_their_order_and_may_hold_errors(engine: Batching) -> None:
    activity = engine.activity(3, then=lambda calls: ["a", ValueError("b"), {"c": 1}])
    engine.push(activity, 1, 2, 3)
    assert [engine.answer("w1")["value"], engine.answer("w3")["value"]] == ["a", {"c": 1}]
    assert engine.answer("w2")["error"]["message"] == "b"
    [line] = engine.lines
    assert line.startswith(f"activity {activity.name} of w2 (attempt 1) failed, next attempt in")


@pytest.mark.parametrize(("returned", "said"), [
    (["a"], "returned 1 results for 2 calls; it must return None, or a result or an exception for each call, in order"), ("ab", "returned 'ab'; it must return None"),
    ({}, "returned {}; it"),
])  # fmt: skip
def test_what_a_batch_must_not_return_is_the_error_of_all_its_calls(engine: Batching, returned: Any, said: str) -> None:
    engine.push(engine.activity(2, then=lambda calls: returned), 1, 2)
    for id in ("w1", "w2"):
        error = engine.answer(id)["error"]
        assert said in error["message"] and error["final"]


def test_what_a_batch_raises_is_the_error_of_those_that_have_no_answer(engine: Batching) -> None:
    """BW-11: the reference leaves such calls until their locks expire."""

    def then(calls: list[kw.Call]) -> None:
        calls[0].complete()
        raise SystemExit(3)

    engine.push(engine.activity(2, then=then), 1, 2)
    assert engine.answer("w1")["value"] is None
    assert engine.answer("w2")["error"]["type"] == "SystemExit"
    engine.push(engine.activity(1), 5)
    assert engine.answer("w5")["value"] == 50


def test_arguments_are_as_annotated_and_what_does_not_fit_fails_alone(engine: Batching) -> None:
    """BW-16."""

    def one(when: "datetime.date", n: int = 3) -> int: ...

    import datetime

    one.__globals__.setdefault("datetime", datetime)
    activity, seen = kw.activity(name=f"batched-{next(_names)}")(one), []

    @kw.batch_of(activity, size=2)
    def many(calls: list[kw.Call]) -> list[int]:
        seen.append([(dict(call.arguments), call.info.workflow_id, call.info.idempotency_key) for call in calls])
        return [1 for _ in calls]

    good = engine.start(activity, datetime.date(2026, 1, 2), id="good")
    engine.commit(kw_dispatch(good, "bad", b'{"when":"soon"}'))
    assert engine.answer("good")["value"] == 1
    assert engine.answer("bad")["error"]["type"] == "BadArguments"
    assert seen == [[({"when": datetime.date(2026, 1, 2), "n": 3}, "good", "good|0:1")]]


def kw_dispatch(like: Any, id: str, arguments: bytes) -> Any:
    return type(like)(id, like.ref, like.name, 1, like.ref, arguments)


def test_an_async_batch_is_awaited(engine: Batching) -> None:
    activity = engine.activity(2)
    activity.batched = None

    @kw.batch_of(activity, size=2)
    async def many(calls: list[kw.Call]) -> list[int]:
        await asyncio.sleep(0)
        return [call.arguments["n"] + 1 for call in calls]

    engine.push(activity, 1, 2)
    assert [engine.answer("w1")["value"], engine.answer("w2")["value"]] == [2, 3]


def test_a_batch_may_be_larger_than_what_few_slots_keep_ready() -> None:
    """BW-1, BW-3: with one slot, eight calls are kept ready, but a batch may want a hundred."""
    engine = Batching(1)
    activity = engine.activity(100, within=60)
    engine.push(activity, *range(150))
    engine.until(lambda: engine.batches)
    assert engine.batches == [list(range(100))]
    engine.answer("w99")
    engine.until(lambda: engine.dispatcher.counts()["ready"] == 50)
    engine.pass_s(61)
    engine.answer("w149")
    assert engine.batches[1:] == [list(range(100, 150))]
    engine.dispatcher.close()


def test_calls_that_wait_for_a_batch_keep_no_other_activity_waiting(engine: Batching) -> None:
    """BW-2, BW-14: they used to fill the room for calls that are kept ready, for as long as a batch may wait."""
    engine.push(engine.activity(100, within=3600), *range(40))
    engine.push(engine.activity(1), 50)
    assert engine.answer("w50")["value"] == 500
    engine.until(lambda: engine.dispatcher.counts()["ready"] == 40)
    assert engine.batches == [[50]]


def test_a_batch_without_a_time_takes_what_is_there(engine: Batching) -> None:
    """BW-3, BW-5."""
    gate = threading.Event()
    held = engine.activity(1, then=lambda calls: gate.wait(10) and [0])
    engine.push(held, 1, 2, 3, 4)
    engine.push(engine.activity(5, within=0), *range(5, 12))
    gate.set()
    engine.answer("w11")
    assert sorted(map(len, engine.batches)) == [1, 1, 1, 1, 2, 5]


def test_a_batch_is_begun_when_nothing_more_can_come(engine: Batching) -> None:
    """BW-2: a worker stops reading while it has too many calls, and begins only a few at a time after another worker has died."""
    activity = engine.activity(100, within=3600)
    engine.push(activity, 1, 2)
    engine.dispatcher.hurry()
    assert engine.answer("w2")["value"] == 20
    gate = threading.Event()
    engine.push(engine.activity(1, then=lambda calls: gate.wait(10) and [0]), 3)
    engine.push(activity, 4)
    engine.dispatcher.hurry()
    assert engine.dispatcher.counts() == {"running": 1, "ready": 1, "left-behind": 0}, "what runs makes room when it ends"
    gate.set()


def test_a_call_that_a_thread_answers_while_the_batch_returns_leaves_no_other_without_an_answer() -> None:
    """BW-7, BW-9: each call may be answered on any thread."""

    class Raced(kw.Call):
        @property
        def answered(self) -> bool:
            was = self._answered
            if not was:
                self.complete("by a thread")
            return was

    answers: list[Any] = []
    activity = kw.activity(name=f"batched-{next(_names)}")(lambda n: n)
    given = [kind({"n": 1}, kw.ActivityInfo("a", "w", 1, "w|1:1"), lambda value, error: answers.append(value or error)) for kind in (Raced, kw.Call)]
    conclude(activity, given, None)
    assert answers[0] == "by a thread" and "did not answer this call" in str(answers[1])


def test_a_call_that_nobody_waits_for_any_more_leaves_the_batch_or_is_told_so(engine: Batching) -> None:
    """ET-21; M6.4."""
    gate, infos = threading.Event(), []

    def then(calls: list[kw.Call]) -> list[int]:
        infos.extend(call.info for call in calls)
        gate.wait(10)
        return [1] * len(calls)

    activity = engine.activity(2, then=then)
    items = [engine.start(activity, n, id=f"w{n}", ref=f"{n}:1") for n in (1,)]
    engine.withdraw(items[0])
    engine.pass_s(2)
    assert engine.batches == [] and engine.dispatcher.busy == 0
    items = [engine.start(activity, n, id=f"w{n}", ref=f"{n}:1") for n in (2, 3)]
    engine.until(lambda: len(infos) == 2)
    engine.withdraw(items[0])
    assert [info.cancelled for info in infos] == [True, False]
    gate.set()
    assert engine.answer("w3")["value"] == 1
    engine.until(lambda: engine.dispatcher.busy == 0)
    assert "w2" not in engine.records


def test_a_batch_takes_one_slot_until_all_its_calls_are_answered(engine: Batching) -> None:
    """BW-13, BW-14: the slot is free with the last answer, even if the function goes on."""
    gate = threading.Event()

    def then(calls: list[kw.Call]) -> None:
        for call in calls:
            call.complete()
        gate.wait(10)

    engine.push(engine.activity(10, then=then), *range(10))
    engine.answer("w9")
    engine.until(lambda: engine.dispatcher.counts() == {"running": 0, "ready": 0, "left-behind": 1})
    gate.set()
    engine.until(lambda: engine.dispatcher.counts()["left-behind"] == 0)


def test_a_batch_over_its_time_is_answered_for_and_its_slot_given_to_others(engine: Batching) -> None:
    gate = threading.Event()
    engine.push(engine.activity(2, then=lambda calls: gate.wait(10) and None), 1, 2)
    engine.until(lambda: engine.dispatcher.counts()["running"] == 1)
    engine.pass_s(601)
    assert [engine.answer(id)["error"]["type"] for id in ("w1", "w2")] == ["Timeout", "Timeout"]
    engine.pass_s(6)
    assert engine.dispatcher.counts() == {"running": 0, "ready": 0, "left-behind": 1}
    gate.set()
    engine.until(lambda: engine.dispatcher.counts()["left-behind"] == 0)


def test_a_partition_that_leaves_takes_its_gathered_calls_along(engine: Batching) -> None:
    activity = engine.activity(2)
    engine.push(activity, 1)
    engine.dispatcher.disown(0)
    assert engine.dispatcher.busy == 0 and engine.dispatcher.counts()["ready"] == 0
    engine.dispatcher.own(0, engine.store)
    engine.push(activity, 2)
    assert engine.answer("w1")["value"] == 10, "it lay in the store"


def test_a_workflow_tester_makes_a_batch_of_each_call() -> None:
    from kwflow import durable
    from kwflow.testing import WorkflowTester

    name = f"batched_{next(_names)}"
    source = f"""
import kwflow as kw
@kw.activity(name="{name}", retry=kw.Retry(max_attempts=1))
def one(n: int) -> int: ...
@kw.batch_of(one, size=10, within=60)
async def many(calls):
    return [ValueError("three") if call.arguments["n"] == 3 else call.arguments["n"] * 2 for call in calls]
def main(n):
    return (yield one(n))
"""
    tester = WorkflowTester(durable.load_source(name, source).main)
    tester.start("a", 2)
    assert tester.result("a") == 4
    tester.start("b", 3)
    assert "three" in tester.values("workflow-error")[0]


@pytest.mark.parametrize(("options", "said"), [
    ({"size": 0}, "an integer from 1 to 10,000, not 0"), ({"size": True}, "not True"), ({"size": 2, "within": -1}, "seconds of at least 0, not -1"),
    ({"size": 2, "within": 5}, "may wait 5 s for more calls, but each call has only 5 s"),
])  # fmt: skip
def test_a_batch_that_cannot_work_is_refused_where_it_is_declared(options: Any, said: str) -> None:
    """BW-6: the reference only warns, and because of a bug of its own practically never does."""
    activity = kw.activity(name=f"batched-{next(_names)}", timeout=5)(lambda n: n)
    with pytest.raises(kw.UsageError, match=said):
        kw.batch_of(activity, **options)(lambda calls: None)


def test_a_batch_belongs_to_one_activity_and_is_a_plain_function(engine: Batching) -> None:
    activity = engine.activity(2)
    with pytest.raises(kw.UsageError, match="has two batches"):
        kw.batch_of(activity, size=3)(lambda calls: None)
    with pytest.raises(kw.UsageError, match="takes an activity, not"):
        kw.batch_of(len, size=3)  # type: ignore[arg-type]
    other = kw.activity(name=f"batched-{next(_names)}")(lambda n: n)

    def generator(calls: list[kw.Call]) -> Iterator[int]:
        yield 1

    with pytest.raises(kw.UsageError, match="takes a function of a list"):
        kw.batch_of(other, size=3)(generator)
    with pytest.raises(kw.UsageError, match=r"call\.fail takes an exception"):
        kw.Call({}, None, lambda value, error: None).fail("no")  # type: ignore[arg-type]
