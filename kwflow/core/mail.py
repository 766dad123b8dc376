"""Signals and updates that wait to be read: the mailbox of an instance, and the waits that read it (M3).

Each name is a FIFO.  A signal is consumed when its value reaches author code: a wait takes one only when a task or a
combinator waits for it, and a combinator that is decided without it returns it to its place.  This module must not know
records; `machine.py` decides who is woken, and author code reads the mailbox by what is in `mailbox.py`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from kwflow.core.tasks import FAILED, OK, Awaitable, Combinator, Suspension
from kwflow.errors import Cancelled

__all__ = ["Mail", "Mailbox", "SignalWait", "UpdateWait", "give_back", "mark_read"]


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
