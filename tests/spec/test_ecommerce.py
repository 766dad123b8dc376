"""T-KW-1: the cart, saved to bytes and loaded after every step, with the names, topics and texts of the reference.

The reference starts the next timer after it has read the message. Offsets count every record, so ids match its trace.
"""

import pathlib

import pytest

from kwflow import durable
from kwflow.testing import WorkflowTester

SOURCE = pathlib.Path(__file__).parents[2] / "workflows/ecommerce.py"


@pytest.fixture
def shop() -> WorkflowTester:
    module = durable.load_source("ecommerce", SOURCE.read_text(encoding="utf-8"), str(SOURCE))
    return WorkflowTester(module.main)


def say(shop: WorkflowTester, id: str, **message: object) -> None:
    shop.resume(id, "main", message)


def test_a_cart_is_filled_and_checked_out(shop: WorkflowTester) -> None:
    """T-KW-1."""
    shop.start("thread1", {"abandonedCartTimeoutMS": 2000})
    say(shop, "thread1", type="updateEmail", email="someone@example.com")
    say(shop, "thread1", type="addToCart", quantity=10, productId="teapot")
    shop.start("thread2", {"abandonedCartTimeoutMS": 1000})
    say(shop, "thread2", type="updateEmail", email="vitaliy.akimov@gmail.com")
    for message in (
        {"type": "addToCart", "quantity": 11, "productId": "sigar"},
        {"type": "addToCart", "quantity": 20, "productId": "teapot"},
        {"type": "updateEmail", "email": "vitaliy.akimov@gmail.com"},
        {"type": "removeFromCart", "quantity": 11, "productId": "sigar"},
        {"type": "addToCart", "quantity": 2, "productId": "sugar"},
        {"type": "checkout"},
    ):
        say(shop, "thread1", **message)
    assert shop.outputs_to("workflow-result") == ['{"items":[{"quantity":30,"productId":"teapot"},{"quantity":2,"productId":"sugar"}],"email":"vitaliy.akimov@gmail.com"}']
    assert shop.values("workflow-error") == []
    assert shop.header("thread1") is None
    assert shop.header("thread2") is not None


def test_each_message_sets_a_new_timer_and_then_cancels_the_old_one(shop: WorkflowTester) -> None:
    """T-KW-1: the new timer comes before the cancel."""
    shop.start("thread1", {"abandonedCartTimeoutMS": 2000})
    say(shop, "thread1", type="updateEmail", email="someone@example.com")
    timers = [(output.key, output.value) for output in shop.outputs if output.topic == "workflow-scheduler"]
    assert timers == [(b'thread1|{"ref":"0:1"}', b"2000"), (b'thread1|{"ref":"1:1"}', b"2000"), (b'thread1|{"ref":"0:1"}', b"0")]


def test_an_abandoned_cart_is_reminded_once_and_then_given_up(shop: WorkflowTester) -> None:
    """T-KW-1, extension."""
    shop.start("thread2", {"abandonedCartTimeoutMS": 1000})
    say(shop, "thread2", type="updateEmail", email="vitaliy.akimov@gmail.com")
    shop.advance(1)
    assert shop.outputs_to("ecommerce-reminder") == ["vitaliy.akimov@gmail.com"]
    shop.advance(1)
    assert shop.result("thread2") == "abondoned"
    assert shop.header("thread2") is None


def test_checkout_without_items_is_answered_and_the_cart_goes_on(shop: WorkflowTester) -> None:
    """T-KW-8."""
    shop.start("c", {})
    say(shop, "c", type="updateEmail", email="someone@example.com")
    say(shop, "c", type="checkout")
    assert shop.outputs_to("ecommerce-checkout-error") == ["Must have items to check out!"]
    assert "main" in shop.waits("c")
