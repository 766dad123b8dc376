"""What must be true of a feed (decision 0058), checked against the log, the positions that its transactions moved, and the events themselves.

No product code runs here: `messages` says in twenty lines what becomes of each kind of event.
"""

import collections
import json
import re
from typing import Any

from kwflow.core.murmur2 import partition_of
from kwflow.testing.kafka.log import Entry, Place, Transaction
from tests.simulation.ledger import Ledger
from tests.simulation.others import EVENTS, GROUP, NOTED, Sent
from tests.simulation.world import Failed, World

__all__ = ["check", "is_fed"]

Headers = tuple[tuple[str, bytes | None], ...]
Message = tuple[str, Any, Headers]  # key, value, headers
Form = tuple[str, bytes | None, Any, Headers]  # topic, key, value, headers
_NEVER = float("inf")
_UNKNOWN = {"kwflow-error-message", "kwflow-error-at"}  # headers of a dead letter that a checker cannot predict
_DIED = b"the engine died three times with this record"
_FED = re.compile(rb'"event":"\d+\.\d+"|"reason":"event \d+\.\d+"')
_ENDED_MS = 5_000  # within this time after somebody has the partition


def check(world: World, ledger: Ledger) -> None:
    """Raises Failed, which names the first thing that is wrong."""
    if world.others is not None:
        checker = _Fed(world)
        for transaction, entries in ledger.transactions():
            if transaction.producer.startswith(f"{GROUP}-"):
                checker.apply(transaction, entries)
        checker.finish()
        _in_order(world, ledger)
        _asked_again(world, ledger)
        _readers(world, ledger)


def messages(event: Sent, feeding: bool = True) -> list[Message] | str:
    """The messages that an event makes, or the reason of its dead letter.  `feeding`: in a process that runs feeds, where `late` events still fail."""
    try:
        value = json.loads(event.value or b"null")
        number, kind, to = value["number"], value["kind"], value["to"]
    except ValueError:
        return "bad-json"
    except (TypeError, KeyError):
        return "bad-input"
    travelling = tuple(pair for pair in event.headers if not pair[0].startswith("kwflow-"))
    if not isinstance(to, list):
        return "bad-input"
    if kind in ("tell", "several") or (kind == "late" and not feeding):
        start = {"workflow": "main", "input": NOTED}
        return [(id, {"name": "event", "value": {"event": f"{number}.{index}"}, "start": start}, (*travelling, ("kwflow-op", b"signal"))) for index, id in enumerate(to)]
    if kind == "start":
        return [(to[0], {"new": {"program": ["sleep", 0.5], "event": f"{number}.0"}}, (*travelling, ("kwflow-workflow", b"main")))]
    if kind == "cancel":
        return [(to[0], {"reason": f"event {number}.0"}, (*travelling, ("kwflow-op", b"cancel")))]
    return [] if kind == "nothing" else "refused" if kind in ("huge", "kill") else "feed-failed"


class _Fed:
    """Checks all transactions of the feed, one after the other."""

    def __init__(self, world: World) -> None:
        assert world.others is not None
        self.world = world
        self.others = world.others
        self.done: dict[Sent, Transaction] = {}
        self.position: dict[tuple[str, int], int] = collections.defaultdict(int)  # (id of the topic, partition)
        self.of_partition: dict[tuple[str, int], list[Sent]] = collections.defaultdict(list)
        for event in self.others.sent:
            self.of_partition[event.topic, event.partition].append(event)

    def apply(self, transaction: Transaction, entries: list[tuple[Place, Entry]]) -> None:
        where = f"the transaction of {transaction.producer} decided at {transaction.decided_ms:.1f}"
        found: dict[Sent, list[tuple[Place, Entry]]] = collections.defaultdict(list)
        for place, entry in entries:
            if entry.key is not None and place[1] != partition_of(entry.key, self.world.partitions):
                raise Failed(f"K6: {entry.key!r} of {place[0]} was written to partition {place[1]}")
            found[self.others.sent[int(dict(entry.headers)["number"] or 0)]].append((place, entry))
        self._moved(transaction, set(found), where)
        for event, written in found.items():
            if event in self.done:
                raise Failed(f"{event} is fed twice: in {where}, and before that at {self.done[event].decided_ms:.1f}")
            _same(self.world, event, written, True, where)
            self.done[event] = transaction

    def _moved(self, transaction: Transaction, fed: set[Sent], where: str) -> None:
        """Every event that a position passes is in its transaction, or makes nothing, or was lost; and the position passes every event in the transaction."""
        for place, offset in transaction.groups.get(GROUP, {}).items():
            topic = next((event.topic for event in fed if event.partition == place[1]), transaction.notes[place] or self.others.topic_at(transaction.begun_ms))
            begin = self.position[topic, place[1]]
            passed = {event for event in self.of_partition[topic, place[1]] if begin <= event.offset < offset}
            for event in sorted(passed - fed, key=lambda event: event.offset):
                if not messages(event):  # one cannot see whether it was read: it may have been, before it was lost
                    continue
                if event.lost_ms > transaction.begun_ms:
                    raise Failed(f"G3: {where} moves {GROUP} from {begin} to {offset}, over {event}, which is not in it")
                if begin and not any(f"{EVENTS}[{place[1]}]: retention deleted" in line for line in self.world.log):
                    raise Failed(f"{where} moves {GROUP} from {begin} to {offset}, over {event}, which was lost, and nobody has said so")
                self.world.happened["events lost"] += 1
            fed = fed - passed
            self.position[topic, place[1]] = max(begin, offset)
        if fed:
            raise Failed(f"{where} has {min(fed, key=lambda event: event.number)}, and its position is not behind that: {transaction.groups}")

    def finish(self) -> None:
        """Every event that was still there at the end was read."""
        for event in self.others.sent:
            if event not in self.done and event.lost_ms == _NEVER and messages(event):
                raise Failed(f"G3: {event} was never read")
        self.world.happened["events fed"] += sum(not isinstance(messages(event), str) for event in self.done)
        self.world.happened["events not taken"] += sum(isinstance(messages(event), str) for event in self.done)


