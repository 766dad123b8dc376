"""What a record does, failures included: the two processors every runner runs, and the overlay they read through.

A step that fails parks its instance (semantics §7), a record that means nothing is dead-lettered (G3); `decide` itself
never raises for bad input.  It must not know a log, a store on disk or a clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from kwflow.config import Config
from kwflow.core import snapshot, timers, wire
from kwflow.core.step import Context, Ended, Keep, Save, Topics, Transition, Workflows, step
from kwflow.core.wire import Output, Record
from kwflow.durable import allow_modules, set_abandoning
from kwflow.errors import ProtocolError, SnapshotError, StepTimeout
from kwflow.ports import Decision, Store
from kwflow.runners.watchdog import Watchdog

__all__ = ["Overlay", "TimerProcessor", "WorkflowProcessor", "dead_letter", "decode_record"]

_HOLD = b"\0hold\0"
_OWN_START_ID = re.compile(r"\d+-\d+")  # given by the step when the client gave none


class Overlay:
    """A store with changes on top: within a batch you read your own writes (K3)."""

    def __init__(self, below: Store) -> None:
        self.below = below
        self.changes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.changes[key] if key in self.changes else self.below.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        changed = sorted((key for key in self.changes if key.startswith(prefix)), reverse=True)
        for key, value in self.below.scan(prefix):
            while changed and changed[-1] <= key:
                mine = changed.pop()
                new = self.changes[mine]
                if new is not None:
                    yield mine, new
            if key not in self.changes:
                yield key, value
        while changed:
            mine = changed.pop()
            new = self.changes[mine]
            if new is not None:
                yield mine, new


def dead_letter(config: Config, record: Record, reason: str, message: str, received_ms: int) -> Output:
    """The original key, value and headers, and which record it was, why and when."""
    said = {"reason": reason, "message": message, "topic": record.topic, "partition": record.partition, "offset": record.offset, "timestamp": record.timestamp_ms, "at": received_ms}
    headers = tuple((f"kwflow-error-{name}", str(value).encode("utf-8", "replace")) for name, value in said.items())
    return Output(config.dead_letter_topic, record.key, record.value, (*record.headers, *headers), record.timestamp_ms)


def decode_record(data: bytes) -> Record:
    return msgspec.msgpack.decode(data, type=Record)


class WorkflowProcessor:
    """Runs workflow instances: one step for each record of `workflow-resume`."""

    def __init__(self, config: Config, workflows: Workflows, declared: frozenset[str], incarnation: str = "", on_log: Callable[[str], None] = print) -> None:
        self.config = config
        self.input_topic = config.resume_topic
        self.changelog_topic = config.changelog_topic
        self.incarnation = incarnation
        self._workflows = workflows
        self._topics = Topics(config.resume_topic, config.result_topic or None, config.error_topic or None, config.scheduler_topic, declared)
        self._watchdog = Watchdog(config.step_timeout_ms, config.step_abort_ms, on_log)
        allow_modules(config.snapshot_modules)

    def due(self, store: Store, now_ms: int, limit: int) -> Decision | None:
        return None

    def next_due_ms(self, store: Store) -> int | None:
        return None

    def decide(self, store: Store, record: Record, received_ms: int) -> Decision:
        before = set_abandoning(True)  # semantics §3.3: an instance that is dropped here is only forgotten
        try:
            return self._decide(store, record, received_ms)
        finally:
            set_abandoning(before)

    def _decide(self, store: Store, record: Record, received_ms: int) -> Decision:
        try:
            name = wire.workflow_id(record)
            message = wire.parse(record)
        except ProtocolError as error:
            return self._dead(record, error.reason, str(error), received_ms)
        key = name.encode()
        stored = store.get(key)
        try:
            header = snapshot.read_header(stored) if stored is not None else None
        except SnapshotError as error:
            return self._park(store, name, stored, record, error, received_ms)
        status = header["status"] if header is not None else None
        if isinstance(message, wire.Command):
            if message.op not in ("retry", "discard"):
                return self._dead(record, "unknown-op", f"unknown op {message.op!r}", received_ms)
            if status != "parked":
                return Decision(counts=("not-parked",), logs=(f"{name}: {message.op} ignored: it is not parked",))
            return self._drain(store, name, stored, received_ms, discard=message.op == "discard")
        if status == "parked":
            return self._hold(store, name, record, received_ms)
        if status == "ended":
            start_id = wire.header(record, "kwflow-start-id")
            fresh = header is not None and received_ms - header["ended"] <= self.config.ended_retention_ms
            if not isinstance(message, wire.Start) or (fresh and header is not None and start_id == header["start_id"]):
                return Decision(counts=("duplicate-start" if isinstance(message, wire.Start) else "unknown-id",))
            stored = None
        return self._try(store, name, stored, record, received_ms)

    def refuse(self, store: Store, record: Record, reason: str) -> Decision:
        try:
            name = wire.workflow_id(record)
        except ProtocolError:
            return self._dead(record, "refused", reason, record.timestamp_ms)
        return self._park(store, name, store.get(name.encode()), record, SnapshotError(reason), record.timestamp_ms)

    # -- one step --------------------------------------------------------------------------------------------------
    def _try(self, store: Store, name: str, stored: bytes | None, record: Record, received_ms: int) -> Decision:
        try:
            return self._apply(name, stored, record, received_ms)
        except ProtocolError as error:
            return self._dead(record, error.reason, str(error), received_ms)
        except (Exception, StepTimeout) as error:  # KwflowBug and MemoryError too: one instance never stops the others
            return self._park(store, name, stored, record, error, received_ms)

    def _apply(self, name: str, stored: bytes | None, record: Record, received_ms: int) -> Decision:
        instance = snapshot.load(stored) if stored is not None else None
        context = Context(received_ms, self.incarnation, self._topics, workflows=self._workflows)
        try:
            with self._watchdog.watching(name):
                made = step(instance, record, context)
            return self._stored(name, stored, made)
        finally:
            if instance is not None:
                instance.forget()

    def _stored(self, name: str, stored: bytes | None, made: Transition) -> Decision:
        """The Transition as changes of the store."""
        key = name.encode()
        state: dict[bytes, bytes | None] = {}
        match made.state:
            case Save(kept):
                try:
                    data = snapshot.save(kept)
                finally:
                    kept.forget()
                if len(data) > self.config.snapshot_bytes_max:
                    raise SnapshotError(f"the snapshot has {len(data)} bytes, more than snapshot_bytes_max = {self.config.snapshot_bytes_max}")
                state[key] = data
            case Ended(header):
                if header is not None and _OWN_START_ID.fullmatch(header["start_id"]) is None:
                    state[key] = snapshot.save_ended(header)  # K20: a client named this start and may repeat it
                elif stored is not None:
                    state[key] = None
            case Keep():
                pass
        return Decision(state, made.outputs, tuple(f"{name}: {line}" for line in made.logs), (made.outcome,))

    # -- what cannot be applied ------------------------------------------------------------------------------------
    def _dead(self, record: Record, reason: str, message: str, received_ms: int) -> Decision:
        where = f"{record.topic}[{record.partition}]@{record.offset}"
        return Decision(outputs=(dead_letter(self.config, record, reason, message, received_ms),), logs=(f"dead letter {where}: {message}",), counts=("dead-letter",))

    def _park(self, store: Store, name: str, stored: bytes | None, record: Record, error: BaseException, received_ms: int) -> Decision:
        reason, message = type(error).__name__, str(error) or type(error).__name__
        base = {"id": name, "workflow": wire.header(record, "kwflow-workflow") or "", "start_id": "", "created": record.timestamp_ms, "updated": record.timestamp_ms, "waits": []}
        state: dict[bytes, bytes | None] = {
            name.encode(): snapshot.park(stored, base, reason, message, record.offset),
            self._hold_key(name, record.offset): msgspec.msgpack.encode(record),
        }
        told = dead_letter(self.config, record, "parked", f"{reason}: {message}", received_ms)
        return Decision(state, (told,), (f"{name} is parked: {reason}: {message}",), ("parked",))

    @staticmethod
    def _hold_key(name: str, offset: int) -> bytes:
        return _HOLD + name.encode() + b"\0%020d" % offset

    def _hold(self, store: Store, name: str, record: Record, received_ms: int) -> Decision:
        held = sum(1 for _ in store.scan(_HOLD + name.encode() + b"\0"))
        if held >= self.config.hold_max:
            return self._dead(record, "hold-full", f"{name} is parked and holds {held} records already", received_ms)
        return Decision({self._hold_key(name, record.offset): msgspec.msgpack.encode(record)}, counts=("held",))

    def _drain(self, store: Store, name: str, stored: bytes | None, received_ms: int, discard: bool) -> Decision:
        """Apply what is held, in order, each with its original offset; a failure parks it again where it is."""
        overlay = Overlay(store)
        current = snapshot.unpark(stored) if stored is not None else None
        overlay.changes[name.encode()] = current
        outputs: list[Output] = []
        logs: list[str] = []
        counts: list[str] = ["discarded" if discard else "retried"]
        for key, value in list(store.scan(_HOLD + name.encode() + b"\0")):
            overlay.changes[key] = None
            if discard:
                discard = False
                continue
            current = overlay.get(name.encode())
            made = self._try(overlay, name, current, decode_record(value), received_ms)
            overlay.changes |= made.state
            outputs += made.outputs
            logs += made.logs
            counts += made.counts
            if "parked" in made.counts:
                break
        return Decision(overlay.changes, tuple(outputs), tuple(logs), tuple(counts))


class TimerProcessor:
    """The timer table over the scheduler topic; `due` fires."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.input_topic = config.scheduler_topic
        self.changelog_topic = config.timers_changelog_topic

    def decide(self, store: Store, record: Record, received_ms: int) -> Decision:
        try:
            changes = timers.cancel_or_set(record, store.get(record.key) if record.key else None)
        except ProtocolError as error:
            told = dead_letter(self.config, record, error.reason, str(error), received_ms)
            return Decision(outputs=(told,), logs=(f"dead letter {record.topic}@{record.offset}: {error}",), counts=("dead-letter",))
        return Decision(changes, counts=("timer",))

    def refuse(self, store: Store, record: Record, reason: str) -> Decision:
        return Decision(outputs=(dead_letter(self.config, record, "refused", reason, record.timestamp_ms),), counts=("dead-letter",))

    def due(self, store: Store, now_ms: int, limit: int) -> Decision | None:
        state: dict[bytes, bytes | None] = {}
        outputs: list[Output] = []
        for due_key, headers in store.scan(timers.DUE):
            if timers.due_entries(due_key)[0] > now_ms or len(outputs) >= limit:
                break
            changes, output = timers.fire(due_key, headers, self.config.resume_topic, now_ms)
            state |= changes
            outputs.append(output)
        return Decision(state, tuple(outputs), counts=("fired",) * len(outputs)) if outputs else None

    def next_due_ms(self, store: Store) -> int | None:
        for due_key, _ in store.scan(timers.DUE):
            return timers.due_entries(due_key)[0]
        return None


def describe_header(header: dict[str, Any]) -> str:
    """One line about an instance, from its header alone."""
    waits = ", ".join(f"{w['ref']} in {w.get('function', '?')} ({w.get('file', '?')}:{w.get('line', '?')})" for w in header.get("waits", []))
    return f"{header['id']} {header['workflow']} {header['status']} {waits}"
