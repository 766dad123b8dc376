"""A saga: book a car, a hotel and a flight within a deadline, or undo what was booked."""

import kwflow as kw

kw.declare_topics(*(f"saga-{step}-{kind}" for step in ("reserve", "cancel") for kind in ("car", "hotel", "flight")))


def reserve(kind):
    """Ask for a reservation; somebody answers the ref, perhaps tomorrow."""
    resume = kw.suspend()
    kw.output(resume.id, f"saga-reserve-{kind}")
    try:
        yield resume
    except kw.Cancelled:
        kw.output(resume.id, f"saga-cancel-{kind}")
        raise
    return {"id": resume.id}


def release(kind, item):
    kw.output(item["id"], f"saga-cancel-{kind}")
    return
    yield


def deadline(ms):
    yield kw.sleep(ms / 1000)
    raise kw.WorkflowError("timeout")


def main(opts):
    """`opts`: {"timeout": ms, "throwAfterHotel": bool}, both optional.  Returns {"car": {"id"}, "hotel": ..., "flight": ...}."""
    opts = opts or {}
    undo = []

    def book(kind):
        item = yield reserve(kind)
        undo.append(lambda: release(kind, item))
        if kind == "hotel" and opts.get("throwAfterHotel"):
            raise kw.WorkflowError("something is wrong")
        return item

    try:
        booked = kw.all([book("car"), book("hotel"), book("flight")], wait_rest=True)
        car, hotel, flight = yield kw.race([booked, deadline(opts.get("timeout", 1000))], wait_rest=True)
        return {"car": car, "hotel": hotel, "flight": flight}
    except BaseException:
        yield kw.all([u() for u in undo])
        raise
