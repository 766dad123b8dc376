"""Errors as HTTP, and requests that are wrong in themselves. No engine runs."""

import ast
import asyncio
import encodings
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kwflow import errors
from kwflow.client import Client
from kwflow.config import Config, load_config
from kwflow.errors import CommandError, KwflowError, OutcomeError, OutcomeUnknown, ProtocolError, TransportError, UsageError
from kwflow.gateway.application import application
from kwflow.gateway.problems import KINDS, RequestError, problem_of
from kwflow.gateway.queues import travelling
from kwflow.gateway.service import Service
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.instances import newest_of
from tests.described import check

ROOT = pathlib.Path(__file__).parents[2]
DONE = {"ok", "delivered", "started", "duplicate"}
OF_OTHERS = {"bad_delay", "bad_job"}  # reasons of timers and workers, whose records come from engines
BODY_MAX = 100


# -- the table ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "http", "code"),
    [
        *((CommandError(code, "why", "w"), http, code) for code, http in {
            "bad_input": 422, "exists": 409, "unknown_workflow": 404, "not_found": 404, "unknown_ref": 404, "full": 429, "ended": 409, "rejected": 422, "held": 423, "too_large": 413,
            "bad_arguments": 400, "of_a_later_version": 409,
        }.items()),
        *((OutcomeError(kind, "why", "w", "s"), 424, kind) for kind in ("error", "cancelled", "terminated")),
        (OutcomeUnknown("no reply", "id"), 504, "outcome_unknown"), (TransportError("away"), 503, "unreachable"), (errors.FencedError("other"), 503, "unreachable"),
        (ProtocolError("no"), 400, "protocol"), (UsageError("no"), 400, "usage"), (errors.UnknownWorkflowError("no"), 400, "usage"), (RuntimeError("secret"), 500, "bug"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_error_is_one_status(error: Exception, http: int, code: str) -> None:
    problem = problem_of(error)
    assert (problem.http, problem.body.status, problem.body.code, problem.body.type) == (http, http, code, f"urn:kwflow:{code}")
    assert problem.body.detail and problem.body.remedy and "secret" not in problem.body.detail
    assert ("Retry-After" in problem.headers) == (http in (429, 503))


def test_what_an_error_knows_is_in_the_body() -> None:
    """RFC 9457: as extension members."""
    unknown = problem_of(OutcomeUnknown("no reply", "id")).body
    assert unknown.command_id == "id"
    ended = problem_of(OutcomeError("error", {"code": 7}, "w", "s")).body
    assert (ended.id, ended.start_id, ended.outcome, ended.value) == ("w", "s", "error", {"code": 7})


def replied() -> Iterator[str]:
    """Every word with which the code answers a record: the reasons of dead letters and the statuses of replies."""
    for path in [*(ROOT / "kwflow/core").glob("*.py"), *(ROOT / "kwflow/runners").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            places = {"ProtocolError": 1, "Reply": 1, "dead": 2, "answered": 2, "_replied": 2, "refused": 1, "_refuse": 1, "answer": 0, "_answer": 1}
            found = node.args[places[name]] if name in places and len(node.args) > places[name] else None
            if isinstance(found, ast.Constant) and isinstance(found.value, str) and re.fullmatch(r"[a-z_-]+", found.value):
                yield found.value.replace("-", "_")


def test_the_table_knows_every_word_with_which_an_engine_answers() -> None:
    """A new reason needs a row. Without one, it would be a 409 without a remedy."""
    words = set(replied())
    assert len(words) > 15 and {"bad_input", "held", "full", "too_large", "rejected", "wrong_partition"} <= words
    assert words - DONE - OF_OTHERS - KINDS.keys() == set()


def test_every_error_of_kwflow_that_a_client_raises_has_a_status_that_is_no_bug() -> None:
    raised = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, (UsageError, ProtocolError, TransportError)) and error is not KwflowError]
    assert len(raised) > 8
    for kind in raised:
        made = kind({"id": "w"}) if issubclass(kind, errors.ChildError) else kind("why")
        assert problem_of(made).http < 500 or isinstance(made, TransportError)


def test_every_word_of_the_gateway_itself_is_in_the_table() -> None:
    used = {word for path in (ROOT / "kwflow/gateway").glob("*.py") for word in re.findall(r'RequestError\("(\w+)"', path.read_text())}
    assert len(used) > 6
    assert used <= KINDS.keys()
    assert problem_of(RequestError("too_large", "x")).http == 413


# -- calls that are lent -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("over", [0, 1])
def test_the_answer_of_a_call_carries_its_headers_if_there_is_room_for_the_clients_own(over: int) -> None:
    """Semantics §9.3: a record over header_bytes_max would become a dead letter, and its call would never be answered."""
    headers = (("x", b"x" * (3_999 + over)),)
    assert travelling(headers, 5_000) == (() if over else headers)


# -- requests ----------------------------------------------------------------------------------------------------------
class Asking:
    """Requests to a gateway whose engine does not run."""

    def __init__(self, directory: pathlib.Path, **settings: Any) -> None:
        self.config = Config(command_timeout_s=0.2, value_bytes_max=BODY_MAX, **settings)
        self.engine = Embedded(directory, self.config, sync=False)
        self.service = Service(self.config, lambda: Client.embedded(self.engine, self.config), lambda wanted, limit: newest_of((), limit))
        self.application = application(self.service)

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.application), base_url="http://gateway") as http:
                return await http.request(method, path, **more)

        answer = asyncio.run(ask())
        check(answer)
        return answer

    @property
    def written(self) -> int:
        return self.engine.end(self.config.resume_topic)


