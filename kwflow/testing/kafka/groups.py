"""Consumer groups: generations, cooperative rebalances, static members, offsets that are pending in a transaction.

A rebalance begins when a member joins, leaves or times out.  It completes when every member has joined again (in the
background: the application need not poll for that), and gives each member its share.  A partition that moves is first
revoked from its owner, and assigned in the next generation, after the owner's application has served its callback.
Errors are raised as `Refused`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import KafkaError

from kwflow.testing.kafka.log import COMMITTED, Place, Transaction
from kwflow.testing.kafka.time import VirtualTime
from kwflow.testing.kafka.transactions import Refused

__all__ = ["Group", "Member", "Metadata"]

_NOTE_BYTES_MAX = 4_095  # offset.metadata.max.bytes is 4,096, and a note has to be shorter


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    """What `consumer_group_metadata()` returns: the identity of a member in a group at one moment."""

    group: str
    member: str
    instance: str | None
    generation: int


@dataclasses.dataclass(eq=False, slots=True)
class Member:
    """One member.  `claimed` is what its client says that it holds, `given` what the group wants it to hold."""

    id: str
    instance: str | None
    topics: tuple[str, ...]
    session_ms: float
    rebalance_ms: float
    seen_ms: float
    claimed: set[Place] = dataclasses.field(default_factory=set)
    given: set[Place] = dataclasses.field(default_factory=set)
    joined: bool = False


class Group:
    """One group.  `places` returns the partitions of a topic; `history` has every completed assignment, for checkers."""

    def __init__(self, name: str, time: VirtualTime, places: Callable[[str], list[Place]]) -> None:
        self.name = name
        self.generation = 0
        self.members: dict[str, Member] = {}
        self.static: dict[str, str] = {}  # member ids by instance id
        self.offsets: dict[Place, int] = {}
        self.notes: dict[Place, str] = {}  # the metadata of offsets
        self.pending: dict[Transaction, dict[Place, int]] = {}
        self._outdated: set[tuple[Transaction, Place]] = set()  # those of them after which the offset was set outside of the transaction
        self.rebalancing = False
        self.on_settled: dict[str, Callable[[], None]] = {}  # by member id: tells its client of a completed rebalance
        self.history: list[tuple[float, dict[str, set[Place]]]] = []
        self._time = time
        self._places = places
        self._numbers = 0
        self._round = 0

    # -- membership ------------------------------------------------------------------------------------------------
    def join(self, member_id: str, instance: str | None, topics: tuple[str, ...], session_ms: float, rebalance_ms: float, claimed: set[Place]) -> str:
        """Join, or join again, and return the member id.  `settled` returns the outcome once the rebalance has completed."""
        if member_id and member_id not in self.members:
            raise Refused(KafkaError.FENCED_INSTANCE_ID if instance in self.static else KafkaError.UNKNOWN_MEMBER_ID, "not a member")
        known = self.static.get(instance) if instance is not None else None
        if not member_id and known is not None:
            return self._replace(known)
        if not member_id:
            self._numbers += 1
            member_id = f"{instance or 'member'}-{self._numbers}"
            self.members[member_id] = Member(member_id, instance, topics, session_ms, rebalance_ms, self._time.now)
            if instance is not None:
                self.static[instance] = member_id
            self._expire(member_id)
        member = self.members[member_id]
        member.seen_ms, member.claimed, member.joined = self._time.now, set(claimed), True
        self._rebalance()
        member.joined = True
        self._complete_if_all()
        return member_id

    def _replace(self, old: str) -> str:
        """Replace a static member that was restarted: it gets what it had, without a rebalance, and the old one is fenced."""
        member = self.members.pop(old)
        self._numbers += 1
        member.id = f"{member.instance}-{self._numbers}"
        member.seen_ms, member.claimed = self._time.now, set()
        self.members[member.id] = member
        self.static[member.instance or ""] = member.id
        self._expire(member.id)
        if self.rebalancing:
            member.joined = True
            self._complete_if_all()
        return member.id

    def leave(self, member_id: str) -> None:
        """Remove a dynamic member; a static one stays until its session has timed out."""
        member = self.members.get(member_id)
        if member is not None and member.instance is None:
            self._remove(member)

    def remove(self, member_id: str) -> None:
        """Remove a member, static or not."""
        if member_id in self.members:
            self._remove(self.members[member_id])

    def heartbeat(self, member_id: str, instance: str | None, generation: int) -> None:
        member = self._member(member_id, instance)
        member.seen_ms = self._time.now
        if self.rebalancing and not member.joined:
            raise Refused(KafkaError.REBALANCE_IN_PROGRESS, "the group is rebalancing")
        if not self.rebalancing and generation != self.generation:
            raise Refused(KafkaError.ILLEGAL_GENERATION, "an older generation")

    def settled(self, member_id: str, instance: str | None) -> tuple[int, set[Place]] | None:
        """Return the answer to the member's join, its generation and share; None while that rebalance is going on (the next one may have begun meanwhile)."""
        member = self._member(member_id, instance)
        member.seen_ms = self._time.now
        return None if self.rebalancing and member.joined else (self.generation, set(member.given))

    def _member(self, member_id: str, instance: str | None) -> Member:
        if instance is not None and instance in self.static and self.static[instance] != member_id:
            raise Refused(KafkaError.FENCED_INSTANCE_ID, f"another member has the instance id {instance}")
        if member_id not in self.members:
            raise Refused(KafkaError.UNKNOWN_MEMBER_ID, "not a member of the group (any more)")
        return self.members[member_id]

    def _expire(self, member_id: str) -> None:
        def look() -> None:
            member = self.members.get(member_id)
            if member is None:
                return
            left = member.seen_ms + member.session_ms - self._time.now
            if left <= 0:
                self._remove(member)
            else:
                self._time.after(left, look)

        self._time.after(self.members[member_id].session_ms, look)

    def _remove(self, member: Member) -> None:
        del self.members[member.id]
        if member.instance is not None:
            del self.static[member.instance]
        self._rebalance()
        self._complete_if_all()

    # -- rebalances ------------------------------------------------------------------------------------------------
    def _rebalance(self) -> None:
        if self.rebalancing:
            return
        self.rebalancing = True
        self._round += 1
        number = self._round
        for member in self.members.values():
            member.joined = False
        self._time.after(max((member.rebalance_ms for member in self.members.values()), default=0), lambda: self._give_up(number))
        self._time.changed()

    def _give_up(self, number: int) -> None:
        """Remove dynamic members that have not joined in time, and complete; static members keep their place until their session ends."""
        if not self.rebalancing or number != self._round:
            return
        for member in [member for member in self.members.values() if not member.joined and member.instance is None]:
            del self.members[member.id]
        self._complete()

    def _complete_if_all(self) -> None:
        if self.rebalancing and all(member.joined for member in self.members.values()):
            self._complete()

    def _complete(self) -> None:
        self.rebalancing = False
        self.generation += 1
        target = assign(self._all_places(), {member.id: member.claimed for member in self.members.values()})
        held = {place: member for member in self.members.values() for place in member.claimed}
        for member in self.members.values():
            member.given = {place for place in target.get(member.id, set()) if held.get(place) in (None, member)}
        self.history.append((self._time.now, {member.id: set(member.given) for member in self.members.values()}))
        for member_id in self.members:
            if member_id in self.on_settled:
                self._time.after(1.0, self.on_settled.pop(member_id))
        self._time.changed()

    def _all_places(self) -> list[Place]:
        return [place for topic in sorted({topic for member in self.members.values() for topic in member.topics}) for place in self._places(topic)]

    # -- offsets ---------------------------------------------------------------------------------------------------
    def add_offsets(self, transaction: Transaction, offsets: Mapping[Place, tuple[int, str]], metadata: Metadata) -> None:
        """Add offsets to an open transaction.  They are accepted from a member of this generation.  Metadata without a generation,
        a member id and an instance id is not checked (as that of a dynamic member that has never joined)."""
        if metadata.generation >= 0 or metadata.member or metadata.instance is not None:
            self._member(metadata.member, metadata.instance)
            if metadata.generation != self.generation:
                raise Refused(KafkaError.ILLEGAL_GENERATION, f"generation {metadata.generation}, the group is at {self.generation}")
        gone = next((place for place in offsets if place not in self._places(place[0])), None)
        if gone is not None:
            raise Refused(KafkaError.UNKNOWN_TOPIC_OR_PART, f"no partition {gone}")
        for known in (self.pending.setdefault(transaction, {}), transaction.groups.setdefault(self.name, {})):
            known.update({place: offset for place, (offset, _) in offsets.items()})
        self._outdated -= {(transaction, place) for place in offsets}
        transaction.notes.update({place: note for place, (_, note) in offsets.items()})

    def settle(self, transaction: Transaction) -> None:
        """Apply or drop a transaction's offsets: its marker has reached them.  What was set later outside of it stays."""
        offsets = {place: offset for place, offset in self.pending.pop(transaction, {}).items() if (transaction, place) not in self._outdated}
        self._outdated = {(known, place) for known, place in self._outdated if known is not transaction}
        if transaction.state == COMMITTED:
            self.offsets.update(offsets)
            self.notes.update({place: transaction.notes[place] for place in offsets})

    def commit(self, offsets: Mapping[Place, tuple[int, str]], metadata: Metadata) -> None:
        """Commit offsets and their notes outside a transaction.

        They are accepted from a member of this generation, or from a non-member while there are no members.  Raises Refused if a note is too long; the
        other offsets are committed nevertheless.
        """
        if self.members or metadata.generation >= 0:
            self._member(metadata.member, metadata.instance)
            if metadata.generation != self.generation:
                raise Refused(KafkaError.ILLEGAL_GENERATION, f"generation {metadata.generation}, the group is at {self.generation}")
        short = {place: kept for place, kept in offsets.items() if len(kept[1].encode()) <= _NOTE_BYTES_MAX}
        for place, (offset, note) in short.items():
            self.offsets[place], self.notes[place] = offset, note
            self._outdated |= {(transaction, place) for transaction, pending in self.pending.items() if place in pending}
        if len(short) < len(offsets):
            raise Refused(KafkaError.OFFSET_METADATA_TOO_LARGE, "the metadata of an offset is too large")

    def forget(self, topic: str) -> None:
        """Forget the offsets of a deleted topic, including those pending in a transaction."""
        kept: list[dict[Place, Any]] = [self.offsets, self.notes, *self.pending.values()]
        for known in kept:
            for place in [place for place in known if place[0] == topic]:
                del known[place]

    def unstable(self, place: Place) -> bool:
        return any(place in offsets for offsets in self.pending.values())


def assign(places: list[Place], claimed: Mapping[str, set[Place]]) -> dict[str, set[Place]]:
    """Assign partitions as cooperative-sticky does: balanced, and no member loses more than has to move."""
    if not claimed:
        return {}
    shares: dict[str, set[Place]] = {member: set() for member in claimed}
    left = []
    floor, more = divmod(len(places), len(claimed))
    for place in places:
        owner = next((member for member in sorted(claimed) if place in claimed[member]), None)
        over = sum(len(share) > floor for share in shares.values())
        if owner is not None and (len(shares[owner]) < floor or (len(shares[owner]) == floor and over < more)):
            shares[owner].add(place)
        else:
            left.append(place)
    for place in left:
        shares[min(shares, key=lambda member: (len(shares[member]), member))].add(place)
    return shares
