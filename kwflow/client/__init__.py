"""Start workflows, talk to them, wait for their outcome: one client for Kafka and embedded engines, for threads and asyncio.

This module has the requests, and the record that each of them sends.  Every call returns a Future at once: wait for it with
`.result()` in a thread, or with `await` in a coroutine.  A future is registered before its record is written, so that a fast
answer is never missed, and an answer is matched by the id of the request or of the run, so that nobody gets another's (M1, M4):
replies in `futures.py`, outcomes in `outcomes.py`.  This module must not know a driver: that is the Link (ports.py).
"""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from kwflow.client.futures import Future, Futures, Reply, fail, seconds_of, settle
from kwflow.client.outcomes import Outcome, Outcomes, Waiter
from kwflow.config import Config, load_config
from kwflow.core import typed, wire
from kwflow.core.values import json_dumps
from kwflow.core.wire import Output, Record
from kwflow.errors import CommandError, OutcomeUnknown, TransportError, UsageError
from kwflow.ports import Link
from kwflow.runners.tracing import Tracing

if TYPE_CHECKING:
    from kwflow.runners.embedded.engine import Embedded

__all__ = ["Client", "Future", "Given", "Outcome", "Run"]

Given: TypeAlias = Mapping[str, str | bytes | None] | Iterable[tuple[str, str | bytes | None]]
"""Headers as a caller gives them; a kwflow-* header is a UsageError."""

_DONE = ("ok", "delivered", "started", "duplicate")


class Run(msgspec.Struct, frozen=True):
    """One run of a workflow id.  `new` is true if this call started it, false if it had already been started under this start id."""

    id: str
    start_id: str
    new: bool


