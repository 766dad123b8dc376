"""The machine that moves the tasks and waits of one instance within a step.

This module alone decides who is woken, cancelled and started, and in which order (wire.md §2).  It must not know records,
topics or JSON; `step.py` drives it.  Nothing here recurses over the author's data, because chains of waits may be
thousands deep.
"""

from __future__ import annotations

import contextlib
import types
from collections import deque
from typing import Any, Protocol, TypeVar

from kwflow.core.instance import CLOSING, Instance
from kwflow.core.mail import SignalWait, give_back, mark_read
from kwflow.core.tasks import ABORTS, FAILED, OK, PENDING, All, Awaitable, Combinator, Condition, Outcome, Shield, Suspension, Task, live_below
from kwflow.durable.tracebacks import forget_catcher, forget_frames
from kwflow.errors import Cancelled, KwflowBug, UsageError

__all__ = ["Host", "Machine"]

_Wait = TypeVar("_Wait", bound=Suspension)


class Host(Protocol):
    """What the machine needs from the step that runs it."""

    def classify(self, value: object) -> object:
        """Return what author code yielded as a generator, an awaitable or a plain value.  Raises UsageError."""

    def task_failed(self, task: Task) -> None:
        """Report that a task that nobody awaits has failed."""

    def wait_cancelled(self, wait: Suspension) -> None:
        """Tell whoever works for it outside, such as the scheduler or a child."""

    def ask(self, condition: Condition) -> Outcome | None:
        """Return the outcome of a condition that is met, or whose function fails; otherwise None."""

    def main_ended(self, main: Task) -> None:
        """Emit the result or error record."""


