"""Each limit of Config one below its edge, at it, and one past it. What fits is done; what does not is refused with the limit, the place and the remedy.

A number in Config is a limit unless OTHERWISE says what else it is. A number with neither a row in EDGES nor a place in OTHERWISE
fails the suite, and so does a place in OTHERWISE that does not test it.
"""

import ast
import asyncio
import itertools
import math
import pathlib
import re
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

import kwflow as kw
import kwflow.client.futures
from kwflow import durable
from kwflow.client import Client
from kwflow.config import Config, load_config
from kwflow.core.contract import Limits, Workflows
from kwflow.core.dispatch import PREFIX, Dispatch, encode, size_of, state_key
from kwflow.core.values import LEVELS_MAX
from kwflow.core.wire import Headers, Record
from kwflow.errors import StepTimeout, UsageError
from kwflow.gateway.application import application
from kwflow.gateway.service import Service
from kwflow.ports import Decision
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.activities.threads import Threads
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.instances import newest_of
from kwflow.runners.kafka.environment import _Live
from kwflow.runners.kafka.standby import Cleanup
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.runners.watchdog import Watchdog
from kwflow.testing import MemoryStore
from tests.spec.test_limits import NOW_MS, SOURCE, Engine, result

ROOT = pathlib.Path(__file__).parents[2]
ASKED = (("kwflow-request", b"r"), ("kwflow-reply-to", b"0/me"))
DEADLINE_S = 20
_names = itertools.count()

OTHERWISE = {
    "process": "a number that names a process",
    "supervisor_pid": "a number that names a process",
    "client_connect_s": "how long librdkafka waits: tests/integration/test_client.py::test_a_client_without_broker_or_topics_is_refused_when_it_is_made",
    "wait_for_broker_s": "how long a start asks again: tests/integration/test_kafka_engine.py::test_missing_or_wrong_topics_stop_the_engine_with_one_line",
    "activity_rate": "in a second, on a clock: tests/unit/test_dispatch.py::test_a_process_begins_so_many_calls_a_second_and_as_many_at_once_after_a_rest",
    "rocksdb_bytes_max": "RocksDB flushes earlier: tests/spec/test_limits.py::test_all_stores_of_a_process_share_one_cache_and_one_write_buffer_manager",
}


@dataclass(frozen=True)
class Edge:
    """`probe(limit, amount)` returns "" if this amount fits under this limit, else the message. `past`: the first excess over the limit."""

    limit: str
    sentence: str
    at: int
    probe: Callable[[int, int], str]
    said: str
    past: int = 1


# -- what a step asks for ----------------------------------------------------------------------------------------------
def in_a_step(limit: str, kind: str, less: int = 0) -> Callable[[int, int], str]:
    """Started with this kind and amount; `less` is the part of the amount that is overhead."""

    def probe(at: int, amount: int) -> str:
        made = Engine(**{limit: at}).start(kind, amount - less)
        if made.counts == ("started",) and not made.outputs:
            return ""  # it waits
        topic, value = result(made)
        return "" if topic == "workflow-result" else str(value)

    return probe


def _told(at: int, bytes_: int) -> str:
    """The text of an error record also has the name of its type, and quotes."""
    _, value = result(Engine(value_bytes_max=at).start("raise", bytes_ - len('"ValueError: "')))
    return "" if value.endswith("x") else str(value)


def _replied(at: int, bytes_: int) -> str:
    """A reply may be half as large as a record."""
    engine = Engine(value_bytes_max=2 * at)
    engine.start("reply", bytes_)
    made = engine.batch(engine.record("a", b'{"name":"u","value":1}', (("kwflow-op", b"update"), *ASKED)))[0]
    return "" if (last := result(made))[0] == "workflow-result" else str(last[1])


def _arguments(at: int, bytes_: int) -> str:
    engine, work = Engine(activity_bytes_max=at), make(lambda text: text)
    engine.module.WORK[:] = [work]
    made = engine.start("call", bytes_ - len(work.encode_arguments(("",), {})))
    return "" if made.dispatch else str(result(made)[1])


