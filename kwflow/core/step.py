"""step(instance, record, context) -> Transition: the main path; read this first.

Pure: a function of its arguments.  This module decides what a record does to an instance.  `calls.py` holds the calls
that author code makes in a step, `messages.py` what commands do, `machine.py` moves the tasks, `snapshot.py` turns
instances into bytes, and a runner makes the Transition happen.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kwflow.core import children, messages, ops, outcomes, queues, typed, updates, wire
from kwflow.core.calls import Calls
from kwflow.core.contract import Context, Ended, Keep, Save, Transition
from kwflow.core.current import in_step, slot
from kwflow.core.dispatch import Withdraw
from kwflow.core.instance import CLOSING, Instance
from kwflow.core.snapshot import ended_header, failed_at, is_call, place_of, waits_of
from kwflow.core.tasks import ABORTS, FAILED, OK, Awaitable, Condition, Outcome, Suspension, Task, Timer
from kwflow.core.values import json_dumps
from kwflow.core.wire import Record
from kwflow.durable.driving import set_driving
from kwflow.durable.tracebacks import forget_catcher
from kwflow.errors import ActivityError, BusinessError, Cancelled, KwflowBug, ProtocolError, StuckError, UncaughtError, UsageError, WorkflowError

__all__ = ["Step", "applied_before", "has_moved", "step"]

_TELL: dict[str, Callable[[Calls, Any], None]] = {  # by kind of wait: how to tell whoever works for it outside that it was cancelled
    "activity": lambda calls, wait: calls.dispatch.append(Withdraw(calls.instance.id, wait.ref)),
    "timer": lambda calls, timer: calls.write(calls.context.topics.scheduler, calls.timer_key(timer), b"0", calls.travelling),
    "child": children.parent_closed,
    "job": lambda calls, job: calls.write(job.queue, queues.key_of(calls.instance.id, job.ref), None, calls.travelling),
}
_NOBODY_CANCELLED = (
    "it has ended as cancelled, but nobody cancelled it: it waited for something already cancelled, such as a wait that lost a kw.race or kw.timeout; "
    "a wait can be used once: make a new one for each round (for signals, kw.signals(name) does), or keep it with cancel_rest=False"
)
_OUTCOMES = (ActivityError, BusinessError, Cancelled, TimeoutError, WorkflowError)  # of what a workflow waited for, or meant: they are no bugs of its code
_LOST_TOLD_MAX = 5  # in the log line that lists what nobody has awaited
_STUCK_MAX = 100  # a main that catches StuckError and again waits for what nothing can wake would keep the step in a loop for ever


def step(instance: Instance | None, record: Record, context: Context) -> Transition:
    """Apply one record.  Consumes `instance`: after any exception, load it again from its bytes.

    Raises ProtocolError if the record is to be dead-lettered; any other exception means that the step has failed and the
    instance is to be parked (G4).
    """
    name = wire.workflow_id(record)
    message = wire.parse(record)
    address = wire.reply_address(record) if record.headers else None
    if instance is not None and applied_before(instance.applied, record, context.incarnation):
        return Transition(Keep(), outcome="repeated")
    if isinstance(message, wire.Start):
        if instance is None:
            return _start(name, message, record, context)
        if context.workflows.option(message.workflow, "restart") and wire.short_header(record, "kwflow-start-id") != instance.start_id:
            return _restart(instance, message, record, context)
        return _known(instance.start_id, record, address, context)
    if isinstance(message, wire.Command):
        return _command(name, instance, message, record, context)
    wait = instance.waits.get(message.ref) if instance is not None and message.ref is not None else None
    if instance is None or wait is None or not wait.answerable:
        return messages.ignored("unknown-id" if instance is None else "unknown-ref", address)
    running = Step(instance, record, context)

    def resume() -> None:
        if wait.kind == "activity":
            running.dispatch.append(Withdraw(name, wait.ref))
        running.machine.settle(wait, *wait.answer(message.failed, message.value))

    if address is not None:
        running.answer("delivered")
    return running.run(resume, "resumed")


def applied_before(last: Sequence[Any] | None, record: Record, incarnation: str) -> bool:
    """Whether this record was applied already.  Offsets are comparable only within one incarnation and partition (wire.md §3)."""
    return last is not None and record.offset <= last[2] and not has_moved(last, record, incarnation)


def has_moved(last: Sequence[Any], record: Record, incarnation: str) -> bool:
    """Whether the offset of this record is of another log than that of the `last` one applied: the topic is another one, or the instance has moved to another partition."""
    return bool(last[1] != record.partition or last[0] != incarnation)


def _known(start_id: str, record: Record, address: wire.Address | None, context: Context) -> Transition:
    """A start of an id that is running changes nothing (G5).  Its sender is told whether it repeats the same start; a parent is told if it does not."""
    same = wire.short_header(record, "kwflow-start-id") == start_id
    replies = (wire.Reply(address, "duplicate" if same else "exists"),) if address is not None else ()
    told = () if same else children.refused(record, "exists", "another workflow runs under this id", context.topics.resume)
    return Transition(Keep(), told, replies=replies, outcome="duplicate-start")


def _restart(instance: Instance, message: wire.Start, record: Record, context: Context) -> Transition:
    """End the current run as `terminate` does, without running author code, and start a new one in the same step."""
    header = {"id": instance.id, "start_id": instance.start_id, "waits": waits_of(instance), **instance.extra}
    closing = ops.terminate(header, "restarted", record, context.topics)
    made = _start(instance.id, message, record, context)
    instance.forget()
    return msgspec.structs.replace(made, outputs=(*closing.outputs, *made.outputs), dispatch=(*closing.dispatch, *made.dispatch), replies=(*closing.replies, *made.replies), outcome="restarted")


def _start(name: str, message: wire.Start, record: Record, context: Context, before: Callable[[Calls], None] = lambda calls: calls.answer("started")) -> Transition:
    """Start a workflow.  `before` runs ahead of the workflow's first line; it is whatever else the record does."""
    workflow = message.workflow or context.workflows.default
    function = context.workflows.functions.get(workflow) if workflow is not None else None
    if workflow is None or function is None:
        known = ", ".join(sorted(context.workflows.functions)) or "none"
        said = f"no workflow {workflow!r} is registered" if workflow is not None else "it names no workflow, and there is no default one, as the engine's first module has no main"
        raise ProtocolError(f"{said}; there are: {known}", "unknown-workflow")
    options = message.options
    if workflow in context.workflows.inputs:  # before anything is done: an input that does not fit makes this a bad record
        options = typed.rebuilt_input(f"workflow {workflow!r}", context.workflows.inputs[workflow], options)
    instance = Instance(name, workflow, ops.place_of(record, context.moves), record.timestamp_ms)
    if context.moves:
        instance.extra["moves"] = context.moves
    if record.headers:
        instance.start_id = wire.short_header(record, "kwflow-start-id") or instance.start_id
        named = {"client": wire.short_header(record, "kwflow-client"), "parent": wire.parent_of(record)}
        instance.extra |= {entry: value for entry, value in named.items() if value is not None}
    running = Step(instance, record, context)

    def first() -> None:
        before(running)
        running.start_main(function, options)

    return running.run(first, "started")


