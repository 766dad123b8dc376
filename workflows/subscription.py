"""A subscription: charged every month for years, changed or cancelled by signals, ended if it is not paid."""

from datetime import timedelta

import kwflow as kw


@kw.activity(timeout=60, retry=kw.Retry(max_attempts=5))
def charge_period(customer: str, plan: str, period: int) -> str:
    """Return the invoice's number."""
    return f"{customer}-{period}"


@kw.activity(timeout=60)
def mail_customer(customer: str, text: str) -> None: ...


def months_after(start, count):
    """Return the same day of a later month, or that month's last day."""
    year, month = divmod(start.month - 1 + count, 12)
    day = start.day
    while True:
        try:
            return start.replace(year=start.year + year, month=month + 1, day=day)
        except ValueError:
            day -= 1


def paid(customer, plan, period):
    """Try to charge the period four times, three days apart; return whether it was paid."""
    for attempt in range(4):
        try:
            yield charge_period(customer, plan, period)
            return True
        except (kw.BusinessError, kw.ActivityError) as error:
            yield mail_customer(customer, f"we could not charge you ({error}); attempt {attempt + 1} of 4")
        yield kw.sleep(timedelta(days=3))
    return False


def main(opts):
    """`opts`: {"customer", "plan"}.  Signal `change`: {"plan": name, or null to cancel}.  Returns {"periods", "reason"}."""
    customer, plan = opts["customer"], opts["plan"]
    begun, changes, period = kw.now(), kw.signals("change"), 0
    while True:
        if not (yield paid(customer, plan, period)):
            return {"periods": period, "reason": "not paid"}
        period += 1
        renewal = months_after(begun, period)
        kw.set_status({"plan": plan, "periods": period, "renewal": renewal.isoformat()})
        while kw.now() < renewal:
            try:
                change = yield kw.timeout(changes.wait(), renewal - kw.now())
            except TimeoutError:
                break
            plan = change["plan"]
            if plan is None:
                yield mail_customer(customer, f"cancelled; paid until {renewal:%Y-%m-%d}")
                return {"periods": period, "reason": "cancelled"}
