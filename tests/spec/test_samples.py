"""The samples as their how-tos describe them: when all goes well, when something fails or is late, and for as long as they are meant to live."""

import importlib
import pathlib
import statistics
import sys
import time
import types
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

import kwflow as kw
from kwflow import durable, rest
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import HANGS, WorkflowTester

ROOT = pathlib.Path(__file__).parents[2]


def sample(name: str) -> types.ModuleType:
    """The module, loaded as an engine loads a file."""
    path = ROOT / "workflows" / f"{name}.py"
    return durable.load_source(f"sample_{name}", path.read_text(encoding="utf-8"), str(path))


def started(name: str, options: Any, **fakes: Any) -> WorkflowTester:
    tester = WorkflowTester(sample(name).main)
    for activity, function in fakes.items():
        tester.fake(activity, function)
    tester.start("w", options)
    return tester


def signal(tester: WorkflowTester, name: str, value: Any) -> None:
    assert (tester.command("w", "signal", {"name": name, "value": value}) or {})["status"] == "delivered"


def called(tester: WorkflowTester) -> list[str]:
    return [call.activity for call in tester.calls]


def failing(error: BaseException) -> Any:
    def fake(*_: Any) -> None:
        raise error

    return fake


# -- order ---------------------------------------------------------------------------------------------------------------
ORDER = {"number": "7", "customer": "ann", "sku": "cup", "count": 2, "cents": 1000}


def test_an_order_is_charged_reserved_and_shipped() -> None:
    w = started("order", ORDER)
    assert w.result("w") == {"payment": "payment-w|0:1", "tracking": "track-7"}
    assert called(w) == ["charge_card", "reserve_stock", "ship_parcel", "tell_customer"]


def test_an_order_that_is_sold_out_gets_its_money_back() -> None:
    w = started("order", {**ORDER, "count": 200})
    assert called(w) == ["charge_card", "reserve_stock", "refund_card", "tell_customer"]
    assert w.values("workflow-error") == ["BusinessError: sold-out: 200 of cup are not in stock"]


def test_an_order_that_cannot_be_shipped_is_undone_in_reverse_after_its_retries_and_a_refund_goes_on_until_it_works() -> None:
    refused = iter([OSError("down")] * 9)

    def refund(payment: str) -> None:
        for error in refused:
            raise error

    w = started("order", ORDER, ship_parcel=failing(OSError("no carrier")), refund_card=refund)
    w.finish("w")
    assert called(w) == ["charge_card", "reserve_stock", *["ship_parcel"] * 5, "release_stock", *["refund_card"] * 10, "tell_customer"]
    assert w.values("workflow-error") == ["ActivityError: no carrier"]


def test_an_order_that_is_cancelled_while_it_is_shipped_is_undone_too() -> None:
    w = started("order", ORDER, ship_parcel=lambda order: HANGS)
    assert (w.command("w", "cancel") or {})["status"] == "ok"
    assert called(w)[-3:] == ["release_stock", "refund_card", "tell_customer"]


# -- database ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["bob", "nobody"])
def test_a_transfer_is_booked_once_although_each_attempt_ends_before_anybody_hears_of_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """M6.4: what a process commits and cannot tell any more counts, and is not done again. What cannot be paid in is given back."""
    monkeypatch.setenv("BANKS", str(tmp_path))
    bank = sample("database")
    for name, account, cents in (("north", "ada", 1000), ("south", "bob", 0)):
        bank.connect(name).execute("INSERT INTO accounts VALUES (?, ?)", (account, cents))

    def dies(*arguments: Any) -> int:
        balance: int = bank.book.function(*arguments)
        if kw.activity_info().attempt < 3:
            raise ConnectionError("it was booked, but nobody heard of it")
        return balance

    tester = started("database", {"from": ["north", "ada"], "to": ["south", to], "cents": 300}, book=dies)
    tester.finish("w")
    balances = [bank.connect(name).execute("SELECT cents FROM accounts").fetchall() for name in ("north", "south")]
    if to == "bob":
        assert (tester.result("w"), balances) == ([700, 300], [[(700,)], [(300,)]])
    else:
        assert (tester.values("workflow-error"), balances) == (["BusinessError: no_account: nobody"], [[(1000,)], [(0,)]])


# -- approval ------------------------------------------------------------------------------------------------------------
APPROVAL = {"what": "a chair", "approver": "bob", "manager": "eve"}