class Machine:
    """Moves the tasks and waits of one instance within one step."""

    def __init__(self, instance: Instance, host: Host, nesting_max: int, tasks_max: int) -> None:
        self.instance = instance
        self.host = host
        self.queue: deque[Task | Suspension] = deque()
        self.running: list[Task] = []
        self.bug: BaseException | None = None
        self._nesting_max = nesting_max
        self._tasks_max = tasks_max
        self._nesting = 0
        self._join_dirty = False
        self._mail: list[tuple[str, str]] = []  # (kind, name) of mail that was handed back and that a wait may be waiting for

    # -- called by lowered code (durable.runtime.Driver) -----------------------------------------------------------
    def delegating(self, gen: types.GeneratorType[Any, Any, Any]) -> None:
        """Refuse `yield from` of a generator that has begun: natively it would send None into it (semantics §1.2)."""
        if gen in self.instance.adopted() or gen.gi_suspended or gen.gi_frame is None:
            raise UsageError(f"`yield from` of {gen.__qualname__}, which has already started; write `yield` to wait for its result")

    def entered(self, manager: Any, value: Any) -> None:
        """Refuse a wait in a plain context manager: instead of being waited for, it would become the target of the `with` (semantics §5.6)."""
        if isinstance(value, Awaitable) and isinstance(manager, contextlib._GeneratorContextManager):
            name = getattr(manager.gen, "__qualname__", "the context manager")
            error = UsageError(f"{name} yields {value!r}, which `with` gives to its target instead of waiting for it; wait before or after {name}")
            manager.__exit__(UsageError, error, None)
            raise error

    def owns(self, gen: types.GeneratorType[Any, Any, Any]) -> bool:
        """Whether this generator is a task of this instance: one generator, one task (semantics §1.2)."""
        return gen in self.instance.adopted()

    def catching(self, error: BaseException) -> None:
        """Note an error that must end the step, so that it does even if author code swallows it (semantics §2.5)."""
        forget_frames(error)
        if isinstance(error, ABORTS):
            self.bug = self.bug or error

    # -- tasks ---------------------------------------------------------------------------------------------------
    def adopt(self, gen: types.GeneratorType[Any, Any, Any]) -> Task:
        """Return the task of this generator; it is created on first use, and not started."""
        instance = self.instance
        known = instance.adopted().get(gen)
        if known is not None:
            return known
        if gen.gi_frame is None or gen.gi_suspended or gen.gi_running:
            raise UsageError(f"{gen.__qualname__} has already run outside the engine; pass a new call to kwflow")
        if len(instance.tasks) >= self._tasks_max:
            raise UsageError(f"more than {self._tasks_max} tasks in one workflow (limit tasks_max); wait for some before you start more, use children, or raise the limit")
        task = Task(instance.task_next, gen, gen.__qualname__)
        instance.task_next += 1
        instance.tasks[task.number] = task
        instance.adopted()[gen] = task
        if self.running:
            creator = self.running[-1]
            creator.add_below(task)
            task.shielded = creator.shielded
        return task

    def begin(self, task: Task) -> None:
        """Run an unstarted task to its first wait at once (KW-17: ids are numbered in this order)."""
        if task.started or task.settled:
            return
        if self._nesting >= self._nesting_max:
            raise UsageError(f"tasks start inside one another more than {self._nesting_max} deep (limit nesting_max); use yield from where no separate task is needed, or raise the limit")
        self._nesting += 1
        try:
            task.pending = (OK, None)
            self._drive(task)
        finally:
            self._nesting -= 1

    def drain(self) -> None:
        """Run until nothing is ready (KW-28)."""
        while True:
            while self.queue:
                item = self.queue.popleft()
                if isinstance(item, Suspension):
                    self.host.wait_cancelled(item)
                    self.settle(item, FAILED, Cancelled())
                else:
                    self._drive(item)
                if self._join_dirty:
                    self.check_joins()
            while self._mail:
                self.deliver(*self._mail.pop(0))
            if self._join_dirty:
                self.check_joins()
            if not self.queue and not self._mail and not self._join_dirty and not (self.instance.conditions and self._met()):
                return

    def _drive(self, task: Task) -> None:
        """Run a task, and the unstarted generators it yields, until the innermost one waits or all have ended."""
        base = len(self.running)
        self.running.append(task)
        try:
            while len(self.running) > base:
                current = self.running[-1]
                waits_for = self._advance(current)
                if waits_for is None:  # it ended: the task that yielded it continues at once, as with `yield from`
                    self.running.pop()
                    if len(self.running) > base:
                        self.running[-1].pending = (current.state, current.value)
                elif isinstance(waits_for, Task) and not waits_for.started:
                    waits_for.pending = (OK, None)
                    waits_for.observed = True
                    self.running.append(waits_for)
                else:
                    self._block(waits_for, base)
        except BaseException:
            del self.running[base:]
            raise

    def _block(self, waits_for: Awaitable, base: int) -> None:
        blocked = self.running[base:]
        del self.running[base:]
        for task in reversed(blocked):
            task.waiting_on = waits_for
            waits_for.waiters.append(task)
            waits_for.observed = True
            waits_for = task
        for task in blocked:  # a cancel that arrived while the task ran is delivered at this wait (semantics §2.1)
            if task.cancel_requested:
                task.cancel_requested = False
                if task.waiting_on is not None:
                    self.cancel_all([task.waiting_on])

    def _advance(self, task: Task) -> Awaitable | None:
        """Run a task until it yields something that blocks, and return that; None if the task ends.  Settled values need no queue (KW-38)."""
        gen = task.gen
        if gen is None:
            raise KwflowBug(f"{task!r} runs without a generator")
        task.started = True
        while True:
            if task.pending is None:
                raise KwflowBug(f"{task!r} runs with nothing to deliver")
            (state, value), task.pending = task.pending, None
            try:
                yielded = gen.send(value) if state == OK else gen.throw(value)
            except StopIteration as stop:
                self._end(task, OK, stop.value)
                return None
            except ABORTS as error:
                self.bug = self.bug or error
                raise
            except BaseException as error:  # Cancelled and SystemExit are outcomes too (semantics §2.5)
                forget_catcher(error)
                self._end(task, FAILED, error)
                return None
            if self.bug is not None:
                raise self.bug
            try:
                target = self.host.classify(yielded)
                if isinstance(target, types.GeneratorType):
                    target = self.adopt(target)
            except UsageError as error:
                task.pending = (FAILED, error)
                continue
            if not isinstance(target, Awaitable):
                task.pending = (OK, target)
            elif target.state != PENDING or (isinstance(target, SignalWait) and self._fetch(target)):
                if self.instance.mailbox is not None:
                    mark_read(target)
                task.pending = (target.state, target.value)
            elif target in self.running:
                task.pending = (FAILED, UsageError(f"{task.name} waits for {target!r}, which is the task itself or waits for it"))
            else:
                return target

    def _end(self, task: Task, state: str, value: Any) -> None:
        task.gen = None
        task.cancel_requested = False
        if task.below:
            task.below = live_below(task.below)  # those that outlive it
        self.instance.tasks.pop(task.number, None)
        self._join_dirty = bool(self.instance.joins)
        self.settle(task, state, value)
        if task is self.instance.main:
            self.host.main_ended(task)
            self.close()
        elif state == FAILED and not task.observed and not isinstance(value, Cancelled):
            self.host.task_failed(task)

    # -- settling ------------------------------------------------------------------------------------------------
    def settle(self, target: Awaitable, state: str, value: Any) -> None:
        """Settle a target, wake every waiter, then cancel the losers of the combinators that this decides."""
        losers = self._settle_up(target, state, value)
        if losers:
            self.cancel_all(losers)

    def combine(self, combinator: Combinator) -> None:
        """Attach a new combinator to its started children, and decide it if one of them already does."""
        if self.instance.mailbox is not None:
            self._fetch_for(combinator)
        for child in combinator.distinct():
            child.observed = True
            if not child.settled:
                child.waiters.append(combinator)
        for child in combinator.distinct():
            if child.settled and combinator.decided is None:
                self._decide(combinator, child)
        if combinator.decided is not None:
            self.cancel_all(self._decided(combinator))

    def _decide(self, combinator: Combinator, child: Awaitable) -> bool:
        combinator.decided = combinator.decide(child)
        if combinator.decided is None:
            return False
        if self.instance.mailbox is not None:
            self._hand_back(combinator.losers(child))
        return True

    def _settle_up(self, target: Awaitable, state: str, value: Any) -> list[Awaitable]:
        losers: list[Awaitable] = []
        work: list[tuple[Awaitable, str, Any]] = [(target, state, value)]
        for item, item_state, item_value in work:  # the list grows during the loop
            if item.state != PENDING:
                raise KwflowBug(f"{item!r} settled twice")
            item.state, item.value = item_state, item_value
            if isinstance(item, Suspension):
                if self.instance.joins:
                    self._join_dirty = True
                self.instance.leave(item)
            waiters, item.waiters = item.waiters, []
            for waiter in waiters:
                if isinstance(waiter, Combinator):
                    if self._decide(waiter, item):
                        losers += self._leave(waiter)
                        if not self._joins(waiter) and waiter.decided is not None:
                            work.append((waiter, *waiter.decided))
                elif waiter.waiting_on is item:
                    if self.instance.mailbox is not None:
                        mark_read(item)
                    waiter.waiting_on = None
                    waiter.pending = (item_state, item_value)
                    self.queue.append(waiter)
        return losers

    def _decided(self, combinator: Combinator) -> list[Awaitable]:
        losers = self._leave(combinator)
        if not self._joins(combinator) and combinator.decided is not None:
            losers += self._settle_up(combinator, *combinator.decided)
        return losers

    def _leave(self, combinator: Combinator) -> list[Awaitable]:
        """Detach a decided combinator from its pending children (otherwise each round of a loop would leave a waiter behind); return those to cancel."""
        rest = [child for child in combinator.distinct() if not child.settled]
        for child in rest:
            child.waiters = [waiter for waiter in child.waiters if waiter is not combinator]
        return combinator.cancelled(rest)

    def _joins(self, combinator: Combinator) -> bool:
        """Whether a decided combinator with `wait_rest` still has to wait for the rest; if so, `check_joins` settles it later."""
        if combinator.wait_rest and self._rest(combinator):
            self.instance.joins.append(combinator)
            self._join_dirty = True
            self._mail += [(child.kind, child.name) for child in combinator.children if isinstance(child, SignalWait) and not child.settled]
            return True
        return False

    @staticmethod
    def _rest(combinator: Combinator) -> bool:
        return any(not child.settled for child in combinator.children) or bool(live_below(list(combinator.children)))

    def check_joins(self) -> None:
        """Settle the `wait_rest` combinators below which everything has ended, inner ones first."""
        self._join_dirty = False
        for combinator in list(self.instance.joins):
            if not self._rest(combinator):
                self.instance.joins.remove(combinator)
                if combinator.decided is None:
                    raise KwflowBug(f"{combinator!r} joins undecided")
                self.settle(combinator, *combinator.decided)
                self._join_dirty = bool(self.instance.joins)

    def _waited_for(self, waits: list[_Wait]) -> list[_Wait]:
        """Return those of these waits that a task or a combinator waits for.  One that joins is no longer among the waiters of the rest."""
        if not self.instance.joins or all(wait.waiters for wait in waits):
            return [wait for wait in waits if wait.waiters]
        joined = {id(child) for join in self.instance.joins for child in join.children}
        return [wait for wait in waits if wait.waiters or id(wait) in joined]

    # -- mail (M3) -----------------------------------------------------------------------------------------------
    def deliver(self, kind: str, name: str) -> None:
        """Give the mail of one box to the waits for it, in the order in which these were created."""
        for wait in [wait for wait in self.instance.waits.values() if isinstance(wait, SignalWait)]:
            if wait.kind == kind and wait.name == name and not wait.settled and self._waited_for([wait]) and not self._fetch(wait):
                return

    def _fetch_for(self, combinator: Combinator) -> None:
        """Let a new combinator take mail at once: an All takes all that it needs, any other one no more than decides it."""
        settled = False
        for child in combinator.distinct():
            if isinstance(child, SignalWait) and not child.settled and (not settled or isinstance(combinator, All)):
                self._fetch(child)
            settled = settled or child.settled

    def _fetch(self, wait: SignalWait) -> bool:
        """Settle the wait with the oldest mail of its name, if there is any; return whether there was."""
        mailbox = self.instance.mailbox
        mail = mailbox.take(wait.kind, wait.name, self.instance.now_ms) if mailbox is not None else None
        if mail is None:
            return False
        wait.mail = mail
        self.settle(wait, OK, mail.value)
        return True

    def _hand_back(self, losers: list[Awaitable]) -> None:
        if self.instance.mailbox is not None:
            for loser in losers:
                self._mail += give_back(loser, self.instance.mailbox)

    # -- conditions ----------------------------------------------------------------------------------------------
    def _met(self) -> bool:
        """Settle the first condition that is met, in the order in which they were made; return whether there was one.

        What it wakes runs before any other is asked, because it may take what others wait for.
        """
        for condition in self._waited_for(list(self.instance.conditions.values())):
            outcome = self.host.ask(condition)
            if outcome is not None:
                self.settle(condition, *outcome)
                return True
        return False

    # -- cancelling ----------------------------------------------------------------------------------------------
    def cancel_all(self, targets: list[Awaitable]) -> None:
        """Cancel the targets in order, down to the innermost waits.  Handlers are queued, never run here (1.3 rule 13)."""
        stack = list(reversed(targets))
        while stack:
            target = stack.pop()
            if target.settled:
                continue
            if isinstance(target, Task):
                stack.extend(self._cancel_task(target))
            elif isinstance(target, Shield):
                target.held = True
            elif isinstance(target, Combinator):
                stack.extend(self._cancel_combinator(target))
            elif isinstance(target, Suspension) and target.outside:
                if self.instance.leave(target):
                    self.queue.append(target)
            else:
                stack.extend(reversed(self._settle_up(target, FAILED, Cancelled())))

    def _cancel_task(self, task: Task) -> list[Awaitable]:
        if task.cancel_step == self.instance.steps:  # at most one Cancelled per task and step
            return []
        task.cancel_step = self.instance.steps
        if not task.started and task.pending is None:
            self._end(task, FAILED, Cancelled())
            return []
        if task.waiting_on is None:
            task.cancel_requested = True
            return []
        return [task.waiting_on]

    def _cancel_combinator(self, combinator: Combinator) -> list[Awaitable]:
        if self.instance.mailbox is not None:
            self._hand_back(combinator.distinct())
        if combinator.decided is not None:  # joining: the waiter must not miss its cancel because a result was decided before
            combinator.decided = (FAILED, Cancelled())
        elif not combinator.children:
            return list(reversed(self._settle_up(combinator, FAILED, Cancelled())))
        return list(reversed(combinator.distinct()))

    def interrupt(self, task: Task, error: BaseException) -> None:
        """Raise an error at a task's wait without touching what it waits on (G9)."""
        target, task.waiting_on = task.waiting_on, None
        if target is not None and target.state == PENDING:
            target.waiters = [waiter for waiter in target.waiters if waiter is not task]
        task.pending = (FAILED, error)
        self.queue.append(task)

    def close(self) -> None:
        """Main has settled: cancel every other task not yet cancelled, in creation order; not what a cleanup that runs waits for (semantics §2.4)."""
        self.instance.status = CLOSING
        cleaning = self._cleaning()
        for task in list(self.instance.tasks.values()):
            if not task.settled and not task.shielded and task not in cleaning:
                self.cancel_all([task])
        outside = [wait for wait in self.instance.waits.values() if wait.outside]
        kept = set(self._waited_for(outside))
        self.cancel_all([wait for wait in outside if wait not in kept])

    def _cleaning(self) -> set[Task]:
        """The tasks that were cancelled and have not ended, and those that they wait for."""
        found: set[Task] = set()
        seen: set[int] = set()
        stack: list[Awaitable | None] = [task for task in self.instance.tasks.values() if task.cancel_step]
        while stack:
            item = stack.pop()
            if item is None or item.settled or id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Task):
                found.add(item)
                stack.append(item.waiting_on)
            elif isinstance(item, Combinator):
                stack.extend(item.children)
        return found
