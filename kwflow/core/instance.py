"""The state of one workflow instance: its tasks and waits, its mailbox, and what its header has beside them.

This module must not know records, topics or JSON; `machine.py` moves the tasks, and `snapshot.py` turns an instance into bytes.
"""

from __future__ import annotations

import weakref
from typing import Any

from kwflow.core.mail import Mailbox
from kwflow.core.tasks import Combinator, Condition, Suspension, Task
from kwflow.durable.frames import discard
from kwflow.durable.registry import Pins

__all__ = ["CLOSING", "ENDED", "WAITING", "Instance"]

WAITING, CLOSING, ENDED = "waiting", "closing", "ended"


class Instance:
    """The state of one running id.  Invariant: `waits` holds exactly the pending suspensions by ref, `conditions` those of them that are conditions, `tasks` the unsettled tasks."""

    __slots__ = (
        "_adopted", "applied", "conditions", "created_ms", "extra", "id", "joins", "mailbox", "main",
        "now_ms", "pins", "start_id", "status", "steps", "task_next", "tasks", "updated_ms", "waits", "workflow",
    )  # fmt: skip

    def __init__(self, id: str, workflow: str, start_id: str, created_ms: int) -> None:
        self.id = id
        self.workflow = workflow
        self.start_id = start_id
        self.status = WAITING
        self.created_ms = self.updated_ms = self.now_ms = created_ms
        self.applied: tuple[str, int, int] | None = None
        self.steps = 0
        self.task_next = 1
        self.main: Task | None = None
        self.tasks: dict[int, Task] = {}
        self.waits: dict[str, Suspension] = {}
        self.conditions: dict[str, Condition] = {}
        self.joins: list[Combinator] = []
        self.mailbox: Mailbox | None = None  # created by the first signal, or by the first wait for one
        self.extra: dict[str, Any] = {}  # header entries beside the fixed ones; those that this version does not know are kept
        self.pins: Pins = {}  # module versions that it runs and that are not current (semantics §8.2)
        self._adopted: weakref.WeakKeyDictionary[Any, Task] = weakref.WeakKeyDictionary()

    def leave(self, wait: Suspension) -> bool:
        """Forget a wait that is over; return whether it was known."""
        if self.waits.get(wait.ref) is not wait:  # the ref is another wait's by now
            return False
        del self.waits[wait.ref]
        self.conditions.pop(wait.ref, None)
        return True

    @property
    def can_be_woken(self) -> bool:
        """Whether any record could wake it: what its own tasks do settles conditions, and nothing else does."""
        return len(self.waits) > len(self.conditions)

    def adopted(self) -> weakref.WeakKeyDictionary[Any, Task]:
        """The one task of each generator (semantics §1.2).  Weak, so that a finished generator that nobody holds is forgotten."""
        return self._adopted

    def forget(self) -> None:
        """Drop the live generators without running their cleanup (G8).  The cyclic collector could otherwise finalize them at any time."""
        for task in self.tasks.values():
            if task.gen is not None:
                discard(task.gen)

    def graph(self) -> dict[str, Any]:
        """Return everything that the body of a snapshot holds; the header holds the rest."""
        finished = []
        if len(self._adopted) > len(self.tasks):  # author code still holds generators that have ended
            finished = sorted(((gen, task) for gen, task in self._adopted.items() if task.settled), key=lambda pair: pair[1].number)
        graph = {"main": self.main, "tasks": self.tasks, "waits": self.waits, "joins": self.joins, "finished": finished, "steps": self.steps, "task_next": self.task_next, "now_ms": self.now_ms}
        return graph if self.mailbox is None else {**graph, "mailbox": self.mailbox}

    def set_graph(self, graph: dict[str, Any]) -> None:
        for name in ("main", "tasks", "waits", "joins", "steps", "task_next", "now_ms"):
            setattr(self, name, graph[name])
        self.conditions = {ref: wait for ref, wait in self.waits.items() if isinstance(wait, Condition)}
        self.mailbox = graph.get("mailbox")
        pairs = [(task.gen, task) for task in self.tasks.values() if task.gen is not None] + graph["finished"]
        for gen, task in pairs:
            self._adopted[gen] = task
