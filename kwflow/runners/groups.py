"""Records that are written together or not at all: what a command of an operator asks of an embedded engine, or writes on Kafka itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kwflow.core.wire import Output
from kwflow.errors import TransportError

if TYPE_CHECKING:
    from rocksdict import Rdict

__all__ = ["Group", "Mark", "Undone"]

_MARK = b"M"  # in the database of an embedded engine, before a mark: the offset of the last record that bears it


class Mark(msgspec.Struct, frozen=True):
    """A header that some record of a topic, from an offset on, may have.  It has an entry of its own: to look for it is one read, however long the topic is."""

    topic: str
    offset: int
    name: str
    value: bytes

    @property
    def key(self) -> bytes:
        """The entry's."""
        return _MARK + b"\0".join((self.topic.encode(), self.name.encode(), self.value))

    def is_in(self, db: Rdict) -> bool:
        """Whether a record from `offset` on bears it."""
        found = db.get(self.key)
        return found is not None and int(found) >= self.offset

    def is_on(self, output: Output) -> bool:
        return output.topic == self.topic and (self.name, self.value) in output.headers


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """Records that are written together or not at all; not at all if the mark is there, which one of them bears."""

    records: tuple[Output, ...]
    unless: Mark | None = None


class Undone(TransportError):
    """One that is not taken; nothing of it was written."""
