"""An instance as bytes: a readable header, the pickled graph, a checksum (wire.md §3).

`KWF1`, u32 header length, header JSON, body, SHA-256 of all before it, or HMAC-SHA-256 where there are keys (the header's
`key` says which).  The header is read without loading code or unpickling; a body is unpickled only after the seal and the
code it needs have been checked.  Of several keys the first one signs, all are accepted.
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

from kwflow.core.children import Child
from kwflow.core.instance import Instance
from kwflow.core.mailbox import SignalWait, UpdateWait
from kwflow.core.tasks import ActivityWait, All, Awaitable, JobWait, Race, Shield, Suspension, Task, Timeout, Timer
from kwflow.durable import codec, frames, registry, versions
from kwflow.durable.lower import LOWERING_VERSION
from kwflow.durable.rebuild import MINOR
from kwflow.durable.versions import Sources, no_sources
from kwflow.errors import CorruptSnapshotError, SnapshotError

__all__ = ["CLASSES", "UNSIGNED", "Keys", "amend", "copy", "ended_header", "is_call", "key_id", "load", "park", "read_header", "save", "save_ended", "seal_of", "split", "unpark", "waits_of", "wake"]

Keys = Sequence[bytes]
UNSIGNED = b""  # among the keys, last: what nobody signed is taken too; it signs nothing

_MAGIC = b"KWF1"
_CHECKSUM_BYTES = 32
_ATTEMPTS = "kwflow.flows.attempts1", "attempts"
_CALLS = (_ATTEMPTS, ("kwflow.flows.rest1", "call"))
_VERSION = 1
_KNOWN = {"v", "id", "workflow", "status", "start_id", "applied", "created", "updated", "code", "lowering", "waits", "parked", "key", "minor"}

CLASSES: tuple[type[Awaitable], ...] = (Awaitable, Task, Suspension, Timer, All, Race, Timeout, Shield, SignalWait, UpdateWait, ActivityWait, Child, JobWait)  # the order is part of the format
for _tag, _class in enumerate(CLASSES):
    codec.register_class(_tag, _class)


def save(instance: Instance, keys: Keys = ()) -> tuple[bytes, list[registry.Module]]:
    """The instance as it waits now, and the versions of modules that the snapshot names.  Raises UnsavableError naming what cannot be saved (G4)."""
    body, held, minor = codec.dumps_with_code(instance.graph(), instance.pins)
    code, modules = {}, []
    for reference in sorted(held):
        module, units = held[reference]
        if module.name == "__main__":
            raise SnapshotError("code of __main__ cannot be found again by another process; put the workflow into a module of its own")
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
    """The header's entry of every pending wait, or of the first ones."""
    waits = instance.waits.values()
    return [_wait(wait) for wait in (waits if most is None else itertools.islice(waits, most))]


def _wait(wait: Suspension) -> dict[str, Any]:
    """Where the task that waits for it is: function, file (relative to the module's root) and line."""
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
    else:  # too far up to be looked for at every save
        return described
    gen = waiters[0].gen
    if gen is not None:
        known = registry.function_of(gen.gi_code)
        described["function"], filename, described["line"] = frames.where(gen)
        described["file"] = _relative(filename, known.module if known is not None else "")
    return described


def _retried(task: Task) -> dict[str, Any]:
    """Which activity a timer is the pause of, and the attempt that comes after it, if it is one: the loop of attempts is code of ours, and the timer of an attempt's own is in a Timeout."""
    known = registry.function_of(task.gen.gi_code) if task.gen is not None else None
    if task.gen is None or known is None or (known.module, known.path) != _ATTEMPTS:
        return {}
    [paused] = frames.describe(task.gen)
    return {"name": paused.locals["name"], "attempt": paused.locals["number"] + 1}


def is_call(task: Task) -> bool:
    """Whether it is the call of an activity, with its attempts and the pauses between them, or a `rest.call`."""
    known = registry.function_of(task.gen.gi_code) if task.gen is not None else None
    return known is not None and (known.module, known.path) in _CALLS


def failed_at(error: BaseException) -> dict[str, Any]:
    """The innermost frame that an error came through in a durable module of the author's, as a wait's header says it; empty if there is none."""
    found: dict[str, Any] = {}
    tb = error.__traceback__
    while tb is not None:
        code, module = tb.tb_frame.f_code, str(tb.tb_frame.f_globals.get("__name__", ""))
        if registry.is_durable(module) and not module.startswith("kwflow."):
            found = {"function": code.co_qualname, "file": _relative(code.co_filename, registry.logical_name(module)), "line": tb.tb_lineno}
        tb = tb.tb_next
    return found


@functools.lru_cache(maxsize=4096)
def _relative(filename: str, module: str) -> str:
    """From the folder on that the module's name begins in."""
    return "/".join(filename.split("/")[-(module.count(".") + 1) :])


def _is_ours(task: Task) -> bool:
    """Whether it runs code of kwflow.flows; who waits for it tells an author more."""
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
    """A key's public name in headers: 8 hex digits that do not give it away."""
    return hashlib.sha256(b"kwflow snapshot key\0" + key).hexdigest()[:8]


