"""The heartbeats of one attempt: when its function last gave one, and the details that the workflow's state keeps for whoever continues.

Details are sent as records, but not more often than every few seconds: a function may give a heartbeat in each round of a tight
loop.  The last ones are sent when the attempt fails or is left behind, so that the next one knows them.  One rule: they are sent
one after the other, as the last record in the log is the one that counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec

from kwflow.core import snapshot
from kwflow.core.dispatch import DETAILS_BYTES_MAX, Dispatch
from kwflow.core.ops import details_of
from kwflow.core.snapshot import Keys
from kwflow.core.typed import to_plain
from kwflow.core.values import json_dumps
from kwflow.core.wire import Headers
from kwflow.errors import SnapshotError, UsageError
from kwflow.ports import Store

__all__ = ["HEADERS", "Ask", "Heart", "Lookup", "kept", "record_of"]

Ask = Callable[[], Any]  # returns the details that the call has given so far; may block, and raise
Lookup = Callable[[Store, Dispatch], Ask]  # called on the engine's thread, with the partition's store; what it returns is called on the activity's

HEADERS: Headers = (("kwflow-op", b"heartbeat"),)
_EVERY_S_MAX = 5.0


def kept(keys: Keys) -> Lookup:
    """How an engine finds the details of a call: in the stored header of its workflow."""

    def look(store: Store, call: Dispatch) -> Ask:
        stored = store.get(call.workflow_id.encode())
        try:
            header = snapshot.split(stored, keys)[0] if stored is not None else {}
        except SnapshotError:  # it is parked, or will be
            header = {}
        details = details_of(header, call.ref)
        return lambda: details

    return look


def record_of(ref: str, details: bytes) -> bytes:
    """Return the value of the record that carries details, which are JSON."""
    return b'{"ref":' + json_dumps(ref) + b',"details":' + details + b"}"


class Heart:
    """What `activity_info()` gives heartbeats to.  Its methods may be called on any thread."""

    def __init__(self, heartbeat_s: float, monotonic: Callable[[], float], ask: Ask, send: Callable[[bytes, Callable[[], None]], bool]) -> None:
        """`send` puts details into the log, and calls its second argument once they are there or never will be; it may block.

        It returns whether anybody wants them; if not, they are offered again later, as somebody may by then.
        """
        self._monotonic = monotonic
        self._ask: Ask | None = ask
        self._send = send
        self._every_s = min(_EVERY_S_MAX, heartbeat_s / 2)
        self._lock = threading.Lock()  # of the fields; nobody waits while holding it
        self._sending = threading.Lock()  # held while details are sent, and so never asked for by whoever holds the dispatcher's
        self._under_way = self._asked = False
        self._details: Any = None
        self._unsent: bytes | None = None
        self._sent_s = float("-inf")
        self.last_s = monotonic()

    @property
    def details(self) -> Any:
        """The last details that the call gave, in this attempt or an earlier one."""
        ask = self._ask
        if ask is not None:
            self.last_s = float("inf")  # while the function waits for us it cannot give one
            try:
                asked = ask()
            finally:
                self.last_s = self._monotonic()
            with self._lock:
                if self._ask is not None:  # otherwise this attempt has given some meanwhile
                    self._details, self._ask = asked, None
        return self._details

    def beat(self, details: object) -> None:
        """Note that the function is alive; keep its details, unless they are None.  Raises UsageError for what cannot be sent."""
        self.last_s = self._monotonic()
        if details is None:
            return
        try:
            encoded = json_dumps(to_plain(details, annotated=True))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(f"these heartbeat details cannot be sent: {error}") from None
        if len(encoded) > DETAILS_BYTES_MAX:
            raise UsageError(f"heartbeat details have at most {DETAILS_BYTES_MAX} bytes, not {len(encoded)}; store the data elsewhere, and give a reference to it")
        with self._lock:
            self._details, self._ask, self._unsent = msgspec.json.decode(encoded), None, encoded
        self.flush_due()

    def skip(self, seconds: float) -> None:
        """Do not take for silence the last seconds, in which nobody could be heard."""
        self.last_s = max(self.last_s, min(self._monotonic(), self.last_s + seconds))

    def flush_due(self) -> None:
        """Send details that are not sent yet if it is time, and if the last ones are in the log: without a broker, one record waits for it, not one every few seconds."""
        if not self._under_way and self._sent_s <= self._monotonic() - self._every_s:
            self._send_while_asked(0)

    def flush(self, wait_s: float = 0) -> None:
        """Send the last details now, if they are not sent yet.  If another thread is sending some, it sends them next; wait for that at most so long."""
        with self._lock:
            self._asked = True
        self._send_while_asked(wait_s)

    def _send_while_asked(self, wait_s: float) -> None:
        """Send, unless another thread does: it may be blocked, as the log may be full.  Who has sent looks whether somebody has asked meanwhile."""
        while self._sending.acquire(timeout=wait_s):
            try:
                self._send_last()
            finally:
                self._sending.release()
            with self._lock:
                if not (self._asked and self._unsent is not None):
                    return

    def _send_last(self) -> None:
        with self._lock:
            unsent, self._unsent, self._asked = self._unsent, None, False
        if unsent is not None:
            self._sent_s, self._under_way = self._monotonic(), True
            if not self._send(unsent, self._arrived):
                with self._lock:
                    self._unsent, self._under_way = self._unsent or unsent, False

    def _arrived(self) -> None:
        self._under_way = False  # without a lock: it is called by the thread that whoever sends may wait for
