"""step(instance, record, context) -> Transition: the main path; read this first.

Pure: a function of its arguments.  What a record does to an instance, and what the functions of the author's API do
inside a step, is decided here; `instance.py` moves the tasks, `snapshot.py` turns instances into bytes, a runner makes
a Transition happen.  The one process state is the current-step slot, per thread, because author code calls `kw.*`
without an argument that would lead to its step.
"""

from __future__ import annotations

import functools
import gc
import inspect
import math
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from kwflow.core import wire
from kwflow.core.instance import CLOSING, Instance, Machine
from kwflow.core.tasks import FAILED, OK, All, Awaitable, Combinator, Race, Shield, Suspension, Task, Timeout, Timer
from kwflow.core.wire import Output, Record
from kwflow.durable.runtime import set_abandoning, set_driver
from kwflow.errors import Cancelled, KwflowBug, NotDurableError, ProtocolError, StepTimeout, StuckError, UsageError, WorkflowError

__all__ = ["Context", "Ended", "Keep", "Limits", "Save", "Step", "Topics", "Transition", "Workflows", "current", "in_step", "step"]

_Wait = TypeVar("_Wait", bound=Suspension)
_ENDED_VALUE_BYTES_MAX = 65_536  # M4: the entry kept after the end holds the outcome up to this
_AHEAD_MS_MAX = 3_600_000  # K13: Kafka 4 refuses what lies further ahead
_STUCK_MAX = 100  # a main that catches StuckError and waits for nothing again would loop in the step for ever


class Topics(msgspec.Struct, frozen=True):
    """Topic names; None for result or error disables that output (KW-12).  `declared` are those authors may write to."""

    resume: str = "workflow-resume"
    result: str | None = "workflow-result"
    error: str | None = "workflow-error"
    scheduler: str = "workflow-scheduler"
    declared: frozenset[str] = frozenset()


class Limits(msgspec.Struct, frozen=True):
    """What one instance may use; over it the call raises UsageError inside the workflow."""

    outputs_max: int = 10_000
    output_bytes_max: int = 8_000_000
    value_bytes_max: int = 1_000_000
    header_bytes_max: int = 65_536
    waits_max: int = 100_000
    tasks_max: int = 100_000
    nesting_max: int = 100


@dataclass(frozen=True, slots=True)
class Workflows:
    """Name -> workflow function; `default` is the one a `new:` without a name starts."""

    functions: Mapping[str, Callable[[Any], Any]]
    default: str | None = None


class Context(msgspec.Struct, frozen=True):
    """What a step may know beside its record.  `native` accepts generators that cannot be saved (in-process runs)."""

    received_ms: int
    incarnation: str = ""
    topics: Topics = msgspec.field(default_factory=Topics)
    limits: Limits = msgspec.field(default_factory=Limits)
    workflows: Workflows = msgspec.field(default_factory=lambda: Workflows({}))
    native: bool = False


class Keep(msgspec.Struct, frozen=True):
    """The stored state stays as it is."""


class Save(msgspec.Struct, frozen=True):
    """Store this instance (`snapshot.save`)."""

    instance: Instance


class Ended(msgspec.Struct, frozen=True):
    """Delete the stored state; `header` is what the entry that stays after the end (K20) holds."""

    header: dict[str, Any] | None


class Transition(msgspec.Struct, frozen=True):
    """What the record did.  Nothing has happened yet: a runner makes all of it happen in one transaction, or none.

    `outputs` become visible in this order, together with state and offset, never before; `logs` are written and
    `dispatch` is started only after the commit.  `outcome` is the word that counters use: started, resumed,
    repeated, duplicate-start, unknown-id, unknown-ref.
    """

    state: Keep | Save | Ended
    outputs: tuple[Output, ...] = ()
    logs: tuple[str, ...] = ()
    dispatch: tuple[object, ...] = ()
    replies: tuple[object, ...] = ()
    outcome: str = ""


def step(instance: Instance | None, record: Record, context: Context) -> Transition:
    """Apply one record.  Consumes `instance`: after any exception load it again from its bytes.

    Raises ProtocolError (dead-letter the record); anything else means that the step failed and the instance is to
    be parked (G4).
    """
    name = wire.workflow_id(record)
    message = wire.parse(record)
    if isinstance(message, wire.Command):
        raise ProtocolError(f"unknown op {message.op!r}", "unknown-op")
    if instance is not None and _applied(instance, record, context):
        return Transition(Keep(), outcome="repeated")
    if isinstance(message, wire.Start):
        if instance is not None:
            return Transition(Keep(), outcome="duplicate-start")  # G5
        return _start(name, message, record, context)
    if instance is None:
        return Transition(Keep(), outcome="unknown-id")
    wait = instance.waits.get(message.ref) if message.ref is not None else None
    if wait is None:
        return Transition(Keep(), outcome="unknown-ref")
    running = Step(instance, record, context)

    def resume() -> None:
        running.machine.settle(wait, FAILED if message.failed else OK, WorkflowError(message.value) if message.failed else message.value)

    return running.run(resume, "resumed")


