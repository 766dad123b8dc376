"""What a workflow can wait for: suspensions, timers, tasks and combinators, as plain picklable data.

Every rule of the form "when this child settles, does the combinator decide, and what?" lives here.  This module must not
know records or queues; `machine.py` decides who is woken, when, and in which order.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from kwflow.durable.awaiting import Once
from kwflow.errors import Cancelled, KwflowBug, StepTimeout, WorkflowError

__all__ = [
    "ABORTS", "FAILED", "OK", "PENDING", "ActivityWait", "All", "Awaitable", "Combinator", "Condition", "JobWait", "Outcome", "Race", "Series", "Shield", "Some", "Suspension", "Task", "Timeout",
    "Timer", "live_below",
]  # fmt: skip

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    _T = TypeVar("_T", covariant=True, default=Any)  # a bare `Awaitable` may give any value
else:
    from typing import TypeVar

    _T = TypeVar("_T", covariant=True)

ABORTS = (KwflowBug, KeyboardInterrupt, MemoryError, StepTimeout)  # never outcomes of author code: the step fails (G4)
PENDING, OK, FAILED = "pending", "ok", "failed"
Outcome = tuple[str, Any]


_Wait = Once  # the name that snapshots of 0.1 contain


class Awaitable(Generic[_T]):
    """Something that settles once; `yield`, `yield from` and `await` return its value.  Invariant: `waiters` is empty once `state` is not PENDING."""

    __slots__ = ("__weakref__", "observed", "state", "value", "waiters")
    _fields: ClassVar[tuple[str, ...]] = ("observed", "state", "value", "waiters")
    _values: ClassVar[Callable[[Any], tuple[Any, ...]]] = operator.attrgetter("observed", "state", "value", "waiters")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own: tuple[str, ...] = cls.__dict__["__slots__"]
        cls._fields = (*cls._fields, *own)
        cls._values = operator.attrgetter(*cls._fields)

    def __init__(self) -> None:
        self.state = PENDING
        self.value: Any = None
        self.waiters: list[Task | Combinator] = []
        self.observed = False

    @property
    def settled(self) -> bool:
        return self.state != PENDING

    def __iter__(self) -> Generator[Any, Any, _T]:
        return Once(self)  # type: ignore[return-value]  # it has what `yield from` needs

    def __await__(self) -> Generator[Any, Any, _T]:
        return Once(self)  # type: ignore[return-value]

    def __getstate__(self) -> tuple[Any, ...]:
        """Return the fields in the order of `_fields`, which is part of the snapshot format."""
        return type(self)._values(self)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        for name, value in zip(self._fields, state, strict=True):
            setattr(self, name, value)


class Suspension(Awaitable[_T]):
    """A wait with a ref id that a record settles.

    Each further kind is a subclass.  It defines its `kind`, what the header says of it besides ref and place (`described`),
    the outcome that an answer gives it (`answer`), and whether somebody outside works for it and is told when it is
    cancelled (`outside`).
    """

    __slots__ = ("ref", "since_ms")
    kind: ClassVar[str] = "suspension"
    outside: ClassVar[bool] = False
    answerable: ClassVar[bool] = True  # whether a resume record may settle it

    def __init__(self, ref: str, since_ms: int) -> None:
        super().__init__()
        self.ref = ref
        self.since_ms = since_ms

    @property
    def id(self) -> str:
        return self.ref

    def described(self) -> dict[str, Any]:
        """Return its own entries in the header, as JSON values; they suffice to end it without author code (M3)."""
        return {}

    def answer(self, failed: bool, value: object) -> Outcome:
        """Return the outcome for the `value` or `error` of a resume record."""
        return (FAILED, WorkflowError(value)) if failed else (OK, value)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.ref} {self.state}>"


class Condition(Suspension[_T]):
    """A wait until a function of the workflow's own state returns something true; the machine calls it whenever every task waits."""

    __slots__ = ("predicate",)
    kind = "condition"
    answerable = False

    def __init__(self, ref: str, since_ms: int, predicate: Callable[[], Any]) -> None:
        super().__init__(ref, since_ms)
        self.predicate = predicate


