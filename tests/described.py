"""Checks a gateway's answers against its OpenAPI document, for all answers anywhere in the tests."""

import copy
import json
import re
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from kwflow.gateway.application import ROUTES
from kwflow.gateway.openapi import document

_REFUSED = (401, 403, 404, 405, 503)  # possible answers for a path or a method that does not exist


class Described:
    """An OpenAPI document, and a strict copy whose schemas allow no members that they do not name."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        strict = copy.deepcopy(document)
        for schema in strict["components"]["schemas"].values():
            schema["additionalProperties"] = False
        self._registry: Registry[Any] = Registry().with_resource("urn:document", Resource(strict, DRAFT202012))
        self._paths = {template: re.compile(re.sub(r"{\w+}", "[^/]+", template)) for template in document["paths"]}
        self._validators: dict[str, Draft202012Validator] = {}

    def operation_of(self, method: str, path: str) -> dict[str, Any] | None:
        """The operation for a path as it was sent; None if there is none."""
        template = next((template for template, pattern in self._paths.items() if pattern.fullmatch(path)), None)
        found: dict[str, Any] | None = self.document["paths"][template].get(method.lower()) if template is not None else None
        return found

    def check(self, answer: httpx.Response) -> str | None:
        """Check an answer, and return the name of its operation; None for a path or a method that does not exist."""
        path = answer.request.url.raw_path.partition(b"?")[0].decode()
        operation = self.operation_of(answer.request.method, path)
        if operation is None:
            assert answer.status_code in _REFUSED or answer.request.method == "HEAD", f"{answer.request.method} {path} is not in the document"
            return None
        about = f"{answer.request.method} {path} {answer.status_code}"
        if answer.is_success and "400" in operation["responses"]:  # if there is no 400, the query is ignored
            assert set(answer.request.url.params) <= options_of(operation).keys(), about
        assert str(answer.status_code) in operation["responses"], f"{about} is not in the document of {operation['operationId']}"
        self._check_content(about, self._found(operation["responses"][str(answer.status_code)]), answer)
        return str(operation["operationId"])

    def _check_content(self, about: str, response: dict[str, Any], answer: httpx.Response) -> None:
        kind = answer.headers.get("content-type", "").partition(";")[0]
        assert kind in response.get("content", {"": {}}), f"{about} is {kind}"
        if kind == "application/problem+json":
            code = answer.read() and answer.json()["code"]
            assert code in response["content"][kind]["examples"], f"{about}: {code} is not in the document"
        if kind.endswith("json"):
            answer.read()
            self.check_value(response["content"][kind]["schema"], answer.json())

    def check_value(self, schema: dict[str, Any], value: object) -> None:
        """Check a value against a schema.  Raises jsonschema.ValidationError."""
        text = json.dumps(schema).replace('"#/', '"urn:document#/')
        if text not in self._validators:
            self._validators[text] = Draft202012Validator(json.loads(text), registry=self._registry)
        self._validators[text].validate(value)

    def _found(self, response: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in response:
            return response
        found: dict[str, Any] = self.document["components"]["responses"][response["$ref"].rpartition("/")[2]]
        return found


def options_of(operation: dict[str, Any], place: str = "query") -> dict[str, dict[str, Any]]:
    """The parameters of an operation in one place, by name, in their order."""
    return {parameter["name"]: parameter for parameter in operation.get("parameters", ()) if parameter["in"] == place}


GATEWAY = Described(document(ROUTES))


def check(answer: httpx.Response) -> None:
    """A response hook for httpx, which calls it for each response."""
    GATEWAY.check(answer)
