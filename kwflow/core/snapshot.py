"""An instance as bytes: a readable header, the pickled graph, a checksum (wire.md §3).

The format is `KWF1`, u32 header length, header JSON, body, and the SHA-256 of everything before it, or an HMAC-SHA-256 if
there are keys (the header's `key` says which one).  The header is read without loading code or unpickling.  A body is
unpickled only after the seal and the code that it needs have been checked.  The first of several keys signs; all are accepted.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from kwflow.core import header as headers
from kwflow.core.children import Child
from kwflow.core.instance import Instance
from kwflow.core.mail import Mail, Mailbox, SignalWait, UpdateWait
from kwflow.core.mailbox import Inbox, Update
from kwflow.core.tasks import ActivityWait, All, Awaitable, JobWait, Race, Shield, Suspension, Task, Timeout, Timer
from kwflow.durable import codec, frames, registry, versions
from kwflow.durable.lower import LOWERING_VERSION
from kwflow.durable.moves import MovingNames
from kwflow.durable.rebuild import MINOR
from kwflow.durable.versions import Sources, no_sources
from kwflow.errors import CorruptSnapshotError, SnapshotError

__all__ = [
    "CLASSES", "NAMED", "UNSIGNED", "Keys", "amend", "changed", "copy", "ended_header", "is_call", "key_id", "load", "move", "park", "place_of", "read_header", "save", "save_ended", "seal_of",
    "split", "unpark", "waits_of", "wake",
]  # fmt: skip

Keys = Sequence[bytes]
UNSIGNED = b""  # the last of the keys, if present: unsigned snapshots are accepted too; it signs nothing

_MAGIC = b"KWF1"
_CHECKSUM_BYTES = 32
_ATTEMPTS = (("kwflow.flows.attempts1", "attempts"), ("kwflow.flows.attempts2", "attempts"))
_CALLS = (*_ATTEMPTS, ("kwflow.flows.rest1", "call"))
_VERSION = 1
_KNOWN = {"v", "id", "workflow", "status", "start_id", "applied", "created", "updated", "code", "lowering", "waits", "parked", "key", "minor"}

CLASSES: tuple[type[Awaitable], ...] = (Awaitable, Task, Suspension, Timer, All, Race, Timeout, Shield, SignalWait, UpdateWait, ActivityWait, Child, JobWait)  # the order is part of the format
NAMED = (Inbox, Mail, Mailbox, Update)  # snapshots hold these by the name of mailbox.py, which is therefore loaded here
for _tag, _class in enumerate(CLASSES):
    codec.register_class(_tag, _class)


def save(instance: Instance, keys: Keys = ()) -> tuple[bytes, list[registry.Module]]:
    """Return the instance as bytes, as it waits now, and the module versions that the snapshot refers to.

    Raises UnsavableError that names what cannot be saved (G4).
    """
    body, held, minor = codec.dumps_with_code(instance.graph(), instance.pins)
    code, modules = {}, []
    for reference in sorted(held):
        module, units = held[reference]
        if module.name == "__main__":
            raise SnapshotError("another process cannot find code of __main__; put the workflow into a module of its own")
        code[reference] = {"version": module.version, "units": {name: units[name] for name in sorted(units)}}
        modules.append(module)
    header = {
        "v": _VERSION,
        "id": instance.id,
        "workflow": instance.workflow,
        "status": instance.status,
        "start_id": instance.start_id,
        "applied": instance.applied,
        "created": instance.created_ms,
        "updated": instance.updated_ms,
        "code": code,
        "lowering": LOWERING_VERSION,
        "waits": waits_of(instance),
    }
    if minor:
        header["minor"] = minor
    return _encode(header | instance.extra if instance.extra else header, body, keys), modules


def waits_of(instance: Instance, most: int | None = None) -> list[dict[str, Any]]:
    """Return the header's entries for all pending waits, or for the first `most` ones."""
    waits = instance.waits.values()
    return [_wait(wait) for wait in (waits if most is None else itertools.islice(waits, most))]