def _same(world: World, event: Sent, written: list[tuple[Place, Entry]], feeding: bool, where: str) -> None:
    """G1: the records written for an event are exactly those that it must become."""
    forms = [_form(world, place, entry) for place, entry in written]
    wanted = _expected(world, event, messages(event, feeding))
    if any(_DIED in (dict(entry.headers).get("kwflow-error-message") or b"") for _, entry in written):
        if world.crashes < 3:
            raise Failed(f"K19: {event} is refused, and only {world.crashes} processes died")
        wanted = _expected(world, event, "refused")
    if sorted(forms, key=repr) != sorted(wanted, key=repr):  # sorted, as records with different keys have no order among them
        raise Failed(f"G1: {where} wrote of {event}:\n  {forms}\nand should have written\n  {wanted}")


def _expected(world: World, event: Sent, made: list[Message] | str) -> list[Form]:
    if not isinstance(made, str):
        return [(world.config.resume_topic, key.encode(), value, headers) for key, value, headers in made]
    about = {"reason": made, "topic": EVENTS, "partition": event.partition, "offset": event.offset, "timestamp": event.timestamp_ms}
    headers = (*event.headers, *((f"kwflow-error-{name}", str(value).encode()) for name, value in about.items()), ("kwflow-error-feed", EVENTS.encode()))
    return [(world.config.dead_letter_topic, event.key, event.value, headers)]


def _form(world: World, place: Place, entry: Entry) -> Form:
    headers = tuple((name, value) for name, value in entry.headers if name not in _UNKNOWN)
    return place[0], entry.key, entry.value if place[0] == world.config.dead_letter_topic else _value(entry.value), headers


def _value(value: bytes | None) -> Any:
    text = (value or b"").decode()
    return {"new": json.loads(text[4:])} if text.startswith("new:") else json.loads(text)


def _in_order(world: World, ledger: Ledger) -> None:
    """G2: messages from events of one partition to one workflow arrive in the events' order."""
    assert world.others is not None
    for number in range(world.partitions):
        last: dict[tuple[bytes | None, str, int], tuple[int, int]] = {}
        for entry in ledger.visible((world.config.resume_topic, number)):
            if entry.transaction is not None and entry.transaction.producer.startswith(f"{GROUP}-"):
                event = world.others.sent[int(dict(entry.headers)["number"] or 0)]
                said = re.search(rb'"event":"\d+\.(\d+)"', entry.value or b"")
                now, place = (event.offset, int(said[1]) if said else 0), (entry.key, event.topic, event.partition)
                if now <= last.get(place, (-1, 0)):
                    raise Failed(f"G2: {event} came to {entry.key!r} behind {last[place]}")
                last[place] = now


def _asked_again(world: World, ledger: Ledger) -> None:
    """A retried dead letter does once what its record would have done.  An engine does it, where the feed no longer fails."""
    assert world.others is not None
    found: dict[Sent, list[tuple[Place, Entry]]] = collections.defaultdict(list)
    for transaction, entries in ledger.transactions():
        for place, entry in entries:
            if not transaction.producer.startswith(f"{GROUP}-") and (is_fed(world, place, entry) or "kwflow-error-feed" in dict(entry.headers)):
                found[world.others.sent[int(dict(entry.headers)["number"] or 0)]].append((place, entry))
    for event in {*found, *world.others.retried}:
        if event not in world.others.retried:
            raise Failed(f"nobody has asked about {event} once more, and engines wrote {found[event]}")
        _same(world, event, found[event], False, "asked once more, an engine")
    world.happened["events asked about once more"] += len(world.others.retried)


def is_fed(world: World, place: Place, entry: Entry) -> bool:
    """Whether this is a message that a feed has made, in its own process or when an engine asked it."""
    return place[0] == world.config.resume_topic and entry.transaction is not None and _FED.search(entry.value or b"") is not None


def _readers(world: World, ledger: Ledger) -> None:
    """K1: the next owner of a dead feed's partitions ends its transaction, so that readers of the input topic do not wait longer.

    Checked only in runs without other faults that could prevent it.
    """
    faults = world.faults
    if any((faults.slow, faults.stall, faults.freeze, faults.lost, faults.abort, faults.rebalance, faults.jump, faults.wipe)) or faults.markers_ms > 100:
        return
    history = world.broker.group(GROUP).history
    for transaction in ledger.all():
        left = next((at for at, shares in history if at > transaction.begun_ms and all(member.rpartition("-")[0] != transaction.producer for member in shares)), _NEVER)
        if transaction.producer.startswith(f"{GROUP}-") and transaction.decided_ms > left + _ENDED_MS:
            [heirs] = [shares for at, shares in history if at == left][:1]
            if any(share and _lives(world, member.rpartition("-")[0], left, left + _ENDED_MS) for member, share in heirs.items()):
                raise Failed(f"K1: {transaction.producer} died in a transaction at {transaction.begun_ms:.1f}, which {sorted(heirs)} left open from {left:.1f} to {transaction.decided_ms:.1f}")


def _lives(world: World, name: str, since: float, until: float) -> bool:
    """Whether one process with this name lives all of this time."""
    return any(f"{GROUP}-{life.instance}-0" == name and life.begun <= since and life.ended >= until for machine in world.machines for life in machine.lives)
