"""The gateway over a socket, on an embedded engine (AF-30, AF-31, A1-A12)."""

import asyncio
import pathlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import TransportError
from kwflow.gateway import streams
from kwflow.runners.hosted import Hosted
from tests.described import GATEWAY
from tests.embedded.serving import DEADLINE_S, Serving, Stream
from tests.embedded.test_client import workflows
from tests.waiting import until

pytestmark = pytest.mark.slow
TOKEN = "t" * 32


@pytest.fixture
def hosted(tmp_path: pathlib.Path) -> Iterator[Hosted]:
    with Hosted(tmp_path / "state", workflows(), Config(command_timeout_s=10), on_log=lambda _: None) as hosted:
        yield hosted


@pytest.fixture
def make(hosted: Hosted, tmp_path: pathlib.Path) -> Iterator[Callable[..., Serving]]:
    """Makes gateways of that engine."""
    made: list[Serving] = []

    def make(of_this_machine: bool = False, **settings: Any) -> Serving:
        made.append(Serving(hosted.config.model_copy(update=settings), lambda: Client.embedded(hosted.engine, hosted.config), (), tmp_path / "state", of_this_machine))
        return made[-1]

    yield make
    for serving in made:
        serving.close()


@pytest.fixture
def http(make: Callable[..., Serving]) -> httpx.Client:
    return make().http


