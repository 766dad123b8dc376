"""The JSON bodies of the gateway's answers, except for problems: one struct for each.

The gateway makes its own answers from these structs.  What engines report is passed on unchanged, and described here.
Callers read these docstrings (openapi.py).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kwflow.core import header, queues
from kwflow.runners import rows

__all__ = ["Ended", "Health", "Held", "LentCall", "Locked", "Made", "Running", "Workflow", "Workflows"]

_Ms = Annotated[float, Meta(description="Milliseconds since 1970.")]


class Made(msgspec.Struct, frozen=True):
    """The run that was started: 201 if it is new, 200 if it was made before."""

    id: str
    start_id: str
    new: bool


class Running(msgspec.Struct, frozen=True):
    """It has not ended within the time; ask again at Location, the workflow goes on."""

    id: str
    start_id: str
    status: str


class Ended(msgspec.Struct, frozen=True):
    """How a run has ended."""

    id: str
    start_id: str
    outcome: Annotated[str, Meta(description="result; in a stream error, cancelled and terminated, too, which elsewhere are problems (424).")]
    value: Annotated[Any, Meta(description="The workflow's result, any JSON.")]


class Held(msgspec.Struct, frozen=True):
    """The workflow is parked; what was sent is kept, and applied when an operator retries."""

    id: str
    status: str


class LentCall(queues.Job, frozen=True):
    """A call of an activity, locked by the worker that fetched it."""

    headers: Annotated[dict[str, str | None], Meta(description="Headers of the call, such as traceparent; bytes that are not UTF-8 are shown as \\xff.")]
    locked_until: _Ms


class Locked(msgspec.Struct, frozen=True):
    """The lock lasts from now on for so long."""

    locked_until: _Ms


class Health(msgspec.Struct, frozen=True):
    """Whether it takes requests, and how many are being answered."""

    live: bool
    waiting: int
    message: Annotated[str | UnsetType, Meta(description="Why it takes no requests.")] = UNSET


class Workflow(msgspec.Struct, frozen=True):
    """What a query tells of a workflow."""

    id: str
    workflow: str
    status: str
    start_id: str
    waits: Annotated[list[header.Wait], Meta(description="The first 100 of waits_total.")]
    waits_total: int
    created: _Ms | UnsetType = UNSET
    updated: _Ms | UnsetType = UNSET
    ended: _Ms | UnsetType = UNSET
    status_value: Annotated[Any, Meta(description="The status set by kw.set_status.")] = UNSET
    outcome: header.Outcome | UnsetType = UNSET
    parked: header.Parked | UnsetType = UNSET
    cancel: header.Cancel | UnsetType = UNSET
    client: str | UnsetType = UNSET
    parent: Annotated[str | UnsetType, Meta(description="ID|REF of the workflow that started it as its child.")] = UNSET
    forked: header.Forked | UnsetType = UNSET
    checkpoints: Annotated[tuple[int, int] | UnsetType, Meta(description="Number of the first checkpoint, and one more than that of the last.")] = UNSET
    heartbeats: Annotated[dict[str, header.Heartbeat] | UnsetType, Meta(description="The last heartbeats of running activities, by the ref of the wait.")] = UNSET
    mailbox: Annotated[dict[str, dict[str, int]] | UnsetType, Meta(description="Number of unread messages, by kind and name.")] = UNSET


class Workflows(msgspec.Struct, frozen=True):
    """Those that changed last, newest first, and how many there are of each status."""

    workflows: list[rows.Row]
    counts: dict[str, int]
