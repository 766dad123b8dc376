"""Work that a step hands out and a runner starts after the commit (M6): what it is, and the entry that keeps it meanwhile.

The entry lies beside the state of its partition under `\\0dispatch\\0<offset>\\0<n>\\0<workflow id>`, so that an engine finds what
is to be done without unpickling an instance, oldest first, and needs no memory for what waits.  Calls that go to the
workers of a queue are records (`queues.py`); a worker keeps what it has read of them in the same form.
"""

from __future__ import annotations

import msgspec

from kwflow.core.wire import Headers

__all__ = ["PREFIX", "Callee", "Dispatch", "Withdraw", "decode", "encode", "size_of", "state_key"]

PREFIX = b"\0dispatch\0"


class Callee:
    """What becomes a wait when it is called, such as an activity; itself it is none."""


class Dispatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Start this.  `key` is the ref of the call's first attempt: the same for all its attempts.  `headers` go on with the answer (semantics §9.3)."""

    workflow_id: str
    ref: str
    name: str
    attempt: int
    key: str
    arguments: bytes
    headers: Headers = ()


class Withdraw(msgspec.Struct, frozen=True):
    """Nobody waits for this ref any more: it was answered or cancelled."""

    workflow_id: str
    ref: str


def state_key(workflow_id: str, ref: str) -> bytes:
    """Of the entry; refs of dispatched waits are the engine's `<offset>:<n>`, so that keys sort as they were made."""
    offset, _, number = ref.partition(":")
    return PREFIX + b"%020d\0%010d\0" % (int(offset), int(number)) + workflow_id.encode()


_decoder = msgspec.msgpack.Decoder(Dispatch)


def encode(item: Dispatch) -> bytes:
    return msgspec.msgpack.encode(item)


def size_of(item: Dispatch) -> int:
    """Bytes of its entry, key included."""
    return len(state_key(item.workflow_id, item.ref)) + len(encode(item))


def decode(data: bytes) -> Dispatch:
    return _decoder.decode(data)
