"""Runs activities: a thread for each `def`, one event loop for `async def`; at most `activity_concurrency` at a time, and `activity_rate` per second.

`backlog.py` has the waiting calls, and `runs.py` calls an author's function and makes the answer.  An activity with a batch is
called for several calls together, which take one slot.  Author code may block or hang, but never on a thread of the engine.
The engine's thread calls all public methods.  One lock guards all that is in this file, which is why it is a long one; nobody
waits for the log while holding it.  This module must not know a log: `deliver` puts a result into one.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from kwflow.activities import Activity, find_activity
from kwflow.batches import Batch
from kwflow.core.dispatch import Dispatch, Withdraw, decode, encode, state_key
from kwflow.errors import ActivityError
from kwflow.ports import Changes, Deliver, Store
from kwflow.runners.activities.answers import failure_record
from kwflow.runners.activities.backlog import Backlog
from kwflow.runners.activities.heart import HEADERS, Ask, Heart, Lookup, record_of
from kwflow.runners.activities.pace import Pace
from kwflow.runners.activities.runs import NEVER, Gathered, Job, Run
from kwflow.runners.activities.threads import Loops, Threads, place_of
from kwflow.runners.stats import Durations
from kwflow.runners.tracing import CallSpan

__all__ = ["Dispatcher", "keep"]

_LEFT_BEHIND_S = 5.0  # how long a cancelled activity may go on before its slot is given to another
_LEFT_BEHIND_MAX = 256  # activities that go on without a slot; with so many, nothing new is started
_LOOK_S = 0.2
_STALLED_S = 2.0  # so long without a look, the process was stopped, or the engine's thread was busy
_BEFORE_S = 1.0  # how long the answer of a failed attempt waits for details that another thread is sending
_TELL_S = 2.0  # how long an engine that stops, or gives a partition away, waits until the last heartbeat details are in the log
_READY_FACTOR = 8  # times the concurrency: so many calls are kept ready that no slot waits for the engine's next batch
_BATCH_BYTES_MAX = 16_000_000  # of a batch's arguments; a batch with more is begun before it is full
_UNTRACED = CallSpan()


def keep(state: Changes, items: Iterable[object]) -> None:
    """Put the entries of dispatched items among a batch's changes: one is added for a call, and removed when nobody waits for the call any more.

    A batch that drains a hold does this before and after it; what was noted in the entry meanwhile stays.
    """
    for item in items:
        if isinstance(item, Dispatch):
            key = state_key(item.workflow_id, item.ref)
            if not _is_held(state.get(key)):
                state.put(key, encode(item))
        elif isinstance(item, Withdraw):
            state.put(state_key(item.workflow_id, item.ref), None)


def _is_held(stored: bytes | None) -> bool:
    try:
        return stored is not None and decode(stored).held
    except msgspec.DecodeError:  # it was damaged
        return False


class Dispatcher:
    """Starts the calls that commits dispatch.  Invariant: a call that is ready or runs is in `_jobs` once; all others are in the stores."""

    def __init__(
        self, deliver: Deliver, on_log: Callable[[str], None], concurrency: int = 64, limit_s: float = 600.0, result_bytes_max: int = 500_000, record_bytes_max: int = 1_000_000,
        threads: Threads | None = None, ends_late: bool = False, span: Callable[[Sequence[Dispatch]], CallSpan] | None = None, rate: float = 0, details: Lookup | None = None, hands_out: bool = False,
    ) -> None:  # fmt: skip
        """`ends_late`: an activity that has a timeout of its own is also ended here after that time, not only when it is withdrawn.

        `details` finds the last heartbeat details of a call; `span` returns the tracing span of a run for these calls; `rate` is that of Pace.
        `hands_out`: calls of queues are for their workers alone.
        """
        self._hands_out = hands_out
        self._deliver = deliver
        self._on_log = on_log
        self._concurrency = concurrency
        self._limit_s = limit_s
        self._ends_late = ends_late
        self._span = span or (lambda _: _UNTRACED)
        self._details = details or (lambda store, call: lambda: None)
        self._bytes_max = result_bytes_max, record_bytes_max
        self._backlog = Backlog(concurrency * _READY_FACTOR, on_log)
        self._jobs: dict[tuple[int, str, str], Job] = {}
        self._ready: deque[Job] = deque()
        self._gathered: dict[str, Gathered] = {}
        self._running = 0
        self._behind = 0
        self._telling = 0  # heartbeats that are not in the log yet
        self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._threads = threads or Threads()
        self._pace = Pace(rate, self._threads.monotonic())
        self._loops = Loops(on_log)
        self._unknown: set[str] = set()
        self._looked = 0.0
        self._stalled = False
        self.waited = Durations()  # from the call to the beginning of its attempt, by activity
        self.ran = Durations()  # attempts, by activity and outcome

    # -- what the engine tells (ports.Worker) ----------------------------------------------------------------------
    def own(self, partition: int, store: Store) -> None:
        with self._changed:
            self._backlog.own(partition, store)
        self.turn()

    def owns(self, partition: int) -> bool:
        return self._backlog.owns(partition)

    def disown(self, partition: int, grace_s: float | None = None) -> None:
        self._leave([partition])
        if grace_s is not None:
            self._wait(lambda: any(job.partition == partition and job.wanted for job in self._jobs.values()), grace_s)
            self._tell_last()
        for job in list(self._jobs.values()):
            if job.partition == partition:
                job.left = True

    def close(self, grace_s: float = 0.0) -> None:
        """End.  Activities that still run after the grace period are left behind, on threads that end with the process."""
        self._leave(self._backlog.partitions)
        self._flush()  # now, too: who stops the engine may kill it before the grace period is over
        self._wait(lambda: any(job.wanted for job in self._jobs.values()), grace_s)
        self._tell_last()
        for job in list(self._jobs.values()):
            if job.wanted:
                self._on_log(f"{job} is still running; the next engine starts it again")
        self._closed = True
        self._threads.close()
        self._loops.close()

    def _leave(self, partitions: Sequence[int]) -> None:
        """Begin no more calls of these partitions."""
        with self._changed:
            for partition in partitions:
                self._backlog.disown(partition)
            for job in [job for job in self._jobs.values() if job.partition in partitions and job.run is None]:
                self._unready(job)

    def _wait(self, busy: Callable[[], bool], seconds: float) -> None:
        now = self._threads.monotonic
        give_up = now() + seconds
        with self._changed:
            while not self._closed and busy() and now() < give_up:
                self._threads.wait(self._changed, min(_LOOK_S, max(0.0, give_up - now())))

    def committed(self, partition: int, items: Iterable[object]) -> None:
        if not self._backlog.owns(partition):
            return
        with self._changed:
            for item in items:
                if isinstance(item, Dispatch):
                    if self._begins(item) and self._backlog.offer(partition, item):
                        self._enqueue(partition, item)
                elif isinstance(item, Withdraw):
                    self._withdraw((partition, item.workflow_id, item.ref))
            self._start()

    def turn(self) -> None:
        late: list[tuple[Job, tuple[str, str]]] = []
        beating: list[Heart] = []
        with self._changed:
            gathered = -1
            while gathered < self._gathering:  # repeat while batches take calls, as that makes room for more
                gathered = self._gathering
                for partition, item in self._backlog.take():
                    if self._begins(item):
                        self._enqueue(partition, item)
                self._start()
            now = self._threads.monotonic()
            if now - self._looked > _LOOK_S:
                beating = [job.heart for job in self._jobs.values() if job.heart is not None]
                self._skip(now - self._looked)
                self._looked = now
                late = self._look(now)
        for job, why in late:
            self._fail_late(job, *why)
        for heart in beating:
            heart.flush_due()

    def hurry(self) -> None:
        with self._changed:
            if not self._running:
                for gathered in self._gathered.values():
                    gathered.due = 0.0
                self._start()

    @property
    def _gathering(self) -> int:
        return sum(len(gathered.jobs) for gathered in list(self._gathered.values()))

    @property
    def busy(self) -> int:
        """How many calls are in memory, ready or running."""
        return len(self._jobs)

    def counts(self) -> dict[str, int]:
        """How many calls are in each state.  May be called from any thread."""
        return {"running": self._running, "ready": self._backlog.ready + self._gathering, "left-behind": self._behind}

    def _begins(self, item: Dispatch) -> bool:
        """Whether this engine is to begin the call, now or later."""
        return not item.held and not (self._hands_out and item.queue)

    # -- from the backlog to a slot ----------------------------------------------------------------------------------
    def _enqueue(self, partition: int, item: Dispatch) -> None:
        job = Job(partition, item, self._asking(partition, item))
        before = self._jobs.get(job.id)
        if before is not None and not before.wanted:
            # 1. A fork calls an activity under the same ref as its original.  The fork is terminated, and the call is cancelled.
            # 2. Another fork is made under the same id while the old call still runs: what the old call returns is dropped.
            self._settle(before)
        running = self._jobs.get(job.id)
        if running is not None:
            running.left = False  # its partition has come back before another owner began the call, or while both ran it
        else:
            self._jobs[job.id] = job
            self._ready.append(job)
            self._backlog.room(item, 1)

    def _asking(self, partition: int, item: Dispatch) -> Ask | None:
        """How to get the last heartbeat details of a call, if its activity has heartbeats.  It is looked up now, on the engine's thread, which alone reads the stores."""
        activity = find_activity(item.name)
        return self._details(self._backlog.store(partition), item) if activity is not None and activity.heartbeat_s is not None else None

    def _unready(self, job: Job) -> None:
        """Remove a job that is ready, or gathered for a batch."""
        gathered = self._gathered.get(job.dispatch.name)
        if gathered is not None and job in gathered.jobs:
            gathered.remove(job)
        else:
            self._ready.remove(job)
            self._backlog.room(job.dispatch, -1)
        del self._jobs[job.id]

    def _withdraw(self, id: tuple[int, str, str]) -> None:
        job = self._jobs.get(id)
        if job is None:
            return
        if job.run is None:
            self._unready(job)
        elif job.answered and job.wanted:  # its answer is in the log, which another thread has not been told yet; the function may go on
            self._settle(job)
        else:
            self._cancel(job)

    def _start(self) -> None:
        self._begin_due()
        while self._ready and self._has_room:
            job = self._ready.popleft()
            self._backlog.room(job.dispatch, -1)
            activity = job.activity = find_activity(job.dispatch.name)
            if activity is None:
                del self._jobs[job.id]
                if job.dispatch.name not in self._unknown:
                    self._unknown.add(job.dispatch.name)
                    self._on_log(f"no activity {job.dispatch.name!r} in this engine; {job.dispatch.workflow_id} and perhaps others wait until an engine with this activity is started")
            elif activity.batched is None:
                self._begin(activity, [job])
            else:
                self._gather(activity.batched, job)
        self._begin_due()

    @property
    def _has_room(self) -> bool:
        return self._running < self._concurrency and self._behind < _LEFT_BEHIND_MAX and not self._closed and self._pace.allows(self._threads.monotonic())

    def _gather(self, batch: Batch, job: Job) -> None:
        gathered = self._gathered.get(job.dispatch.name)
        if gathered is None or not gathered.jobs:
            gathered = self._gathered[job.dispatch.name] = Gathered(self._threads.monotonic() + batch.within_s)
        gathered.add(job)
        if len(gathered.jobs) >= batch.size or gathered.bytes >= _BATCH_BYTES_MAX:
            self._begin_gathered(gathered)

    def _begin_due(self) -> None:
        now = self._threads.monotonic() if self._gathered else 0.0
        for gathered in list(self._gathered.values()):
            if gathered.jobs and now >= gathered.due:
                self._begin_gathered(gathered)

    def _begin_gathered(self, gathered: Gathered) -> None:
        if self._has_room:
            jobs, gathered.jobs, gathered.bytes = gathered.jobs, [], 0
            self._begin(jobs[0].found, jobs)

    def _begin(self, activity: Activity[Any, Any], jobs: list[Job]) -> None:
        limit_s = self._limit_s if self._limit_s and activity.heartbeat_s is None else NEVER
        if activity.timeout_s is not None:
            limit_s = activity.timeout_s if self._ends_late else NEVER
        run = Run(activity, jobs, limit_s, self._threads.monotonic(), self._span([job.dispatch for job in jobs]))
        now_ms = self._threads.now_ms()
        for job in jobs:
            job.run = run
            if job.dispatch.called_ms:
                self.waited[activity.name,].observe(max(0, now_ms - job.dispatch.called_ms) / 1000)
            if activity.heartbeat_s is not None:
                job.beats(Heart(activity.heartbeat_s, self._threads.monotonic, job.ask or (lambda: None), functools.partial(self._tell, job)))
        self._running += 1
        self._pace.begun()
        if run.is_async:
            run.begun = self._loops.run(lambda: self._run_async(run), lambda: self._ended(run))
            run.thread = run.begun.thread
        else:
            self._threads.run(lambda: self._run(run))

    # -- running ---------------------------------------------------------------------------------------------------
    def _run(self, run: Run) -> None:
        run.thread = threading.current_thread()
        record = contextvars.Context().run(run.called, self._bytes_max, self._answer)
        self._ended(run, record)

    async def _run_async(self, run: Run) -> None:
        record = await run.awaited(self._bytes_max, self._answer)
        self._ended(run, record)

    def _ended(self, run: Run, record: bytes | None = None) -> None:
        """Note that the function has returned, or was cancelled before its first line; `record` answers the one job of a run without a batch."""
        with self._changed:
            run.ended = True
            if run.behind:
                run.behind = False
                self._behind -= 1
        for job in run.jobs:
            if record is not None:
                self._answer(job, record)
            elif not job.answered:  # cancelled before it began
                self._finished(job)

    # -- heartbeats ------------------------------------------------------------------------------------------------
    def _flush(self) -> None:
        """Deliver the last details of all calls that run, for those who begin them again."""
        for heart in [job.heart for job in list(self._jobs.values()) if job.heart is not None]:
            heart.flush()

    def _tell_last(self) -> None:
        self._flush()
        self._wait(lambda: self._telling > 0, _TELL_S)

    def _tell(self, job: Job, details: bytes, arrived: Callable[[], None]) -> bool:
        """Deliver heartbeat details, unless nobody waits for the call any more, or its next owner gives newer ones.  Return whether they are wanted."""

        def done(refused: str | None) -> None:
            arrived()
            if refused is not None and not self._closed:
                self._on_log(f"the log does not take the heartbeat details of {job}: {refused}")
            with self._changed:
                self._telling -= 1
                self._changed.notify_all()

        if not job.wanted or job.left:
            return False
        with self._changed:
            self._telling += 1
        try:
            self._deliver(job.partition, job.dispatch.workflow_id.encode(), record_of(job.dispatch.ref, details), HEADERS, done)
        except Exception as error:  # it must not end the author's function
            done(str(error))
        return True

    # -- the answer ------------------------------------------------------------------------------------------------
    def _answer(self, job: Job, record: bytes) -> None:
        """Deliver an answer, once, unless the call was cancelled, so that nobody needs it any more."""
        with self._changed:
            needed = not job.answered and job.wanted
            if not job.answered:
                self._count(job, job.outcome if job.wanted else "cancelled")
            job.answered = True
        if needed:
            if job.failed is not None and job.heart is not None:
                job.heart.flush(_BEFORE_S)
            try:
                self._log_failure(job)
            finally:  # even if the log line cannot be written, the workflow gets its answer
                self._send(job, record)
        else:
            self._finished(job)

    def _count(self, job: Job, outcome: str) -> None:
        """Count an attempt by what became of it."""
        self.ran[job.dispatch.name, outcome].observe(self._threads.monotonic() - job.running.began_s)

    def _log_failure(self, job: Job) -> None:
        if job.failed is not None:
            self._on_log(job.failed)

    def _send(self, job: Job, record: bytes) -> None:
        headers = job.running.span.headers(job.dispatch)

        def done(refused: str | None) -> None:
            if refused is None:
                self._finished(job)
            else:
                error = ActivityError(f"the log refuses the result of activity {job.dispatch.name}: {refused}", "ResultTooLarge", final=True)
                job.note(error)
                self._deliver(job.partition, job.dispatch.workflow_id.encode(), failure_record(job.dispatch, error, self._bytes_max[1]), headers, refused_again)

        def refused_again(refused: str | None) -> None:
            if refused is not None:  # such as without write access to the topic
                self._on_log(f"the log refuses every result of {job}: {refused}; its workflow waits, and the activity is started again with the next engine")
            else:
                self._log_failure(job)
            self._finished(job)

        try:
            self._deliver(job.partition, job.dispatch.workflow_id.encode(), record, headers, done)
        except Exception as error:  # the engine is ending; the call is still in the store
            if not self._closed:
                self._on_log(f"the result of {job} could not be delivered: {error}")
            self._finished(job)

    def _finished(self, job: Job) -> None:
        with self._changed:
            self._settle(job)
            self._start()

    def _settle(self, job: Job) -> None:
        """Remove a job that needs no more attention.  With the last job of a run its slot becomes free, even if the function goes on."""
        run = job.run
        if job.settled or run is None:
            return
        job.settled = True
        if self._jobs.get(job.id) is job:
            del self._jobs[job.id]
        run.unsettled -= 1
        if not run.unsettled:
            self._running -= 1
            if not run.ended:
                run.behind = True
                self._behind += 1
        self._changed.notify_all()

    # -- what does not end -----------------------------------------------------------------------------------------
    def _cancel(self, job: Job) -> None:
        if job.wanted:
            job.cancelled_at = self._threads.monotonic()
            job.info.cancel()
            run = job.run
            if run is not None and run.begun is not None and not run.wanted:
                run.begun.cancel()

    def _skip(self, seconds: float) -> None:
        """Do not count the time since the last look if it was far too long:

        1. The process is stopped for a while (SIGSTOP, a paused machine), and another engine takes its partitions over.
        2. It goes on, and its activities are over their time, before it learns of that.
        3. It would fail attempts that the other engine has begun again, and that work.

        An engine whose thread is always so busy counts all but the first of such times, as nothing would ever be too late in it.
        """
        stalled = seconds > _STALLED_S
        if stalled and not self._stalled:
            for run in {job.run for job in self._jobs.values() if job.run is not None}:
                run.skip(seconds)
        self._stalled = stalled

    def _look(self, now: float) -> list[tuple[Job, tuple[str, str]]]:
        """Free the slots of cancelled activities that go on.  Return those that are over their time, and why: they count as answered now."""
        late = []
        whys: dict[Run, tuple[str, str] | None] = {}  # once for all calls of a batch
        for job in [job for job in self._jobs.values() if job.run is not None]:
            run = job.running
            why = whys[run] if run in whys else whys.setdefault(run, run.late(now))
            if why is not None and not job.answered:
                job.answered = True
                self._count(job, "timeout")
                late.append((job, why))
            elif now - job.cancelled_at > _LEFT_BEHIND_S and not run.wanted:
                self._settle(job)
                full = f"; {self._behind} do so, and no more activities start until one ends or the engine is restarted" if self._behind >= _LEFT_BEHIND_MAX else "; another takes its slot"
                self._on_log(f"{job} is still running although nobody waits for it{place_of(run.thread)}{full}")
        self._loops.look(now)
        return late

    def _fail_late(self, job: Job, type: str, why: str) -> None:
        """Fail an activity that is over its time, and tell it.  Without the lock, as the log may be full until somebody takes it.

        1. An engine gives a partition away, and leaves a call behind.
        2. The next owner begins it again, and that attempt works.
        3. If the one left behind failed now, because it hangs, the workflow would take that for the end of the one that works.
        """
        error = ActivityError(f"{job} {why}", type)
        if not job.left:
            if job.heart is not None:
                job.heart.flush()
            job.note(error, place_of(job.running.thread))
            self._log_failure(job)
            record, headers = failure_record(job.dispatch, error, self._bytes_max[1]), job.running.span.headers(job.dispatch)
            self._deliver(job.partition, job.dispatch.workflow_id.encode(), record, headers, lambda _: None)
        with self._changed:
            self._cancel(job)
