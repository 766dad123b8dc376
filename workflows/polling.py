"""Polling: start a job elsewhere, ask for its state with growing pauses until it is done, and stop it if it takes too long."""

import dataclasses

import kwflow as kw


@dataclasses.dataclass
class Export:
    state: str
    url: str | None = None


@kw.activity(timeout=60)
def start_export(table: str) -> str:
    """Return the job's id; pass the idempotency key on, so that a second attempt does not start a second job."""
    return f"job-{table}"


@kw.activity(timeout=10, retry=kw.Retry(max_attempts=20, max=120))
def export_state(job: str) -> Export:
    return Export("done", f"https://exports.example/{job}")


@kw.activity(timeout=60)
def stop_export(job: str) -> None: ...


def until_done(job):
    pause = 2
    while True:
        export = yield export_state(job)
        if export.state == "done":
            return export.url
        if export.state == "failed":
            raise kw.BusinessError("export-failed", job)
        yield kw.sleep(pause)
        pause = min(2 * pause, 300)


def main(opts):
    """`opts`: {"table", "hours"}.  Returns the URL."""
    job = yield start_export(opts["table"])
    try:
        return (yield kw.timeout(until_done(job), 3600 * opts.get("hours", 6)))
    except TimeoutError:
        yield stop_export(job)
        raise
