"""Runs activities: a thread each for `def`, one event loop for `async def`, at most `activity_concurrency` at a time.

The store is the queue: what a commit hands out lies there until it is answered, this holds a window of it.  So ten
thousand waiting calls cost no memory, and a new owner of a partition finds what its predecessor left (at-least-once).
Author code may block, hang, raise anything: it ends as an error record and never takes a thread of the engine.  The
engine's thread calls all public methods; it must not know a log: `deliver` puts a result into one.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from kwflow.activities import Activity, find_activity, running_as
from kwflow.core.dispatch import PREFIX, Dispatch, Withdraw, decode, encode, state_key
from kwflow.core.outcomes import describe_error
from kwflow.errors import ActivityError, BusinessError, KwflowBug
from kwflow.ports import Changes, Deliver, Store
from kwflow.runners.answers import carry_out, failure_record, info_of, result_record
from kwflow.runners.logs import Line, authors_traceback
from kwflow.runners.threads import AsyncCall, Loops, Threads, place_of

__all__ = ["Dispatcher", "keep"]

_LEFT_BEHIND_S = 5.0  # so long a cancelled activity may go on before its slot is given to another
_LEFT_BEHIND_MAX = 256  # threads of such activities; with more, nothing new is started
_LOOK_S = 0.2
_READY_FACTOR = 8  # so many times the concurrency are kept ready, that no slot waits for the engine's next batch,
_READY_BYTES_MAX = 16_000_000  # while their arguments are not larger than this
_SAID_MAX = 2_000  # characters of an error in a log line


def keep(state: Changes, items: Iterable[object]) -> None:
    """The entries of what a batch hands out, among its changes: made for a start, removed when nobody waits any more."""
    for item in items:
        if isinstance(item, Dispatch):
            state.put(state_key(item.workflow_id, item.ref), encode(item))
        elif isinstance(item, Withdraw):
            state.put(state_key(item.workflow_id, item.ref), None)


class _Job:
    """One call that is ready or runs.  `failed`: what the log says if it did; `answered`: its record was made; `freed`: its slot was given back; `behind`: while it went on."""

    __slots__ = ("activity", "answered", "begun", "behind", "cancelled_at", "deadline", "dispatch", "failed", "freed", "info", "partition", "thread")

    def __init__(self, partition: int, dispatch: Dispatch) -> None:
        self.partition = partition
        self.dispatch = dispatch
        self.info = info_of(dispatch)
        self.activity: Activity[Any, Any] | None = None
        self.deadline = self.cancelled_at = float("inf")
        self.answered = self.freed = self.behind = False
        self.failed: Line | None = None
        self.thread: threading.Thread | None = None
        self.begun: AsyncCall | None = None

    @property
    def id(self) -> tuple[int, str, str]:
        return self.partition, self.dispatch.workflow_id, self.dispatch.ref

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return self.cancelled_at == float("inf")

    def __str__(self) -> str:
        return f"activity {self.dispatch.name} of {self.dispatch.workflow_id} (attempt {self.dispatch.attempt})"


class _Owned:
    """A partition: its store, the last entry taken into memory, whether more lies behind it, and what lies before it and found no room."""

    __slots__ = ("cursor", "late", "more", "store")

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cursor = PREFIX
        self.more = True
        self.late: deque[bytes] = deque()


class Dispatcher:
    """Starts what commits hand out.  Invariant: what is ready or runs is in `_jobs` once; all else is in the stores."""

    def __init__(
        self, deliver: Deliver, on_log: Callable[[str], None], concurrency: int = 64, limit_s: float = 600.0, result_bytes_max: int = 500_000, record_bytes_max: int = 1_000_000,
        threads: Threads | None = None,
    ) -> None:  # fmt: skip
        self._deliver = deliver
        self._on_log = on_log
        self._concurrency = concurrency
        self._limit_s = limit_s
        self._bytes_max = result_bytes_max, record_bytes_max
        self._owned: dict[int, _Owned] = {}
        self._jobs: dict[tuple[int, str, str], _Job] = {}
        self._ready: deque[_Job] = deque()
        self._ready_bytes = 0
        self._running = 0
        self._behind = 0
        self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._threads = threads or Threads()
        self._loops = Loops(on_log)
        self._unknown: set[str] = set()
        self._looked = 0.0

    # -- what the engine tells (ports.Worker) ----------------------------------------------------------------------
    def own(self, partition: int, store: Store) -> None:
        with self._changed:
            self._owned[partition] = _Owned(store)
        self.turn()

    def owns(self, partition: int) -> bool:
        return partition in self._owned

    def disown(self, partition: int, grace_s: float = 0.0) -> None:
        with self._changed:
            self._owned.pop(partition, None)
            for job in [job for job in self._ready if job.partition == partition]:
                self._unready(job)
        self._wait(lambda: any(job.partition == partition and job.wanted for job in self._jobs.values()), grace_s)

    def close(self, grace_s: float = 0.0) -> None:
        """What still runs after the grace period is left behind, on threads that end with the process."""
        for partition in list(self._owned):
            self.disown(partition)
        self._wait(lambda: any(job.wanted for job in self._jobs.values()), grace_s)
        for job in list(self._jobs.values()):
            if job.wanted:
                self._on_log(f"{job} still runs; the next engine begins it again")
        self._closed = True
        self._threads.close()
        self._loops.close()

    def _wait(self, busy: Callable[[], bool], seconds: float) -> None:
        now = self._threads.monotonic
        give_up = now() + seconds
        with self._changed:
            while not self._closed and busy() and now() < give_up:
                self._threads.wait(self._changed, min(_LOOK_S, max(0.0, give_up - now())))

    def committed(self, partition: int, items: Iterable[object]) -> None:
        owned = self._owned.get(partition)
        if owned is None:
            return
        with self._changed:
            for item in items:
                if isinstance(item, Dispatch):
                    self._offer(partition, owned, item)
                elif isinstance(item, Withdraw):
                    self._withdraw((partition, item.workflow_id, item.ref))
            self._start()

    def turn(self) -> None:
        with self._changed:
            waiting = [(partition, owned) for partition, owned in self._owned.items() if owned.more or owned.late]
            room = self._concurrency * _READY_FACTOR - len(self._ready)
            if waiting and room > self._concurrency * _READY_FACTOR // 2:
                for partition, owned in waiting:  # a share for each, or one with a long queue would keep the others from beginning
                    self._take(partition, owned, max(1, room // len(waiting)))
            self._start()
            now = self._threads.monotonic()
            if now - self._looked > _LOOK_S:
                self._looked = now
                self._look(now)

    @property
    def busy(self) -> int:
        """How many are in memory, ready or running."""
        return len(self._jobs)

    def counts(self) -> dict[str, int]:
        """How many in each state; from any thread."""
        return {"running": self._running, "ready": len(self._ready), "left-behind": self._behind}

    # -- the queue -------------------------------------------------------------------------------------------------
    @property
    def _full(self) -> bool:
        return len(self._ready) >= self._concurrency * _READY_FACTOR or self._ready_bytes >= _READY_BYTES_MAX

    def _offer(self, partition: int, owned: _Owned, item: Dispatch) -> None:
        """Into memory, or left where it lies; of what sorts before the cursor (a record of a hold, applied late) the key is kept, as it would not be found again."""
        key = state_key(item.workflow_id, item.ref)
        if key > owned.cursor:
            if owned.more or self._full:
                owned.more = True
                return
            owned.cursor = key
        elif owned.late or self._full:
            owned.late.append(key)
            return
        self._enqueue(partition, item)

    def _take(self, partition: int, owned: _Owned, share: int) -> None:
        while owned.late:
            if self._full or share <= 0:
                return
            share -= 1
            waiting = owned.store.get(owned.late.popleft())
            if waiting is not None:  # it was not withdrawn meanwhile
                self._enqueue(partition, decode(waiting))
        if not owned.more:
            return
        for key, data in owned.store.scan(PREFIX, owned.cursor + b"\0"):
            if self._full or share <= 0:
                return
            share -= 1
            owned.cursor = key
            self._enqueue(partition, decode(data))
        owned.more = False

    def _enqueue(self, partition: int, item: Dispatch) -> None:
        job = _Job(partition, item)
        before = self._jobs.get(job.id)
        if before is not None and not before.wanted:
            # 1. a fork calls an activity, under the ref that its original has; it is terminated, and the call is cancelled
            # 2. another fork is made under the same id, while the call still goes on: what it returns is dropped
            self._leave_behind(before)
        if self._jobs.get(job.id) is None:
            self._jobs[job.id] = job
            self._ready.append(job)
            self._ready_bytes += len(item.arguments)

    def _unready(self, job: _Job) -> None:
        self._ready.remove(job)
        self._ready_bytes -= len(job.dispatch.arguments)
        del self._jobs[job.id]

    def _withdraw(self, id: tuple[int, str, str]) -> None:
        job = self._jobs.get(id)
        if job is None:
            return
        if job.activity is None:
            self._unready(job)
        else:
            self._cancel(job)

    def _start(self) -> None:
        while self._ready and self._running < self._concurrency and self._behind < _LEFT_BEHIND_MAX and not self._closed:
            job = self._ready.popleft()
            self._ready_bytes -= len(job.dispatch.arguments)
            activity = find_activity(job.dispatch.name)
            if activity is None:
                del self._jobs[job.id]
                if job.dispatch.name not in self._unknown:
                    self._unknown.add(job.dispatch.name)
                    self._on_log(f"no activity {job.dispatch.name!r} in this engine; {job.dispatch.workflow_id} and maybe others wait for it until an engine is started that has it")
                continue
            job.activity = activity
            job.deadline = self._threads.monotonic() + self._limit_s if activity.timeout_s is None and self._limit_s else float("inf")
            self._running += 1
            if activity.is_async:
                job.begun = self._loops.run(lambda job=job: self._run_async(job), lambda job=job: self._finished(job))  # type: ignore[misc]
                job.thread = job.begun.thread
            else:
                self._threads.run(lambda job=job: self._run(job))  # type: ignore[misc]

    # -- running ---------------------------------------------------------------------------------------------------
    def _run(self, job: _Job) -> None:
        job.thread = threading.current_thread()
        self._answer(job, contextvars.Context().run(self._call, job))

    def _call(self, job: _Job) -> bytes:
        return carry_out(job.dispatch, _of(job), job.info, self._bytes_max, failed=lambda error: _note(job, error))

    async def _run_async(self, job: _Job) -> None:
        activity = _of(job)
        try:
            with running_as(job.info):
                bound = activity.decode_arguments(job.dispatch.arguments)
                record = result_record(job.dispatch, activity, await activity.function(*bound.args, **bound.kwargs), self._bytes_max)
        except BaseException as error:
            record = failure_record(job.dispatch, error, self._bytes_max[1])
            _note(job, error)
        self._answer(job, record)

    # -- the answer ------------------------------------------------------------------------------------------------
    def _answer(self, job: _Job, record: bytes) -> None:
        """Deliver, once; nobody needs it any more if the call was cancelled."""
        with self._changed:
            needed = not job.answered and job.wanted
            job.answered = True
        if needed:
            try:
                self._tell(job)
            finally:  # a log that cannot be written keeps nobody waiting
                self._send(job, record)
        else:
            self._finished(job)

    def _tell(self, job: _Job) -> None:
        if job.failed is not None:
            self._on_log(job.failed)

    def _send(self, job: _Job, record: bytes) -> None:
        def done(refused: str | None) -> None:
            if refused is None:
                self._finished(job)
            else:
                error = ActivityError(f"the log does not take the result of activity {job.dispatch.name}: {refused}", "ResultTooLarge", final=True)
                _note(job, error)
                self._deliver(job.partition, job.dispatch.workflow_id.encode(), failure_record(job.dispatch, error, self._bytes_max[1]), told)

        def told(refused: str | None) -> None:
            if refused is not None:  # no write access to the topic, say
                self._on_log(f"the log takes nothing of {job}: {refused}; its workflow waits, and it is begun again at the next start")
            else:
                self._tell(job)
            self._finished(job)

        try:
            self._deliver(job.partition, job.dispatch.workflow_id.encode(), record, done)
        except Exception as error:  # the engine is ending; the call lies in the store still
            if not self._closed:
                self._on_log(f"the result of {job} could not be delivered: {error}")
            self._finished(job)

    def _finished(self, job: _Job) -> None:
        with self._changed:
            if job.behind:
                job.behind = False
                self._behind -= 1
            self._free(job)
            self._start()

    def _free(self, job: _Job) -> None:
        if not job.freed:
            job.freed = True
            self._running -= 1
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]
            self._changed.notify_all()

    # -- what does not end -----------------------------------------------------------------------------------------
    def _cancel(self, job: _Job) -> None:
        if job.wanted:
            job.cancelled_at = self._threads.monotonic()
            job.info.cancel()
            if job.begun is not None:
                job.begun.cancel()

    def _leave_behind(self, job: _Job) -> None:
        job.behind = True
        self._behind += 1
        self._free(job)

    def _look(self, now: float) -> None:
        """Activities over their time are answered for; the slots of cancelled ones that go on are given to others."""
        for job in [job for job in self._jobs.values() if job.activity is not None]:
            if now > job.deadline and not job.answered:
                job.answered, job.deadline = True, float("inf")
                error = ActivityError(f"{job} had no result within {self._limit_s:g} s (activity_limit_s; set @kw.activity(timeout=...) for a limit of its own)", "Timeout")
                _note(job, error, place_of(job.thread))
                self._tell(job)
                self._deliver(job.partition, job.dispatch.workflow_id.encode(), failure_record(job.dispatch, error, self._bytes_max[1]), lambda _: None)
                self._cancel(job)
            elif now - job.cancelled_at > _LEFT_BEHIND_S and not job.freed:
                self._leave_behind(job)
                full = f"; {self._behind} do so, and no more are started until one ends or the engine is restarted" if self._behind >= _LEFT_BEHIND_MAX else "; another takes its slot"
                self._on_log(f"{job} goes on although nobody waits for it{place_of(job.thread)}{full}")
        self._loops.look(now)


def _of(job: _Job) -> Activity[Any, Any]:
    if job.activity is None:
        raise KwflowBug(f"{job} runs without an activity")
    return job.activity


def _note(job: _Job, error: BaseException, where: str = "") -> None:
    """What the log is to say of a failed attempt: text, as the error would keep alive what its frames hold.  A BusinessError is an outcome."""
    if isinstance(error, BusinessError):
        return
    final = isinstance(error, ActivityError) and error.final
    pause_s = None if final else _of(job).retry.pause_s(job.dispatch.attempt, job.info.idempotency_key)
    then = "it was the last attempt" if pause_s is None else f"tried again in {pause_s:.3g} s"
    about = {"workflow": job.dispatch.workflow_id, "activity": job.dispatch.name, "attempt": job.dispatch.attempt}
    job.failed = Line.failed(f"{job} failed, {then}: {describe_error(error)[:_SAID_MAX]}{where}", authors_traceback(error), "warning" if pause_s is not None else "error", **about)
