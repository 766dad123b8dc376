"""The entries that ended instances leave for a while, so that a client's repeated start is recognized (K20), and the table of their expiry times."""

from __future__ import annotations

import itertools
from typing import Any

from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.errors import SnapshotError
from kwflow.ports import Changes, Decision, Store
from kwflow.runners import checkpoints

__all__ = ["EXPIRES", "FORGOTTEN", "EndedTable"]

FORGOTTEN = b"\0ended"  # no entry lies before this key: without it a scan would pass all deleted entries, slowly, until the store is compacted
EXPIRES = FORGOTTEN + b"\0"  # prefix of entries ordered by the time when they may be forgotten


class EndedTable:
    """The ended instances in the state of one partition."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def due(self, state: Changes, now_ms: int, limit: int) -> Decision | None:
        """Forget ended instances whose `ended_retention_ms` is over, with their checkpoints; None if there are none."""
        expired, over = 0, b""
        for entry, key in itertools.islice(state.scan(EXPIRES, state.get(FORGOTTEN) or b""), limit):
            if int(entry[len(EXPIRES) :][:20]) > now_ms:
                break
            state.put(entry, None)
            over = entry + b"\0"
            header = self._ended_header(state.get(key))
            if header is not None and self._expiry(header) <= now_ms:
                state.put(key, None)
                checkpoints.drop(state, key, checkpoints.extent(header))
            elif header is not None:  # it has run again since, or the retention was extended
                state.put(self._entry(header, key), key)
            expired += 1
        if not expired:
            return None
        state.put(FORGOTTEN, over)
        return Decision(counts=("forgotten",) * expired)

    def next_due_ms(self, store: Store) -> int | None:
        for entry, _ in store.scan(EXPIRES, store.get(FORGOTTEN) or b""):
            return int(entry[len(EXPIRES) :][:20])
        return None

    def _ended_header(self, stored: bytes | None) -> dict[str, Any] | None:
        try:
            header = snapshot.split(stored, self.config.signing_keys)[0] if stored is not None else None
        except SnapshotError:  # whatever this is, it is not one of our entries; the next record for it parks it
            return None
        return header if header is not None and header["status"] == "ended" else None

    def _expiry(self, header: dict[str, Any]) -> int:
        return int(header["ended"]) + self.config.ended_retention_ms

    def _entry(self, header: dict[str, Any], key: bytes) -> bytes:
        return EXPIRES + b"%020d\0" % self._expiry(header) + key

    def keep(self, state: Changes, key: bytes, header: dict[str, Any]) -> None:
        """K20: leave an entry that answers a repeated start for a while, as a client named this start and may repeat it."""
        state.put(key, snapshot.save_ended(header, self.config.signing_keys))
        entry, first = self._entry(header, key), state.get(FORGOTTEN)
        state.put(entry, key)
        if first is not None and entry < first:  # it was ended by a record with an old timestamp
            state.put(FORGOTTEN, entry)
