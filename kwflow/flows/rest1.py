"""One call of an HTTP service, from its request to its callback.  Part of the snapshot format: never edited once released."""

from collections.abc import Generator
from typing import Any

from kwflow.errors import Cancelled
from kwflow.flows import support


def call(plan: Any) -> Generator[Any, Any, Any]:
    """Wait as often as the call asks for it; what it waited for, it looks at itself."""
    calling = support.rest_calling(plan)
    try:
        calling.begin()
        while not calling.over:
            try:
                yield calling.wait()
            except Cancelled:
                calling.cancelled()
            except Exception as error:
                calling.failed(error)
            calling.go_on()
    finally:
        calling.close()
    return calling.outcome()