def _kept(at: int, bytes_: int, header: int = 0) -> str:
    """A call of an activity counts as the entry that is kept of it: id, name, arguments, and the headers and the time of the step's record."""
    engine, work = Engine(output_bytes_max=at), make(lambda text: text)
    engine.module.WORK[:] = [work]
    headers = (("x", b"x" * header),) if header else ()
    empty = Dispatch("a", "0:1", work.name, 1, "0:1", work.encode_arguments(("",), {}), headers, NOW_MS)
    made = engine.batch(engine.record("a", b"new:" + msgspec.json.encode(["call", bytes_ - size_of(empty)]), headers))[0]
    assert [len(key) + len(entry) for key, entry in engine.store.scan(PREFIX)] == [bytes_] * len(made.dispatch)
    return "" if made.dispatch else str(result(made)[1])


def _size_of_state(held: int) -> int:
    engine = Engine()
    engine.start("state", held)
    return len(engine.store.entries[b"a"])


def _held(bytes_: int) -> int:
    """How much an instance must hold for its snapshot to have this many bytes."""
    held = 1000 + bytes_ - _size_of_state(1000)
    assert _size_of_state(held) == bytes_
    return held


def _saved(at: int, bytes_: int) -> str:
    engine = Engine(snapshot_bytes_max=at)
    made = engine.start("state", _held(bytes_))
    return made.logs[0] if made.counts == ("parked",) else ""


def _warned(at: int, bytes_: int) -> str:
    engine = Engine(snapshot_bytes_warn=at)
    return "".join(engine.start("state", _held(bytes_)).logs)


# -- what comes in -------------------------------------------------------------------------------------------------------
def refusal(made: Decision) -> str:
    """The message of a dead letter."""
    return (dict(made.outputs[0].headers)["kwflow-error-message"] or b"").decode() if made.counts == ("dead-letter",) else ""


def _input(at: int, bytes_: int) -> str:
    engine = Engine(value_bytes_max=at)
    return refusal(engine.batch(engine.record("a", b'new:["waits",1]'.ljust(bytes_)))[0])


def _input_headers(at: int, bytes_: int) -> str:
    engine = Engine(header_bytes_max=at)
    return refusal(engine.batch(engine.record("a", b'new:["waits",1]', (("h", b"x" * (bytes_ - 1)),)))[0])


def _timer(at: int, bytes_: int) -> str:
    record = Record("workflow-scheduler", 0, 0, 0, b"a|x", b"1".ljust(bytes_, b"0"))
    return refusal(TimerProcessor(Config(value_bytes_max=at)).decide(Overlay(MemoryStore()), [record], 0)[0])


def mail(limits: dict[str, int], sizes: list[int], op: str = "signal", asked: bool = True) -> str:
    """Sends messages of these sizes to an instance that reads none; returns the answer to the last."""
    engine, made = Engine(**limits), Decision()
    engine.start("mail", 0)
    for size in sizes:
        made = engine.batch(engine.record("a", b'{"name":"s","value":""}'.ljust(size), (("kwflow-op", op.encode()), *(ASKED if asked else ()))))[0]
    if not asked:
        return refusal(made)
    reply = msgspec.json.decode(made.replies[0].value or b"")
    return "" if reply["status"] == "delivered" else f"{reply['status']}: {reply['message']}"


def _hold(at: int, records: int) -> str:
    """Parked by its first record."""
    engine = Engine(hold_max=at, snapshot_bytes_max=3000)
    made = [engine.start("state", 5000), *(engine.batch(engine.record("a", b'{"ref":"more"}'))[0] for _ in range(records - 1))]
    return refusal(made[-1])


def _paused(at: int, records: int) -> str:
    engine = Engine(hold_max=at)
    engine.start("state", 10)
    engine.batch(engine.record("a", b'{"reason":""}', (("kwflow-op", b"pause"),)))
    return refusal(engine.batch(*(engine.record("a", b'{"ref":"more"}') for _ in range(records)))[-1])


# -- what a transaction holds --------------------------------------------------------------------------------------------
class Manual:
    """A clock that the test moves."""

    def __init__(self, at: list[int] | None = None) -> None:
        self.at = at or [0]

    def now_ms(self) -> int:
        return self.at[0]


