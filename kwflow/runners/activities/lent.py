"""Calls of a queue for workers that fetch them: who has which call, and until when (ET-3, ET-6, ET-10, ET-11, ET-17..ET-19).

A lock is soft: when its time is over, another worker may get the call, and until one does, the first worker may still answer.
Locks are only in memory: the next owner of the partition hands the call out again, so workers see some calls twice.  This
module is called by the thread that reads the queue (ports.Worker) and by callers' threads; it must not know HTTP.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterable

from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.core.wire import Headers
from kwflow.ports import Store

__all__ = ["Lent", "Loan"]


class Loan:
    """One call: free, or locked by `worker` until `until_s` on the monotonic clock."""

    __slots__ = ("call", "partition", "until_s", "worker")

    def __init__(self, partition: int, call: Dispatch) -> None:
        self.partition = partition
        self.call = call
        self.worker: str | None = None
        self.until_s = 0.0


class Lent:
    """A Worker that runs nothing.  Invariant: `_free` holds, oldest first, the keys of those calls that are not locked."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._owned: set[int] = set()
        self._loans: dict[tuple[str, str], Loan] = {}
        self._free: dict[tuple[str, str], None] = {}
        self._waiting: list[concurrent.futures.Future[None]] = []

    # -- what is read (ports.Worker) -------------------------------------------------------------------------------
    def own(self, partition: int, store: Store) -> None:
        with self._lock:
            self._owned.add(partition)

    def owns(self, partition: int) -> bool:
        return partition in self._owned

    def committed(self, partition: int, items: Iterable[object]) -> None:
        with self._lock:
            for item in items:
                if isinstance(item, Dispatch) and partition in self._owned:
                    self._loans[item.workflow_id, item.ref] = Loan(partition, item)
                    self._free[item.workflow_id, item.ref] = None
                elif isinstance(item, Withdraw):
                    self._drop((item.workflow_id, item.ref))
            self._wake()

    def turn(self) -> None:
        """Free the calls whose locks have expired."""
        now_s = self._now_s()
        with self._lock:
            for key, loan in self._loans.items():
                if loan.worker is not None and loan.until_s <= now_s and key not in self._free:
                    self._free[key] = None
            self._wake()

    def hurry(self) -> None:
        """Do nothing: no call waits for others here."""

    def disown(self, partition: int, grace_s: float | None = None) -> None:
        """Forget the calls of a partition.  Workers that have one may still answer it."""
        with self._lock:
            self._owned.discard(partition)
            for key in [key for key, loan in self._loans.items() if loan.partition == partition]:
                self._drop(key)

    def close(self, grace_s: float = 0.0) -> None:
        for partition in list(self._owned):
            self.disown(partition)

    def _drop(self, key: tuple[str, str]) -> None:
        self._loans.pop(key, None)
        self._free.pop(key, None)

    def _wake(self) -> None:
        if self._free:
            for future in self._waiting:
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    future.set_result(None)
            self._waiting = []

    # -- what callers do -------------------------------------------------------------------------------------------
    def fetch(self, most: int, worker: str, lock_s: float) -> list[Dispatch]:
        """Return and lock at most `most` free calls, the oldest first; no call is given to two workers."""
        until_s = self._now_s() + lock_s
        with self._lock:
            keys = list(self._free)[:most]
            for key in keys:
                del self._free[key]
                self._loans[key].worker, self._loans[key].until_s = worker, until_s
            return [self._loans[key].call for key in keys]

    def arrival(self) -> concurrent.futures.Future[None]:
        """A future that is done when there may be something to fetch."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._waiting = [other for other in self._waiting if not other.done()]
            self._waiting.append(future)
            self._wake()
        return future

    def holder(self, id: str, ref: str) -> str | None:
        """The worker that has the call, even if its lock has expired and nobody has fetched the call since; None if nobody has it, or it is not here."""
        loan = self._loans.get((id, ref))
        return loan.worker if loan is not None else None

    def headers(self, id: str, ref: str) -> Headers:
        """The headers that the call's answer must carry; empty if the call is not here."""
        loan = self._loans.get((id, ref))
        return loan.call.headers if loan is not None else ()

    def extend(self, id: str, ref: str, worker: str, lock_s: float) -> bool:
        """Renew a lock, from now on; False if this worker has no unexpired lock on the call."""
        with self._lock:
            loan = self._loans.get((id, ref))
            if loan is None or loan.worker != worker or loan.until_s <= self._now_s():
                return False
            loan.until_s = self._now_s() + lock_s
            return True

    def keep(self, id: str, ref: str, worker: str, seconds: float) -> bool:
        """Let the lock of a call last at least so long, even if it has expired and nobody has fetched the call since; False if this worker does not have it."""
        with self._lock:
            loan = self._loans.get((id, ref))
            if loan is None or loan.worker != worker:
                return False
            loan.until_s = max(loan.until_s, self._now_s() + seconds)
            self._free.pop((id, ref), None)
            return True

    def release(self, id: str, ref: str) -> None:
        """Unlock a call, so that somebody else may have it now."""
        with self._lock:
            loan = self._loans.get((id, ref))
            if loan is not None:
                loan.worker = None
                self._free[id, ref] = None
                self._wake()

    def closing(self, id: str, ref: str) -> Callable[[], None]:
        """Return what removes a call, once an answer that is sent after now has ended it; if it was made again meanwhile, the new one stays."""
        loan = self._loans.get((id, ref))

        def close() -> None:
            with self._lock:
                if self._loans.get((id, ref)) is loan:
                    self._drop((id, ref))

        return close

    def counts(self) -> dict[str, int]:
        """How many calls are free, and how many are locked."""
        return {"free": len(self._free), "locked": len(self._loans) - len(self._free)}
