"""The executor of activities, with real threads and a real event loop: whatever an activity does, it ends as a record, and the next one runs."""

import asyncio
import gc
import itertools
import math
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

import kwflow as kw
from kwflow import durable
from kwflow.core.dispatch import Dispatch, Withdraw, decode, encode, state_key
from kwflow.core.wire import Headers
from kwflow.runners.activities import backlog, dispatch, threads
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.activities.heart import HEADERS, Heart
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.logs import as_json
from kwflow.testing import MemoryStore
from tests.waiting import until

_names = itertools.count()


class Engine:
    """The surroundings of a dispatcher: a store, commits, and a log of answers."""

    def __init__(self, concurrency: int = 4, limit_s: float = 600.0) -> None:
        self.store = MemoryStore()
        self.records: dict[str, Any] = {}  # workflow id -> the answer
        self.beats: list[Any] = []  # the details of heartbeats, in the order in which they were delivered; "answer" for an answer
        self.lines: list[str] = []
        self.refuse: Callable[[bytes], str | None] = lambda value: None
        self.dispatcher = Dispatcher(self.deliver, self.lines.append, concurrency, limit_s, 10_000)

    def deliver(self, partition: int, key: bytes, value: bytes, headers: Headers, done: Callable[[str | None], None]) -> None:
        refused = self.refuse(value)
        if refused is None and headers == HEADERS:
            self.beats.append(msgspec.json.decode(value)["details"])
        elif refused is None:
            self.beats.append("answer")
            assert key.decode() not in self.records, "answered twice"
            self.records[key.decode()] = msgspec.json.decode(value)
        done(refused)

    def start(self, activity: Any, *args: Any, id: str = "w", ref: str = "0:1", called_ms: int = 0) -> Dispatch:
        return self.commit(Dispatch(id, ref, activity.name, 1, ref, activity.encode_arguments(args, {}), called_ms=called_ms))

    def commit(self, item: Dispatch) -> Dispatch:
        self.store.apply({state_key(item.workflow_id, item.ref): encode(item)})
        self.dispatcher.committed(0, [item])
        return item

    def withdraw(self, item: Dispatch) -> None:
        self.store.apply({state_key(item.workflow_id, item.ref): None})
        self.dispatcher.committed(0, [Withdraw(item.workflow_id, item.ref)])

    def until(self, found: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not found():
            assert time.monotonic() < deadline, (self.records, self.lines)
            self.dispatcher.turn()
            time.sleep(0.001)

    def answer(self, id: str = "w") -> Any:
        self.until(lambda: id in self.records)
        return self.records[id]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    engine.dispatcher.own(0, engine.store)
    yield engine
    engine.dispatcher.close()


def make(function: Any, **options: Any) -> Any:
    return kw.activity(name=f"dispatch-{next(_names)}", **options)(function)


def test_what_the_log_takes_neither_as_a_result_nor_as_a_failure_is_told_of(engine: Engine) -> None:
    """G3, M6.3: this happens where an engine may not write to its own input. The workflow used to wait, and nobody was told why."""
    engine.refuse = lambda _: "not authorized"
    engine.start(make(lambda: 1))
    engine.until(lambda: engine.dispatcher.busy == 0)
    [line] = engine.lines  # nothing is reported of a failed attempt, because it is begun again
    assert line.startswith("the log refuses every result of activity dispatch-") and "not authorized; its workflow waits" in line


def test_a_call_that_no_thread_can_be_made_for_is_run_by_the_next_that_is_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """M6.3: a limit on the number of processes used to end the thread that receives delivery reports, and all calls waited forever."""
    gate = threading.Event()
    engine.start(make(lambda: gate.wait()), id="first", ref="0:1")

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for n in (1, 2):
            engine.start(make(lambda: "ran"), id=f"w{n}", ref=f"{n}:1")
        gate.set()
        assert [engine.answer(id)["value"] for id in ("first", "w1", "w2")] == [True, "ran", "ran"]
        engine.start(make(lambda: "again"), id="w3", ref="3:1")
        assert engine.answer("w3")["value"] == "again"


def test_a_def_and_an_async_def_answer_with_their_result(engine: Engine) -> None:
    """M6.2, M6.3."""

    async def later(x):
        await asyncio.sleep(0)
        return x + 1

    engine.start(make(lambda x: x * 2), 4, id="a")
    engine.start(make(later), 4, id="b")
    assert engine.answer("a") == {"ref": "0:1", "value": 8}
    assert engine.answer("b") == {"ref": "0:1", "value": 5}


HELPERS = """
def rows(log, more):
    try:
        yield 1
        yield 2
    finally:
        log.append("cleaned up")
"""


def test_what_an_activity_drops_is_cleaned_up_and_what_a_collection_finds_meanwhile_is_a_workflows_and_is_not(engine: Engine) -> None:
    """G8 is about workflows: an engine skips the cleanup of generators that it forgets, and cyclic collections run on any thread."""
    rows = durable.load_source("helpers_of_activities", HELPERS).rows
    log: list[str] = []

    def stops() -> int:
        for _ in rows(log, None):
            break
        return len(log)

    async def later() -> int:
        return stops()

    def collects() -> int:
        gc.collect()
        return len(log)

    before = durable.set_abandoning(True, everywhere=True)
    try:
        engine.start(make(stops), id="a")
        assert engine.answer("a")["value"] == 1
        engine.start(make(later), id="b")
        assert engine.answer("b")["value"] == 2
        more: list[Any] = []
        more.append(rows(log, more))
        next(more[0])
        del more
        engine.start(make(collects), id="c")
        assert engine.answer("c")["value"] == 2
    finally:
        durable.set_abandoning(before, everywhere=True)


def test_an_activity_knows_its_workflow_attempt_and_key(engine: Engine) -> None:
    """M6.4."""

    def who():
        info = kw.activity_info()
        return [info.workflow_id, info.attempt, info.idempotency_key]

    async def later():
        return who()

    for id, function in (("a", who), ("b", later)):
        activity = make(function)
        engine.commit(Dispatch(id, "9:2", activity.name, 3, "5:1", b"{}"))
        assert engine.answer(id)["value"] == [id, 3, f"{id}|5:1"]


def _returns_object():
    return object()


def _exits():
    raise SystemExit(3)


async def _exits_async():
    raise SystemExit(3)


def _interrupts():
    raise KeyboardInterrupt


async def _cancels_itself():
    raise asyncio.CancelledError


def _large():
    return "x" * 20_000


def _coroutine():
    return asyncio.sleep(0)


def _stops():
    raise StopIteration(1)


async def _leaves_a_bomb():
    async def bomb():
        raise SystemExit(9)

    asyncio.get_running_loop().create_task(bomb())
    await asyncio.sleep(0)
    return "fine"


@pytest.mark.parametrize(("function", "type_name", "final"), [
    (_exits, "SystemExit", False), (_exits_async, "SystemExit", False), (_interrupts, "KeyboardInterrupt", False), (_cancels_itself, "CancelledError", False),
    (_stops, "StopIteration", False), (_returns_object, "BadResult", True), (_coroutine, "BadResult", True), (_large, "ResultTooLarge", True),
])  # fmt: skip
def test_whatever_an_activity_does_it_ends_as_an_error_record_and_the_next_one_runs(engine: Engine, function: Any, type_name: str, final: bool) -> None:
    """A BaseException would end a thread, and SystemExit an event loop."""
    engine.start(make(function), id="bad")
    error = engine.answer("bad")["error"]
    assert (error["kind"], error["type"], error["final"]) == ("activity", type_name, final)
    engine.start(make(lambda: "fine"), id="after")
    assert engine.answer("after")["value"] == "fine"


def _refused(n):
    raise ConnectionError("refused")


async def _refused_async(n):
    _refused(n)


@pytest.mark.parametrize("function", [_refused, _refused_async])
def test_a_failed_attempt_is_logged_once_with_the_authors_traceback_and_what_comes_then(engine: Engine, function: Any) -> None:
    """M6.5: a warning while it is going to be tried again, an error for the last attempt. Log lines for machines have the traceback in a field of its own."""
    activity = make(function, retry=kw.Retry(max_attempts=2, first=3, jitter=0))
    for attempt in (1, 2):
        engine.commit(Dispatch(f"w{attempt}", "0:1", activity.name, attempt, "0:1", b'{"n":1}'))
        engine.answer(f"w{attempt}")
    again, last = engine.lines
    assert again.splitlines()[:2] == [f"activity {activity.name} of w1 (attempt 1) failed, next attempt in 3 s: ConnectionError: refused", "Traceback (most recent call last):"]
    assert "in _refused\n" in again and 'raise ConnectionError("refused")' in again and again.splitlines()[-1] == "ConnectionError: refused"
    assert "carry_out" not in again and "_run_async" not in again
    said = msgspec.json.decode(as_json(last))
    assert {name: said[name] for name in ("level", "message", "workflow", "activity", "attempt")} == {
        "level": "error", "message": f"activity {activity.name} of w2 (attempt 2) failed, it was the last attempt: ConnectionError: refused",
        "workflow": "w2", "activity": activity.name, "attempt": 2,
    }  # fmt: skip
    assert said["traceback"].startswith("Traceback (most recent call last):\n") and said["traceback"].endswith("\nConnectionError: refused")
    assert msgspec.json.decode(as_json(again))["level"] == "warning"


def _recurses(n):
    return _recurses(n + 1)


class _Hides(Exception):
    @property
    def __notes__(self):
        raise ValueError("no notes")


def _hides(n):
    raise _Hides


def _long(n):
    raise ValueError("x" * 1_000_000)


def _large_one(n):
    return "x" * 20_000


def _no_text(n):
    raise FileNotFoundError("caf\udce9.txt")  # a file name that is not UTF-8, as Python reads it


def _final(n):
    raise kw.ActivityError("no such account", "Account", final=True)


@pytest.mark.parametrize(("function", "level"), [(_recurses, "warning"), (_hides, "warning"), (_long, "warning"), (_no_text, "warning"), (_final, "error"), (_large_one, "error")])
def test_whatever_an_attempt_raises_its_line_is_one_of_a_bounded_size(engine: Engine, function: Any, level: str) -> None:
    """An error whose notes raise, or that is large, or that recurses. An error that is not tried again is logged as the last one."""
    engine.start(make(function), 1)
    engine.answer()
    [line] = engine.lines
    assert len(line.encode()) < 20_000 and msgspec.json.decode(as_json(line))["level"] == level


def test_a_log_that_cannot_be_written_keeps_no_workflow_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """M6.3: print raises where a pipe is closed, or where the output's encoding lacks a character."""

    def broken(line: str) -> None:
        raise BrokenPipeError

    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda told: raised.append(told.exc_type))
    engine = Engine()
    engine.dispatcher = Dispatcher(engine.deliver, broken)
    engine.dispatcher.own(0, engine.store)
    engine.start(make(_no_text), 1)
    assert engine.answer()["error"]["type"] == "FileNotFoundError"
    engine.until(lambda: raised and engine.dispatcher.counts()["running"] == 0)
    engine.dispatcher.close()


