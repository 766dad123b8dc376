"""What author code holds of the mailbox: the inbox of a name (M3)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from kwflow.core.current import current
from kwflow.core.mail import Mail, Mailbox, SignalWait, UpdateWait
from kwflow.core.tasks import Series
from kwflow.core.updates import Update
from kwflow.errors import UsageError

__all__ = ["Inbox", "Mail", "Mailbox", "Update", "checked_name"]

_NAME_CHARACTERS_MAX = 200
Mail.__module__ = Mailbox.__module__ = Update.__module__ = __name__  # snapshots name them in this module


class Inbox(Series):
    """The signals or updates of one name: `yield inbox` waits for the next one, `take()` returns all that are there, `len()` counts them.

    `async for message in inbox` waits for one after the other, and never ends by itself.
    """

    __slots__ = ("_kind", "name")

    def __init__(self, kind: str, name: str) -> None:
        self._kind = kind
        self.name = name

    def wait(self) -> SignalWait:
        """Create a wait for the next message, as `yield inbox` does."""
        running = current()
        made = (SignalWait if self._kind == "signal" else UpdateWait)(running.next_id(), running.record.timestamp_ms, self.name)
        return running.register(made)

    def take(self) -> list[Any]:
        """Return all messages that are there now, oldest first; they count as read."""
        instance = current().instance
        if instance.mailbox is None:
            return []
        found = []
        while (mail := instance.mailbox.take(self._kind, self.name, instance.now_ms)) is not None:
            found.append(mail.value)
        return found

    def __len__(self) -> int:
        instance = current().instance
        if instance.mailbox is None:
            return 0
        instance.mailbox.expire(instance.now_ms)
        return len(instance.mailbox.boxes.get((self._kind, self.name), ()))

    def __bool__(self) -> bool:
        return True  # an empty inbox is still true; ask len()

    def __iter__(self) -> Generator[Any, Any, Any]:
        return self.wait().__iter__()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.wait().__await__()

    def __aiter__(self) -> Inbox:
        return self

    def __anext__(self) -> SignalWait:
        return self.wait()

    def __repr__(self) -> str:
        return f"<{self._kind}s {self.name}>"


def checked_name(name: object, what: str) -> str:
    """Return the name.  Raises UsageError for a name that no sender could use."""
    if not isinstance(name, str) or not 1 <= len(name) <= _NAME_CHARACTERS_MAX:
        raise UsageError(f"the name of {what} must be a str of 1 to {_NAME_CHARACTERS_MAX} characters, not {name!r}")
    return name
