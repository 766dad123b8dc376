"""An order is paid, reserved and shipped; if a step fails for good, the steps before it are undone in reverse order."""

import dataclasses

import kwflow as kw


@dataclasses.dataclass
class Order:
    number: str
    customer: str
    sku: str
    count: int
    cents: int


@kw.activity(timeout=30, retry=kw.Retry(max_attempts=6, first=1, factor=3, max=300))
def charge_card(order: Order) -> str:
    """Return the payment's id.  The service gets the idempotency key, so a second attempt finds the payment of the first."""
    if order.cents > 1_000_000:
        raise kw.BusinessError("declined", "over the card's limit")
    return f"payment-{kw.activity_info().idempotency_key}"


@kw.activity(timeout=30, retry=kw.Retry(max_attempts=None, max=3600))
def refund_card(payment: str) -> None:
    """Must succeed in the end, so it is retried forever."""


@kw.activity(timeout=10)
def reserve_stock(order: Order) -> None:
    if order.count > 100:
        raise kw.BusinessError("sold-out", f"{order.count} of {order.sku} are not in stock", {"left": 100})


@kw.activity(timeout=10, retry=kw.Retry(max_attempts=None, max=3600))
def release_stock(order: Order) -> None: ...


@kw.activity(timeout=60)
def ship_parcel(order: Order) -> str:
    return f"track-{order.number}"


@kw.activity
async def tell_customer(customer: str, text: str) -> None: ...


def main(opts):
    """`opts`: the fields of Order.  Returns {"payment", "tracking"}."""
    order = Order(**opts)
    undo = []
    try:
        payment = yield charge_card(order)
        undo.append(lambda: refund_card(payment))
        yield reserve_stock(order)
        undo.append(lambda: release_stock(order))
        tracking = yield ship_parcel(order)
    except BaseException as error:  # a refusal, an activity that failed for good, or a cancelled order
        for compensate in reversed(undo):
            yield compensate()
        yield tell_customer(order.customer, f"order {order.number} is cancelled: {error}")
        raise
    yield tell_customer(order.customer, f"order {order.number} is on its way: {tracking}")
    return {"payment": payment, "tracking": tracking}
