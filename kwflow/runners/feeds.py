"""The processor of a feed, one more processor on every runner's loop: it reads somebody else's topic and writes messages for workflows.

It keeps no state: the position says what was read, and is committed together with the messages.  A record that its feed
does not accept becomes a dead letter (G3).  When that is retried, it goes into the input topic of the engines, which have
the feed as well (`again`), so that no other reader of the feed's topic sees the record a second time.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import msgspec

from kwflow.config import Config
from kwflow.core import wire
from kwflow.core.outcomes import describe_error
from kwflow.core.wire import Output, Record
from kwflow.errors import KwflowBug, ProtocolError, UsageError
from kwflow.feeds import Feed
from kwflow.ports import Budget, Changes, Decision, Deliver, Store
from kwflow.runners import parked
from kwflow.runners.parked import dead_letter
from kwflow.runners.watchdog import Watchdog

__all__ = ["OP", "Fed", "FeedProcessor", "again", "is_letter"]

OP = "feed"  # the `kwflow-op` of a record that its feed is to be asked about again
_FED, _KEY = "kwflow-feed", "kwflow-feed-key"
_THEIRS = "kwflow-feed-header-"  # prefix for headers that belong to another application, so that no engine reads them as ours
_MARK = "kwflow-error-feed"
_ADDED = len(parked.SAID) + 1  # how many headers of ours follow those that the record had, which may have the same names; the mark is the last one
_SAID_CHARACTERS = 10_000


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The place of the original record in the feed's topic."""

    topic: Annotated[str, msgspec.Meta(max_length=249)]  # Kafka's limit; it is part of a letter's headers and of a log line
    partition: int
    offset: int
    timestamp_ms: int


class Fed:
    """Asks feeds what a record does, within the limits of an engine."""

    def __init__(self, config: Config, watchdog: Watchdog) -> None:
        self.config = config
        self._watchdog = watchdog

    def ask(self, feed: Feed, record: Record, received_ms: int) -> Decision:
        """Return what this record does.  Never raises for bad input, or for anything that the feed raises."""
        config = self.config
        try:
            wire.check_size(record, config.value_bytes_max, config.header_bytes_max)
            outputs = self._watchdog.run(f"the feed of {feed.topic}", feed.outputs, record, config.resume_topic, config.limits)
        except ProtocolError as error:
            return _letter(config, record, error.reason, str(error), received_ms)
        except (KeyboardInterrupt, KwflowBug):
            raise
        except BaseException as error:  # author code may raise anything
            return _letter(config, record, "feed-failed", _error_text(error, feed), received_ms)
        return Decision(outputs, counts=("fed",) * len(outputs) or ("fed-nothing",))

    def again(self, feeds: Mapping[str, Feed], record: Record, received_ms: int) -> Decision:
        """Ask the feed again about a record with `OP`.  Raises ProtocolError for a record that kwflow did not send."""
        first = _first(record)
        feed = feeds.get(first.topic)
        if feed is None:
            return _letter(self.config, first, "unknown-feed", f"no feed of {first.topic} in this engine; start it with the MODULE that defines the feed, and retry", received_ms)
        return self.ask(feed, first, received_ms)

    def refuse_again(self, record: Record, reason: str) -> Decision:
        """Dead-letter a record with `OP` whose messages the log refused."""
        try:
            return _letter(self.config, _first(record), "refused", reason, None)
        except ProtocolError as error:
            return parked.dead(self.config, record, error.reason, str(error), record.timestamp_ms)


def _first(record: Record) -> Record:
    """Rebuild the original record that a feed is to be asked about again.  Raises ProtocolError."""
    try:
        place = msgspec.json.decode(wire.header(record, _FED) or "", type=_Place)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"op {OP} is reserved for kwflow dead-letters retry: header {_FED}: {error}", "bad-header") from None
    key = next((value for name, value in record.headers if name == _KEY), None)
    headers = tuple((name.removeprefix(_THEIRS), value) for name, value in record.headers if name.startswith(_THEIRS) or not name.startswith("kwflow-"))
    return Record(place.topic, place.partition, place.offset, place.timestamp_ms, key, record.value, headers)


