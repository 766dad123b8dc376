"""Messages to a running workflow: signals, updates, answers to its waits, and commands that end, hold or copy it.

A message without an answer of its own is answered with 204 once it is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.client import Client, Future
from kwflow.gateway.answers import Made
from kwflow.gateway.operations import ENGINE, HOLD, VALUE, Operation
from kwflow.gateway.problems import RequestError
from kwflow.gateway.requests import CommandId, Options, Seconds, StartId, answer, body, checked_json, key_of_request, no_body, options, segment, service_of, trace_of
from kwflow.gateway.workflows import made

__all__ = ["ROUTES"]


class _Command(Options, frozen=True):
    start_id: StartId | None = None
    command_id: CommandId | None = None


class _Signal(_Command, frozen=True):
    ttl: Annotated[Seconds | None, Meta(description="Seconds after which it is no longer delivered.")] = None
    start: Annotated[str | None, Meta(description="Start this workflow if none runs under the id, with the signal in its mailbox, as the run named by start_id; empty: the default workflow.")] = None
    input: Annotated[str, Meta(description="Input of that start, as JSON.")] = "null"


class _Reasoned(_Command, frozen=True):
    reason: str = ""


class _Fork(_Command, frozen=True):
    new_id: Annotated[str | None, Meta(description="Id of the copy; by default the engine makes one.")] = None
    at: Annotated[int | None, Meta(description="Number of the checkpoint from which it continues; by default the present state.")] = None
    paused: Annotated[bool, Meta(description="It continues only when it is unpaused.")] = False


class _Rewind(_Command, frozen=True, kw_only=True):
    to: Annotated[int, Meta(description="Number of the checkpoint.")]


class _Answer(Options, frozen=True):
    error: Annotated[bool, Meta(description="Raise the value at the wait, as kw.WorkflowError.")] = False


_RUNS = (*ENGINE, "bad_arguments", "not_found", "repeated")  # of messages for which there must be a run


@Operation("signal_workflow", {204: None}, _Signal, VALUE, keyed=True, words=(*_RUNS, *HOLD, "bad_input", "full", "unknown_workflow"))
async def _signal(request: Request) -> Response:
    """Put a value into the mailbox of a workflow; with `start`, also of one that is not there yet."""
    id, name, asked = segment(request, "id"), segment(request, "name"), options(request, _Signal)
    command_id = key_of_request(request, asked.command_id, "command_id")
    value, client = await body(request), await service_of(request).client()
    if asked.start is None:
        future = client.signal(id, name, value, ttl=asked.ttl, start_id=asked.start_id, command_id=command_id, headers=trace_of(request))
    else:
        start_id = asked.start_id or command_id  # so that a repeated message does not start a second run
        workflow, argument = asked.start or None, _input(asked.input)
        future = client.signal_with_start(id, name, value, workflow=workflow, input=argument, ttl=asked.ttl, start_id=start_id, command_id=command_id, headers=trace_of(request))
    await service_of(request).reply(request, future)
    return answer(204)


def _input(text: str) -> msgspec.Raw:
    try:
        return checked_json(text.encode(), "input")
    except UnicodeEncodeError as error:
        raise RequestError("bad_json", f"input is not JSON: {error}") from None


@Operation("update_workflow", {200: Any}, _Command, VALUE, keyed=True, words=(*_RUNS, *HOLD, "ended", "full", "rejected"))
async def _update(request: Request) -> Response:
    """Send a value that the workflow answers; the reply is its answer."""
    id, name, asked = segment(request, "id"), segment(request, "name"), options(request, _Command)
    command_id = key_of_request(request, asked.command_id, "command_id")
    value, client = await body(request), await service_of(request).client()
    return answer(200, await service_of(request).reply(request, client.update(id, name, value, start_id=asked.start_id, command_id=command_id, headers=trace_of(request))))


@Operation("answer_ref", {204: None}, _Answer, VALUE, words=(*ENGINE, *HOLD, "not_found", "unknown_ref"))
async def _ref(request: Request) -> Response:
    """Answer a wait with a value."""
    id, ref, asked = segment(request, "id"), segment(request, "ref"), options(request, _Answer)
    value, client = await body(request), await service_of(request).client()
    headers = trace_of(request)
    future = client.resume(id, ref, headers=headers, error=value) if asked.error else client.resume(id, ref, value, headers=headers)
    await service_of(request).reply(request, future)
    return answer(204)


def _reasoned(operation: Operation, said: str, send: Callable[[Client, str, _Reasoned, str | None], Future[None]]) -> Callable[[Request], object]:
    """Make the handler for cancel, terminate or pause, which differ only in what they send."""

    async def endpoint(request: Request) -> Response:
        id, asked = segment(request, "id"), options(request, _Reasoned)
        command_id = key_of_request(request, asked.command_id, "command_id")
        await no_body(request)
        client = await service_of(request).client()
        await service_of(request).reply(request, send(client, id, asked, command_id))
        return answer(204)

    endpoint.__doc__ = said
    return operation(endpoint)


@Operation("fork_workflow", {200: Made, 201: Made}, _Fork, keyed=True, words=(*_RUNS, "exists", "rejected"))
async def _fork(request: Request) -> Response:
    """Let a second instance continue, under another id, from where this one waits, or from a checkpoint of it."""
    id, asked = segment(request, "id"), options(request, _Fork)
    command_id = key_of_request(request, asked.command_id, "command_id")
    await no_body(request)
    client = await service_of(request).client()
    return made(request, await service_of(request).reply(request, client.fork(id, asked.new_id, at=asked.at, paused=asked.paused, start_id=asked.start_id, command_id=command_id)))


@Operation("rewind_workflow", {204: None}, _Rewind, keyed=True, words=(*_RUNS, "parked", "rejected"))
async def _rewind(request: Request) -> Response:
    """Put a workflow back to a checkpoint, from which it continues."""
    id, asked = segment(request, "id"), options(request, _Rewind)
    command_id = key_of_request(request, asked.command_id, "command_id")
    await no_body(request)
    client = await service_of(request).client()
    await service_of(request).reply(request, client.rewind(id, asked.to, start_id=asked.start_id, command_id=command_id))
    return answer(204)


_cancel = _reasoned(
    Operation("cancel_workflow", {204: None}, _Reasoned, keyed=True, words=(*_RUNS, *HOLD)),
    "Raise Cancelled at the innermost waits of a workflow.",
    lambda client, id, asked, command_id: client.cancel(id, asked.reason, start_id=asked.start_id, command_id=command_id),
)
_terminate = _reasoned(
    Operation("terminate_workflow", {204: None}, _Reasoned, keyed=True, words=_RUNS),
    "End a workflow without running its code.",
    lambda client, id, asked, command_id: client.terminate(id, asked.reason, start_id=asked.start_id, command_id=command_id),
)
_pause = _reasoned(
    Operation("pause_workflow", {204: None}, _Reasoned, keyed=True, words=_RUNS),
    "Hold all records for a workflow from now on.",
    lambda client, id, asked, command_id: client.pause(id, asked.reason, start_id=asked.start_id, command_id=command_id),
)


@Operation("unpause_workflow", {204: None}, _Command, keyed=True, words=_RUNS)
async def _unpause(request: Request) -> Response:
    """Apply what was held, in order, and continue."""
    id, asked = segment(request, "id"), options(request, _Command)
    command_id = key_of_request(request, asked.command_id, "command_id")
    await no_body(request)
    client = await service_of(request).client()
    await service_of(request).reply(request, client.unpause(id, start_id=asked.start_id, command_id=command_id))
    return answer(204)


ROUTES = [
    Route("/workflows/{id}/signals/{name}", _signal, methods=["POST"]),
    Route("/workflows/{id}/updates/{name}", _update, methods=["POST"]),
    Route("/workflows/{id}/refs/{ref}", _ref, methods=["POST"]),
    Route("/workflows/{id}/cancel", _cancel, methods=["POST"]),
    Route("/workflows/{id}/terminate", _terminate, methods=["POST"]),
    Route("/workflows/{id}/pause", _pause, methods=["POST"]),
    Route("/workflows/{id}/unpause", _unpause, methods=["POST"]),
    Route("/workflows/{id}/fork", _fork, methods=["POST"]),
    Route("/workflows/{id}/rewind", _rewind, methods=["POST"]),
]
