"""The gateway's OpenAPI document, generated from the code: `GET /openapi.json`, and docs/openapi.json.

Paths and methods come from the routes, inputs and answers from the Operation of each handler, options and bodies from the
structs that are decoded and encoded, problems from KINDS, and prose from docstrings.  The document is the same for every
gateway: it contains no settings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import msgspec
from starlette.routing import Route

import kwflow
from kwflow.errors import KwflowBug
from kwflow.gateway.answers import Made, Running
from kwflow.gateway.gate import CALLBACKS, HEALTH
from kwflow.gateway.operations import ANY, VALUE, Operation, Text, operation_of
from kwflow.gateway.problems import KINDS, Details, RequestError, problem_of

__all__ = ["document"]

_METHODS = ("get", "post")  # HEAD goes with GET
_SCHEMAS = "#/components/schemas/{name}"
_PROBLEM = "application/problem+json"
_JSON = "application/json"
_BODIES = {VALUE: {_JSON: {"schema": {}}}, ANY: {_JSON: {"schema": {}}, "text/plain": {"schema": {"type": "string"}}, "*/*": {"schema": {}}}}
_SEGMENTS = {
    "id": "The workflow: 1 to 512 bytes of UTF-8 without NUL and |, percent-encoded as a whole.",
    "name": "The name of the signal or update.",
    "queue": "The queue of the activity.",
    "ref": "The wait, percent-encoded as a whole.",
}
_SAID = """\
Starts durable workflows, sends them messages, and holds a request until the outcome is known; see docs/HTTP.md.