def _command(name: str, instance: Instance | None, command: wire.Command, record: Record, context: Context) -> Transition:
    """Apply a command that involves author code; all other ops work on the header alone (ops.py)."""
    apply = messages.OPS.get(command.op)
    if apply is None:
        raise KwflowBug(f"op {command.op} is not for a step")
    start = command.arguments.start if isinstance(command.arguments, wire.Signal) else None
    if instance is None and start is not None:
        return messages.no_room(None, record, context.limits, command) or _start(name, wire.Start(start.input, start.workflow), record, context, lambda calls: apply(calls, command))
    if instance is None or (start is None and command.start_id is not None and command.start_id != instance.start_id):
        return messages.absent(command, wire.reply_address(record))
    running = Step(instance, record, context)
    known = messages.applied_before(running, command) or messages.no_room(instance, record, context.limits, command) or messages.no_migration(running, command)
    return known if known is not None else running.run(lambda: apply(running, command), command.op)


def _is_outcome(error: BaseException) -> bool:
    """Whether the error, or each one in a group, tells what became of something that the workflow waited for, or what it meant."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(_OUTCOMES)[1] is None
    return isinstance(error, _OUTCOMES)


class Step(Calls):
    """One step: it applies the record, then runs everything that this made ready; the instance afterwards is what the Transition says."""

    def run(self, first: Callable[[], None], outcome: str) -> Transition:
        """Call `first`, then run everything that it made ready.  The instance afterwards is what the Transition says."""
        if in_step():
            raise KwflowBug("a step inside a step")
        instance = self.instance
        instance.steps += 1
        if instance.applied is not None and has_moved(instance.applied, self.record, self.context.incarnation):
            instance.extra["moves"] = ops.moves(instance.extra, self.context.moves)
        instance.now_ms = max(instance.now_ms, self.record.timestamp_ms)
        collecting = gc.isenabled()
        before = set_driving(False, self.machine)
        gc.disable()  # semantics §3.3: a collection here could run another workflow's finally inside this step
        slot.step = self
        try:
            first()
            self._drain()
            if self.machine.bug is not None:
                raise self.machine.bug
        finally:
            slot.step = None
            set_driving(*before)
            if collecting:
                gc.enable()
        instance.applied = (self.context.incarnation, self.record.partition, self.record.offset)
        instance.updated_ms = self.record.timestamp_ms
        if instance.mailbox is not None:
            messages.describe(self, instance.mailbox)
        if "heartbeats" in instance.extra:
            ops.forget_heartbeats(instance.extra, instance.waits)
        state = self._state()
        del self.machine  # it refers to this step as its host: because of that cycle, only the collector would free each step
        return Transition(state, tuple(self.outputs), tuple(self.logs), tuple(self.dispatch), tuple(self.replies), self.outcome or outcome)

    def start_main(self, function: Callable[[Any], Any], options: object) -> None:
        """Call the workflow function.  The value of a plain function is the result (KW-32), its exception the error record (KW-25)."""
        task = Task(self.instance.task_next, None, getattr(function, "__qualname__", "main"))
        self.instance.task_next += 1
        self.instance.main = task
        try:
            made = self.classify(function(options))
            if isinstance(made, Awaitable):
                raise UsageError(f"{task.name} returned {made!r}; write `return (yield ...)`")
        except ABORTS:
            raise
        except BaseException as error:
            if type(error) is TypeError and error.__traceback__ is not None and error.__traceback__.tb_next is None:  # none of its lines has run
                error = UsageError(f"workflow {self.instance.workflow!r} is called with one argument, the JSON given at the start, as in `def main(opts)`: {error}")
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
            if main.settled or self.instance.can_be_woken:
                return
            if main.waiting_on is None:
                raise KwflowBug("main neither waits nor has ended")
            why = ": only its own tasks could meet a kw.wait_condition that it waits for, and none of them goes on" if self.instance.conditions else ""
            self.machine.interrupt(main, StuckError(f"the workflow is stuck: nothing can wake it any more{why}"))
        raise StuckError(f"the workflow waited for nothing {_STUCK_MAX} times in one step")

    def _state(self) -> Save | Ended:
        instance = self.instance
        if instance.status == CLOSING and (not instance.tasks or not instance.can_be_woken):
            for task in instance.tasks.values():
                self.logs.append(f"{task.name} was forgotten: main has ended and nothing could wake it")
            for wait in instance.waits.values():
                if wait.outside:  # left in a combinator that no task waits for
                    self.wait_cancelled(wait)
            return Ended(ended_header(instance))
        return Save(instance, self.changed)

    # -- what the machine asks for (machine.Host) ------------------------------------------------------------------
    def task_failed(self, task: Task) -> None:
        self.logs.append(f"{task.name} failed, and nobody awaits it: {outcomes.describe_error(task.value)}")

    def wait_cancelled(self, wait: Suspension) -> None:
        _TELL[wait.kind](self, wait)

    def ask(self, condition: Condition) -> Outcome | None:
        """`kw.*` does not work inside the function, so that it leaves nothing behind however often it is called."""
        slot.step = None
        try:
            value = condition.predicate()
            if isinstance(value, (types.GeneratorType, Awaitable)):
                raise UsageError(f"the function of a kw.wait_condition must be a plain one that returns whether it is met, but it returned {value!r}, which is a wait")
            return (OK, value) if value else None
        except ABORTS:
            raise
        except BaseException as error:
            forget_catcher(error)
            return FAILED, error
        finally:
            slot.step = self

    def _never_awaited(self) -> list[str]:
        """Name what main began and nobody has awaited: almost certainly a forgotten `yield`.

        A `kw.suspend`, a signal or a spawned generator is not named: that may be intended.
        """
        calls = [task.name for task in self.instance.tasks.values() if is_call(task) and not (task.observed or task.shielded or task.cancel_step)]
        waits = [wait for wait in self.instance.waits.values() if not wait.observed]
        children_of_it = [f"child {wait.child_id}" for wait in waits if isinstance(wait, children.Child) and wait.parent_close != "abandon"]
        return calls + children_of_it + [f"kw.sleep ({wait.ref})" for wait in waits if isinstance(wait, Timer)]

    def main_ended(self, main: Task) -> None:
        topics, outcome = self.context.topics, "result"
        headers = (*self.travelling, *outcomes.run_headers(self.instance.start_id, self.instance.extra))
        error: BaseException | None = main.value if main.state == FAILED else None  # never raised here: its traceback would keep this step and main alive
        value, topic = b"", topics.result
        if error is None:
            try:
                value = json_dumps(main.value)
                if len(value) > self.context.limits.value_bytes_max:
                    raise UsageError(f"the result has {len(value)} bytes, more than {self.context.limits.value_bytes_max} (limit value_bytes_max); return a reference instead, or raise the limit")
            except Exception as failed:  # the result may have no JSON form: this, too, is an error of the workflow
                error = failed
        at = failed_at(error) if error is not None else {}
        in_log = f"{type(error).__name__}{place_of(at)}; kwflow show has the details" if error is not None else ""  # without the error's message: many people read logs and the history
        if error is not None and not _is_outcome(error) and self.context.workflows.option(self.instance.workflow, "park_on_error"):
            raise UncaughtError(f"{outcomes.describe_error(error)}{place_of(at)}", in_log) from None
        if error is not None:
            outcome = "cancelled" if isinstance(error, Cancelled) else "error"
            value, topic = outcomes.error_value(error, self.context.limits.value_bytes_max), topics.error
            headers += (("kwflow-failure-type", type(error).__name__.encode()), ("kwflow-failure-traceback", outcomes.traceback_text(error)))
        if topic is not None:
            self.write(topic, self.instance.id.encode(), value, (*headers, ("kwflow-outcome", outcome.encode())))
        extra, limits = self.instance.extra, self.context.limits
        if outcome == "cancelled" and "cancel" not in extra:
            self.logs.append(_NOBODY_CANCELLED)
        if outcome == "result" and (lost := self._never_awaited()):
            told = ", ".join(lost[:_LOST_TOLD_MAX]) + (f" and {len(lost) - _LOST_TOLD_MAX} more" if len(lost) > _LOST_TOLD_MAX else "")
            self.logs.append(f"main has ended, which cancels calls that nobody has awaited: {told}; write `yield` or `await` before the call")
        if "parent" in extra:
            self.outputs.append(children.answer(extra["parent"], self.instance.id, outcome, value, topics.resume, limits.value_bytes_max, self.record.timestamp_ms))
        if outcome == "error":
            self.logs.append(f"ended with {in_log}")
        extra["outcome"] = outcomes.kept(outcome, value, at)
        updates.close(self)
