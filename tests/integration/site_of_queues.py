"""A module of activities with a queue: what ran, and in which process, is written to a file; files open gates."""

import asyncio
import os
import pathlib
import time

import kwflow as kw

HERE = pathlib.Path(os.environ["QUEUES_TEST_DIRECTORY"])
QUEUE = os.environ["QUEUES_TEST_QUEUE"]
MAIL = QUEUE + "-mail"


def note(*what):
    with open(HERE / "ran", "a") as ran:
        ran.write(" ".join(map(str, (os.getpid(), *what))) + "\n")


@kw.activity(queue=QUEUE, retry=kw.Retry(max_attempts=3, first=0.1, jitter=0))
def square(n: int, gate: str | None = None) -> int:
    info = kw.activity_info()
    note("square", info.workflow_id, n, info.attempt, info.idempotency_key)
    while gate is not None and not (HERE / gate).exists():
        if info.wait_cancelled(0.02):
            note("cancelled", info.workflow_id, n)
            return -1
    if n < 0 and info.attempt < 3:
        raise ValueError(n)
    return n * n


@kw.activity(queue=MAIL)
def send_mail(to: str) -> str: ...


@kw.batch_of(send_mail, size=10, within=60.0)
def send_mails(calls):
    note("batch", len(calls))
    return [kw.BusinessError("bounced", call.arguments["to"]) if call.arguments["to"] == "bad" else f"sent to {call.arguments['to']}" for call in calls]


@kw.activity(queue=QUEUE + "-elsewhere")
def elsewhere(n: int) -> int: ...


@kw.activity(queue=QUEUE, retry=kw.Retry(max_attempts=2, first=0.1, jitter=0))
def kill() -> None:
    note("kill", kw.activity_info().attempt)
    os._exit(9)


@kw.activity(queue=QUEUE, heartbeat=2, retry=kw.Retry(max_attempts=3, first=0.1, jitter=0))
def copy(files: int) -> int:
    info = kw.activity_info()
    done = info.heartbeat_details or 0
    note("copy", info.workflow_id, done, info.attempt)
    for n in range(done, files):
        while not (HERE / f"file-{n}").exists():
            info.heartbeat()
            time.sleep(0.01)
        note("copied", info.workflow_id, n)
        info.heartbeat(n + 1)
    return done


@kw.activity(queue=QUEUE, heartbeat=2, retry=kw.Retry(max_attempts=3, first=0.1, jitter=0))
async def copy_later(files: int) -> int:
    return await asyncio.to_thread(copy.function, files)


@kw.workflow
def copies(files):
    return (yield kw.all([copy(files), copy_later(files)]))


@kw.workflow
def poison(_):
    try:
        yield kill()
    except kw.ActivityError as error:
        return error.type


@kw.workflow
def squares(opts):
    return (yield kw.all([square(n, opts.get("gate")) for n in opts["numbers"]]))


@kw.workflow
def late(opts):
    try:
        return (yield kw.timeout(square(opts, "never"), 0.5))
    except TimeoutError:
        return "too late"


@kw.workflow
def mail(to):
    try:
        return (yield send_mail(to))
    except kw.BusinessError as error:
        return f"{error.code}: {error.message}"


@kw.workflow
def foreign(n):
    try:
        return (yield elsewhere(n))
    except kw.ActivityError as error:
        return [error.type, str(error)]
