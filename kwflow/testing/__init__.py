"""Drive a workflow by hand in your own tests: start it, resume it, move the clock, look at what it wrote.

Everything but the log is real: after each step, the instance is saved to bytes and loaded again, as in an engine.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kwflow import api
from kwflow.activities import Activity, find_activity, registered_activities
from kwflow.config import Config
from kwflow.core import snapshot, typed
from kwflow.core.calls import timer_key
from kwflow.core.contract import Workflows
from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.core.wire import Output, Record
from kwflow.durable import versions
from kwflow.errors import CommandError, SnapshotError, UsageError
from kwflow.feeds import registered_feeds
from kwflow.ports import Decision, Processor
from kwflow.runners import parked
from kwflow.runners.activities.answers import calls_of, carry_out, conclude, info_of
from kwflow.runners.activities.heart import HEADERS, Heart, kept, record_of
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.running import ActivityInfo
from kwflow.testing.globals import GlobalsCheck

__all__ = ["HANGS", "Call", "MemoryStore", "Saved", "WorkflowTester"]


class Call(NamedTuple):
    """One attempt of an activity that a WorkflowTester ran."""

    activity: str
    workflow_id: str
    attempt: int
    arguments: dict[str, Any]


class Saved(msgspec.Struct, frozen=True):
    """What `kwflow show ID --save FILE` writes as JSON: a snapshot, the stored sources (`<module>@<sha256>`) that it needs, and the records that it holds, in order."""

    snapshot: bytes
    sources: dict[str, str]
    hold: tuple[Record, ...] = ()


class MemoryStore:
    """A Store that is a dict."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        for key in sorted(key for key in self.entries if key.startswith(prefix) and key >= start):
            yield key, self.entries[key]

    def apply(self, changes: dict[bytes, bytes | None]) -> None:
        for key, value in changes.items():
            if value is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = value


_FOLLOWING_MAX = 100_000  # an engine would carry on, between other work; a test would never end

_GATEWAY_URL = "https://gateway.example"  # nothing is there: a test calls `resume` where a service would post an answer

HANGS: Any = object()
"""What a fake returns that never answers: the activity's timeout is what ends it."""