def test_an_approval_ends_with_the_decision_whenever_it_comes() -> None:
    w = started("approval", APPROVAL)
    w.advance(86_400 + 3600)
    assert [call.arguments["text"] for call in w.calls] == ["please decide: a chair", "a reminder: a chair"]
    signal(w, "decision", {"approved": True, "by": "bob"})
    assert w.result("w") == {"approved": True, "by": "bob"}


def test_an_approval_nobody_gives_is_escalated_and_refused_in_the_end() -> None:
    w = started("approval", APPROVAL)
    w.advance(3 * 86_400)
    assert [call.arguments["person"] for call in w.calls] == ["bob", "bob", "bob", "eve"]
    assert (w.header("w") or {})["status_value"] == {"waits_for": "eve", "escalated": True}
    w.finish("w")
    assert w.result("w") == {"approved": False, "by": "nobody"}


# -- polling -------------------------------------------------------------------------------------------------------------
def test_polling_asks_with_growing_pauses_until_it_is_done() -> None:
    module = sample("polling")
    states = iter(["queued"] * 5 + ["done"])
    asked: list[float] = []

    def state(job: str) -> Any:
        asked.append(w.now_ms / 1000)
        found = next(states)
        return module.Export(found, "url" if found == "done" else None)

    w = WorkflowTester(module.main)
    w.fake("export_state", state)
    w.start("w", {"table": "t"})
    w.finish("w")
    assert w.result("w") == "url"
    assert [round(b - a) for a, b in zip(asked, asked[1:], strict=False)] == [2, 4, 8, 16, 32]


def test_polling_gives_up_and_stops_the_job() -> None:
    module = sample("polling")
    w = WorkflowTester(module.main)
    w.fake("export_state", lambda job: module.Export("queued"))
    w.start("w", {"table": "t", "hours": 1})
    w.finish("w")
    assert w.values("workflow-error") == ["TimeoutError: kw.timeout: not done within 3600 s"]
    assert called(w)[-1] == "stop_export"
    assert len(w.calls) < 30, "pauses grow to five minutes"


# -- fan-out -------------------------------------------------------------------------------------------------------------
def test_what_fails_does_not_stop_the_rest_and_so_many_run_at_a_time() -> None:
    waiting: list[int] = []

    def process(item: str) -> int:
        waiting.append(sum(wait["kind"] == "activity" for wait in (w.header("w") or {})["waits"]))
        if item == "item-9":
            raise kw.BusinessError("bad", item)
        return len(item)

    w = WorkflowTester(sample("fan_out").main)
    w.fake("process_item", process)
    w.start("w", {"items": [f"item-{n}" for n in range(60)], "at_once": 7})
    assert w.result("w")["failed"] == {"item-9": "bad: item-9"}
    assert len(w.result("w")["done"]) == 59
    assert max(waiting) == 7


@pytest.mark.slow
def test_a_thousand_items_on_an_engine_end_with_what_failed(tmp_path: pathlib.Path) -> None:
    held, items = Embedded(tmp_path, sync=False), [f"broken-{n}" if n % 100 == 99 else f"item-{n}" for n in range(1000)]
    config = Config()
    processor = WorkflowProcessor(config, Workflows({"main": sample("fan_out").main}, "main"), frozenset(), held.incarnation)
    held.append(config.resume_topic, b"w", b"new:" + msgspec.json.encode({"items": items}))
    give_up = time.monotonic() + 60
    try:
        held.run([processor, TimerProcessor(config)], lambda: held.end(config.result_topic) > 0 or time.monotonic() > give_up, lambda line: None)
    finally:
        durable.set_abandoning(False, everywhere=True)
    [record] = held.read(config.result_topic)
    held.close()
    found = msgspec.json.decode(record.value or b"")
    assert len(found["done"]) == 990
    assert set(found["failed"]) == {f"broken-{n}" for n in range(99, 1000, 100)}


def test_too_many_failures_are_an_error_that_names_them() -> None:
    w = started("fan_out", {"items": ["a", "b", "c"], "failures_max": 2}, process_item=failing(kw.BusinessError("bad")))
    assert w.values("workflow-error") == ["BusinessError: too-many-failures: 3 of 3 failed"]


# -- agent ---------------------------------------------------------------------------------------------------------------
def test_an_agent_uses_tools_asks_a_person_and_answers() -> None:
    w = started("agent", {"goal": "count"})
    assert (w.header("w") or {})["status_value"] == {"question": "go on after 10 turns?"}
    signal(w, "answer", "yes")
    signal(w, "answer", "yes")
    w.advance(86_400)
    assert w.result("w") == {"answer": "count: 29 turns", "turns": 30}