def _wait(wait: Suspension) -> dict[str, Any]:
    """Describe a wait and where the task that waits for it stands: function, file (relative to the module's root) and line."""
    described: dict[str, Any] = {"ref": wait.ref, "kind": wait.kind, "since": wait.since_ms}
    described |= wait.described()
    waiters: list[Any] = wait.waiters
    if wait.kind == "timer" and waiters and isinstance(waiters[0], Task):
        described |= _retried(waiters[0])
    for _ in range(1000):
        if not waiters:
            return described
        if isinstance(waiters[0], Task) and (not waiters[0].waiters or not _is_ours(waiters[0])):
            break
        waiters = waiters[0].waiters
    else:  # too many levels up to search at every save
        return described
    gen = waiters[0].gen
    if gen is not None:
        known = registry.function_of(gen.gi_code)
        described["function"], filename, described["line"] = frames.where(gen)
        described["file"] = _relative(filename, known.module if known is not None else "")
    return described


def _retried(task: Task) -> dict[str, Any]:
    """Return the activity and the next attempt, if this task's timer is the pause between two attempts.

    Our own loop of attempts waits for such a pause directly; the timer of an attempt's time-out is inside a Timeout.
    """
    known = registry.function_of(task.gen.gi_code) if task.gen is not None else None
    if task.gen is None or known is None or (known.module, known.path) not in _ATTEMPTS:
        return {}
    [paused] = frames.describe(task.gen)
    return {"name": paused.locals["name"], "attempt": paused.locals["number"] + 1}


def is_call(task: Task) -> bool:
    """Whether the task is the call of an activity, with its attempts and the pauses between them, or a `rest.call`."""
    known = registry.function_of(task.gen.gi_code) if task.gen is not None else None
    return known is not None and (known.module, known.path) in _CALLS


def failed_at(error: BaseException) -> dict[str, Any]:
    """Return the innermost frame of the author's durable modules that an error came through, in the form of a wait's header; empty if there is none."""
    found: dict[str, Any] = {}
    tb = error.__traceback__
    while tb is not None:
        code, module = tb.tb_frame.f_code, str(tb.tb_frame.f_globals.get("__name__", ""))
        if registry.is_durable(module) and not module.startswith("kwflow."):
            found = {"function": code.co_qualname, "file": _relative(code.co_filename, registry.logical_name(module)), "line": tb.tb_lineno}
        tb = tb.tb_next
    return found


def place_of(at: dict[str, Any]) -> str:
    """Return what `failed_at` found as text to follow a name: ` in main (trips.py:12)`, or nothing."""
    return f" in {at['function']} ({at['file']}:{at['line']})" if at else ""


@functools.lru_cache(maxsize=4096)
def _relative(filename: str, module: str) -> str:
    """Return the file name relative to the folder that contains the module's top-level package."""
    return "/".join(filename.split("/")[-(module.count(".") + 1) :])


def _is_ours(task: Task) -> bool:
    """Whether the task runs code of kwflow.flows; whoever waits for it tells an author more."""
    known = registry.function_of(task.gen.gi_code) if task.gen is not None else None
    return known is not None and known.module.startswith("kwflow.")


def _encode(header: dict[str, Any], body: bytes, keys: Keys) -> bytes:
    header.pop("key", None)
    if keys:
        header["key"] = key_id(keys[0])
    encoded = msgspec.json.encode(header)
    data = _MAGIC + struct.pack(">I", len(encoded)) + encoded + body
    return data + (hmac.digest(keys[0], data, "sha256") if keys else hashlib.sha256(data).digest())


@functools.lru_cache(maxsize=64)
def key_id(key: bytes) -> str:
    """Return the public name of a key in headers: 8 hex digits that do not reveal it."""
    return hashlib.sha256(b"kwflow snapshot key\0" + key).hexdigest()[:8]


def seal_of(data: bytes, keys: Keys = ()) -> str:
    """Describe the seal for people: `unsigned`, `verified …`, `not verified: …` or `forged: …`.  Raises SnapshotError for damaged bytes."""
    name = _split(data)[0].get("key")
    if name is None:
        return "unsigned"
    known = [key for key in keys if key != UNSIGNED and key_id(key) == name]
    if not known:
        return f"not verified: signed with key {name}, which is not in snapshot_keys"
    return f"verified with key {name}" if _signed(data, known[0]) else f"forged: key {name} did not sign this"


