"""What the durable files of this package call.  Names and meanings are kept for as long as instances may wait in them."""

from __future__ import annotations

from typing import Any

from kwflow import schedules
from kwflow.activities import Activity, failure_of, find_activity
from kwflow.core.current import current
from kwflow.core.ops import heartbeats_of
from kwflow.core.tasks import ActivityWait, Awaitable
from kwflow.errors import ActivityError, BusinessError, CodeChangedError
from kwflow.rest.calling import Calling

__all__ = ["begin_attempt", "failure", "heartbeat_of", "now_ms", "pause_s", "rest_calling", "result", "sleep", "tell", "timed_out", "timer_of", "within_limit"]


def _activity(name: str) -> Activity[Any, Any]:
    """Ends the step when this engine has no activity of that name: the instance is parked until the code is there again (G10)."""
    found = find_activity(name)
    if found is None:
        raise current().abort(CodeChangedError(f"no activity {name!r} in this engine, and a workflow is in a call of it; deploy it again, then retry"))
    return found


def begin_attempt(name: str, arguments: bytes, number: int, key: str, heartbeat: dict[str, Any] | None = None) -> ActivityWait:
    """A wait for one attempt, which an engine, or a worker of its queue, starts after this step's commit; the first one's ref is the key of all.

    `heartbeat` is the last one that an earlier attempt gave.
    """
    wait = current().activity(name, arguments, number, key, _activity(name).queue)
    if heartbeat is not None:
        extra = current().instance.extra
        extra["heartbeats"] = {**heartbeats_of(extra), wait.ref: heartbeat}
    return wait


def heartbeat_of(attempt: ActivityWait) -> dict[str, Any] | None:
    """The last heartbeat of an attempt that has ended in this step; None if it gave none."""
    return heartbeats_of(current().instance.extra).get(attempt.ref)


def within_limit(name: str, attempt: ActivityWait) -> Awaitable:
    """The attempt, raced with a timer if the activity has a timeout."""
    limit_s = _activity(name).timeout_s
    return attempt if limit_s is None else current().timeout(attempt, limit_s)


def result(name: str, value: Any) -> Any:
    """The value as the activity's annotation says."""
    return _activity(name).decode_result(value)


def failure(name: str, payload: Any) -> ActivityError | BusinessError:
    """The error that travelled, whoever wrote it."""
    return failure_of(name, payload)


def timed_out(name: str) -> ActivityError:
    """What an attempt over its time ends with; logged here, as its engine hears only that nobody waits for it any more."""
    error = ActivityError(f"activity {name} had no result within {_activity(name).timeout_s} s", "Timeout")
    current().logs.append(str(error))
    return error


def sleep(seconds: float) -> Awaitable:
    return current().sleep(seconds)


def pause_s(name: str, error: BaseException, number: int, key: str) -> float | None:
    """Seconds until the next attempt; None when there is none."""
    if isinstance(error, BusinessError) or (isinstance(error, ActivityError) and error.final):
        return None
    return _activity(name).retry.pause_s(number, f"{current().instance.id}|{key}")


# -- schedules -----------------------------------------------------------------------------------------------------------
_NEVER_MS = 365 * 86_400_000  # a paused schedule, or one whose expression never comes again, looks once a year


def now_ms() -> int:
    """The instance's time."""
    return current().instance.now_ms


def timer_of(state: dict[str, Any]) -> Awaitable:
    """A timer for the next time, by the instant itself:

    1. an engine's clock is two seconds behind the scheduler's, whose timestamps the instance takes for now
    2. a timer for what is left until then, counted from the engine's clock, is due two seconds early
    3. it wakes the instance, nothing is due yet, the next timer is due at once again: a busy loop, until the time has come
    """
    following = schedules.next_ms(state["plan"], state["after"], state["anchor"])
    if following is None or state["paused"] or following - now_ms() > _NEVER_MS:
        return sleep(_NEVER_MS / 1000)
    return current().sleep(max(1, following - now_ms()) / 1000, following)


def tell(state: dict[str, Any], message: Any) -> None:
    """A signal has come; what is wrong with one is logged."""
    wrong = schedules.told(state, message, now_ms())
    if wrong is not None:
        current().logs.append(wrong)


# -- calls of services ---------------------------------------------------------------------------------------------------
def rest_calling(plan: Any) -> Any:
    """The state of one call; `rest1` knows its `begin`, `over`, `wait`, `cancelled`, `failed`, `go_on`, `close` and `outcome`."""
    return Calling(plan)
