"""What is told of an instance, as JSON, and which ones are asked for: the same from the changelog and from the engine that owns it.

From headers alone, no code of the author's is loaded, and one that is no header of ours is damaged.  A `Filter` is applied by the engine, and again by who asked: an older engine gives all.
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
from kwflow.runners.told import check_rows, checked_header

__all__ = [
    "ALL", "STATUSES", "Filter", "Found", "Instances", "Page", "array", "asked_for", "described", "found_in", "header_of", "instant", "newest", "newest_of", "one", "row_of", "several",
    "since_ms", "status_of",
]  # fmt: skip

STATUSES = ("waiting", "closing", "parked", "paused", "ended", "damaged")

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_PAGE = 500
_LIMIT_MAX = 10_000  # rows; an engine has them in memory until it has looked through all, which without a limit it need not
_DIGITS_MAX = 9  # of an index
_BREATH = 0.4  # of the time that a page took, after it: the engine's own thread goes on, however many rows somebody looks through
_looking = threading.Lock()  # a page at a time, breath and all: it goes on however many look
_HIDDEN = ("v", "code", "lowering", "key", "ids")
_FIRST_ID = b"\1"  # an engine's own entries begin with NUL
Page = Callable[[bytes, int], "list[tuple[bytes, bytes]] | None"]  # entries from a key on, at most so many; None once the partition is gone


class Instances(msgspec.Struct, frozen=True):
    """What one engine has now: `pages` of the partitions that it owns, out of so many `partitions`."""

    engine: str
    partitions: int
    pages: dict[int, Page]


class Filter(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which instances are asked for; what is empty asks for any.

    `id` is how it begins, or with a * in front, what is in it; `since` in ms, when it changed; `where` is NAME=VALUE of the status value, dotted where it nests.
    """

    status: str = ""
    workflow: str = ""
    id: str = ""
    since: float = 0
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status and self.status not in STATUSES:
            raise UsageError(f"a status is one of {', '.join(STATUSES)}, not {self.status!r}")
        if without := [one for one in self.where if "=" not in one[1:]]:
            raise UsageError(f"where is like customer=Ada or order.paid=true, a name and a value of what kw.set_status was given, not {without[0]!r}")

    @property
    def prefix(self) -> bytes:
        """What every key begins with."""
        return b"" if self.id.startswith("*") else self.id.encode("utf-8", "backslashreplace")

    def row(self, key: bytes, data: bytes) -> dict[str, Any] | None:
        """The entry's row, if it is asked for.  Most that are not lack a text that it has to have: seen in a fifth of the time that decoding and checking takes."""
        if not self._names(key):
            return None
        for text in _texts_of(self):
            if text not in data:
                return None
        row = row_of(key, data)
        return row if self.takes(row) else None

    def _names(self, key: bytes) -> bool:
        return self.id[1:] in _id_of(key) if self.id.startswith("*") else key.startswith(self.prefix)

    def takes(self, row: dict[str, Any]) -> bool:
        return bool(
            (not self.status or row["status"] == self.status)
            and (not self.workflow or row["workflow"] == self.workflow)
            and row["changed"] >= self.since
            and (self.id[1:] in row["id"] if self.id.startswith("*") else row["id"].startswith(self.id))
            and all(_has(row["status_value"], *one.split("=", 1)) for one in self.where)
        )

    def query(self) -> list[tuple[str, str]]:
        """As `GET /instances` takes it."""
        fields = msgspec.structs.asdict(self)
        return [(name, f"{one:.0f}" if isinstance(one, float) else str(one)) for name, value in fields.items() if value for one in (value if isinstance(value, tuple) else (value,))]


ALL = Filter()


@functools.lru_cache(maxsize=64)
def _texts_of(wanted: Filter) -> list[bytes]:
    """What every snapshot that is asked for has in it: its header is JSON as `_json` writes it."""
    texts = [value for _, _, value in (one.partition("=") for one in wanted.where) if _json(value) == f'"{value}"']  # the same within a text and without
    texts += [_json(part) for one in wanted.where for part in one.partition("=")[0].split(".") if not part.isdecimal()]
    if wanted.workflow:
        texts.append(f'"workflow":{_json(wanted.workflow)}')
    if wanted.status not in ("", "damaged"):
        texts.append('"reason":"paused"' if wanted.status == "paused" else f'"status":"{wanted.status}"')
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _has(value: Any, name: str, wanted: str) -> bool:
    """Whether this is there under this name; what is no text is compared as JSON."""
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part, msgspec.UNSET)
        elif isinstance(value, list) and part.isdecimal() and len(part) <= _DIGITS_MAX and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return value is not msgspec.UNSET and (value if isinstance(value, str) else msgspec.json.encode(value).decode()) == wanted


def asked_for(query: Sequence[tuple[str, str]]) -> tuple[Filter, int | None]:
    """What a query asks for, and at most how many.  Raises UsageError."""
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
            raise UsageError(f"limit is 1 to {_LIMIT_MAX}; without one all come, page by page")
        return msgspec.convert(given, Filter, strict=False), limit
    except msgspec.ValidationError as error:
        raise UsageError(f"{error}; there are: {', '.join(Filter.__struct_fields__)}, limit") from None


