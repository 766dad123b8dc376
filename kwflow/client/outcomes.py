"""How the outcome of a run is awaited, and why none is missed (M1.3, M4).

A waiter is registered first, then the outcomes of the id are followed, and only then the run is started or queried.  So the
outcome of a run that ends later arrives in the topic, that of a run that has ended before is in the query's answer, and an
outcome that the answer no longer has is searched for in the topic; after a gap the query is repeated.  The one rule: an outcome
is matched by the run's own start id, so that nobody gets another run's.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import msgspec

from kwflow.client.futures import Future, Futures, fail, seconds_of, settle
from kwflow.config import Config
from kwflow.core import wire
from kwflow.core.encrypted import is_encrypted, missing_key
from kwflow.core.wire import Record
from kwflow.errors import CommandError, OutcomeError, ProtocolError, TransportError, UsageError
from kwflow.ports import Link

__all__ = ["Outcome", "Outcomes", "Waiter"]


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended: `kind` is result, error, cancelled or terminated; `value` is the decoded JSON."""

    id: str
    start_id: str
    kind: str
    value: Any


class _Unread(msgspec.Struct, frozen=True):
    """An outcome that we cannot decrypt."""

    id: str
    start_id: str
    error: TransportError


# (id, start_id, future): queries a run
Query: TypeAlias = Callable[[str, str | None, Future[Any]], None]


class Waiter:
    """A caller that waits for the outcome of a run; `start_id` is None until it is known which run that is."""

    def __init__(self, id: str, start_id: str | None, future: Future[Any], starting: bool) -> None:
        self.id = id
        self.start_id = start_id
        self.future = future
        self.starting = starting  # its start is not answered yet: a query now might arrive before the start
        self.missed = False  # whether something may have been missed while it was starting
        self.seen: dict[str, Outcome | _Unread] = {}  # start id -> an outcome that arrived before our `start_id` was known