def batches(starts: list[tuple[str, int]], **limits: Any) -> str:
    """How many records each batch of the embedded engine took; "" if there was one batch."""
    module = durable.load_source("limits", SOURCE, "limits.py")
    config = Config(**limits)
    with tempfile.TemporaryDirectory() as directory:
        held = Embedded(pathlib.Path(directory), config, sync=False, clock=Manual(module.CLOCK))
        processors = [WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset({"out"}), held.incarnation)]
        for number, (kind, amount) in enumerate(starts):
            held.append(config.resume_topic, b"%c" % (97 + number), b"new:" + msgspec.json.encode([kind, amount]))
        sizes = []
        while made := held.step(processors):
            sizes.append(made)
        held.close()
    assert sum(sizes) == len(starts)
    return "" if len(sizes) == 1 else str(sizes)


def _records(at: int, records: int) -> str:
    return batches([("takes", 0)] * records, batch_records_max=at)


def _bytes(at: int, bytes_: int) -> str:
    """Two records, each with an output of its own and its result, keys included."""
    first = bytes_ // 2
    return batches([("value", size - len('aa"fine"')) for size in (first, bytes_ - first)], batch_bytes_max=at)


def _ms(at: int, ms: int) -> str:
    return batches([("takes", ms), ("takes", 0)], batch_ms_max=at)


# -- what is kept --------------------------------------------------------------------------------------------------------
def kept_live(instances: int, **limits: int) -> str:
    """How many of these instances stayed live, if not all did. None lost anything by it, and no cleanup ran (G8)."""
    engine = Engine(**limits)
    engine.batch(*(engine.record(f"i{number}", b'new:["state",1000]') for number in range(instances)))
    kept = len(engine.processor.live)
    assert engine.module.CLEANED == []
    for number in range(instances):
        assert engine.batch(engine.record(f"i{number}", b'{"ref":"more"}'))[0].counts == ("resumed",)
    return "" if kept == instances else f"{kept} of {instances} are live"


def _cached_bytes(at: int, bytes_: int) -> str:
    """Two snapshots that together have as many bytes as `bytes_` says, from `at`."""
    engine = Engine()
    engine.batch(engine.record("i0", b'new:["state",1000]'))
    return kept_live(2, instances_cached_bytes_max=2 * len(engine.store.entries[b"i0"]) - (bytes_ - at))


def _trimmed(at: int, age_ms: int) -> str:
    clock, config = Manual(), Config(embedded_retention_ms=at)
    timers = TimerProcessor(config)
    with tempfile.TemporaryDirectory() as directory:
        held = Embedded(pathlib.Path(directory), config, sync=False, clock=clock)
        held.append(config.scheduler_topic, b"a|x", b"1000000")
        held.step([timers])
        clock.at[0] += age_ms
        gone = held.trim([timers])
        held.close()
    return f"{gone} deleted" if gone else ""


def _trimmed_outputs(at: int, age_ms: int) -> str:
    clock, config = Manual(), Config(embedded_outputs_retention_ms=at)
    with tempfile.TemporaryDirectory() as directory:
        held = Embedded(pathlib.Path(directory), config, sync=False, clock=clock)
        held.append("out", b"a", b"1")
        clock.at[0] += age_ms
        gone = held.trim([])
        held.close()
    return f"{gone} deleted" if gone else ""


def _start_again(at: int, after_ms: int) -> str:
    """K20."""
    engine = Engine(ended_retention_ms=at)
    started = [engine.batch(engine.record("a", b'new:["headers",1]', (("kwflow-start-id", b"mine"),)), received_ms=NOW_MS + ms)[0].counts[0] for ms in (0, after_ms)]
    return "" if started == ["started", "duplicate-start"] else str(started)


def _ended(at: int, after_ms: int) -> str:
    engine = Engine(ended_retention_ms=at)
    engine.batch(engine.record("a", b'new:["headers",1]', (("kwflow-start-id", b"mine"),)))
    return "".join(engine.due(NOW_MS + after_ms))


