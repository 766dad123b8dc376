"""The forms: each does what a command does, with the same calls, and leads back to the page of the instance or letter.

A command is for the run that the page showed (its start id): if another run has the id by then, nothing is done.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, quote

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from kwflow.client import Client, Future, Run
from kwflow.console.problems import Problem
from kwflow.console.reading import checkpoint_number
from kwflow.console.site import Site, site_of
from kwflow.core import wire
from kwflow.errors import UsageError
from kwflow.gateway.requests import segment
from kwflow.runners import letters, parked

__all__ = ["ROUTES"]

_READ_S = 10
_BEYOND_VALUE = 10_000  # bytes of a form in addition to its value, which may be three times as long when it is encoded
_FIELDS_MAX = 10
Form = dict[str, str]
_ASKS = {"terminate": "It ends without running its code; its timers, activities and children are cancelled.", "discard": "The record at fault is dropped for good, and the rest is applied."}


def _reason(name: str) -> Callable[[Client, str, Form], Future[Any]]:
    return lambda client, id, form: getattr(client, name)(id, form.get("reason", ""), start_id=form.get("start_id"))


_COMMANDS: dict[str, Callable[[Client, str, Form], Future[Any]]] = {
    "cancel": _reason("cancel"), "pause": _reason("pause"), "terminate": _reason("terminate"),
    "migrate": lambda client, id, form: client.migrate(id, in_place=True, start_id=form.get("start_id")),
    "unpause": lambda client, id, form: client.unpause(id, start_id=form.get("start_id")),
    "fork": lambda client, id, form: client.fork(id, form.get("new_id"), at=checkpoint_number(form.get("at", "")), start_id=form.get("start_id")),
    "rewind": lambda client, id, form: client.rewind(id, checkpoint_number(form.get("at", "")), start_id=form.get("start_id")),
    "signal": lambda client, id, form: client.signal(id, form.get("name", ""), _json(form.get("value", "")), start_id=form.get("start_id")),
}  # fmt: skip


def _json(text: str) -> Any:
    """Decode a value; an empty field is null.  Raises UsageError."""
    try:
        return msgspec.json.decode(text.strip() or "null")
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"the value is not JSON: {error}; quote text, such as \"yes\"") from None


async def _form(request: Request) -> Form:
    """The fields that were filled in; an empty field counts as missing.  Raises UsageError, Problem."""
    site, parts, size = site_of(request), [], 0
    try:
        async with asyncio.timeout(_READ_S):
            async for data in request.stream():
                parts.append(data)
                size += len(data)
                if size > 3 * site.config.value_bytes_max + _BEYOND_VALUE:
                    raise Problem(413, "The form is too large", "a value can have at most value_bytes_max; send a reference to a larger one")
    except (TimeoutError, ClientDisconnect):
        raise Problem(408, "The form did not arrive", "send it again") from None
    try:
        pairs = parse_qsl(b"".join(parts).decode("ascii"), strict_parsing=bool(size), errors="strict", max_num_fields=_FIELDS_MAX)
    except ValueError as error:
        raise UsageError(f"the form cannot be read: {error}") from None
    return {name: value for name, value in pairs if value}


def _commanded(site: Site, op: str, id: str, form: Form) -> tuple[str, str]:
    """Send a command, wait for its reply, and return the id to show then, and what was done.  Raises what the client raises, such as CommandError if the engine refuses it."""
    with site.connect() as client:
        sent = _COMMANDS[op](client, id, form)
        if op in wire.KEPT_WHILE_PAUSED and _kept(sent, client.query(id, start_id=form.get("start_id"))):
            return id, "kept"
        made = sent.result()
    return made.id if isinstance(made, Run) else id, op


def _kept(sent: Future[Any], behind: Future[dict[str, Any]]) -> bool:
    """Whether a paused instance keeps what was sent, and replies when it is unpaused: a query that was sent behind it is answered before it."""
    concurrent.futures.wait((sent, behind), return_when=concurrent.futures.FIRST_COMPLETED)
    return not sent.done() and behind.exception() is None and parked.is_paused(behind.result())


def _settled(site: Site, op: str, what: str) -> None:
    """Retry or discard a parked instance or a letter.  Raises UsageError, Problem."""
    for one in letters.settle(site.config, site.embedded, what, None, op):
        if not one.done:
            raise Problem(409, one.said, f"{site.command('dead-letters show', what)} shows all of it")


async def _act(request: Request) -> Response:
    site, id, op = site_of(request), segment(request, "id"), request.path_params["op"]
    form = await _form(request)
    if op in _COMMANDS:
        id, op = await site.act(_commanded, site, op, id, form)
    elif op in ("retry", "discard"):
        await site.act(_settled, site, op, id)
    else:
        raise Problem(404, "There is no such page", "use the forms on the page of the instance")
    return RedirectResponse(f"/instances/{quote(id, safe='')}?done={op}", 303)


async def _settle(request: Request) -> Response:
    site, identity, op = site_of(request), segment(request, "letter"), request.path_params["op"]
    if op not in ("retry", "discard"):
        raise Problem(404, "There is no such page", "use the forms on the page of the letter")
    await _form(request)
    await site.act(_settled, site, op, identity)
    return RedirectResponse(f"/dead-letters?done=letter-{op}", 303)


async def _confirm(request: Request) -> Response:
    """Ask for confirmation of an action that cannot be undone."""
    site, id, op = site_of(request), segment(request, "id"), request.path_params["op"]
    if op not in _ASKS or site.read_only:
        raise Problem(404, "There is no such page", "use the forms on the page of the instance")
    given = {name: request.query_params.get(name, "") for name in ("reason", "start_id")}
    return site.page("confirm.html", id=id, op=op, asks=_ASKS[op], given=given, command=site.command)


ROUTES = [
    Route("/instances/{id}/{op}", _confirm), Route("/instances/{id}/{op}", _act, methods=["POST"]), Route("/dead-letters/{letter}/{op}", _settle, methods=["POST"]),
]  # fmt: skip
