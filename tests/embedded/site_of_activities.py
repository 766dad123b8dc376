"""A module of activities for tests that kill engines: what ran is written to a file, and a file opens the gate."""

import os
import pathlib
import time

import kwflow as kw

HERE = pathlib.Path(os.environ["ACTIVITIES_TEST_DIRECTORY"])


def note(line):
    with open(HERE / "ran", "a") as ran:
        ran.write(f"{line}\n")


@kw.activity(retry=kw.Retry(max_attempts=3, first=0.2, jitter=0))
def square(n):
    note(f"square {n} {kw.activity_info().attempt} {kw.activity_info().idempotency_key}")
    while not (HERE / "gate").exists():
        time.sleep(0.01)
    return n * n


@kw.activity(retry=kw.Retry(max_attempts=3, first=0.2, jitter=0))
async def flaky(n):
    note(f"flaky {n}")
    if kw.activity_info().attempt < 3:
        raise ValueError(n)
    return n


@kw.activity(retry=kw.Retry(max_attempts=1))
def leave():
    raise SystemExit(5)


@kw.activity(timeout=0.5, retry=kw.Retry(max_attempts=1))
def hang():
    note("hang")
    while True:
        time.sleep(0.05)


@kw.activity(heartbeat=2, retry=kw.Retry(max_attempts=3, first=0.2, jitter=0))
def copy(files):
    info = kw.activity_info()
    done = info.heartbeat_details or 0
    note(f"copy from {done} in attempt {info.attempt}")
    for n in range(done, files):
        while not (HERE / f"file-{n}").exists():
            info.heartbeat()
            time.sleep(0.01)
        note(f"copied {n}")
        if (HERE / f"file-{n}").read_text() == "damaged" and info.attempt == 1:
            raise OSError(n)
        info.heartbeat(n + 1)
    return done


@kw.workflow
def copies(files):
    return (yield copy(files))


@kw.workflow
def fan_out(count):
    return sum((yield kw.all([square(n) for n in range(count)])))


@kw.workflow
def chain(count):
    total = 0
    for n in range(count):
        total += yield square(n)
    return total


@kw.workflow
def bad(_):
    said = []
    for call in (leave, hang):
        try:
            yield call()
        except kw.ActivityError as error:
            said.append(error.type)
    return [*said, (yield flaky(1))]


@kw.workflow
def spread(count):
    for n in range(count):
        kw.start_child("one", n, detach=True)
    yield kw.suspend("never")


@kw.workflow
def one(n):
    yield square(n)
