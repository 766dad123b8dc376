"""What pages show of instances: gathered from stored data, in a thread, without running any author's code.

Everything here was written by some record's sender or some author: it is text for a page, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from kwflow.console.site import Site
from kwflow.console.sources import Code, Placed, Sources, placed
from kwflow.console.words import json_text
from kwflow.core import snapshot
from kwflow.core.picture import Node, Picture, picture_of
from kwflow.core.wire import Record
from kwflow.errors import KwflowError, SnapshotError, UsageError
from kwflow.runners import outside
from kwflow.runners.instances import Filter, Found, described

__all__ = ["ROWS", "Drawn", "Instance", "Listing", "checkpoint_number", "instance", "listed"]

ROWS = 200
_PAGES_MAX = 25
_HELD_MAX = 10  # records shown behind the one at fault
_VALUE_MAX = 20_000  # characters of a value shown as JSON
_OPS = {
    "waiting": ("cancel", "pause", "migrate", "terminate"), "closing": ("cancel", "pause", "migrate", "terminate"), "paused": ("unpause", "cancel", "migrate", "terminate"),
    "parked": ("retry", "migrate", "discard", "terminate"), "damaged": ("terminate",),
}  # fmt: skip


class Listing(msgspec.Struct, frozen=True):
    """One page of rows; `source` says where they come from, and `note` why not from the engines."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    number: int
    more: int
    source: str
    note: str
    took_ms: float


class Drawn(msgspec.Struct, frozen=True):
    """A node of the picture, prepared for a page; `wait` is the header's entry for a wait."""

    node: Node
    placed: Placed | None
    wait: dict[str, Any]
    value: str


class Instance(msgspec.Struct, frozen=True):
    """One instance, or the checkpoint `at` of it; `checkpoints` are the numbers of its first checkpoint and of the present state.

    `header` is empty if its bytes cannot be read, and `trouble` says why; `untold` says why its variables are not shown.
    """

    id: str
    header: dict[str, Any]
    status: str
    trouble: str
    untold: str
    size: int
    nodes: list[Drawn]
    whole: bool
    held_frames: list[Placed]
    codes: list[Code]
    status_value: str
    outcome: str
    holds: int
    fault: Record | None
    behind: list[Record]
    ops: tuple[str, ...]
    at: int | None
    checkpoints: tuple[int, int]
    took_ms: float


def listed(site: Site, wanted: Filter, number: int) -> Listing:
    """Page `number` of the selected instances.  Raises UsageError, TransportError."""
    if not 1 <= number <= _PAGES_MAX:
        raise UsageError(f"a list has {_PAGES_MAX} pages of {ROWS}; filter it, or get all with {site.command('list', None, '--json')}")
    notes: list[str] = []
    began = time.perf_counter()
    found: Found = outside.instances(site.config, site.embedded, wanted, ROWS * number, notes.append)
    source = str(site.embedded) if site.embedded is not None else "the changelog" if notes else "the engines"
    more = min(found.total, ROWS * _PAGES_MAX) - ROWS * number
    return Listing(found.rows[ROWS * (number - 1) :], found.counts, number, max(more, 0), source, "; ".join(notes), (time.perf_counter() - began) * 1000)


def checkpoint_number(text: str) -> int:
    """The number of a checkpoint in a query or form.  Raises UsageError."""
    if not text.isdecimal() or len(text) > 15:
        raise UsageError(f"at must be the number of a checkpoint, not {text!r}")
    return int(text)


def instance(site: Site, sources: Sources, id: str, at: int | None = None) -> Instance | None:
    """Everything that is known of an instance, or of its checkpoint `at`; None if there is none.  Raises TransportError."""
    began = time.perf_counter()
    entry = outside.entry(site.config, site.embedded, id, _HELD_MAX + 1, at) if not id.startswith("\0") else None
    if entry is None:
        return None
    keys, header, trouble, untold = site.config.signing_keys, dict[str, Any](), "", ""
    picture: Picture | None = None
    codes: dict[str, Code] = {}
    try:
        header = described(entry.data, keys)
        codes = sources.of(snapshot.read_header(entry.data))
        body = snapshot.split(entry.data, keys)[1]  # if there are keys, variables are shown only of verified bytes
        picture = picture_of(body) if body and header.get("parked", {}).get("was") != "damaged" else None
    except SnapshotError as error:
        trouble, untold = ("", str(error)) if header else (str(error), "")
    waits = {wait["ref"]: wait for wait in header.get("waits", ())}
    for ref, given in header.get("heartbeats", {}).items():
        if ref in waits:
            waits[ref]["heartbeat"] = {"at": given["at"], "details": _text(json_text, given["details"])}
    nodes, held = _drawn(picture, codes, waits) if picture is not None else ([], [])
    outcome = header.get("outcome") or {}
    status = header["status"] if header else "damaged"
    return Instance(
        id, header, status, trouble, untold, len(entry.data), nodes, picture.whole if picture else True, held,
        list(codes.values()), _text(json_text, header["status_value"]) if "status_value" in header else "", _text(_json_of, outcome.get("value")) if outcome else "",
        entry.holds, entry.held[0] if entry.held and status == "parked" else None, entry.held[1:] if status == "parked" else entry.held, _OPS.get(status, ()) if at is None else ("fork", "rewind"),
        at, entry.checkpoints, (time.perf_counter() - began) * 1000,
    )  # fmt: skip


def _drawn(picture: Picture, codes: dict[str, Code], waits: dict[str, dict[str, Any]]) -> tuple[list[Drawn], list[Placed]]:
    frames = sum(node.frame is not None for node in picture.nodes) + len(picture.held)

    def drawn(node: Node) -> Drawn:
        wait = waits.get(node.ref, {}) if node.kind != "task" else {}
        return Drawn(node, placed(node.frame, codes, picture.shown, frames) if node.frame is not None else None, wait, _value(node, picture))

    return list(map(drawn, picture.nodes)), [placed(frame, codes, picture.shown, frames) for frame in picture.held]


def _value(node: Node, picture: Picture) -> str:
    return picture.shown.text(node.value, 500) if node.kind != "frame" and node.state != "pending" else ""


def _json_of(text: str | None) -> str:
    """An outcome's value, formatted; it is JSON text, or None if it was too large for the entry."""
    return "(it is too large to show here; use kwflow result)" if text is None else msgspec.json.format(text, indent=2)


def _text(call: Callable[[Any], str], value: Any) -> str:
    try:
        made = call(value)
    except (KwflowError, msgspec.MsgspecError, RecursionError, ValueError):
        made = str(value)
    return made if len(made) <= _VALUE_MAX else f"{made[:_VALUE_MAX]}… ({len(made):,} characters)"
