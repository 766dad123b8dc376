"""Orders and payments are topics of other teams: a feed each makes them signals, of which the first starts the order's workflow."""

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
        return None  # nothing was to be paid: nobody waits for it
    if payment.refused:
        return kw.Cancel(f"order-{payment.order}", "the payment was refused")
    return kw.Signal(f"order-{payment.order}", "paid", payment.cents, start="fulfil")


@kw.workflow
def fulfil(_):
    """Of two topics nobody knows which comes first, and a mailbox does not mind."""
    order, cents = yield kw.timeout(kw.all([kw.wait_signal("order"), kw.wait_signal("paid")]), 3 * 86_400)
    kw.output_json({"items": order["items"], "paid": cents}, "shipments")
    return "shipped"
