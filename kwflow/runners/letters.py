"""Dead letters and parked instances, for operators: lists them, and retries or discards them (semantics §7, K13, K17)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kwflow.config import Config
from kwflow.core.wire import Headers, Output, Record
from kwflow.errors import UsageError
from kwflow.runners import feeds
from kwflow.runners.groups import Group, Mark, Undone
from kwflow.runners.instances import header_of
from kwflow.runners.outside import Write, read, sole_writer, states
from kwflow.runners.parked import ADDRESS, HOLD, holds

__all__ = ["Parked", "Settled", "letters_of", "no_such", "note_of", "open_in", "parked_of", "renamed", "settle"]

_DONE = "kwflow-dead-letter-done"
_FIRST = "kwflow-original-timestamp"
_TOPIC = "kwflow-error-topic"


class Parked(msgspec.Struct, frozen=True):
    """An instance that waits for an operator, and the records that it holds: the one at fault first."""

    header: dict[str, Any]
    hold: list[Record]

    @property
    def why(self) -> dict[str, Any]:
        found: dict[str, Any] = self.header["parked"]
        return found


class Settled(msgspec.Struct, frozen=True):
    """What became of an instance or a letter that was to be retried or discarded; `done` is False if nothing was changed."""

    what: str
    said: str
    done: bool = True


def note_of(letter: Record, name: str) -> str | None:
    """What an engine noted about a letter under this name; None if nothing.

    Whoever may write to the topic may have put any bytes there; they are shown escaped, so that no letter hides the others.
    """
    return next((value.decode("utf-8", "backslashreplace") for header, value in reversed(letter.headers) if header == f"kwflow-error-{name}" and value is not None), None)


def letters_of(settings: Config, embedded: Path | None) -> dict[str, Record]:
    """Identity (`<partition>:<offset>`) -> open dead letter; letters that only report a parked instance are left out."""
    return open_in(read(settings, embedded, settings.dead_letter_topic))


def open_in(records: Iterable[Record]) -> dict[str, Record]:
    """`letters_of`, of these records of its topic."""
    letters: dict[str, Record] = {}
    done: set[bytes | None] = set()
    for record in records:
        reason = note_of(record, "reason")
        if reason is None:  # a mark, not a letter; a letter may carry any header of its sender, even this one
            done |= {value for name, value in record.headers if name == _DONE}
        elif reason != "parked":
            letters[f"{record.partition}:{record.offset}"] = record
    return {identity: record for identity, record in letters.items() if identity.encode() not in done}


def renamed(headers: Headers, names: Mapping[str, str]) -> Headers:
    """The headers of a letter, in which the topic that it is from has another name; that of a feed keeps its name."""
    letter = Record("", 0, 0, 0, None, None, headers)
    new = names.get(note_of(letter, "topic") or "") if not feeds.is_letter(letter) else None
    if new is None:
        return headers
    place = max(number for number, (name, _) in enumerate(headers) if name == _TOPIC)
    return (*headers[:place], (_TOPIC, new.encode()), *headers[place + 1 :])


def parked_of(settings: Config, embedded: Path | None) -> dict[str, Parked]:
    """Id -> parked instance, of all of them; one that is only paused is left out, as nothing is wrong with it."""
    state = states(settings, embedded, lambda key, value: key.startswith(HOLD) or _at_fault(key, value) is not None)
    held = holds(state)
    found = {key.decode(): Parked(header, held.get(key.decode(), [])) for key, stored in state.items() if (header := _at_fault(key, stored)) is not None}
    return dict(sorted(found.items()))


def _at_fault(key: bytes, stored: bytes) -> dict[str, Any] | None:
    header = header_of(stored) if not key.startswith(b"\0") else {}
    return header if header.get("status") == "parked" and header["parked"]["reason"] != "paused" else None


def no_such(what: str) -> UsageError:
    return UsageError(f"{what!r} is neither a parked instance nor an open dead letter; kwflow dead-letters list shows them")


def settle(
    settings: Config, embedded: Path | None, what: str | None, reason: str | None, op: str, command: Callable[[Sequence[str]], Iterable[Settled]] | None = None
) -> Iterator[Settled]:  # fmt: skip
    """Retry or discard one instance or letter, or all with this reason, and yield what became of each.

    A parked instance is sent the command (K17): by `command`, which waits for the engine, or without waiting.  A letter is sent again
    and marked as done in one transaction, so that it is never sent twice.  Raises UsageError.
    """
    with sole_writer(settings, embedded, "dead-letters") as write:
        parked, letters = _chosen(settings, embedded, what, reason)
        yield from _requested(settings, parked, op, write) if command is None else command(parked)
        left = dict(letters)
        for identity, letter in letters.items():
            if op == "retry" and _is_remnant(letter):
                place = "{}[{}]@{}".format(*(note_of(letter, name) for name in ("topic", "partition", "offset")))
                yield Settled(identity, f"it does not contain its record, which is {place}; send that again from its source, and discard this letter", False)
                del left[identity]
        yield from _closed(settings, left, op, write)


def _requested(settings: Config, ids: Sequence[str], op: str, write: Write) -> Iterator[Settled]:
    """Send each of these instances the command."""
    commands = [Group((Output(settings.resume_topic, id.encode(), b"null", (("kwflow-op", op.encode()),)),)) for id in ids]
    for id, _ in zip(ids, write(commands), strict=True):
        yield Settled(id, f"{op} requested; the engine does it")


def _closed(settings: Config, letters: dict[str, Record], op: str, write: Write) -> Iterator[Settled]:
    """Close the letters one after the other; one that is refused holds up none of the others."""
    left = list(letters)
    while left:
        try:
            for done in write([_closing(settings, identity, letters[identity], op == "retry") for identity in left]):
                yield Settled(left.pop(0), ("sent again" if op == "retry" else "closed") if done else "it has already been dealt with")
        except Undone as error:
            yield Settled(left.pop(0), str(error), False)


def _is_remnant(letter: Record) -> bool:
    """Whether a letter says where its record is, but does not hold it, because the full letter was refused (K11).

    Sent again it would be an empty record, whose own letter would hide where the first record is.  A feed's letter that is
    empty stands for a tombstone.
    """
    return letter.value is None and note_of(letter, "reason") == "refused" and not feeds.is_letter(letter)


def _chosen(settings: Config, embedded: Path | None, what: str | None, reason: str | None) -> tuple[list[str], dict[str, Record]]:
    """The selected parked instances and letters.  Raises UsageError if there are none."""
    parked, letters = parked_of(settings, embedded), letters_of(settings, embedded)
    if what is not None:
        parked, letters = {what: parked[what]} if what in parked else {}, {what: letters[what]} if what in letters else {}
    ids = [id for id, found in parked.items() if reason in (None, found.why["reason"])]
    chosen = {identity: record for identity, record in letters.items() if reason in (None, note_of(record, "reason"))}
    if not ids and not chosen:
        if what is not None:
            raise no_such(what)
        raise UsageError("no instance is parked and no dead letter is open" + (f" with reason {reason}" if reason is not None and (parked or letters) else ""))
    return ids, chosen


def _closing(settings: Config, identity: str, letter: Record, again: bool) -> Group:
    """The records that close a letter: the mark; for a retry, before it the record itself with its first timestamp in a header (K13), or what asks its feed again.

    The address for replies is removed: the sender was told what became of the record, and waits for nothing more.
    """
    mark = Mark(settings.dead_letter_topic, letter.offset, _DONE, identity.encode())
    records = [Output(settings.dead_letter_topic, letter.key, None, ((mark.name, mark.value),))]
    fed = feeds.again(settings, letter, functools.partial(note_of, letter)) if again else None
    if fed is not None:
        records.insert(0, fed)
    elif again:
        headers = tuple(pair for pair in letter.headers if not pair[0].startswith("kwflow-error-") and pair[0] not in ADDRESS)
        first = () if any(name == _FIRST and value for name, value in headers) else ((_FIRST, str(letter.timestamp_ms).encode()),)
        records.insert(0, Output(note_of(letter, "topic") or settings.resume_topic, letter.key, letter.value, (*headers, *first)))
    return Group(tuple(records), mark)