def _signed(data: bytes, key: bytes) -> bool:
    return hmac.compare_digest(hmac.digest(key, memoryview(data)[:-_CHECKSUM_BYTES], "sha256"), data[-_CHECKSUM_BYTES:])


def split(data: bytes, keys: Keys = ()) -> tuple[dict[str, Any], bytes]:
    """Return header and body, checked but not unpickled.  With keys, only what one of them signed is accepted (see UNSIGNED).  Raises SnapshotError.

    1. One engine has keys, and another has none yet: it parks what the first has signed, around which it puts a header that it cannot sign.
    2. When it has the keys, too, nobody could take that header off again.
    3. So of such a header only what parked it is taken.  The body is checked by itself when it is loaded.
    """
    header, body = _split(data)
    name = header.get("key")
    if name is None and keys and (unread := _unread(header)) is not None:
        return unread, body
    if name is None and (not keys or UNSIGNED in keys):
        return header, body
    if name is None:
        raise CorruptSnapshotError('the snapshot is not signed, and snapshot_keys are set; it is not loaded (snapshot_unsigned = "accept" accepts those from before there were keys)')
    for key in keys:
        if key != UNSIGNED and key_id(key) == name and _signed(data, key):
            return header, body
    raise CorruptSnapshotError(f"the snapshot claims to be signed by key {name}, but no key of snapshot_keys signed it; it is not loaded")