def said(answer: httpx.Response) -> dict[str, Any]:
    """The body of a refusal."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body: dict[str, Any] = answer.json()
    assert body["status"] == answer.status_code and body["title"] and body["remedy"]
    return body


# -- starts and outcomes -----------------------------------------------------------------------------------------------
def test_each_of_50_callers_gets_exactly_its_own_outcome(make: Callable[..., Serving]) -> None:
    """A1, A2: through two gateways, with callers that wait at the same time."""
    gateways = [make(), make()]

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=DEADLINE_S, limits=httpx.Limits(max_connections=None)) as http:
            return await asyncio.gather(
                *(http.post(f"{gateways[n % 2].url}/workflows/john-{n}", params={"workflow": "greet", "wait": 20}, json={"name": f"John{n}"}) for n in range(50))
            )

    answers = asyncio.run(all_of_them())
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.json()["value"] for answer in answers] == [{"name": f"John{n}", "message": f"Hello John{n}!"} for n in range(50)]
    assert [(answer.json()["id"], answer.json()["outcome"]) for answer in answers] == [(f"john-{n}", "result") for n in range(50)]


def test_a_workflow_that_ends_at_once_is_answered_with_its_outcome(http: httpx.Client) -> None:
    """A3, AF defect 5."""
    for n in range(20):
        answer = http.post(f"/workflows/w{n}", params={"workflow": "big", "wait": 20}, json=3)
        assert (answer.status_code, answer.json()["value"]) == (200, "xxx")


def test_a_start_that_does_not_wait_is_201_and_200_when_it_is_repeated(http: httpx.Client) -> None:
    """K20."""
    first = http.post("/workflows/order%2F7", params={"workflow": "ask", "start_id": "s"}, json={"items": 3})
    assert (first.status_code, first.json(), first.headers["location"]) == (201, {"id": "order/7", "start_id": "s", "new": True}, "/workflows/order%2F7")
    again = http.post("/workflows/order%2F7", params={"workflow": "ask"}, json={"items": 3}, headers={"Idempotency-Key": '"s"'})
    assert (again.status_code, again.json()["new"]) == (200, False)
    assert http.get(first.headers["location"]).json()["status_value"] == {"asked": {"items": 3}}
    other = http.post("/workflows/order%2F7", params={"workflow": "ask"})
    assert (other.status_code, said(other)["code"]) == (409, "exists")


def test_workflows_are_listed_newest_first_by_what_is_asked_for(http: httpx.Client) -> None:
    for n in range(3):
        http.post(f"/workflows/order-{n}", params={"workflow": "ask"}, json={"customer": "Ada" if n else "Bob", "n": n})
    http.post("/workflows/other", params={"workflow": "big", "wait": 20}, json=3)
    everything = http.get("/workflows").json()
    assert everything["counts"] == {"waiting": 3, "ended": 1}
    assert [row["changed"] for row in everything["workflows"]] == sorted([row["changed"] for row in everything["workflows"]], reverse=True)
    asked = http.get("/workflows", params=[("status", "waiting"), ("id", "order-"), ("since", "1h"), ("where", "asked.customer=Ada"), ("where", "asked.n=2")]).json()
    assert [(row["id"], row["workflow"], row["status_value"]["asked"]["n"]) for row in asked["workflows"]] == [("order-2", "ask", 2)]
    assert [wait["kind"] for wait in asked["workflows"][0]["waits"]]
    assert (len(http.get("/workflows", params={"limit": 2}).json()["workflows"]), http.get("/workflows", params={"limit": 2}).json()["counts"]) == (2, everything["counts"])
    for wrong in ({"limit": 5000}, {"limit": 0}, {"status": "asleep"}, {"since": "yesterday"}, {"where": "x"}, {"customer": "Ada"}):
        answer = http.get("/workflows", params=wrong)
        assert (answer.status_code, said(answer)["code"]) == (400, "usage"), wrong


def test_an_id_that_the_gateway_makes_is_the_same_for_the_same_key(make: Callable[..., Serving]) -> None:
    """A caller that does not know whether its start arrived can repeat it at any gateway: there is one run."""
    headers = {"Idempotency-Key": "from-the-mail-4711"}
    first, again = (make().http.post("/workflows", params={"workflow": "ask"}, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert make().http.post("/workflows", params={"workflow": "ask"}).json()["id"] != first.json()["id"]


def test_a_wait_that_is_over_leaves_it_running_and_tells_where_to_ask(http: httpx.Client) -> None:
    """A9, AF defect 6."""
    begun = http.post("/workflows/w", params={"workflow": "ask", "wait": 0.05})
    assert (begun.status_code, begun.json()["status"]) == (202, "waiting")
    place = begun.headers["location"]
    assert place == f"/workflows/w/outcome?start_id={begun.json()['start_id']}"
    for wait in ({}, {"wait": "0.05"}):
        answer = http.get(httpx.URL(place).copy_merge_params(wait))
        assert (answer.status_code, answer.headers["location"]) == (202, place)
    assert http.post("/workflows/w/refs/answer", json=[1, None]).status_code == 204
    ended = http.get(httpx.URL(place).copy_merge_params({"wait": 20}))
    assert (ended.status_code, ended.json()) == (200, {"id": "w", "start_id": begun.json()["start_id"], "outcome": "result", "value": [1, None]})
    assert http.get("/workflows/w/outcome").json() == ended.json()


def test_who_asks_before_the_end_is_answered_at_the_end(make: Callable[..., Serving]) -> None:
    """A5: at another gateway than the one that started it."""
    one, two = make(), make()
    one.http.post("/workflows/w", params={"workflow": "ask"})
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(two.http.get("/workflows/w/outcome", params={"wait": 20})))
    asking.start()
    until(lambda: two.service.waiting)
    one.http.post("/workflows/w/refs/answer", json="late")
    asking.join(DEADLINE_S)
    assert [(answer.status_code, answer.json()["value"]) for answer in answers] == [(200, "late")]


def test_what_is_no_result_has_a_status_of_its_own_and_the_outcome_in_the_body(http: httpx.Client) -> None:
    """A10, AF defect 9."""
    failed = http.post("/workflows/f", params={"workflow": "fail", "wait": 20})
    assert (failed.status_code, said(failed)["outcome"], said(failed)["value"]) == (424, "error", "ValueError: bad")
    for op, outcome, value in (("cancel", "cancelled", "CancelToken"), ("terminate", "terminated", "Terminated: why")):
        started = http.post(f"/workflows/{op}", params={"workflow": "ask"})
        assert http.post(f"/workflows/{op}/{op}", params={"reason": "why"}).status_code == 204
        ended = http.get(f"/workflows/{op}/outcome", params={"wait": 20})
        assert (ended.status_code, said(ended)["outcome"], said(ended)["value"], said(ended)["start_id"]) == (424, outcome, value, started.json()["start_id"])
        assert said(ended)["detail"] == f"{op}: {outcome}: {value}"


def test_the_outcome_of_an_earlier_run_and_one_that_is_too_large_for_its_entry_are_found_in_the_topic(http: httpx.Client) -> None:
    """M4."""
    for name, size in (("one", 2), ("two", 200_000)):
        http.post("/workflows/w", params={"workflow": "big", "start_id": name, "wait": 20}, json=size)
    for name, size in (("one", 2), ("two", 200_000)):
        for wait in (0, 20):
            found = http.get("/workflows/w/outcome", params={"start_id": name, "wait": wait})
            assert (found.status_code, len(found.json()["value"]), found.json()["start_id"]) == (200, size, name)
    assert http.get("/workflows/w/outcome", params={"start_id": "three"}).status_code == 404


@pytest.mark.parametrize("wait", [{}, {"wait": "0"}, {"wait": "20"}])
def test_a_start_that_is_refused_says_why_however_long_its_caller_waits(http: httpx.Client, wait: dict[str, str]) -> None:
    http.post("/workflows/there", params={"workflow": "ask"})
    for id, workflow, status, code in (("a", "nothing", 404, "unknown_workflow"), ("b", "typed", 422, "bad_input"), ("there", "ask", 409, "exists")):
        answer = http.post(f"/workflows/{id}", params={"workflow": workflow, **wait}, json={"sku": 5})
        assert (answer.status_code, said(answer)["code"]) == (status, code)


# -- messages ----------------------------------------------------------------------------------------------------------
def test_signals_updates_and_queries(http: httpx.Client) -> None:
    """M2."""
    http.post("/workflows/w", params={"workflow": "prices"})
    updated = http.post("/workflows/w/updates/price", json=5)
    assert (updated.status_code, updated.json()) == (200, {"was": 5})
    refused = http.post("/workflows/w/updates/price", json=-1)
    assert (refused.status_code, said(refused)["code"], said(refused)["detail"]) == (422, "rejected", "ValueError: negative")
    assert http.get("/workflows/w").json()["status"] == "waiting"
    assert http.post("/workflows/w/signals/stop", params={"ttl": 60}, json="enough").status_code == 204
    assert http.get("/workflows/w/outcome", params={"wait": 20}).json()["value"] == "enough"
    assert said(http.post("/workflows/w/updates/price", json=5))["code"] == "ended"
    for path in ("w/signals/stop", "w/cancel", "w/refs/r", "nobody/signals/stop"):
        assert http.post(f"/workflows/{path}").status_code == 404


def test_where_a_caller_is_in_a_trace_goes_on_in_the_workflow(http: httpx.Client, hosted: Hosted) -> None:
    """W3C Trace Context; no other header of the caller is passed on."""
    place = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}
    http.post("/workflows/t?workflow=ask", json=1, headers={**place, "kwflow-op": "cancel", "tenant": "north"})
    http.post("/workflows/t/refs/answer", json=5, headers={**place, "tracestate": "b=2"})
    assert http.get("/workflows/t/outcome?wait=10").json()["value"] == 5
    [record] = [record for record in hosted.engine.read("workflow-result") if record.key == b"t"]
    assert [(name, value) for name, value in record.headers if not name.startswith("kwflow-")] == [("traceparent", place["traceparent"].encode()), ("tracestate", b"b=2")]
    http.post("/workflows/u?workflow=ask", json=1, headers={"traceparent": "x" * 1_001})
    http.post("/workflows/u/refs/answer", json=5, headers={"traceparent": ""})
    assert http.get("/workflows/u/outcome?wait=10").json()["value"] == 5


def test_a_command_that_is_repeated_under_its_key_is_done_once(http: httpx.Client) -> None:
    """M1.4."""
    http.post("/workflows/w", params={"workflow": "ask"})
    for how in ({"headers": {"Idempotency-Key": "once"}}, {"params": {"command_id": "once"}}):
        assert http.post("/workflows/w/signals/s", json=1, **how).status_code == 204  # type: ignore[arg-type]
    assert http.get("/workflows/w").json()["mailbox"] == {"signal": {"s": 1}}


def test_a_signal_that_starts_is_one_start_when_it_is_repeated(http: httpx.Client) -> None:
    for _ in range(2):
        assert http.post("/workflows/w/signals/s", params={"start": "ask", "input": '"why"'}, json=1, headers={"Idempotency-Key": "k"}).status_code == 204
    shown = http.get("/workflows/w").json()
    assert (shown["status_value"], shown["mailbox"], shown["start_id"]) == ({"asked": "why"}, {"signal": {"s": 1}}, "k")


def test_a_signal_with_start_reaches_a_run_that_was_started_otherwise(http: httpx.Client) -> None:
    """Its key names the run only if it starts one."""
    http.post("/workflows/w", params={"workflow": "ask", "start_id": "s"})
    assert http.post("/workflows/w/signals/s", params={"start": ""}, json=1, headers={"Idempotency-Key": "k"}).status_code == 204
    assert (http.get("/workflows/w").json()["start_id"], http.get("/workflows/w").json()["mailbox"]) == ("s", {"signal": {"s": 1}})


def test_what_is_sent_to_a_parked_workflow_is_kept_and_told_as_that(make: Callable[..., Serving], hosted: Hosted) -> None:
    """K17: 423, and 202 for a callback, whose sender has nothing left to do."""
    http = make().http
    http.post("/workflows/w", params={"workflow": "parks"})
    held = http.post("/callbacks/w/callback-1")
    assert (held.status_code, held.json()) == (202, {"id": "w", "status": "held"})
    assert http.post("/callbacks/w/callback-2").status_code == 202
    refused = http.post("/workflows/w/refs/callback-2")
    assert (refused.status_code, said(refused)["code"]) == (423, "held") and "do not repeat it" in said(refused)["remedy"]
    asked = http.get("/workflows/w/outcome", params={"wait": 0.05})
    assert (asked.status_code, asked.json()["status"]) == (202, "parked")


def test_a_callback_of_a_paused_workflow_is_kept_and_told_as_that(http: httpx.Client) -> None:
    """K17: whoever posts to such a URL has nothing left to do, and is not made to wait."""
    http.post("/workflows/w", params={"workflow": "called"})
    assert http.post("/workflows/w/pause").status_code == 204
    held = http.post("/callbacks/w/callback-%2Fx", json=5)
    assert (held.status_code, held.json()) == (202, {"id": "w", "status": "held"})
    assert http.post("/workflows/w/unpause").status_code == 204
    assert http.get("/workflows/w/outcome", params={"wait": 20}).json()["value"] == 5


def test_an_error_may_answer_a_wait(http: httpx.Client) -> None:
    begun = http.post("/workflows/w", params={"workflow": "ask"})
    assert http.post("/workflows/w/refs/answer", params={"error": "true"}, json={"code": 7}).status_code == 204
    assert http.get("/workflows/w/outcome", params={"wait": 20}).json()["value"] == {"code": 7}
    assert begun.status_code == 201
    assert http.post("/workflows/w/refs/answer").status_code == 404


def test_pause_unpause_and_fork(http: httpx.Client) -> None:
    http.post("/workflows/w", params={"workflow": "ask"})
    assert http.post("/workflows/w/pause", params={"reason": "audit"}).status_code == 204
    assert http.get("/workflows/w").json()["parked"] == {"reason": "paused", "message": "audit"} | http.get("/workflows/w").json()["parked"]
    forked = http.post("/workflows/w/fork")
    assert (forked.status_code, forked.json()["id"].startswith("w/fork-")) == (201, True)
    assert http.post(f"{forked.headers['location']}/refs/answer", json=2).status_code == 204
    assert http.get(f"{forked.headers['location']}/outcome", params={"wait": 20}).json()["value"] == 2
    assert http.post("/workflows/w/unpause").status_code == 204
    assert http.post("/workflows/w/fork", params={"new_id": "w2"}).json()["id"] == "w2"


# -- the document ------------------------------------------------------------------------------------------------------
def test_it_answers_as_its_openapi_document_says(make: Callable[..., Serving]) -> None:
    """As in all other tests of this file: `Serving` checks every answer."""
    serving = make()
    http, stream = serving.http, Stream(serving, "b", "c")
    answers = [
        http.post("/workflows/b?workflow=ask", json={"customer": "Ada"}), http.get("/workflows/b"), http.get("/workflows?where=asked.customer=Ada"), http.get("/workflows/b/outcome"),
        http.post("/workflows/b/signals/hello", json=1), http.post("/workflows/b/fork"), http.post("/workflows/b/refs/answer", json=[]), http.get("/workflows/b/outcome?wait=20"),
        http.post("/workflows/c?workflow=fail&wait=20"), http.post("/callbacks/b/callback-1"), http.post("/queues/q/fetch?worker=w"), http.get("/openapi.json"), http.get("/health"),
    ]  # fmt: skip
    assert [(GATEWAY.check(answer), answer.status_code) for answer in answers] == [
        ("start_workflow", 201), ("get_workflow", 200), ("list_workflows", 200), ("get_outcome", 202), ("signal_workflow", 204), ("fork_workflow", 201), ("answer_ref", 204),
        ("get_outcome", 200), ("start_workflow", 424), ("answer_callback", 410), ("fetch_calls", 404), ("get_openapi", 200), ("get_health", 200),
    ]  # fmt: skip
    assert answers[11].json() == GATEWAY.document
    for _ in range(2):
        GATEWAY.check_value({"$ref": "#/components/schemas/Ended"}, stream.next())


# -- callbacks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "body", "value"),
    [
        ("application/json", b'{"status": "SUCCESS"}', {"status": "SUCCESS"}), ("application/hal+json; charset=utf-8", b"[1]", [1]), ("application/json", b"", None),
        ("text/plain", b"12", "12"), ("text/plain; charset=iso-8859-1", b"gr\xfcn", "grün"), ("application/xml", b"<done/>", "<done/>"),
        ("application/x-www-form-urlencoded", b'{"ok":true}', {"ok": True}), (None, b"done", "done"), (None, b"", None),
    ],
)  # fmt: skip
def test_a_callback_answers_its_wait_once_without_a_token(make: Callable[..., Serving], kind: str | None, body: bytes, value: object) -> None:
    """LR-12: whoever answers knows the URL and nothing else. The second time, nobody waits any more."""
    serving = make(gateway_tokens=Config(gateway_tokens=[TOKEN]).gateway_tokens)
    mine = {"Authorization": f"Bearer {TOKEN}"}
    serving.http.post("/workflows/a%2Fb", params={"workflow": "called"}, headers=mine)
    headers = {"Content-Type": kind} if kind is not None else {}
    assert serving.http.post("/callbacks/a%2Fb/callback-%2Fx", content=body, headers=headers).status_code == 204
    again = serving.http.post("/callbacks/a%2Fb/callback-%2Fx", content=body, headers=headers)
    assert (again.status_code, said(again)["code"]) == (410, "nobody_waits")
    assert serving.http.get("/workflows/a%2Fb/outcome", params={"wait": 20}, headers=mine).json()["value"] == value


def test_a_callback_is_refused_that_is_no_json_is_for_another_ref_or_for_nobody(http: httpx.Client) -> None:
    http.post("/workflows/w", params={"workflow": "ask"})
    assert said(http.post("/callbacks/w/callback-1", content=b"{", headers={"Content-Type": "application/json"}))["code"] == "bad_json"
    assert said(http.post("/callbacks/w/callback-1", content=b"\xff", headers={"Content-Type": "text/plain"}))["code"] == "bad_json"
    deep = said(http.post("/callbacks/w/callback-1", content=b"[" * 300 + b"]" * 300, headers={"Content-Type": "application/json"}))
    assert deep["code"] == "bad_json" and "nested more than 200 levels deep" in deep["detail"]
    assert said(http.post("/callbacks/w/answer"))["code"] == "no_path"
    assert http.post("/callbacks/nobody/callback-1").status_code == 410
    assert http.get("/workflows/w").json()["status"] == "waiting"


# -- outcomes as they come ---------------------------------------------------------------------------------------------
def test_a_stream_tells_each_caller_of_its_own_ids_and_of_each_run_of_them(make: Callable[..., Serving]) -> None:
    """A2, A6, AF-8, defects 1 and 10: three callers, two gateways."""
    one, two = make(), make()
    callers = [Stream(one, "a", "b"), Stream(two, "b"), Stream(two, "c")]
    for id, size in (("a", 1), ("b", 2), ("b", 3), ("c", 4)):
        one.http.post(f"/workflows/{id}", params={"workflow": "big", "wait": 20}, json=size)
    one.http.post("/workflows/a", params={"workflow": "fail"})
    told = [[(event["id"], event["outcome"], event["value"]) for event in (stream.next() for _ in range(count))] for stream, count in zip(callers, (4, 2, 1), strict=True)]
    assert sorted(told[0]) == [("a", "error", "ValueError: bad"), ("a", "result", "x"), ("b", "result", "xx"), ("b", "result", "xxx")]
    assert told[1:] == [[("b", "result", "xx"), ("b", "result", "xxx")], [("c", "result", "xxxx")]]
    assert all(stream.events.empty() for stream in callers)


def test_a_caller_that_connects_again_is_told_what_it_has_missed_once(make: Callable[..., Serving]) -> None:
    """A5, AF defect 7."""
    serving = make()
    for id in ("over", "open"):
        serving.http.post(f"/workflows/{id}", params={"workflow": "ask"})
    serving.http.post("/workflows/over/refs/answer", json="over")
    assert serving.http.get("/workflows/over/outcome", params={"wait": 20}).status_code == 200
    stream = Stream(serving, "over", "open", "nobody", ended="true")
    serving.http.post("/workflows/open/refs/answer", json="open")
    assert [stream.next()["value"] for _ in range(2)] == ["over", "open"]
    serving.http.post("/workflows/nobody", params={"workflow": "big"}, json=1)
    assert stream.next()["value"] == "x"


def test_a_stream_on_which_nothing_comes_is_pinged_and_forgotten_when_its_caller_goes(make: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    """AF-9."""
    assert streams.PING_S == 30
    monkeypatch.setattr(streams, "PING_S", 0.01)
    serving = make()
    client = serving.service._client
    stream = Stream(serving, "a")
    assert [stream.next() for _ in range(3)] == [": ping"] * 3
    assert client._outcomes._subscribers.keys() == {"a"}
    stream.answer.close()
    stream.http.close()
    until(lambda: not client._outcomes._subscribers and not serving.service.waiting)


def test_a_stream_ends_with_its_gateway_and_when_its_client_may_have_missed_something(make: Callable[..., Serving]) -> None:
    """Its caller reconnects: elsewhere, or to a client that receives outcomes."""
    serving, other = make(), make()
    callers = [Stream(serving, "a"), Stream(other, "a")]
    other.service._client.on_gap()
    assert callers[1].next() is None
    callers.append(Stream(other, "a"))
    other.service._client.on_lost(TransportError("the broker has gone"))
    assert callers[2].next() is None
    assert callers[0].events.empty()
    serving.end()
    assert callers[0].next() is None


def test_a_caller_that_does_not_read_is_let_go_before_it_costs_more_than_its_share(make: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit for unread events. When it asks again, it is told of the last run."""
    monkeypatch.setattr(streams, "UNREAD_BYTES_MAX", 100)
    serving = make()
    stream = Stream(serving, "a")
    serving.http.post("/workflows/a", params={"workflow": "big"}, json=200)
    assert stream.next() is None