def _applied(instance: Instance, record: Record, context: Context) -> bool:
    """Whether this record was applied already; offsets compare only within one incarnation and partition (wire.md §3)."""
    last = instance.applied
    return last is not None and last[:2] == (context.incarnation, record.partition) and record.offset <= last[2]


def _start(name: str, message: wire.Start, record: Record, context: Context) -> Transition:
    workflow = message.workflow or context.workflows.default
    function = context.workflows.functions.get(workflow) if workflow is not None else None
    if workflow is None or function is None:
        known = ", ".join(sorted(context.workflows.functions)) or "none"
        raise ProtocolError(f"no workflow {workflow!r} is registered; known are: {known}", "unknown-workflow")
    start_id = wire.header(record, "kwflow-start-id") or f"{record.partition}-{record.offset}"
    instance = Instance(name, workflow, start_id, record.timestamp_ms)
    running = Step(instance, record, context)
    return running.run(lambda: running.start_main(function, message.options), "started")


_slot = threading.local()


def in_step() -> bool:
    """Whether author code of a step is running on this thread."""
    return getattr(_slot, "step", None) is not None


def current() -> Step:
    """The running step.  Raises UsageError outside one (semantics §1.8)."""
    running: Step | None = getattr(_slot, "step", None)
    if running is None:
        raise UsageError("kw.* functions work only inside a running workflow step, not at import time or on another thread")
    return running


