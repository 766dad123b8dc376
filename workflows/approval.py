"""Human approval: ask, remind every day, escalate to the manager, and refuse if nobody decides."""

from datetime import timedelta

import kwflow as kw

DAY = timedelta(days=1)


@kw.activity(timeout=30)
def ask_person(person: str, text: str, workflow: str) -> None:
    """Mail a link to a web page that sends the signal `decision` to this workflow."""


def decision_within(time):
    """Return the decision, or None if there is none in time.  A signal that came earlier counts."""
    try:
        return (yield kw.timeout(kw.wait_signal("decision"), time))
    except TimeoutError:
        return None


def main(opts):
    """`opts`: {"what", "approver", "manager"}.  Signal `decision`: {"approved": bool, "by": name}.  Returns it."""
    what = opts["what"]
    for day, text in enumerate(["please decide", "a reminder", "a last reminder"]):
        kw.set_status({"waits_for": opts["approver"], "day": day})
        yield ask_person(opts["approver"], f"{text}: {what}", kw.workflow_id())
        decision = yield decision_within(DAY)
        if decision is not None:
            return decision
    kw.set_status({"waits_for": opts["manager"], "escalated": True})
    yield ask_person(opts["manager"], f"{opts['approver']} did not decide: {what}", kw.workflow_id())
    decision = yield decision_within(3 * DAY)
    return decision or {"approved": False, "by": "nobody"}