def _error_text(error: BaseException, feed: Feed) -> str:
    """What the feed raised, or caused us to raise, and at which line of it."""
    file, line = feed.function.__code__.co_filename, feed.function.__code__.co_firstlineno
    said = " ".join(describe_error(error)[:_SAID_CHARACTERS].split())  # on one line for the log, as the text may come from the record
    return f"{said} ({file}:{next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == file), line)})"


def _letter(config: Config, record: Record, reason: str, message: str, received_ms: int | None) -> Decision:
    """A dead letter that is marked as a feed's.

    Its timestamp is `received_ms` (None: the runner sets it), so that its retention begins now, even if the record is old or dated far in the future.
    `kwflow-` headers of the record belong to another application, and nobody here waits for an answer to them.
    """
    letter = dead_letter(config, record, reason, message, record.timestamp_ms if received_ms is None else received_ms)
    marked = msgspec.structs.replace(letter, headers=(*letter.headers, (_MARK, record.topic.encode())), timestamp_ms=received_ms)
    return Decision((marked,), (f"dead letter {record.topic}[{record.partition}]@{record.offset}: {message}",), ("dead-letter",))


def is_letter(letter: Record) -> bool:
    """Whether a feed's processor wrote this letter.  The header must be the last one: a record that carries it itself may have become an ordinary letter."""
    return len(letter.headers) >= _ADDED and letter.headers[-1][0] == _MARK


def again(config: Config, letter: Record, said: Callable[[str], str | None]) -> Output | None:
    """The record that asks the feed again about this letter's record; None if the letter is not a feed's.  `said` returns what its headers say."""
    if not is_letter(letter):
        return None
    topic = said("topic") or ""
    try:
        place = _Place(topic, *(int(said(name) or "") for name in ("partition", "offset", "timestamp")))
    except ValueError:  # somebody else wrote this letter under our name
        return None
    headers = tuple((f"{_THEIRS}{name}" if name.startswith("kwflow-") else name, value) for name, value in letter.headers[:-_ADDED])
    mine = (("kwflow-op", OP.encode()), (_FED, msgspec.json.encode(place)), *(((_KEY, letter.key),) if letter.key is not None else ()))
    return Output(config.resume_topic, f"{topic}/{place.partition}/{place.offset}".encode(), letter.value, (*headers, *mine))


class FeedProcessor:
    """One feed over its topic."""

    changelog_topic = ""

    def __init__(self, config: Config, feed: Feed, on_log: Callable[[str], None] = print) -> None:
        """Raises UsageError for a function that cannot be called, and for a topic that is kwflow's own."""
        feed.resolved()
        if feed.topic in (config.resume_topic, config.scheduler_topic, config.reply_topic, config.history_topic, config.dead_letter_topic):
            raise UsageError(f"{feed!r}: this topic belongs to kwflow, which delivers its records to workflows itself")
        self.config = config
        self.feed = feed
        self.partitions = 1
        self.input_topic = feed.topic
        self._fed = Fed(config, Watchdog(config.step_timeout_ms, config.step_abort_ms, on_log))

    def taken_over(self, store: Store) -> dict[str, str]:
        return {}

    def decide(self, state: Changes, records: Sequence[Record], received_ms: int, budget: Budget | None = None) -> list[Decision]:
        made: list[Decision] = []
        for record in records:
            decision = self._fed.ask(self.feed, record, received_ms)
            made.append(decision)
            if budget is not None:
                budget.take(sum([len(output.key or b"") + len(output.value or b"") + wire.header_bytes(output.headers) for output in decision.outputs]))
                if budget.spent():
                    break
        return made

    def refuse(self, state: Changes, record: Record, reason: str, topic: str = "") -> Decision:
        return _letter(self.config, record, "refused", reason, None)

    def due(self, state: Changes, now_ms: int, limit: int) -> None:
        return None

    def work(self, deliver: Deliver) -> None:
        return None

    def next_due_ms(self, store: Store) -> None:
        return None
