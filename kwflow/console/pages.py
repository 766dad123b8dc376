"""The pages that only show something: the list, an instance, dead letters."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kwflow.console.problems import Problem
from kwflow.console.reading import ROWS, checkpoint_number, instance, listed
from kwflow.console.site import site_of
from kwflow.core.wire import Record
from kwflow.errors import UsageError
from kwflow.gateway.requests import segment
from kwflow.runners import letters
from kwflow.runners.instances import STATUSES, Filter, since_ms
from kwflow.runners.outside import text_of

__all__ = ["ROUTES"]

_SAID = {
    "cancel": "kw.Cancelled was raised where it waits.", "pause": "It is paused: records for it are held.", "unpause": "It continues; what was held is applied in order.",
    "terminate": "It was ended without running its code.", "signal": "The signal is in its mailbox.", "retry": "Retry requested; the engine does it.",
    "discard": "Discard requested; the engine does it.", "migrate": "It continues in the code that the engine has now.",
    "rewind": "It was put back to the checkpoint, and continues from there.", "fork": "This is the second instance, which continues from the checkpoint.",
    "kept": "It is paused, and keeps this until it is unpaused.",
    "letter-retry": "The letter was sent again.", "letter-discard": "The letter was closed.",
}  # fmt: skip
_FIELDS = ("status", "workflow", "id", "since", "where", "page")


def _asked(request: Request) -> tuple[Filter, dict[str, str], int]:
    """The filter, the fields as they were filled in, and the number of the page.  Raises UsageError."""
    given = {name: request.query_params.get(name, "").strip() for name in _FIELDS}
    if unknown := set(request.query_params) - {*_FIELDS, "done"}:
        raise UsageError(f"there is no filter {min(unknown)}; there are {', '.join(_FIELDS)}")
    number = given.pop("page") or "1"
    if not number.isdecimal() or len(number) > 6:
        raise UsageError(f"page must be a number, not {number!r}")
    return Filter(given["status"], given["workflow"], given["id"], since_ms(given["since"] or None), tuple(_words(given["where"]))), given, int(number)


def _words(text: str) -> list[str]:
    """Split text as a command line is split: `customer="Ada Lovelace" paid=true`.  Raises UsageError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f'where {text!r}: {error}; write it as customer="Ada Lovelace" paid=true') from None


async def _list(request: Request) -> Response:
    site = site_of(request)
    wanted, given, number = _asked(request)
    found = await site.ask(listed, site, wanted, number)
    filters = {name: value for name, value in given.items() if value}

    def link(**other: object) -> str:
        return f"/?{urlencode({**filters, **other})}"

    options = [word for name in ("status", "workflow", "id", "since") if given[name] for word in (f"--{name}", given[name])]
    command = site.command("list", None, *options, *(word for one in wanted.where for word in ("--where", one)))
    return site.page("list.html", found=found, given=given, statuses=STATUSES, link=link, command=command, rows_max=ROWS, total=sum(found.counts.values()))


async def _instance(request: Request) -> Response:
    site, id = site_of(request), segment(request, "id")
    at = checkpoint_number(request.query_params["at"]) if "at" in request.query_params else None
    found = await site.ask(instance, site, request.app.state.sources, id, at)
    if found is None and at is not None:
        raise Problem(404, f"There is no checkpoint {at} of {id}", "newer ones have replaced it, or there was none; see the page of the instance")
    if found is None:
        raise Problem(404, f"There is no instance {id}", "it has ended and been forgotten (ended_retention_ms), or has another id; see the list of instances")
    return site.page("instance.html", found=found, said=_SAID.get(request.query_params.get("done", "")), command=site.command)


async def _letters(request: Request) -> Response:
    site, reason = site_of(request), request.query_params.get("reason", "")

    def gathered() -> tuple[list[dict[str, Any]], Counter[str]]:
        parked = letters.parked_of(site.config, site.embedded)
        rows = [{"letter": "", "id": id, **one.why, "holds": len(one.hold), "at": one.header.get("updated")} for id, one in parked.items()]
        rows += [_row(identity, letter) for identity, letter in letters.letters_of(site.config, site.embedded).items()]
        return [row for row in rows if reason in ("", row["reason"])], Counter(row["reason"] for row in rows)

    began = time.perf_counter()
    rows, reasons = await site.ask(gathered)
    said = _SAID.get(request.query_params.get("done", ""))
    return site.page("letters.html", rows=rows[:ROWS], more=max(len(rows) - ROWS, 0), reasons=reasons, reason=reason, said=said, command=site.command, took_ms=(time.perf_counter() - began) * 1000)


def _row(identity: str, letter: Record) -> dict[str, Any]:
    reason, message = (letters.note_of(letter, name) or "" for name in ("reason", "message"))
    return {"letter": identity, "id": text_of(letter.key), "reason": reason, "message": message, "holds": None, "at": letter.timestamp_ms}


async def _letter(request: Request) -> Response:
    site, identity = site_of(request), segment(request, "letter")
    letter = (await site.ask(letters.letters_of, site.config, site.embedded)).get(identity)
    if letter is None:
        raise Problem(404, f"There is no open dead letter {identity}", "it has been dealt with, or deleted by retention; see the list of open letters")
    return site.page("letter.html", identity=identity, row=_row(identity, letter), letter=letter, command=site.command)


async def _style(request: Request) -> Response:
    return Response(site_of(request).style(), media_type="text/css")


ROUTES = [
    Route("/", _list), Route("/style.css", _style), Route("/instances/{id}", _instance), Route("/dead-letters", _letters), Route("/dead-letters/{letter}", _letter),
]  # fmt: skip
