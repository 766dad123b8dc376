"""Fan-out: process a thousand items, a limited number at a time; failures do not stop the rest."""

from collections import deque

import kwflow as kw


@kw.activity(timeout=60, retry=kw.Retry(max_attempts=3))
def process_item(item: str) -> int:
    if item.startswith("broken"):
        raise kw.BusinessError("unreadable", item)
    return len(item)


def worker(todo, done, failed):
    """Process items until none are left; all workers share the three containers."""
    while todo:
        item = todo.popleft()
        try:
            done[item] = yield process_item(item)
        except (kw.ActivityError, kw.BusinessError) as error:
            failed[item] = str(error)
        if len(done) % 100 == 0:
            kw.set_status({"done": len(done), "failed": len(failed), "left": len(todo)})


def main(opts):
    """`opts`: {"items": [...], "at_once": 50, "failures_max": 10}.  Returns {"done": {item: result}, "failed": {item: error}}."""
    todo, done, failed = deque(opts["items"]), {}, {}
    yield kw.all([worker(todo, done, failed) for _ in range(opts.get("at_once", 50))])
    if len(failed) > opts.get("failures_max", 10):
        raise kw.BusinessError("too-many-failures", f"{len(failed)} of {len(opts['items'])} failed", {"failed": failed})
    return {"done": done, "failed": failed}
