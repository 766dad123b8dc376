"""What is reported about instances, as JSON, and which ones a query selects: the same from the changelog and from the engine that owns them.

Everything comes from headers alone: no author's code is loaded, and an entry without a valid header is reported as damaged.  A
`Filter` is applied by the engine and again by the caller, because an older engine returns all instances.
"""

from __future__ import annotations

import functools
import heapq
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from kwflow.core import snapshot
from kwflow.core.murmur2 import partition_of
from kwflow.errors import SnapshotError, UsageError
from kwflow.runners.rows import check_rows

__all__ = [
    "ALL", "STATUSES", "Filter", "Found", "Instances", "Page", "array", "asked_for", "described", "found_in", "header_of", "instant", "newest", "newest_of", "one", "places_of", "row_of", "several",
    "since_ms", "status_of",
]  # fmt: skip

STATUSES = ("waiting", "closing", "parked", "paused", "ended", "damaged")

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_PAGE = 500
_LIMIT_MAX = 10_000  # rows; with a limit an engine keeps them in memory until it has looked through all instances, without one it does not
_DIGITS_MAX = 9  # of a list index in `where`
_BREATH = 0.4  # pause after each page, as a share of the time the page took, so that the engine's own thread goes on, however many rows are looked through
_looking = threading.Lock()  # one page at a time, including its pause: the engine goes on, however many callers there are
_HIDDEN = ("v", "code", "lowering", "key", "ids", "calls")
_FIRST_ID = b"\1"  # an engine's own entries begin with NUL
Page = Callable[[bytes, int], "list[tuple[bytes, bytes]] | None"]  # (first key, limit) -> entries; None once the partition is no longer owned


class Instances(msgspec.Struct, frozen=True):
    """The instances of one engine now: `pages` by number of the partitions that it owns, out of `partitions` in total."""

    engine: str
    partitions: int
    pages: dict[int, Page]


