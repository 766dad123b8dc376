"""An application on Kafka that is stopped as an archive, and an archive as the state of an application that has none (decision 0065).

An import that is killed can be repeated.  Before its first entry it marks the state, and no engine starts on a state with a
mark.  Entries are written as often as it takes; what must be there once, records and calls, is in the last transaction, which
also replaces the mark by the position (K16) where engines start.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException

from kwflow.config import Config
from kwflow.core import dispatch, queues, timers, wire
from kwflow.core.dispatch import Dispatch
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Headers, Record
from kwflow.errors import ProtocolError, SnapshotError, TransportError, UsageError
from kwflow.ports import Clock
from kwflow.runners import archive, parked
from kwflow.runners.archive import CODE, LETTERS, RESUME, SCHEDULER, STATE, TIMERS, Call, Entry, Head, Part, Sent, Tail
from kwflow.runners.checkpoints import calls_of
from kwflow.runners.clock import SystemClock
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import FORGOTTEN
from kwflow.runners.instances import header_of
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import LIVE, Environment
from kwflow.runners.kafka.state import IMPORT, POSITION, Position, importing, position_of
from kwflow.runners.kafka.stopped import Stopped, commit, groups_of
from kwflow.runners.kafka.upkeep import chunks
from kwflow.runners.letters import open_in
from kwflow.runners.moved import MOVES, Due, home_of, moves_of

__all__ = ["bring", "take"]

_OWN = {FORGOTTEN, MOVES, POSITION, timers.COUNT}  # made anew where the state goes
_TIMEOUT_S = 30
_WRITTEN_MAX = 1000  # entries in one transaction
_NAMED_MAX = 3
_EVER_MS = (1 << 63) - 1


# -- export ---------------------------------------------------------------------------------------------------------------


def take(config: Config, path: Path, environment: Environment = LIVE, clock: Clock | None = None) -> tuple[dict[str, int], list[str]]:
    """Write the archive of a stopped application.  Return what is in it, and what could not be put into it, as text.  Raises UsageError, TransportError."""
    stopped = Stopped(config, environment)
    stopped.require(*_topics_of(config))
    check_nothing_ran = stopped.nothing_ran_since()
    left_out: list[str] = []
    moved = [0]

    def made() -> Iterator[Part]:
        open_calls = _OpenCalls(stopped)
        for number in range(stopped.partitions[config.changelog_topic]):
            state = stopped.latest(config.changelog_topic, number)  # one partition in memory
            stopped.check_whole(config.changelog_topic, number, state)
            moved.append(moves_of(state.get(MOVES)))
            open_calls.see(state)
            yield from archive.entries(STATE, state.items(), _OWN, left_out)
        for number in range(stopped.partitions[config.timers_changelog_topic]):
            yield from archive.entries(TIMERS, stopped.latest(config.timers_changelog_topic, number).items(), _OWN, left_out)
        yield from (Entry(CODE, key, value) for key, value in stopped.latest(config.code_topic, 0).items())
        yield from open_calls.found(_waiting(stopped), left_out)
        yield from _waiting(stopped)
        yield from archive.letters(config, stopped.read(config.dead_letter_topic))
        try:
            check_nothing_ran()
        except UsageError as error:
            raise UsageError(f"{error}; no archive was written, as it might be neither the state before nor the state after that") from None

    return archive.write(path, config, made(), lambda: max(moved), (clock or SystemClock()).now_ms()), left_out


def _topics_of(config: Config) -> list[str]:
    return [*(topic for pair in groups_of(config).values() for topic in pair), config.code_topic, config.dead_letter_topic]


class _OpenCalls:
    """The calls in queues that instances wait for, unless an answer is held, or in the log already.

    A queue has them, or it has deleted them; of workflows with checkpoints the header has them, too.
    """

    def __init__(self, stopped: Stopped) -> None:
        self._stopped = stopped
        self._wanted = dict[str, dict[bytes, Call | None]]()
        self._answered = set[bytes]()

    def see(self, state: Mapping[bytes, bytes]) -> None:
        for key, value in state.items():
            if parked.of_hold(key) is not None:
                held = parked.kept(key, value)
                self._answer(held.key, held.value, held.headers)
            elif not key.startswith(b"\0") and b'"job"' in value:
                header = header_of(value)
                try:
                    kept = calls_of(header)
                except SnapshotError:  # it was forged
                    kept = {}
                for wait in header["waits"]:
                    if wait["kind"] == "job":
                        own = kept.get(wait["ref"])
                        self._wanted.setdefault(wait["queue"], {})[queues.key_of(header["id"], wait["ref"])] = Call(wait["queue"], own) if own is not None else None

    def _answer(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        try:
            ref = wire.answered_ref(Record("", 0, 0, 0, key, value, headers))
        except ProtocolError:
            return
        if ref is not None and key is not None:
            self._answered.add(key + b"|" + ref.encode())

    def found(self, waiting: Iterable[Sent], left_out: list[str]) -> Iterator[Call]:
        """Yield them; `waiting` are the records that were not applied yet."""
        for sent in waiting if self._wanted else ():
            self._answer(sent.key, sent.value, sent.headers)
        for queue, every in self._wanted.items():
            wanted = {key: call for key, call in every.items() if key not in self._answered}
            for record in self._stopped.read(queue) if queue in self._stopped.partitions else ():
                if record.key in wanted and (call := _read(self._stopped.config, record)) is not None:
                    wanted[record.key] = Call(queue, call)
            yield from (call for call in wanted.values() if call is not None)
            left_out += [f"the call {key.decode()} is no longer in {queue}: its workflow waits for it until its timeout" for key, call in wanted.items() if call is None]


def _read(config: Config, record: Any) -> Dispatch | None:
    try:
        asked = queues.read(record, config.resume_topic)
    except ProtocolError:  # no worker could have answered it either
        return None
    return asked if isinstance(asked, Dispatch) else None


def _waiting(stopped: Stopped) -> Iterator[Sent]:
    """The records that were not applied yet."""
    for group, (source, _) in groups_of(stopped.config).items():
        role = RESUME if source == stopped.config.resume_topic else SCHEDULER
        for number, start in stopped.following(group).items():
            yield from (Sent(role, record.key, record.value, record.headers, record.timestamp_ms) for record in stopped.read(source, number, start))


# -- import ---------------------------------------------------------------------------------------------------------------


def bring(config: Config, path: Path, environment: Environment = LIVE, clock: Clock | None = None) -> dict[str, int]:
    """Make the archive the state of an application that is stopped and has none.  Return what is in it.  Raises UsageError, TransportError."""
    found = archive.check(path, config)
    stopped = Stopped(config, environment)
    stopped.require(*_topics_of(config), *found.queues)
    wrong = topics.problems(stopped.admin, config, found.queues, list(groups_of(config)))
    if wrong:
        raise UsageError("; ".join(wrong))
    check_nothing_ran = stopped.nothing_ran_since()
    target = _Target(stopped, found, (clock or SystemClock()).now_ms())
    try:
        target.fence()
        positions = {changelog: _positions(stopped, group, found.id) for group, (_, changelog) in groups_of(config).items()}
        target.begin(positions)
        try:
            check_nothing_ran()  # whatever starts from here on finds the mark
        except UsageError as error:
            raise UsageError(f"{error}; stop every engine and scheduler of {config.application_id}, and import again") from None
        read = archive.parts(path, config)
        next(read)
        for some in iter(lambda: list(itertools.islice(read, _WRITTEN_MAX)), []):
            target.write(some)
        target.end(positions)
    except KafkaException as error:
        target.abandon()
        again = "no engine starts until the same kwflow import has ended, or kwflow reset has emptied it"
        raise TransportError(f"{path} could not be imported: {target.refused or error.args[0].str()}; {again}", retryable=False) from None
    return found.counts


def _positions(stopped: Stopped, group: str, archived: str) -> list[Position]:
    """Where engines shall start, by partition.  Raises UsageError if there is state that is not of an earlier attempt to import this archive."""
    config, (source, changelog) = stopped.config, groups_of(stopped.config)[group]
    places = stopped.following(group)
    incarnation, partitions = topics.describe(stopped.admin, config, source)
    found = []
    for number in range(partitions):
        where = f"{changelog}[{number}]"
        state = stopped.latest(changelog, number, lambda key, value: value if key == POSITION else b"-" if home_of(key) is not None else None)
        known = position_of(state.get(POSITION), where)
        begun = importing(known)
        if begun != archived and (begun is not None or any(key != POSITION for key in state)):
            what = "another archive was imported into it only in part" if begun is not None else f"it has state in {where}"
            raise UsageError(f"{config.application_id} cannot take an archive: {what}; import into an application of another --application-id, or run kwflow reset")
        found.append(Position(incarnation, known.next if begun is not None and known is not None else places[number], partitions))
    return found


def _kept_ms(settings: Mapping[str, str]) -> int:
    """The age that a record of a topic may have:

    1. Records are exported that were not applied, or letters that nobody has settled.
    2. The archive is imported a month later, as a backup, and the engine is started the next day.
    3. With their times, the broker would have deleted the records by then, and the letters for good.
    """
    ages = [int(settings.get(name, -1)) for name in ("retention.ms", "message.timestamp.before.max.ms")]
    return min((age for age in ages if age >= 0), default=_EVER_MS)


class _Target:
    """The application that an archive is written to."""

    def __init__(self, stopped: Stopped, found: archive.Summary, now_ms: int) -> None:
        config = stopped.config
        self.refused = ""
        self._config = config
        self._stopped = stopped
        self._found = found
        self._encryption = Encryption(config)
        self._topics = {
            STATE: config.changelog_topic, TIMERS: config.timers_changelog_topic, CODE: config.code_topic, RESUME: config.resume_topic, SCHEDULER: config.scheduler_topic,
            LETTERS: config.dead_letter_topic,
        }  # fmt: skip
        self._due = [Due() for _ in range(stopped.partitions[config.timers_changelog_topic])]
        self._written = dict[bytes, bytes]()
        self._letters = {(letter.key, letter.value, letter.headers) for letter in open_in(stopped.read(config.dead_letter_topic)).values()}  # of an earlier import, after which somebody gave `reset`
        self._last = list[tuple[str, bytes | None, bytes | None, Headers, int]]()
        settings = topics.settings_of(stopped.admin, self._topics.values())
        self._oldest_ms = {topic: now_ms - _kept_ms(settings[topic]) // 2 for topic in self._topics.values()}
        self._producer = stopped.producer(f"{config.application_id}-import", [*self._topics.values(), *found.queues])

    def fence(self) -> None:
        self._stopped.fence(self._producer)

    def begin(self, positions: Mapping[str, list[Position]]) -> None:
        """Mark the state: from here on no engine starts."""
        self._producer.begin_transaction()
        for changelog, places in positions.items():
            for number, place in enumerate(places):
                self._put(changelog, msgspec.json.encode(Position(IMPORT + self._found.id, place.next, place.partitions)), POSITION, number)
        self._commit()

    def write(self, some: Iterable[Head | Part | Tail]) -> None:
        """Write the entries among these parts, and keep everything else for the end."""
        self._producer.begin_transaction()
        for part in some:
            if isinstance(part, Sent):
                topic, headers = self._topics[part.role], archive.headers_of(self._config, part)
                if part.role != LETTERS or (part.key, part.value, headers) not in self._letters:
                    self._last.append((topic, part.key, part.value, headers, max(part.timestamp_ms, self._oldest_ms[topic])))
            elif isinstance(part, Call):
                self._keep_call(part.queue, part.call)
            elif isinstance(part, Entry) and part.table == CODE:
                self._put(self._config.code_topic, part.value, part.key, 0)
            elif isinstance(part, Entry) and (home := home_of(part.key)) is not None:
                queue = archive.queue_of(part) if part.table == STATE else ""
                if queue:  # an engine without workers would have run it; the entry stays until it is answered, for the next move and whoever goes back to it
                    self._keep_call(queue, dispatch.decode(part.value))
                number = partition_of(home, self._stopped.partitions[self._topics[part.table]])
                self._put(self._topics[part.table], part.value, part.key, number)
                if part.table == TIMERS:
                    self._due[number].see(part.key)
            elif isinstance(part, Entry) and part.key.startswith(WRITTEN):
                self._written[part.key] = part.value
        self._commit()

    def _keep_call(self, queue: str, call: Dispatch) -> None:
        self._last.append((queue, queues.key_of(call.workflow_id, call.ref), queues.handed_out(call, self._config.resume_topic), call.headers, 0))

    def end(self, positions: Mapping[str, list[Position]]) -> None:
        """Write what must be there once, and what each partition has of its own, and replace the marks."""
        config = self._config
        self._producer.begin_transaction()
        for some in chunks(self._last):
            for topic, key, value, headers, timestamp_ms in some:
                self._put(topic, value, key, partition_of(key, self._stopped.partitions[topic]) if key is not None else 0, headers, timestamp_ms)
            self._producer.flush(_TIMEOUT_S)
        for number, place in enumerate(positions[config.changelog_topic]):
            for key, value in self._written.items():  # whoever owns a partition loads the code that is waited in there
                self._put(config.changelog_topic, value, key, number)
            self._put(config.changelog_topic, b"%d" % (self._found.moves + 1), MOVES, number)
            self._put(config.changelog_topic, msgspec.json.encode(place), POSITION, number)
            self._producer.flush(_TIMEOUT_S)
        for number, place in enumerate(positions[config.timers_changelog_topic]):
            self._put(config.timers_changelog_topic, self._due[number].entry, timers.COUNT, number)
            self._put(config.timers_changelog_topic, msgspec.json.encode(place), POSITION, number)
        self._commit()

    def abandon(self) -> None:
        """Abort what is open, as readers would wait for it until its time is over."""
        with contextlib.suppress(KafkaException):
            self._producer.abort_transaction(_TIMEOUT_S)

    def _put(self, topic: str, value: bytes | None, key: bytes | None, number: int, headers: Headers = (), timestamp_ms: int = 0) -> None:
        def delivered(error: KafkaError | None, _message: object) -> None:
            if error is not None and not self.refused:
                self.refused = f"{topic} does not accept {len(value or b'')} bytes under {key!r}: {error.str()}"

        encrypted, sent = self._encryption.encrypt(topic, value, headers, own=True)
        try:
            self._producer.produce(topic, encrypted, key, number, on_delivery=delivered, timestamp=timestamp_ms, headers=sent)
        except KafkaException as error:
            delivered(error.args[0], None)
            raise

    def _commit(self) -> None:
        commit(self._producer)
