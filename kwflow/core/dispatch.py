"""Activity calls that a step hands out and a runner starts after the commit (M6), and the entries that keep them until then.

An entry is stored beside the state of its partition under `\\0dispatch\\0<offset>\\0<n>\\0<workflow id>`.  So an engine finds
its pending calls, oldest first, without unpickling an instance, and needs no memory for calls that wait.  Calls that go to
the workers of a queue are records instead (`queues.py`); a worker stores the calls that it has read in this same form.
"""

from __future__ import annotations

import msgspec

from kwflow.core.wire import Headers

__all__ = ["DETAILS_BYTES_MAX", "PREFIX", "Callee", "Dispatch", "Withdraw", "decode", "encode", "size_of", "state_key"]

PREFIX = b"\0dispatch\0"
DETAILS_BYTES_MAX = 10_000  # of the heartbeats of one call: they are stored in the header, which every listing reads


class Callee:
    """Something that returns a wait when it is called, such as an activity, but is not a wait itself."""


class Dispatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Start this attempt of a call, which a record of the time `called_ms` asked for (0 if an earlier kwflow stored it).

    `key` is the ref of its first attempt, the same for all attempts.  `headers` travel on with the answer (semantics §9.3).
    `queue`: the one whose call an engine runs that has no workers.  Where the state has moved to an engine that has them, the call is in that queue, too, and the engine leaves it alone.
    `held`: its workflow is parked or paused and keeps an answer, so nobody need begin it.
    """

    workflow_id: str
    ref: str
    name: str
    attempt: int
    key: str
    arguments: bytes
    headers: Headers = ()
    called_ms: int = 0
    queue: str = ""
    held: bool = False


class Withdraw(msgspec.Struct, frozen=True):
    """Nobody waits for this ref any more, because it was answered or cancelled."""

    workflow_id: str
    ref: str


def state_key(workflow_id: str, ref: str) -> bytes:
    """Return the key of the entry.  Refs of dispatched waits are the engine's own, `<offset>:<n>`, so keys sort in the order of the calls."""
    offset, _, number = ref.partition(":")
    return PREFIX + b"%020d\0%010d\0" % (int(offset), int(number)) + workflow_id.encode()


_decoder = msgspec.msgpack.Decoder(Dispatch)


def encode(item: Dispatch) -> bytes:
    return msgspec.msgpack.encode(item)


def size_of(item: Dispatch) -> int:
    """Return the size of its entry in bytes, including the key."""
    return len(state_key(item.workflow_id, item.ref)) + len(encode(item))


def decode(data: bytes) -> Dispatch:
    """Raises msgspec.DecodeError for an entry that was damaged or forged."""
    return _decoder.decode(data)
