"""A shopping cart that waits for its owner: it takes messages on ref "main" and sends a reminder when it is abandoned."""

import kwflow as kw

kw.declare_topics("ecommerce-reminder", "ecommerce-checkout-error")


def main(opts):
    """`opts`: {"abandonedCartTimeoutMS": ms}.  Returns the cart at checkout, or "abondoned" after the reminder."""
    timeout_ms = opts.get("abandonedCartTimeoutMS", 1000)
    items = {}
    email = ""
    reminded = False

    def cart():
        return {"items": [{"quantity": quantity, "productId": product} for product, quantity in items.items()], "email": email}

    message = kw.suspend("main")
    while True:
        timer = kw.sleep(timeout_ms / 1000)
        which, value = yield kw.race({"message": message, "timer": timer}, cancel_rest=False)
        if which == "timer":
            if reminded or not email:
                kw.cancel(message)
                return "abondoned"
            kw.output(email, "ecommerce-reminder")
            reminded = True
            continue
        reminded = False
        message = kw.suspend("main")
        kw.cancel(timer)
        match value:
            case {"type": "updateEmail", "email": str(new)}:
                email = new
            case {"type": "addToCart", "quantity": int(quantity), "productId": str(product)}:
                items[product] = items.get(product, 0) + quantity
            case {"type": "removeFromCart", "quantity": int(quantity), "productId": str(product)}:
                left = items.get(product, 0) - quantity
                if left > 0:
                    items[product] = left
                else:
                    items.pop(product, None)
            case {"type": "checkout"}:
                error = "Must have email to check out!" if not email else "Must have items to check out!" if not items else None
                if error is None:
                    kw.cancel(message)
                    return cart()
                kw.output(error, "ecommerce-checkout-error")