class Series:
    """A series of waits: each time it is waited for, it makes the next one."""

    __slots__ = ()

    def wait(self) -> Awaitable:
        raise NotImplementedError


class Timer(Suspension[None]):
    """A wait for the scheduler topic; cancelling it queues a handler that emits the `0` record (wire.md §2)."""

    __slots__ = ("delay_ms",)
    kind = "timer"
    outside = True

    def __init__(self, ref: str, since_ms: int, delay_ms: int) -> None:
        """`delay_ms` counts from `since_ms`."""
        super().__init__(ref, since_ms)
        self.delay_ms = delay_ms

    def described(self) -> dict[str, Any]:
        return {"due": self.since_ms + self.delay_ms}


class ActivityWait(Suspension):
    """A wait for one attempt of an activity, which an engine runs outside the step (M6)."""

    __slots__ = ("attempt", "name")
    kind = "activity"
    outside = True

    def __init__(self, ref: str, since_ms: int, name: str, attempt: int) -> None:
        super().__init__(ref, since_ms)
        self.name = name
        self.attempt = attempt

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "attempt": self.attempt}


class JobWait(ActivityWait):
    """A wait for one attempt of an activity with a queue, which a worker outside the engines runs (M6.6)."""

    __slots__ = ("queue",)
    kind = "job"

    def __init__(self, ref: str, since_ms: int, name: str, attempt: int, queue: str) -> None:
        super().__init__(ref, since_ms, name, attempt)
        self.queue = queue

    def described(self) -> dict[str, Any]:
        return {**super().described(), "queue": self.queue}


class Task(Awaitable[_T]):
    """A running durable generator.

    Invariant: `number` is never reused in an instance.  `pending` is set while the task is queued, `waiting_on` while
    it waits, neither while it runs.  `below` holds the tasks that it created, for `wait_rest`.
    """

    __slots__ = ("below", "below_max", "cancel_requested", "cancel_step", "gen", "name", "number", "pending", "shielded", "started", "waiting_on")

    def __init__(self, number: int, gen: types.GeneratorType[Any, Any, Any] | None, name: str) -> None:
        super().__init__()
        self.number = number
        self.gen = gen
        self.name = name
        self.started = False
        self.pending: Outcome | None = None
        self.waiting_on: Awaitable | None = None
        self.cancel_requested = False
        self.cancel_step = 0  # the instance step of the last cancel; 0 = never cancelled
        self.shielded = False
        self.below: list[Task] = []
        self.below_max = 16

    def add_below(self, task: Task) -> None:
        """Remember a task that this one created.

        Settled tasks are dropped: those at the end of the list at once (so a chain keeps one), all others whenever the list has doubled.
        """
        while self.below and self.below[-1].settled and not self.below[-1].below:
            self.below.pop()
        self.below.append(task)
        if len(self.below) > self.below_max:
            self.below = live_below(self.below)
            self.below_max = max(16, 2 * len(self.below))

    def __repr__(self) -> str:
        return f"<task {self.number} {self.name} {self.state}>"


class Some(list[int]):
    """Indices of the children to cancel.

    It is a class of its own so that an older kwflow, which took any list for "cancel them all", does not know it and parks an instance that holds one.
    """


