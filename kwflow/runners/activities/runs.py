"""One run of an author's function, for one activity call or a batch of them: its state, how it is called, and which record answers it.

Author code may raise anything; the error becomes a record (`answers.py`) and a log line.  This module must not know slots or
stores: `dispatch.py` decides when and on which thread a run begins, and who gets its answer.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kwflow.activities import Activity
from kwflow.batches import Call
from kwflow.core.dispatch import Dispatch
from kwflow.core.outcomes import describe_error
from kwflow.errors import ActivityError, BusinessError, KwflowBug
from kwflow.runners.activities.answers import calls_of, carry_out, conclude, failure_record, info_of, result_record
from kwflow.runners.activities.heart import Ask, Heart
from kwflow.runners.activities.threads import AsyncCall, on_thread
from kwflow.runners.logs import Line, authors_traceback
from kwflow.runners.tracing import CallSpan
from kwflow.running import running_as

__all__ = ["NEVER", "Gathered", "Job", "Run"]

NEVER = float("inf")
_SAID_MAX = 2_000  # characters of an error's text in a log line


class Job:
    """One call that is ready or runs.  `failed`: the log line if it failed; `outcome`: what became of it, for the metrics; `answered`: its record was made; `settled`: it no longer keeps
    its run's slot; `left`: others own its partition."""

    __slots__ = ("activity", "answered", "ask", "cancelled_at", "dispatch", "failed", "heart", "info", "left", "outcome", "partition", "run", "settled")

    def __init__(self, partition: int, dispatch: Dispatch, ask: Ask | None = None) -> None:
        self.partition = partition
        self.dispatch = dispatch
        self.ask = ask
        self.heart: Heart | None = None
        self.info = info_of(dispatch)
        self.activity: Activity[Any, Any] | None = None
        self.run: Run | None = None
        self.cancelled_at = NEVER
        self.answered = self.settled = self.left = False
        self.failed: Line | None = None
        self.outcome = "result"

    @property
    def id(self) -> tuple[int, str, str]:
        return self.partition, self.dispatch.workflow_id, self.dispatch.ref

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for the call."""
        return self.cancelled_at == NEVER

    @property
    def found(self) -> Activity[Any, Any]:
        """The called activity, which is looked up before the job is gathered or runs.  Raises KwflowBug before that."""
        if self.activity is None:
            raise KwflowBug(f"{self} runs without an activity")
        return self.activity

    @property
    def running(self) -> Run:
        """The run of a job that has begun.  Raises KwflowBug before that."""
        if self.run is None:
            raise KwflowBug(f"{self} is looked at and does not run")
        return self.run

    def beats(self, heart: Heart) -> None:
        """Give heartbeats to this heart, from now on."""
        self.heart = heart
        self.info = dataclasses.replace(self.info, _beats=heart)

    def note(self, error: BaseException, where: str = "") -> None:
        """Keep the log line of a failed attempt, as text: the error would keep alive what its frames hold.  A BusinessError is an outcome, not a failure."""
        if isinstance(error, BusinessError):
            self.outcome = "business-error"
            return
        self.outcome = "error"
        self.running.span.failed(error)
        final = isinstance(error, ActivityError) and error.final
        pause_s = None if final else self.found.retry.pause_s(self.dispatch.attempt, self.info.idempotency_key)
        then = "it was the last attempt" if pause_s is None else f"next attempt in {pause_s:.3g} s"
        about = {"workflow": self.dispatch.workflow_id, "activity": self.dispatch.name, "attempt": self.dispatch.attempt}
        said = f"{self} failed, {then}: {describe_error(error)[:_SAID_MAX]}{where}"
        self.failed = Line.failed(said, authors_traceback(error), "warning" if pause_s is not None else "error", **about)

    def __str__(self) -> str:
        return f"activity {self.dispatch.name} of {self.dispatch.workflow_id} (attempt {self.dispatch.attempt})"


_BytesMax = tuple[int, int]  # limits of a result and of a record
_Answer = Callable[[Job, bytes], None]


class Run:
    """One call of an author's function, for one job or a batch of them.

    Invariant: a run has a slot while any of its jobs is not settled.  `behind`: the function goes on without a slot.
    """

    __slots__ = ("activity", "began_s", "begun", "behind", "deadline", "ended", "jobs", "limit_s", "span", "thread", "unsettled")

    def __init__(self, activity: Activity[Any, Any], jobs: Sequence[Job], limit_s: float, now: float, span: CallSpan) -> None:
        self.activity = activity
        self.jobs = jobs
        self.unsettled = len(jobs)
        self.limit_s = limit_s
        self.began_s = now
        self.deadline = now + limit_s
        self.span = span
        self.ended = self.behind = False
        self.thread: threading.Thread | None = None
        self.begun: AsyncCall | None = None

    @property
    def is_async(self) -> bool:
        return self.activity.is_async if self.activity.batched is None else self.activity.batched.is_async

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for one of its jobs that is not answered yet."""
        return any(job.wanted and not job.answered for job in self.jobs)

    def skip(self, seconds: float) -> None:
        """Do not count these seconds, the last ones."""
        self.deadline += seconds
        for job in self.jobs:
            if job.heart is not None:
                job.heart.skip(seconds)

    def late(self, now: float) -> tuple[str, str] | None:
        """The type and text of the error of a run that is over its time, or too long without a heartbeat; None for any other."""
        if now > self.deadline:
            remedy = "its timeout="
            if self.activity.timeout_s is None:
                remedy = "activity_limit_s: raise it, as a longer request_timeout of rest.call needs, or set @kw.activity(timeout=...)"
            return "Timeout", f"had no result within {self.limit_s:g} s ({remedy})"
        silent_s = self.activity.heartbeat_s
        if silent_s is not None and now - max([job.heart.last_s for job in self.jobs if job.heart is not None]) > silent_s:
            return "HeartbeatTimeout", f"gave no heartbeat within {silent_s:g} s (its heartbeat=)"
        return None

    def called(self, bytes_max: _BytesMax, answer: _Answer) -> bytes | None:
        """Call a `def`; return the record that answers, or None for a batch, whose calls are answered one by one."""
        with self.span:
            if self.activity.batched is None:
                [job] = self.jobs
                return carry_out(job.dispatch, self.activity, job.info, bytes_max, failed=job.note)
            calls = self._calls(bytes_max, answer)
            try:
                returned = self.activity.batched.function(calls) if calls else None
            except BaseException as error:
                returned = error
            conclude(self.activity, calls, returned)
            return None

    async def awaited(self, bytes_max: _BytesMax, answer: _Answer) -> bytes | None:
        """Call an `async def`, otherwise like `called`."""
        with self.span:
            if self.activity.batched is None:
                return await self._awaited_one(bytes_max)
            calls = self._calls(bytes_max, answer)
            try:
                await self._ask()
                returned = await self.activity.batched.function(calls) if calls else None
            except BaseException as error:
                returned = error
            conclude(self.activity, calls, returned)
            return None

    async def _awaited_one(self, bytes_max: _BytesMax) -> bytes:
        [job] = self.jobs
        try:
            await self._ask()
            with running_as(job.info):
                bound = self.activity.decode_arguments(job.dispatch.arguments)
                return result_record(job.dispatch, self.activity, await self.activity.function(*bound.args, **bound.kwargs), bytes_max)
        except BaseException as error:
            job.note(error)
            return failure_record(job.dispatch, error, bytes_max[1])

    async def _ask(self) -> None:
        """Ask for the details of earlier attempts now, where it blocks no event loop."""
        hearts = [job.heart for job in self.jobs if job.heart is not None]
        if hearts:
            await on_thread(lambda: [heart.details for heart in hearts])

    def _calls(self, bytes_max: _BytesMax, answer: _Answer) -> list[Call]:
        return calls_of(self.activity, [(job.dispatch, job.info, self._answering(job, bytes_max, answer)) for job in self.jobs])

    def _answering(self, job: Job, bytes_max: _BytesMax, answer: _Answer) -> Callable[[Any, BaseException | None], None]:
        def answering(value: Any, error: BaseException | None) -> None:
            try:
                if error is not None:
                    raise error
                record = result_record(job.dispatch, self.activity, value, bytes_max)
            except BaseException as failed:
                record = failure_record(job.dispatch, failed, bytes_max[1])
                job.note(failed)
            answer(job, record)

        return answering


class Gathered:
    """Calls of an activity with a batch that do not fill one yet; at `due` they are run as a batch anyway.

    They take no room in the window of ready calls: with few slots that is smaller than a batch, and other activities would wait for it to fill.
    """

    __slots__ = ("bytes", "due", "jobs")

    def __init__(self, due: float) -> None:
        self.due = due
        self.jobs: list[Job] = []
        self.bytes = 0

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self.bytes += len(job.dispatch.arguments)

    def remove(self, job: Job) -> None:
        self.jobs.remove(job)
        self.bytes -= len(job.dispatch.arguments)
