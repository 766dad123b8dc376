"""What all pages share: which application they are about, how it is queried, and how a page is rendered.

Whatever reads or waits runs in a thread, and only a few at a time: a console would rather be slow than burden the application.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from kwflow.client import Client
from kwflow.config import Config
from kwflow.console import words
from kwflow.runners.instances import instant
from kwflow.runners.outside import text_of

__all__ = ["Site", "site_of"]

_T = TypeVar("_T")
_ASKED_MAX = 4  # at a time; and as many commands, which may be waiting for an engine that does not run


class Site:
    """One console.  `options` are the command-line options that say where the application is."""

    def __init__(self, config: Config, embedded: Path | None, connect: Callable[[], Client], options: Sequence[str] = (), directory: Path | None = None, read_only: bool = False) -> None:
        self.config = config
        self.embedded = embedded
        self.connect = connect
        self.directory = directory or Path.cwd()  # where modules are looked for, to compare them with those of an instance
        self.read_only = read_only
        self._options = options
        self._asking, self._acting = asyncio.Semaphore(_ASKED_MAX), asyncio.Semaphore(_ASKED_MAX)
        self._templates = Environment(loader=PackageLoader("kwflow.console"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self._templates.filters |= {"segment": lambda text: quote(text, safe=""), "bytes": words.size}

    @property
    def place(self) -> str:
        return str(self.embedded) if self.embedded is not None else self.config.bootstrap_servers

    async def ask(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Run a call that reads, in a thread, and return its result."""
        async with self._asking:
            return await run_in_threadpool(call, *arguments)

    async def act(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Run a call that changes something, in a thread, and return its result."""
        async with self._acting:
            return await run_in_threadpool(call, *arguments)

    def command(self, op: str, of: str | None = None, *options: str) -> str:
        """The command line that does the same, `of` an instance or letter; an id that begins with - comes after all options."""
        last = of is not None and of.startswith("-")
        return shlex.join(["kwflow", *op.split(), *([of] if of is not None and not last else []), *options, *self._options, *(["--", of] if of is not None and last else [])])

    def page(self, template: str, status: int = 200, **shown: Any) -> Response:
        now_ms = time.time_ns() // 1_000_000
        text = self._templates.get_template(template).render(site=self, when=lambda ms: words.when(ms, now_ms), now=instant(now_ms), text_of=text_of, **shown)
        return Response(text.encode("utf-8", "backslashreplace"), status, media_type="text/html; charset=utf-8")

    def style(self) -> str:
        return self._templates.get_template("style.css").render()


def site_of(request: Request) -> Site:
    site: Site = request.app.state.site
    return site
