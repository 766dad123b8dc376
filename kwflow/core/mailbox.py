"""Signals and updates that wait to be read: the mailbox of an instance, and the waits that read it (M3).

Each name is a FIFO.  A signal is consumed when its value reaches author code: a wait takes one only when a task or a
combinator waits for it, and a combinator that is decided without it returns it to its place.  This module must not know
records; `instance.py` decides who is woken.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Generator, Iterator
from typing import Any

import msgspec

from kwflow.core.current import current
from kwflow.core.tasks import FAILED, OK, Awaitable, Combinator, Suspension
from kwflow.errors import Cancelled, UsageError

__all__ = ["Inbox", "Mail", "Mailbox", "SignalWait", "Update", "UpdateWait", "checked_name", "give_back", "mark_read"]

_NAME_CHARACTERS_MAX = 200


class Mail(msgspec.Struct, frozen=True):
    """One signal or update; `number` is its place in the order of arrival."""

    number: int
    value: Any = None
    bytes: int = 0
    expires_ms: int | None = None


class Mailbox:
    """All unread mail.  Invariant: `count` and `bytes` are the totals of all mail in `boxes`.

    `validators` has an entry for each update that the workflow accepts.  `lost` counts the mail that has expired since it
    was last logged.
    """

    __slots__ = ("boxes", "bytes", "count", "lost", "number_next", "validators")

    def __init__(self) -> None:
        self.boxes: dict[tuple[str, str], list[Mail]] = {}
        self.validators: dict[str, Callable[[Any], object] | None] = {}
        self.number_next = 1
        self.count = self.bytes = self.lost = 0

    def put(self, kind: str, name: str, value: object, size: int, expires_ms: int | None) -> None:
        """Put mail behind all other mail of that name."""
        self._insert(kind, name, Mail(self.number_next, value, size, expires_ms))
        self.number_next += 1

    def put_back(self, kind: str, name: str, mail: Mail) -> None:
        """Return mail to the place where it was."""
        self._insert(kind, name, mail)

    def _insert(self, kind: str, name: str, mail: Mail) -> None:
        insort(self.boxes.setdefault((kind, name), []), mail, key=lambda one: one.number)
        self.count += 1
        self.bytes += mail.bytes

    def take(self, kind: str, name: str, now_ms: int) -> Mail | None:
        """Remove and return the oldest mail of that name that has not expired, or None."""
        box = self.boxes.get((kind, name))
        while box:
            mail = box.pop(0)
            self.count -= 1
            self.bytes -= mail.bytes
            if not box:
                del self.boxes[kind, name]
            if mail.expires_ms is None or now_ms < mail.expires_ms:
                return mail
            self.lost += 1
        return None

    def unread(self, now_ms: int) -> tuple[int, int]:
        """Return the number and the total bytes of the mail that has not expired."""
        gone = [mail for box in self.boxes.values() for mail in box if mail.expires_ms is not None and mail.expires_ms <= now_ms]
        return self.count - len(gone), self.bytes - sum(mail.bytes for mail in gone)

    def expire(self, now_ms: int) -> None:
        """Drop all expired mail."""
        for (kind, name), box in list(self.boxes.items()):
            kept = [mail for mail in box if mail.expires_ms is None or now_ms < mail.expires_ms]
            self.count -= len(box) - len(kept)
            self.lost += len(box) - len(kept)
            self.bytes -= sum(mail.bytes for mail in box) - sum(mail.bytes for mail in kept)
            if kept:
                self.boxes[kind, name] = kept
            else:
                del self.boxes[kind, name]

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return the number of unread mail by kind and name, for the header."""
        found: dict[str, dict[str, int]] = {}
        for (kind, name), box in self.boxes.items():
            found.setdefault(kind, {})[name] = len(box)
        return found


class SignalWait(Suspension):
    """A wait for the next signal of a name.  `mail` is what it has taken from the mailbox and nobody has read yet."""

    __slots__ = ("mail", "name")
    kind = "signal"
    answerable = False

    def __init__(self, ref: str, since_ms: int, name: str) -> None:
        super().__init__(ref, since_ms)
        self.name = name
        self.mail: Mail | None = None

    def described(self) -> dict[str, Any]:
        return {"name": self.name}


class UpdateWait(SignalWait):
    """A wait for the next update of a name."""

    __slots__ = ()
    kind = "update"


class Update:
    """A request that this workflow answers with `kw.reply(update, value)`."""

    __slots__ = ("name", "number", "value")

    def __init__(self, number: int, name: str, value: object) -> None:
        self.number = number
        self.name = name
        self.value: Any = value

    def __repr__(self) -> str:
        return f"<update {self.number} {self.name}>"


class Inbox:
    """The signals or updates of one name: `yield inbox` waits for the next one, `take()` returns all that are there, `len()` counts them."""

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

    def __repr__(self) -> str:
        return f"<{self._kind}s {self.name}>"


def checked_name(name: object, what: str) -> str:
    """Return the name.  Raises UsageError for a name that no sender could use."""
    if not isinstance(name, str) or not 1 <= len(name) <= _NAME_CHARACTERS_MAX:
        raise UsageError(f"the name of {what} must be a str of 1 to {_NAME_CHARACTERS_MAX} characters, not {name!r}")
    return name


def mark_read(target: Awaitable) -> None:
    """Note that what this wait took has reached author code."""
    for wait in _below(target):
        if isinstance(wait, SignalWait):
            wait.mail = None


def give_back(target: Awaitable, mailbox: Mailbox) -> list[tuple[str, str]]:
    """Put back the mail that was taken below a wait that lost, and that nobody has read; the wait counts as cancelled.

    Return the (kind, name) pairs that have mail again.
    """
    found: list[tuple[str, str]] = []
    combinators = []
    for wait in _below(target):
        if isinstance(wait, SignalWait) and wait.mail is not None:
            mailbox.put_back(wait.kind, wait.name, wait.mail)
            found.append((wait.kind, wait.name))
            wait.mail = None
            wait.state, wait.value = FAILED, Cancelled()
        elif isinstance(wait, Combinator) and wait.state == OK:
            combinators.append(wait)
    if found:
        for combinator in combinators:
            combinator.state, combinator.value = FAILED, Cancelled()
    return found


def _below(target: Awaitable) -> Iterator[Awaitable]:
    """The wait and everything below it, but nothing below a task: its own code has read what it took."""
    stack, seen = [target], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, Combinator):
            stack.extend(item.children)