def test_an_outcome_is_no_failure_and_nothing_that_nobody_waits_for_is_logged(engine: Engine) -> None:
    """M6.5: a BusinessError is not logged, just as a result is not. A call that was cancelled has failed nobody."""
    begun = threading.Event()

    def declined():
        raise kw.BusinessError("declined")

    def waits():
        begun.set()
        kw.activity_info().wait_cancelled(10)
        raise ConnectionError("gone")

    engine.start(make(declined), id="a")
    engine.answer("a")
    item = engine.start(make(waits), id="b")
    assert begun.wait(10)
    engine.withdraw(item)
    engine.until(lambda: engine.dispatcher.busy == 0)
    assert engine.lines == []


def test_a_task_that_an_activity_left_behind_does_not_end_the_event_loop(engine: Engine) -> None:
    engine.start(make(_leaves_a_bomb), id="bad")

    async def fine():
        return "fine"

    engine.start(make(fine), id="after")
    assert engine.answer("after")["value"] == "fine"


def test_an_activity_over_the_limit_is_answered_for_and_told(engine: Engine) -> None:
    """An activity that hangs ends as a clear error at the yield."""
    engine.dispatcher.close()
    engine = Engine(limit_s=0.05)
    engine.dispatcher.own(0, engine.store)
    told = threading.Event()

    def hangs():
        while not kw.activity_info().wait_cancelled(0.01):
            continue
        told.set()

    async def hangs_async():
        await asyncio.Event().wait()

    for id, function in (("a", hangs), ("b", hangs_async)):
        engine.start(make(function), id=id)
        error = engine.answer(id)["error"]
        assert error["type"] == "Timeout"
        assert "had no result within 0.05 s (activity_limit_s: raise it, as a longer request_timeout of rest.call needs, or set @kw.activity(timeout=...)" in error["message"]
    assert told.wait(10)
    assert [line.partition(" failed, next attempt in ")[2].split(": ")[1] for line in engine.lines] == ["ActivityError"] * 2
    assert ", in wait (" in engine.lines[0]  # the place where it hung
    engine.until(lambda: engine.dispatcher.busy == 0)
    engine.dispatcher.close()


