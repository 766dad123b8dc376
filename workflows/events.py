"""Orders and payments come from other teams' topics: feeds turn them into signals, and the first signal starts the order's workflow."""

from dataclasses import dataclass

import kwflow as kw

kw.declare_topics("shipments")


@dataclass
class Order:
    id: str
    items: list[str]


@dataclass
class Payment:
    order: str
    cents: int
    refused: bool = False


@kw.feed("orders")
def orders(order: Order):
    return kw.Signal(f"order-{order.id}", "order", order, start="fulfil")


@kw.feed("payments")
def payments(payment: Payment):
    if not payment.cents:
        return None  # there was nothing to pay, so nobody waits for it
    if payment.refused:
        return kw.Cancel(f"order-{payment.order}", "the payment was refused")
    return kw.Signal(f"order-{payment.order}", "paid", payment.cents, start="fulfil")


@kw.workflow
def fulfil(_):
    """Wait for both signals; mailboxes keep them, so either may come first."""
    order, cents = yield kw.timeout(kw.all([kw.wait_signal("order"), kw.wait_signal("paid")]), 3 * 86_400)
    kw.output_json({"items": order["items"], "paid": cents}, "shipments")
    return "shipped"
