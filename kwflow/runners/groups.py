"""Records that are written together or not at all.  An operator's command sends them to an embedded engine, or writes them to Kafka itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kwflow.core.wire import Output
from kwflow.errors import TransportError

if TYPE_CHECKING:
    from rocksdict import Rdict

__all__ = ["Group", "Mark", "Undone"]

_MARK = b"M"  # prefix of a mark's entry in the database of an embedded engine; the value is the offset of the last record with this mark


class Mark(msgspec.Struct, frozen=True):
    """A header that some record of a topic, from an offset on, may have.  It has its own database entry: finding it takes one read, however long the topic is."""

    topic: str
    offset: int
    name: str
    value: bytes

    @property
    def key(self) -> bytes:
        """The key of the mark's database entry."""
        return _MARK + b"\0".join((self.topic.encode(), self.name.encode(), self.value))

    def is_in(self, db: Rdict) -> bool:
        """Whether a record from `offset` on has this header."""
        found = db.get(self.key)
        return found is not None and int(found) >= self.offset

    def is_on(self, output: Output) -> bool:
        return output.topic == self.topic and (self.name, self.value) in output.headers


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """Records that are written together or not at all.  If the mark `unless`, which one of them carries, is already there, nothing is written."""

    records: tuple[Output, ...]
    unless: Mark | None = None


class Undone(TransportError):
    """A group was refused, and none of its records was written."""
