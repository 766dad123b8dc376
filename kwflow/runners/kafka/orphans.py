"""Partitions without an owner although the group is stable: found after a static member joins, so that the group can be made to rebalance (K7).

1. A rebalance takes a partition from a static member, which must give it up and then join once more.
2. Its process dies before that, or stalls for so long that it loses its membership.  Whoever joins under its name is given what the group had noted for it, without a rebalance.
3. The partition has no owner until somebody joins or leaves, perhaps for days (seen on Kafka 4.1).

So each member looks after its start, and after it has lost partitions, until it has seen every partition owned.
"""

from __future__ import annotations

from collections.abc import Mapping

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from kwflow.runners.kafka.environment import Environment
from kwflow.runners.kafka.topics import result_of

__all__ = ["Orphans"]

_LOOK_S = 2.0  # between two looks: during a rebalance a partition may be without an owner for a moment


class Orphans:
    """Called in every turn; it looks at the group now and then, and costs nothing once all partitions have been seen owned."""

    def __init__(self, admin: AdminClient, environment: Environment, group: str, partitions: Mapping[str, int]) -> None:
        """`partitions`: topic -> partition count, of each topic that this member reads."""
        self._admin = admin
        self._environment = environment
        self._group = group
        self._places = {(topic, number) for topic, count in partitions.items() for number in range(count)}
        self._next_s: float | None = environment.monotonic() + _LOOK_S
        self._seen: set[tuple[str, int]] = set()
        self.strangers = False  # whether the last look has found members that read another topic

    def look_again(self) -> None:
        """Begin to look again: this member has lost its partitions, and joins anew."""
        self._next_s, self._seen = self._environment.monotonic() + _LOOK_S, set()

    def found(self) -> bool:
        """Whether some partition had no owner in two consecutive looks."""
        if self._next_s is None or self._environment.monotonic() < self._next_s:
            return False
        self._next_s = self._environment.monotonic() + _LOOK_S
        missing = self._missing()
        if missing is None:
            self._seen = set()
        elif not missing:
            self._next_s = None
        else:
            again, self._seen = missing & self._seen, missing
            return bool(again)
        return False

    def _missing(self) -> set[tuple[str, int]] | None:
        """The partitions without an owner; None while the group is not stable, or the broker does not answer."""
        try:
            found = result_of(self._admin.describe_consumer_groups([self._group], request_timeout=5)[self._group], 5)
        except KafkaException:
            return None
        if found.state != ConsumerGroupState.STABLE or not found.members:
            return None
        read = {(place.topic, place.partition) for member in found.members for place in member.assignment.topic_partitions}
        self.strangers = not {topic for topic, _ in read} <= {topic for topic, _ in self._places}
        return self._places - read