class Filter(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which instances a query selects; an empty field selects any.

    `id` is a prefix of the id or, with a * in front, a part of it.  `since` selects instances that changed at that time or later, in ms since the epoch.
    `where` holds NAME=VALUE pairs of the status value; NAME is dotted for nested values.
    """

    status: str = ""
    workflow: str = ""
    id: str = ""
    since: float = 0
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status and self.status not in STATUSES:
            raise UsageError(f"a status must be one of {', '.join(STATUSES)}, not {self.status!r}")
        if without := [one for one in self.where if "=" not in one[1:]]:
            raise UsageError(f"where must be NAME=VALUE from the status set by kw.set_status, such as customer=Ada or order.paid=true, not {without[0]!r}")

    @property
    def prefix(self) -> bytes:
        """The bytes that every selected key begins with."""
        return b"" if self.id.startswith("*") else self.id.encode("utf-8", "backslashreplace")

    def row(self, key: bytes, data: bytes) -> dict[str, Any] | None:
        """Return the row of an entry, or None if it is not selected.

        Most entries that are not selected lack a text that a selected one must contain.  Finding that takes a fifth of the time of decoding and checking.
        """
        if not self._names(_id_of(key)):
            return None
        for text in _texts_of(self):
            if text not in data:
                return None
        row = row_of(key, data)
        return row if self.takes(row) else None

    def _names(self, id: str) -> bool:
        return self.id[1:] in id if self.id.startswith("*") else id.startswith(self.id)

    def takes(self, row: dict[str, Any]) -> bool:
        return bool(
            (not self.status or row["status"] == self.status)
            and (not self.workflow or row["workflow"] == self.workflow)
            and row["changed"] >= self.since
            and self._names(row["id"])
            and all(_has(row["status_value"], *one.split("=", 1)) for one in self.where)
        )

    def query(self) -> list[tuple[str, str]]:
        """The query parameters for `GET /instances`."""
        fields = msgspec.structs.asdict(self)
        return [(name, f"{one:.0f}" if isinstance(one, float) else str(one)) for name, value in fields.items() if value for one in (value if isinstance(value, tuple) else (value,))]


ALL = Filter()


@functools.lru_cache(maxsize=64)
def _texts_of(wanted: Filter) -> list[bytes]:
    """The texts that every selected snapshot contains, as its header is JSON in the form that `_json` writes."""
    texts = [value for _, _, value in (one.partition("=") for one in wanted.where) if _json(value) == f'"{value}"']  # not escaped by JSON: the same in and out of quotes
    texts += [_json(part) for one in wanted.where for part in one.partition("=")[0].split(".") if not part.isdecimal()]
    if wanted.workflow:
        texts.append(f'"workflow":{_json(wanted.workflow)}')
    if wanted.status not in ("", "damaged"):
        texts.append('"reason":"paused"' if wanted.status == "paused" else f'"status":"{wanted.status}"')
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _has(value: Any, name: str, wanted: str) -> bool:
    """Whether `value` has `wanted` under this dotted name; anything but a string is compared as JSON."""
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part, msgspec.UNSET)
        elif isinstance(value, list) and part.isdecimal() and len(part) <= _DIGITS_MAX and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return value is not msgspec.UNSET and (value if isinstance(value, str) else msgspec.json.encode(value).decode()) == wanted


def asked_for(query: Sequence[tuple[str, str]]) -> tuple[Filter, int | None]:
    """Parse a query into a filter and a limit (None: no limit).  Raises UsageError."""
    given: dict[str, Any] = {}
    for name, value in query:
        if name == "where":
            given[name] = (*given.get(name, ()), value)
        elif name in given:
            raise UsageError(f"{name} is given twice")
        else:
            given[name] = value
    try:
        limit = msgspec.convert(given.pop("limit", None), int | None, strict=False)
        if limit is not None and not 1 <= limit <= _LIMIT_MAX:
            raise UsageError(f"limit must be from 1 to {_LIMIT_MAX}; without a limit, all are returned page by page")
        return msgspec.convert(given, Filter, strict=False), limit
    except msgspec.ValidationError as error:
        raise UsageError(f"{error}; there are: {', '.join(Filter.__struct_fields__)}, limit") from None


def since_ms(text: str | None) -> float:
    """Parse an age such as `2h`, or an ISO time, into ms since the epoch; None is 0.  Raises UsageError."""
    if text is None:
        return 0
    ago = re.fullmatch(r"(\d+)([smhd])", text)
    try:
        if ago is not None:
            return (datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})).timestamp() * 1000
        parsed = datetime.fromisoformat(text)
        return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp() * 1000
    except (ValueError, OverflowError):
        raise UsageError(f"since must be like 30m, 2h or 7d, or a time like 2026-01-31T12:00 (UTC), not {text!r}") from None


def instant(ms: float) -> str:
    """Format an instant for people, in UTC, as `since_ms` accepts it.

    A record's timestamp may be anything that its producer sent, such as microseconds; one that is no date is shown as a number.
    """
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"


class Found(msgspec.Struct, frozen=True):
    """The newest of the selected instances, newest first, and how many are selected for each status."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def newest_of(rows: Iterable[dict[str, Any]], limit: int | None) -> Found:
    """Return the newest rows and the counts of all.  With a limit, no more rows than that are kept in memory."""
    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in rows:
            counts[row["status"]] += 1
            yield row

    def age(row: dict[str, Any]) -> tuple[float, str]:
        return row["changed"], row["id"]

    return Found(sorted(counted(), key=age, reverse=True) if limit is None else heapq.nlargest(limit, counted(), age), dict(counts))


def found_in(answer: Any, wanted: Filter, limit: int | None) -> Found:
    """Read an engine's answer.  An older engine returns all its instances, whatever the query.  Raises msgspec.ValidationError."""
    check_rows(answer)
    found = newest_of((row for row in (answer["rows"] if isinstance(answer, dict) else answer) if wanted.takes({"status_value": None, **row})), limit)
    return Found(found.rows, answer["counts"]) if isinstance(answer, dict) else found


def status_of(header: dict[str, Any]) -> str:
    """The status, which distinguishes `paused` from the other reasons to be parked."""
    return "paused" if header["status"] == "parked" and header["parked"]["reason"] == "paused" else str(header["status"])


def described(data: bytes, keys: snapshot.Keys) -> dict[str, Any]:
    """What `kwflow show ID --json` prints.  Raises SnapshotError."""
    header = snapshot.read_header(data)
    shown = {name: value for name, value in header.items() if name not in _HIDDEN}
    return {**shown, "status": status_of(header), "seal": snapshot.seal_of(data, keys)}


def places_of(header: dict[str, Any]) -> list[str]:
    """Where the instance waits, each place once: `main (trips.py:12)`."""
    return list(dict.fromkeys(f"{wait['function']} ({wait['file']}:{wait['line']})" for wait in header["waits"] if "file" in wait))


def header_of(data: bytes, read: Callable[[bytes], dict[str, Any]] = snapshot.read_header) -> dict[str, Any]:
    """Return the header, for callers that look at all instances: a damaged one is reported as damaged, and hides none of the others."""
    try:
        return read(data)
    except SnapshotError:
        return {"workflow": "", "status": "damaged", "waits": []}


def _id_of(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def row_of(key: bytes, data: bytes) -> dict[str, Any]:
    """One entry of `kwflow list --json`."""
    header = header_of(data)
    changed = header.get("ended", header.get("updated", 0))
    return {
        "id": _id_of(key), "workflow": header["workflow"], "status": status_of(header), "start_id": header.get("start_id", ""), "changed": changed,
        "waits": header["waits"], "status_value": header.get("status_value"), "outcome": header.get("outcome"),
    }  # fmt: skip


def one(served: Instances, id: bytes, keys: snapshot.Keys) -> tuple[int, bytes]:
    """Return the HTTP status and the body for `GET /instances/ID`."""
    number = partition_of(id, served.partitions)
    entries = served.pages[number](id, 1) if number in served.pages else None
    if entries is None:
        return 421, msgspec.json.encode({"error": f"the partition of this instance, {number}, is not owned here"})
    if not entries or entries[0][0] != id or id < _FIRST_ID:
        return 404, msgspec.json.encode({"error": "no such instance"})
    try:
        return 200, msgspec.json.encode(described(entries[0][1], keys))
    except SnapshotError as error:
        return 500, msgspec.json.encode({"error": str(error)})


def _pages(served: Instances, wanted: Filter) -> Iterator[list[dict[str, Any]] | None]:
    """Yield the selected rows of each page; None, as the last item, once a partition was given away."""
    for page in served.pages.values():
        start: bytes | None = max(_FIRST_ID, wanted.prefix)
        while start is not None:
            with _looking:
                began = time.perf_counter()
                entries = page(start, _PAGE)
                inside = [entry for entry in entries or () if entry[0].startswith(wanted.prefix)]
                rows = [row for key, data in inside if (row := wanted.row(key, data)) is not None]
                time.sleep(_BREATH * (time.perf_counter() - began))
            if entries is None:
                yield None
                return
            yield rows
            start = entries[-1][0] + b"\0" if len(inside) == _PAGE else None


def array(served: Instances, wanted: Filter = ALL) -> Iterator[bytes]:
    """Yield the body of `GET /instances`, page by page.  A page without a selected row gives a blank, as the client gives up after some silence.

    If the array is not closed, it is incomplete: a partition was given away meanwhile.
    """
    separator = b"["
    for rows in _pages(served, wanted):
        if rows is None:
            return
        yield separator + b",".join(map(msgspec.json.encode, rows)) if rows else b" "
        separator = b"," if rows else separator
    yield b"]" if separator == b"," else b"[]"


def several(served: Instances, query: str) -> tuple[int, Iterable[bytes]]:
    """Return the HTTP status and the body, in parts, for `GET /instances?...`."""
    try:
        wanted, limit = asked_for(parse_qsl(query, keep_blank_values=True))
    except UsageError as error:
        return 400, [msgspec.json.encode({"error": str(error)})]
    return 200, array(served, wanted) if limit is None else newest(served, wanted, limit)


def newest(served: Instances, wanted: Filter, limit: int) -> Iterator[bytes]:
    """Yield the body of a query with a limit: a `Found`, with blanks before it that keep the client waiting.

    If a partition was given away meanwhile, nothing follows the blanks.
    """
    kept: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for rows in _pages(served, wanted):
        if rows is None:
            return
        counts.update(row["status"] for row in rows)
        kept += rows
        if len(kept) > 2 * limit + _PAGE:  # not after every page, which would cost as much again
            kept = newest_of(kept, limit).rows
        yield b" "
    yield msgspec.json.encode(Found(newest_of(kept, limit).rows, dict(counts)))
