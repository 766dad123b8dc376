"""A client's side of a group: what librdkafka's background thread does while the application does not poll.

It sends heartbeats, joins again when the group rebalances or the number of partitions of its topics changes, and learns that it was
evicted.  What the application has to be told waits in `events` until it polls.  A frozen host does none of this until it runs again.
"""

from __future__ import annotations

import collections
from typing import Literal

from confluent_kafka import KafkaError

from kwflow.testing.kafka.broker import Broker
from kwflow.testing.kafka.groups import Metadata
from kwflow.testing.kafka.log import Place
from kwflow.testing.kafka.time import Host
from kwflow.testing.kafka.transactions import Refused

__all__ = ["Membership"]

Event = tuple[Literal["assign", "revoke", "lost"], list[Place]]


class Membership:
    """The membership of one client.  `held` is what the application was told that it holds."""

    def __init__(self, broker: Broker, host: Host, group: str, instance: str | None, topics: tuple[str, ...], settings: dict[str, float]) -> None:
        self.events: collections.deque[Event] = collections.deque()
        self.errors: collections.deque[KafkaError] = collections.deque()
        self.held: set[Place] = set()
        self.fatal = False
        self.closed = False
        self.polled_ms = broker.time.now
        self._broker = broker
        self._host = host
        self._group = broker.group(group)
        self._instance = instance
        self._topics = topics
        self._session_ms, self._heartbeat_ms, self._poll_ms, self._refresh_ms = settings["session"], settings["heartbeat"], settings["poll"], settings["refresh"]
        self._known, self._looked_ms = self._counts(), broker.time.now
        self._member = ""
        self._generation = -1
        self._joining = False
        self._stalled = False
        self._gave_up = False
        self._beat()

    def metadata(self) -> Metadata:
        return Metadata(self._group.name, self._member, self._instance, self._generation)

    def polled(self) -> None:
        """Note that the application polls: it is alive, and joins again if it was considered dead."""
        self.polled_ms = self._broker.time.now
        self._stalled = False

    def served(self, event: Event) -> None:
        """Note that the callback of an event has returned.

        A client that gave something up joins again, but only after it was told what it was assigned at the same time: otherwise
        that would be assigned to somebody else, too.
        """
        kind, places = event
        if kind == "assign":
            self.held |= set(places)
        else:
            self.held -= set(places)
            self._forget_given_up()
            self._gave_up = kind == "revoke"
        if self._gave_up and not self.events:
            self._gave_up = False
            if self._member:
                self._join()

    def _forget_given_up(self) -> None:
        """What the application gave up while it lost its membership, it need not give up again."""
        left: list[Event] = [(kind, places if kind == "assign" else [place for place in places if place in self.held]) for kind, places in self.events]
        self.events = collections.deque((kind, places) for kind, places in left if places or kind == "assign")

    def leave(self) -> None:
        """Unsubscribe: leave the group at once, static or not."""
        if self._member:
            self._group.remove(self._member)
        self._member, self._generation, self._joining = "", -1, False
        self.closed = True
        self.events.clear()
        if self.held:
            self.events.append(("revoke", sorted(self.held)))

    def close(self) -> None:
        self.closed = True
        if self._member and not self.fatal:
            self._group.leave(self._member)

    def _beat(self) -> None:
        if self.closed or not self._host.alive:
            return
        if self._host.running and not self.fatal:
            self.work()
        self._broker.time.after(self._heartbeat_ms, self._beat)

    def work(self) -> None:
        """Do one turn of the background thread."""
        try:
            if not self._stalled and self._broker.time.now - self.polled_ms > self._poll_ms:
                self._stall()
            elif self._joining:
                self._check_rebalance()
            elif not self._member:
                if not self._stalled and not self.events:
                    self._join()
            else:
                self._group.heartbeat(self._member, self._instance, self._generation)
                self._refresh()
        except Refused as refused:
            self._refused(refused)

    def _counts(self) -> list[int]:
        topics = self._broker.topics
        return [len(topics[name].partitions) if name in topics else 0 for name in self._topics]

    def _refresh(self) -> None:
        """Refresh the metadata now and then.  A client that was restarted does not know the earlier number of partitions, and finds no change."""
        if self._broker.time.now - self._looked_ms < self._refresh_ms or self.events:
            return
        before, self._known, self._looked_ms = self._known, self._counts(), self._broker.time.now
        if self._known != before:
            self._join()

    def _refused(self, refused: Refused) -> None:
        if refused.code == KafkaError.REBALANCE_IN_PROGRESS:
            if not self.events:
                self._join()
        elif refused.code == KafkaError.FENCED_INSTANCE_ID:
            self.fatal = True
            self.errors.append(KafkaError(KafkaError._FATAL, f"Fatal error: Broker: Static consumer fenced by other consumer with same group.instance.id: {refused.reason}"))
            self._lose()
        else:
            self._lose()
        self._broker.time.changed()

    def _stall(self) -> None:
        """max.poll.interval.ms has passed: stop heartbeats; the application is told when it polls."""
        self._stalled = True
        self.errors.append(KafkaError(KafkaError._MAX_POLL_EXCEEDED, f"application maximum poll interval ({self._poll_ms:g} ms) exceeded"))
        if self._member:
            self._group.leave(self._member)
        self._lose()

    def _lose(self) -> None:
        """Forget the member id.  The generation stays until a new one is told, so that what is sent meanwhile is refused, also by a group without members."""
        self._member, self._joining = "", False
        self.events.clear()
        if self.held:
            self.events.append(("lost", sorted(self.held)))

    def _join(self) -> None:
        try:
            self._member = self._group.join(self._member, self._instance, self._topics, self._session_ms, self._poll_ms, self.held)
            self._group.on_settled[self._member] = self._join_answered
        except Refused as refused:
            self._refused(refused)
            return
        self._joining = True
        self._check_rebalance()

    def _join_answered(self) -> None:
        """Handle the answer to the join, if this client can still receive it."""
        if self._host.alive and self._host.running and not self.closed and self._joining:
            self.work()

    def _check_rebalance(self) -> None:
        """Check whether the rebalance that this member joined has completed, and note what it assigned."""
        settled = self._group.settled(self._member, self._instance)
        if settled is None:
            return
        self._joining = False
        self._generation, given = settled
        if self.held - given:
            self.events.append(("revoke", sorted(self.held - given)))
        self.events.append(("assign", sorted(given - self.held)))
        self._broker.time.changed()