def _unread(header: dict[str, Any]) -> dict[str, Any] | None:
    """What may be believed of an unsigned header around bytes that were parked unread: nothing that would be sent to anybody; None for any other header."""
    if header["status"] != "parked" or header["parked"].get("was") != "damaged":
        return None
    parked = {**header["parked"], "offset": -1}
    return {"v": _VERSION, "status": "parked", "waits": [], "parked": parked} | {entry: header.get(entry, "") for entry in ("id", "workflow", "start_id")}


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < 8 + _CHECKSUM_BYTES or not data.startswith(b"KWF"):
        raise CorruptSnapshotError("these bytes are not a snapshot")
    if data[:4] != _MAGIC:
        raise SnapshotError(f"snapshot format {data[:4]!r} is unknown to this version of kwflow")
    (length,) = struct.unpack(">I", data[4:8])
    try:
        header = msgspec.json.decode(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise TypeError("no object")
    except (msgspec.DecodeError, RecursionError, TypeError, ValueError) as error:
        raise CorruptSnapshotError(f"the header of a snapshot cannot be read: {error}") from None
    if "key" not in header and hashlib.sha256(memoryview(data)[:-_CHECKSUM_BYTES]).digest() != data[-_CHECKSUM_BYTES:]:
        raise CorruptSnapshotError("the checksum of a snapshot does not match: its bytes are damaged")
    if header.get("v") != _VERSION:
        raise SnapshotError(f"snapshot version {header.get('v')!r} is unknown to this version of kwflow")
    return headers.check(header), data[8 + length : -_CHECKSUM_BYTES]


def read_header(data: bytes) -> dict[str, Any]:
    """Return the header for display: no author code is loaded, nothing unpickled, no key needed (`seal_of` tells what it is worth).  Raises SnapshotError."""
    return _split(data)[0]


def read_inner_header(data: bytes) -> dict[str, Any]:
    """Return the inner header of a snapshot that was parked unread because its key or format was unknown; of any other, its own.  Raises SnapshotError."""
    header, body = _split(data)
    return read_header(body) if header.get("parked", {}).get("was") == "damaged" else header


def load(data: bytes, sources: Sources = no_sources, keys: Keys = ()) -> Instance:
    """Return the instance, waiting where it was, on the code that it waits in.

    Raises CodeChangedError if that code is neither loaded nor stored, CorruptSnapshotError.
    """
    return wake(*split(data, keys), sources)


def move(data: bytes, sources: Sources, keys: Keys = ()) -> tuple[bytes, list[registry.Module], list[str]] | None:
    """Return the same state, parked or not, waiting in the current code, what `save` returns beside it, and `MovingNames.frames`; None if no code that it holds has changed.

    Raises SnapshotError if it is not certain what it would be, and for a start that has failed, which has no state.
    """
    header, body = split(data, keys)
    parked = header.get("parked")
    if parked is not None and parked["was"] == "damaged":
        raise SnapshotError("it was parked unread, so it is not known what it holds; retry it first")
    if not body:
        raise SnapshotError("it has no state that could be moved; once it is retried, what begins takes the current code")
    moving = versions.moving(header.get("code", {}), sources)
    if not moving.old:
        return None
    instance = wake(header if parked is None else {**header, "status": parked["was"]}, body, sources, moving)
    try:
        made, modules = save(instance, keys)
    finally:
        instance.forget()
    return made if parked is None else amend(made, keys, status="parked", parked=parked), modules, moving.frames


def wake(header: dict[str, Any], body: bytes, sources: Sources = no_sources, moving: MovingNames | None = None) -> Instance:
    """Do what `load` does, for the header and body that `split` returned; `moving` is given to `versions.loads`."""
    if header.get("minor", MINOR) != MINOR:
        raise SnapshotError(f"it holds a class as code of Python {header['minor']} (snapshot_cloudpickle); this is {MINOR}: run it there, then retry")
    try:
        instance = Instance(header["id"], header["workflow"], header["start_id"], header["created"])
        instance.status = header["status"]
        applied = header.get("applied")
        instance.applied = (applied[0], applied[1], applied[2]) if applied else None
        instance.updated_ms = header["updated"]
        instance.extra = {name: value for name, value in header.items() if name not in _KNOWN}
        graph, instance.pins = versions.loads(body, header.get("code", {}), sources, header.get("lowering", LOWERING_VERSION), moving)
        instance.set_graph(graph)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptSnapshotError(f"the header or body of a snapshot is not an instance: {error!r}") from error
    return instance


def park(stored: bytes | None, base: dict[str, Any], reason: str, message: str, offset: int, keys: Keys = (), at_ms: int = 0) -> bytes:
    """Return the same state, marked as parked at this time: its records are held until somebody retries.  `base` is the header if nothing was stored before."""
    header, body = dict(base), b""
    if stored is not None:
        try:
            header, body = split(stored, keys)
        except SnapshotError:
            return _encode({**base, "v": _VERSION, "status": "parked", "parked": {"reason": reason, "message": message, "offset": offset, "was": "damaged"}}, stored, keys)
    was = header.get("parked", {}).get("was") if header.get("status") == "parked" else header.get("status")
    parked = {"reason": reason, "message": message, "offset": offset, "was": was}
    return _encode({**header, **changed(header, at_ms), "v": _VERSION, "status": "parked", "parked": parked}, body, keys)


def changed(header: dict[str, Any], at_ms: int) -> dict[str, int]:
    """Return the entry for a change at this time, which may be that of a record that was held for long; nothing if the header is of no instance."""
    return {"updated": max(header["updated"], at_ms)} if "updated" in header else {}


def unpark(stored: bytes, keys: Keys = ()) -> bytes | None:
    """Return what was stored before it was parked; None if that was nothing, because its start failed."""
    header, body = split(stored, keys)
    was = header.pop("parked", {}).get("was")
    if was == "damaged":
        return body
    return _encode({**header, "status": was}, body, keys) if body or was == "ended" else None


def amend(stored: bytes, keys: Keys = (), **fields: Any) -> bytes:
    """Return the same state with these entries in its header.  Raises SnapshotError."""
    header, body = split(stored, keys)
    return _encode({**header, **fields}, body, keys)


def copy(body: bytes, header: dict[str, Any], keys: Keys = ()) -> bytes:
    """Return a snapshot with the body of another one under a header of its own."""
    return _encode(dict(header), body, keys)


def ended_header(instance: Instance) -> dict[str, Any]:
    """Return the content of the entry that stays after the end (K20)."""
    own = {"id": instance.id, "workflow": instance.workflow, "start_id": instance.start_id, "applied": instance.applied, "ended": instance.updated_ms}
    return {**own, **{name: value for name, value in instance.extra.items() if name not in ("heartbeats", "mailbox")}}


def save_ended(header: dict[str, Any], keys: Keys = ()) -> bytes:
    return _encode({**header, "v": _VERSION, "status": "ended", "waits": []}, b"", keys)