def since_ms(text: str | None) -> float:
    """`2h` ago, or an ISO time, in ms.  Raises UsageError."""
    if text is None:
        return 0
    ago = re.fullmatch(r"(\d+)([smhd])", text)
    try:
        if ago is not None:
            return (datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})).timestamp() * 1000
        parsed = datetime.fromisoformat(text)
        return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp() * 1000
    except (ValueError, OverflowError):
        raise UsageError(f"since is like 30m, 2h, 7d, or a time like 2026-01-31T12:00 (UTC), not {text!r}") from None


def instant(ms: float) -> str:
    """An instant for people, in UTC, as `since_ms` takes it.  A record's timestamp may be anything that its producer took for one, such as microseconds."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"


class Found(msgspec.Struct, frozen=True):
    """The newest of those that were asked for, newest first, and how many there are of each status."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def newest_of(rows: Iterable[dict[str, Any]], limit: int | None) -> Found:
    """With a limit no more than those are kept in memory."""
    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in rows:
            counts[row["status"]] += 1
            yield row

    def age(row: dict[str, Any]) -> tuple[float, str]:
        return row["changed"], row["id"]

    return Found(sorted(counted(), key=age, reverse=True) if limit is None else heapq.nlargest(limit, counted(), age), dict(counts))


def found_in(answer: Any, wanted: Filter, limit: int | None) -> Found:
    """What an engine gave; an older one gives all that it has, whatever it was asked for.  Raises msgspec.ValidationError."""
    check_rows(answer)
    found = newest_of((row for row in (answer["rows"] if isinstance(answer, dict) else answer) if wanted.takes({"status_value": None, **row})), limit)
    return Found(found.rows, answer["counts"]) if isinstance(answer, dict) else found


def status_of(header: dict[str, Any]) -> str:
    """The status, with `paused` told from the other reasons to be parked."""
    return "paused" if header["status"] == "parked" and header["parked"]["reason"] == "paused" else str(header["status"])


def described(data: bytes, keys: snapshot.Keys) -> dict[str, Any]:
    """`kwflow show ID --json`.  Raises SnapshotError."""
    header = checked_header(snapshot.read_header(data))
    shown = {name: value for name, value in header.items() if name not in _HIDDEN}
    return {**shown, "status": status_of(header), "seal": snapshot.seal_of(data, keys)}


def header_of(data: bytes, read: Callable[[bytes], dict[str, Any]] = snapshot.read_header) -> dict[str, Any]:
    """For who looks at all of them: one that is damaged says so, and hides none of the others."""
    try:
        return checked_header(read(data))
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
    """HTTP status and body of `GET /instances/ID`."""
    number = partition_of(id, served.partitions)
    entries = served.pages[number](id, 1) if number in served.pages else None
    if entries is None:
        return 421, msgspec.json.encode({"error": f"partition {number}, where this instance is, is not owned here"})
    if not entries or entries[0][0] != id or id < _FIRST_ID:
        return 404, msgspec.json.encode({"error": "no such instance"})
    try:
        return 200, msgspec.json.encode(described(entries[0][1], keys))
    except SnapshotError as error:
        return 500, msgspec.json.encode({"error": str(error)})


def _pages(served: Instances, wanted: Filter) -> Iterator[list[dict[str, Any]] | None]:
    """What each page has of them; None once a partition was given away."""
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
    """The body of `GET /instances`, page by page, a blank for one that has none of them: who waits gives up after some silence.

    An array that is not closed is not whole: a partition was given away meanwhile.
    """
    separator = b"["
    for rows in _pages(served, wanted):
        if rows is None:
            return
        yield separator + b",".join(map(msgspec.json.encode, rows)) if rows else b" "
        separator = b"," if rows else separator
    yield b"]" if separator == b"," else b"[]"


def several(served: Instances, query: str) -> tuple[int, Iterable[bytes]]:
    """HTTP status and body, in parts, of `GET /instances?...`."""
    try:
        wanted, limit = asked_for(parse_qsl(query, keep_blank_values=True))
    except UsageError as error:
        return 400, [msgspec.json.encode({"error": str(error)})]
    return 200, array(served, wanted) if limit is None else newest(served, wanted, limit)


def newest(served: Instances, wanted: Filter, limit: int) -> Iterator[bytes]:
    """The body with a limit, a `Found`; blanks before it tell who waits that it is on its way, and nothing comes behind them if a partition was given away meanwhile."""
    kept: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for rows in _pages(served, wanted):
        if rows is None:
            return
        counts.update(row["status"] for row in rows)
        kept += rows
        if len(kept) > 2 * limit + _PAGE:  # not after every page: that would take as long again for each
            kept = newest_of(kept, limit).rows
        yield b" "
    yield msgspec.json.encode(Found(newest_of(kept, limit).rows, dict(counts)))
