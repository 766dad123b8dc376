"""Errors as pages: the status, what went wrong, and what to do about it."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kwflow.console.site import site_of
from kwflow.errors import CommandError, KwflowError, OutcomeUnknown, TransportError, UsageError

__all__ = ["Problem", "answered"]

_STATUSES: tuple[tuple[type[Exception], int, str, str], ...] = (  # the first that fits
    (OutcomeUnknown, 504, "No engine has replied", "it may have been done, or may be done later: look at the instance before you repeat it; an engine must be running"),
    (CommandError, 409, "The engine refuses it", "look at the instance as it is now"),
    (TransportError, 503, "The application cannot be reached", "make sure that the engine's directory or the broker is available; then reload the page"),
    (UsageError, 400, "The request is wrong", "fix what is named"),
    (KwflowError, 500, "It cannot be shown", "see the message"),
)


class Problem(KwflowError):
    """The requested page cannot be shown, or the form cannot be carried out."""

    def __init__(self, status: int, title: str, remedy: str) -> None:
        super().__init__(status, title, remedy)
        self.status = status
        self.title = title
        self.remedy = remedy


def answered(request: Request, error: Exception) -> Response:
    """The page for an error.  An error that is not one of kwflow's is logged with its traceback, and only its type is shown."""
    page = site_of(request).page
    if isinstance(error, Problem):
        return page("problem.html", error.status, title=error.title, detail="", remedy=error.remedy, bare=False)
    if isinstance(error, HTTPException):
        return page("problem.html", error.status_code, title="There is no such page" if error.status_code == 404 else error.detail, detail="", remedy="start from the list of instances", bare=False)
    for kind, status, title, remedy in _STATUSES:
        if isinstance(error, kind):
            return page("problem.html", status, title=title, detail=error.message if isinstance(error, CommandError) and error.message else str(error), remedy=remedy, bare=False)
    logging.getLogger(__name__).error("%s %s failed", request.method, request.scope["path"][:200], exc_info=error)
    return page("problem.html", 500, title="A bug in kwflow", detail=type(error).__name__, remedy="the log of the console has its traceback", bare=False)