def test_the_slot_of_an_activity_that_ignores_its_cancellation_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LEFT_BEHIND_S", 0.05)
    engine = Engine(concurrency=1)
    engine.dispatcher.own(0, engine.store)
    gate = threading.Event()
    hung = engine.start(make(lambda: gate.wait()), id="hung", ref="0:1")
    engine.start(make(lambda: "ran"), id="next", ref="1:1")
    engine.withdraw(hung)
    assert engine.answer("next")["value"] == "ran"
    assert any("is still running although nobody waits for it, in " in line for line in engine.lines)
    gate.set()
    engine.until(lambda: engine.dispatcher._behind == 0)
    assert "hung" not in engine.records
    engine.dispatcher.close()


def test_an_async_activity_that_blocks_the_loop_is_named_and_others_get_a_new_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_STUCK_S", 0.05)
    gate, began = threading.Event(), threading.Event()

    async def blocks():
        began.set()
        gate.wait()

    async def fine():
        return "fine"

    engine.start(make(blocks), id="blocks")
    assert began.wait(10)
    engine.until(lambda: any("blocks the event loop" in line and "blocks (" in line or "wait (" in line for line in engine.lines))
    engine.start(make(fine), id="fine")
    assert engine.answer("fine")["value"] == "fine"
    gate.set()
    engine.answer("blocks")


def test_withdrawn_calls_are_not_begun_and_running_ones_are_told(engine: Engine) -> None:
    """M6.4."""
    gate, began, cancelled = threading.Event(), threading.Event(), threading.Event()
    blockers = [engine.start(make(lambda: gate.wait()), id=f"b{n}", ref=f"{n}:1") for n in range(3)]

    async def patient():
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    running = engine.start(make(patient), id="r", ref="3:1")
    ran: list[int] = []
    waiting = engine.start(make(lambda: ran.append(1)), id="q", ref="4:1")
    assert began.wait(10)
    engine.withdraw(waiting)
    engine.withdraw(running)
    assert cancelled.wait(10)
    gate.set()
    for blocker in blockers:
        engine.answer(blocker.workflow_id)
    engine.until(lambda: engine.dispatcher.busy == 0)
    assert ran == []
    assert not {"q", "r"} & engine.records.keys()


def test_a_call_that_is_made_again_while_the_cancelled_one_goes_on_is_begun_and_answered(engine: Engine) -> None:
    """M6.4: a fork that takes over the id of a terminated instance makes calls under the same ref."""
    gate, began = threading.Event(), threading.Event()
    begun = itertools.count()

    def first_blocks() -> int:
        number = next(begun)
        if not number:
            began.set()
            gate.wait()
        return number

    item = engine.start(make(first_blocks))
    assert began.wait(10)
    engine.withdraw(item)
    engine.commit(item)
    assert engine.answer("w") == {"ref": "0:1", "value": 1}
    assert engine.dispatcher.counts()["left-behind"] == 1
    gate.set()
    engine.until(lambda: engine.dispatcher.counts() == {"running": 0, "ready": 0, "left-behind": 0})


def test_a_call_that_is_made_again_before_the_delivery_of_its_old_answer_is_reported_is_begun_and_answered(engine: Engine) -> None:
    """A rewind, in a worker: it has read the new call when it learns, on another thread, that the log has the old answer."""
    reports: queue.SimpleQueue[Callable[[str | None], None]] = queue.SimpleQueue()
    engine.dispatcher._deliver = lambda partition, key, value, headers, done: reports.put(done)
    count = itertools.count(1)
    activity = make(lambda: next(count))
    call = engine.start(activity)
    first = reports.get(timeout=20)
    engine.withdraw(call)
    engine.commit(call)
    first(None)
    reports.get(timeout=20)(None)
    assert next(count) == 3 and engine.dispatcher.busy == 0


