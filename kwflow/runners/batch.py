"""The records of one batch, from record to record: which instance each is for, its step or command, and what becomes of what fails.

A record without meaning is dead-lettered (G3), and a step that fails parks its instance (semantics §7); nothing here ever
raises for bad input.  This module must not know a log, a store on disk or a clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from kwflow import api
from kwflow.core import children, messages, queues, snapshot, wire
from kwflow.core.contract import Context, Ended, Save, Transition
from kwflow.core.dispatch import Dispatch, Withdraw, decode, size_of, state_key
from kwflow.core.instance import Instance
from kwflow.core.step import applied_before, step
from kwflow.core.wire import Output, Record
from kwflow.durable import culprit
from kwflow.durable.registry import Module
from kwflow.errors import CorruptSnapshotError, KwflowBug, ProtocolError, SnapshotError, StepTimeout
from kwflow.feeds import registered_feeds
from kwflow.ports import Budget, Changes, Decision, RunEvent
from kwflow.runners import code, commands, feeds, parked
from kwflow.runners.activities.dispatch import keep
from kwflow.runners.checkpoints import drop, extent
from kwflow.runners.lasting import Lasting
from kwflow.runners.live import Live
from kwflow.runners.moved import MOVES, moves_in
from kwflow.runners.tracing import Tracing, fail_all

__all__ = ["WorkflowBatch"]

_WENT_WRONG = {"parked", "dead-letter", "held"}
_IGNORED = ("unknown-id", "unknown-ref", "duplicate-start", "repeated")  # G3: ignored by a stated rule; each is counted, and logged in one line
_OWN_START_ID = re.compile(r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*)(-[1-9][0-9]*)?")  # ops.place_of, chosen by the step if the client chose none


class WorkflowBatch:
    """The records of one `decide`.  Instances stay live from record to record, and are saved once, at the end (K15).

    Invariant: while an instance is `ahead`, the state holds nothing of what it did since `base`.  So if a later step or the
    save fails, the records in `met` are repeated one by one from `base`, and exactly the one at fault parks the instance.
    """

    def __init__(self, lasting: Lasting, state: Changes, records: Sequence[Record], received_ms: int, budget: Budget | None) -> None:
        self.lasting = lasting
        self.config = lasting.config
        self.state = state
        self.records = records
        self.budget = budget
        self.live: dict[bytes, Live] = {}
        self.partitions = lasting.partitions
        self.sources = lasting.sources
        self.kept = lasting.checkpoints
        self.context = Context(
            received_ms, lasting.incarnation, lasting.topics, lasting.limits, lasting.workflows, lasting.queues, gateway_url=self.config.gateway_url, moves=moves_in(state)
        )  # fmt: skip
        self.made: list[Decision] = []
        self.calling: dict[str, set[int]] = {}  # id -> the numbers of the decisions that make or withdraw calls of its activities
        self.kept_calls: set[int] = set()  # the numbers of decisions whose calls are among the changes already
        self.held: dict[str, tuple[int, int]] = {}
        self.at_once: bytes | None = None  # the instance to be saved before the next record, as it was just loaded on old code or has checkpoints
        self.history = lasting.history
        self.named: dict[Module, None] = {}  # versions that this batch's snapshots name, in the order in which they are written to the code store

    def run(self) -> list[Decision]:
        budget = self.budget
        self.made = [Decision()] * len(self.records)
        for number in range(len(self.records)):
            known = len(self.live)
            made = self.made[number] = self._decide(number)
            if made.dispatch:
                self._note_calls(number)
            if self.at_once is not None:
                key, self.at_once = self.at_once, None
                self._save(key)
                made = self.made[number]
            if budget is None:
                continue
            if made.outputs:
                budget.take(sum([len(output.key or b"") + len(output.value or b"") for output in made.outputs]))
            if made.dispatch:
                budget.take(sum([size_of(item) for item in made.dispatch if isinstance(item, Dispatch)]))
            if len(self.live) > known:  # it is saved at the end, and is then about as large as before
                budget.take(len(next(reversed(self.live.values())).base or b""))
            if budget.spent():
                del self.made[number + 1 :]
                break
        for key in list(self.live):
            self._save(key)
        for number, made in enumerate(self.made):  # only now, as a step that was repeated may have dispatched something else
            self.made[number] = self._with_calls_kept(number, made)
        self._keep_code()
        return self.made

    def _with_calls_kept(self, number: int, made: Decision) -> Decision:
        """Put the calls that a decision makes and withdraws among the changes, once; return it with the records that withdraw calls from queues."""
        if not made.dispatch or number in self.kept_calls:
            return made
        self.kept_calls.add(number)
        told = self.withdrawn(made.dispatch)
        keep(self.state, made.dispatch)
        return msgspec.structs.replace(made, outputs=(*told, *made.outputs)) if told else made

    def _note_calls(self, number: int) -> None:
        """Note whose calls this decision has."""
        for item in self.made[number].dispatch:
            if isinstance(item, (Dispatch, Withdraw)):
                self.calling.setdefault(item.workflow_id, set()).add(number)

    def _calling(self, name: str) -> list[Dispatch | Withdraw]:
        """The calls of an instance that this batch makes and withdraws so far, in order."""
        found = [item for number in sorted(self.calling.get(name, ())) for item in self.made[number].dispatch]
        return [item for item in found if isinstance(item, (Dispatch, Withdraw)) and item.workflow_id == name]

    def _keep_code(self) -> None:
        """Write the sources of the saved snapshots, so that both become visible together (G10)."""
        entries = [output for module in self.named for output in code.offer(self.config.code_topic, self.state, module, self.context.received_ms, self.config.signing_keys)]
        if entries:
            self.made[-1] = msgspec.structs.replace(self.made[-1], outputs=(*self.made[-1].outputs, *entries))

    def _decide(self, number: int) -> Decision:
        record = self.records[number]
        try:
            name = wire.workflow_id(record)
            wire.check_size(record, self.config.value_bytes_max, self.config.header_bytes_max)
            key = name.encode()
            op = wire.header(record, "kwflow-op") if record.headers else None
            if op is not None and commands.takes(self.config, op, record, lambda: self.state.get(key) if key not in self.live else None):
                return self._command(name, record, number)
            if op == feeds.OP:
                return self.lasting.fed.again(registered_feeds(), record, self.context.received_ms)
            live = self.live.get(key)
            if live is None:
                found = self._find(name, key, record)
                if isinstance(found, Decision):
                    return found
                live = self.live[key] = found
        except ProtocolError as error:
            return parked.dead(self.config, record, error.reason, str(error), self.context.received_ms)
        return self._step(name, key, live, number, record) if self.lasting.tracing is None else self._traced(self.lasting.tracing, name, key, live, number)

    def _find(self, name: str, key: bytes, record: Record) -> Live | Decision:
        """Return the instance for this record, or the decision if there is none that can run.  Raises ProtocolError."""
        stored = self.state.get(key)
        if stored is None:
            return Live(None, None)
        live = self.lasting.live.awake(key, stored)
        if live is not None:
            return live
        try:
            header, body = snapshot.split(stored, self.config.signing_keys)
            if header["id"] != name:
                raise CorruptSnapshotError(f"this is the snapshot of {header['id']!r}, but it is stored under another id")
            if header["status"] == "parked":
                wire.parse(record)
                return self._hold(header, record, stored)
            if header["status"] == "ended":
                return self._after_end(header, record)
            instance = snapshot.wake(header, body, self.lasting.sources)
            if instance.pins:
                self.at_once = key
                self.lasting.allow(api.declared_topics())
                self.context = msgspec.structs.replace(self.context, topics=self.lasting.topics)
            return Live(stored, instance)
        except SnapshotError as error:
            return self._park(name, stored, record, error)

    def _after_end(self, header: dict[str, Any], record: Record) -> Live | Decision:
        """K20: answer from the entry that stays after the end.  A start that it does not know begins a new run."""
        message = wire.parse(record)
        if applied_before(header.get("applied"), record, self.context.incarnation):
            return Decision(counts=("repeated",))
        if isinstance(message, wire.Start):
            fresh = self.context.received_ms - header["ended"] < self.config.ended_retention_ms
            if fresh and wire.short_header(record, "kwflow-start-id") == header["start_id"]:
                again = children.answer_again(header, record, self.config.resume_topic, self.config.value_bytes_max)
                return Decision(again, counts=("duplicate-start",), replies=parked.answered(self.config, record, "duplicate"))
            return Live(None, None, header.get("checkpoints"))
        address = wire.reply_address(record)
        if isinstance(message, wire.Command):
            starts = isinstance(message.arguments, wire.Signal) and message.arguments.start is not None
            anew = starts and message.start_id != header["start_id"] and message.id not in header.get("ids", {})
            return Live(None, None, header.get("checkpoints")) if anew else self._decision(header["id"], record, messages.after_end(header, message, address))
        return self._decision(header["id"], record, messages.ignored("unknown-id", address, messages.ENDED))

    # -- one step ----------------------------------------------------------------------------------------------------
    def _traced(self, tracing: Tracing, name: str, key: bytes, live: Live, number: int) -> Decision:
        """Step inside a span, whose context replaces the record's."""
        span = tracing.begin(name, self.records[number], live.instance)
        made = self._step(name, key, live, number, span.record)
        if live.instance is not None and live.ahead:
            tracing.remember(live.instance, span)
        span.done(made.counts[0] if made.counts else "", made.logs[-1] if not _WENT_WRONG.isdisjoint(made.counts) and made.logs else None)
        return msgspec.structs.replace(made, spans=(span,))

    def _step(self, name: str, key: bytes, live: Live, number: int, record: Record) -> Decision:
        live.met.append(number)
        by = self.history.cause(record, live.instance) if self.history is not None else {}
        made: Transition | BaseException
        try:
            made = self.lasting.watchdog.run(name, step, live.instance, record, self.context)
        except ProtocolError as error:
            if live.instance is None:
                del self.live[key]
            return parked.dead(self.config, record, error.reason, str(error), self.context.received_ms)
        except (Exception, StepTimeout) as error:  # even KwflowBug and MemoryError: one instance never stops the others
            made = error
        if isinstance(made, BaseException):
            # Not inside the handler: _failed repeats steps, and an error that author code raises in them would get this error
            # as its context, which would then be saved with the instance.
            return self._failed(name, key, live, number, made, by)
        state = made.state
        runs: tuple[RunEvent, ...] = ()
        if isinstance(state, Save):
            instance = state.instance
            if instance is not live.instance:
                runs = _begun(live, instance.workflow, instance.created_ms)
                _go_on_numbering(live, instance.extra)
            live.instance, live.ahead = instance, True
            self._note_moves(instance.extra)
            if instance.workflow in self.kept.workflows or "checkpoints" in instance.extra:
                self.at_once, live.changed = key, live.changed or state.changed
        elif isinstance(state, Ended):
            runs = _finished(live, state.header, made.outcome)
            _go_on_numbering(live, state.header)
            self._note_moves(state.header)
            self._ended(key, live, state.header)
        elif live.instance is None:
            del self.live[key]
        decision = self._decision(name, record, made, runs)
        return decision if self.history is None else self.history.stepped(decision, made, record, by, self.context.received_ms)

    def _note_moves(self, header: dict[str, Any]) -> None:
        """Let the partition know of a move that an instance counts alone, as what it held came from an earlier log: the next run of its id begins with as many (decision 0064)."""
        if header.get("moves", 0) > self.context.moves:
            self.state.put(MOVES, b"%d" % header["moves"])
            self.context = msgspec.structs.replace(self.context, moves=header["moves"])

    def _decision(self, name: str, record: Record, made: Transition, runs: tuple[RunEvent, ...] = ()) -> Decision:
        logs = tuple(f"{name}: {line}" for line in made.logs) if made.logs else ()
        if made.outcome in _IGNORED:
            logs = (f"{name}: ignored, {made.outcome}, {record.topic}[{record.partition}]@{record.offset}",)
        replies = tuple(wire.reply_output(self.config.reply_topic, reply) for reply in made.replies) if made.replies else ()
        decision = Decision(made.outputs, logs, (made.outcome,), replies, made.dispatch, runs=runs)
        if made.outcome != "refused":
            return decision
        return commands.joined([decision, parked.dead(self.config, record, "refused", made.logs[-1], self.context.received_ms)])

    def _ended(self, key: bytes, live: Live, header: dict[str, Any]) -> None:
        live.forget()
        del self.live[key]
        self.end(key, header)

    def _failed(self, name: str, key: bytes, live: Live, number: int, error: BaseException, by: dict[str, Any]) -> Decision:
        """Park the instance whose step failed (G4).  Its earlier steps are repeated and saved first; the failed one is not run a second time."""
        live.forget()
        del self.live[key]
        if live.ahead:
            self._again(key, live.met[:-1])
        stored = self.state.get(key) if live.ahead else live.base
        header = snapshot.split(stored, self.config.signing_keys)[0] if stored is not None else None
        if header is not None and header["status"] == "parked":
            return self._hold(header, self.records[number], stored)
        return self._park(name, stored, self.records[number], error, by)

    def _park(self, name: str, stored: bytes | None, record: Record, error: BaseException, by: dict[str, Any] | None = None) -> Decision:
        self.held.pop(name, None)
        before = self.state.get(name.encode()) if stored is None else None
        if before is not None:  # a start has failed, and the entry of the run before it makes way
            drop(self.state, name.encode(), extent(snapshot.split(before, self.config.signing_keys)[0]))
        return self._with_event(parked.park(self.config, self.state, name, stored, record, error, self.context.received_ms), name, record, stored, by)

    def _hold(self, header: dict[str, Any], record: Record, stored: bytes | None) -> Decision:
        return self._with_event(parked.hold(self.config, self.state, header, record, self.context.received_ms, self.held), header["id"], record, stored)

    def _with_event(self, made: Decision, name: str, record: Record, before: bytes | None, by: dict[str, Any] | None = None) -> Decision:
        """Add the event, if history is kept."""
        if self.history is None:
            return made
        return self.history.changed(made, record, by or self.history.cause(record, None), before, self.state.get(name.encode()), self.context.received_ms)

    def _again(self, key: bytes, numbers: list[int]) -> None:
        """Repeat these records one by one from the stored bytes, and save after each."""
        for number in numbers:
            self.made[number] = self._decide(number)
            self._note_calls(number)
            self._save(key)

    def _save(self, key: bytes) -> None:
        """Put a live instance's bytes into the state, and the instance into the cache."""
        live = self.live.pop(key, None)
        if live is None or live.instance is None:
            return
        if live.ahead:
            instance, replaced = live.instance, live.base if live.changed else None
            numbers = self.kept.advance(instance.workflow, instance.extra, replaced is not None, instance.waits) if self.kept.of(instance.workflow, instance.extra) else None
            data, modules = self._bytes(live, instance)
            if isinstance(data, Exception):
                live.forget()
                if len(live.met) > 1:
                    self._again(key, live.met)
                else:
                    spans = self.made[live.met[0]].spans
                    made = self._park(key.decode(), live.base, self.records[live.met[0]], data)
                    fail_all(spans, made.logs[-1])
                    self.made[live.met[0]] = msgspec.structs.replace(made, spans=spans) if spans else made
                return
            if self.lasting.keeps_code:
                self.named |= dict.fromkeys(modules)
            self.lasting.snapshots.observe(len(data))
            if len(data) > self.config.snapshot_bytes_warn:
                self._warn_of_size(live, len(data))
            self.state.put(key, data)
            live.base = data
            if numbers is not None:
                self._charge(len(data) + self.kept.keep(self.state, key, replaced, numbers, self.calls))
        self.lasting.live.keep(key, live)

    def _bytes(self, live: Live, instance: Instance) -> tuple[bytes | Exception, list[Module]]:
        """The instance's snapshot and the versions that it names, or the error.  It is returned because the caller repeats steps, outside of any handler."""
        most = self.config.snapshot_bytes_max
        try:
            data, modules = snapshot.save(instance, self.config.signing_keys)
            if len(data) > most and instance.extra.pop("heartbeats", None) is not None:  # a workflow is not parked because its activities say how far they are
                data, modules = snapshot.save(instance, self.config.signing_keys)
                if len(data) <= most:
                    self._say(live, f"{instance.id}: the heartbeat details of its activities are dropped, as its snapshot would exceed snapshot_bytes_max = {most} with them")
        except Exception as error:  # reducers of author classes may raise anything
            return error, []
        if len(data) > most:
            return SnapshotError(f"the snapshot has {len(data)} bytes, more than snapshot_bytes_max = {most}{_mostly(instance)}; keep less in variables, or raise the limit and retry"), []
        return data, modules

    def _warn_of_size(self, live: Live, size: int) -> None:
        """Log once when an instance grows over the limit, not each time it is saved."""
        limit = self.config.snapshot_bytes_warn
        if limit >= len(live.base or b""):
            of = live.instance
            self._say(live, f"{of.id if of else ''}: its snapshot now has {size} bytes (snapshot_bytes_warn = {limit}){_mostly(of)}; above {self.config.snapshot_bytes_max} it is parked")

    def _say(self, live: Live, said: str) -> None:
        """Add a line to the log of the last record that this instance met."""
        last = live.met[-1]
        self.made[last] = msgspec.structs.replace(self.made[last], logs=(*self.made[last].logs, said))

    # -- commands that are no step --------------------------------------------------------------------------------------
    def _command(self, name: str, record: Record, number: int) -> Decision:
        command = wire.parse(record)
        if not isinstance(command, wire.Command):
            raise KwflowBug("a record with an op is not a command")
        self._save(name.encode())
        for earlier in sorted(self.calling.get(name, ())):  # an earlier state is kept with its calls, also by the batch of what it has held
            self.made[earlier] = self._with_calls_kept(earlier, self.made[earlier])
        self.held.pop(name, None)
        before = self.state.get(name.encode()) if self.history is not None else None
        made = self._with_calls_kept(number, commands.apply(self, name, record, command))  # now, as after it a state may wait for a call that it has withdrawn
        return self._with_event(made, name, record, before)

    def stored(self, key: bytes) -> bytes | None:
        """The stored bytes of this id, including everything that this batch did so far."""
        self._save(key)
        return self.state.get(key)

    def calls(self, name: str, refs: Sequence[str]) -> dict[str, Dispatch | None]:
        """The activity calls behind these waits.  Calls made in this batch are not in the state yet."""
        made = {item.ref: item for item in self._calling(name) if isinstance(item, Dispatch)}
        stored = {ref: self.state.get(state_key(name, ref)) for ref in refs}
        return {ref: _decoded(data) if data is not None else made.get(ref) for ref, data in stored.items()}

    def withdrawn(self, items: Sequence[object]) -> list[Output]:
        """The records that withdraw calls from the queues into which they came by a move; only where the state was moved there are such calls."""
        found = list[Output]()
        if not (self.context.queues and self.context.moves):
            return found
        for item in items:
            stored = self.state.get(state_key(item.workflow_id, item.ref)) if isinstance(item, Withdraw) else None
            call = _decoded(stored) if stored is not None else None
            if call is not None and call.queue:
                found.append(Output(call.queue, queues.key_of(call.workflow_id, call.ref), None, call.headers))
        return found

    def put(self, key: bytes, data: bytes, modules: Sequence[Module] = ()) -> None:
        """Save an instance that no step has changed, and charge it to the budget: each fork is as large as its original."""
        self.state.put(key, data)
        if self.lasting.keeps_code:
            self.named |= dict.fromkeys(modules)
        self._charge(len(data))

    def keep(self, key: bytes, header: dict[str, Any]) -> None:
        """Keep the current state as a checkpoint, and note so in the header of what replaces it, if its workflow has checkpoints."""
        if self.kept.of(header["workflow"], header):
            replaced = self.kept.last_state(self.state.get(key))
            numbers = self.kept.advance(header["workflow"], header, replaced is not None, {wait["ref"] for wait in header.get("waits", ())})
            self._charge(self.kept.keep(self.state, key, replaced, numbers, self.calls))

    def _charge(self, size: int) -> None:
        """Charge bytes that the batch writes to its budget, beside those of which the budget knows beforehand."""
        if self.budget is not None:
            self.budget.take(size)

    def drain(self, records: list[Record]) -> list[Decision]:
        """Apply held records, each with its original offset; a failure parks the instance again (K17).  Records beyond the budget are held as before."""
        made = WorkflowBatch(self.lasting, self.state, records, self.context.received_ms, self.budget).run()
        parked.hold_again(self.state, records[len(made) :])
        self.context = msgspec.structs.replace(self.context, moves=moves_in(self.state))
        return made

    def end(self, key: bytes, header: dict[str, Any]) -> None:
        """Replace an ended instance by the entry that recognizes a client's repeated start (K20) and says which checkpoints there are, or by nothing."""
        # By our clock: after an outage the record's timestamp may be older than the retention, while its client's repetitions wait behind it.
        header = {**header, "ended": max(header["ended"], self.context.received_ms)}
        self.keep(key, header)
        self.lasting.live.drop(key)
        if self.lasting.at_least_once or "checkpoints" in header or (header["start_id"] and not _is_own(header)):
            self.lasting.ended.keep(self.state, key, header)
        elif self.state.get(key) is not None:
            self.state.put(key, None)