def test_a_caller_whose_line_is_full_is_let_go_and_keeps_no_place(make: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is sent to it ever arrives, so the end of the stream does not either."""
    monkeypatch.setattr(streams, "UNREAD_BYTES_MAX", 1_000_000)
    monkeypatch.setattr(streams, "_LAST_S", 0.01)
    serving = make()
    serving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit this
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(serving.sock.getsockname())
        caller.sendall(b"GET /outcomes?id=a HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: serving.service._client._outcomes._subscribers)
        for _ in range(6):
            assert serving.http.post("/workflows/a", params={"workflow": "big", "wait": 20}, json=400_000).status_code == 200
        until(lambda: not serving.service._client._outcomes._subscribers and not serving.service.waiting)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("", "1 to 100 ids"), ("?" + "&".join(f"id={n}" for n in range(101)), "not 101"), ("?id=a&colour=red", "unknown 'colour'"), ("?id=a&ended=1", "true or false"),
        ("?id=a%7C", "NUL or |"),
    ],
)  # fmt: skip
def test_a_stream_of_nothing_or_of_too_much_is_refused(http: httpx.Client, query: str, detail: str) -> None:
    answer = http.get(f"/outcomes{query}")
    assert answer.status_code == 400 and detail in said(answer)["detail"]


# -- who may enter, and how many ---------------------------------------------------------------------------------------
def test_with_tokens_every_path_but_health_and_callbacks_asks_for_one(make: Callable[..., Serving]) -> None:
    other = "o" * 32
    http = make(gateway_tokens=Config(gateway_tokens=[TOKEN, other]).gateway_tokens).http
    for path in ("/workflows/w", "/workflows/w/outcome", "/metrics", "/nothing", "/health/", "//health"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer é"}):
            answer = http.get(path, headers=[(name.encode(), value.encode()) for name, value in headers.items()])
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
    assert http.get("/health").json() == {"live": True, "waiting": 0}
    for token in (TOKEN, other):
        assert http.get("/workflows/w", headers={"Authorization": f"bearer {token}"}).status_code == 404


def test_a_gateway_for_this_machine_is_called_by_no_name_that_a_page_can_have(make: Callable[..., Serving]) -> None:
    """DNS rebinding: the page of evil.example lets evil.example resolve to 127.0.0.1, and then asks its own origin."""
    http = make(of_this_machine=True).http
    for host, status in (("localhost:8080", 404), ("127.0.0.1", 404), ("[::1]:8080", 404), ("evil.example:8080", 403), ("127.0.0.1.evil.example", 403), ("", 403)):
        answer = http.get("/workflows/nobody", headers={"Host": host})
        assert (answer.status_code, said(answer)["code"]) == (status, {404: "not_found", 403: "web_page"}[status]), host
    assert http.get("/health", headers={"Host": "evil.example"}).status_code == 200
    assert make().http.get("/workflows/nobody", headers={"Host": "gateway.internal"}).status_code == 404


def test_without_tokens_a_web_page_is_refused(http: httpx.Client) -> None:
    """It could be any page in the browser of somebody who can reach the address."""
    answer = http.post("/workflows/w", params={"workflow": "ask"}, headers={"Origin": "https://elsewhere.example"})
    assert (answer.status_code, said(answer)["code"]) == (403, "web_page")
    assert http.get("/workflows/w").status_code == 404


def test_a_caller_that_hangs_up_is_forgotten(make: Callable[..., Serving]) -> None:
    """AF defect 6: nothing of it is left, neither in the gateway nor in the client."""
    serving = make()
    client = serving.service._client
    serving.http.post("/workflows/w", params={"workflow": "ask"})
    for path in (b"POST /workflows/v?workflow=ask&wait=60", b"GET /workflows/w/outcome?wait=60"):
        with socket.create_connection(("127.0.0.1", serving.sock.getsockname()[1])) as caller:
            caller.sendall(path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: client._outcomes._waiters)
        until(lambda: not client._outcomes._waiters and not client._futures._open and not serving.service.waiting)
    until(lambda: 'path="/workflows/{id}/outcome",status="499"} 1.0' in serving.http.get("/metrics").text)
    assert serving.http.get("/workflows/v").json()["status"] == "waiting"


def test_garbage_harms_nobody(make: Callable[..., Serving]) -> None:
    """A7, AF defect 2."""
    serving = make()
    post = b"POST /workflows/w HTTP/1.1\r\nHost: x\r\n"
    for garbage in (b"\xff\x00garbage\r\n\r\n", post + b"Content-Length: 9\r\n\r\n{", post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"):
        with socket.create_connection(("127.0.0.1", serving.sock.getsockname()[1])) as caller:
            caller.sendall(garbage)
            caller.shutdown(socket.SHUT_WR)
            while caller.recv(1000):
                pass
    assert serving.http.get("/workflows/w").status_code == 404
    until(lambda: not serving.service.waiting)


def test_head_of_a_stream_ends(http: httpx.Client) -> None:
    assert http.head("/outcomes", params={"id": "a"}).headers["content-type"] == "text/event-stream; charset=utf-8"
    assert http.head("/workflows/w").status_code == 404


def test_more_requests_than_may_wait_are_told_so(make: Callable[..., Serving]) -> None:
    serving = make(gateway_waits_max=2)
    serving.http.post("/workflows/w", params={"workflow": "ask"})
    with httpx.Client(base_url=serving.url) as others:
        asking = [threading.Thread(target=lambda: others.get("/workflows/w/outcome", params={"wait": 20}, timeout=DEADLINE_S)) for _ in range(2)]
        for one in asking:
            one.start()
        until(lambda: serving.service.waiting == 2)
        refused = serving.http.get("/workflows/w")
        assert (refused.status_code, refused.headers["retry-after"], said(refused)["code"]) == (503, "1", "busy")
        assert serving.http.get("/health").json() == {"live": True, "waiting": 2}
        serving.end()
        for one in asking:
            one.join(DEADLINE_S)


def test_a_gateway_that_ends_answers_who_waits(make: Callable[..., Serving]) -> None:
    """The caller asks the next gateway; nothing is lost."""
    serving = make()
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(serving.http.post("/workflows/w", params={"workflow": "ask", "wait": 300})))
    asking.start()
    until(lambda: serving.service.waiting)
    serving.end()
    asking.join(DEADLINE_S)
    [answer] = answers
    assert answer.status_code == 202
    other = make().http
    other.post("/workflows/w/refs/answer", json=4)
    assert other.get(answer.headers["location"], params=None).url.query
    assert other.get(httpx.URL(answer.headers["location"]).copy_merge_params({"wait": 20})).json()["value"] == 4


def test_a_client_whose_link_is_lost_is_made_anew(make: Callable[..., Serving]) -> None:
    serving = make()
    lost = serving.service._client
    lost.on_lost(TransportError("the broker has gone"))
    assert serving.http.get("/health").status_code == 200
    assert serving.service._client is not lost
    assert serving.http.post("/workflows/w", params={"workflow": "big", "wait": 20}, json=1).json()["value"] == "x"


def test_while_it_cannot_be_made_anew_requests_are_unreachable(make: Callable[..., Serving]) -> None:
    serving = make()

    def fails() -> Client:
        raise TransportError("no broker at localhost:9092")

    serving.service._connect = fails
    serving.service._client.on_lost(TransportError("the broker has gone"))
    answer = serving.http.get("/workflows/w")
    assert (answer.status_code, said(answer)["code"], said(answer)["detail"], answer.headers["retry-after"]) == (503, "unreachable", "no broker at localhost:9092", "1")
    assert (serving.http.get("/health").status_code, serving.http.get("/health").json()["message"]) == (503, "no broker at localhost:9092")


def test_a_connection_whose_other_end_is_gone_ends_within_two_sweeps_of_30_s(make: Callable[..., Serving]) -> None:
    """A12, AF-9: the kernel checks every connection. What waits or streams on it then learns that it was closed."""
    sock = make().sock
    found = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT") if hasattr(socket, name)}
    assert found == {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 60_000} | found
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert found["TCP_KEEPIDLE"] + found["TCP_KEEPINTVL"] * found["TCP_KEEPCNT"] <= 60
