"""Orders and shipping are two applications: each starts or answers the other with a record in its input topic."""

import json

import kwflow as kw

ORDERS, SHIPPING = "orders-resume", "shipping-resume"  # the `resume_topic` of each application
kw.declare_topics(ORDERS, SHIPPING)


# -- the orders application ---------------------------------------------------------------------------------------------------
@kw.workflow
def order(items):
    """Return the parcel's number, or why there is none."""
    id, answer = kw.workflow_id(), kw.suspend()
    request = {"items": items, "answer": {"topic": ORDERS, "id": id, "ref": answer.id}}
    start = {"kwflow-workflow": "ship", "kwflow-start-id": f"{id} {answer.id}"}
    kw.output(f"new:{json.dumps(request)}", SHIPPING, key=f"ship-{id}", headers=start)
    try:
        return (yield kw.timeout(answer, 3 * 86_400))
    except kw.WorkflowError as error:  # shipping answered with an error
        return f"not shipped: {error.payload}"


# -- the shipping application -------------------------------------------------------------------------------------------
def tell(whom, **what):
    kw.output_json({"ref": whom["ref"], **what}, whom["topic"], key=whom["id"])


@kw.workflow
def ship(request):
    """Answer when the parcel is handed over, which may take days; the signal `handed over` brings its number."""
    if not request["items"]:
        tell(request["answer"], error="there is nothing to ship")
        return
    number = yield kw.wait_signal("handed over")
    tell(request["answer"], value=number)
