"""What must be true of the calls that workers had (M6.6), checked against the log, the commits of the group, and which call began where.

No product code runs here: ten lines of this file parse the note beside a position.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from kwflow.core.murmur2 import partition_of
from kwflow.testing.kafka.log import Entry, Place, Transaction
from tests.simulation.ledger import Ledger
from tests.simulation.lending import Lease, Lending
from tests.simulation.workers import Begun, Book, Noted, Taken
from tests.simulation.world import Failed, World

__all__ = ["check"]

_NEVER = float("inf")
_NOTE_BYTES_MAX = 4_095


@dataclasses.dataclass(eq=False)
class Call:
    """A record of a queue that is a call.  From `done_ms` on nobody has to do it, as its answer or its withdrawal is in the log."""

    place: Place
    offset: int
    id: str
    ref: str
    key: str
    attempt: int
    sent_ms: float
    headers: tuple[tuple[str, bytes | None], ...]  # which its answer must carry
    answers: list[Entry] = dataclasses.field(default_factory=list)
    withdrawn: int | None = None  # offset of its withdrawal
    before: "Call | None" = None  # the same call, if it is made once more because its workflow went back
    again: bool = False  # whether it is made once more, for which it must have ended
    done_ms: float = _NEVER

    def __str__(self) -> str:
        return f"the call {self.id}|{self.ref} at {self.place}@{self.offset}"


@dataclasses.dataclass(frozen=True)
class Note:
    """The note beside a position: up to `end` every record is done, except those that are `open`, of which some are marked."""

    end: int = 0
    open: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    held: bool = False

    @classmethod
    def of(cls, position: int, text: str) -> "Note":
        if not text:
            return cls()
        found = re.fullmatch(r"kwflow1 ([0-9a-f]+) ([0-9a-f!,]*) (\+?)", text)
        if found is None:
            raise Failed(f"a note that cannot be read: {text!r}")
        steps = [(position + int(step.rstrip("!"), 16), step.endswith("!")) for step in found[2].split(",") if step]
        return cls(position + int(found[1], 16), frozenset(step for step, _ in steps), frozenset(step for step, marked in steps if marked), found[3] == "+")

    def done(self, position: int, offset: int) -> bool:
        return offset < position or (offset < self.end and offset not in self.open)


def check(world: World, ledger: Ledger) -> None:
    """Raises Failed, which names the first thing that is wrong."""
    if world.queues:
        calls = _calls(world, ledger)
        book = world.broker.book
        _answered(calls, world.lending.bare if world.lending is not None else set())
        _Noted(book, calls).check()
        _given_back(book)
        begun = _begun(book, ledger, calls)
        if not world.rewind_share:  # a workflow that goes back takes its details with it
            _continued(world, ledger, book, calls, begun)
        for call in calls:
            _beginnings(call, begun[call])
            _died(book, call)
        if world.lending is not None:
            _lent(world.lending)
        world.happened["calls answered"] += sum(bool(call.answers) for call in calls)
        world.happened["calls begun again"] += sum(len(mine) > 1 for mine in begun.values())
        world.happened["calls that workers died with"] += sum(any(map(_is_death, call.answers)) for call in calls)
        world.happened["calls never begun"] += sum(call.withdrawn is not None and not begun[call] for call in calls)
        world.happened["notes of what is open"] += sum("," in noted.note for noted in book.noted)


def _visible_ms(entry: Entry) -> float:
    return entry.appended_ms if entry.transaction is None else entry.transaction.decided_ms


def _json(entry: Entry) -> Any:
    try:
        return json.loads(entry.value or b"null")
    except ValueError:
        return None


def _travelling(entry: Entry) -> tuple[tuple[str, bytes | None], ...]:
    return tuple((name, value) for name, value in entry.headers if not name.startswith("kwflow-"))


def _calls(world: World, ledger: Ledger) -> list[Call]:
    """All calls of this application, in the order of their places."""
    answers: dict[tuple[str, str], list[Entry]] = collections.defaultdict(list)
    found: list[Call] = []
    for number in range(world.partitions):
        for entry in ledger.visible((world.config.resume_topic, number)):
            told = _json(entry) if entry.transaction is None and dict(entry.headers).keys().isdisjoint({"kwflow-sim-sent", "kwflow-op"}) else None
            if isinstance(told, dict) and "ref" in told:
                answers[(entry.key or b"").decode(), told["ref"]].append(entry)
    begins = _begins(world, ledger)
    made: dict[tuple[str, str], Call] = {}
    for place in [(queue, number) for queue in world.queues for number in range(world.partitions)]:
        last: dict[bytes | None, Call] = {}
        for entry in ledger.visible(place):
            asked = _json(entry)
            if entry.value is None and entry.key in last:
                call = last.pop(entry.key)
                call.withdrawn, call.done_ms = entry.offset, min(call.done_ms, _visible_ms(entry))
            elif isinstance(asked, dict) and asked["resume_topic"] == world.config.resume_topic:
                id, ref, sent_ms = asked["workflow_id"], asked["ref"], _visible_ms(entry)
                before = made.get((id, ref))
                mine = [answer for answer in answers[id, ref] if before is None or answer.offset >= begins(entry, id)]
                names, done_ms = (asked["idempotency_key"], asked["attempt"]), min(map(_visible_ms, mine), default=_NEVER)
                call = last[entry.key] = made[id, ref] = Call(place, entry.offset, id, ref, *names, sent_ms, _travelling(entry), mine, done_ms=done_ms, before=before)
                if before is not None:
                    before.answers, before.again = [answer for answer in before.answers if answer not in mine], True
                found.append(call)
    return found


def _begins(world: World, ledger: Ledger) -> Callable[[Entry, str], int]:
    """A function that tells for a call of an engine where the input begins of the transaction that made it: what answers a call that is made again comes after that, and
    may be in the log before the call."""
    positions: dict[Place, int] = collections.defaultdict(int)
    begins: dict[Transaction, dict[Place, int]] = {}
    for transaction, _ in ledger.transactions():
        ends = transaction.groups.get(world.config.application_id, {})
        begins[transaction] = {place: positions[place] for place in ends}
        positions.update(ends)

    def begin(entry: Entry, id: str) -> int:
        place = world.config.resume_topic, partition_of(id.encode(), world.partitions)
        return begins[entry.transaction].get(place, 0) if entry.transaction is not None else 0

    return begin


def _answered(calls: list[Call], bare: Collection[tuple[str, str]]) -> None:
    """No call is lost, whoever was killed; and its answer carries its headers (semantics §9.3), unless it was given to a gateway that does not have the call."""
    for call in calls:
        for answer in call.answers:
            if _travelling(answer) != call.headers and not (not _travelling(answer) and (call.id, call.ref) in bare):
                raise Failed(f"{call} had the headers {call.headers}, and its answer has {_travelling(answer)}")
        if not call.answers and call.withdrawn is None and not call.again:
            raise Failed(f"M6.6: {call} was never answered, and never taken back")


class _Noted:
    """Checks each position that the group accepted, in order."""

    def __init__(self, book: Book, calls: list[Call]) -> None:
        self.book = book
        self.calls: dict[Place, list[Call]] = collections.defaultdict(list)
        self.done: dict[Place, set[Call]] = collections.defaultdict(set)
        self.positions: dict[Place, int] = collections.defaultdict(int)
        for call in calls:
            self.calls[call.place].append(call)

    def check(self) -> None:
        for noted in self.book.noted:
            self._check(noted)

    def _check(self, noted: Noted) -> None:
        where = f"the position {noted.position} of {noted.place} with {noted.note!r}, noted at {noted.ms:.1f} by {noted.by.process if noted.by else 'nobody'}"
        if len(noted.note.encode()) > _NOTE_BYTES_MAX:
            raise Failed(f"M6.6: {where} is too long")
        if noted.position < self.positions[noted.place]:
            raise Failed(f"M6.6: {where} goes back from {self.positions[noted.place]}")
        self.positions[noted.place] = noted.position
        note = Note.of(noted.position, noted.note)
        done = {call for call in self.calls[noted.place] if note.done(noted.position, call.offset)}
        early = [call for call in done if call.done_ms > noted.ms]
        if early:
            raise Failed(f"M6.6: {where} passes {early[0]}, which is open until {early[0].done_ms:.1f}")
        forgotten = self.done[noted.place] - done
        if forgotten:
            raise Failed(f"M6.6: {where} forgets that {min(forgotten, key=lambda call: call.offset)} is done")
        self.done[noted.place] = done


def _given_back(book: Book) -> None:
    """A worker that gave a partition back has said so in its note, so that nobody takes it for dead."""
    last: dict[Taken, Noted] = {noted.by: noted for noted in book.noted if noted.by is not None}
    for taken in book.taken:
        noted = last.get(taken)
        if taken.ended_ms < _NEVER and not taken.lost and not taken.failed and noted is not None and Note.of(noted.position, noted.note).held:
            raise Failed(f"K19: {taken.process} gave {taken.place} back at {taken.ended_ms:.1f}, and the next owner finds {noted.note!r}, as if it had died")


# -- what began --------------------------------------------------------------------------------------------------------
def _begun(book: Book, ledger: Ledger, calls: list[Call]) -> dict[Call, list[tuple[Begun, Taken]]]:
    """Each call with its beginnings, and the assignment of each.  A worker must not begin a call that it does not have."""
    of_record = {(call.place, call.offset): call for call in calls}
    asked: dict[tuple[str, int], list[Call]] = collections.defaultdict(list)
    for place in dict.fromkeys(call.place for call in calls):
        for entry in ledger.visible(place):
            call = of_record.get((place, entry.offset))
            if call is not None:
                value = _json(entry)
                asked[value["idempotency_key"], value["attempt"]].append(call)
    found: dict[Call, list[tuple[Begun, Taken]]] = collections.defaultdict(list)
    taken: dict[tuple[str, Place], list[Taken]] = collections.defaultdict(list)
    for one in book.taken:
        taken[one.process, one.place].append(one)
    for begun in book.begun:
        if begun.process.startswith(("worker", "gateway")) and (begun.idempotency_key, begun.attempt) not in asked:
            raise Failed(f"M6.6: {begun.process} began a call at {begun.ms:.1f} that nobody has asked for: {begun.idempotency_key}, attempt {begun.attempt}")
        calls_of_it = sorted(asked[begun.idempotency_key, begun.attempt], key=lambda call: call.sent_ms)
        had = [(call, mine) for call in calls_of_it if (mine := _had(taken[begun.process, call.place], call, begun)) is not None]
        if calls_of_it and not had:
            raise Failed(f"M6.6: {begun.process} began {calls_of_it[0]} at {begun.ms:.1f}, which it does not have")
        if had:  # a workflow that goes back makes a call once more
            found[had[-1][0]].append((begun, had[-1][1]))
    return found


def _had(taken: list[Taken], call: Call, begun: Begun) -> Taken | None:
    """The assignment with which the process had this call when it began one; None if it did not have it."""
    mine = [one for one in taken if one.begun_ms <= begun.ms and one.read.get(call.offset, _NEVER) <= begun.ms]
    return mine[-1] if mine and begun.ms <= mine[-1].ended_ms else None


def _beginnings(call: Call, begun: list[tuple[Begun, Taken]]) -> None:
    for one, taken in begun:
        position, text = taken.fetched
        if Note.of(position, text).done(position, call.offset):
            raise Failed(f"M6.6: {one.process} began {call} at {one.ms:.1f}, although the group's note, {position} with {text!r}, said that it is done")
        if call.withdrawn is not None and (taken.known.get(call.withdrawn, _NEVER) < one.ms or taken.turns[call.offset] == taken.turns.get(call.withdrawn)):
            raise Failed(f"M6.6: {one.process} began {call} at {one.ms:.1f}, and had read before that it was taken back")
    for taken, count in collections.Counter(taken for _, taken in begun).items():
        if count > 1 and taken.process.startswith("worker"):
            raise Failed(f"M6.6: {taken.process} began {call} {count} times while it had the partition")


def _lent(lending: Lending) -> None:
    """ET-6, ET-17..ET-19: while a call is locked nobody else gets it, and nobody gets one that has ended, as far as its gateway knows.  It may be made again."""
    last: dict[int, Lease] = {}
    for lease in lending.leases:
        before = last.get(lease.reading)
        where = f"{lease.gateway} lent {lease.call.workflow_id}|{lease.call.ref} to {lease.to} at {lease.ms:.1f}"
        if before is not None and lease.ms < before.over_ms:
            raise Failed(f"ET-6: {where}, and {before.to} has it until {before.over_ms:.1f}")
        if lease.ms > lending.ended.get(lease.reading, _NEVER):
            raise Failed(f"ET-21: {where}, and knew since {lending.ended[lease.reading]:.1f} that it has ended")
        last[lease.reading] = lease
        lending.world.happened["calls lent again"] += before is not None


# -- where they continue -----------------------------------------------------------------------------------------------
class _Details:
    """The heartbeat details of calls, by the log alone: an attempt has those of the one before it until it gives its own."""

    def __init__(self, world: World, ledger: Ledger, calls: list[Call]) -> None:
        self.given: dict[tuple[str, str], list[tuple[float, list[int]]]] = collections.defaultdict(list)
        for number in range(world.partitions):
            for entry in ledger.visible((world.config.resume_topic, number)):
                if ("kwflow-op", b"heartbeat") in entry.headers:
                    told = _json(entry)
                    self.given[(entry.key or b"").decode(), told["ref"]].append((entry.appended_ms, told["details"]))
        self.calls = calls

    def may_find(self, call: Call, asked_ms: float, answered_ms: float) -> list[list[int]]:
        """What an attempt may be told that has asked then: the last details that were in the log before, or what was written while it waited."""
        given = self.given[call.id, call.ref]
        before = [details for ms, details in given if ms <= asked_ms]
        return [*(before[-1:] or self._first(call)), *(details for ms, details in given if asked_ms < ms <= answered_ms)]

    def _first(self, call: Call) -> list[list[int]]:
        """What the attempt before this call has left behind when it had failed, or while its failure waited because the workflow was parked or paused."""
        last = next((other for other in self.calls if (other.key, other.attempt) == (call.key, call.attempt - 1)), None)
        if last is None:
            return [[]]
        given = self.given[last.id, last.ref]
        before = [details for ms, details in given if ms <= last.done_ms]
        return [*(before[-1:] or self._first(last)), *(details for ms, details in given if last.done_ms < ms <= call.sent_ms)]


def _continued(world: World, ledger: Ledger, book: Book, calls: list[Call], begun: dict[Call, list[tuple[Begun, Taken]]]) -> None:
    """An attempt that fails has its last details in the log.  The next one finds the last ones there, whoever gave them, unless nobody waits for it any more."""
    of = {one: call for call, mine in begun.items() for one, _ in mine}
    details = _Details(world, ledger, calls)
    for call, [(one, taken), *more] in begun.items():
        failed = [answer for answer in call.answers if b'"type":"ValueError"' in (answer.value or b"") and answer.appended_ms <= taken.ended_ms]
        given = details.given[call.id, call.ref]
        if failed and given and not more and not any(told[-2:] == [call.attempt] * 2 and ms <= failed[0].appended_ms for ms, told in given):
            raise Failed(f"M6.6: {one.process} had an attempt of {call} that failed at {failed[0].appended_ms:.1f}, and what it had said before is not in the log: {given}")
    for looked in book.looked:
        call = of.get(looked.begun)
        if call is None or call.done_ms <= looked.ms or "-" in call.id:  # a copy begins with the details of its original
            continue
        may = details.may_find(call, looked.begun.ms, looked.ms)
        if looked.runs not in may:
            raise Failed(f"M6.6: {looked.begun.process} continued {call} at {looked.ms:.1f} from {looked.runs}, and the last details were {may}")
        world.happened["details that a worker was told"] += bool(looked.runs)
        world.happened["details that a dead worker gave"] += looked.runs[-1:] == [call.attempt]


# -- what workers died with --------------------------------------------------------------------------------------------
def _is_death(answer: Entry) -> bool:
    return b'"type":"WorkerDied"' in (answer.value or b"")


def _died(book: Book, call: Call) -> None:
    """K19: an attempt was failed only if two workers had the call, marked or not known to be innocent, and neither gave it back."""
    for answer in filter(_is_death, call.answers):
        mine = [one for one in book.taken if one.place == call.place and 0 <= one.fetched_ms <= answer.appended_ms]
        if not any(_blames(book, made, one) for made in _earlier(call) for one in mine):
            raise Failed(f"K19: {call} was answered with WorkerDied at {answer.appended_ms:.1f}, and no two workers died with it")


def _earlier(call: Call | None) -> Iterator[Call]:
    """The call, and the times that it was made before: an answer to one of these may have come late."""
    while call is not None:
        yield call
        call = call.before


def _blames(book: Book, call: Call, third: Taken) -> bool:
    """Whether the second worker marked the call, after it had found that the first one died when the call was in the log already."""
    position, text = third.fetched
    note = Note.of(position, text)
    if not note.held or call.offset not in note.marked:
        return False
    second = next((noted.by for noted in reversed(book.noted) if noted.place == call.place and noted.ms <= third.fetched_ms), None)
    while second is not None:
        found = Note.of(*second.fetched)
        if not found.held:
            return False
        if call.offset not in found.marked:
            return call.sent_ms <= second.looked_ms
        second = next((noted.by for noted in reversed(book.noted) if noted.place == call.place and noted.ms <= second.fetched_ms), None)
    return False
