"""Moving a waiting instance to other code: what `kwflow code migrate` does in a step (semantics §8.5).

The author's function, `@kw.migrate(from_="module:function")`, looks at the instance and returns the unstarted generator
that takes main's place, and the refs that it takes over.  All of this is one step, that of the command's record: in it,
the new generator runs to its first wait, with the ids and the time of that record.  If anything fails, the step fails,
and the instance is parked as it was.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kwflow.core.calls import Calls
from kwflow.core.instance import CLOSING, Instance
from kwflow.core.mail import give_back
from kwflow.core.snapshot import failed_at, place_of
from kwflow.core.tasks import ABORTS, FAILED, Awaitable, Suspension, Task
from kwflow.durable import registry
from kwflow.durable.frames import Frame, describe, discard
from kwflow.errors import Cancelled, KwflowBug, MigrationError, UsageError

__all__ = ["OldInstance", "OldTask", "find", "migrate", "nothing_for"]


@dataclass(frozen=True)
class OldTask:
    """A task as it waits: its frames, outermost first, and what it waits for (which has `state` and `value`, and `children` if it is a combinator)."""

    name: str
    frames: tuple[Frame, ...]
    waits_for: Awaitable | None


@dataclass(frozen=True)
class OldInstance:
    """What a migration may look at.  Nothing that it does with this changes the old instance.

    `function` is the key of main ("module:function") and `version` the 12 digits of its module's version.  `tasks` begins
    with main.  `refs` are the pending waits; hand them to the new generator, which may yield them.
    """

    id: str
    workflow: str
    function: str
    version: str
    tasks: tuple[OldTask, ...]
    refs: Mapping[str, Suspension]

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The frames of main, outermost first."""
        return self.tasks[0].frames

    @property
    def locals(self) -> Mapping[str, Any]:
        """The variables of main's own function."""
        return self.frames[0].locals


def find(instance: Instance, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any] | None:
    """Return the migration for this instance, or None.

    It is the one for exactly its version (`module:function@<12 hex>`), or else, if its module or another one that it runs is not current, the one for its function.
    """
    function = _function_of_main(instance)
    if function is None or instance.status == CLOSING:
        return None
    key = f"{function.module}:{function.path}"
    exact = known.get(registry.version_name(key, function.home.version))
    current = registry.modules().get(function.module)
    runs_old = any("@" not in reference and registry.modules().get(pinned.name) is not pinned for reference, pinned in instance.pins.items())  # with `@` it only holds it
    outdated = current is None or current.version != function.home.version or runs_old
    return exact or (known.get(key) if outdated else None)


def _function_of_main(instance: Instance) -> registry.Function | None:
    gen = instance.main.gen if instance.main is not None else None
    return registry.function_of(gen.gi_code) if gen is not None else None


def nothing_for(instance: Instance) -> str:
    """Say that there is no migration for what the instance runs."""
    function = _function_of_main(instance)
    runs = registry.version_name(f"{function.module}:{function.path}", function.home.version) if function is not None else "code that is closing"
    return f"there is no migration for {runs}, which it runs"


def migrate(calls: Calls) -> bool:
    """Put the new generator in main's place and run it to its first wait; return False if there is no migration for this instance.

    Raises MigrationError.
    """
    instance = calls.instance
    function = find(instance, calls.context.workflows.migrations)
    main = instance.main
    if function is None or main is None:
        return False
    tasks, waits = list(instance.tasks.values()), dict(instance.waits)
    gen, refs = _result(function, _view(instance, tasks), calls, waits)
    _drop(calls, tasks, waits, refs)
    instance.joins.clear()
    instance.pins = {}
    instance.adopted().clear()
    fresh = Task(main.number, gen, gen.__qualname__)
    instance.main = instance.tasks[main.number] = fresh
    instance.adopted()[gen] = fresh
    calls.machine.begin(fresh)
    if fresh.state == FAILED:
        why = "it waits for a ref that it does not take over" if isinstance(fresh.value, Cancelled) else f"{_described(fresh.value)}"
        raise MigrationError(f"{_name(function)}: what it returned failed before its first wait: {why}") from fresh.value
    return True


def _view(instance: Instance, tasks: list[Task]) -> OldInstance:
    shown = tuple(OldTask(task.name, tuple(describe(task.gen)) if task.gen is not None else (), task.waiting_on) for task in tasks)
    function = _function_of_main(instance)
    if function is None:
        raise KwflowBug("a main without code")
    version = function.home.version[:12]
    return OldInstance(instance.id, instance.workflow, f"{function.module}:{function.path}", version, shown, types.MappingProxyType(dict(instance.waits)))


def _result(function: Callable[..., Any], view: OldInstance, calls: Calls, waits: Mapping[str, Suspension]) -> tuple[types.GeneratorType[Any, Any, Any], set[str]]:
    try:
        made = function(view)
    except ABORTS:
        raise
    except BaseException as error:
        raise MigrationError(f"{_name(function)} failed: {_described(error)}") from error
    gen, refs = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if not isinstance(gen, types.GeneratorType) or gen.gi_frame is None or gen.gi_suspended or gen in calls.instance.adopted():
        raise MigrationError(f"{_name(function)} returned {gen!r}; it returns a call of a durable generator function, alone or with the refs it takes over: return main(...), ['ref']")
    try:
        calls.classify(gen)
    except UsageError as error:
        raise MigrationError(f"{_name(function)}: what it returned cannot be run: {error}") from error
    if isinstance(refs, str) or not isinstance(refs, Iterable):
        raise MigrationError(f"{_name(function)} returned {refs!r} for refs; they are an iterable of ref ids")
    taken = {ref.ref if isinstance(ref, Suspension) else ref for ref in refs}
    unknown = sorted(str(ref) for ref in taken if ref not in waits)
    if unknown:
        raise MigrationError(f"{_name(function)} takes over {', '.join(unknown)}, which the instance does not wait for; it waits for {', '.join(waits) or 'nothing'}")
    return gen, taken


def _drop(calls: Calls, tasks: list[Task], waits: Mapping[str, Suspension], taken: set[str]) -> None:
    """Forget the old generators without running their cleanup (G8), and end the waits that are not taken over; nobody waits yet for those that are."""
    instance = calls.instance
    if instance.mailbox is not None:
        for task in tasks:
            if task.waiting_on is not None:
                give_back(task.waiting_on, instance.mailbox)
    for ref, wait in waits.items():
        _settle_above(wait)
        if ref not in taken and instance.leave(wait):
            if wait.outside:
                calls.machine.host.wait_cancelled(wait)
            wait.state, wait.value = FAILED, Cancelled()
    for task in tasks:
        gen, task.gen = task.gen, None
        _settle_above(task)
        task.state, task.value = FAILED, Cancelled()
        instance.tasks.pop(task.number, None)
        if gen is not None:
            discard(gen)


def _settle_above(target: Awaitable) -> None:
    """Detach everything that waits for the target.  Combinators of old code count as cancelled, in case new code holds one."""
    stack = list(target.waiters)
    target.waiters = []
    while stack:
        waiter = stack.pop()
        stack.extend(waiter.waiters)
        waiter.waiters = []
        if not isinstance(waiter, Task) and not waiter.settled:
            waiter.state, waiter.value = FAILED, Cancelled()


def _name(function: Callable[..., Any]) -> str:
    return f"the migration {getattr(function, '__qualname__', function)}"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}{place_of(failed_at(error))}"
