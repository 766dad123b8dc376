"""What a running activity is told of its call, and what it says of its progress: `kw.activity_info()`.

Whoever runs the call puts an ActivityInfo in place (`running_as`).  This module must not know how calls are run, or where heartbeats go.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kwflow.errors import UsageError

__all__ = ["ActivityInfo", "Heart", "activity_info", "running_as"]


class Heart(Protocol):
    """What takes the heartbeats of an attempt, and knows the last details of its call."""

    @property
    def details(self) -> Any: ...

    def beat(self, details: object) -> None: ...


@dataclass(frozen=True)
class ActivityInfo:
    """The call that an activity runs for.  `idempotency_key` is the same for every attempt of one call; pass it to services that accept such keys.

    `headers` are those of the step that made the call, as `kw.headers()` returns them there.
    """

    activity: str
    workflow_id: str
    attempt: int
    idempotency_key: str
    headers: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)
    _beats: Heart | None = field(default=None, repr=False, compare=False)

    @property
    def cancelled(self) -> bool:
        """Whether the workflow no longer waits for this attempt.  A long activity should check this now and then, and stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Tell the activity that nobody waits for it any more."""
        self._cancelled.set()

    def heartbeat(self, details: object = None) -> None:
        """Say that this attempt is alive, and how far it is: `details` are any JSON up to 10 KB, which the next attempt finds in `heartbeat_details`.

        Call it as often as you like: details are sent at most every 5 s (or half the `heartbeat=` of the activity, if that is less), and when the attempt fails.
        Raises UsageError if the activity has no `heartbeat=`, or for details that cannot be sent.
        """
        self._heart().beat(details)

    @property
    def heartbeat_details(self) -> Any:
        """The last details that this call has given, in this attempt or in an earlier one; None if there were none.

        In a worker, a `def` waits here for the engine's answer.  Raises UsageError if the activity has no `heartbeat=`.
        """
        return self._heart().details

    def _heart(self) -> Heart:
        if self._beats is None:
            raise UsageError(f"activity {self.activity} has no heartbeats: declare them with @kw.activity(heartbeat=60), the seconds after which an attempt without one has failed")
        return self._beats

    def wait_cancelled(self, seconds: float) -> bool:
        """Sleep for so long, or until the workflow stops waiting; return whether it has.  For `def` activities that poll."""
        return self._cancelled.wait(seconds)


_info: contextvars.ContextVar[ActivityInfo] = contextvars.ContextVar("kwflow_activity")


def activity_info() -> ActivityInfo:
    """Return the call that this activity runs for.  Raises UsageError outside an activity."""
    try:
        return _info.get()
    except LookupError:
        raise UsageError("kw.activity_info() works only inside an activity that a workflow called") from None


class running_as:
    """A context manager in which `activity_info()` returns this info."""

    def __init__(self, info: ActivityInfo) -> None:
        self.info = info

    def __enter__(self) -> ActivityInfo:
        self._token = _info.set(self.info)
        return self.info

    def __exit__(self, *_: object) -> None:
        _info.reset(self._token)