def test_an_agent_learns_of_tools_that_fail_or_are_not_there() -> None:
    module = sample("agent")
    moves = iter([module.Move(tool="dance"), module.Move(tool="add", argument="x")])
    w = WorkflowTester(module.main)
    w.fake("ask_model", lambda goal, turn, summary, memory: next(moves, module.Move(answer=" | ".join(memory))))
    w.fake("add", failing(kw.BusinessError("no-number", "x")))
    w.start("w", {"goal": "g"})
    assert w.result("w")["answer"] == "dance() = there is no tool 'dance'; there are add, look_up | add(x) = add failed: no-number: x"


@pytest.mark.slow
def test_a_thousand_turns_of_an_agent_cost_what_the_first_ones_did() -> None:
    """The continuation is saved and not a history, so snapshot size and step time stay flat."""
    module = sample("agent")
    sizes: list[int] = []
    times: list[float] = []

    def model(goal: str, turn: int, summary: str, memory: list[str]) -> Any:
        sizes.append(len(w.state.get(b"w") or b""))
        times.append(time.thread_time())  # processor time: other processes of this machine do not count
        return module.Move(answer="done") if turn == 1000 else module.Move(tool="add", argument=f"{turn} 1", summary="so far")

    w = WorkflowTester(module.main)
    w.fake("ask_model", model)
    w.globals_check.active = False  # it would check every module that the tests have loaded
    w.start("w", {"goal": "g", "turns_max": 2000})
    assert w.result("w") == {"answer": "done", "turns": 1000}
    early, late = sizes[100:200], sizes[900:1000]
    assert statistics.median(late) < statistics.median(early) * 1.1, (statistics.median(early), statistics.median(late))
    took = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert statistics.median(took[800:]) < 3 * statistics.median(took[100:300])  # if a history were replayed, it would be six times


# -- subscription --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_subscription_is_charged_every_month_for_ten_years_and_does_not_grow() -> None:
    w = started("subscription", {"customer": "ann", "plan": "basic"})
    w.globals_check.active = False
    sizes = []
    w.advance(86_400)
    for _ in range(10):
        w.advance(365.25 * 86_400)
        sizes.append(len(w.state.get(b"w") or b""))
    assert len(w.calls) == 121
    assert max(sizes) - min(sizes) < 40
    signal(w, "change", {"plan": "gold"})
    w.advance(31 * 86_400)
    assert w.calls[-1].arguments["plan"] == "gold"
    signal(w, "change", {"plan": None})
    assert w.result("w") == {"periods": 122, "reason": "cancelled"}


def test_a_subscription_that_is_not_paid_on_four_days_ends() -> None:
    w = started("subscription", {"customer": "ann", "plan": "basic"}, charge_period=failing(kw.BusinessError("declined")))
    w.finish("w")
    assert w.result("w") == {"periods": 0, "reason": "not paid"}
    assert called(w).count("mail_customer") == 4


def test_months_end_where_they_end() -> None:
    from datetime import datetime

    module = sample("subscription")
    begun = datetime(2024, 1, 31)
    assert [module.months_after(begun, n).date().isoformat() for n in (1, 2, 13, 25)] == ["2024-02-29", "2024-03-31", "2025-02-28", "2026-02-28"]


# -- rest ----------------------------------------------------------------------------------------------------------------
def service(answers: dict[str, Any], sent: list[rest.Sent]) -> Any:
    """Answers of a fake of the request activity, by method and the end of the URL. It notes each request."""

    def fake(asked: rest.Sent) -> rest.Response:
        sent.append(asked)
        return rest.Response(200, answers.get(f"{asked.method} {asked.url.partition('.example')[2]}"))

    return fake


@pytest.mark.parametrize(
    ("answer", "hours", "result"),
    [
        ({"status": "SUCCESS", "revision": "r7"}, 0, {"status": "SUCCESS", "revision": "r7"}),
        ({"status": "broken"}, 0, {"status": "FAILED", "revision": None}),
        (None, 1, {"status": "DIED", "revision": None}),
    ],
)
def test_a_build_calls_back_or_dies_and_the_service_is_told_the_result(answer: Any, hours: int, result: Any) -> None:
    sent: list[rest.Sent] = []
    w = started("rest", {"service": "https://builds.example", "labels": ["a"]}, **{rest.request.name: service({"POST /builds": {"id": 7}}, sent)})
    ref, heartbeat = (urlsplit(sent[0].body[name]).path.split("/")[-1] for name in ("callbackUrl", "heartbeatUrl"))
    for _ in range(40):
        w.advance(290)
        w.resume("w", heartbeat)
    w.advance(3600 * hours)
    w.resume("w", ref, answer)
    assert w.result("w") == result
    assert (sent[-1].url, sent[-1].body, sent[-1].headers_from) == ("https://builds.example/results", result, "build_token")


