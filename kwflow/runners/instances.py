"""What is told of an instance, as JSON: the same from the changelog and from the engine that owns it.  From headers alone, no code of the author's is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from kwflow.core import snapshot
from kwflow.core.murmur2 import partition_of
from kwflow.errors import SnapshotError

__all__ = ["Instances", "Page", "array", "described", "header_of", "one", "row_of", "status_of"]

_PAGE = 500
_HIDDEN = ("v", "code", "lowering", "key", "ids")
_FIRST_ID = b"\1"  # an engine's own entries begin with NUL
Page = Callable[[bytes, int], "list[tuple[bytes, bytes]] | None"]  # entries from a key on, at most so many; None once the partition is gone


class Instances(msgspec.Struct, frozen=True):
    """What one engine has now: `pages` of the partitions that it owns, out of so many `partitions`."""

    engine: str
    partitions: int
    pages: dict[int, Page]


def status_of(header: dict[str, Any]) -> str:
    """The status, with `paused` told from the other reasons to be parked."""
    return "paused" if header["status"] == "parked" and header["parked"]["reason"] == "paused" else str(header["status"])


def described(data: bytes, keys: snapshot.Keys) -> dict[str, Any]:
    """`kwflow show ID --json`.  Raises SnapshotError."""
    header = snapshot.read_header(data)
    shown = {name: value for name, value in header.items() if name not in _HIDDEN}
    return {**shown, "status": status_of(header), "seal": snapshot.seal_of(data, keys)}


def header_of(data: bytes, read: Callable[[bytes], dict[str, Any]] = snapshot.read_header) -> dict[str, Any]:
    """For who looks at all of them: one that is damaged says so, and hides none of the others."""
    try:
        return read(data)
    except SnapshotError:
        return {"workflow": "", "status": "damaged", "waits": []}


def row_of(key: bytes, data: bytes) -> dict[str, Any]:
    """One entry of `kwflow list --json`."""
    header = header_of(data)
    changed = header.get("ended", header.get("updated", 0))
    return {
        "id": key.decode("utf-8", "backslashreplace"), "workflow": header["workflow"], "status": status_of(header), "start_id": header.get("start_id", ""), "changed": changed,
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


def array(served: Instances) -> Iterator[bytes]:
    """The body of `GET /instances`, page by page; an array that is not closed is not whole: a partition was given away meanwhile."""
    separator = b"["
    for page in served.pages.values():
        start: bytes | None = _FIRST_ID
        while start is not None:
            entries = page(start, _PAGE)
            if entries is None:
                return
            if entries:
                yield separator + b",".join(msgspec.json.encode(row_of(key, data)) for key, data in entries)
                separator = b","
            start = entries[-1][0] + b"\0" if len(entries) == _PAGE else None
    yield b"]" if separator == b"," else b"[]"
