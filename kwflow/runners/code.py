"""The code store (semantics §8, G10): sources of module versions in the compacted topic `<app>-code`, one record each.

An entry is an output of the batch that stores the first snapshot naming its version, so both are in one transaction.
Which entries a partition has written is in its own state, so an aborted batch leaves no false memory.  An entry is
written again when it is a day old and still in use; `kwflow code gc` removes only those that are much older, so that it
can run beside engines.  Where there are keys an entry is signed as snapshots are, and one that no key signed is not there.
It must not know what a source is.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from kwflow.core.snapshot import UNSIGNED, key_id
from kwflow.core.wire import Output, Record
from kwflow.durable import versions
from kwflow.durable.registry import Module
from kwflow.ports import Changes, Store

__all__ = ["LEASE_MS", "WRITTEN", "CodeStore", "named_in", "offer"]

LEASE_MS = 86_400_000
_SEAL = b"\nHMAC-SHA-256 "  # then the digest in hex; JSON holds no line break
WRITTEN = b"\0code\0"  # state: when this partition last wrote the entry, and the id of the key it was signed with


class CodeStore:
    """Key -> entry of every version that is stored, held in memory.

    `read(offset)` gives the committed records of the topic from there to its end; it is asked at start, and again when
    a key is unknown: another engine, with other code, may have written it since.
    """

    def __init__(self, read: Callable[[int], Sequence[Record]], keys: Sequence[bytes] = ()) -> None:
        self._keys = keys
        self.entries: dict[str, bytes] = {}
        self.written_ms: dict[str, int] = {}
        self._read = read
        self._next = 0
        self._follow()

    def _follow(self) -> None:
        for record in self._read(self._next):
            self._next = record.offset + 1
            key = (record.key or b"").decode()
            if record.value is None:
                self.entries.pop(key, None)
                self.written_ms.pop(key, None)
            else:
                data, _, digest = record.value.partition(_SEAL)
                if not self._keys or (UNSIGNED in self._keys and not digest) or any(hmac.compare_digest(_signature(known, key.encode(), data), digest) for known in self._keys if known != UNSIGNED):
                    self.entries[key], self.written_ms[key] = data, record.timestamp_ms

    def __call__(self, key: str) -> bytes | None:
        if key not in self.entries:
            self._follow()
        return self.entries.get(key)


def _signature(key: bytes, name: bytes, data: bytes) -> bytes:
    return hmac.digest(key, name + b"\0" + data, "sha256").hex().encode()


def offer(topic: str, state: Changes, module: Module, now_ms: int, keys: Sequence[bytes] = ()) -> list[Output]:
    """The entries that are to be committed with a snapshot that names this version, those of modules it imports included."""
    seal = key_id(keys[0]).encode() if keys else b""
    if _fresh(state, module, now_ms, seal):
        return []
    made = []
    for found in versions.stored_with(module):
        if not _fresh(state, found, now_ms, seal):
            if "__name__" in found.namespace:  # not of what nobody has imported yet: a marker has the next owner of the partition import it
                state.put(_marker(found), b"%d %s" % (now_ms, seal))
            name, data = _marker(found)[len(WRITTEN) :], versions.entry(found)
            made.append(Output(topic, name, data + _SEAL + _signature(keys[0], name, data) if keys else data, (), now_ms))
    return made


def named_in(state: Store) -> list[str]:
    """`<module>@<sha256>` of every version that a snapshot in this state names, and of some that none names any more.

    Whoever wrote a snapshot that names a version wrote the marker with it, so this needs no look at the snapshots themselves.
    """
    return [key[len(WRITTEN) :].decode() for key, _ in state.scan(WRITTEN)]


def _marker(module: Module) -> bytes:
    return WRITTEN + versions.entry_key(module.name, module.version).encode()


def _fresh(state: Changes, module: Module, now_ms: int, seal: bytes) -> bool:
    """Whether it was written within a day, signed with the key that signs now."""
    when, _, signed = (state.get(_marker(module)) or b"").partition(b" ")
    return when != b"" and signed == seal and now_ms < int(when) + LEASE_MS
