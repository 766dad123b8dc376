"""Start workflows, talk to them, wait for their outcome: one client for Kafka and embedded, for threads and asyncio.

Every call returns a Future at once: `.result()` waits in a thread, `await` in a coroutine.  Whatever is awaited is
registered before the record is written, so that a fast answer is never missed; it is found by the request's or the
run's own id, so that nobody gets another's (M1, M4).  It must not know a driver: that is the Link (ports.py).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import itertools
import logging
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import msgspec

from kwflow.config import Config, load_config
from kwflow.core import typed, wire
from kwflow.core.wire import Output, Record
from kwflow.errors import CommandError, OutcomeError, OutcomeUnknown, ProtocolError, TransportError, UsageError
from kwflow.ports import Link
from kwflow.runners.tracing import Tracing

if TYPE_CHECKING:
    from kwflow.runners.embedded.engine import Embedded

__all__ = ["Client", "Future", "Given", "Outcome", "Run"]

_T = TypeVar("_T")
Given: TypeAlias = Mapping[str, str | bytes | None] | Iterable[tuple[str, str | bytes | None]]
"""Headers as a caller gives them; a kwflow-* header is a UsageError."""

_SECONDS_MAX = wire.DELAY_MS_MAX // 1000
_DONE = ("ok", "delivered", "started", "duplicate")


class Future(concurrent.futures.Future[_T], Generic[_T]):
    """A value to come: `.result(timeout)` in a thread, `await` in a coroutine.  Cancelling it only stops waiting."""

    told_by: Callable[[], int] = staticmethod(lambda: 0)  # the thread that brings it, which runs callbacks too

    def result(self, timeout: float | None = None) -> _T:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if not self.done() and threading.get_ident() == self.told_by():
            raise UsageError("a callback must not wait: it runs on the client's thread, which would have to bring what it waits for; add a callback, or wait on a thread of yours")

    def __await__(self) -> Generator[Any, None, _T]:
        return asyncio.wrap_future(self).__await__()


class Run(msgspec.Struct, frozen=True):
    """One run of a workflow id; `new` tells whether this call started it, or it had been started under this start id before."""

    id: str
    start_id: str
    new: bool


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended: `kind` is result, error, cancelled or terminated; `value` is JSON."""

    id: str
    start_id: str
    kind: str
    value: Any


class _Reply(msgspec.Struct):
    request: str
    status: str
    message: str = ""
    value: Any = None


class _Waiter(Generic[_T]):
    """Somebody waits for the outcome of a run; `start_id` is None until it is known which run that is."""

    def __init__(self, id: str, start_id: str | None, future: Future[Any], starting: bool) -> None:
        self.id = id
        self.start_id = start_id
        self.future = future
        self.starting = starting  # its start was not answered yet: whoever asked for the run now might be before it
        self.missed = False  # something meanwhile, perhaps
        self.seen: dict[str, Outcome] = {}  # outcomes that came before it was known


