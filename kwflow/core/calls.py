"""What `kw.*` calls do in a running step: this module creates waits, combinators and outputs.

`step.py` decides what a record does, and runs the step.  Calls with rules of their own (messages, children) have their own
modules and act on the same `Calls`.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeGuard, TypeVar, cast

import msgspec

from kwflow.core import queues, wire
from kwflow.core.contract import Context, Transition
from kwflow.core.dispatch import Callee, Dispatch, size_of
from kwflow.core.instance import Instance
from kwflow.core.machine import Host, Machine
from kwflow.core.tasks import FAILED, OK, ActivityWait, All, Awaitable, Combinator, Condition, JobWait, Race, Series, Shield, Some, Suspension, Task, Timeout, Timer
from kwflow.core.values import json_dumps
from kwflow.core.wire import DELAY_MS_MAX, Output, Record, Reply
from kwflow.durable import is_durable
from kwflow.durable.awaiting import Advance, AsyncGenerator
from kwflow.durable.refusals import asyncio_refusal, made_durable
from kwflow.errors import NotDurableError, UsageError

__all__ = ["REFS_A_MOVE", "Calls", "is_plain", "timer_key"]

_Wait = TypeVar("_Wait", bound=Suspension)
_OF_A_START = ("kwflow-workflow", "kwflow-start-id")  # an author may start workflows, of this application or another one
REFS_A_MOVE = 1_000_000  # in one step; those after a move begin after them, so that no ref is ever that of a call before it (decision 0064)
_AHEAD_MS_MAX = 3_600_000  # K13: Kafka 4 refuses timestamps that are further ahead


class Calls:
    """One step while it runs, as author code sees it.  It has its own buffers, so a failed step leaves nothing behind (KW-39)."""

    changed = True

    def __init__(self, instance: Instance, record: Record, context: Context) -> None:
        self.instance = instance
        self.record = record
        self.context = context
        self.outputs: list[Output] = []
        self.logs: list[str] = []
        self.dispatch: list[object] = []
        self.replies: list[Reply] = []
        self.outcome = ""  # the word for counters, if it is not the one that `run` was given
        self.machine = Machine(instance, cast(Host, self), context.limits.nesting_max, context.limits.tasks_max)  # a Step is a Host
        self.travelling = wire.travelling_headers(record)
        self._ids = 0
        self._bytes = 0

    def classify(self, value: object) -> object:
        if isinstance(value, Awaitable):
            return value
        if isinstance(value, types.GeneratorType):
            return self._durable(value)
        if isinstance(value, Series):
            return value.wait()
        if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, Callee)):
            raise UsageError(f"{_name(value)} is a function, not a wait; did you mean {_name(value)}()?")
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            items = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, (Awaitable, types.GeneratorType)) for item in items):
                raise UsageError(f"a {type(value).__name__} of waits is not a wait; use kw.all(...) or kw.race(...)")
            return value
        if isinstance(value, AsyncGenerator):
            raise UsageError(f"{value!r} is not a wait: a `yield` makes an async def an async generator; use `await` inside it, or `async for` over it")
        if isinstance(value, Advance):
            raise UsageError(f"a step of {value.agen!r} is not a wait; write `await` before it")
        refusal = asyncio_refusal(value)
        if refusal is not None:
            raise refusal
        return value

    def _durable(self, gen: types.GeneratorType[Any, Any, Any]) -> object:
        code = gen.gi_code
        if code.co_name == "<genexpr>":
            raise UsageError("a generator expression is not a wait; did you mean kw.all(...) around it?")
        if self.context.native:
            return gen
        if not is_durable(gen):
            module = gen.gi_frame.f_globals.get("__name__", "") if gen.gi_frame is not None else ""
            raise NotDurableError(f"{gen.__qualname__} ({code.co_filename}:{code.co_firstlineno}) is not durable; {made_durable(module, code.co_filename)}")
        return gen

    def run(self, first: Callable[[], None], outcome: str) -> Transition:
        """Call `first`, then run everything that it made ready (step.Step)."""
        raise NotImplementedError

    def answer(self, status: str, message: str = "", value: object = None) -> None:
        """Reply to the sender of this step's record, if it waits for a reply."""
        address = wire.reply_address(self.record)
        if address is not None:
            self.replies.append(Reply(address, status, message, value))

    def suspend(self, ref: str | None) -> Suspension:
        if ref is None:
            ref = self.next_id()
        elif not isinstance(ref, str) or not ref:
            raise UsageError(f"a ref id must be a non-empty str, not {ref!r}")
        elif wire.is_engine_id(ref):
            raise UsageError(f"ref ids like {ref!r} are reserved for the engine")
        elif ref in self.instance.waits:
            raise UsageError(f"a wait for {ref!r} is already pending; a ref id can be pending only once")
        return self.register(Suspension(ref, self.record.timestamp_ms))

    def wait_condition(self, predicate: object) -> Condition:
        if not is_plain(predicate):
            raise UsageError(f"kw.wait_condition takes a plain function that returns whether the condition is met, such as `lambda: done`, not {predicate!r}")
        condition = self.register(Condition(self.next_id(), self.record.timestamp_ms, predicate))
        self.instance.conditions[condition.ref] = condition
        return condition

    def sleep(self, delay: timedelta | float, due_ms: int | None = None) -> Timer:
        """Create a timer that is due after `delay` from the receipt of this record, or at `due_ms` if that is given."""
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
            raise UsageError(f"a delay must be a timedelta or a number of seconds, not {delay!r}")
        delay_ms = max(1, math.ceil(round(seconds * 1000, 6)))  # never 0: on the scheduler topic 0 means cancel
        if delay_ms > DELAY_MS_MAX:
            raise UsageError(f"a delay is at most ten years ({DELAY_MS_MAX // 1000} s), not {delay!r}; to wait without a limit, use kw.suspend()")
        at = self.record.timestamp_ms
        timer = Timer(self.next_id(), at, delay_ms if due_ms is None else due_ms - at)  # from the record's timestamp alone: the clock is not part of the state (semantics §4.1)
        due = ("kwflow-due-ms", str(self.context.received_ms + delay_ms if due_ms is None else due_ms).encode())
        return self.request(timer, self.context.topics.scheduler, self.timer_key(timer), str(delay_ms).encode(), (*self.travelling, due))

    def request(self, wait: _Wait, topic: str, key: bytes, value: bytes, headers: wire.Headers) -> _Wait:
        """Register a wait and write the record that asks for its answer; both or neither."""
        self.register(wait)
        try:
            self.emit(topic, key, value, headers)
        except BaseException:
            self.instance.leave(wait)
            raise
        return wait

    def activity(self, name: str, arguments: bytes, attempt: int, key: str, queue: str | None = None) -> ActivityWait:
        """Create a wait for one attempt of an activity, which the engine, or a worker of the queue, starts after the commit (M6.2, M6.6).

        `key` is the ref of the first attempt, and "" for the first attempt itself.
        """
        if len(arguments) > self.context.limits.activity_bytes_max:
            raise UsageError(f"the arguments of activity {name} have {len(arguments)} bytes, more than {self.context.limits.activity_bytes_max} (limit activity_bytes_max); pass a reference instead")
        if queue is not None and self.context.queues:
            job = JobWait(self.next_id(), self.record.timestamp_ms, name, attempt, queue)
            given = Dispatch(self.instance.id, job.ref, name, attempt, key or job.ref, arguments, self.travelling, job.since_ms)
            self.request(job, queue, queues.key_of(self.instance.id, job.ref), queues.handed_out(given, self.context.topics.resume), self.travelling)
            if self.context.workflows.option(self.instance.workflow, "checkpoints"):  # only the queue has its arguments, and who goes back to this wait makes the call again
                self.instance.extra.setdefault("calls", []).append(msgspec.to_builtins(given))
            return job
        wait = ActivityWait(self.next_id(), self.record.timestamp_ms, name, attempt)
        call = Dispatch(self.instance.id, wait.ref, name, attempt, key or wait.ref, arguments, self.travelling, wait.since_ms, queue or "")
        self._spend(size_of(call))
        self.register(wait)
        self.dispatch.append(call)
        return wait

    def abort(self, error: Exception) -> Exception:
        """End this step with an error that author code cannot swallow, so that the instance is parked (G4).  Return the error, for the caller to raise."""
        self.machine.bug = self.machine.bug or error
        return error

    def register(self, wait: _Wait) -> _Wait:
        if len(self.instance.waits) >= self.context.limits.waits_max:
            raise UsageError(f"more than {self.context.limits.waits_max} pending waits (limit waits_max); wait for fewer at a time, or raise the limit")
        self.instance.waits[wait.ref] = wait
        return wait

    def next_id(self) -> str:
        first = self.instance.extra.get("moves", 0) * REFS_A_MOVE
        while True:
            self._ids += 1
            ref = f"{self.record.offset}:{first + self._ids}"
            if ref not in self.instance.waits:  # offsets begin anew when a topic is recreated (semantics §9.2)
                return ref

    def timer_key(self, timer: Timer) -> bytes:
        return timer_key(self.instance.id, timer.ref)

    def children(self, items: Iterable[Any] | Mapping[Any, Any], cancel_rest: bool) -> tuple[list[Awaitable], list[Any] | None, bool | Some]:
        """Check all items, then start each unstarted generator in input order; plain values count as settled.

        Return the children, their keys, and the `cancel_rest` of the combinator.
        """
        if isinstance(items, Awaitable) or isinstance(items, types.GeneratorType) and items.gi_code.co_name != "<genexpr>":
            raise UsageError("kw.all and kw.race take a list of waits, not one wait; did you mean [...] around it?")
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            self.classify(items)
            raise UsageError(f"kw.all and kw.race take a list or mapping of waits, not {items!r}")
        keys = list(items) if isinstance(items, Mapping) else None
        values: list[object] = []
        made_here = Some()  # waits created here, which author code never holds
        for item in items.values() if isinstance(items, Mapping) else items:
            if isinstance(item, Series):
                made_here.append(len(values))
            values.append(self.classify(item))
        return [self.awaitable(value) for value in values], keys, made_here if made_here and not cancel_rest else bool(cancel_rest)

    def awaitable(self, value: object) -> Awaitable:
        """Return any value as a started awaitable."""
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
        children, keys, cancelled = self.children(items, cancel_rest)
        combinator = All(children, keys, cancelled, wait_rest)
        if not children:
            combinator.state, combinator.value = combinator.result()
            return combinator
        return self._combine(combinator)

    def race(self, items: Iterable[Any] | Mapping[Any, Any], cancel_rest: bool, wait_rest: bool) -> Awaitable:
        children, keys, cancelled = self.children(items, cancel_rest)
        return self._combine(Race(children, keys, cancelled, wait_rest))

    def timeout(self, value: object, delay: timedelta | float, wait_rest: bool = False) -> Awaitable:
        return self._combine(Timeout([self.awaitable(value), self.sleep(delay)], None, cancel_rest=True, wait_rest=wait_rest))

    def shield(self, value: object) -> Awaitable:
        value = self.classify(value)
        if isinstance(value, types.GeneratorType):
            value = self.machine.adopt(value)
        if isinstance(value, Task):
            value.shielded = True  # before it starts, so that the tasks it creates are shielded, too
            value.observed = True
            self.machine.begin(value)
        return self._combine(Shield(self.awaitable(value)))

    def spawn(self, gen: object) -> Task:
        value = self.classify(gen)
        if isinstance(value, types.GeneratorType):
            value = self.machine.adopt(value)
            self.machine.begin(value)
        if not isinstance(value, Task):
            begun = "; it has already started: keep it in a variable, and wait for it where you need its value" if isinstance(value, Awaitable) else ""
            raise UsageError(f"kw.spawn takes a call of a durable generator function, not {gen!r}{begun}")
        return value

    def call(self, gen: types.GeneratorType[Any, Any, Any]) -> Task:
        """Begin the call of an activity and return its task.

        An error that refuses it at once is raised where the author calls, not at a yield that comes ten thousand calls later.
        """
        task = self.machine.adopt(gen)
        task.observed = True  # while it begins, so that its failure is not logged: it is raised below
        self.machine.begin(task)
        if task.state == FAILED:
            raise task.value
        task.observed = False
        return task

    def cancel(self, value: object) -> None:
        target = self.classify(value)
        if isinstance(target, types.GeneratorType):
            target = self.machine.adopt(target)
        if not isinstance(target, Awaitable):
            raise UsageError(f"{value!r} is not a wait, so it cannot be cancelled")
        self.machine.cancel_all([target])

    def _combine(self, combinator: Combinator) -> Combinator:
        self.machine.combine(combinator)
        return combinator

    def output(self, value: object, topic: str, key: str | bytes | None, headers: object, timestamp_ms: int | None) -> None:
        topics = self.context.topics
        if topic is None or topic not in topics.declared and topic not in (topics.resume, topics.result, topics.error, topics.scheduler):
            raise UsageError(f"topic {topic!r} is not declared; write kw.declare_topics({topic!r}) at module level")
        if isinstance(value, str):
            value = value.encode()
        elif value is not None and not isinstance(value, bytes):
            raise TypeError(f"kw.output takes str, bytes or None, not {type(value).__name__}; use kw.output_json")
        key_bytes = self.instance.id.encode() if key is None else key.encode() if isinstance(key, str) else key
        if not isinstance(key_bytes, bytes):
            raise TypeError(f"a record key must be str or bytes, not {type(key).__name__}")
        if timestamp_ms is not None and (not isinstance(timestamp_ms, int) or not 0 <= timestamp_ms <= self.context.received_ms + _AHEAD_MS_MAX):
            raise UsageError(f"timestamp_ms must be an integer of ms since 1970, at most an hour ahead, not {timestamp_ms!r}")
        self.emit(topic, key_bytes, value, self.travelling + wire.given_headers(headers, _OF_A_START) if headers else self.travelling, timestamp_ms)

    def emit(self, topic: str, key: bytes, value: bytes | None, headers: wire.Headers, timestamp_ms: int | None = None) -> None:
        """Write an output that author code asked for.  Raises UsageError that names the limit."""
        if len(self.outputs) >= self.context.limits.outputs_max:
            raise UsageError(f"more than {self.context.limits.outputs_max} outputs in one step (limit outputs_max); wait in between, such as with yield kw.sleep(0), or raise the limit")
        self._spend(self._check_size(f"an output to {topic}", value, headers) + len(key))
        self.write(topic, key, value, headers, timestamp_ms)

    def _spend(self, size: int) -> None:
        """Count bytes against what one step may write (`output_bytes_max`).  Raises UsageError."""
        most = self.context.limits.output_bytes_max
        if self._bytes + size > most:
            raise UsageError(f"the outputs and activity calls of one step have more than {most} bytes (limit output_bytes_max); wait in between, such as with yield kw.sleep(0), or raise the limit")
        self._bytes += size

    def write(self, topic: str, key: bytes, value: bytes | None, headers: wire.Headers, timestamp_ms: int | None = None) -> None:
        """Write an output without counting it: the engine's own, such as an end or a cancelled timer, are written however much author code has used up."""
        at = self.record.timestamp_ms if timestamp_ms is None else timestamp_ms  # KW-10
        self.outputs.append(Output(topic, key, value, headers, at))

    def _check_size(self, what: str, value: bytes | None, headers: wire.Headers) -> int:
        """Return the bytes of value and headers.  Raises UsageError that names the limit."""
        limits = self.context.limits
        value_bytes, header_bytes = len(value or b""), wire.header_bytes(headers) if headers else 0
        if value_bytes > limits.value_bytes_max:
            raise UsageError(f"{what} has {value_bytes} bytes, more than {limits.value_bytes_max} (limit value_bytes_max); send a reference instead, or raise the limit")
        if header_bytes > limits.header_bytes_max:
            raise UsageError(f"the headers of {what} have {header_bytes} bytes, more than {limits.header_bytes_max} (limit header_bytes_max); put the data into the value, or raise the limit")
        return value_bytes + header_bytes

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.instance.now_ms / 1000, UTC)


def is_plain(value: object) -> TypeGuard[Callable[..., Any]]:
    """Whether this is a function that cannot wait, by what can be seen before it is called."""
    return callable(value) and not inspect.isgeneratorfunction(value) and not inspect.iscoroutinefunction(value)


def timer_key(id: str, ref: str) -> bytes:
    """Return the key of a timer's records on the scheduler topic; their value sets or cancels the timer."""
    return id.encode() + b"|" + json_dumps({"ref": ref})


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or getattr(getattr(value, "func", None), "__qualname__", None) or repr(value)
