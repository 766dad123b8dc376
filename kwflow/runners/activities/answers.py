"""The record that answers one activity call: its result, or whatever it raised (M6.3).

Everything that an activity can do ends as such a record, even a result that cannot be sent or is too large.  This module must
not know threads or queues: `dispatch.py` decides who calls, and when.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kwflow.activities import Activity, failure_payload
from kwflow.batches import Call
from kwflow.core import wire
from kwflow.core.dispatch import Dispatch
from kwflow.core.values import json_dumps
from kwflow.errors import ActivityError, UsageError
from kwflow.running import ActivityInfo, running_as

__all__ = ["calls_of", "carry_out", "conclude", "failure_record", "info_of", "result_record"]

_SHORT = 200  # characters that are kept of each text of an error that is too large for a record


def info_of(item: Dispatch) -> ActivityInfo:
    return ActivityInfo(item.name, item.workflow_id, item.attempt, f"{item.workflow_id}|{item.key}", wire.shown_headers(item.headers))


def carry_out(
    item: Dispatch, activity: Activity[Any, Any], info: ActivityInfo, bytes_max: tuple[int, int], function: Callable[..., Any] | None = None,
    failed: Callable[[BaseException], None] = lambda error: None,
) -> bytes:  # fmt: skip
    """Call the activity (or `function` in its place) and return the record that answers.

    An error of any kind is in that record, and is also passed to `failed`.  `bytes_max` has the limits of the result and of the record.
    """
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
    record = b'{"ref":' + json_dumps(item.ref) + b',"value":' + encoded + b"}"
    for size, limit, name in ((len(encoded), bytes_max[0], "activity_bytes_max"), (len(record), bytes_max[1], "value_bytes_max")):
        if size > limit:
            raise ActivityError(f"the result of activity {activity.name} has {size} bytes, more than {name} = {limit}; return a reference to it", "ResultTooLarge", final=True)
    return record


def failure_record(item: Dispatch, error: BaseException, bytes_max: int) -> bytes:
    """The record of an error, shortened if it is too large: as a dead letter it would leave its workflow waiting."""
    payload = failure_payload(error)
    record = msgspec.json.encode({"ref": item.ref, "error": payload})  # the payload is checked already; here it is nested one level deeper
    if len(record) <= bytes_max:
        return record
    said = f"<not sent: the error has {len(record)} bytes (limit value_bytes_max)>"
    short = {name: said if name in ("details", "variables") else value[:_SHORT] if isinstance(value, str) else value for name, value in payload.items()}
    return msgspec.json.encode({"ref": item.ref, "error": short})


# -- batches -----------------------------------------------------------------------------------------------------------
_Answer = Callable[[Any, BaseException | None], None]


def calls_of(activity: Activity[Any, Any], given: Sequence[tuple[Dispatch, ActivityInfo, _Answer]]) -> list[Call]:
    """The calls that are passed to a batch's function.  A call whose arguments no longer fit the function is answered, and left out."""
    calls = []
    for item, info, answer in given:
        try:
            bound = activity.decode_arguments(item.arguments)
        except ActivityError as error:
            answer(None, error)
            continue
        bound.apply_defaults()
        calls.append(Call(bound.arguments, info, answer))
    return calls


def conclude(activity: Activity[Any, Any], calls: Sequence[Call], returned: Any) -> None:
    """Answer the calls of a batch that have no answer yet, according to what its function returned or raised."""
    if inspect.iscoroutine(returned):
        returned.close()
        returned = ActivityError(f"the batch of activity {activity.name} returned a coroutine; declare it with `async def`", "BadResult", final=True)
    if returned is None:
        returned = ActivityError(f"the batch of activity {activity.name} did not answer this call: use call.complete(value) or call.fail(error), or return a list", "NotAnswered")
    if not isinstance(returned, BaseException) and not (isinstance(returned, (list, tuple)) and len(returned) == len(calls)):
        said = f"{len(returned)} results for {len(calls)} calls" if isinstance(returned, (list, tuple)) else repr(returned)[:_SHORT]
        returned = ActivityError(f"the batch of activity {activity.name} returned {said}; it must return None, or a result or an exception for each call, in order", "BadResult", final=True)
    for call, answer in zip(calls, [returned] * len(calls) if isinstance(returned, BaseException) else returned, strict=True):
        if not call.answered:
            with contextlib.suppress(UsageError):  # a thread of the author's has just answered it; go on with the others
                call.fail(answer) if isinstance(answer, BaseException) else call.complete(answer)