class Later(_Live):
    """The real environment at a given time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def _copies(at: int, seconds: int) -> str:
    environment = Later(1 << 20)
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "3").mkdir()
        cleanup = Cleanup(environment, pathlib.Path(directory), at)
        cleanup.look(set())
        environment.now += seconds
        return "".join(f"{path.name} deleted" for path in cleanup.look(set()))


# -- how long -----------------------------------------------------------------------------------------------------------
def run_for(dog: Watchdog, ms: int) -> None:
    """A step of author code that swallows what ends it. Raises StepTimeout all the same."""

    def step() -> None:
        dog._begun = float(math.floor(dog._begun))  # so that the sum below is exact, however long the machine has been up
        try:
            dog.look(dog._begun + ms / 1000)
            for _ in range(1000):  # it is raised between two instructions
                pass
        except StepTimeout:
            pass

    dog.run("w", step)


def _reported(at: int, ms: int) -> str:
    dog, lines = Engine(step_timeout_ms=at, step_abort_ms=10 * at).processor.watchdog, list[str]()
    dog._on_log = lines.append
    run_for(dog, ms)
    return "".join(lines)


def _aborted(at: int, ms: int) -> str:
    try:
        run_for(Engine(step_timeout_ms=10 * at, step_abort_ms=at).processor.watchdog, ms)
    except StepTimeout as error:
        return str(error)
    return ""


def _command(at: int, seconds: int) -> str:
    """A command to an engine that does not run, on the test's clock."""
    now = [1000.0]
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kwflow.client.futures, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
        held = Embedded(pathlib.Path(directory), Config(command_timeout_s=at), sync=False)
        with Client.embedded(held, held.limits) as client:
            asked = client.query("w")
            now[0] += seconds
            client.on_tick()
            said = f"{type(asked.exception(0)).__name__}: {asked.exception(0)}" if asked.done() else ""
        held.close()
    return said


# -- the gateway -------------------------------------------------------------------------------------------------------
def _gateway(config: Config, ask: Callable[[Service], str]) -> str:
    """The answer of a gateway whose engine does not run."""
    with tempfile.TemporaryDirectory() as directory:
        held = Embedded(pathlib.Path(directory), config, sync=False)
        with Service(config, lambda: Client.embedded(held, config), lambda wanted, limit: newest_of((), limit)) as service:
            said = ask(service)
        held.close()
    return said


def _waits(at: int, requests: int) -> str:
    """The last of this many requests that wait at the same time."""
    async def last(service: Service) -> httpx.Response:
        service.waiting = requests - 1
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application(service)), base_url="http://gateway") as http:
            return await http.get("/metrics")

    def ask(service: Service) -> str:
        answer = asyncio.run(last(service))
        return "" if answer.status_code == 200 else f"{answer.json()['detail']}; {answer.json()['remedy']}"

    return _gateway(Config(gateway_waits_max=at), ask)


def _long_wait(at: int, seconds: int) -> str:
    def ask(service: Service) -> str:
        try:
            assert service.seconds(seconds) == seconds
        except UsageError as error:
            return str(error)
        return ""

    return _gateway(Config(gateway_wait_s_max=at), ask)


# -- activities --------------------------------------------------------------------------------------------------------
def make(function: Any) -> Any:
    return kw.activity(name=f"edges-{next(_names)}")(function)