def test_an_async_function_that_has_answered_early_goes_on_when_its_calls_are_no_longer_waited_for(engine: Engine) -> None:
    """With `Call.complete`. It was cancelled if that was known before the delivery of the answer was reported."""
    engine.dispatcher._deliver = lambda partition, key, value, headers, done: delivered.put(done)
    delivered: queue.SimpleQueue[Callable[[str | None], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    activity, withdrawn = make(lambda: None), threading.Event()

    @kw.batch_of(activity, size=1)
    async def together(calls: list[kw.Call]) -> None:
        calls[0].complete()
        try:
            while not withdrawn.is_set():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            ended.put(f"returned, {calls[0].info.cancelled}")
        except asyncio.CancelledError:
            ended.put("cancelled")

    call = engine.start(activity)
    engine.until(lambda: not delivered.empty())
    engine.withdraw(call)
    withdrawn.set()
    assert ended.get(timeout=20) == "returned, False"
    delivered.get()(None)
    engine.until(lambda: engine.dispatcher.counts() == {"running": 0, "ready": 0, "left-behind": 0})


def test_an_async_call_withdrawn_before_its_first_line_gives_its_slot_back(engine: Engine) -> None:
    async def never(): ...

    activity = make(never)
    for n in range(50):
        engine.withdraw(engine.start(activity, id=f"w{n}", ref=f"{n}:1"))
    engine.until(lambda: engine.dispatcher.busy == 0 and engine.dispatcher._running == 0)


@pytest.mark.parametrize("entry", [b"", b"rubbish", b"5"])
def test_an_entry_of_a_call_that_nobody_can_read_is_named_and_hides_no_other(entry: bytes) -> None:
    """G3: it was damaged, or forged."""
    engine, activity = Engine(), make(lambda: 1)
    later = Dispatch("w", "2:1", activity.name, 1, "2:1", b"{}")
    engine.store.apply({state_key("w", "1:1"): entry, state_key("w", "2:1"): encode(later)})
    engine.dispatcher.own(0, engine.store)
    assert engine.answer() == {"ref": "2:1", "value": 1}
    [line] = engine.lines
    assert "0000000001\\x00w' cannot be read, and is not started" in line
    engine.dispatcher.close()


def test_ten_thousand_waiting_calls_stay_in_the_store_and_run_in_order_at_most_so_many_at_a_time(tmp_path: pathlib.Path) -> None:
    """M6.2: the queue does not grow in memory."""
    engine, held = Engine(concurrency=8), Embedded(tmp_path, sync=False)
    store = EmbeddedStore(held.db, "calls")
    engine.dispatcher.own(0, store)
    lock, order, now, most = threading.Lock(), [], [0], [0]

    def work(n):
        with lock:
            order.append(n)
            now[0] += 1
            most[0] = max(most[0], now[0])
        with lock:
            now[0] -= 1

    activity = make(work)
    items = [Dispatch(f"w{n % 100}", f"{n}:1", activity.name, 1, f"{n}:1", activity.encode_arguments((n,), {})) for n in range(10_000)]
    for item in items:
        held.db[store.prefix + state_key(item.workflow_id, item.ref)] = encode(item)
    engine.deliver = lambda partition, key, value, headers, done: done(None)  # type: ignore[method-assign]
    engine.dispatcher._deliver = engine.deliver
    engine.dispatcher.committed(0, items)
    assert engine.dispatcher.busy <= 8 + 64
    while len(order) < 10_000:
        engine.dispatcher.turn()
        assert engine.dispatcher.busy <= 8 + 64
    assert most[0] <= 8
    engine.until(lambda: engine.dispatcher.counts() == {"running": 0, "ready": 0, "left-behind": 0})
    assert sorted(order) == list(range(10_000))
    assert all(n - place <= 8 + 64 for place, n in enumerate(order)), "oldest first: what has not begun yet was taken out of the store before"
    engine.dispatcher.close()
    held.close()


def test_calls_of_records_that_were_held_wait_in_the_store_too_each_runs_once_and_one_that_was_withdrawn_never() -> None:
    """M6.2, K17: this is `dead-letters retry --all` after an outage. Their refs are older than those handed out meanwhile, and all of them used to be loaded into memory."""
    engine, gate, ran = Engine(concurrency=4), threading.Event(), []
    activity = make(lambda n: (gate.wait(), ran.append(n)) and None)
    engine.dispatcher.own(0, engine.store)
    engine.start(activity, 1000, id="newer", ref="1000:1")
    items = [engine.start(activity, n, id=f"w{n}", ref=f"{n}:1") for n in range(200)]
    assert engine.dispatcher.busy <= 4 + 32
    engine.withdraw(items[150])
    gate.set()
    engine.until(lambda: len(ran) == 200)
    engine.start(activity, 500, id="w500", ref="500:1")
    engine.until(lambda: engine.dispatcher.busy == 0)
    assert sorted(ran) == [*(n for n in range(200) if n != 150), 500, 1000]
    engine.dispatcher.close()


def test_a_new_owner_begins_what_lies_in_the_store_and_a_former_one_begins_nothing_more() -> None:
    """M6.5."""
    first, gate, began = Engine(concurrency=1), threading.Event(), threading.Event()
    first.dispatcher.own(0, first.store)
    activity = make(lambda: (began.set(), gate.wait()) and "done")
    for n in range(3):
        first.start(activity, id=f"w{n}", ref=f"{n}:1")
    assert began.wait(10)
    first.dispatcher.disown(0)
    second = Engine(concurrency=1)
    second.store = first.store
    second.dispatcher.own(0, second.store)
    gate.set()
    for n in range(3):
        assert second.answer(f"w{n}")["value"] == "done"
    first.until(lambda: first.dispatcher.busy == 0)
    assert set(first.records) == {"w0"}, "what ran when the partition went may still answer: late or repeated answers are ignored"


def test_what_runs_may_end_within_the_grace_period(engine: Engine) -> None:
    """M6.5: a partition that leaves does not wait for an activity of another partition."""
    began, gate, begun = threading.Event(), threading.Event(), time.monotonic()

    def slow():
        began.set()
        gate.wait(30)
        return "done"

    engine.start(make(slow))
    assert began.wait(10)
    engine.dispatcher.own(1, MemoryStore())
    engine.dispatcher.disown(1, 20)
    assert engine.records == {} and time.monotonic() - begun < 15
    threading.Timer(0.05, gate.set).start()
    engine.dispatcher.disown(0, 20)
    assert engine.records["w"]["value"] == "done"


def test_a_dispatcher_that_was_closed_waits_for_nothing_more(engine: Engine) -> None:
    """The partitions are revoked after the dispatcher was closed. A process that ended used to wait twice for an activity that does not end."""
    release = threading.Event()
    engine.start(make(lambda: release.wait(30)))
    engine.dispatcher.close(0)
    begun = time.monotonic()
    engine.dispatcher.disown(0, 30)
    assert time.monotonic() - begun < 20
    release.set()


def test_a_call_of_an_activity_that_is_not_here_waits_in_the_store_and_is_said_once(engine: Engine) -> None:
    """G10: nothing is lost when an engine with other code owns the partition for a while."""
    for n in range(3):
        engine.commit(Dispatch("w", f"{n}:1", "nowhere", 1, f"{n}:1", b"{}"))
    assert [line for line in engine.lines if "no activity 'nowhere'" in line] == engine.lines
    assert len(engine.lines) == 1
    assert len(engine.store.entries) == 3
    assert engine.dispatcher.busy == 0


def test_a_result_that_the_log_refuses_is_answered_with_the_reason(engine: Engine) -> None:
    """K11: the broker may accept less than kwflow does."""
    engine.refuse = lambda value: "message too large" if b"value" in value else None
    engine.start(make(lambda: "result"))
    error = engine.answer()["error"]
    assert error["type"] == "ResultTooLarge"
    assert "message too large" in error["message"]
    engine.until(lambda: engine.dispatcher.busy == 0)
    [line] = engine.lines
    assert "it was the last attempt: ActivityError: the log refuses the result" in line


@pytest.mark.parametrize("ends_late", [False, True])
def test_a_worker_ends_a_call_at_its_own_timeout_and_an_engine_leaves_that_to_the_workflows_timer(ends_late: bool) -> None:
    """M6.6: the record that withdraws the call may be further behind than a worker reads ahead."""
    engine, ended = Engine(), threading.Event()
    engine.dispatcher = Dispatcher(engine.deliver, engine.lines.append, limit_s=0.01, ends_late=ends_late)
    engine.dispatcher.own(0, engine.store)
    engine.start(make(lambda: ended.wait(10), timeout=0.05), id="a")
    if ends_late:
        assert "had no result within 0.05 s (its timeout=)" in engine.answer("a")["error"]["message"]
    else:
        begun = time.monotonic()
        engine.until(lambda: time.monotonic() > begun + 0.5)
        assert not engine.records
    ended.set()
    engine.until(lambda: engine.dispatcher.busy == 0)
    engine.dispatcher.close()


def test_each_attempt_is_counted_once_by_what_became_of_it_and_by_how_long_it_waited_before() -> None:
    """`/metrics`: a call that is withdrawn while it runs, one over its time that returns later, and those of a batch. When a call from an earlier kwflow was made, nobody knows."""
    engine, gate = Beating(), threading.Event()
    slow, dropped = make(lambda: gate.wait(20), timeout=0.05), make(lambda: gate.wait(20))
    engine.dispatcher = Dispatcher(engine.deliver, engine.lines.append, ends_late=True, threads=engine.clock)
    engine.dispatcher.own(0, engine.store)
    item = engine.start(dropped, id="dropped")
    engine.start(slow, id="slow", called_ms=engine.clock.now_ms() - 7_000)
    engine.withdraw(item)
    engine.advance(0.5)
    assert engine.answer("slow")["error"]["type"] == "Timeout"
    gate.set()
    engine.until(lambda: engine.dispatcher.busy == 0 and len(engine.dispatcher.ran) == 2)
    ran = {labels: sum(histogram.counts) for labels, histogram in engine.dispatcher.ran.items()}
    assert ran == {(slow.name, "timeout"): 1, (dropped.name, "cancelled"): 1}
    assert {labels: histogram.total // 1 for labels, histogram in engine.dispatcher.waited.items()} == {(slow.name,): 7}
    engine.dispatcher.close()


def test_context_variables_of_one_call_are_not_seen_by_the_next(engine: Engine) -> None:
    import contextvars

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")

    def stains():
        before = variable.get()
        variable.set("stained")
        return before

    activity = make(stains)
    for n in range(5):
        engine.start(activity, id=f"w{n}", ref=f"{n}:1")
        assert engine.answer(f"w{n}")["value"] == "clean"


def test_large_arguments_do_not_fill_the_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are kept ready are also bounded in bytes. The rest waits in the store."""
    monkeypatch.setattr(backlog, "_BYTES_MAX", 1000)
    gate = threading.Event()
    activity = make(lambda text: gate.wait() and len(text))
    for n in range(20):
        engine.start(activity, "x" * 500, id=f"w{n}", ref=f"{n}:1")
    assert engine.dispatcher.busy == 4 + 2
    gate.set()
    for n in range(20):
        assert engine.answer(f"w{n}")["value"] == 500
    assert engine.dispatcher.counts() == {"running": 0, "ready": 0, "left-behind": 0}


def test_a_partition_with_a_long_queue_does_not_keep_another_from_beginning() -> None:
    engine, gate, ran = Engine(concurrency=2), threading.Event(), []
    activity = make(lambda name: (gate.wait(), ran.append(name)) and None)
    other = MemoryStore()
    for name, store in (("a", engine.store), ("b", other)):
        items = [Dispatch(f"{name}{n}", f"{n}:1", activity.name, 1, f"{n}:1", activity.encode_arguments((name,), {})) for n in range(100)]
        store.apply({state_key(item.workflow_id, item.ref): encode(item) for item in items})
    engine.dispatcher.own(0, engine.store)
    engine.dispatcher.own(1, other)
    gate.set()
    engine.until(lambda: len(ran) == 200)
    assert "b" in ran[:30]
    engine.dispatcher.close()


def test_a_process_begins_so_many_calls_a_second_and_as_many_at_once_after_a_rest() -> None:
    """activity_rate: a batch counts as one call. The rest waits, and calls that are cancelled meanwhile are never begun."""
    now, begun = [100.0], list[int]()

    class Clock(threads.Threads):
        def monotonic(self) -> float:
            return now[0]

    store, answers = MemoryStore(), list[bytes]()
    made = Dispatcher(lambda partition, key, value, headers, done: (answers.append(key), done(None))[1], print, threads=Clock(), rate=2)
    made.own(0, store)
    noted = make(lambda number: begun.append(number))
    calls = [Dispatch(f"w{number}", "0:1", noted.name, 1, "0:1", noted.encode_arguments((number,), {})) for number in range(10)]
    store.apply({state_key(call.workflow_id, call.ref): encode(call) for call in calls})
    made.committed(0, calls)

    def until(count: int) -> None:
        deadline = time.monotonic() + 20
        while len(answers) < count:
            assert time.monotonic() < deadline
        made.turn()
        assert len(begun) == len(answers) == count

    until(2)
    for count in (2, 3, 3, 4):
        now[0] += 0.25
        made.turn()
        until(count)
    made.committed(0, [Withdraw("w4", "0:1"), Withdraw("w5", "0:1")])
    now[0] += 60
    made.turn()
    until(6)
    now[0] += 60
    made.turn()
    until(8)
    assert [sorted(begun[:2]), begun[2:4], sorted(begun[4:6]), sorted(begun[6:])] == [[0, 1], [2, 3], [6, 7], [8, 9]]  # two at once, on two threads
    made.close()


# -- heartbeats --------------------------------------------------------------------------------------------------------
class Clock(threads.Threads):
    """A clock that stands still between `advance`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Beating(Engine):
    """An engine with that clock, whose calls have given these details before."""

    def __init__(self, before: Any = None) -> None:
        super().__init__()
        self.clock = Clock()
        self.dispatcher = Dispatcher(self.deliver, self.lines.append, threads=self.clock, details=lambda store, call: lambda: before)
        self.dispatcher.own(0, self.store)

    def advance(self, seconds: float) -> None:
        """Let time pass while the engine turns."""
        steps = math.ceil(seconds)
        for _ in range(steps):
            self.clock.now += seconds / steps
            self.dispatcher.turn()


class Rounds:
    """Lets an activity go on round by round, with what it does in each."""

    def __init__(self) -> None:
        self.asked: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self.done: queue.Queue[object] = queue.Queue()

    def __call__(self) -> object:
        while (work := self.asked.get(timeout=20)) is not None:
            self.done.put(work())
        return self.done.qsize()

    def round(self, work: Callable[[], object]) -> object:
        self.asked.put(work)
        return self.done.get(timeout=20)


def test_details_are_sent_at_once_then_at_most_every_five_seconds_and_the_last_ones_when_the_attempt_fails() -> None:
    """A loop may give a heartbeat in each of its rounds."""
    engine, rounds = Beating("before"), Rounds()

    def works() -> None:
        rounds()
        raise ConnectionError("gone")

    engine.start(make(works, heartbeat=60))
    assert rounds.round(lambda: kw.activity_info().heartbeat_details) == "before"
    for n in range(100):
        rounds.round(lambda n=n: kw.activity_info().heartbeat(n))
    rounds.round(lambda: kw.activity_info().heartbeat())
    assert rounds.round(lambda: kw.activity_info().heartbeat_details) == 99
    assert engine.beats == [0]
    engine.advance(4.9)
    assert engine.beats == [0]
    engine.advance(0.2)
    assert engine.beats == [0, 99]
    rounds.round(lambda: kw.activity_info().heartbeat(100))
    rounds.asked.put(None)
    assert engine.answer()["error"]["type"] == "ConnectionError"
    assert engine.beats == [0, 99, 100, "answer"]
    engine.dispatcher.close()


@pytest.mark.parametrize("kind", ["def", "async", "batch"])
def test_an_attempt_that_gives_no_heartbeat_for_too_long_has_failed_and_is_cancelled(kind: str) -> None:
    """Its last details go ahead of the failure. One that gives them may take as long as it likes, beyond `activity_limit_s`."""
    engine, rounds, cancelled = Beating(), Rounds(), list[Any]()

    def works() -> None:
        rounds()
        cancelled.append(kw.activity_info().wait_cancelled(20))

    async def later() -> None:
        try:
            await asyncio.to_thread(rounds)
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    activity = make(later if kind == "async" else works, heartbeat=10)
    info = kw.activity_info
    if kind == "batch":
        def together(calls: list[kw.Call]) -> None:
            nonlocal info
            info = lambda: calls[0].info
            rounds()
            cancelled.append(calls[0].info.wait_cancelled(20))

        kw.batch_of(activity, size=1)(together)
    engine.start(activity)
    for n in range(100):
        rounds.round(lambda: info().heartbeat(n))
        engine.advance(9)
    assert not engine.records
    rounds.round(lambda: info().heartbeat("last"))
    rounds.asked.put(None)
    engine.advance(10.1)
    error = engine.answer()["error"]
    assert (error["type"], error["final"]) == ("HeartbeatTimeout", False)
    assert error["message"] == f"activity {activity.name} of w (attempt 1) gave no heartbeat within 10 s (its heartbeat=)"
    assert engine.beats[-2:] == ["last", "answer"]
    engine.until(lambda: cancelled == [True])
    engine.dispatcher.close()


def test_what_is_left_behind_has_sent_its_last_details_and_what_nobody_waits_for_sends_none() -> None:
    engine, rounds = Beating(), [Rounds(), Rounds()]
    items = [engine.start(make(lambda n=n: rounds[n](), heartbeat=60), id=f"w{n}", ref=f"{n}:1") for n in range(2)]
    for n in range(2):
        for details in ("first", "last"):
            rounds[n].round(lambda details=details: kw.activity_info().heartbeat(details))
    engine.withdraw(items[1])
    rounds[1].round(lambda: kw.activity_info().heartbeat("nobody waits"))
    assert engine.beats == ["first", "first"]
    engine.dispatcher.disown(0, 0)
    assert engine.beats == ["first", "first", "last"]
    for one in rounds:
        one.asked.put(None)
    engine.dispatcher.close()


def test_nobody_waits_for_another_thread_that_sends_details_and_that_thread_sends_the_last_ones_too() -> None:
    """Without a broker, a full producer blocks it for ever: an engine that stopped waited for it, and never ended."""
    full, sent = threading.Event(), list[Any]()

    def send(details: bytes, arrived: Callable[[], None]) -> bool:
        sent.append(msgspec.json.decode(details))
        full.wait(20)
        arrived()
        return True

    heart = Heart(60, time.monotonic, lambda: None, send)
    author = threading.Thread(target=heart.beat, args=("first",))
    author.start()
    until(lambda: sent)
    heart.beat("last")
    heart.flush()
    assert sent == ["first"]
    full.set()
    author.join(20)
    assert sent == ["first", "last"]


def test_an_engine_that_stops_waits_until_the_last_details_are_in_the_log() -> None:
    """A producer that is closed drops what it has not delivered yet."""
    store, delivered, rounds = MemoryStore(), list[str](), Rounds()

    def deliver(partition: int, key: bytes, value: bytes, headers: Headers, done: Callable[[str | None], None]) -> None:
        def later() -> None:
            delivered.append(msgspec.json.decode(value).get("details", "answer"))
            done(None)

        threading.Timer(0.2, later).start()

    dispatcher = Dispatcher(deliver, print)
    dispatcher.own(0, store)
    activity = make(lambda: rounds(), heartbeat=60)
    dispatcher.committed(0, [Dispatch("w", "0:1", activity.name, 1, "0:1", b"{}")])
    for details in ("first", "last"):
        rounds.round(lambda details=details: kw.activity_info().heartbeat(details))
    dispatcher.close()
    assert sorted(delivered) == ["first", "last"]
    rounds.asked.put(None)


def test_details_that_the_log_refuses_are_told_of_and_end_nothing() -> None:
    engine, rounds = Beating(), Rounds()
    engine.refuse = lambda value: "too large" if b"details" in value else None
    activity = make(lambda: rounds(), heartbeat=60)
    engine.start(activity)
    rounds.round(lambda: kw.activity_info().heartbeat("x"))
    rounds.asked.put(None)
    assert engine.answer()["value"] == 0
    assert engine.lines == [f"the log does not take the heartbeat details of activity {activity.name} of w (attempt 1): too large"]
    engine.dispatcher.close()


@pytest.mark.parametrize("kind", ["def", "async", "batch"])
def test_an_attempt_whose_earlier_details_cannot_be_asked_for_has_failed(kind: str) -> None:
    """Otherwise it would do again what was done. An `async def` asks before its first line, off its event loop."""
    engine = Beating()
    threads_asked = []

    def fails() -> None:
        threads_asked.append(threading.current_thread().name)
        raise TimeoutError("no answer")

    engine.dispatcher = Dispatcher(engine.deliver, engine.lines.append, details=lambda store, call: fails)
    engine.dispatcher.own(0, engine.store)

    async def later() -> None: ...

    activity = make(later if kind == "async" else lambda: kw.activity_info().heartbeat_details, heartbeat=60)
    if kind == "batch":
        async def together(calls: list[kw.Call]) -> None: ...

        kw.batch_of(activity, size=1)(together)
    engine.start(activity)
    assert engine.answer()["error"]["type"] == "TimeoutError"
    assert len(threads_asked) == 1 and "loop" not in threads_asked[0]
    engine.dispatcher.close()


def test_a_stop_of_the_process_is_no_silence_of_its_activities() -> None:
    """SIGSTOP, a frozen container, a paused machine: nobody could give a heartbeat, and perhaps another owner of the partition has begun the call again.

    A failure of this attempt would end that one.  Silence counts from then on.
    """
    engine, rounds = Beating(), Rounds()
    engine.start(make(lambda: rounds(), heartbeat=10))
    rounds.round(lambda: kw.activity_info().heartbeat())
    engine.advance(6)
    engine.clock.now += 3600
    engine.dispatcher.turn()
    engine.advance(3)
    assert not engine.records
    rounds.round(lambda: kw.activity_info().heartbeat())
    engine.advance(9.9)
    assert not engine.records
    engine.advance(0.9)
    assert engine.answer()["error"]["type"] == "HeartbeatTimeout"
    rounds.asked.put(None)
    engine.dispatcher.close()


def test_a_call_that_is_left_behind_neither_fails_nor_overwrites_what_the_next_owner_works_on() -> None:
    """M6.5: the same call runs there, under the same ref; only a result counts, whoever has it first."""
    engine, rounds = Beating(), Rounds()
    engine.start(make(lambda: rounds(), heartbeat=10))
    rounds.round(lambda: kw.activity_info().heartbeat(1))
    engine.dispatcher.disown(0, 0)
    engine.advance(6)
    rounds.round(lambda: kw.activity_info().heartbeat(2))
    engine.advance(30)
    assert (engine.beats, engine.records, engine.lines[1:]) == ([1], {}, [])
    rounds.asked.put(None)
    engine.until(lambda: not engine.dispatcher.busy)
    engine.dispatcher.close()


def test_a_call_whose_partition_comes_back_while_it_runs_gives_heartbeats_again() -> None:
    """Also those that it has given meanwhile: a function may say something once an hour."""
    engine, rounds = Beating(), Rounds()
    engine.start(make(lambda: rounds(), heartbeat=60))
    rounds.round(lambda: kw.activity_info().heartbeat(1))
    engine.dispatcher.disown(0, 0)
    engine.advance(6)
    rounds.round(lambda: kw.activity_info().heartbeat(2))
    engine.advance(6)
    assert engine.beats == [1]
    engine.dispatcher.own(0, engine.store)
    engine.advance(6)
    assert engine.beats == [1, 2]
    engine.advance(61)
    assert engine.answer()["error"]["type"] == "HeartbeatTimeout"
    rounds.asked.put(None)
    engine.dispatcher.close()


def test_a_stop_of_the_process_does_not_count_towards_the_limit_of_activities() -> None:
    engine, gate = Beating(), threading.Event()
    engine.start(make(lambda: gate.wait(20)))
    engine.advance(300)
    engine.clock.now += 3600
    engine.dispatcher.turn()
    engine.advance(290)
    assert not engine.records
    engine.advance(20)
    assert engine.answer()["error"]["type"] == "Timeout"
    gate.set()
    engine.dispatcher.close()


def test_an_engine_that_is_always_busy_notices_silence_all_the_same() -> None:
    engine, gate = Beating(), threading.Event()
    engine.start(make(lambda: gate.wait(20), heartbeat=10))
    for _ in range(6):
        engine.clock.now += 3
        engine.dispatcher.turn()
    assert engine.answer()["error"]["type"] == "HeartbeatTimeout"
    gate.set()
    engine.dispatcher.close()


def test_a_partition_that_others_own_already_is_told_nothing_of_the_calls_left_behind() -> None:
    """They have begun with what was given in time, and are further by now."""
    engine, rounds = Beating(), Rounds()
    engine.start(make(lambda: rounds(), heartbeat=60))
    for details in ("first", "last"):
        rounds.round(lambda details=details: kw.activity_info().heartbeat(details))
    engine.dispatcher.disown(0)
    assert engine.beats == ["first"]
    rounds.asked.put(None)
    engine.dispatcher.close()


def test_an_engine_that_stops_sends_the_details_that_are_given_in_its_grace_period() -> None:
    """What its activities say until they are left behind. Nobody turns any more, so only the end of the grace period can send them."""
    engine, rounds = Beating(), Rounds()
    engine.start(make(lambda: rounds(), heartbeat=60))
    rounds.round(lambda: kw.activity_info().heartbeat("before"))
    said = [lambda: None, lambda: rounds.round(lambda: kw.activity_info().heartbeat("in it"))]

    def wait(changed: threading.Condition, seconds: float) -> None:
        said.pop()()
        engine.clock.now += 6 - 2 * len(said)

    engine.clock.wait = wait  # type: ignore[method-assign]
    engine.dispatcher.close(8)
    assert engine.beats == ["before", "in it"]
    rounds.asked.put(None)


def test_without_a_broker_one_record_of_a_call_waits_for_it_and_then_the_last_details_are_sent() -> None:
    """The producer's queue is bounded, and results wait there too."""
    engine, rounds, waiting = Beating(), Rounds(), list[Callable[[str | None], None]]()
    deliver = engine.deliver
    engine.dispatcher._deliver = lambda *record: waiting.append(record[4]) or deliver(*record[:4], lambda _: None)
    engine.start(make(lambda: rounds(), heartbeat=60))
    for n in range(20):
        rounds.round(lambda n=n: kw.activity_info().heartbeat(n))
        engine.advance(6)
    assert engine.beats == [0]
    waiting.pop()(None)
    engine.advance(1)
    assert engine.beats == [0, 19]
    rounds.asked.put(None)
    engine.answer()
    for done in waiting:
        done(None)
    engine.dispatcher.close()


def test_details_arrive_in_the_order_in_which_they_were_given() -> None:
    """Later ones wait for earlier ones that a thread is about to send: the last in the log are the ones that count.

    1. The engine's thread takes details in order to send them, and is interrupted.
    2. The function gives further ones and fails, so these are sent now.
    3. If the first ones came after them, the next attempt would begin with them.
    """
    engine, rounds, sent = Beating(), Rounds(), threading.Event()
    begun, deliver = threading.Event(), engine.deliver

    def slowly(*record: Any) -> None:
        if b'"details":1}' in record[2]:
            begun.set()
            sent.wait(20)
        deliver(*record)

    engine.dispatcher._deliver = slowly

    def works() -> None:
        rounds()
        kw.activity_info().heartbeat(2)
        raise ConnectionError("gone")

    engine.start(make(works, heartbeat=60))
    for n in range(2):
        rounds.round(lambda n=n: kw.activity_info().heartbeat(n))
    turning = threading.Thread(target=lambda: engine.advance(6))
    turning.start()
    assert begun.wait(20)
    rounds.asked.put(None)
    [job] = engine.dispatcher._jobs.values()
    until(lambda: job.heart is not None and job.heart._unsent == b"2")
    sent.set()
    turning.join(20)
    engine.answer()
    assert engine.beats == [0, 1, 2, "answer"]
    engine.dispatcher.close()


def test_a_full_log_does_not_keep_the_dispatcher_from_being_told_of_deliveries() -> None:
    """M6.3: whoever waits for room in the log must not hold what the thread that makes room needs: nothing would ever go on."""
    engine, told = Beating(), list[str]()
    room, deliver = threading.Event(), engine.deliver

    def full(*record: Any) -> None:
        def makes_room() -> None:
            with engine.dispatcher._changed:
                told.append("room")
            room.set()

        threading.Thread(target=makes_room).start()
        assert room.wait(20)
        deliver(*record)

    engine.dispatcher._deliver = full
    gate = threading.Event()
    engine.start(make(lambda: gate.wait(20), heartbeat=10))
    engine.advance(11)
    assert told == ["room"] and engine.answer()["error"]["type"] == "HeartbeatTimeout"
    gate.set()
    engine.dispatcher.close()


def test_a_function_that_waits_for_its_details_is_not_silent() -> None:
    """In a worker, the engines may take a minute to answer, such as while they change owners."""
    engine, asked, answered = Beating(), threading.Event(), threading.Event()
    engine.dispatcher = Dispatcher(engine.deliver, engine.lines.append, threads=engine.clock, details=lambda store, call: lambda: (asked.set(), answered.wait(20), 7)[2])
    engine.dispatcher.own(0, engine.store)
    engine.start(make(lambda: kw.activity_info().heartbeat_details, heartbeat=10))
    assert asked.wait(20)
    engine.advance(50)
    engine.clock.now += 20
    engine.dispatcher.turn()
    answered.set()
    assert engine.answer()["value"] == 7
    engine.dispatcher.close()


def test_asking_for_details_takes_no_thread_that_activities_use_and_keeps_no_process_from_ending() -> None:
    """An `async def` asks before its first line. While the engines do not answer, `asyncio.to_thread` works for the others."""
    engine, answered = Beating(), threading.Event()
    engine.dispatcher = Dispatcher(engine.deliver, engine.lines.append, 60, details=lambda store, call: lambda: answered.wait(20))
    engine.dispatcher.own(0, engine.store)

    async def later() -> bool:
        return bool(kw.activity_info().heartbeat_details)

    async def other() -> int:
        return await asyncio.to_thread(lambda: 7)

    activity = make(later, heartbeat=60)
    for n in range(50):
        engine.start(activity, id=f"w{n}", ref=f"{n}:1")
    engine.start(make(other), id="other", ref="99:1")
    assert engine.answer("other")["value"] == 7
    asking = [thread for thread in threading.enumerate() if thread.name == "kwflow-activity-asks"]
    assert len(asking) == 50 and all(thread.daemon for thread in asking)
    answered.set()
    assert all(engine.answer(f"w{n}")["value"] for n in range(50))
    engine.dispatcher.close()


def test_looking_after_a_large_batch_takes_no_time_that_grows_with_its_square() -> None:
    """It is done five times a second on the engine's thread: with a thousand calls in a batch, that did nothing else any more."""
    engine, gate = Beating(), threading.Event()
    activity = make(lambda n: n, heartbeat=60)

    @kw.batch_of(activity, size=3000, within=60)
    def together(calls: list[kw.Call]) -> None:
        gate.wait(60)

    for n in range(3000):
        engine.start(activity, n, id=f"w{n}", ref=f"{n}:1")
    began = time.perf_counter()
    engine.advance(20)
    assert time.perf_counter() - began < 2
    gate.set()
    engine.answer("w0")
    engine.dispatcher.close()


def test_a_call_of_a_queue_is_left_to_its_workers_also_if_an_engine_without_workers_had_stored_it(engine: Engine) -> None:
    """Decision 0065: the state has moved to an engine with workers, and the call is in their queue."""
    engine.dispatcher.close()
    activity = make(lambda: "ran")
    for number in range(40):
        engine.start(activity, id=f"w{number}", ref=f"{number}:1")
    for key, stored in list(engine.store.entries.items()):
        if number_of_call(key) % 2:
            engine.store.apply({key: encode(msgspec.structs.replace(decode(stored), queue="q"))})
    engine.dispatcher = Dispatcher(engine.deliver, engine.lines.append, 1, hands_out=True)
    engine.dispatcher.own(0, engine.store)
    engine.commit(Dispatch("late", "50:1", activity.name, 1, "50:1", b"{}", queue="q"))
    engine.start(activity, id="last", ref="51:1")
    engine.answer("last")
    assert engine.records.keys() == {"last", *(f"w{number}" for number in range(0, 40, 2))}


def number_of_call(key: bytes) -> int:
    return int(key.split(b"\0")[2])