class Client:
    """A client of one application.  Close it, or use it in a `with`; calls are safe from any thread.

    `counts` counts the records that were for nobody here: foreign and unreadable ones.
    """

    def __init__(self, link: Link, config: Config) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._link = link
        self._futures = Futures(link.process, self.counts)
        self._outcomes = Outcomes(link, config, self._futures, self._query, self.counts)
        link.listen(self)

    @classmethod
    def kafka(cls, config: Config | Path | None = None, **settings: Any) -> Client:
        """Create a client for an application on Kafka; `settings` are those of Config.  Raises TransportError if there is no broker (AF-6)."""
        from kwflow.runners.kafka.link import KafkaLink

        made = config if isinstance(config, Config) else load_config(config, **settings)
        return cls(KafkaLink(made), made)

    @classmethod
    def embedded(cls, place: Embedded | Path | str, config: Config | None = None) -> Client:
        """Create a client for an embedded engine: the one that this process holds or, given a directory, whichever process holds it."""
        from kwflow.runners.embedded.engine import Embedded
        from kwflow.runners.embedded.link import EmbeddedLink, SocketLink

        made = config or load_config()
        return cls(EmbeddedLink(place, made) if isinstance(place, Embedded) else SocketLink(Path(place), made), made)

    @property
    def lost(self) -> Exception | None:
        """Why the client no longer works, once its link has ended or it was closed; None before.  Create another client then."""
        return self._futures.lost

    def close(self) -> None:
        """Stop waiting for anything.  Workflows go on."""
        self.on_lost(TransportError("the client was closed", retryable=False))
        self._link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # -- what a caller asks for ------------------------------------------------------------------------------------
    def start(self, id: str | None = None, input: object = None, *, workflow: str | None = None, start_id: str | None = None, headers: Given | None = None) -> Future[Run]:
        """Start a workflow; `id` and `start_id` default to new uuids.  A repeated start id means the same run, even after its end (K20).

        `headers` are passed on through timers, activities and outputs (`kw.headers()`); with `tracing` they include the current span's context.
        Raises CommandError: exists (another run has the id), unknown_workflow, bad_input (the input does not fit the annotation).
        """
        given = self._given(headers)
        future: Future[Run] = self._futures.new()
        self._start(id or uuid.uuid4().hex, input, workflow, start_id or uuid.uuid4().hex, given, future, lambda run: settle(future, run))
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

        def start(waiter: Waiter) -> None:
            self._start(id, input, workflow, start_id, given, waiter.future, lambda run: self._outcomes.started(waiter, run.new))

        return self._outcomes.wait(id, start_id, timeout, start)

    def result(self, id: str, *, start_id: str | None = None, timeout: timedelta | float | None = None) -> Future[Any]:
        """Wait for the result of the present run, or of the run with this start id, whether it has ended already or not.

        Raises OutcomeError (error, cancelled, terminated), TimeoutError (the workflow goes on), CommandError not_found.
        """
        return self._outcomes.wait(id, start_id, timeout)

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
        """Put a signal into the workflow's mailbox; done when it is committed there.  Raises CommandError: not_found, full."""
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
        """Signal a workflow; if no run has the id, start one with the signal in its mailbox, under this `start_id`."""
        arguments = {**_signal(name, value, ttl), "start": {"workflow": workflow, "input": msgspec.Raw(typed.input_json(input))}}
        return self._void(id, "signal", arguments, command_id, start_id or uuid.uuid4().hex, headers)

    def update(self, id: str, name: str, value: object = None, *, start_id: str | None = None, command_id: str | None = None, headers: Given | None = None) -> Future[Any]:
        """Send an update, and wait for the workflow's reply to it.  Raises CommandError: rejected (by its validator), ended, full, not_found."""
        future = self._futures.new()
        self._command(id, "update", {"name": name, "value": value}, future, lambda reply: settle(future, reply.value), command_id, start_id, headers)
        return future

    def query(self, id: str, *, start_id: str | None = None, ref: str | None = None) -> Future[dict[str, Any]]:
        """The workflow's header, with its `status_value` and, after the end, its `outcome`; runs no author code.  Raises CommandError not_found.

        With a `ref`, only the wait and the heartbeat under this ref.
        """
        future: Future[dict[str, Any]] = self._futures.new()
        self._query(id, start_id, future, ref)
        return future

    def resume(self, id: str, ref: str, value: object = None, *, headers: Given | None = None, **error: object) -> Future[None]:
        """Answer a wait with a value, or with `error=payload`; `headers` are passed on from there.

        Raises CommandError: unknown_ref (perhaps it was answered before), not_found.
        """
        if error.keys() - {"error"}:
            raise UsageError(f"resume takes either a value or error=, not {', '.join(error)}")
        future: Future[None] = self._futures.new()
        with self._sending(future):
            message = json_dumps({"ref": ref, **(error or {"value": value})})
            self._send(id, message, self._given(headers), future, f"resume of {ref}", lambda reply: settle(future, None))
        return future

    def heartbeat(self, id: str, ref: str, details: object, *, start_id: str | None = None) -> Future[None]:
        """Keep what the running attempt of an activity, whose answer this ref waits for, says of its progress (JSON up to 10 KB).

        Raises CommandError: unknown_ref (nobody waits for this attempt any more), not_found, too_large.
        """
        return self._void(id, "heartbeat", {"ref": ref, "details": details}, None, start_id)

    def cancel(self, id: str, reason: str = "", *, start_id: str | None = None, command_id: str | None = None, headers: Given | None = None) -> Future[None]:
        """Raise Cancelled at the workflow's innermost waits; done when that has happened."""
        return self._void(id, "cancel", {"reason": reason}, command_id, start_id, headers)

    def terminate(self, id: str, reason: str = "", *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """End the workflow without running its code."""
        return self._void(id, "terminate", {"reason": reason}, command_id, start_id)

    def pause(self, id: str, reason: str = "", *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """Pause the workflow: hold all of its records from here on."""
        return self._void(id, "pause", {"reason": reason}, command_id, start_id)

    def unpause(self, id: str, *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """Apply the workflow's held records in order, and let it go on."""
        return self._void(id, "unpause", None, command_id, start_id)

    def retry(self, id: str, *, start_id: str | None = None, command_id: str | None = None) -> Future[str]:
        """Apply what a parked workflow holds, in order.  The result says what is to be known of it, such as that it runs old code; it is empty if there is nothing.

        Raises CommandError: parked (again, and why), paused, not_found (also if it is not parked).
        """
        future: Future[str] = self._futures.new()
        self._command(id, "retry", None, future, lambda reply: settle(future, reply.message), command_id, start_id)
        return future

    def fork(self, id: str, new_id: str | None = None, *, at: int | None = None, paused: bool = False, start_id: str | None = None, command_id: str | None = None) -> Future[Run]:
        """Create a second instance that continues from where this one waits now, or from its checkpoint `at`, under `new_id` (default: an id that the engine makes).

        With `paused` it continues only when it is unpaused, so that it can be migrated before.  The first instance is not changed.  The fork's timers are
        due when those of the first are, and running activities are called for it too.
        Raises CommandError: rejected (with the reason, such as a child that the instance waits for), exists, not_found.
        """
        future: Future[Run] = self._futures.new()
        arguments = {"id": new_id, **({"at": at} if at is not None else {}), **({"paused": True} if paused else {})}  # engines of earlier versions know only the id
        self._command(id, "fork", arguments, future, lambda reply: settle(future, Run(**reply.value, new=True)), command_id, start_id)
        return future

    def rewind(self, id: str, to: int, *, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """Put a workflow back to a checkpoint of its run (`@kw.workflow(checkpoints=...)`), from which it continues; its present state becomes a checkpoint.

        Its timers, calls and children begin and end accordingly (docs/MESSAGES.md).  Raises CommandError: rejected (with the reason), not_found, and parked
        if it had failed, has been put back, and what it held has failed again.
        """
        return self._void(id, "rewind", {"to": to}, command_id, start_id)

    def migrate(self, id: str, *, in_place: bool = False, start_id: str | None = None, command_id: str | None = None) -> Future[None]:
        """Move a waiting workflow to the current code: by the `@kw.migrate` function for it, or in place, after the same wait of the edited function.

        A parked one is moved ahead of the records that it holds, which are applied then.  Raises CommandError: not_found, unchanged (there is nothing
        to move, or no function for it), rejected (why; nothing has changed), parked (it was moved, and what it held has failed again).
        """
        return self._void(id, "migrate", {"in_place": in_place}, command_id, start_id)

    def subscribe(self, id: str, callback: Callable[[Outcome], None], missed: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """Call back, on the client's thread, with the outcome of every run of this id from now on, until the returned function is called.

        `missed` is called when outcomes may have been missed: the topic had to be read from its end again, or the client has ended.
        """
        return self._outcomes.subscribe(id, callback, missed)

    # -- sending -----------------------------------------------------------------------------------------------------
    def _given(self, headers: Given | None) -> wire.Headers:
        """The headers that a record of ours passes on: those given and, unless they have one, the current trace context.

        A program that has not loaded OpenTelemetry has no trace context.
        """
        given = wire.given_headers(headers) if headers else ()
        if not self.config.tracing or "opentelemetry.trace" not in sys.modules or any(name == "traceparent" for name, _ in given):
            return given
        tracing = Tracing(None, self.config.header_bytes_max)
        return tracing.with_context(given, tracing.current() or {})

    def _void(self, id: str, op: str, arguments: object, command_id: str | None, start_id: str | None, headers: Given | None = None) -> Future[None]:
        future: Future[None] = self._futures.new()
        self._command(id, op, arguments, future, lambda _: settle(future, None), command_id, start_id, headers)
        return future

    def _query(self, id: str, start_id: str | None, future: Future[Any], ref: str | None = None) -> None:
        self._command(id, "query", None if ref is None else {"ref": ref}, future, lambda reply: settle(future, reply.value), None, start_id)

    def _command(
        self,
        id: str,
        op: str,
        arguments: object,
        future: Future[Any],
        done: Callable[[Reply], None],
        command_id: str | None = None,
        start_id: str | None = None,
        headers: Given | None = None,
    ) -> None:
        command_id = command_id or uuid.uuid4().hex
        mine = [("kwflow-op", op.encode()), ("kwflow-id", command_id.encode()), *([("kwflow-start-id", start_id.encode())] if start_id is not None else [])]
        with self._sending(future):
            self._send(id, json_dumps(arguments), (*self._given(headers), *mine), future, op, done, command_id)

    @contextlib.contextmanager
    def _sending(self, future: Future[Any]) -> Iterator[None]:
        """Raise an error of sending to the caller at once, and settle the future, so that nothing of it is kept."""
        try:
            yield
        except Exception as error:
            fail(future, error)
            raise

    def _start(self, id: str, input: object, workflow: str | None, start_id: str, given: wire.Headers, future: Future[Any], done: Callable[[Run], None]) -> None:
        mine = [("kwflow-start-id", start_id.encode()), ("kwflow-client", self._link.process.encode()), *([("kwflow-workflow", workflow.encode())] if workflow else [])]
        try:
            self._send(id, b"new:" + typed.input_json(input), (*given, *mine), future, "start", lambda reply: done(Run(id, start_id, reply.status == "started")), start_id)
        except Exception as error:  # through the future: on a link's thread nobody would see an exception
            fail(future, error)

    def _send(self, id: str, value: bytes, headers: wire.Headers, future: Future[Any], what: str, done: Callable[[Reply], None], command_id: str = "") -> None:
        """Register the request, then write its record: `done` gets a good reply, the future every failure."""

        def replied(reply: Reply) -> None:
            if reply.status in _DONE:
                done(reply)
            else:
                fail(future, CommandError(reply.status, reply.message, id))

        repeat = f"repeat it under the same id, {command_id}" if command_id else "repeat it; a second answer is ignored"
        again = "ask again" if what == "query" else f"it may or may not have been done: {repeat}"

        def unknown(why: str) -> OutcomeUnknown:
            return OutcomeUnknown(f"{what} of {id}: {why}; {again}", command_id, f"{what} of {id}: {why}")

        def unsent(error: Exception) -> None:
            fail(future, unknown(str(error)) if isinstance(error, OutcomeUnknown) else error)

        paused = f", or {id} is paused and keeps it until it is unpaused" if what.partition(" ")[0] in wire.KEPT_WHILE_PAUSED else ""
        silence = unknown(f"no reply within {self.config.command_timeout_s:g} s; perhaps no engine is running{paused}")
        request = self._futures.expect(future, replied, self.config.command_timeout_s, silence)
        asked = (("kwflow-request", request.encode()), ("kwflow-reply-to", self._link.address.encode()))
        self._link.append(Output(self.config.resume_topic, wire.key_of(id), value, (*headers, *asked)), unsent)

    # -- what the link tells (ports.Listener) ------------------------------------------------------------------------
    def on_record(self, record: Record) -> None:
        if record.topic == self.config.reply_topic:
            self._futures.take(record)
        else:
            self._outcomes.take(record)

    def on_tick(self) -> None:
        self._futures.tick()

    def on_gap(self) -> None:
        self._outcomes.gap()

    def on_lost(self, error: Exception) -> None:
        self._futures.lose(error)
        self._outcomes.report_missed()


def _signal(name: str, value: object, ttl: timedelta | float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "ttl_ms": None if ttl is None else max(1, round(seconds_of(ttl, "a ttl") * 1000))}