@pytest.fixture
def ask(tmp_path: pathlib.Path) -> Iterator[Asking]:
    asking = Asking(tmp_path)
    yield asking
    asking.service.close()
    asking.engine.close()


@pytest.mark.parametrize(
    ("method", "path", "content", "http", "detail"),
    [
        ("POST", "/workflows/w?colour=red", b"", 400, "unknown field `colour`; there are: workflow, start_id, wait"),
        ("POST", "/workflows/w?wait=1&wait=2", b"", 400, "wait is given twice"),
        ("POST", "/workflows/w?wait=soon", b"", 400, "Expected `float"),
        ("POST", "/workflows/w?wait=-1", b"", 400, ">= 0"),
        ("POST", "/workflows/w?wait=nan", b"", 400, ">= 0"),
        ("POST", "/workflows/w?wait=inf", b"", 400, "wait=inf is more than 300 s (limit gateway_wait_s_max); wait for less"),
        ("GET", "/workflows/w/outcome?wait=301", b"", 400, "wait=301 is more than 300 s (limit gateway_wait_s_max)"),
        ("POST", "/workflows/w?start_id=", b"", 400, "start_id (or Idempotency-Key) has 1 to 1200 characters, not 0"),
        ("POST", "/workflows/a%7Cb", b"", 400, "must not contain NUL or |"),
        ("POST", "/workflows/a%00b", b"", 400, "must not contain NUL or |"),
        ("POST", "/workflows/%FF", b"", 400, "the id in the path is not UTF-8"),
        ("POST", f"/workflows/{'x' * 513}", b"", 400, "1 to 512 bytes, not 513"),
        ("POST", "/workflows/w", b"{", 400, "the body is not JSON"),
        ("POST", "/workflows/w", b"\xff", 400, "the body is not JSON"),
        ("POST", "/workflows/w", b"[" * 90, 400, "the body is not JSON"),
        ("POST", "/workflows/w", b"1" * (BODY_MAX + 1), 413, f"more than {BODY_MAX} bytes (limit value_bytes_max)"),
        ("POST", "/workflows/w/signals/s?start=ask&input=oops", b"", 400, "input is not JSON"),
        ("POST", "/workflows/w/cancel", b'{"reason": "why"}', 400, "takes no body; pass options in the query"),
        ("POST", "/workflows/w/refs/r?error=perhaps", b"", 400, "Expected `bool`"),
        ("POST", "/callbacks/w/callback-1?x=1", b"", 400, "unknown field `x`; there are: none"),
        ("POST", "/callbacks/w/callback-1", b"1" * (BODY_MAX + 1), 413, "limit value_bytes_max"),
        ("POST", "/workflows/w?start_id=%FF", b"", 400, "the query is not UTF-8"),
        ("GET", "/outcomes?id=%FF", b"", 400, "the query is not UTF-8"),
        ("GET", "/nothing", b"", 404, "GET /nothing"),
        ("GET", "/workflows/w/", b"", 404, "GET /workflows/w/"),
        ("PUT", "/workflows/w", b"", 405, "PUT /workflows/w"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_is_told_what_where_and_the_remedy_and_sends_nothing(ask: Asking, method: str, path: str, content: bytes, http: int, detail: str) -> None:
    answer = ask(method, path, content=content)
    assert (answer.status_code, answer.headers["content-type"]) == (http, "application/problem+json")
    assert detail in answer.json()["detail"] and answer.json()["remedy"]
    assert ask.written == 0


def test_a_body_is_refused_while_it_is_read(ask: Asking) -> None:
    """The limit also holds for a body that comes in chunks, without a length: it is not read to its end."""
    read = []

    async def chunks() -> Any:
        for number in range(1000):
            read.append(number)
            yield b"1" * BODY_MAX

    assert ask("POST", "/workflows/w", content=chunks()).status_code == 413
    assert ask.written == 0


@pytest.mark.parametrize("charset", ["idna", "punycode", "unicode_escape", "Raw-Unicode-Escape", "klingon"])
def test_a_callback_in_what_is_no_charset_is_refused_unread(ask: Asking, charset: str) -> None:
    """Anybody may send a megabyte of punycode. Decoding it takes minutes, in which nobody else is served."""
    answer = ask("POST", "/callbacks/w/callback-1", content=b"a-b", headers={"Content-Type": f"text/plain; charset={charset}"})
    assert (answer.status_code, answer.json()["detail"]) == (400, f"the body is neither JSON nor text in {charset.lower()}")


def test_names_of_charsets_that_callbacks_invent_are_not_kept(ask: Asking) -> None:
    """Python keeps every name that it was ever asked for, and a callback needs no token."""
    names = [f"invented-{n}" for n in range(3)] + ["utf" + "-" * n + "8" for n in range(2, 5)]
    kept = len(encodings._cache)
    for name in names:
        ask("POST", "/callbacks/w/callback-1", content=b"\xff", headers={"Content-Type": f"text/plain; charset={name}"})
    assert len(encodings._cache) <= kept + 1  # utf_8


def test_two_keys_that_differ_are_refused(ask: Asking) -> None:
    answer = ask("POST", "/workflows/w?start_id=a", headers={"Idempotency-Key": "b"})
    assert (answer.status_code, answer.json()["detail"]) == (400, "start_id and Idempotency-Key differ; send only one of them")


def test_no_reply_is_504_with_the_id_under_which_to_repeat_it(ask: Asking) -> None:
    """M1.4: it may have been done, or may be done later."""
    for path, key in (("/workflows/w", "start_id"), ("/workflows/w/signals/s", "command_id"), ("/workflows/w?wait=0", "start_id"), ("/workflows/w?wait=9", "start_id")):
        answer = ask("POST", path, headers={"Idempotency-Key": "mine"})
        assert (answer.status_code, answer.json()["code"], answer.json()["command_id"]) == (504, "outcome_unknown", "mine"), key
    assert not ask.service._client._outcomes._waiters and not ask.service._client._futures._requests


def test_every_method_of_a_path_is_in_allow(ask: Asking) -> None:
    assert {"GET", "POST"} <= set(ask("PUT", "/workflows/w").headers["allow"].split(", "))


def test_requests_are_counted_by_their_path_in_general(ask: Asking) -> None:
    """Ids, and methods that a client makes up, are not used as labels: metrics would grow with each of them."""
    for method, path in (("GET", "/nothing"), ("BREW", "/workflows/w"), ("PUT", "/workflows/v")):
        ask(method, path)
    counted = sorted(re.findall(r"kwflow_gateway_requests_total\{(.*?)\} 1.0", ask("GET", "/metrics").text))
    assert counted == ['method="GET",path="other",status="404"', 'method="PUT",path="/workflows/{id}",status="405"', 'method="other",path="/workflows/{id}",status="405"']


def test_tokens_are_secret_and_long() -> None:
    with pytest.raises(UsageError, match=r"config gateway_tokens: .*a token must have at least 32 characters; make one with: openssl rand -hex 32"):
        load_config(gateway_tokens=["short"])
    assert "xxx" not in repr(load_config(gateway_tokens=["x" * 32]))