class Combinator(Awaitable):
    """A wait over several children.  `decided` is the outcome once it is known; with `wait_rest` the combinator settles later than that.

    `cancel_rest` says whether losers are cancelled, or which ones: the indices of those that nobody else holds.
    """

    __slots__ = ("cancel_rest", "children", "decided", "keys", "wait_rest")

    def __init__(self, children: list[Awaitable], keys: list[Any] | None, cancel_rest: bool | Some, wait_rest: bool) -> None:
        super().__init__()
        self.children = children
        self.keys = keys
        self.cancel_rest = cancel_rest
        self.wait_rest = wait_rest
        self.decided: Outcome | None = None

    def distinct(self) -> list[Awaitable]:
        """The children in input order, each once (the same awaitable may appear several times)."""
        seen: set[int] = set()
        return [child for child in self.children if not (id(child) in seen or seen.add(id(child)))]  # type: ignore[func-returns-value]

    def decide(self, child: Awaitable) -> Outcome | None:
        """Return the outcome if this settled child decides, else None."""
        raise NotImplementedError

    def losers(self, child: Awaitable) -> list[Awaitable]:
        """Return the losers, now that `child` has decided: children whose values, if they have any, nobody will get through this combinator."""
        return self.cancelled([other for other in self.distinct() if other is not child])

    def cancelled(self, rest: list[Awaitable]) -> list[Awaitable]:
        """Return those of the rest that are to be cancelled."""
        if not isinstance(self.cancel_rest, Some):
            return rest if self.cancel_rest else []
        own = [self.children[n] for n in self.cancel_rest]
        return [child for child in rest if child in own]

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} of {len(self.children)} {self.state}>"


class All(Combinator):
    """Results in input order; the first error wins.  Invariant: `left` counts the distinct children still pending."""

    __slots__ = ("left",)

    def __init__(self, children: list[Awaitable], keys: list[Any] | None, cancel_rest: bool | Some, wait_rest: bool) -> None:
        super().__init__(children, keys, cancel_rest, wait_rest)
        self.left = len(self.distinct())

    def decide(self, child: Awaitable) -> Outcome | None:
        if child.state == FAILED:
            return FAILED, child.value
        self.left -= 1
        return self.result() if not self.left else None

    def losers(self, child: Awaitable) -> list[Awaitable]:
        return [] if child.state == OK else super().losers(child)

    def result(self) -> Outcome:
        values = [child.value for child in self.children]
        return OK, values if self.keys is None else dict(zip(self.keys, values, strict=True))


class Race(Combinator):
    """The first settled child, value or error; with keys a pair (key, value), so that "timed out" is not "None"."""

    __slots__ = ()

    def decide(self, child: Awaitable) -> Outcome | None:
        if child.state == FAILED or self.keys is None:
            return child.state, child.value
        index = next(n for n, candidate in enumerate(self.children) if candidate is child)
        return OK, (self.keys[index], child.value)


class Timeout(Combinator):
    """The outcome of x, or TimeoutError if the timer is first.  A timer that was merely cancelled decides nothing: x is still cleaning up."""

    __slots__ = ()

    def decide(self, child: Awaitable) -> Outcome | None:
        if child is self.children[0]:
            return child.state, child.value
        if child.state == OK:
            timer: Any = self.children[1]
            return FAILED, TimeoutError(f"kw.timeout: not done within {timer.delay_ms / 1000:.15g} s")
        return None if isinstance(child.value, Cancelled) else (FAILED, child.value)


class Shield(Combinator):
    """The outcome of x; but a cancel that arrives meanwhile is held back, and raised once x has settled (semantics §1.6)."""

    __slots__ = ("held",)

    def __init__(self, child: Awaitable) -> None:
        super().__init__([child], None, cancel_rest=False, wait_rest=False)
        self.held = False

    def decide(self, child: Awaitable) -> Outcome | None:
        return (FAILED, Cancelled()) if self.held else (child.state, child.value)

    def losers(self, child: Awaitable) -> list[Awaitable]:
        return [child] if self.held else []


def live_below(roots: list[Any]) -> list[Task]:
    """Return every unsettled task at or below these awaitables, in input order (iteratively: nesting may be deep)."""
    found: list[Task] = []
    seen: set[int] = set()
    stack = list(reversed(roots))
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Task):
            if not item.settled:
                found.append(item)
            stack.extend(reversed(item.below))
        elif isinstance(item, Combinator):
            stack.extend(reversed(item.children))
    return found
