"""The meaning of the simulation's workflows: their source, run by plain Python on a small engine of its own.

No kwflow code runs here: no lowering, no snapshots, no steps.  Generators stay alive from their first record to their last, one
instance at a time, and whatever a record makes ready runs at once.  Only inputs and outputs are in kwflow's terms: refs, ops,
topics.  semantics.md and wire.md §2 define the order; where this and the product differ, one of them is wrong.
"""

import collections
import contextlib
import itertools
import json
import math
import pathlib
import re
import types
import zlib
from typing import Any, Optional

__all__ = ["Instance", "Unpredicted"]

OK, FAILED = "ok", "failed"
MAX_ATTEMPTS, FIRST_PAUSE_S, JITTER, TIMED_S = 3, 0.5, 0.5, 4  # of the simulation's activities (activities.py)
ACTIVITIES = {"mailed": "sim-mail", "queued": "sim-queue", "queued-beating": "sim-queue", "queued-timed": "sim-queue", "timed": "", "work": ""}  # name -> queue
Record = dict[str, Any]  # offset, at, value, op, id, start, request, parent, travelling
Said = tuple[str, str, Any]  # topic, key, value


class Unpredicted(Exception):
    """The fate of this instance depends on more than its records: on sizes, on saving, on which process dies."""


class Cancelled(BaseException):
    pass


class WorkflowError(Exception):
    def __init__(self, payload: Any = None) -> None:
        super().__init__(payload)
        self.payload = payload


class ChildError(WorkflowError):
    @property
    def outcome(self) -> str:
        return str(self.payload["outcome"])


class ActivityError(Exception):
    def __init__(self, message: str, type: str, final: bool = False) -> None:
        super().__init__(message)
        self.type, self.final = type, final