def seal_of(data: bytes, keys: Keys = ()) -> str:
    """For people: `unsigned`, `verified`, `not verified: …` or `forged`.  Raises SnapshotError for damaged bytes."""
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
    """Header and body, checked but nothing unpickled; with keys only what one of them signed.  Raises SnapshotError."""
    header, body = _split(data)
    name = header.get("key")
    if name is None and (not keys or UNSIGNED in keys):
        return header, body
    if name is None:
        raise CorruptSnapshotError('the snapshot is not signed, and snapshot_keys are set; it is not loaded (snapshot_unsigned = "accept" takes those from before there were keys)')
    for key in keys:
        if key != UNSIGNED and key_id(key) == name and _signed(data, key):
            return header, body
    raise CorruptSnapshotError(f"the snapshot says that key {name} signed it, which no key of snapshot_keys did; it is not loaded")


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < 8 + _CHECKSUM_BYTES or not data.startswith(b"KWF"):
        raise CorruptSnapshotError("these bytes are no snapshot")
    if data[:4] != _MAGIC:
        raise SnapshotError(f"snapshot format {data[:4]!r} is unknown to this version of kwflow")
    (length,) = struct.unpack(">I", data[4:8])
    try:
        header = msgspec.json.decode(data[8 : 8 + length])
        if not isinstance(header, dict) or not isinstance(header.get("status"), str):
            raise TypeError("no status")
    except (msgspec.DecodeError, RecursionError, TypeError, ValueError) as error:
        raise CorruptSnapshotError(f"the header of a snapshot cannot be read: {error}") from None
    if "key" not in header and hashlib.sha256(memoryview(data)[:-_CHECKSUM_BYTES]).digest() != data[-_CHECKSUM_BYTES:]:
        raise CorruptSnapshotError("the checksum of a snapshot does not match: its bytes are damaged")
    if header.get("v") != _VERSION:
        raise SnapshotError(f"snapshot version {header.get('v')!r} is unknown to this version of kwflow")
    return header, data[8 + length : -_CHECKSUM_BYTES]


def read_header(data: bytes) -> dict[str, Any]:
    """The header for showing it: no author code is loaded, nothing unpickled, no key needed (`seal_of` says what it is worth).  Raises SnapshotError."""
    return _split(data)[0]


def read_inner_header(data: bytes) -> dict[str, Any]:
    """The same of what was parked unread, as its key or its format is not known here; of any other, its own.  Raises SnapshotError."""
    header, body = _split(data)
    return read_header(body) if header.get("parked", {}).get("was") == "damaged" else header


def load(data: bytes, sources: Sources = no_sources, keys: Keys = ()) -> Instance:
    """The instance, waiting where it was, on the code it waits in.  Raises CodeChangedError when that is neither here nor stored, CorruptSnapshotError."""
    return wake(*split(data, keys), sources)


def wake(header: dict[str, Any], body: bytes, sources: Sources = no_sources) -> Instance:
    """`load` for what `split` gave."""
    if header.get("minor", MINOR) != MINOR:
        raise SnapshotError(f"it holds a class as code of Python {header['minor']} (snapshot_cloudpickle); this is {MINOR}: run it there, then retry")
    try:
        instance = Instance(header["id"], header["workflow"], header["start_id"], header["created"])
        instance.status = header["status"]
        applied = header.get("applied")
        instance.applied = (applied[0], applied[1], applied[2]) if applied else None
        instance.updated_ms = header["updated"]
        instance.extra = {name: value for name, value in header.items() if name not in _KNOWN}
        graph, instance.pins = versions.loads(body, header.get("code", {}), sources, header.get("lowering", LOWERING_VERSION))
        instance.set_graph(graph)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptSnapshotError(f"the header or body of a snapshot is not an instance: {error!r}") from error
    return instance


def park(stored: bytes | None, base: dict[str, Any], reason: str, message: str, offset: int, keys: Keys = ()) -> bytes:
    """The same state, marked: its records are held until somebody retries.  `base` is the header of one never stored."""
    header, body = dict(base), b""
    if stored is not None:
        try:
            header, body = split(stored, keys)
        except SnapshotError:
            return _encode({**base, "v": _VERSION, "status": "parked", "parked": {"reason": reason, "message": message, "offset": offset, "was": "damaged"}}, stored, keys)
    was = header.get("parked", {}).get("was") if header.get("status") == "parked" else header.get("status")
    parked = {"reason": reason, "message": message, "offset": offset, "was": was}
    return _encode({**header, "v": _VERSION, "status": "parked", "parked": parked}, body, keys)


def unpark(stored: bytes, keys: Keys = ()) -> bytes | None:
    """What was stored before it was parked; None for a start that never was."""
    header, body = split(stored, keys)
    was = header.pop("parked", {}).get("was")
    if was == "damaged":
        return body
    return _encode({**header, "status": was}, body, keys) if body or was == "ended" else None


def amend(stored: bytes, keys: Keys = (), **fields: Any) -> bytes:
    """The same state with other entries in its header.  Raises SnapshotError."""
    header, body = split(stored, keys)
    return _encode({**header, **fields}, body, keys)


def copy(body: bytes, header: dict[str, Any], keys: Keys = ()) -> bytes:
    """A snapshot of this body, from another one, under a header of its own."""
    return _encode(dict(header), body, keys)


def ended_header(instance: Instance) -> dict[str, Any]:
    """What the entry that stays after the end holds (K20)."""
    own = {"id": instance.id, "workflow": instance.workflow, "start_id": instance.start_id, "applied": instance.applied, "ended": instance.updated_ms}
    return {**own, **{name: value for name, value in instance.extra.items() if name != "mailbox"}}


def save_ended(header: dict[str, Any], keys: Keys = ()) -> bytes:
    return _encode({**header, "v": _VERSION, "status": "ended", "waits": []}, b"", keys)