The body is the value, and options are in the query; unknown ones are refused. Errors are application/problem+json, whose `code` is the word to branch on.
traceparent and tracestate headers are passed on to the workflow. Gateways started with --queue hand out activity calls.
"""


def _operations(routes: Iterable[Route]) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Yield path, method and handler of everything that is served."""
    for route in routes:
        if inspect.isclass(route.endpoint):
            yield from ((route.path, method, getattr(route.endpoint, method)) for method in _METHODS if hasattr(route.endpoint, method))
        else:
            yield from ((route.path, method.lower(), route.endpoint) for method in sorted(route.methods or ()) if method != "HEAD")


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document for these routes."""
    served = list(_operations(routes))
    made = _Document([operation_of(handler) for _, _, handler in served])
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler in served:
        paths.setdefault(path, {})[method] = made.operation(path, method, handler)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kwflow gateway", "version": kwflow.__version__, "description": _SAID, "license": {"name": "MIT", "identifier": "MIT"}},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "One of gateway_tokens; a gateway without tokens does not ask for one."}},
            "responses": dict(sorted(made.responses.items())),
            "examples": {word: {"value": msgspec.to_builtins(problem_of(RequestError(word, kind.title)).body)} for word, kind in sorted(KINDS.items())},
            "schemas": made.schemas,
        },
    }


class _Document:
    """What operations share: the schemas of all structs, and the named responses so far."""

    def __init__(self, all_of_them: list[Operation]) -> None:
        answers = [kind for one in all_of_them for answer in one.answers.values() for kind in _kinds(answer) if not isinstance(kind, Text)]
        bodies = [one.body for one in all_of_them if inspect.isclass(one.body)]
        queries = list(dict.fromkeys(one.options for one in all_of_them if one.options is not None))
        kinds = [*answers, *bodies, Details]
        schemas, self.schemas = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS)
        self._schemas = list(zip(kinds, schemas, strict=True))
        self._queries = {kind: msgspec.json.schema_components([kind])[1][kind.__name__] for kind in queries}
        self.responses: dict[str, Any] = {"problem": {"description": "Any other problem; later versions may have more.", "content": {_PROBLEM: {"schema": self._schema(Details)}}}}

    def _schema(self, kind: Any) -> dict[str, Any]:
        return next(schema for known, schema in self._schemas if known is kind)

    def operation(self, path: str, method: str, handler: Callable[..., Any]) -> dict[str, Any]:
        operation, (summary, more) = operation_of(handler), _prose(handler)
        made: dict[str, Any] = {"operationId": operation.name, "tags": [handler.__module__.rpartition(".")[2]], "summary": summary, **({"description": more} if more else {})}
        if path == HEALTH or path.startswith(CALLBACKS):
            made["security"] = []
        if parameters := [*map(_segment, re.findall(r"{(\w+)}", path)), *self._parameters(operation)]:
            made["parameters"] = parameters
        if operation.body is not None:
            content = _BODIES.get(operation.body)
            made["requestBody"] = {"required": content is None, "content": content or {_JSON: {"schema": self._schema(operation.body)}}}
        answers = {str(status): self._answer(kind) for status, kind in operation.answers.items()}
        return {**made, "responses": {**answers, **self._problems(_words(operation, path, method)), "default": _response("problem")}}

    def _parameters(self, operation: Operation) -> Iterator[dict[str, Any]]:
        if operation.options is None:
            return
        asked = self._queries[operation.options]
        for name, schema in asked["properties"].items():
            yield {"name": name, "in": "query", "required": name in asked.get("required", ()), **_with_description(_without_null(schema))}
        if operation.keyed:
            name = "command_id" if "command_id" in asked["properties"] else "start_id"
            schema = {key: value for key, value in _without_null(asked["properties"][name]).items() if key != "description"}
            yield {"name": "Idempotency-Key", "in": "header", "required": False, "description": f"Another place for {name}.", "schema": schema}

    def _answer(self, answer: Any) -> dict[str, Any]:
        if answer is None:
            return {"description": "Done; no body."}
        kinds = _kinds(answer)
        if isinstance(answer, Text):
            return {"description": answer.description, "content": {answer.media_type: {"schema": {"type": "string"}, "example": answer.example}}}
        schemas = [self._schema(kind) for kind in kinds]
        made: dict[str, Any] = {"description": " ".join(_described(kind) for kind in kinds)}
        if any(kind in (Made, Running) for kind in kinds):
            made["headers"] = {"Location": {"description": "The path of the workflow, or of its outcome.", "schema": {"type": "string"}}}
        return {**made, "content": {_JSON: {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}}}

    def _problems(self, words: set[str]) -> dict[str, Any]:
        """A response for each status.  Responses with the same words are shared."""
        found: dict[str, Any] = {}
        for status in sorted({KINDS[word].http for word in words}):
            same = sorted(word for word in words if KINDS[word].http == status)
            name = "-".join(same)
            if name not in self.responses:
                headers = {header: {"schema": {"type": "string"}} for header in problem_of(RequestError(same[0], "")).headers}
                examples = {word: {"$ref": f"#/components/examples/{word}"} for word in same}
                self.responses[name] = {
                    "description": "; ".join(f"{word}: {KINDS[word].title}" for word in same) + ".",
                    **({"headers": headers} if headers else {}),
                    "content": {_PROBLEM: {"schema": self._schema(Details), "examples": examples}},
                }
            found[str(status)] = _response(name)
        return found


def _words(operation: Operation, path: str, method: str) -> set[str]:
    """The words of all problems that an operation may be answered with."""
    words = {*operation.words, "bug"}
    if path != HEALTH:
        words |= {"busy"} if path.startswith(CALLBACKS) else {"busy", "unauthorized", "web_page"}
    if operation.options is not None:
        words.add("usage")
    if method == "post":  # a body is read, even if there should be none
        words |= {"slow", "too_large"} if operation.body is None else {"slow", "too_large", "bad_json"}
    return words


def _kinds(answer: Any) -> tuple[Any, ...]:
    return () if answer is None else answer if isinstance(answer, tuple) else (answer,)


def _response(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/responses/{name}"}


def _segment(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": _SEGMENTS[name], "schema": {"type": "string"}}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an option without null: an option that is left out is None, but a query has no nulls."""
    if "anyOf" not in schema:
        return schema
    [given] = (one for one in schema["anyOf"] if one != {"type": "null"})
    return {**given, **{name: value for name, value in schema.items() if name not in ("anyOf", "default")}}


def _with_description(schema: dict[str, Any]) -> dict[str, Any]:
    """Move a schema's description to the parameter, where people look for it."""
    about = {"description": schema["description"]} if "description" in schema else {}
    return {**about, "schema": {name: value for name, value in schema.items() if name != "description"}}


def _described(kind: Any) -> str:
    struct = next((one for one in (kind, *get_args(kind)) if inspect.isclass(one) and issubclass(one, msgspec.Struct)), None)
    return _prose(struct)[0] if struct is not None else "JSON."


def _prose(thing: Any) -> tuple[str, str]:
    """The first paragraph of a docstring, and the rest.  Raises KwflowBug if there is no docstring."""
    text = inspect.getdoc(thing)
    if not text:
        raise KwflowBug(f"{thing!r} has no docstring for callers to read")
    first, _, more = text.partition("\n\n")
    return " ".join(first.split()), " ".join(more.split())