class BusinessError(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class StuckError(Exception):
    pass


# -- what can be waited for ---------------------------------------------------------------------------------------------
class Wait:
    def __init__(self) -> None:
        self.state, self.value = "", None
        self.waiters: list[Any] = []


class Ref(Wait):
    """A wait that a record ends, or a condition.  `kind` is answer, timer, activity, job, child, signal, update or condition; the `name` of a job is its queue."""

    def __init__(self, ref: str, kind: str, name: str = "", policy: str = "") -> None:
        super().__init__()
        self.ref, self.kind, self.name, self.policy = ref, kind, name, policy
        self.mail: Any = None
        self.call: Any = None  # of a job: what it was handed out with
        self.predicate: Any = None
        self.due = 0

    @property
    def outside(self) -> bool:
        return self.kind in ("timer", "activity", "job", "child")


class Task(Wait):
    def __init__(self, gen: Any, shielded: bool) -> None:
        super().__init__()
        self.gen, self.shielded = gen, shielded
        self.begun = self.asked = False
        self.cancelled_in = 0
        self.pending: Any = None
        self.on: Wait | None = None
        self.made: list[Task] = []


class Several(Wait):
    """A combinator.  `kind` is all, race, timeout or shield; `own` has the parts that are cancelled in the end, None means all."""

    def __init__(self, kind: str, parts: list[Wait], keys: list[Any] | None = None, wait_rest: bool = False, own: list[Wait] | None = None, seconds: float = 0) -> None:
        super().__init__()
        self.own, self.seconds = own, seconds
        self.kind, self.parts, self.keys, self.wait_rest = kind, list(dict.fromkeys(parts)), keys, wait_rest
        self.inputs, self.decided, self.held = parts, None, False

    def decide(self, part: Wait) -> Any:
        if self.kind == "shield":
            return (FAILED, Cancelled()) if self.held else (part.state, part.value)
        if self.kind == "timeout" and part is not self.inputs[0]:
            return (FAILED, TimeoutError(f"kw.timeout: not done within {self.seconds:.15g} s")) if part.state == OK else None
        if part.state == FAILED or self.kind == "timeout":
            return part.state, part.value
        if self.kind == "all":
            return (OK, [one.value for one in self.inputs]) if all(one.state == OK for one in self.parts) else None
        return OK, part.value if self.keys is None else (self.keys[self.inputs.index(part)], part.value)

    def losers(self, part: Wait) -> list[Wait]:
        if self.kind == "shield":
            return [part] if self.held else []
        return self.cancelled([one for one in self.parts if one is not part]) if self.kind != "all" or part.state == FAILED else []

    def cancelled(self, parts: list[Wait]) -> list[Wait]:
        return parts if self.own is None else [part for part in parts if part in self.own]


class Inbox:
    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name

    def wait(self) -> Ref:
        return running().register(self.kind, self.name)

    def take(self) -> list[Any]:
        found = []
        while (mail := running().take(self.kind, self.name)) is not None:
            found.append(mail["value"])
        return found


class Update:
    def __init__(self, value: Any, waiting: list[str], id: str | None, accepted: int) -> None:
        """`accepted` is the offset of its record."""
        self.value, self.waiting, self.id, self.accepted = value, waiting, id, accepted

    def __enter__(self) -> "Update":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if _running and self in running().open:
            running().answer_update(self, "ok" if error is None else "rejected", None)


# -- what authors call ----------------------------------------------------------------------------------------------------
_running: list["Instance"] = []


def running() -> "Instance":
    return _running[-1]


class Kw:
    """The part of kwflow's API that workflows.py uses."""

    Cancelled, ActivityError, BusinessError, ChildError = Cancelled, ActivityError, BusinessError, ChildError

    def declare_topics(self, *names: str) -> None: ...

    def workflow_id(self) -> str:
        return running().id if _running else ""

    def output(self, value: str, topic: str) -> None:
        if len(value) > 100_000:
            raise Unpredicted("a record that is refused")
        if _running:  # if not, a dropped generator is running its cleanup
            running().say(topic, running().id, value)

    def suspend(self) -> Ref:
        made = running().register("answer")
        made.id = made.ref  # type: ignore[attr-defined]
        return made

    def wait_condition(self, predicate: Any) -> Ref:
        made = running().register("condition")
        made.predicate = predicate
        return made

    def sleep(self, seconds: float) -> Ref:
        made = running().register("timer")
        delay = max(1, math.ceil(round(seconds * 1000, 6)))
        made.due = running().record["at"] + delay
        running().timer(made, str(delay))
        return made

    def all(self, items: list[Any]) -> Wait:
        return running().combine(Several("all", [running().started(item) for item in items]))

    def race(self, items: Any, wait_rest: bool = False, cancel_rest: bool = True) -> Wait:
        keys = list(items) if isinstance(items, dict) else None
        given = list(items.values() if keys is not None else items)
        parts = [running().started(item) for item in given]
        own = None if cancel_rest else [part for part, item in zip(parts, given, strict=True) if isinstance(item, Inbox)]
        return running().combine(Several("race", parts, keys, wait_rest, own))

    def timeout(self, item: Any, seconds: float, wait_rest: bool = False) -> Wait:
        return running().combine(Several("timeout", [running().started(item), self.sleep(seconds)], wait_rest=wait_rest, seconds=seconds))

    def shield(self, gen: Any) -> Wait:
        task = running().adopt(gen)
        task.shielded = True
        running().begin(task)
        return running().combine(Several("shield", [task]))

    def spawn(self, gen: Any) -> Wait:
        return running().started(gen)

    def cancel(self, task: Wait) -> None:
        running().cancel([task])

    def start_child(self, workflow: str, input: Any, parent_close: str) -> Ref:
        made = running().register("child", policy=parent_close)
        running().say("resume", f"{running().id}/{made.ref}", {"new": input, "parent": f"{running().id}|{made.ref}"})
        return made

    def wait_signal(self, name: str) -> Ref:
        return Inbox("signal", name).wait()

    def signals(self, name: str) -> Inbox:
        return Inbox("signal", name)

    def send_signal(self, other: str, name: str, value: Any, start: Any = None, input: Any = None) -> None:
        running().say("resume", other, {"name": name, "value": value, **({"start": {"workflow": "main", "input": input}} if start else {})})

    def on_update(self, name: str, validator: Any = lambda value: None) -> Inbox:
        running().validators[name] = validator
        return Inbox("update", name)

    def reply(self, update: Update, value: Any) -> None:
        running().answer_update(update, "ok", value)

    def reject(self, update: Update, reason: str) -> None:
        running().answer_update(update, "rejected", None)

    def set_status(self, value: Any) -> None: ...


def attempts(name: str, plan: list[str]) -> Any:
    """An activity call, from its first attempt to its end."""
    number, key = 1, ""
    while True:
        queue = ACTIVITIES[name]
        attempt = running().register("job" if queue else "activity", queue)
        key = key or attempt.ref
        if queue:
            running().hand_out(attempt, name, number, key, plan)
        try:
            return (yield kw.timeout(attempt, TIMED_S) if name.endswith("timed") else attempt)
        except WorkflowError as error:
            told = error.payload
            failure: Any = BusinessError(told["code"]) if told["kind"] == "business" else ActivityError(told["message"], told["type"], told.get("final") is True)
        except TimeoutError:
            failure = ActivityError("it had no result", "Timeout")
        if isinstance(failure, BusinessError) or failure.final or number == MAX_ATTEMPTS:
            raise failure
        pause_s = FIRST_PAUSE_S * 2 ** (number - 1) * (1 - JITTER * zlib.crc32(f"{running().id}|{key}|{number}".encode()) / 2**32)
        yield kw.sleep(pause_s)
        number += 1


def _impossible() -> None:
    raise Unpredicted("a process that dies, or a state that cannot be saved")


kw = Kw()
_source = re.sub(r"^(import|from) .*$", "", pathlib.Path(__file__).with_name("workflows.py").read_text(), flags=re.MULTILINE)
WORKFLOWS: dict[str, Any] = {
    "json": json, "kw": kw, "threading": types.SimpleNamespace(Lock=_impossible), "probes": types.SimpleNamespace(cleaned=lambda id: None, kill=_impossible),
    "activities": types.SimpleNamespace(KINDS={name: lambda plan, name=name: running().started(attempts(name, plan)) for name in ACTIVITIES}),
}  # fmt: skip
exec(compile(_source, "workflows.py, natively", "exec"), WORKFLOWS)


# -- one instance ----------------------------------------------------------------------------------------------------------
class Instance:
    """All runs of one id, one after the other.  `said` has their outputs, in order; `replies` has the replies to each request."""

    def __init__(self, id: str, checkpoints: int = 0) -> None:
        self.id = id
        self.checkpoints = checkpoints  # how many earlier states are kept
        self.states: list[tuple[int, int]] = []  # for each state that it had, by number: the offset of the record that led to it, -1 if that was held; and that of its start
        self.went_back = 0
        self.earlier: Any = None  # offset -> this instance, played up to there
        self.said: list[Said] = []
        self.replies: dict[str, list[tuple[str, Any]]] = collections.defaultdict(list)
        self.kept: list[Any] = []  # forgotten generators, kept because closing them now would make them write something
        self.forks: list[Record] = []  # the records that copied it
        self.ended: dict[str, Any] | None = None  # of the last run, if a client named it
        self.main: Task | None = None

    def apply(self, record: Record) -> None:
        _running.append(self)
        try:
            self.record, self.ids = record, 0
            self._apply(record)
        finally:
            _running.pop()

    def become(self, id: str, record: Record) -> None:
        """Become the copy that this record made: nobody waits for it, and its timers are its own."""
        self.id, self.said, self.forks, self.start, self.parent, self.ended, self.record = id, [], [], record["fork start"], None, None, record
        self.replies.clear()
        self.begun = record["offset"]
        self.states = [(record["offset"], self.begun)]
        self.paused, self.hold, self.known = False, [], {}
        for update in self.open:
            update.waiting, update.id = [], None
        self._ask_again(list(self.waits.values()))

    def _ask_again(self, waits: list[Ref]) -> None:
        """Set the timers, and make the calls in queues, that these waits are for."""
        for wait in waits:
            if wait.kind == "timer":
                self.timer(wait, str(max(1, wait.due - self.record["at"])))
            elif wait.kind == "job":
                self.hand_out(wait, *wait.call)

    def close(self) -> None:
        """Forget the instance.  Its generators are closed now, while nobody takes what they write."""
        for task in (*self.kept, *(self.tasks if self.main is not None else ())):
            with contextlib.suppress(BaseException):
                task.gen.close()

    def _apply(self, record: Record) -> None:
        op, value = record["op"], record["value"]
        if op == "heartbeat":
            return
        if op is None and isinstance(value, dict) and "new" in value:
            self._start(record)
        elif self.main is None and op == "signal" and "start" in value:
            self._start({**record, "value": {"new": value["start"]["input"]}}, lambda: self._put_signal(record))
        elif self.main is None and not (op == "fork" and value.get("at") is not None and self.ended is not None):
            self._absent(record)
        elif op in ("query", "terminate", "pause", "unpause", "retry", "discard", "fork", "rewind"):
            self._command(record)
        elif self.paused:
            self._keep(record)
        elif op is not None:
            self._message(record)
        elif isinstance(value, dict) and (wait := self.waits.get(value.get("ref"))) is not None and wait.kind not in ("signal", "update", "condition"):
            self.reply(record, "delivered")
            failed = "error" in value
            error = value.get("error")
            made = (ChildError if wait.kind == "child" and isinstance(error, dict) and error.get("kind") == "child" else WorkflowError)(error) if failed else value.get("value")
            self.step(lambda: self.settle(wait, FAILED if failed else OK, made))
        else:
            self.reply(record, "unknown_ref")

    def _keep(self, record: Record) -> None:
        """Hold the record.  Who answers a call, perhaps one that nobody waits for any more, is told so, and of nothing more."""
        ref = record["value"].get("ref") if record["op"] is None and isinstance(record["value"], dict) else None
        if ref is not None and (self.waits[ref].kind == "job" if ref in self.waits else re.fullmatch(r"\d+:\d+", ref)):
            self.reply(record, "held")
            record = {**record, "request": None}
        self.hold.append(record)

    def reply(self, record: Record, status: str, value: Any = None) -> None:
        if record["request"]:
            self.replies[record["request"]].append((status, value))

    def remember(self, record: Record, status: str, value: Any = None) -> None:
        if record["id"] is not None:
            self.known[record["id"]] = (status, value)
        self.reply(record, status, value)

    def _start(self, record: Record, before: Any = lambda: None) -> None:
        if self.main is not None:
            if self.paused:
                self.hold.append(record)
            return
        if self.ended is not None and record["start"] == self.ended["start"]:
            return
        self.start, self.parent, self.ended, self.begun = record["start"], record["parent"], None, record["offset"]
        self.paused, self.closing, self.steps = False, False, 0
        self.hold: list[Record] = []
        self.waits: dict[str, Ref] = {}
        self.tasks: list[Task] = []
        self.joins: list[Several] = []
        self.queue: collections.deque[Any] = collections.deque()
        self.stack: list[Task] = []
        self.known: dict[str, tuple[str, Any]] = {}
        self.mail: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.given: list[tuple[str, str]] = []
        self.validators: dict[str, Any] = {}
        self.open: list[Update] = []
        self.numbers = itertools.count()
        self.now = record["at"]

        def first() -> None:
            before()
            self.main = self.adopt(WORKFLOWS["main"](record["value"]["new"]))
            self.begin(self.main)

        self.step(first)

    def _absent(self, record: Record) -> None:
        known = (self.ended or {"known": {}})["known"].get(record["id"])
        if record["op"] == "query" and self.ended is not None and record["start"] in (None, self.ended["start"]):
            known = ("ok", ...)
        self.reply(record, *known or ("ended" if self.ended and record["op"] == "update" else "not_found" if record["op"] or record["value"].get("ref") else "",))

    def _command(self, record: Record) -> None:
        """A command that works on the stored instance."""
        op = record["op"]
        if record["start"] not in (None, self.start):
            return self.reply(record, "not_found")
        if record["id"] in self.known and record["id"] is not None:
            return self.reply(record, *self.known[record["id"]])
        if op == "query":
            self.reply(record, "ok", ...)
        elif op == "rewind":
            self._rewind(record)
        elif op == "fork" and record["value"].get("at") is not None:
            if record["away"] or (earlier := self._at(record["value"]["at"])) is None or earlier.closing or any(wait.kind == "child" for wait in earlier.waits.values()):
                return self.reply(record, "rejected")
            self.forks.append(record)
            (self.known if self.main is not None or self.ended is None else self.ended["known"])[record["id"]] = ("ok", ...)
            self.reply(record, "ok", ...)
        elif op == "fork":
            alone = ("child",) if self.checkpoints else ("child", "job")  # with checkpoints, the arguments of calls in queues are kept
            if self.closing or record["away"] or any(wait.kind in alone for wait in self.waits.values()):
                return self.reply(record, "rejected")
            self.forks.append(record)
            self.remember(record, "ok", ...)
        elif op == "terminate":
            for held in self.hold:
                self.reply(held, "not_found")
            for wait in self.waits.values():
                self.leave(wait)
            if not self.closing:
                said = f"Terminated: {record['value']['reason']}" if (record["value"] or {}).get("reason") else "Terminated"
                self.say("error", self.id, said)
                self.tell_parent("terminated", said)
            for update in self.open:
                self.answer_update(update, "ended", None, forget=False)
            self.end({**self.known, **({record["id"]: ("ok", None)} if record["id"] else {})})
            self.reply(record, "ok")
        elif op == "pause":
            self.paused = True
            self.remember(record, "ok")
        elif op == "unpause":
            hold, self.paused, self.hold = self.hold, False, []
            for held in hold:
                self.record, self.ids = held, 0
                self._apply(held)
                self.states = [(-1 if offset == held["offset"] else offset, run) for offset, run in self.states]  # played again, it would be held
            if self.main is not None or self.ended is not None:
                (self.known if self.main is not None else self.ended["known"])[record["id"]] = ("ok", None)  # type: ignore[index]
            self.reply(record, "ok")

    def _at(self, number: int) -> Optional["Instance"]:
        """This instance as it was in an earlier state; None if that is not kept.  Raises Unpredicted."""
        current = len(self.states) - (self.main is not None)
        if not max(0, current - self.checkpoints) <= number < current:
            return None
        return self.earlier(self.reached(number))  # type: ignore[no-any-return]

    def reached(self, number: int) -> int:
        """The offset of the record that led to this state.  Raises Unpredicted."""
        offset = self.states[number][0]
        if offset < 0:
            raise Unpredicted(self.id)
        return offset

    def _rewind(self, record: Record) -> None:
        """Go on from an earlier state.  Who waits for the instance, what it has applied and what it holds stay as they are."""
        number = record["value"]["to"]
        earlier = None if self.closing else self._at(number)
        if earlier is None or self.states[number][1] != self.begun or any(wait.kind == "child" and ref not in self.waits for ref, wait in earlier.waits.items()):
            return self.reply(record, "rejected")
        for ref, wait in self.waits.items():
            if ref not in earlier.waits and wait.outside:
                self.leave(wait)
        self._ask_again([wait for ref, wait in earlier.waits.items() if ref not in self.waits])
        known = {update.accepted: update for update in self.open}
        for update in self.open:
            if update.accepted not in {other.accepted for other in earlier.open}:
                self.answer_update(update, "rejected", None, forget=False)
                if update.id is not None:
                    self.known[update.id] = ("rejected", None)
        for update in earlier.open:
            before = known.get(update.accepted)
            update.waiting, update.id = (before.waiting, before.id) if before is not None else ([], None)
        self.kept += self.tasks
        for name in ("waits", "tasks", "joins", "queue", "stack", "mail", "given", "validators", "open", "now", "main", "steps"):
            setattr(self, name, getattr(earlier, name))
        self.went_back += 1
        self.states.append((record["offset"], self.begun))
        self.remember(record, "ok")

    def _message(self, record: Record) -> None:
        """Signal, update or cancel, in which author code takes part."""
        op, value = record["op"], record["value"]
        if record["start"] not in (None, self.start):
            return self.reply(record, "not_found")
        known = self.known.get(record["id"]) if record["id"] is not None else None
        if known is not None and known[0] == "pending":
            next(update for update in self.open if update.id == record["id"]).waiting.extend([record["request"]] if record["request"] else [])
            return self.step(self._unchanged)
        if known is not None:
            return self.reply(record, *known)
        if op == "cancel":

            def cancel() -> None:
                self.cancel([task for task in self.tasks] if self.closing else [self.main])  # type: ignore[list-item]
                self.remember(record, "ok")

            self.step(cancel)
        elif op == "signal":
            self.step(lambda: self._put_signal(record))
        else:
            self.step(lambda: self._update(record, value))

    def _put_signal(self, record: Record) -> None:
        value = record["value"]
        self.put("signal", value["name"], value.get("value"), record["at"] + value["ttl_ms"] if value.get("ttl_ms") else math.inf)
        self.remember(record, "delivered")
        self.deliver("signal", value["name"])

    def _unchanged(self) -> None:
        """This step leaves no state of its own."""
        self.changed = False

    def _update(self, record: Record, value: Any) -> None:
        if self.closing:
            self._unchanged()
            return self.reply(record, "ended")
        try:
            self.validators[value["name"]](value["value"])
        except (KeyError, ValueError):
            self._unchanged()
            return self.reply(record, "rejected")
        update = Update(value["value"], [record["request"]] if record["request"] else [], record["id"], record["offset"])
        self.open.append(update)
        if record["id"] is not None:
            self.known[record["id"]] = ("pending", None)
        self.put("update", value["name"], update, math.inf)
        self.deliver("update", value["name"])

    def answer_update(self, update: Update, status: str, value: Any, forget: bool = True) -> None:
        for request in update.waiting:
            self.replies[request].append((status, value))
        if forget and update in self.open:
            self.open.remove(update)
            if update.id is not None:
                self.known[update.id] = (status, value)

    # -- what is written -----------------------------------------------------------------------------------------------
    def say(self, topic: str, key: str, value: Any) -> None:
        self.said.append((topic, key, value))

    def timer(self, wait: Ref, value: str) -> None:
        self.say("scheduler", f"{self.id}|" + json.dumps({"ref": wait.ref}, separators=(",", ":")), value)

    def hand_out(self, wait: Ref, name: str, attempt: int, key: str, plan: list[str]) -> None:
        wait.call = (name, attempt, key, plan)
        asked = {"activity": f"sim-{name}", "attempt": attempt, "idempotency_key": f"{self.id}|{key}", "arguments": {"plan": plan}}
        self.say(wait.name, f"{self.id}|{wait.ref}", {"resume_topic": "workflow-resume", "workflow_id": self.id, "ref": wait.ref, **asked})

    def leave(self, wait: Ref) -> None:
        """Leave a wait: tell the timer, worker or child behind it that nobody waits any more."""
        if wait.kind == "timer":
            self.timer(wait, "0")
        elif wait.kind == "job":
            self.say(wait.name, f"{self.id}|{wait.ref}", None)
        elif wait.kind == "child" and wait.policy != "abandon":
            self.say("resume", f"{self.id}/{wait.ref}", {"op": wait.policy, "start": f"{self.id}|{wait.ref}"})

    def tell_parent(self, outcome: str, value: Any) -> None:
        if self.parent is not None:
            key, _, ref = self.parent.partition("|")
            body = {"value": value} if outcome == "result" else {"error": {"kind": "child", "id": self.id, "outcome": outcome, "error": value}}
            self.say("resume", key, {"ref": ref, **body})

    # -- a step --------------------------------------------------------------------------------------------------------
    def step(self, first: Any) -> None:
        self.changed = True
        self.steps += 1
        self.now = max(self.now, self.record["at"])
        first()
        for _ in range(100):
            self.drain()
            if self.main.state or self.can_be_woken():  # type: ignore[union-attr]
                break
            self.interrupt(self.main, StuckError("the workflow is stuck: nothing can wake it any more"))  # type: ignore[arg-type]
        if self.closing and (not self.tasks or not self.can_be_woken()):
            for wait in self.waits.values():
                if wait.outside:
                    self.leave(wait)
            self.end(self.known)
        if self.main is not None and self.changed:
            self.states.append((self.record["offset"], self.begun))

    def can_be_woken(self) -> bool:
        return any(wait.kind != "condition" for wait in self.waits.values())

    def end(self, known: dict[str, Any]) -> None:
        self.kept += self.tasks
        own = "own" if self.checkpoints else None  # an entry stays as long as there may be checkpoints, whoever chose the start id
        self.ended = {"start": self.start or own, "known": known} if self.start or own else None
        self.main = None

    def register(self, kind: str, name: str = "", policy: str = "") -> Ref:
        while True:
            self.ids += 1
            ref = f"{self.record['offset']}:{self.ids}"
            if ref not in self.waits:
                break
        self.waits[ref] = Ref(ref, kind, name, policy)
        return self.waits[ref]

    def adopt(self, gen: Any) -> Task:
        task = Task(gen, bool(self.stack and self.stack[-1].shielded))
        self.tasks.append(task)
        if self.stack:
            self.stack[-1].made.append(task)
        return task

    def started(self, item: Any) -> Wait:
        if not isinstance(item, types.GeneratorType):
            return item if isinstance(item, Wait) else item.wait()
        task = self.adopt(item)
        self.begin(task)
        return task

    def begin(self, task: Task) -> None:
        task.pending = (OK, None)
        self.drive(task)

    def drain(self) -> None:
        while self.queue or self.given:
            while self.queue:
                item = self.queue.popleft()
                if isinstance(item, Ref):
                    self.leave(item)
                    self.settle(item, FAILED, Cancelled())
                else:
                    self.drive(item)
                self.check_joins()
            while self.given:
                self.deliver(*self.given.pop(0))
            self.check_joins()
        self.check_joins()
        if self.queue or self.given or self.met():
            self.drain()

    def met(self) -> bool:
        """Settle the first condition that holds; whether there was one."""
        for wait in [wait for wait in self.waits.values() if wait.kind == "condition" and wait.waiters]:
            try:
                state, value = OK, wait.predicate()
            except Exception as error:
                state, value = FAILED, error
            if value:
                self.settle(wait, state, value)
                return True
        return False

    def drive(self, task: Task) -> None:
        """Run a task, and the generators that it yields, until the innermost one waits or all have ended."""
        base = len(self.stack)
        self.stack.append(task)
        while len(self.stack) > base:
            current = self.stack[-1]
            target = self.advance(current)
            if target is None:
                self.stack.pop()
                if len(self.stack) > base:
                    self.stack[-1].pending = (current.state, current.value)
            elif isinstance(target, Task) and not target.begun:
                target.pending = (OK, None)
                self.stack.append(target)
            else:
                blocked = self.stack[base:]
                del self.stack[base:]
                for one in reversed(blocked):
                    one.on = target
                    target.waiters.append(one)
                    target = one
                for one in blocked:
                    if one.asked:
                        one.asked = False
                        if one.on is not None:
                            self.cancel([one.on])

    def advance(self, task: Task) -> Wait | None:
        task.begun = True
        while True:
            (state, value), task.pending = task.pending, None
            try:
                target = task.gen.send(value) if state == OK else task.gen.throw(value)
            except Unpredicted:
                raise
            except StopIteration as stop:
                self.finish(task, OK, stop.value)
                return None
            except BaseException as error:
                self.finish(task, FAILED, error)
                return None
            if isinstance(target, types.GeneratorType):
                return self.adopt(target)
            if isinstance(target, Inbox):
                target = target.wait()
            if not isinstance(target, Wait):
                task.pending = (OK, target)
            elif target.state or (isinstance(target, Ref) and self.fetch(target)):
                self.read(target)
                task.pending = (target.state, target.value)
            else:
                return target

    def finish(self, task: Task, state: str, value: Any) -> None:
        task.asked = False
        self.tasks.remove(task)
        self.settle(task, state, value)
        if task is not self.main:
            return
        if state == OK:
            self.say("result", self.id, value)
            self.tell_parent("result", value)
        else:
            text = "CancelToken" if isinstance(value, Cancelled) else f"{type(value).__name__}: {value}" if str(value) else type(value).__name__
            said = value.payload if isinstance(value, WorkflowError) else text
            self.say("error", self.id, said)
            self.tell_parent("cancelled" if isinstance(value, Cancelled) else "error", said)
        for update in list(self.open):
            self.answer_update(update, "ended", None)
        self.closing = True
        cleaning: list[Wait] = [one for one in self.tasks if one.cancelled_in]
        for wait in cleaning:  # the list grows during the loop
            below = wait.parts if isinstance(wait, Several) else [wait.on] if isinstance(wait, Task) and wait.on is not None else []
            cleaning += [one for one in below if not one.state and one not in cleaning]
        for one in list(self.tasks):
            if not one.state and one not in cleaning and not one.shielded:
                self.cancel([one])
        self.cancel([wait for wait in list(self.waits.values()) if wait.outside and not wait.waiters])

    # -- settling ------------------------------------------------------------------------------------------------------
    def settle(self, target: Wait, state: str, value: Any) -> None:
        self.cancel(self.up(target, state, value))

    def up(self, target: Wait, state: str, value: Any) -> list[Wait]:
        """Settle a wait, and all waits that it decides; return the losers, inner ones first."""
        losers: list[Wait] = []
        work = [(target, state, value)]
        for item, item_state, item_value in work:
            item.state, item.value = item_state, item_value
            if isinstance(item, Ref) and self.waits.get(item.ref) is item:
                del self.waits[item.ref]
            waiters, item.waiters = item.waiters, []
            for waiter in waiters:
                if isinstance(waiter, Several):
                    if self.decides(waiter, item):
                        losers += self.part(waiter)
                        if not self.has_to_join(waiter):
                            work.append((waiter, *waiter.decided))  # type: ignore[misc]
                elif waiter.on is item:
                    self.read(item)
                    waiter.on, waiter.pending = None, (item_state, item_value)
                    self.queue.append(waiter)
        return losers

    def combine(self, several: Several) -> Several:
        settled = False
        for part in several.parts:
            if isinstance(part, Ref) and not part.state and (not settled or several.kind == "all"):
                self.fetch(part)
            settled = settled or bool(part.state)
        for part in several.parts:
            if not part.state:
                part.waiters.append(several)
        if not several.parts and several.kind == "all":
            several.state, several.value = OK, []
        for part in several.parts:
            if part.state and several.decided is None:
                self.decides(several, part)
        if several.decided is not None:
            losers = self.part(several)
            if not self.has_to_join(several):
                losers += self.up(several, *several.decided)
            self.cancel(losers)
        return several

    def decides(self, several: Several, part: Wait) -> bool:
        if several.decided is not None or several.state:
            return False
        several.decided = several.decide(part)
        if several.decided is not None:
            for loser in several.losers(part):
                self.give_back(loser)
        return several.decided is not None

    def part(self, several: Several) -> list[Wait]:
        rest = [part for part in several.parts if not part.state]
        for one in rest:
            one.waiters = [waiter for waiter in one.waiters if waiter is not several]
        return several.cancelled(rest) if several.kind != "shield" else []

    def has_to_join(self, several: Several) -> bool:
        if several.wait_rest and unsettled(several):
            self.joins.append(several)
            return True
        return False

    def check_joins(self) -> None:
        for several in list(self.joins):
            if several in self.joins and not unsettled(several):
                self.joins.remove(several)
                self.settle(several, *several.decided)  # type: ignore[misc]
                self.check_joins()

    # -- cancelling ----------------------------------------------------------------------------------------------------
    def cancel(self, targets: list[Wait]) -> None:
        for target in targets:
            if target.state:
                continue
            if isinstance(target, Task):
                if target.cancelled_in == self.steps:
                    continue
                target.cancelled_in = self.steps
                if target.on is None:
                    target.asked = True
                else:
                    self.cancel([target.on])
            elif isinstance(target, Several) and target.kind == "shield":
                target.held = True
            elif isinstance(target, Several):
                for part in target.parts:
                    self.give_back(part)
                if target.decided is not None:
                    target.decided = (FAILED, Cancelled())
                if target.parts:
                    self.cancel(target.parts)
                else:
                    self.settle(target, FAILED, Cancelled())
            elif isinstance(target, Ref) and target.outside:
                if self.waits.pop(target.ref, None) is not None:
                    self.queue.append(target)
            else:
                self.settle(target, FAILED, Cancelled())

    def interrupt(self, task: Task, error: BaseException) -> None:
        if task.on is not None:
            task.on.waiters = [waiter for waiter in task.on.waiters if waiter is not task]
        task.on, task.pending = None, (FAILED, error)
        self.queue.append(task)

    # -- mail ----------------------------------------------------------------------------------------------------------
    def put(self, kind: str, name: str, value: Any, expires: float) -> None:
        self.mail.setdefault((kind, name), []).append({"number": next(self.numbers), "value": value, "expires": expires})

    def take(self, kind: str, name: str) -> dict[str, Any] | None:
        box = self.mail.get((kind, name), [])
        while box:
            mail = box.pop(0)
            if self.now < mail["expires"]:
                return mail
        return None

    def fetch(self, wait: Ref) -> bool:
        mail = self.take(wait.kind, wait.name) if wait.kind in ("signal", "update") else None
        if mail is None:
            return False
        wait.mail = mail
        self.settle(wait, OK, mail["value"])
        return True

    def deliver(self, kind: str, name: str) -> None:
        for wait in list(self.waits.values()):
            if (wait.kind, wait.name) == (kind, name) and wait.waiters and not wait.state and not self.fetch(wait):
                return

    def read(self, target: Wait) -> None:
        """Note that the mail that this wait took has reached author code."""
        for wait in below(target):
            if isinstance(wait, Ref):
                wait.mail = None

    def give_back(self, target: Wait) -> None:
        found, several = [], []
        for wait in below(target):
            if isinstance(wait, Ref) and wait.mail is not None:
                box = self.mail.setdefault((wait.kind, wait.name), [])
                box.append(wait.mail)
                box.sort(key=lambda mail: mail["number"])
                found.append((wait.kind, wait.name))
                wait.mail = None
                wait.state, wait.value = FAILED, Cancelled()
            elif isinstance(wait, Several) and wait.state == OK:
                several.append(wait)
        self.given += found
        for one in several if found else []:
            one.state, one.value = FAILED, Cancelled()


def below(target: Wait) -> list[Wait]:
    """A wait and the waits below it, but not below tasks."""
    return [target, *(one for part in target.parts for one in below(part))] if isinstance(target, Several) else [target]


def unsettled(target: Wait) -> bool:
    """Whether anything below it still runs."""
    if isinstance(target, Several):
        return any(not part.state or unsettled(part) for part in target.parts)
    return isinstance(target, Task) and (not target.state or any(unsettled(made) for made in target.made))
