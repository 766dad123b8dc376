"""One call of an activity with heartbeats, from its first attempt to its end.  Part of the snapshot format: never edited once released.

It differs from `attempts1` in that each attempt is given the details of the one before it.
"""

from collections.abc import Generator
from typing import Any

from kwflow.errors import WorkflowError
from kwflow.flows import support
from kwflow.flows.support import heartbeat_of


def attempts(name: str, arguments: bytes) -> Generator[Any, Any, Any]:
    """Try until it succeeds, must not be tried again, or has been tried often enough."""
    attempt: Any
    failure: Any
    details: Any
    number, key, details = 1, "", None
    while True:
        attempt = support.begin_attempt(name, arguments, number, key, details)
        key = key or attempt.ref
        try:
            value = yield support.within_limit(name, attempt)
        except WorkflowError as error:
            failure = support.failure(name, error.payload)
        except TimeoutError:
            failure = support.timed_out(name)
        else:
            return support.result(name, value)
        pause_s = support.pause_s(name, failure, number, key)
        if pause_s is None:
            raise failure
        details = heartbeat_of(attempt)
        attempt = failure = None
        yield support.sleep(pause_s)
        number += 1