class Outcomes:
    """The waiters for outcomes in one client, and the subscribers that are called back with them."""

    def __init__(self, link: Link, config: Config, futures: Futures, query: Query, counts: Counter[str]) -> None:
        """`counts` counts outcomes that were for nobody here."""
        self._waiters: dict[str, list[Waiter]] = {}
        self._subscribers: dict[str, list[tuple[Callable[[Outcome], None], Callable[[], None]]]] = {}
        self._link = link
        self._config = config
        self._futures = futures
        self._query = query
        self._counts = counts
        self._lock = threading.RLock()

    # -- one run -----------------------------------------------------------------------------------------------------
    def wait(self, id: str, start_id: str | None, timeout: timedelta | float | None, start: Callable[[Waiter], None] | None = None) -> Future[Any]:
        """Wait for the result of a run, either one that exists or one that `start` starts.  Raises UsageError.

        `start` is called once no outcome can be missed; when the start is answered it must call `started`.
        """
        key = self._key(id)
        seconds = None if timeout is None else seconds_of(timeout, "a timeout")
        waiter = Waiter(id, start_id, self._futures.new(), starting=start is not None)
        with self._lock:
            self._waiters.setdefault(id, []).append(waiter)
        waiter.future.add_done_callback(lambda _: self._forget(waiter))
        if seconds is not None:
            self._futures.at(seconds, waiter.future, TimeoutError(f"{id} has not ended within {seconds:g} s; it is still running: ask for its result later"))
        self._link.follow(key, lambda: (start or self._ask)(waiter))
        return waiter.future

    def started(self, waiter: Waiter, new: bool) -> None:
        """A waiter's start was answered.  A run that is not new may have ended before, so it is queried."""
        waiter.starting = False
        if waiter.missed or not new:
            self._ask(waiter)

    def _key(self, id: str) -> bytes:
        """The record key of an id whose outcome is awaited.  Raises UsageError."""
        if not self._config.result_topic or not self._config.error_topic:
            raise UsageError("nobody is told of an outcome: config set result_topic and error_topic in the configuration for that")
        return wire.key_of(id)

    def _forget(self, waiter: Waiter) -> None:
        with self._lock:
            waiting = self._waiters.get(waiter.id, [])
            if waiter in waiting:
                waiting.remove(waiter)
            if not waiting:
                self._waiters.pop(waiter.id, None)

    def _ask(self, waiter: Waiter) -> None:
        """Query whether the run has ended already, as outcomes from before the waiter was registered are not followed."""
        shown: Future[Any] = Future()
        shown.add_done_callback(lambda done: self._shown(waiter, done))
        try:
            self._query(waiter.id, waiter.start_id, shown)
        except Exception as error:
            fail(waiter.future, error)

    def _shown(self, waiter: Waiter, shown: concurrent.futures.Future[Any]) -> None:
        error = shown.exception()
        if error is not None:
            if isinstance(error, CommandError) and error.status == "not_found":
                threading.Thread(target=self._find, args=(waiter, error), name="kwflow-client-find", daemon=True).start()
            elif isinstance(error, Exception):
                fail(waiter.future, error)
            return
        header = shown.result()
        with self._lock:
            waiter.start_id = header["start_id"]
            known = waiter.seen.get(header["start_id"])
        outcome = header.get("outcome")
        if known is not None:
            _end(waiter, known)
        elif outcome is not None and outcome["value"] is not None:
            _end(waiter, Outcome(waiter.id, header["start_id"], outcome["kind"], msgspec.json.decode(outcome["value"])))
        elif outcome is not None:  # too large for the entry that is kept; it may be in the topic
            threading.Thread(target=self._find, args=(waiter, TransportError(f"the outcome of {waiter.id} is no longer kept", False)), daemon=True).start()

    def _find(self, waiter: Waiter, error: Exception) -> None:
        """Search the topic for the outcome of a run that has no entry any more; fail with `error` if it is not there."""
        try:
            found = [outcome for record in self._link.find(wire.key_of(waiter.id)) if (outcome := _outcome_of(record)) is not None]
        except Exception as failed:
            return fail(waiter.future, failed)
        mine = [outcome for outcome in found if waiter.start_id in (None, outcome.start_id)]
        if mine:
            _end(waiter, mine[-1] if waiter.start_id is None else mine[0])
        else:
            fail(waiter.future, error)

    # -- all runs of an id -------------------------------------------------------------------------------------------
    def subscribe(self, id: str, callback: Callable[[Outcome], None], missed: Callable[[], None]) -> Callable[[], None]:
        """See Client.subscribe.  Raises UsageError, TimeoutError."""
        key, followed = self._key(id), self._futures.new()
        self._link.follow(key, lambda: settle(followed, None))
        followed.result(self._config.command_timeout_s)
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

    # -- what the link tells -----------------------------------------------------------------------------------------
    def take(self, record: Record) -> None:
        """Take a record of the result or error topic."""
        outcome = _outcome_of(record)
        if outcome is None:
            self._counts["unreadable"] += 1
            return
        with self._lock:
            waiting, callbacks = list(self._waiters.get(outcome.id, ())), list(self._subscribers.get(outcome.id, ()))
            for waiter in waiting:
                if waiter.start_id is None:
                    waiter.seen[outcome.start_id] = outcome
        for waiter in waiting:
            if waiter.start_id == outcome.start_id:
                _end(waiter, outcome)
        for callback, missed in callbacks:
            _call(outcome.id, missed if isinstance(outcome, _Unread) else functools.partial(callback, outcome))
        if not waiting and not callbacks:
            self._counts["foreign"] += 1

    def gap(self) -> None:
        """Query all awaited runs again, as outcomes may have been missed."""
        with self._lock:
            waiting = [waiter for waiters in self._waiters.values() for waiter in waiters]
        for waiter in waiting:
            if waiter.starting:
                waiter.missed = True
            else:
                self._ask(waiter)
        self.report_missed()

    def report_missed(self) -> None:
        """Call `missed` of all subscribers, who must query for themselves."""
        with self._lock:
            followed = [(id, missed) for id, callbacks in self._subscribers.items() for _, missed in callbacks]
        for id, missed in followed:
            _call(id, missed)


def _outcome_of(record: Record) -> Outcome | _Unread | None:
    """Decode an outcome; None for any other record that an author, or somebody else, wrote to the topic."""
    try:
        kind, start_id = wire.header(record, "kwflow-outcome"), wire.header(record, "kwflow-start-id")
        if kind is None or start_id is None or record.key is None or record.value is None:
            return None
        if is_encrypted(record.value):  # key and headers say whose it is, so that another run's, under a former key, fails only those who wait for that
            return _Unread(record.key.decode(), start_id, missing_key(record.topic, record.value))
        return Outcome(record.key.decode(), start_id, kind, msgspec.json.decode(record.value))
    except (ProtocolError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _end(waiter: Waiter, outcome: Outcome | _Unread) -> None:
    if isinstance(outcome, _Unread):
        fail(waiter.future, outcome.error)
    elif outcome.kind == "result":
        settle(waiter.future, outcome.value)
    else:
        fail(waiter.future, OutcomeError(outcome.kind, outcome.value, outcome.id, outcome.start_id))


def _call(id: str, call: Callable[[], None]) -> None:
    """Call a subscriber, whose errors must not end this thread, which others depend on."""
    try:
        call()
    except Exception:
        logging.getLogger("kwflow.client").exception("a subscriber of %s failed", id)
