"""When a schedule is due and what it does then: plain functions over plain data, called by the workflow in `flows/schedule1.py`.

Cron expressions mean what they mean to Debian's cron, including daylight saving (cronsim).  No clock is read: the current time
is an argument.  The state is a dict of JSON values, so that a newer kwflow can read what an older one saved.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError

from kwflow.core.wire import DELAY_MS_MAX
from kwflow.errors import UsageError

__all__ = ["SIGNAL", "WORKFLOW", "begin", "checked", "due", "duration_ms", "ended", "instance_id", "next_ms", "status", "told"]

WORKFLOW = "kwflow.schedule"
SIGNAL = "kwflow.schedule"
_CAUGHT_UP_MAX = 1_000  # missed times handled in one waking
_QUEUED_MAX = 100
_ACTIVE_MAX = 1_000
_ACTIVE_BYTES_MAX = 700_000  # so that the snapshot stays below snapshot_bytes_max
_NAME_BYTES_MAX = 400  # with a time and a number added, it is the id of a run
_LATE_MS = 60_000  # a busy engine is late by less than this; a time that is no older never counts as missed


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of `kwflow schedule add`: either `cron` (with `timezone`) or `every_ms`.  `catch_up_ms` is how old a missed time may be and still run."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"\A[^|\x00]*\Z")]
    workflow: Annotated[str, msgspec.Meta(min_length=1)]
    input: Any = None
    cron: str | None = None
    every_ms: Annotated[int, msgspec.Meta(ge=1_000, le=DELAY_MS_MAX)] | None = None
    timezone: str = "UTC"
    overlap: Literal["skip", "queue", "allow"] = "skip"
    catch_up_ms: Annotated[int, msgspec.Meta(ge=0)] = 3_600_000


def checked(plan: object) -> dict[str, Any]:
    """Return the plan with its defaults filled in.  Raises UsageError for an invalid plan."""
    try:
        made = msgspec.convert(plan, Plan)
    except msgspec.ValidationError as error:
        raise UsageError(f"schedule: {error}") from None
    if len(made.name.encode()) > _NAME_BYTES_MAX:
        raise UsageError(f"the name of a schedule can have at most {_NAME_BYTES_MAX} bytes, not {len(made.name.encode())}")
    if (made.cron is None) == (made.every_ms is None):
        raise UsageError("a schedule needs either a cron expression or an interval")
    found: dict[str, Any] = msgspec.to_builtins(made)
    next_ms(found, 0, 0)
    return found


def instance_id(name: str) -> str:
    """Return the workflow id of a schedule."""
    return f"schedule:{name}"


_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?")


def duration_ms(text: str) -> int:
    """Return a duration such as `90s`, `5m`, `1h30m` or `2d` in ms.  Raises UsageError."""
    found = _DURATION.fullmatch(text)
    if found is None or not any(found.groups()):
        raise UsageError(f"a duration must look like 90s, 5m, 1h30m or 2d, not {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 1000


def next_ms(plan: dict[str, Any], after_ms: int, anchor_ms: int) -> int | None:
    """Return the first time after `after_ms`; intervals count from `anchor_ms`.  None if a cron expression has no further time.  Raises UsageError."""
    if plan["every_ms"] is not None:
        every = int(plan["every_ms"])
        return anchor_ms + ((after_ms - anchor_ms) // every + 1) * every
    try:
        zone = ZoneInfo(plan["timezone"])
        times = CronSim(plan["cron"], datetime.fromtimestamp(after_ms / 1000, UTC).astimezone(zone))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(f"there is no time zone {plan['timezone']!r}") from None
    except CronSimError as error:
        raise UsageError(f"cron expression {plan['cron']!r}: {error}") from None
    for found in times:
        at_ms = round(found.timestamp() * 1000)
        if at_ms > after_ms:  # in the hour that daylight saving repeats, cronsim may return the first occurrence again
            return at_ms
    return None


# -- the state of a running schedule -------------------------------------------------------------------------------------
def begin(plan: object, now_ms: int) -> dict[str, Any]:
    """Return the state of a new schedule, in which no time up to now is due.  Raises UsageError."""
    return {
        "plan": checked(plan), "anchor": now_ms, "after": now_ms, "paused": False, "removed": False, "triggers": 0, "triggered": 0,
        "active": {}, "queue": [], "runs": 0, "skipped": 0, "missed": 0, "last": None, "failed": 0,
    }  # fmt: skip


def due(state: dict[str, Any], now_ms: int) -> list[str]:
    """Return the ids of the runs to start now.  Missed times, triggers and the queue are handled as the overlap policy says."""
    found: list[str] = []
    for run in _asked(state, now_ms):
        if state["plan"]["overlap"] == "queue" and len(state["queue"]) < _QUEUED_MAX:
            state["queue"].append(run)
        elif state["plan"]["overlap"] == "allow" and len(state["active"]) < _active_max(state["plan"]["name"]) or state["plan"]["overlap"] == "skip" and not state["active"]:
            _start(state, run, now_ms, found)
        else:
            state["skipped"] += 1
    if state["queue"] and not state["active"]:
        _start(state, state["queue"].pop(0), now_ms, found)
    return found


def _active_max(name: str) -> int:
    """An active run takes 460 bytes of the snapshot, and the name of its schedule three times."""
    return min(_ACTIVE_MAX, _ACTIVE_BYTES_MAX // (460 + 3 * len(name.encode())))


def _start(state: dict[str, Any], run: str, now_ms: int, found: list[str]) -> None:
    state["active"][run] = now_ms
    state["runs"] += 1
    state["last"] = run
    found.append(run)


def _asked(state: dict[str, Any], now_ms: int) -> list[str]:
    """Return the runs that the time and people ask for, as ids: the name of the schedule and the time."""
    name, plan = state["plan"]["name"], state["plan"]
    times: list[int] = []
    oldest = now_ms - max(plan["catch_up_ms"], _LATE_MS)
    if state["paused"]:  # times that come due are to be skipped
        state["after"] = max(state["after"], now_ms)
    while (at_ms := next_ms(plan, state["after"], state["anchor"])) is not None and at_ms <= now_ms:
        state["after"] = at_ms
        if at_ms < oldest:  # skip all the others that are too old at once
            state["missed"] += 1
            state["after"] = oldest - 1
        elif len(times) >= _CAUGHT_UP_MAX:
            state["missed"] += 1
            state["after"] = now_ms
        else:
            times.append(at_ms)
    asked = [f"{name}@{_iso(at_ms)}" for at_ms in times]
    for _ in range(state["triggers"]):
        state["triggered"] += 1
        asked.append(f"{name}@{_iso(now_ms)}+{state['triggered']}")
    state["triggers"] = 0
    return asked


def ended(state: dict[str, Any], run: str, outcome: str) -> None:
    """Note that a run has ended."""
    state["active"].pop(run, None)
    if outcome != "result":
        state["failed"] += 1
        state["last_failed"] = f"{run}: {outcome}"


def told(state: dict[str, Any], message: object, now_ms: int) -> str | None:
    """Apply a signal: set, pause, unpause, trigger or remove.  Return what is wrong with it, for the log; it has changed nothing then."""
    do = message.get("do") if isinstance(message, dict) else None
    if do == "set" and isinstance(message, dict):
        try:
            plan = checked(message.get("plan"))
        except UsageError as error:
            return f"not changed: {error}"
        if plan != state["plan"]:
            state["skipped"] += len(state["queue"])
            state["plan"], state["after"], state["anchor"], state["queue"] = plan, now_ms, now_ms, []
    elif do in ("pause", "unpause"):
        if state["paused"] and do == "unpause":
            state["after"] = max(state["after"], now_ms)  # times that came due meanwhile are skipped
        state["paused"] = do == "pause"
    elif do == "trigger":
        state["triggers"] += 1
    elif do == "remove":
        state["removed"] = True
    else:
        return f"a schedule does not know {message!r}"
    return None


def status(state: dict[str, Any]) -> dict[str, Any]:
    """Return what `kwflow schedule list` shows; times are in ISO 8601."""
    plan = {name: value for name, value in state["plan"].items() if name != "input" and value is not None}
    following = next_ms(state["plan"], state["after"], state["anchor"])
    shown = {name: state[name] for name in ("paused", "runs", "failed", "skipped", "missed", "last")}
    shown["last_failed"] = state.get("last_failed")  # the state of a schedule from an earlier version has none
    return {**shown, "plan": plan, "next": None if following is None or state["paused"] else _iso(following), "active": len(state["active"]), "queued": len(state["queue"])}


def _iso(at_ms: int) -> str:
    text = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds" if at_ms % 1000 else "seconds")
    return text.replace("+00:00", "Z")
