"""The processor of a feed, one more on the loop of every runner: records of somebody else's topic in, messages for workflows out.

It keeps no state: what was read is what the position says, which is committed with the messages.  A record that its feed
does not take is a dead letter (G3); sent again, it goes into the input topic of the engines, which have the feed, too
(`again`): nobody else who reads the topic sees it a second time.
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

OP = "feed"  # `kwflow-op` of a record whose feed is to be asked once more
_FED, _KEY = "kwflow-feed", "kwflow-feed-key"
_THEIRS = "kwflow-feed-header-"  # before the names of headers that are another application's: no engine may read them as ours
_MARK = "kwflow-error-feed"
_ADDED = len(parked.SAID) + 1  # headers of ours, the mark last, behind those that the record had: these may have the same names
_SAID_CHARACTERS = 10_000


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which record it was."""

    topic: Annotated[str, msgspec.Meta(max_length=249)]  # it is in each header of a letter, and in a line of the log
    partition: int
    offset: int
    timestamp_ms: int


class Fed:
    """Asks feeds, with the limits of an engine."""

    def __init__(self, config: Config, watchdog: Watchdog) -> None:
        self.config = config
        self._watchdog = watchdog

    def ask(self, feed: Feed, record: Record, received_ms: int) -> Decision:
        """What this record does.  Never raises for bad input, or for what the feed does."""
        config = self.config
        try:
            wire.check_size(record, config.value_bytes_max, config.header_bytes_max)
            outputs = self._watchdog.run(f"the feed of {feed.topic}", feed.outputs, record, config.resume_topic, config.limits)
        except ProtocolError as error:
            return _letter(config, record, error.reason, str(error), received_ms)
        except (KeyboardInterrupt, KwflowBug):
            raise
        except BaseException as error:  # author code may raise anything
            return _letter(config, record, "feed-failed", _said(error, feed), received_ms)
        return Decision(outputs, counts=("fed",) * len(outputs) or ("fed-nothing",))

    def again(self, feeds: Mapping[str, Feed], record: Record, received_ms: int) -> Decision:
        """A record with `OP`.  Raises ProtocolError for one that nobody here has sent."""
        first = _first(record)
        feed = feeds.get(first.topic)
        if feed is None:
            return _letter(self.config, first, "unknown-feed", f"no feed of {first.topic} in this engine; give it the MODULE that has it, and retry", received_ms)
        return self.ask(feed, first, received_ms)

    def refuse_again(self, record: Record, reason: str) -> Decision:
        """One whose messages the log would not take."""
        try:
            return _letter(self.config, _first(record), "refused", reason, None)
        except ProtocolError as error:
            return parked.dead(self.config, record, error.reason, str(error), record.timestamp_ms)


def _first(record: Record) -> Record:
    """The record that a feed was to be asked about once more.  Raises ProtocolError."""
    try:
        place = msgspec.json.decode(wire.header(record, _FED) or "", type=_Place)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"op {OP} is of kwflow dead-letters retry alone: header {_FED}: {error}", "bad-header") from None
    key = next((value for name, value in record.headers if name == _KEY), None)
    headers = tuple((name.removeprefix(_THEIRS), value) for name, value in record.headers if name.startswith(_THEIRS) or not name.startswith("kwflow-"))
    return Record(place.topic, place.partition, place.offset, place.timestamp_ms, key, record.value, headers)


def _said(error: BaseException, feed: Feed) -> str:
    """What the feed raised, or made us raise, and where in it."""
    file, line = feed.function.__code__.co_filename, feed.function.__code__.co_firstlineno
    said = " ".join(describe_error(error)[:_SAID_CHARACTERS].split())  # it is a line of the log, and what is in it may be from the record
    return f"{said} ({file}:{next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == file), line)})"


def _letter(config: Config, record: Record, reason: str, message: str, received_ms: int | None) -> Decision:
    """A dead letter that is known for a feed's, and is kept from now on (None: the runner knows when), however old the record, or far in the future.

    Headers of ours that the record bears are another application's, and nobody here waits for an answer to them.
    """
    letter = dead_letter(config, record, reason, message, record.timestamp_ms if received_ms is None else received_ms)
    marked = msgspec.structs.replace(letter, headers=(*letter.headers, (_MARK, record.topic.encode())), timestamp_ms=received_ms)
    return Decision((marked,), (f"dead letter {record.topic}[{record.partition}]@{record.offset}: {message}",), ("dead-letter",))


def is_letter(letter: Record) -> bool:
    """Whether a feed's processor wrote it: a record that bears the header may have become somebody else's letter."""
    return len(letter.headers) >= _ADDED and letter.headers[-1][0] == _MARK


def again(config: Config, letter: Record, said: Callable[[str], str | None]) -> Output | None:
    """What asks the feed of this letter's record once more; None for a letter of anybody else.  `said`: what its headers say."""
    if not is_letter(letter):
        return None
    topic = said("topic") or ""
    try:
        place = _Place(topic, *(int(said(name) or "") for name in ("partition", "offset", "timestamp")))
    except ValueError:  # somebody else's letter, under our name
        return None
    headers = tuple((f"{_THEIRS}{name}" if name.startswith("kwflow-") else name, value) for name, value in letter.headers[:-_ADDED])
    mine = (("kwflow-op", OP.encode()), (_FED, msgspec.json.encode(place)), *(((_KEY, letter.key),) if letter.key is not None else ()))
    return Output(config.resume_topic, f"{topic}/{place.partition}/{place.offset}".encode(), letter.value, (*headers, *mine))


class FeedProcessor:
    """One feed over its topic."""

    changelog_topic = ""

    def __init__(self, config: Config, feed: Feed, on_log: Callable[[str], None] = print) -> None:
        """Raises UsageError for a function that could not be called, and for a topic that is the engine's own to read."""
        feed.resolved()
        if feed.topic in (config.resume_topic, config.scheduler_topic, config.reply_topic, config.history_topic, config.dead_letter_topic):
            raise UsageError(f"{feed!r}: that topic is kwflow's own; a workflow is told of what comes there otherwise")
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
