"""T-KW-2..5 and their verified variants, as data for the core and for the broker tests.

Answers are (ref, error or None) in order; the first record of the topic starts the saga, so refs are `0:1`..`0:4`.
"""

from typing import Any, NamedTuple


class Trip(NamedTuple):
    """A saga, its answers, and what must have been written when it has ended."""

    name: str
    options: dict[str, Any]
    answers: list[tuple[str, str | None]]
    result: Any
    error: str | None
    cancelled: dict[str, str]


_BOOKED = {"car": {"id": "0:1"}, "hotel": {"id": "0:2"}, "flight": {"id": "0:3"}}
_ALL = {"car": "0:1", "hotel": "0:2", "flight": "0:3"}
_WRONG = {"throwAfterHotel": True}

TRIPS = [
    Trip("T-KW-2 all resolved", {}, [("0:3", None), ("0:2", None), ("0:1", None)], _BOOKED, None, {}),
    Trip("T-KW-3 error in code", _WRONG, [("0:3", None), ("0:1", None), ("0:2", None)], None, "something is wrong", _ALL),
    Trip("T-KW-3 error in code, hotel first", _WRONG, [("0:2", None)], None, "something is wrong", _ALL),
    Trip("T-KW-4 one errored", {}, [("0:3", None), ("0:1", None), ("0:2", "hotel is not available")], None, "hotel is not available", {"car": "0:1", "flight": "0:3"}),
    Trip("T-KW-4 one errored first", {}, [("0:2", "hotel is not available")], None, "hotel is not available", {"car": "0:1", "flight": "0:3"}),
    Trip("T-KW-5 timeout", {}, [("0:3", None), ("0:1", None), ("0:4", None)], None, "timeout", _ALL),
    Trip("T-KW-5 timeout at once", {}, [("0:4", None)], None, "timeout", _ALL),
]