def test_a_build_that_is_cancelled_is_stopped_and_the_service_is_told() -> None:
    sent: list[rest.Sent] = []
    w = started("rest", {"service": "https://builds.example", "labels": ["a"]}, **{rest.request.name: service({"POST /builds": {"id": 7}}, sent)})
    w.command("w", "cancel")
    w.advance(30)
    assert w.result("w") == {"status": "CANCELLED", "revision": None}
    assert [(asked.method, asked.url) for asked in sent[1:]] == [("DELETE", "https://builds.example/builds/7"), ("POST", "https://builds.example/results")]


# -- all -----------------------------------------------------------------------------------------------------------------
SAMPLES = sorted(path.stem for path in (ROOT / "workflows").glob("*.py") if path.stem not in ("__init__", "demo"))


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_import_only_public_kwflow(name: str) -> None:
    """They are written to be copied."""
    import ast

    for node in ast.walk(ast.parse((ROOT / "workflows" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.name == "kwflow" or alias.name in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] in sys.stdlib_module_names or (node.module, node.names[0].name) == ("kwflow", "rest")
    assert importlib.util.find_spec(f"workflows.{name}") is not None


# -- two applications ----------------------------------------------------------------------------------------------------
class Applications:
    """Two testers. What one writes to the other's input topic is delivered there, as a broker would."""

    def __init__(self) -> None:
        module = sample("two_applications")
        self.orders, self.shipping = WorkflowTester(order=module.order), WorkflowTester(ship=module.ship)

    def bring(self, times: int = 1) -> None:
        for tester, topic, other in ((self.orders, "shipping-resume", self.shipping), (self.shipping, "orders-resume", self.orders)):
            for output in [output for output in tester.outputs if output.topic == topic]:
                for _ in range(times):
                    other.send((output.key or b"").decode(), output.value, {name: (text or b"").decode() for name, text in output.headers})


def test_an_order_is_shipped_by_the_other_application_and_hears_of_it() -> None:
    """DO-1..DO-4, DO-6, X-1: there is no wait between the request and the wait for its answer."""
    both = Applications()
    both.orders.start("7", ["cup"], workflow="order")
    both.bring()
    assert both.shipping.waits("ship-7") and both.orders.waits("7")
    both.shipping.command("ship-7", "signal", {"name": "handed over", "value": "P-1"})
    both.bring()
    assert both.orders.result("7") == "P-1"


def test_a_request_that_comes_twice_starts_one_shipment_and_an_answer_that_comes_twice_counts_once() -> None:
    """DO-3: the reference looks for a running instance first, and two workers may both find none (D2)."""
    both = Applications()
    both.orders.start("7", ["cup"], workflow="order")
    both.bring(3)
    both.shipping.command("ship-7", "signal", {"name": "handed over", "value": "P-1"})
    both.bring(3)
    assert both.orders.result("7") == "P-1" and len(both.shipping.values("workflow-result")) == 1
    assert both.shipping.counts.count("started") == 1


def test_what_shipping_refuses_or_never_answers_the_order_hears() -> None:
    """DO-9, DO-10."""
    both = Applications()
    both.orders.start("7", [], workflow="order")
    both.bring()
    both.bring()
    assert both.orders.result("7") == "not shipped: there is nothing to ship"
    both.orders.start("8", ["cup"], workflow="order")
    both.orders.finish("8")
    assert "TimeoutError" in both.orders.values("workflow-error")[-1]


def test_events_of_two_topics_make_an_order_whichever_comes_first() -> None:
    """docs/how-to/events.md."""
    for first, second in (("orders", "payments"), ("payments", "orders")):
        tester = WorkflowTester(fulfil=sample("events").fulfil)
        sent = {"orders": b'{"id": "7", "items": ["tea"]}', "payments": b'{"order": "7", "cents": 300}'}
        tester.send(None, sent[first], topic=first)
        tester.send("key", sent[second], topic=second)
        assert tester.result("order-7") == "shipped" and tester.values("shipments") == [{"items": ["tea"], "paid": 300}]
        tester.send(None, b'{"id": "8", "items": []}', topic="orders")
        tester.send(None, b'{"order": "9", "cents": 0}', topic="payments")
        tester.send(None, b'{"order": "8", "cents": 5, "refused": true}', topic="payments")
        assert tester.values(tester.config.error_topic) == ["CancelToken"] and tester.ids() == []
