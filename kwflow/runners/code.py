"""The code store (semantics §8, G10): the sources of module versions in the compacted topic `<app>-code`, one record each.

An entry is an output of the batch that stores the first snapshot naming its version, so both are in one transaction.
Each partition remembers in its own state which entries it has written, so an aborted batch leaves no false memory.  An
entry is written again when it is a day old and still in use; `kwflow code gc` removes only entries that are much older, so
it can run beside engines.  If there are keys, entries are signed as snapshots are, and an entry that no key signed is
treated as missing.  This module must not know what a source is.
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
_SEAL = b"\nHMAC-SHA-256 "  # followed by the digest in hex; the JSON before it contains no line break
WRITTEN = b"\0code\0"  # prefix in the state: when this partition last wrote an entry, and the id of the key that signed it


class CodeStore:
    """The entries of all stored versions by key, held in memory.

    `read(offset)` returns the committed records of the topic from that offset to its end.  It is called at the start, and
    again whenever a key is unknown, because another engine with other code may have written it since.
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
    """Return the entries that must be committed with a snapshot that names this version, including those of the modules it imports."""
    seal = key_id(keys[0]).encode() if keys else b""
    if _fresh(state, module, now_ms, seal):
        return []
    made = []
    for found in versions.stored_with(module):
        if not _fresh(state, found, now_ms, seal):
            if "__name__" in found.namespace:  # only of modules that were imported: a marker makes the next owner of the partition import its module
                state.put(_marker(found), b"%d %s" % (now_ms, seal))
            name, data = _marker(found)[len(WRITTEN) :], versions.entry(found)
            made.append(Output(topic, name, data + _SEAL + _signature(keys[0], name, data) if keys else data, (), now_ms))
    return made


def named_in(state: Store) -> list[str]:
    """`<module>@<sha256>` of every version that a snapshot in this state names, and of some that no snapshot names any more.

    A snapshot that names a version is never committed before the version's marker, so the snapshots themselves need not be read.
    """
    return [key[len(WRITTEN) :].decode() for key, _ in state.scan(WRITTEN)]


def _marker(module: Module) -> bytes:
    return WRITTEN + versions.entry_key(module.name, module.version).encode()


def _fresh(state: Changes, module: Module, now_ms: int, seal: bytes) -> bool:
    """Whether this partition wrote the entry within the last day, signed with the current signing key."""
    when, _, signed = (state.get(_marker(module)) or b"").partition(b" ")
    return when != b"" and signed == seal and now_ms < int(when) + LEASE_MS
