"""Messages to a workflow that runs: signals, updates, answers to its waits, and what ends, holds or copies it.

What has no answer of its own is 204 once it is committed.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.client import Client, Future
from kwflow.gateway.problems import RequestError
from kwflow.gateway.requests import Options, Seconds, answer, body, checked_json, key_of_request, no_body, options, segment, service_of, trace_of
from kwflow.gateway.workflows import made

__all__ = ["ROUTES"]


class _Signal(Options, frozen=True):
    ttl: Seconds | None = None
    start: str | None = None
    input: str = "null"
    start_id: str | None = None
    command_id: str | None = None


class _Command(Options, frozen=True):
    start_id: str | None = None
    command_id: str | None = None


class _Reasoned(_Command, frozen=True):
    reason: str = ""


class _Fork(_Command, frozen=True):
    new_id: str | None = None


class _Answer(Options, frozen=True):
    error: bool = False


async def _signal(request: Request) -> Response:
    """With `start` it is signal-with-start; an empty one means the default workflow."""
    id, name, asked = segment(request, "id"), segment(request, "name"), options(request, _Signal)
    command_id = key_of_request(request, asked.command_id, "command_id")
    value, client = await body(request), await service_of(request).client()
    if asked.start is None:
        future = client.signal(id, name, value, ttl=asked.ttl, start_id=asked.start_id, command_id=command_id, headers=trace_of(request))
    else:
        start_id = asked.start_id or command_id  # a message that is repeated starts no second run
        workflow, argument = asked.start or None, _input(asked.input)
        future = client.signal_with_start(id, name, value, workflow=workflow, input=argument, ttl=asked.ttl, start_id=start_id, command_id=command_id, headers=trace_of(request))
    await service_of(request).reply(request, future)
    return answer(204)


def _input(text: str) -> msgspec.Raw:
    try:
        return checked_json(text.encode(), "input")
    except UnicodeEncodeError as error:
        raise RequestError("bad_json", f"input is not JSON: {error}") from None


async def _update(request: Request) -> Response:
    id, name, asked = segment(request, "id"), segment(request, "name"), options(request, _Command)
    command_id = key_of_request(request, asked.command_id, "command_id")
    value, client = await body(request), await service_of(request).client()
    return answer(200, await service_of(request).reply(request, client.update(id, name, value, start_id=asked.start_id, command_id=command_id, headers=trace_of(request))))


async def _ref(request: Request) -> Response:
    id, ref, asked = segment(request, "id"), segment(request, "ref"), options(request, _Answer)
    value, client = await body(request), await service_of(request).client()
    headers = trace_of(request)
    future = client.resume(id, ref, headers=headers, error=value) if asked.error else client.resume(id, ref, value, headers=headers)
    await service_of(request).reply(request, future)
    return answer(204)


def _reasoned(send: Callable[[Client, str, _Reasoned, str | None], Future[None]]) -> Callable[[Request], object]:
    """cancel, terminate and pause differ in what is sent only."""

    async def endpoint(request: Request) -> Response:
        id, asked = segment(request, "id"), options(request, _Reasoned)
        command_id = key_of_request(request, asked.command_id, "command_id")
        await no_body(request)
        client = await service_of(request).client()
        await service_of(request).reply(request, send(client, id, asked, command_id))
        return answer(204)

    return endpoint


async def _fork(request: Request) -> Response:
    id, asked = segment(request, "id"), options(request, _Fork)
    command_id = key_of_request(request, asked.command_id, "command_id")
    await no_body(request)
    client = await service_of(request).client()
    return made(request, await service_of(request).reply(request, client.fork(id, asked.new_id, start_id=asked.start_id, command_id=command_id)))


_cancel = _reasoned(lambda client, id, asked, command_id: client.cancel(id, asked.reason, start_id=asked.start_id, command_id=command_id))
_terminate = _reasoned(lambda client, id, asked, command_id: client.terminate(id, asked.reason, start_id=asked.start_id, command_id=command_id))
_pause = _reasoned(lambda client, id, asked, command_id: client.pause(id, asked.reason, start_id=asked.start_id, command_id=command_id))


async def _unpause(request: Request) -> Response:
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
]
