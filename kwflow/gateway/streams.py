"""`GET /outcomes?id=a&id=b`: outcomes as they arrive, as Server-Sent Events (AF-4, AF-8, AF-9).

Outcomes go in one direction, so this needs no second protocol: any HTTP client can read it, proxies know it, and browsers
reconnect by themselves.  A stream has one caller and that caller's ids, and its buffer is bounded: a caller that reads too
slowly is disconnected, and asks again with `ended=true`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kwflow.client import Client, Outcome
from kwflow.errors import TransportError, UsageError
from kwflow.gateway import endings
from kwflow.gateway.operations import ENGINE, Operation, Text
from kwflow.gateway.requests import Options, query, service_of
from kwflow.gateway.service import Service, hung_up

__all__ = ["PING_S", "ROUTES", "UNREAD_BYTES_MAX"]

PING_S = 30.0  # AF-9; a proxy may take a connection for dead on which nothing comes
UNREAD_BYTES_MAX = 8_000_000  # of one stream: eight outcomes of the largest size
_LAST_S = 1.0  # for data that is under way when a stream ends: a caller that reads has it by then
_IDS_MAX = 100  # of one stream, as all of them are in its URL
_FIRST = b"retry: 1000\n\n"  # ms until a browser reconnects


class _Followed(Options, frozen=True):
    """The options, for the document; `_asked` reads them."""

    id: Annotated[list[str], Meta(min_length=1, max_length=_IDS_MAX, description="The workflows.")]
    ended: Annotated[bool, Meta(description="First send the last run of each id, if it has ended.")] = False


class _Stream(Response):
    """One caller, and the events that are still to be sent to it.  Invariant: all but `on_outcome` and `on_missed` is called on the event loop."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, client: Client, ids: list[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._service = service
        self._client = client
        self._ids = ids
        self._loop = asyncio.get_running_loop()
        self._unread = deque([_FIRST])
        self._size = len(_FIRST)
        self._over = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._told: set[tuple[str, str]] = set()  # runs whose outcome was sent, from a query or the topic, until all queries are done
        self._asking = True
        self._unsubscribe: list[Callable[[], None]] = []

    def on_outcome(self, outcome: Outcome) -> None:
        """Called on the client's thread."""
        self._on_loop(self.put, outcome)

    def on_missed(self) -> None:
        """Called on the client's thread.  Ends the stream: a caller that reconnects with `ended=true` gets what was missed."""
        self._on_loop(self.end)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its callers with it
            self._loop.call_soon_threadsafe(call, *arguments)

    def put(self, outcome: Outcome) -> None:
        """Queue an outcome, once for each run, although both a query and the topic may bring it."""
        if (outcome.id, outcome.start_id) in self._told or self._over:
            return
        if self._asking:
            self._told.add((outcome.id, outcome.start_id))
        event = b"event: outcome\ndata: " + msgspec.json.encode(endings.event_of(outcome)) + b"\n\n"
        self._size += len(event)
        if self._size > UNREAD_BYTES_MAX:
            self.end()
        else:
            self._unread.append(event)
        self._changed.set()

    def end(self) -> None:
        """Send nothing more."""
        self._over = True
        self._unread.clear()
        self._changed.set()
        self._ended.set()

    async def begin(self, request: Request, ended: bool) -> None:
        """Subscribe; once this returns, no outcome of these ids is missed.

        With `ended`, the outcomes of runs that have ended already come first.  Raises UsageError, TransportError, Gone.
        """
        try:
            await asyncio.to_thread(self._subscribe)
            for id in self._ids if ended else ():
                outcome = await endings.of_last_run(request, self._client, id)
                if outcome is not None:
                    self.put(outcome)
        except BaseException:
            self._forget()
            raise
        self._asking = False

    def _subscribe(self) -> None:
        """Subscribe to each id, in a thread, as that waits for the broker to say where a partition ends."""
        try:
            for id in self._ids:
                self._unsubscribe.append(self._client.subscribe(id, self.on_outcome, self.on_missed))
        except TimeoutError:
            raise TransportError(f"{id} could not be followed within {self._service.config.command_timeout_s:g} s") from None

    def _forget(self) -> None:
        for unsubscribe in self._unsubscribe:
            unsubscribe()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            self.end()
        gone, sending = self._loop.create_task(hung_up(receive)), self._loop.create_task(self._send(send))
        gone.add_done_callback(lambda _: self.end())
        sending.add_done_callback(lambda _: self.end())
        try:
            with self._service.at_end(self.end):
                await self._ended.wait()
                await asyncio.wait([sending], timeout=_LAST_S)
            if sending.done():
                sending.result()
        finally:
            gone.cancel()
            sending.cancel()  # the caller does not read, so the send might never end
            self._forget()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while not self._over:
            await send({"type": "http.response.body", "body": await self._next(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes:
        """The next event, or a ping if there is none for a while."""
        if not self._unread:
            self._changed.clear()
            try:
                async with asyncio.timeout(PING_S):
                    await self._changed.wait()
            except TimeoutError:
                return b": ping\n\n"
        event = self._unread.popleft() if self._unread else b""
        self._size -= len(event)
        return event


def _asked(request: Request) -> tuple[list[str], bool]:
    """The ids, each once, and whether to send outcomes of runs that have ended already.  Raises UsageError."""
    for name, _ in query(request):
        if name not in _Followed.__struct_fields__:
            raise UsageError(f"options: unknown {name[:100]!r}; there are: {', '.join(_Followed.__struct_fields__)}")
    ids, ended = list(dict.fromkeys(request.query_params.getlist("id"))), request.query_params.get("ended", "false")
    if not 1 <= len(ids) <= _IDS_MAX:
        raise UsageError(f"name 1 to {_IDS_MAX} ids, as in ?id=a&id=b, not {len(ids)}; for more, use more streams")
    if ended not in ("true", "false"):
        raise UsageError(f"ended must be true or false, not {ended[:100]!r}")
    return ids, ended == "true"


_EVENTS = Text(
    "text/event-stream",
    "Server-Sent Events: `event: outcome`, whose data is an Ended; a comment is sent every 30 s.",
    'event: outcome\ndata: {"id":"a","start_id":"f3a9","outcome":"result","value":{"paid":true}}\n\n',
)


@Operation("follow_outcomes", {200: _EVENTS}, _Followed, words=ENGINE)
async def _outcomes(request: Request) -> Response:
    """Outcomes of these workflows as they come, as Server-Sent Events; from the status line on none is missed."""
    ids, ended = _asked(request)
    stream = _Stream(service_of(request), await service_of(request).client(), ids)
    await stream.begin(request, ended)
    return stream


ROUTES = [Route("/outcomes", _outcomes, methods=["GET"])]