class Hours(Threads):
    """Real threads and the test's clock: waiting moves it, and at `until` what `then` says happens."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.until = 0.0, math.inf
        self.then: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        self.now += seconds
        if self.now > self.until - 1e-6:
            self.until = math.inf
            self.then()
            changed.wait(DEADLINE_S)


class Calls:
    """Activities of an engine with this configuration, and their answers."""

    def __init__(self, **limits: int) -> None:
        self.engine, self.answers, self.lines, self.store = Engine(**limits), dict[str, Any](), list[str](), MemoryStore()
        self.engine.processor.on_log = self.lines.append
        self.dispatcher: Dispatcher = self.engine.processor.work(self.deliver)
        self.hours = self.dispatcher._threads = Hours()
        self.dispatcher.own(0, self.store)

    def deliver(self, partition: int, key: bytes, value: bytes, headers: Headers, done: Callable[[str | None], None]) -> None:
        self.answers[key.decode()] = msgspec.json.decode(value)
        done(None)

    def call(self, activity: Any, *arguments: Any, id: str = "w") -> None:
        item = Dispatch(id, "0:1", activity.name, 1, "0:1", activity.encode_arguments(arguments, {}))
        self.store.apply({state_key(id, "0:1"): encode(item)})
        self.dispatcher.committed(0, [item])

    def until(self, found: Callable[[], object]) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while not found():
            assert time.monotonic() < give_up, (self.answers, self.lines)
            self.dispatcher.turn()
            time.sleep(0.001)

    def message(self) -> str:
        error = self.answers["w"].get("error")
        return f"{error['type']}: {error['message']}" if error else ""


def answered(at: int, bytes_: int, function: Any, limit: str = "activity_bytes_max", less: int = 2) -> str:
    calls = Calls(**{limit: at})
    calls.call(make(function), bytes_ - less)
    calls.until(lambda: calls.answers)
    calls.dispatcher.close()
    return calls.message()


async def _later(size: int) -> str:
    return "x" * size


def _at_a_time(at: int, number: int) -> str:
    """How many wait, if any do; all get their turn."""
    calls, gate = Calls(activity_concurrency=at), threading.Event()
    work = make(lambda: gate.wait(DEADLINE_S))
    for one in range(number):
        calls.call(work, id=f"w{one}")
    counts = calls.dispatcher.counts()
    gate.set()
    calls.until(lambda: len(calls.answers) == number)
    calls.dispatcher.close()
    assert counts["running"] == min(at, number)
    return f"{counts['ready']} waits" if counts["ready"] else ""


def _hangs(at: int, seconds: int) -> str:
    calls, gate = Calls(activity_limit_s=at), threading.Event()
    calls.call(make(lambda: gate.wait(DEADLINE_S)))
    steps = min(seconds, 1000)
    for _ in range(steps):  # as a single long one, a stop of the process, does not count
        calls.hours.now += seconds / steps
        calls.dispatcher.turn()
    said = calls.message() if calls.answers else ""
    gate.set()
    calls.until(lambda: calls.answers and not calls.dispatcher.busy)
    calls.dispatcher.close()
    return said


def _grace(at: int, seconds: int) -> str:
    """An activity that goes on for so long after the engine was told to stop."""
    gate, hours, lines, answers = threading.Event(), Hours(), list[str](), list[bytes]()
    config = Config(activity_grace_s=at)
    module = durable.load_source("limits", SOURCE, "limits.py")
    module.WORK[:] = [make(lambda text: gate.wait(DEADLINE_S))]
    hours.until, hours.then = seconds, gate.set
    with tempfile.TemporaryDirectory() as directory:
        held = Embedded(pathlib.Path(directory), config, sync=False)
        processor = WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation, lines.append)
        workers: list[Dispatcher] = []

        def work(deliver: Any) -> Dispatcher:
            workers.append(WorkflowProcessor.work(processor, lambda number, key, value, headers, done: (answers.append(value), deliver(number, key, value, headers, done)) and None))
            workers[0]._threads = hours
            return workers[0]

        processor.work = work  # type: ignore[method-assign]
        held.append(config.resume_topic, b"a", b'new:["call",1]')
        held.run([processor], lambda: bool(workers and workers[0].counts()["running"]), lines.append)
        said = "" if answers else "".join(lines)
        gate.set()
        give_up = time.monotonic() + DEADLINE_S
        while workers[0].busy and time.monotonic() < give_up:
            time.sleep(0.001)
        held.close()
    return said


EDGES = [
    Edge("outputs_max", "outputs of one step", 5, in_a_step("outputs_max", "outputs"), r"more than 5 outputs in one step .limit outputs_max.; wait in between"),
    Edge("output_bytes_max", "bytes of all outputs of one step, keys included", 50, in_a_step("output_bytes_max", "value", 1), r"outputs and activity calls of one step .* 50 bytes .limit output_bytes_max.; wait in between"),
    Edge("output_bytes_max", "bytes that are kept of a call of an activity", 200, _kept, r"outputs and activity calls of one step .* 200 bytes .limit output_bytes_max.; wait in between"),
    Edge("output_bytes_max", "headers that go on with a call of an activity", 400, lambda at, n: _kept(at, n, 150), r"outputs and activity calls of one step .* 400 bytes .limit output_bytes_max."),
    Edge("output_bytes_max", "outputs of two bytes each, keys included", 25, lambda at, n: in_a_step("output_bytes_max", "outputs")(2 * at, n), r"outputs and activity calls of one step .* 50 bytes .limit output_bytes_max."),
    Edge("value_bytes_max", "bytes of an output", 300, in_a_step("value_bytes_max", "value"), r"an output to out has 301 bytes, more than 300 .limit value_bytes_max.; send a reference"),
    Edge("value_bytes_max", "bytes of a result", 300, in_a_step("value_bytes_max", "result"), r"the result has 301 bytes, more than 300 .limit value_bytes_max.; return a reference"),
    Edge("value_bytes_max", "bytes of an error's text", 80, _told, r"ValueError: its text has 81 bytes .limit value_bytes_max."),
    Edge("value_bytes_max", "twice the bytes of a reply", 300, _replied, r"a reply can have at most 300 bytes, not 301 .half of limit value_bytes_max.; reply with a reference"),
    Edge("value_bytes_max", "bytes of an input", 60, _input, r"the value has 61 bytes, more than 60 .limit value_bytes_max.; send a reference or raise the limit, then retry"),
    Edge("value_bytes_max", "bytes of the record that has an activity's result", 100, lambda at, n: answered(at, n, lambda size: "x" * size, "value_bytes_max", len('{"ref":"0:1","value":""}')),
         r"ResultTooLarge: the result of activity edges-\d+ has 101 bytes, more than value_bytes_max = 100; return a reference"),
    Edge("value_bytes_max", "bytes of a timer", 5, _timer, r"the value has 6 bytes, more than 5 .limit value_bytes_max."),
    Edge("header_bytes_max", "bytes of an output's headers", 50, in_a_step("header_bytes_max", "headers"), r"the headers of an output to out have 51 bytes, more than 50 .limit header_bytes_max.; put the data into the value"),
    Edge("header_bytes_max", "bytes of an input's headers", 60, _input_headers, r"the headers have 61 bytes, more than 60 .limit header_bytes_max.; put data into the value or raise the limit, then retry"),
    Edge("waits_max", "pending waits of an instance", 5, in_a_step("waits_max", "waits"), r"more than 5 pending waits .limit waits_max.; wait for fewer"),
    Edge("tasks_max", "unsettled tasks of an instance", 5, in_a_step("tasks_max", "tasks"), r"more than 5 tasks in one workflow .limit tasks_max.; wait for some"),
    Edge("nesting_max", "tasks that start inside one another's start", 6, in_a_step("nesting_max", "nesting", 1), r"inside one another more than 6 deep .limit nesting_max.; use yield from"),
    Edge("mailbox_max", "unread signals of an instance", 4, lambda at, n: mail({"mailbox_max": at}, [23] * n), r"full: the mailbox holds 4 messages .* mailbox_max = 4.*; send it again"),
    Edge("mailbox_max", "unread signals of an instance when nobody waits for a reply", 4, lambda at, n: mail({"mailbox_max": at}, [23] * n, asked=False), r"the mailbox holds 4 messages .* mailbox_max = 4.*; send it again"),
    Edge("mailbox_bytes_max", "bytes of the unread signals of an instance", 100, lambda at, n: mail({"mailbox_bytes_max": at}, [40, n - 40]), r"full: the mailbox holds 1 messages of 40 bytes .* mailbox_bytes_max = 100.; send it again"),
    Edge("activity_bytes_max", "bytes of an activity's arguments", 100, _arguments, r"the arguments of activity edges-\d+ have 101 bytes, more than 100 .limit activity_bytes_max.; pass a reference"),
    Edge("activity_bytes_max", "bytes of the result of a def", 100, lambda at, n: answered(at, n, lambda size: "x" * size), r"ResultTooLarge: the result of activity edges-\d+ has 101 bytes, more than activity_bytes_max = 100; return a reference"),
    Edge("activity_bytes_max", "bytes of the result of an async def", 100, lambda at, n: answered(at, n, _later), r"ResultTooLarge: the result of activity edges-\d+ has 101 bytes, more than activity_bytes_max = 100; return a reference"),
    Edge("activity_concurrency", "activities that run at the same time", 3, _at_a_time, r"^1 waits$"),
    Edge("activity_limit_s", "seconds that an activity may run", 600, _hangs, r"Timeout: activity edges-\d+ of w .attempt 1. had no result within 600 s .activity_limit_s: raise it, .* or set @kw.activity.timeout="),
    Edge("activity_grace_s", "seconds that an activity may still take when its engine ends", 10, _grace, r"activity edges-\d+ of a .attempt 1. is still running; the next engine starts it again"),
    Edge("hold_max", "records that a parked instance holds, the one at fault included", 4, _hold, r"a already holds 4 records .limit hold_max.; retry or discard what it holds, then retry this dead letter"),
    Edge("hold_max", "records that a paused instance holds", 4, _paused, r"a already holds 4 records .limit hold_max.; unpause it, then retry this dead letter"),
    Edge("snapshot_bytes_max", "bytes of a snapshot", 5000, _saved, r"a is parked: SnapshotError: the snapshot has 5001 bytes, more than snapshot_bytes_max = 5000, most of them in variable 'held' of main .*py:\d+.; keep less in variables"),
    Edge("snapshot_bytes_warn", "bytes of a snapshot that nobody is warned of", 5000, _warned, r"a: its snapshot now has 5001 bytes .snapshot_bytes_warn = 5000., most of them in variable 'held' of main .*py:\d+.; above 900000 it is parked"),
    Edge("batch_records_max", "records of a transaction", 7, _records, r"^\[7, 1\]$"),
    Edge("batch_bytes_max", "bytes of a transaction", 200, _bytes, r"^\[1, 1\]$"),
    Edge("batch_ms_max", "ms of stepping before a transaction takes one more record", 100, _ms, r"^\[1, 1\]$", past=0),
    Edge("instances_cached_max", "instances that stay live", 3, lambda at, n: kept_live(n, instances_cached_max=at), r"^3 of 4 are live$"),
    Edge("instances_cached_bytes_max", "bytes of the snapshots of live instances", 1000, _cached_bytes, r"^1 of 2 are live$"),
    Edge("step_timeout_ms", "ms that a step runs before it is told", 10**7, _reported, r"w: its step has been running for 10000.0 s, now at .*test_edges.py:\d+", past=0),
    Edge("step_abort_ms", "ms that a step may run", 10**7, _aborted, r"more than 10000 s without reaching a wait .limit step_abort_ms.; do long work in an activity", past=0),
    Edge("embedded_retention_ms", "ms that applied input is kept", 1000, _trimmed, r"^1 deleted$", past=0),
    Edge("embedded_outputs_retention_ms", "ms that outputs are kept", 1000, _trimmed_outputs, r"^1 deleted$", past=0),
    Edge("ended_retention_ms", "ms after which a start is no longer known", 1000, _start_again, r"\['started', 'started'\]", past=0),
    Edge("ended_retention_ms", "ms after which what ended is forgotten", 1000, _ended, "^forgotten$", past=0),
    Edge("state_cleanup_s", "seconds that a copy which nobody needs is kept", 600, _copies, "^3 deleted$", past=0),
    Edge("command_timeout_s", "seconds that a command waits for its reply", 20, _command, r"OutcomeUnknown: query of w: no reply within 20 s; perhaps no engine is running; ask again", past=0),
    Edge("gateway_waits_max", "requests that wait in a gateway", 5, _waits, r"5 requests are already waiting here .limit gateway_waits_max.; send it again, to another gateway .*or raise gateway_waits_max"),
    Edge("gateway_wait_s_max", "seconds that a request waits for an outcome", 300, _long_wait, r"wait=301 is more than 300 s .limit gateway_wait_s_max.; wait for less, and ask for the outcome again"),
]  # fmt: skip


@pytest.mark.parametrize("over", [-1, 0, 1], ids=["one less", "at it", "one more"])
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge.limit}: {edge.sentence}")
def test_what_is_at_a_limit_fits_and_what_is_past_it_is_told_the_limit_the_place_and_the_remedy(edge: Edge, over: int) -> None:
    """style.md §3.17."""
    found = edge.probe(edge.at, edge.at + over)
    assert bool(found) == (over >= edge.past), found
    if found:
        assert re.search(edge.said, found), found


@pytest.mark.parametrize("error", [kw.ActivityError("é" * 2000, "Large", {"held": "x" * 19_000}, final=True), kw.BusinessError("large", "é" * 2000, {"held": "x" * 19_000}), ValueError("é" * 2000)])
def test_an_error_of_an_activity_fits_into_an_input_record_whatever_it_carries(error: Exception) -> None:
    """G3: as a dead letter, it would leave its workflow waiting."""

    def fails() -> None:
        raise error

    for at in (2000, 1_000_000):
        calls = Calls(value_bytes_max=at)
        calls.call(make(fails))
        calls.until(lambda calls=calls: calls.answers)
        calls.dispatcher.close()
        told = calls.answers["w"]
        assert len(msgspec.json.encode(told)) <= at
        assert told["error"]["message"].startswith("é" * 200)
        assert ("limit value_bytes_max" in str(told)) == (at == 2000)


def test_an_error_of_an_activity_as_deep_as_json_may_be_is_answered() -> None:
    """G3: the record is deeper than what it carries. Its thread ended, and the workflow waited."""
    details: list[Any] = []
    for _ in range(LEVELS_MAX):
        details = [details]

    def fails() -> None:
        raise kw.ActivityError("deep", "Deep", details, final=True)

    calls = Calls()
    calls.call(make(fails))
    calls.until(lambda: calls.answers)
    calls.dispatcher.close()
    assert calls.answers["w"]["error"]["details"] == details


def test_an_activity_limit_s_of_0_is_no_limit() -> None:
    assert _hangs(0, 10**9) == ""


def _numbers() -> Iterator[str]:
    """The fields of Config that are numbers."""
    for name, field in Config.model_fields.items():
        if field.annotation in (int, float, int | None):
            yield name


def test_every_number_in_config_has_its_edge_tested_here_or_is_no_limit() -> None:
    """If you add a limit, add a row to EDGES, or say in OTHERWISE where it is tested or what it is."""
    assert sorted({edge.limit for edge in EDGES} | OTHERWISE.keys()) == sorted(_numbers())
    assert {edge.limit for edge in EDGES}.isdisjoint(OTHERWISE)
    assert set(Limits.__struct_fields__) <= {edge.limit for edge in EDGES}, "what one instance may use"


@pytest.mark.parametrize("limit", [name for name, where in OTHERWISE.items() if "::" in where])
def test_what_is_tested_elsewhere_is_looked_at_there(limit: str) -> None:
    """The test exists and names the setting, as Config or the command line does."""
    file, _, name = OTHERWISE[limit].partition(": ")[2].partition("::")
    source = (ROOT / file).read_text()
    [test] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    text = ast.get_source_segment(source, test) or ""
    assert limit in text or "--" + limit.removesuffix("_s").replace("_", "-") in text


@pytest.mark.parametrize("limit", sorted(_numbers()))
def test_a_limit_that_would_stop_everything_is_refused_by_name(limit: str) -> None:
    """One below the minimum, and the minimum; and something that is not a number."""
    least = next((least for part in Config.model_fields[limit].metadata for least in (getattr(part, "ge", None), getattr(part, "gt", None)) if least is not None), None)
    if least is None:
        assert limit == "supervisor_pid"
        return
    exclusive = any(getattr(part, "gt", None) is not None for part in Config.model_fields[limit].metadata)
    with pytest.raises(UsageError, match=f"config {limit}: Input should be greater than"):
        load_config(None, **{limit: least if exclusive else least - 1})
    with pytest.raises(UsageError, match=f"config {limit}: Input should be a valid"):
        load_config(None, **{limit: "many"})
    assert getattr(load_config(None, **{limit: least + 1 if exclusive else least}), limit) == (least + 1 if exclusive else least)
