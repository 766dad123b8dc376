"""The record that answers one call of an activity: its result, or whatever it raised (M6.3).

Everything an activity can do ends as such a record: what cannot be sent, or is too large, too.  It must not know threads
or queues: who calls, and when, is `dispatch.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec

from kwflow.activities import Activity, ActivityInfo, failure_payload, running_as
from kwflow.core import wire
from kwflow.core.dispatch import Dispatch
from kwflow.errors import ActivityError

__all__ = ["carry_out", "failure_record", "info_of", "result_record"]

_SHORT = 200  # characters of each text of an error that a record would not hold whole


def info_of(item: Dispatch) -> ActivityInfo:
    return ActivityInfo(item.name, item.workflow_id, item.attempt, f"{item.workflow_id}|{item.key}")


def carry_out(
    item: Dispatch, activity: Activity[Any, Any], info: ActivityInfo, bytes_max: tuple[int, int], function: Callable[..., Any] | None = None,
    failed: Callable[[BaseException], None] = lambda error: None,
) -> bytes:  # fmt: skip
    """Call it (or `function` in its place) and make the record that answers; whatever it raises is in there, and `failed` hears of it.  `bytes_max`: of the result, of the record."""
    try:
        with running_as(info):
            bound = activity.decode_arguments(item.arguments)
            return result_record(item, activity, (function or activity.function)(*bound.args, **bound.kwargs), bytes_max)
    except BaseException as error:  # SystemExit too: it ends the activity, not the engine
        failed(error)
        return failure_record(item, error, bytes_max[1])


def result_record(item: Dispatch, activity: Activity[Any, Any], value: Any, bytes_max: tuple[int, int]) -> bytes:
    if inspect.iscoroutine(value):
        value.close()
        raise ActivityError(f"activity {activity.name} returned a coroutine; declare it with `async def`", "BadResult", final=True)
    encoded = activity.encode_result(value)
    record = b'{"ref":' + wire.json_dumps(item.ref) + b',"value":' + encoded + b"}"
    for size, limit, name in ((len(encoded), bytes_max[0], "activity_bytes_max"), (len(record), bytes_max[1], "value_bytes_max")):
        if size > limit:
            raise ActivityError(f"the result of activity {activity.name} has {size} bytes, more than {name} = {limit}; return a reference to it", "ResultTooLarge", final=True)
    return record


def failure_record(item: Dispatch, error: BaseException, bytes_max: int) -> bytes:
    """The error without what is too large for a record: as a dead letter it would leave its workflow waiting."""
    payload = failure_payload(error)
    record = msgspec.json.encode({"ref": item.ref, "error": payload})  # all in it is checked; a level deeper here
    if len(record) <= bytes_max:
        return record
    said = f"<not sent: the error has {len(record)} bytes (limit value_bytes_max)>"
    short = {name: said if name in ("details", "variables") else value[:_SHORT] if isinstance(value, str) else value for name, value in payload.items()}
    return msgspec.json.encode({"ref": item.ref, "error": short})
