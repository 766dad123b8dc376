"""Earlier states of an instance, for those who look back or go back to them (decision 0062).

A workflow that asks for checkpoints is saved after each record, and each state that a newer one replaces stays for a while, as an
entry `\\0checkpoint\\0<id>\\0<number>` of the same partition: the snapshot as it was, with the activity calls that it waits for in
its header, since their own entries go once they are answered (calls in queues are in the header from the beginning).  The header
of the current state says which checkpoints there are; their numbers go on from one run of an id to the next.  Whatever replaces an
entry that says so has to go on from it, or to drop them: nobody else would ever remove them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import CHECKPOINTS_MAX
from kwflow.core.dispatch import Dispatch
from kwflow.core.snapshot import Keys
from kwflow.errors import CorruptSnapshotError, SnapshotError
from kwflow.ports import Changes

__all__ = ["CHECKPOINT", "Checkpoints", "Extent", "calls_of", "checked", "drop", "entry_key", "extent", "found", "number_of", "of_checkpoint", "prefix_of"]

CHECKPOINT = b"\0checkpoint\0"
_Calls = Callable[[str, Sequence[str]], dict[str, Dispatch | None]]  # (id, refs) -> the calls behind these waits
Extent = tuple[int, int]  # the number of the first checkpoint, and that of the current state, which is one more than that of the last one


class Checkpoints:
    """Keeps the states that are replaced, of the workflows among these functions that ask for it."""

    def __init__(self, config: Config, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._limits: dict[str, int] = {name: getattr(function, "kwflow_checkpoints", 0) for name, function in functions.items()}
        self.workflows = frozenset(name for name, most in self._limits.items() if most)
        self._keys, self._bytes_max = config.signing_keys, config.snapshot_bytes_max

    def of(self, workflow: str, header: dict[str, Any]) -> bool:
        """Whether the workflow has checkpoints, or had some that are to be dropped."""
        return workflow in self.workflows or "checkpoints" in header

    def advance(self, workflow: str, header: dict[str, Any], replaces: bool, waits: Collection[str]) -> tuple[Extent, Extent]:
        """Note in the header of a new state which checkpoints there are from now on; return which there were, and which there are.

        `replaces` tells whether there is a state that it replaces, and `waits` for which refs it waits: calls in queues for any other one are dropped.
        A workflow that no function is registered for has as many as it had.
        """
        first, current = before = extent(header)
        limit = self._limits.get(workflow, max(1, current - first))
        calls = [call for call in header.pop("calls", ()) if call["ref"] in waits and limit]
        if calls:
            header["calls"] = calls
        number = current + replaces
        after = (max(first, number - limit), number) if limit else (current, current)
        header.pop("checkpoints", None)
        if limit:
            header["checkpoints"] = list(after)
        return before, after

    def keep(self, state: Changes, key: bytes, replaced: bytes | None, change: tuple[Extent, Extent], calls: _Calls) -> int:
        """Keep the state that is replaced, and drop what is too old then; return the bytes that this adds.

        A state that is too large with its calls leaves a gap.  Raises SnapshotError.
        """
        (first, current), after = change
        drop(state, key, (first, after[0]))
        if replaced is None or after[1] == current:
            return 0
        data = _with_calls(replaced, key.decode(), calls, self._keys)
        if len(data) > self._bytes_max:
            return 0
        state.put(entry_key(key, current), data)
        return len(data)

    def last_state(self, stored: bytes | None) -> bytes | None:
        """Return the state to keep of an instance that ends or is replaced: as it was before it was parked, if it is; None if there is none that can be read."""
        try:
            if stored is not None and snapshot.split(stored, self._keys)[0]["status"] == "parked":
                stored = snapshot.unpark(stored, self._keys)
            return None if stored is None or snapshot.split(stored, self._keys)[0]["status"] == "ended" else stored
        except SnapshotError:
            return None


def prefix_of(key: bytes) -> bytes:
    """The beginning of the keys of all checkpoints of the instance with this record key."""
    return CHECKPOINT + key + b"\0"


def entry_key(key: bytes, number: int) -> bytes:
    return prefix_of(key) + b"%020d" % number


def of_checkpoint(key: bytes) -> bytes | None:
    """Return the record key of the instance whose checkpoint this entry is; None if it is no checkpoint."""
    return key[len(CHECKPOINT) :].rpartition(b"\0")[0] if key.startswith(CHECKPOINT) else None


def number_of(key: bytes) -> int:
    return int(key.rpartition(b"\0")[2])


def extent(header: dict[str, Any]) -> Extent:
    """Return which checkpoints there are, by the header of the current state."""
    first, current = header.get("checkpoints", (0, 0))
    return first, current


def found(state: Changes, key: bytes) -> dict[str, list[int]]:
    """Return what a header that can be read would say, by the entries that there are."""
    numbers = [number_of(entry) for entry, _ in state.scan(prefix_of(key))]
    return {"checkpoints": [max(numbers[0], numbers[-1] + 1 - CHECKPOINTS_MAX), numbers[-1] + 1]} if numbers else {}


def checked(header: dict[str, Any], key: bytes) -> dict[str, Any]:
    """Return the header of a state that a command is to continue from.  Raises CorruptSnapshotError if it is that of another instance."""
    if header.get("id") != key.decode():
        raise CorruptSnapshotError(f"this is a state of {header.get('id')!r}, but it is stored under {key.decode()}")
    return header


def drop(state: Changes, key: bytes, numbers: Extent) -> None:
    for number in range(*numbers):
        state.put(entry_key(key, number), None)


def _with_calls(stored: bytes, name: str, calls: _Calls, keys: Keys) -> bytes:
    header = snapshot.split(stored, keys)[0]
    refs = [wait["ref"] for wait in header["waits"] if wait["kind"] == "activity"]
    if not refs:
        return stored
    made = [msgspec.to_builtins(call) for call in calls(name, refs).values() if call is not None]
    return snapshot.amend(stored, keys, calls=[*header.get("calls", ()), *made])


def calls_of(header: dict[str, Any]) -> dict[str, Dispatch]:
    """Return the calls that the header has, by ref: those in queues, and in a checkpoint those of all activities.  Raises SnapshotError."""
    try:
        return {call.ref: call for call in msgspec.convert(header.get("calls", []), list[Dispatch])}
    except (msgspec.ValidationError, RecursionError) as error:
        raise SnapshotError(f"the header of a snapshot is invalid: {error}") from None