def _go_on_numbering(live: Live, header: dict[str, Any]) -> None:
    """Let a run know the checkpoints of the one before it under its id."""
    before = live.instance.extra.get("checkpoints") if live.instance is not None else live.checkpoints
    if before is not None:
        header.setdefault("checkpoints", before)


def _decoded(data: bytes) -> Dispatch | None:
    try:
        return decode(data)
    except msgspec.DecodeError:  # nobody can read it, so it is as good as none
        return None


def _begun(live: Live, workflow: str, now_ms: int) -> tuple[RunEvent, ...]:
    """What a start means for the runs under its id: one that was there made way for it."""
    made = RunEvent(workflow, "started")
    if live.instance is None:
        return (made,)
    return RunEvent.ended(live.instance.workflow, "terminated", live.instance.created_ms, now_ms), made


def _finished(live: Live, header: dict[str, Any], outcome: str) -> tuple[RunEvent, ...]:
    """What an end means for them: of a run that was there, or of one that was started in this step."""
    workflow, ended_ms = header["workflow"], header["ended"]
    if live.instance is None or outcome == "restarted":
        return (*_begun(live, workflow, ended_ms), RunEvent.ended(workflow, header["outcome"]["kind"], ended_ms, ended_ms))
    return (RunEvent.ended(workflow, header["outcome"]["kind"], live.instance.created_ms, ended_ms),)


def _is_own(header: dict[str, Any]) -> bool:
    """Whether the start id was chosen by the step, not by a client.

    A client's name such as 2026-17 differs from ours by the instance's partition and by the offset that it has reached.
    """
    place, applied = _OWN_START_ID.fullmatch(header["start_id"]), header.get("applied")
    return place is not None and applied is not None and int(place[1]) == applied[1] and int(place[2]) <= applied[2]


def _mostly(instance: Instance | None) -> str:
    """Say where most of a snapshot's bytes are, as the end of a text; "" if no variable holds them."""
    found = culprit.largest(instance.graph()) if instance is not None else ""
    return f", most of them in {found}" if found else ""
