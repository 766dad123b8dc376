"""An update from when it was accepted to its answer, and the replies that an instance remembers (M1.4, M3).

Two entries of the header belong to this module: `updates` holds who waits for the answer to each accepted update, and `ids`
the replies to the last commands.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import msgspec

from kwflow.core.calls import Calls
from kwflow.core.current import current
from kwflow.core.instance import CLOSING
from kwflow.core.outcomes import describe_error
from kwflow.core.tasks import ABORTS
from kwflow.core.values import json_dumps
from kwflow.core.wire import Address, Reply
from kwflow.errors import UsageError

__all__ = ["IDS_MAX", "PENDING", "Update", "close", "reject", "remember", "reply"]

IDS_MAX = 256  # M1.4: how many commands an instance recognizes when they are repeated
_VALUES_MAX = 16  # how many of these keep the value of their reply; an update may be repeated soon, not for ever
_VALUE_BYTES_MAX = 4096
_REASON_CHARACTERS_MAX = 1000
PENDING = "pending"


class Update:
    """A request that this workflow answers with `kw.reply(update, value)`.

    `with update:` answers it in any case: an error in the block, which goes on, rejects it, and the end of the block replies None, unless it was answered before.
    """

    __slots__ = ("name", "number", "value")

    def __init__(self, number: int, name: str, value: object) -> None:
        self.number = number
        self.name = name
        self.value: Any = value

    def __enter__(self) -> Update:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, ABORTS) or str(self.number) not in current().instance.extra.get("updates", {}):
            return
        if error is None:
            reply(current(), self, None)
        else:
            reject(current(), self, describe_error(error))

    def __repr__(self) -> str:
        return f"<update {self.number} {self.name}>"


def remember(ids: dict[str, list[Any]], id: str, status: str, message: str = "", value: object = None) -> None:
    """Keep the reply to a command: the last 256 replies, and the values of the last 16."""
    if value is not None:
        if len(json_dumps(value)) > _VALUE_BYTES_MAX:
            status, message, value = "repeated", "it was done before; the reply was too large to keep", None
        else:
            with_value = [known for known in ids.values() if known[2] is not None]
            for known in with_value[: max(0, len(with_value) - _VALUES_MAX + 1)]:
                known[:] = "repeated", "it was done before; the reply is no longer kept", None
    ids.pop(id, None)
    ids[id] = [status, message, value]
    while len(ids) > IDS_MAX:
        del ids[next(iter(ids))]


def reply(calls: Calls, update: object, value: object) -> None:
    """Answer an update, in the transaction of this step.  Once main has ended, the update has been answered with `ended`, and this does nothing."""
    size = len(json_dumps(value))
    if size > calls.context.limits.value_bytes_max // 2:
        raise UsageError(f"a reply can have at most {calls.context.limits.value_bytes_max // 2} bytes, not {size} (half of limit value_bytes_max); reply with a reference instead, or raise the limit")
    _settle(calls, "kw.reply", update, "ok", "", msgspec.json.decode(json_dumps(value)))


def reject(calls: Calls, update: object, reason: str) -> None:
    """Reject an update after it was accepted; the sender gets the same answer as from a validator."""
    if not isinstance(reason, str):
        raise UsageError(f"kw.reject takes a reason, not {reason!r}; to reply with a value, use kw.reply")
    _settle(calls, "kw.reject", update, "rejected", reason[:_REASON_CHARACTERS_MAX].encode("utf-8", "replace").decode(), None)  # the reason is often the text of an error


def _settle(calls: Calls, said: str, update: object, status: str, message: str, value: object) -> None:
    if not isinstance(update, Update):
        raise UsageError(f"{said} takes an update from kw.on_update, not {update!r}")
    extra = calls.instance.extra
    waiting = extra.get("updates", {}).pop(str(update.number), None)
    if waiting is None:
        if calls.instance.status == CLOSING:
            return
        raise UsageError(f"{update!r} has already been answered")
    _answer(calls, waiting, status, message, value)
    if not extra["updates"]:
        del extra["updates"]


def _answer(calls: Calls, waiting: dict[str, Any], status: str, message: str = "", value: object = None) -> None:
    for address in waiting["to"]:
        calls.replies.append(Reply(msgspec.convert(address, Address), status, message, value))
    if waiting["id"] is not None:
        remember(calls.instance.extra.setdefault("ids", {}), waiting["id"], status, message, value)


def close(calls: Calls) -> None:
    """Answer all open updates with `ended`: main has ended, and nobody else will answer them."""
    for waiting in calls.instance.extra.pop("updates", {}).values():
        _answer(calls, waiting, "ended")
