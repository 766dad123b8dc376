"""Partitions that nobody has although the group is stable: found after a start, so that the group can be made to share anew (K7).

1. a rebalance takes a partition from a static member, which is to give it up and then join once more
2. its process dies before that; the next one with its name is given what the group noted for it, without a rebalance
3. the partition stays nobody's until somebody joins or leaves, perhaps for days (seen on Kafka 4.1)

Only the start of a static member can leave it so, so each looks after its start, until it has seen that all is shared.
"""

from __future__ import annotations

from collections.abc import Mapping

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from kwflow.runners.kafka.environment import Environment
from kwflow.runners.kafka.topics import told

__all__ = ["Orphans"]

_LOOK_S = 2.0  # between two looks: a rebalance has moments in which a partition is on its way


class Orphans:
    """Asked in every turn; it looks at the group now and then and costs nothing once all is well."""

    def __init__(self, admin: AdminClient, environment: Environment, group: str, partitions: Mapping[str, int]) -> None:
        """`partitions`: of each topic that this member reads, how many there are."""
        self._admin = admin
        self._environment = environment
        self._group = group
        self._places = {(topic, number) for topic, count in partitions.items() for number in range(count)}
        self._next_s: float | None = environment.monotonic() + _LOOK_S
        self._seen: set[tuple[str, int]] = set()

    def found(self) -> bool:
        """Whether there are partitions that had no owner in two looks, and have none now."""
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
        """None while the group is not stable, or the broker does not answer."""
        try:
            found = told(self._admin.describe_consumer_groups([self._group], request_timeout=5)[self._group], 5)
        except KafkaException:
            return None
        if found.state != ConsumerGroupState.STABLE or not found.members:
            return None
        return self._places - {(place.topic, place.partition) for member in found.members for place in member.assignment.topic_partitions}