class Client:
    """The client of one application.  Close it, or use it in a `with`; calls are safe from any thread.

    `counts` counts what was not for anybody here: foreign and unreadable records.
    """

    def __init__(self, link: Link, config: Config) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._link = link
        self._lock = threading.RLock()
        self._requests: dict[str, Callable[[_Reply], None]] = {}
        self._waiters: dict[str, list[_Waiter[Any]]] = {}
        self._subscribers: dict[str, list[tuple[Callable[[Outcome], None], Callable[[], None]]]] = {}
        self._open: set[Future[Any]] = set()
        self._deadlines: list[tuple[float, int, str | None, Future[Any], Exception]] = []
        self._count = itertools.count()
        self._closed: Exception | None = None
        self._pid = os.getpid()
        self._thread = 0  # the one that the link tells us on
        link.listen(self)

    @classmethod
    def kafka(cls, config: Config | Path | None = None, **settings: Any) -> Client:
        """For an application on Kafka; `settings` are those of Config.  Raises TransportError when there is no broker (AF-6)."""
        from kwflow.runners.kafka.link import KafkaLink

        made = config if isinstance(config, Config) else load_config(config, **settings)
        return cls(KafkaLink(made), made)

    @classmethod
    def embedded(cls, place: Embedded | Path | str, config: Config | None = None) -> Client:
        """For an embedded engine: the one that this process holds, or by its directory, whoever holds it."""
        from kwflow.runners.embedded.engine import Embedded
        from kwflow.runners.embedded.link import EmbeddedLink, SocketLink

        made = config or load_config()
        return cls(EmbeddedLink(place, made) if isinstance(place, Embedded) else SocketLink(Path(place), made), made)

    @property
    def lost(self) -> Exception | None:
        """Why it brings nothing any more, once its link has ended or it was closed: make another one then."""
        return self._closed

    def close(self) -> None:
        """Stop waiting; workflows go on."""
        self.on_lost(TransportError("the client was closed", retryable=False))
        self._link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # -- what a caller asks for ------------------------------------------------------------------------------------
    def start(self, id: str | None = None, input: object = None, *, workflow: str | None = None, start_id: str | None = None, headers: Given | None = None) -> Future[Run]:
        """Start a workflow; `id` and `start_id` default to new uuids.  The same start id again is the same run, also after its end (K20).

        `headers` travel on from there, over timers, activities and outputs (`kw.headers()`); with `tracing` the context of the current span is one.
        Raises CommandError: exists (another run of the id), unknown_workflow, bad_input (it does not fit the annotation).
        """
        given = self._given(headers)
        future: Future[Run] = self._future()
        self._start(id or uuid.uuid4().hex, input, workflow, start_id or uuid.uuid4().hex, given, future, lambda run: self._settle(future, run))
        return future

    def start_and_wait(
        self,
        id: str | None = None,
        input: object = None,
        *,
        workflow: str | None = None,
        start_id: str | None = None,
        timeout: timedelta | float | None = None,
        headers: Given | None = None,
    ) -> Future[Any]:
        """Start a workflow and wait for its result.  Raises what `start` and `result` raise."""
        id, start_id, given = id or uuid.uuid4().hex, start_id or uuid.uuid4().hex, self._given(headers)
        key, waiter = self._followed(id), self._wait(id, start_id, timeout, starting=True)
        self._link.follow(key, lambda: self._start(id, input, workflow, start_id, given, waiter.future, lambda run: self._started(waiter, run)))
        return waiter.future

    def result(self, id: str, *, start_id: str | None = None, timeout: timedelta | float | None = None) -> Future[Any]:
        """The result of the run that is there now, or of the one with this start id, whether it has ended or not.

        Raises OutcomeError (error, cancelled, terminated), TimeoutError (the workflow goes on), CommandError not_found.
        """
        key, waiter = self._followed(id), self._wait(id, start_id, timeout)
        self._link.follow(key, lambda: self._ask(waiter))
        return waiter.future

    def signal(
        self,
        id: str,
        name: str,
        value: object = None,
        *,
        ttl: timedelta | float | None = None,
        start_id: str | None = None,
        command_id: str | None = None,
        headers: Given | None = None,
    ) -> Future[None]:
        """Into the mailbox; done when it is there for good.  Raises CommandError: not_found, full."""
        return self._void(id, "signal", _signal(name, value, ttl), command_id, start_id, headers)

    def signal_with_start(
        self,
        id: str,
        name: str,
        value: object = None,
        *,
        workflow: str | None = None,
        input: object = None,
        ttl: timedelta | float | None = None,
        start_id: str | None = None,
        command_id: str | None = None,
        headers: Given | None = None,
    ) -> Future[None]:
        """The same, and if the id does not run, start it with the signal in its mailbox; `start_id` names that run."""
        arguments = {**_signal(name, value, ttl), "start": {"workflow": workflow, "input": msgspec.Raw(typed.input_json(input))}}
        return self._void(id, "signal", arguments, command_id, start_id or uuid.uuid4().hex, headers)

    def update(self, id: str, name: str, value: object = None, *, start_id: str | None = None, command_id: str | None = None, headers: Given | None = None) -> Future[Any]:
        """What the workflow replies.  Raises CommandError: rejected (by its validator), ended, full, not_found."""
        future = self._future()
        self._command(id, "update", {"name": name, "value": value}, future, lambda reply: self._settle(future, reply.value), command_id, start_id, headers)
        return future

    def query(self, id: str, *, start_id: str | None = None) -> Future[dict[str, Any]]:
        """Its header, `status_value` and, after the end, `outcome`; no author code runs.  Raises CommandError not_found."""
        future: Future[dict[str, Any]] = self._future()
        self._command(id, "query", None, future, lambda reply: self._settle(future, reply.value), None, start_id)
        return future

    def resume(self, id: str, ref: str, value: object = None, *, headers: Given | None = None, **error: object) -> Future[None]:
        """Answer a wait, with a value or with `error=payload`; `headers` travel on from there.  Raises CommandError: unknown_ref (perhaps answered before), not_found."""
        if error.keys() - {"error"}:
            raise UsageError(f"resume takes a value or error=, not {', '.join(error)}")
        future: Future[None] = self._future()
        with self._sending(future):
            message = wire.json_dumps({"ref": ref, **(error or {"value": value})})
            self._send(id, message, self._given(headers), future, f"resume of {ref}", lambda reply: self._settle(future, None))
        return future

    def cancel(self, id: str, reason: str = "", *, start_id: str | None = None, command_id: str | None = None, headers: Given | None = None) -> Future[None]:
        """Raise Cancelled at its innermost waits; done when that has happened."""
        return self._void(id, "cancel", {"reason": reason}, command_id, start_id, headers)

    def terminate(self, id: str, reason: str = "", *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """End it without running its code."""
        return self._void(id, "terminate", {"reason": reason}, command_id, start_id)

    def pause(self, id: str, reason: str = "", *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """Hold all records for it from here on."""
        return self._void(id, "pause", {"reason": reason}, command_id, start_id)

    def unpause(self, id: str, *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """Apply what was held, in order, and go on."""
        return self._void(id, "unpause", None, command_id, start_id)

    def fork(self, id: str, new_id: str | None = None, *, start_id: str | None = None, command_id: str | None = None) -> Future[Run]:
        """A second instance that goes on from where this one waits now, under an id of its own (default: one that the engine makes); the first is as before.

        Its timers are due when those of the first are, and activities that run are called for it, too.  Raises CommandError: rejected (why it
        cannot be, such as a child that is waited for), exists, not_found.
        """
        future: Future[Run] = self._future()
        self._command(id, "fork", {"id": new_id}, future, lambda reply: self._settle(future, Run(**reply.value, new=True)), command_id, start_id)
        return future

    def subscribe(self, id: str, callback: Callable[[Outcome], None], missed: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """Call back, on the client's thread, with the outcome of every run of this id from now on, until the function that is returned is called.

        `missed` is called when some may have been missed: the topic was read from its end again, or the client brings nothing any more.
        """
        key, followed = self._followed(id), self._future()
        self._link.follow(key, lambda: self._settle(followed, None))
        followed.result(self.config.command_timeout_s)
        with self._lock:
            self._subscribers.setdefault(id, []).append((callback, missed))

        def unsubscribe() -> None:
            with self._lock:
                callbacks = self._subscribers.get(id, [])
                if (callback, missed) in callbacks:
                    callbacks.remove((callback, missed))
                if not callbacks:
                    self._subscribers.pop(id, None)

        return unsubscribe

    # -- sending -----------------------------------------------------------------------------------------------------
    def _given(self, headers: Given | None) -> wire.Headers:
        """What travels on from a record of ours: these, and where we are in a trace, unless they say so; a program that has not loaded OpenTelemetry is in none."""
        given = wire.given_headers(headers) if headers else ()
        if not self.config.tracing or "opentelemetry.trace" not in sys.modules or any(name == "traceparent" for name, _ in given):
            return given
        tracing = Tracing(None, self.config.header_bytes_max)
        return tracing.with_context(given, tracing.current() or {})

    def _void(self, id: str, op: str, arguments: object, command_id: str | None, start_id: str | None, headers: Given | None = None) -> Future[None]:
        future: Future[None] = self._future()
        self._command(id, op, arguments, future, lambda _: self._settle(future, None), command_id, start_id, headers)
        return future

    def _command(
        self,
        id: str,
        op: str,
        arguments: object,
        future: Future[Any],
        done: Callable[[_Reply], None],
        command_id: str | None = None,
        start_id: str | None = None,
        headers: Given | None = None,
    ) -> None:
        command_id = command_id or uuid.uuid4().hex
        mine = [("kwflow-op", op.encode()), ("kwflow-id", command_id.encode()), *([("kwflow-start-id", start_id.encode())] if start_id is not None else [])]
        with self._sending(future):
            self._send(id, wire.json_dumps(arguments), (*self._given(headers), *mine), future, op, done, command_id)

    @contextlib.contextmanager
    def _sending(self, future: Future[Any]) -> Iterator[None]:
        """What cannot be sent its caller hears at once; nothing of it stays here."""
        try:
            yield
        except Exception as error:
            self._fail(future, error)
            raise

    def _start(self, id: str, input: object, workflow: str | None, start_id: str, given: wire.Headers, future: Future[Any], done: Callable[[Run], None]) -> None:
        mine = [("kwflow-start-id", start_id.encode()), ("kwflow-client", self._link.process.encode()), *([("kwflow-workflow", workflow.encode())] if workflow else [])]
        try:
            self._send(id, b"new:" + typed.input_json(input), (*given, *mine), future, "start", lambda reply: done(Run(id, start_id, reply.status == "started")), start_id)
        except Exception as error:  # what cannot be sent: on a link's thread nobody else would see it
            self._fail(future, error)

    def _send(
        self, id: str, value: bytes, headers: wire.Headers, future: Future[Any], what: str, done: Callable[[_Reply], None], command_id: str = ""
    ) -> None:
        """Register, then write: `done` gets the reply, the future every failure."""
        request = uuid.uuid4().hex

        def replied(reply: _Reply) -> None:
            if reply.status in _DONE:
                done(reply)
            else:
                self._fail(future, CommandError(reply.status, reply.message, id))

        with self._lock:
            self._requests[request] = replied
        future.add_done_callback(lambda _: self._requests.pop(request, None))
        repeat = f"repeat it under the same id, {command_id}" if command_id else "repeat it, a second answer is ignored"
        again = "ask again" if what == "query" else f"it may be done or not: {repeat}"
        unknown = OutcomeUnknown(f"{what} of {id}: no reply within {self.config.command_timeout_s:g} s, perhaps no engine runs; {again}", command_id)
        self._at(self.config.command_timeout_s, request, future, unknown)
        asked = (("kwflow-request", request.encode()), ("kwflow-reply-to", self._link.address.encode()))
        self._link.append(Output(self.config.resume_topic, wire.key_of(id), value, (*headers, *asked)), lambda error: self._fail(future, error))

    # -- futures -----------------------------------------------------------------------------------------------------
    def _future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.told_by = lambda: self._thread
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if os.getpid() != self._pid:  # threads stay behind at a fork: nobody would ever answer
                raise UsageError(f"this client was made in another process (pid {self._pid}); make one after the fork")
            self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def _settle(self, future: Future[Any], value: object) -> None:
        try:
            future.set_result(value)
        except concurrent.futures.InvalidStateError:
            pass  # its caller does not wait any more, or the deadline was first

    def _fail(self, future: Future[Any], error: Exception) -> None:
        try:
            future.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass

    def _at(self, seconds: float, request: str | None, future: Future[Any], error: Exception) -> None:
        """Fail the future then, if it is still open; with a request, only if that has no reply by then."""
        with self._lock:
            heapq.heappush(self._deadlines, (time.monotonic() + seconds, next(self._count), request, future, error))

    # -- outcomes ----------------------------------------------------------------------------------------------------
    def _wait(self, id: str, start_id: str | None, timeout: timedelta | float | None, starting: bool = False) -> _Waiter[Any]:
        seconds = None if timeout is None else _seconds(timeout, "a timeout")
        waiter: _Waiter[Any] = _Waiter(id, start_id, self._future(), starting)
        with self._lock:
            self._waiters.setdefault(id, []).append(waiter)
        waiter.future.add_done_callback(lambda _: self._forget(waiter))
        if seconds is not None:
            self._at(seconds, None, waiter.future, TimeoutError(f"{id} has not ended within {seconds:g} s; it goes on, ask for its result later"))
        return waiter

    def _followed(self, id: str) -> bytes:
        """The key of an id whose outcome somebody wants to hear of.  Raises UsageError."""
        if not self.config.result_topic or not self.config.error_topic:
            raise UsageError("nobody is told of an outcome: config result_topic and error_topic must not be empty for that")
        return wire.key_of(id)

    def _forget(self, waiter: _Waiter[Any]) -> None:
        with self._lock:
            waiting = self._waiters.get(waiter.id, [])
            if waiter in waiting:
                waiting.remove(waiter)
            if not waiting:
                self._waiters.pop(waiter.id, None)

    def _started(self, waiter: _Waiter[Any], run: Run) -> None:
        waiter.starting = False
        if waiter.missed or not run.new:
            self._ask(waiter)

    def _ask(self, waiter: _Waiter[Any]) -> None:
        """Whether it has ended already: outcomes from before the waiter was registered are not followed."""
        shown: Future[Any] = Future()
        shown.add_done_callback(lambda done: self._shown(waiter, done))
        try:
            self._command(waiter.id, "query", None, shown, lambda reply: self._settle(shown, reply.value), None, waiter.start_id)
        except Exception as error:
            self._fail(waiter.future, error)

    def _shown(self, waiter: _Waiter[Any], shown: concurrent.futures.Future[Any]) -> None:
        error = shown.exception()
        if error is not None:
            if isinstance(error, CommandError) and error.status == "not_found":
                threading.Thread(target=self._find, args=(waiter, error), name="kwflow-client-find", daemon=True).start()
            elif isinstance(error, Exception):
                self._fail(waiter.future, error)
            return
        header = shown.result()
        with self._lock:
            waiter.start_id = header["start_id"]
            known = waiter.seen.get(header["start_id"])
        outcome = header.get("outcome")
        if known is not None:
            self._end(waiter, known)
        elif outcome is not None and outcome["value"] is not None:
            self._end(waiter, Outcome(waiter.id, header["start_id"], outcome["kind"], msgspec.json.decode(outcome["value"])))
        elif outcome is not None:  # too large for the entry that is kept; it is in the topic
            threading.Thread(target=self._find, args=(waiter, TransportError(f"the outcome of {waiter.id} is not kept any more", False)), daemon=True).start()

    def _find(self, waiter: _Waiter[Any], error: Exception) -> None:
        """No entry tells of the run any more, but its record may still be in the topic."""
        try:
            found = [outcome for record in self._link.find(wire.key_of(waiter.id)) if (outcome := self._outcome(record)) is not None]
        except Exception as failed:
            return self._fail(waiter.future, failed)
        mine = [outcome for outcome in found if waiter.start_id in (None, outcome.start_id)]
        if mine:
            self._end(waiter, mine[-1] if waiter.start_id is None else mine[0])
        else:
            self._fail(waiter.future, error)

    def _end(self, waiter: _Waiter[Any], outcome: Outcome) -> None:
        if outcome.kind == "result":
            self._settle(waiter.future, outcome.value)
        else:
            self._fail(waiter.future, OutcomeError(outcome.kind, outcome.value, outcome.id, outcome.start_id))

    def _outcome(self, record: Record) -> Outcome | None:
        """None for a record that an author, or somebody else, wrote to the topic."""
        try:
            kind, start_id = wire.header(record, "kwflow-outcome"), wire.header(record, "kwflow-start-id")
            if kind is None or start_id is None or record.key is None or record.value is None:
                return None
            return Outcome(record.key.decode(), start_id, kind, msgspec.json.decode(record.value))
        except (ProtocolError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    # -- what the link tells (ports.Listener) ------------------------------------------------------------------------
    def on_record(self, record: Record) -> None:
        if record.topic == self.config.reply_topic:
            self._on_reply(record)
            return
        outcome = self._outcome(record)
        if outcome is None:
            self.counts["unreadable"] += 1
            return
        with self._lock:
            waiting, callbacks = list(self._waiters.get(outcome.id, ())), list(self._subscribers.get(outcome.id, ()))
            for waiter in waiting:
                if waiter.start_id is None:
                    waiter.seen[outcome.start_id] = outcome
        for waiter in waiting:
            if waiter.start_id == outcome.start_id:
                self._end(waiter, outcome)
        for callback, _ in callbacks:
            _tell(outcome.id, lambda: callback(outcome))
        if not waiting and not callbacks:
            self.counts["foreign"] += 1

    def _on_reply(self, record: Record) -> None:
        if record.key != self._link.process.encode():
            self.counts["foreign"] += 1
            return
        try:
            reply = msgspec.json.decode(record.value or b"", type=_Reply)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.counts["unreadable"] += 1
            return
        with self._lock:
            replied = self._requests.pop(reply.request, None)
        if replied is None:
            self.counts["foreign"] += 1  # nobody waits for it any more
        else:
            replied(reply)

    def on_tick(self) -> None:
        self._thread = threading.get_ident()
        now = time.monotonic()
        due = []
        with self._lock:
            while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][3].done()):
                _, _, request, future, error = heapq.heappop(self._deadlines)
                if request is None or request in self._requests:
                    due.append((future, error))
        for future, error in due:
            self._fail(future, error)

    def on_gap(self) -> None:
        with self._lock:
            waiting = [waiter for waiters in self._waiters.values() for waiter in waiters]
        for waiter in waiting:
            if waiter.starting:
                waiter.missed = True
            else:
                self._ask(waiter)
        self._tell_missed()

    def _tell_missed(self) -> None:
        with self._lock:
            followed = [(id, missed) for id, callbacks in self._subscribers.items() for _, missed in callbacks]
        for id, missed in followed:
            _tell(id, missed)

    def on_lost(self, error: Exception) -> None:
        with self._lock:
            self._closed = self._closed or error
            waiting = list(self._open)
        for future in waiting:
            self._fail(future, error)
        self._tell_missed()


def _tell(id: str, call: Callable[[], None]) -> None:
    """A subscriber's code must not end this thread, which others wait on."""
    try:
        call()
    except Exception:
        logging.getLogger(__name__).exception("a subscriber of %s failed", id)


def _signal(name: str, value: object, ttl: timedelta | float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "ttl_ms": None if ttl is None else max(1, round(_seconds(ttl, "a ttl") * 1000))}


def _seconds(given: timedelta | float, what: str) -> float:
    """Raises UsageError for what is no length of time."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not 0 <= seconds <= _SECONDS_MAX:
        raise UsageError(f"{what} is a timedelta or a number of seconds, from 0 to {_SECONDS_MAX:,}, not {given!r}")
    return seconds