class WorkflowTester:
    """An engine and a scheduler in memory, with their own clock (`now_ms`).

    `outputs` collects every record written, in order; `values(topic)` decodes those of one topic.  `command` returns the reply
    that a client would get; `replies` has every reply.  `command`, `reply` and `header` may return None, which their types hide
    (`| Any`), because otherwise each test would have to assert what it knows.  A step that changes a global of a durable module
    raises an AssertionError (semantics §3.4); set `globals_check.active = False` for a module that keeps a cache there.

    Activities, or their replacements by `fake`, run when they are called, one after the other; `calls` lists them.  Time passes
    only in `advance` and `finish`.
    """

    def __init__(self, main: Any = None, **workflows: Any) -> None:
        config = Config(instances_cached_max=0)  # so that every step starts from bytes
        self.config = config.model_copy(update={"gateway_url": config.gateway_url or _GATEWAY_URL})
        self.now_ms = 1_700_000_000_000
        self.outputs: list[Output] = []
        self.logs: list[str] = []
        self.counts: list[str] = []
        self.replies: list[dict[str, Any]] = []
        self._code: dict[str, bytes | None] = {}
        self._workflows = self._engine(main, workflows)
        self._timers = TimerProcessor(self.config)
        self.state, self.timers = MemoryStore(), MemoryStore()
        self._offsets: dict[str, int] = {}
        self._unread: deque[Record] = deque()
        self.globals_check = GlobalsCheck(lambda: self._workflows.workflows.functions.values())
        self.calls: list[Call] = []
        self._fakes: dict[str, Callable[..., Any]] = {}
        self._dispatched: deque[Dispatch] = deque()

    def fake(self, activity: str | Activity[Any, Any], function: Callable[..., Any]) -> None:
        """Call this function instead of an activity, which is given itself or by its name.  The function may raise, or return HANGS."""
        name = activity if isinstance(activity, str) else activity.name
        if find_activity(name) is None:
            raise UsageError(f"no activity {name!r}; there are: {', '.join(sorted(registered_activities())) or 'none'}")
        self._fakes[name] = function

    def _engine(self, main: Any, workflows: dict[str, Any]) -> WorkflowProcessor:
        functions = {**api.registered_workflows(), **workflows, **({"main": main} if main is not None else {})}
        default = "main" if main is not None else next(iter(functions), None)
        return WorkflowProcessor(self.config, Workflows(functions, default, api.registered_migrations()), api.declared_topics(), sources=self._code.get)

    def deploy(self, main: Any = None, **workflows: Any) -> None:
        """Continue with other code: new starts use it, and instances that wait continue as after a deployment (docs/CODE.md)."""
        self._workflows = self._engine(main, workflows)

    def load(self, file: str | Path) -> str:
        """Load an instance that `kwflow show ID --save FILE` took from an engine, on the code in which it waits; return its id.

        The clock continues from its last step, and its timers are set.  Answer everything else that it waits for with `resume`, including activities and
        children; `fake` the activities that it will call.  A parked or paused one has what it holds, and goes on as in an engine: by the commands `retry`,
        `discard`, `migrate` or `unpause`.  A file is as powerful as code: load only what you saved yourself.  Raises UsageError if it is no such file.
        """
        saved, header = _saved_in(Path(file))
        id: str = header["id"]
        self._code |= {key: source.encode() for key, source in saved.sources.items()}
        for key in saved.sources:  # now, so that its activities can be faked before the step that calls one
            versions.prepare(key, self._code.get)
        changes = Overlay(self.state)
        changes.put(id.encode(), saved.snapshot)
        parked.hold_all(changes, id, [msgspec.structs.replace(record, partition=0) for record in saved.hold])
        self.state.apply(changes.changes)
        self.now_ms = max(self.now_ms, header["updated"], *(record.timestamp_ms for record in saved.hold))
        offsets = [*(header.get("applied") or ())[2:], *(record.offset for record in saved.hold)]
        topic = self.config.resume_topic
        self._offsets[topic] = max(self._offsets.get(topic, -1), *offsets, -1)  # ids of waits are made of offsets, and a record with an earlier one counts as applied
        for wait in header["waits"]:
            if "due" in wait:  # an earlier version did not save it
                due = (("kwflow-due-ms", str(wait["due"]).encode()),)
                self._log(Output(self.config.scheduler_topic, timer_key(id, wait["ref"]), b"1", due, self.now_ms))
        return id

    def start(self, id: str, options: Any = None, workflow: str | None = None, **headers: str) -> None:
        """Send `new:` for this id, with `options` as JSON, as a client does."""
        named = {"kwflow-workflow": workflow} if workflow else {}
        self.send(id, b"new:" + typed.input_json(options), {**headers, **named})

    def resume(self, id: str, ref: str, value: Any = None, **error: Any) -> None:
        """Answer a wait, with a value or with `error=payload`."""
        self.send(id, msgspec.json.encode({"ref": ref, **(error if error else {"value": value})}))

    def command(self, id: str, op: str, arguments: Any = None, **headers: str) -> dict[str, Any] | Any:
        """Send a command as a client does (`kwflow_id="x"` is the header kwflow-id).

        Return its reply {"status", "message", "value"}, or None if there is none yet.
        """
        request = f"request-{len(self.outputs)}"
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.send(id, msgspec.json.encode(arguments), {"kwflow-op": op, "kwflow-request": request, "kwflow-reply-to": "0/test", **named})
        return self.reply(request)

    def signal(self, id: str, name: str, value: Any = None) -> None:
        """Send a signal.  Raises CommandError if it is refused, as a client's call does."""
        self._asked(id, "signal", name, value)

    def update(self, id: str, name: str, value: Any = None) -> Any:
        """Send an update and return what the workflow replies; None if it has not replied yet.  Raises CommandError if it is refused, as a client's call does."""
        return self._asked(id, "update", name, value)

    def _asked(self, id: str, op: str, name: str, value: Any) -> Any:
        reply = self.command(id, op, {"name": name, "value": value})
        if reply is not None and reply["status"] not in ("ok", "delivered"):
            raise CommandError(reply["status"], reply["message"], id)
        return reply["value"] if reply is not None else None

    def reply(self, request: str) -> dict[str, Any] | Any:
        """Return the reply to this request; None if there is none yet."""
        found = [reply for reply in self.replies if reply["request"] == request]
        if len(found) > 1:
            raise AssertionError(f"{request} was answered {len(found)} times")
        return {name: value for name, value in found[0].items() if name != "request"} if found else None

    def send(self, id: str | None, value: bytes | None, headers: dict[str, str] | None = None, topic: str | None = None) -> None:
        """Write any record to the resume topic (or to another one, which may have a feed), and process it at once, with everything that follows from it."""
        pairs = tuple((name, text.encode()) for name, text in (headers or {}).items())
        self._log(Output(topic or self.config.resume_topic, id.encode() if id is not None else None, value, pairs, self.now_ms))
        self._work()

    def advance(self, seconds: float) -> None:
        """Move the clock forward; timers that become due fire in order."""
        target = self.now_ms + round(seconds * 1000)
        while True:
            due = self._timers.next_due_ms(self.timers)
            if due is None or due > target:
                break
            self.now_ms = max(self.now_ms, due)
            changes = Overlay(self.timers)
            fired = self._timers.due(changes, self.now_ms, 1000)
            if fired is not None:
                self._perform(fired, changes, self.timers)
                self._work()
        self.now_ms = target

    def finish(self, id: str) -> None:
        """Move the clock from timer to timer until this workflow has ended.  Raises AssertionError if it is parked, or if it waits and no timer is set."""
        while (header := self.header(id)) is not None and header["status"] != "ended":
            if header["status"] == "parked":
                raise AssertionError(f"{id} is parked: {header['parked']['message']}")
            due = self._timers.next_due_ms(self.timers)
            if due is None:
                raise AssertionError(f"{id} waits for {header['waits']}, and no timer is set")
            self.advance(max(0, due - self.now_ms) / 1000)

    def values(self, topic: str) -> list[Any]:
        """Return the values written to a topic: decoded if they are JSON, otherwise as text."""
        return [_decoded(output.value) for output in self.outputs if output.topic == topic]

    def outputs_to(self, topic: str) -> list[str | None]:
        """Return the values written to a topic, as text."""
        return [None if output.value is None else output.value.decode() for output in self.outputs if output.topic == topic]

    def result(self, id: str) -> Any:
        """Return the result of an ended workflow.  Raises AssertionError if there is none."""
        found = [output for output in self.outputs if output.topic == self.config.result_topic and output.key == id.encode()]
        if not found:
            failed = [dict(output.headers).get("kwflow-failure-traceback") for output in self.outputs if output.topic == self.config.error_topic and output.key == id.encode()]
            where = failed[-1].decode() if failed and failed[-1] is not None else ""
            raise AssertionError(f"{id} has no result; errors: {self.values(self.config.error_topic)}, log: {self.logs[-3:]}" + "".join(f"\n  {line}" for line in where.splitlines()))
        return _decoded(found[-1].value)

    def header(self, id: str) -> dict[str, Any] | Any:
        """Return the header of the stored instance, or None if there is none."""
        stored = self.state.get(id.encode())
        return snapshot.read_header(stored) if stored is not None else None

    def ids(self) -> list[str]:
        """Return the ids of the instances that are stored."""
        return sorted(key.decode() for key in self.state.entries if not key.startswith(b"\0"))

    def waits(self, id: str) -> list[str]:
        """Return the refs that an instance waits for."""
        return [wait["ref"] for wait in (self.header(id) or {}).get("waits", [])]

    def _log(self, output: Output) -> None:
        """Write a record.  Everything that follows from it happens before this returns, in the order in which it was written."""
        if output.topic == self.config.code_topic:
            self._code[(output.key or b"").decode()] = output.value
            return
        offset = self._offsets[output.topic] = self._offsets.get(output.topic, -1) + 1
        self.outputs.append(output)
        self._unread.append(Record(output.topic, 0, offset, output.timestamp_ms or self.now_ms, output.key, output.value, output.headers))
        if len(self._unread) > 1:
            return
        for _ in range(_FOLLOWING_MAX):
            self._apply(self._unread[0])
            self._unread.popleft()
            if not self._unread:
                return
        ids = sorted({(last.key or b"").decode("utf-8", "replace") for last in self.outputs[-10:]})
        raise AssertionError(f"one record led to {_FOLLOWING_MAX:,} more, the last for {', '.join(ids)}; do these workflows answer each other forever?")

    def _apply(self, record: Record) -> None:
        processors: list[tuple[Processor, MemoryStore]] = [(self._workflows, self.state), (self._timers, self.timers)]
        if (feed := registered_feeds().get(record.topic)) is not None:
            processors.append((FeedProcessor(self.config, feed), MemoryStore()))
        for processor, store in processors:
            if processor.input_topic == record.topic:
                changes = Overlay(store)
                with self.globals_check:
                    [made] = processor.decide(changes, [record], self.now_ms)
                self._perform(made, changes, store)

    def _work(self) -> None:
        """Run the dispatched calls; here and not where they are dispatched, so that a chain of any length does not recurse."""
        while self._dispatched:
            item = self._dispatched.popleft()
            activity = find_activity(item.name)
            if activity is None:
                raise UsageError(f"no activity {item.name!r}")
            self.calls.append(Call(item.name, item.workflow_id, item.attempt, dict(activity.decode_arguments(item.arguments).arguments)))
            answered: list[Any] = []
            info = self._info(item, activity)

            def run(*args: Any, item: Dispatch = item, activity: Activity[Any, Any] = activity, answered: list[Any] = answered, info: ActivityInfo = info, **kwargs: Any) -> Any:
                function = self._fakes.get(activity.name) or (activity.function if activity.batched is None else _alone(item, activity, info))
                value = function(*args, **kwargs)
                answered.append(_outcome(value) if inspect.iscoroutine(value) else value)
                return answered[0] if answered[0] is not HANGS else None

            record = carry_out(item, activity, info, (self.config.activity_bytes_max, self.config.value_bytes_max), run)
            if not (answered and answered[0] is HANGS):
                self._log(Output(self.config.resume_topic, item.workflow_id.encode(), record, item.headers, self.now_ms))

    def _info(self, item: Dispatch, activity: Activity[Any, Any]) -> ActivityInfo:
        """What an activity is told of its call.  Its heartbeats are applied before it goes on."""
        info, id = info_of(item), item.workflow_id.encode()
        if activity.heartbeat_s is None:
            return info
        look = kept(self.config.signing_keys)

        def send(details: bytes, arrived: Callable[[], None]) -> bool:
            self._log(Output(self.config.resume_topic, id, record_of(item.ref, details), HEADERS, self.now_ms))
            arrived()
            return True

        heart = Heart(0, lambda: self.now_ms / 1000, look(self.state, item), send)
        return dataclasses.replace(info, _beats=heart)

    def _perform(self, made: Decision, changes: Overlay, store: MemoryStore) -> None:
        store.apply(changes.changes)
        self.logs += made.logs
        self.counts += made.counts
        self.replies += [msgspec.json.decode(reply.value or b"") for reply in made.replies]
        for item in made.dispatch:
            if isinstance(item, Dispatch):
                self._dispatched.append(item)
            elif isinstance(item, Withdraw):
                self._dispatched = deque(other for other in self._dispatched if (other.workflow_id, other.ref) != (item.workflow_id, item.ref))
        for output in made.outputs:
            self._log(output)


def _saved_in(file: Path) -> tuple[Saved, dict[str, Any]]:
    """What was saved in a file, and the header of its snapshot.  Raises UsageError."""
    try:
        saved = msgspec.json.decode(file.read_bytes(), type=Saved)
        return saved, snapshot.read_header(saved.snapshot)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, SnapshotError) as error:
        raise UsageError(f"{file} is not what `kwflow show ID --save FILE` writes, or was changed since: {error}; save the instance again") from None


def _alone(item: Dispatch, activity: Activity[Any, Any], info: ActivityInfo) -> Callable[..., Any]:
    """Return a batch of one call as a function of the call's arguments."""

    def call(*_: Any, **__: Any) -> Any:
        answers: list[tuple[Any, BaseException | None]] = []
        calls = calls_of(activity, [(item, info, lambda value, error: answers.append((value, error)))])
        returned = activity.batched.function(calls) if activity.batched is not None else None
        conclude(activity, calls, _outcome(returned) if inspect.iscoroutine(returned) else returned)
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    return call


def _outcome(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run the coroutine of an async activity.  If the test itself runs in an event loop (pytest-asyncio), use a loop and a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()


def _decoded(value: bytes | None) -> Any:
    if value is None:
        return None
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value.decode()
