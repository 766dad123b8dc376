"""The input and output of a step, as plain frozen data that runners and the core share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kwflow.core import typed
from kwflow.core.instance import Instance
from kwflow.core.wire import Output, Reply

__all__ = ["CHECKPOINTS_MAX", "Context", "Ended", "Keep", "Limits", "Save", "Topics", "Transition", "Workflows"]

CHECKPOINTS_MAX = 1_000  # of an instance; each is as large as the instance, and is read at a takeover


class Topics(msgspec.Struct, frozen=True):
    """Topic names.  None for `result` or `error` disables that output (KW-12).  `declared` are the topics that authors may write to."""

    resume: str = "workflow-resume"
    result: str | None = "workflow-result"
    error: str | None = "workflow-error"
    scheduler: str = "workflow-scheduler"
    declared: frozenset[str] = frozenset()


class Limits(msgspec.Struct, frozen=True):
    """What one instance may use.  A call that exceeds a limit raises UsageError inside the workflow; a message that exceeds those of the mailbox is refused."""

    outputs_max: int = 10_000
    output_bytes_max: int = 8_000_000
    value_bytes_max: int = 1_000_000
    header_bytes_max: int = 65_536
    waits_max: int = 100_000
    tasks_max: int = 100_000
    nesting_max: int = 100
    mailbox_max: int = 1000
    mailbox_bytes_max: int = 262_144
    activity_bytes_max: int = 256_000


@dataclass(frozen=True, slots=True)
class Workflows:
    """Workflow functions by name.  `default` is the one that a `new:` record without a name starts."""

    functions: Mapping[str, Callable[[Any], Any]]
    default: str | None = None
    migrations: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)  # by the key of the function
    inputs: Mapping[str, Any] = field(init=False, repr=False, compare=False)  # by name: the annotation from which its input is rebuilt, if there is one

    def __post_init__(self) -> None:
        """Raises UsageError for an annotation that no input could be rebuilt from: once, when an engine starts, not at each start of the workflow."""
        object.__setattr__(self, "inputs", typed.input_hints(self.functions))

    def option(self, workflow: str | None, name: str) -> Any:
        """Return what `kw.workflow` was given for this option of the workflow, or of the default one; False if nothing."""
        return getattr(self.functions.get(workflow or self.default or ""), f"kwflow_{name}", False)


class Context(msgspec.Struct, frozen=True):
    """What a step may know besides its record.

    `queues` says whether calls of activities with a queue go to the workers of that queue; otherwise the engine runs them.
    `native` accepts generators that cannot be saved (in-process runs).  Services call back at `gateway_url`.
    `moves`: how often this partition's state was moved to a log whose offsets begin anew (decision 0064).
    """

    received_ms: int
    incarnation: str = ""
    topics: Topics = msgspec.field(default_factory=Topics)
    limits: Limits = msgspec.field(default_factory=Limits)
    workflows: Workflows = msgspec.field(default_factory=lambda: Workflows({}))
    queues: bool = False
    native: bool = False
    gateway_url: str | None = None
    moves: int = 0


class Keep(msgspec.Struct, frozen=True):
    """Leave the stored state as it is."""


class Save(msgspec.Struct, frozen=True):
    """Store this instance (`snapshot.save`).  `changed` tells whether the record did anything to it, besides that it was applied."""

    instance: Instance
    changed: bool = True


class Ended(msgspec.Struct, frozen=True):
    """Delete the stored state.  `header` is the content of the entry that stays after the end (K20)."""

    header: dict[str, Any]


class Transition(msgspec.Struct, frozen=True):
    """What the record did.  Nothing has happened yet: a runner makes all of it happen in one transaction, or none.

    `outputs` become visible in this order, together with state and offset, never before.  `logs` are written and
    `dispatch` is started only after the commit.  `replies` answer commands, in the same transaction.  `outcome` is the
    word that counters use: started, resumed, repeated, duplicate-start, unknown-id, unknown-ref, or that of a command.
    """

    state: Keep | Save | Ended
    outputs: tuple[Output, ...] = ()
    logs: tuple[str, ...] = ()
    dispatch: tuple[object, ...] = ()
    replies: tuple[Reply, ...] = ()
    outcome: str = ""
