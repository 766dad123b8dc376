"""Which instances a filter of `kwflow list` matches: by a row, and by the bytes of a snapshot that is not decoded."""

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kwflow.core import snapshot
from kwflow.runners import instances
from kwflow.runners.instances import ALL, Filter, asked_for

texts = st.text(max_size=4) | st.sampled_from(["Ada", "a.0", "null", "0", 'say "a"', "\\\n", "paused", "waiting"])
plain = texts | st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
told = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)


def test_a_filter_takes_what_it_says() -> None:
    row = {"id": "order-7", "workflow": "shop", "status": "waiting", "changed": 100, "status_value": {"customer": "Ada", "order": {"paid": False, "items": [1, {"a": None}]}, "n": 3, "true": True}}
    for taken in ("customer=Ada", "order.paid=false", "order.items.0=1", "order.items.1.a=null", "n=3", "true=true", 'order.items=[1,{"a":null}]'):
        assert Filter(where=(taken,)).takes(row), taken
    for refused in ("customer=ada", "order.paid=0", "order.items.2=1", "order.items.x=1", f"order.items.{'9' * 5000}=1", "n=3.0", "true=1", "nothing=null", "customer.first=A", "order.paid="):
        assert not Filter(where=(refused,)).takes(row), refused
    wanted = Filter("waiting", "shop", "order-", 100.0, ("n=3",))
    assert wanted.takes(row) and asked_for([*wanted.query(), ("limit", "5")]) == (wanted, 5) and asked_for([]) == (ALL, None)
    for other in ({"status": "ended"}, {"workflow": "x"}, {"changed": 99}, {"id": "rder-7"}, {"status_value": None}):
        assert not wanted.takes({**row, **other})
    assert wanted.prefix == b"order-" and Filter(id="*7").prefix == b"" and Filter(id="*der").takes(row)


@settings(max_examples=300)
@given(value=told, other=st.tuples(texts, told), id=texts, workflow=texts, parked=st.sampled_from(["", "paused", "unsavable"]), cut=st.integers(0, 3))
def test_what_is_passed_over_by_its_bytes_is_what_a_filter_does_not_take(value: Any, other: tuple[str, Any], id: str, workflow: str, parked: str, cut: int) -> None:
    """Of a million instances most are never decoded, and none that matches is among those."""
    header = {"v": 1, "id": id, "workflow": workflow, "status": "parked" if parked else "waiting", "updated": 5, "waits": [], "status_value": value}
    stored = snapshot.copy(b"body", header | ({"parked": {"reason": parked, "message": "Ada", "offset": 1}} if parked else {}))
    stored, key = (stored[:-cut] if cut else stored), id.encode()
    names = [("", value)]
    for name, inner in names:
        names += [(f"{name}.{part}" if name else str(part), one) for part, one in (inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ())]
    where = [f"{name}={inner if isinstance(inner, str) else msgspec.json.encode(inner).decode()}" for name, inner in (*names, other) if name and not name.startswith("=")]
    row = instances.row_of(key, stored)
    for wanted in (
        *(Filter(status=status) for status in ("", *instances.STATUSES)), *(Filter(workflow=one) for one in (workflow, "x")), *(Filter(id=one) for one in (f"*{id[1:]}", id[:1], "x")),
        *(Filter(where=(one,)) for one in where), Filter(where=tuple(where)), Filter(since=6), Filter(row["status"], workflow, id, 5, tuple(where[:1])),
    ):  # fmt: skip
        assert wanted.row(key, stored) == (row if wanted.takes(row) else None), wanted