class Step:
    """One step while it runs: what `kw.*` calls act on.  Its buffers are its own, so a failed step leaves nothing (KW-39)."""

    def __init__(self, instance: Instance, record: Record, context: Context) -> None:
        self.instance = instance
        self.record = record
        self.context = context
        self.outputs: list[Output] = []
        self.logs: list[str] = []
        self.machine = Machine(instance, self, context.limits.nesting_max, context.limits.tasks_max)
        self._travelling = wire.travelling_headers(record)
        self._ids = 0
        self._bytes = 0

    # -- the step itself -------------------------------------------------------------------------------------------
    def run(self, first: Callable[[], None], outcome: str) -> Transition:
        """Do `first`, then everything it made ready; the instance afterwards is what the Transition says."""
        if in_step():
            raise KwflowBug("a step inside a step")
        instance = self.instance
        instance.steps += 1
        instance.now_ms = max(instance.now_ms, self.record.timestamp_ms)
        collecting = gc.isenabled()
        forgetting, driver = set_abandoning(False), set_driver(self.machine)
        gc.disable()  # semantics §3.3: a collection here could run another workflow's finally inside this step
        _slot.step = self
        try:
            first()
            self._drain()
            if self.machine.bug is not None:
                raise self.machine.bug
        finally:
            _slot.step = None
            set_abandoning(forgetting)
            set_driver(driver)
            if collecting:
                gc.enable()
        instance.applied = (self.context.incarnation, self.record.partition, self.record.offset)
        instance.updated_ms = self.record.timestamp_ms
        return Transition(self._state(), tuple(self.outputs), tuple(self.logs), outcome=outcome)

    def start_main(self, function: Callable[[Any], Any], options: object) -> None:
        """Call the workflow function; a plain function's value is its result (KW-32), its error the error record (KW-25)."""
        task = Task(self.instance.task_next, None, getattr(function, "__qualname__", "main"))
        self.instance.task_next += 1
        self.instance.main = task
        try:
            made = self.classify(function(options))
            if isinstance(made, Awaitable):
                raise UsageError(f"{task.name} returned {made!r}; write `return (yield ...)`")
        except (KwflowBug, KeyboardInterrupt, MemoryError, StepTimeout):
            raise
        except BaseException as error:
            self._settle_main(FAILED, error)
            return
        if not isinstance(made, types.GeneratorType):
            self._settle_main(OK, made)
            return
        task.gen = made
        self.instance.tasks[task.number] = task
        self.instance.adopted()[made] = task
        self.machine.begin(task)

    def _settle_main(self, state: str, value: object) -> None:
        main = self.instance.main
        if main is None:
            raise KwflowBug("no main")
        self.machine.settle(main, state, value)
        self.main_ended(main)
        self.machine.close()

    def _drain(self) -> None:
        main = self.instance.main
        if main is None:
            raise KwflowBug("an instance without main")
        for _ in range(_STUCK_MAX):
            self.machine.drain()
            if main.settled or self.instance.waits:
                return
            if main.waiting_on is None:
                raise KwflowBug("main neither waits nor has ended")
            self.machine.interrupt(main, StuckError("the workflow is stuck: nothing is left that could wake it"))
        raise StuckError(f"the workflow waited for nothing {_STUCK_MAX} times in one step")

    def _state(self) -> Save | Ended:
        instance = self.instance
        if instance.status == CLOSING and (not instance.tasks or not instance.waits):
            for task in instance.tasks.values():
                self.logs.append(f"{task.name} was forgotten: main has ended and nothing could wake it")
            from kwflow.core.snapshot import ended_header  # snapshot imports nothing of ours from here

            return Ended(ended_header(instance))
        return Save(instance)

    # -- what the machine asks (instance.Host) ---------------------------------------------------------------------
    def classify(self, value: object) -> object:
        if isinstance(value, Awaitable):
            return value
        if isinstance(value, types.GeneratorType):
            return self._durable(value)
        if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)):
            raise UsageError(f"{_name(value)} is a function, not a wait; did you mean {_name(value)}()?")
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            items = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, (Awaitable, types.GeneratorType)) for item in items):
                raise UsageError(f"a {type(value).__name__} of waits is no wait; use kw.all(...) or kw.race(...)")
        elif inspect.iscoroutine(value) or inspect.isasyncgen(value) or hasattr(value, "_asyncio_future_blocking"):
            raise UsageError(f"{value!r} belongs to asyncio and cannot be saved; use a generator, kw.sleep, kw.all or kw.race")
        return value

    def _durable(self, gen: types.GeneratorType[Any, Any, Any]) -> object:
        code = gen.gi_code
        if code.co_name == "<genexpr>":
            raise UsageError("a generator expression is no wait; did you mean kw.all(...) around it?")
        if self.context.native:
            return gen
        from kwflow.durable import is_durable

        if not is_durable(gen):
            raise NotDurableError(
                f"{gen.__qualname__} ({code.co_filename}:{code.co_firstlineno}) is not durable; load its module with "
                "kwflow.durable.install([package]) or load_source, or set __kwflow_durable__ = True in it"
            )
        return gen

    def task_failed(self, task: Task) -> None:
        self.logs.append(f"{task.name}: nobody awaits it and it failed: {describe_error(task.value)}")

    def timer_cancelled(self, timer: Timer) -> None:
        self._write(self.context.topics.scheduler, self._timer_key(timer), b"0", self._travelling)

    def main_ended(self, main: Task) -> None:
        topics, outcome = self.context.topics, "result"
        headers = (*self._travelling, ("kwflow-start-id", self.instance.start_id.encode()))
        try:
            if main.state == FAILED:
                raise main.value
            value, topic = wire.json_dumps(main.value), topics.result
            if len(value) > self.context.limits.value_bytes_max:
                raise UsageError(f"the result has {len(value)} bytes, more than {self.context.limits.value_bytes_max} (limit value_bytes_max)")
        except BaseException as error:  # the result may have no JSON form: that is the workflow's error, too
            outcome = "cancelled" if isinstance(error, Cancelled) else "error"
            value, topic = _error_value(error, self.context.limits.value_bytes_max), topics.error
            headers += (("kwflow-failure-type", type(error).__name__.encode()), ("kwflow-failure-traceback", _traceback(error)))
        if topic is not None:
            self._write(topic, self.instance.id.encode(), value, (*headers, ("kwflow-outcome", outcome.encode())))
        self.instance.extra["outcome"] = {"kind": outcome, "value": value.decode() if len(value) <= _ENDED_VALUE_BYTES_MAX else None}

    # -- what authors call (api.py) --------------------------------------------------------------------------------
    def suspend(self, ref: str | None) -> Suspension:
        if ref is None:
            ref = self._next_id()
        elif not isinstance(ref, str) or not ref:
            raise UsageError(f"a ref id is a non-empty str, not {ref!r}")
        elif wire.is_engine_id(ref):
            raise UsageError(f"ref ids like {ref!r} are reserved for the engine")
        elif ref in self.instance.waits:
            raise UsageError(f"{ref!r} is already waited for; a ref id can be pending only once")
        return self._register(Suspension(ref, self.record.timestamp_ms))

    def sleep(self, delay: timedelta | float) -> Timer:
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
            raise UsageError(f"a delay is a timedelta or a number of seconds, not {delay!r}")
        delay_ms = max(1, math.ceil(round(seconds * 1000, 6)))  # never 0: on the scheduler topic 0 means cancel
        timer = self._register(Timer(self._next_id(), self.record.timestamp_ms, delay_ms))
        due = ("kwflow-due-ms", str(self.context.received_ms + delay_ms).encode())
        self._emit(self.context.topics.scheduler, self._timer_key(timer), str(delay_ms).encode(), (*self._travelling, due))
        return timer

    def _register(self, wait: _Wait) -> _Wait:
        if len(self.instance.waits) >= self.context.limits.waits_max:
            raise UsageError(f"more than {self.context.limits.waits_max} pending waits (limit waits_max)")
        self.instance.waits[wait.ref] = wait
        return wait

    def _next_id(self) -> str:
        while True:
            self._ids += 1
            ref = f"{self.record.offset}:{self._ids}"
            if ref not in self.instance.waits:  # offsets start again when a topic is recreated (semantics §9.2)
                return ref

    def _timer_key(self, timer: Timer) -> bytes:
        return self.instance.id.encode() + b"|" + wire.json_dumps({"ref": timer.ref})

    def children(self, items: Iterable[Any] | Mapping[Any, Any]) -> tuple[list[Awaitable], list[Any] | None]:
        """Check all, then start each unstarted generator in input order; plain values count as settled."""
        if isinstance(items, Awaitable) or isinstance(items, types.GeneratorType) and items.gi_code.co_name != "<genexpr>":
            raise UsageError("kw.all and kw.race take a list of waits, not one wait; did you mean [...] around it?")
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            self.classify(items)
            raise UsageError(f"kw.all and kw.race take a list or mapping of waits, not {items!r}")
        keys = list(items) if isinstance(items, Mapping) else None
        values = [self.classify(item) for item in (items.values() if isinstance(items, Mapping) else items)]
        return [self.awaitable(value) for value in values], keys

    def awaitable(self, value: object) -> Awaitable:
        """Anything as a started awaitable."""
        value = self.classify(value)
        if isinstance(value, types.GeneratorType):
            task = self.machine.adopt(value)
            task.observed = True
            self.machine.begin(task)
            return task
        if isinstance(value, Awaitable):
            return value
        settled = Awaitable()
        settled.state, settled.value = OK, value
        return settled

    def all(self, items: Iterable[Any] | Mapping[Any, Any], cancel_rest: bool, wait_rest: bool) -> Awaitable:
        children, keys = self.children(items)
        combinator = All(children, keys, cancel_rest, wait_rest)
        if not children:
            combinator.state, combinator.value = combinator.result()
            return combinator
        return self._combine(combinator)

    def race(self, items: Iterable[Any] | Mapping[Any, Any], cancel_rest: bool, wait_rest: bool) -> Awaitable:
        children, keys = self.children(items)
        return self._combine(Race(children, keys, cancel_rest, wait_rest))

    def timeout(self, value: object, delay: timedelta | float) -> Awaitable:
        return self._combine(Timeout([self.awaitable(value), self.sleep(delay)], None, cancel_rest=True, wait_rest=False))

    def shield(self, value: object) -> Awaitable:
        value = self.classify(value)
        if isinstance(value, types.GeneratorType):
            value = self.machine.adopt(value)
        if isinstance(value, Task):
            value.shielded = True  # before it starts, so that the tasks it makes are shielded with it
            value.observed = True
            self.machine.begin(value)
        return self._combine(Shield(self.awaitable(value)))

    def spawn(self, gen: object) -> Task:
        value = self.classify(gen)
        if isinstance(value, types.GeneratorType):
            value = self.machine.adopt(value)
            self.machine.begin(value)
        if not isinstance(value, Task):
            raise UsageError(f"kw.spawn takes a call of a durable generator function, not {gen!r}")
        return value

    def cancel(self, value: object) -> None:
        target = self.classify(value)
        if isinstance(target, types.GeneratorType):
            target = self.machine.adopt(target)
        if not isinstance(target, Awaitable):
            raise UsageError(f"{value!r} is no wait, so it cannot be cancelled")
        self.machine.cancel_all([target])

    def _combine(self, combinator: Combinator) -> Combinator:
        self.machine.combine(combinator)
        return combinator

    def output(self, value: object, topic: str, key: str | bytes | None, headers: object, timestamp_ms: int | None) -> None:
        topics = self.context.topics
        if topic not in topics.declared and topic not in (topics.resume, topics.result, topics.error, topics.scheduler):
            raise UsageError(f"topic {topic!r} is not declared; write kw.declare_topics({topic!r}) at module level")
        if isinstance(value, str):
            value = value.encode()
        elif value is not None and not isinstance(value, bytes):
            raise TypeError(f"kw.output takes str, bytes or None, not {type(value).__name__}; use kw.output_json")
        key_bytes = self.instance.id.encode() if key is None else key.encode() if isinstance(key, str) else key
        if not isinstance(key_bytes, bytes):
            raise TypeError(f"a record key is str or bytes, not {type(key).__name__}")
        if timestamp_ms is not None and (not isinstance(timestamp_ms, int) or not 0 <= timestamp_ms <= self.context.received_ms + _AHEAD_MS_MAX):
            raise UsageError(f"timestamp_ms is a whole number of ms since 1970, at most an hour ahead, not {timestamp_ms!r}")
        self._emit(topic, key_bytes, value, self._travelling + self._author_headers(topic, headers), timestamp_ms)

    def _author_headers(self, topic: str, headers: Any) -> wire.Headers:
        pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
        checked = []
        for name, value in pairs:
            engine = name.startswith("kwflow-")
            if engine and not (topic == self.context.topics.resume and name in ("kwflow-workflow", "kwflow-start-id")):
                raise UsageError(f"header {name!r}: kwflow-* headers belong to the engine")
            if value is not None and not isinstance(value, (str, bytes)):
                raise TypeError(f"header {name!r} is str, bytes or None, not {type(value).__name__}")
            checked.append((name, value.encode() if isinstance(value, str) else value))
        return tuple(checked)

    def _emit(self, topic: str, key: bytes, value: bytes | None, headers: wire.Headers, timestamp_ms: int | None = None) -> None:
        """An output that author code asked for.  Raises UsageError naming a limit."""
        if len(self.outputs) >= self.context.limits.outputs_max:
            raise UsageError(f"more than {self.context.limits.outputs_max} outputs in one step (limit outputs_max)")
        size = self._check_size(f"an output to {topic}", value, headers) + len(key)
        if self._bytes + size > self.context.limits.output_bytes_max:
            raise UsageError(f"the outputs of one step have more than {self.context.limits.output_bytes_max} bytes (limit output_bytes_max)")
        self._bytes += size
        self._write(topic, key, value, headers, timestamp_ms)

    def _write(self, topic: str, key: bytes, value: bytes | None, headers: wire.Headers, timestamp_ms: int | None = None) -> None:
        """Also what the engine says by itself: an end and cancelled timers are told, whatever author code has used up."""
        at = self.record.timestamp_ms if timestamp_ms is None else timestamp_ms  # KW-10
        self.outputs.append(Output(topic, key, value, headers, at))

    def _check_size(self, what: str, value: bytes | None, headers: wire.Headers) -> int:
        """Bytes of value and headers.  Raises UsageError naming the limit."""
        limits = self.context.limits
        value_bytes, header_bytes = len(value or b""), wire.header_bytes(headers)
        if value_bytes > limits.value_bytes_max:
            raise UsageError(f"{what} has {value_bytes} bytes, more than {limits.value_bytes_max} (limit value_bytes_max)")
        if header_bytes > limits.header_bytes_max:
            raise UsageError(f"the headers of {what} have {header_bytes} bytes, more than {limits.header_bytes_max} (limit header_bytes_max)")
        return value_bytes + header_bytes

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.instance.now_ms / 1000, UTC)


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or getattr(getattr(value, "func", None), "__qualname__", None) or repr(value)


def describe_error(error: BaseException) -> str:
    """`TypeName: message`, `TypeName` without one (semantics §9.4)."""
    if isinstance(error, Cancelled):
        return "CancelToken"
    try:
        text = str(error)
    except Exception:  # an author's __str__ must not turn an error record into a parked instance
        text = "<no message: __str__ failed>"
    text = text.encode("utf-8", "replace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _error_value(error: BaseException, bytes_max: int) -> bytes:
    if isinstance(error, WorkflowError):
        try:
            payload = wire.json_dumps(error.payload)
            if len(payload) <= bytes_max:
                return payload
        except (TypeError, ValueError):
            pass
    text = wire.json_dumps(describe_error(error))
    return text if len(text) <= bytes_max else wire.json_dumps(f"{type(error).__name__}: its text has {len(text)} bytes (limit value_bytes_max)")


def _traceback(error: BaseException) -> bytes:
    lines = []
    tb = error.__traceback__
    while tb is not None:
        frame = tb.tb_frame
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(("kwflow.core", "kwflow.durable")):
            lines.append(f"{module}:{tb.tb_lineno} {frame.f_code.co_name}")
        tb = tb.tb_next
    return "\n".join(lines[-50:]).encode("utf-8", "replace")
