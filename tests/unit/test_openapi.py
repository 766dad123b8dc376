"""docs/openapi.json is what a gateway reports of itself (KWFLOW_REWRITE=1 rewrites it), and what it reports is true."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import ValidationError
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette

from kwflow.gateway.gate import Gate
from tests.described import GATEWAY, Described, options_of
from tests.unit.test_gateway import Asking

FILE = pathlib.Path(__file__).parents[2] / "docs/openapi.json"
TOKEN = "t" * 32
PARTS = {"id": "w", "name": "n", "queue": "q", "ref": "callback-1"}
BODY = {"fail": b'{"message": "m"}', "reject": b'{"code": "c"}'}
OPERATIONS = [(path, method, operation) for path, methods in GATEWAY.document["paths"].items() for method, operation in methods.items()]
CHECKED = [(path, method, operation) for path, method, operation in OPERATIONS if "400" in operation["responses"]]  # those that check their query


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    yield from asking(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def ask_with_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    yield from asking(tmp_path_factory.mktemp("state"), gateway_tokens=[TOKEN])


def asking(directory: pathlib.Path, **settings: Any) -> Iterator[Asking]:
    made = Asking(directory, **settings)
    yield made
    made.service.close()
    made.engine.close()


def sent(ask: Asking, path: str, method: str, query: str = "", **more: Any) -> httpx.Response:
    """Send a request to a path of the document."""
    return ask(method.upper(), path.format(**PARTS) + query, **{"content": BODY.get(path.rpartition("/")[2], b""), **more})


def named(one: Any) -> str:
    return str(one[2]["operationId"])


def canonical(value: Any) -> Any:
    """Sort alternatives, whose order depends on the version of msgspec."""
    if isinstance(value, dict):
        return {name: sorted(map(canonical, one), key=json.dumps) if name == "anyOf" else canonical(one) for name, one in value.items()}
    return [canonical(one) for one in value] if isinstance(value, list) else value


# -- the document --------------------------------------------------------------------------------------------------------
def test_the_file_is_what_a_gateway_serves_to_who_has_a_token(ask_with_tokens: Asking) -> None:
    assert ask_with_tokens("GET", "/openapi.json").status_code == 401
    served = ask_with_tokens("GET", "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    if os.environ.get("KWFLOW_REWRITE"):
        FILE.write_text(json.dumps(served, indent=1) + "\n", encoding="utf-8")
    assert canonical(json.loads(FILE.read_text(encoding="utf-8"))) == canonical(served), "the gateway is another one now: KWFLOW_REWRITE=1 pytest tests/unit/test_openapi.py"


def test_it_is_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(GATEWAY.document).validate()


def test_each_operation_has_a_name_of_its_own_and_says_what_it_does() -> None:
    assert len({operation["operationId"] for _, _, operation in OPERATIONS}) == len(OPERATIONS) > 20
    assert all(operation["summary"].endswith(".") and len(operation["summary"]) < 160 for _, _, operation in OPERATIONS)


# -- what it says is true ---------------------------------------------------------------------------------------------------
def test_every_route_is_in_it_with_its_methods_and_nothing_else(ask: Asking) -> None:
    assert isinstance(ask.application, Gate) and isinstance(ask.application._inner, Starlette)
    assert {getattr(route, "path", route) for route in ask.application._inner.routes} == GATEWAY.document["paths"].keys()
    for path, methods in GATEWAY.document["paths"].items():
        assert set(sent(ask, path, "BREW").headers["allow"].split(", ")) - {"HEAD"} == {method.upper() for method in methods}, path


@pytest.mark.parametrize("one", CHECKED, ids=named)
def test_the_options_of_an_operation_are_those_that_it_takes(ask: Asking, one: Any) -> None:
    path, method, operation = one
    answer = sent(ask, path, method, "?colour=red")
    assert answer.status_code == 400
    assert answer.json()["detail"].partition("there are: ")[2] == (", ".join(options_of(operation)) or "none")


@pytest.mark.parametrize("one", [one for one in CHECKED if one[1] == "post"], ids=named)
def test_an_operation_takes_an_idempotency_key_if_it_says_so(ask: Asking, one: Any) -> None:
    path, method, operation = one
    needed = "&".join(f"{name}=1" for name, option in options_of(operation).items() if option["required"])
    answer = sent(ask, path, method, f"?{needed}", headers={"Idempotency-Key": "x" * 1_201})
    assert ("(or Idempotency-Key) has 1 to 1200 characters" in answer.text) == ("Idempotency-Key" in options_of(operation, "header"))


@pytest.mark.parametrize("one", OPERATIONS, ids=named)
def test_an_operation_asks_for_a_token_if_it_says_so(ask_with_tokens: Asking, one: Any) -> None:
    path, method, operation = one
    assert (sent(ask_with_tokens, path, method, "?colour=red").status_code == 401) == ("security" not in operation)


@pytest.mark.parametrize("one", [one for one in CHECKED if one[1] == "post" and not one[0].startswith("/queues")], ids=named)
def test_an_operation_takes_a_body_if_it_says_so(ask: Asking, one: Any) -> None:
    path, method, operation = one
    answer = sent(ask, path, method, content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_json" if "requestBody" in operation else "usage")


# -- the checks themselves notice a wrong answer -----------------------------------------------------------------------------------
def test_an_answer_that_is_not_in_the_document_is_found() -> None:
    described = Described(GATEWAY.document)

    def answered(status: int, value: Any, kind: str = "application/json") -> httpx.Response:
        return httpx.Response(status, json=value, headers={"content-type": kind}, request=httpx.Request("POST", "http://gateway/workflows/w"))

    made = {"id": "w", "start_id": "s", "new": True}
    assert described.check(answered(201, made)) == "start_workflow"
    problem = {"type": "urn:kwflow:exists", "title": "t", "status": 409, "detail": "d", "code": "exists", "remedy": "r"}
    assert described.check(answered(409, problem, "application/problem+json")) == "start_workflow"
    for status, value, kind in (
        (203, made, "application/json"), (201, made, "text/plain"), (201, {**made, "colour": "red"}, "application/json"), (201, {"id": "w"}, "application/json"),
        (409, {**problem, "code": "locked"}, "application/problem+json"), (410, problem, "application/problem+json"),
    ):  # fmt: skip
        with pytest.raises((AssertionError, ValidationError)):
            described.check(answered(status, value, kind))
