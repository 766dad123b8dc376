"""An input topic that is somebody else's (decision 0058): what becomes of it is no reason to stand still, and what was lost is said.

Its owner may give it partitions, shorten it, and make it anew under the same name.  Which of these topics a position is
of, is noted with the offset that the group commits.
"""

from __future__ import annotations

import contextlib

from confluent_kafka import OFFSET_INVALID, TopicPartition

from kwflow.errors import TransportError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.member import Member
from kwflow.runners.logs import Line

__all__ = ["Foreign"]

_LOOK_S = 5.0
_ANSWER_S = 2.0


class Foreign:
    """The input topic of this member, as it was when its process began."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._topic = member.processor.input_topic
        self._look_at = member.environment.monotonic() + _LOOK_S
        self._reached: dict[int, int] = {}
        self._known: set[int] = set()  # partitions whose committed offset is one of this topic, as its note says

    def look(self, reached: dict[int, int]) -> None:
        """Asked in every turn, with the positions.  Raises TransportError once another topic has the name.

        1. it is deleted and made anew between two requests of our consumer, and gets more records than were read of the old one
        2. the consumer goes on at the offset where it was, and what lies before that in the new one is never read
        """
        now = self._member.environment.monotonic()
        if now >= self._look_at and reached != self._reached:  # a broker that is away is asked nothing: librdkafka may abort (its issue 4605)
            self._look_at, self._reached = now + _LOOK_S, reached
            self._check()

    def _check(self) -> None:
        member = self._member
        there = member.incarnation
        with contextlib.suppress(TransportError):  # it is not there now, or the broker is not
            there, _ = topics.describe(member.admin, member.config, self._topic, _ANSWER_S)
        if there != member.incarnation:
            raise TransportError(f"{self._topic} was made anew while {member.group} read it; the next start reads the new one from its begin")

    def count(self) -> int:
        """Its partitions now.  Raises TransportError."""
        return topics.describe(self._member.admin, self._member.config, self._topic)[1]

    def noted(self, where: TopicPartition) -> int:
        """A committed offset; none if it was noted for the topic that had this name before: records of this one may have been read under it.

        Copied to another cluster it has the note of the first: who wants it says so.
        """
        if where.metadata == self._member.incarnation:
            self._known.add(where.partition)
        if not where.metadata or where.metadata == self._member.incarnation or self._member.config.accept_offset_reset:
            return where.offset
        self._check()  # it may be this process that knows only the old one
        place = f"{where.topic}[{where.partition}]"
        self._say(f"{place} was made anew while {self._member.group} read it, up to {where.offset}: it is read from its begin, some of it again; what was left of the old one is lost")
        return OFFSET_INVALID

    def there(self, number: int, position: int, begin: int, end: int) -> int:
        """Where this partition is read on from."""
        if begin <= position <= end:
            return position
        if position < begin:
            said, next = f"retention deleted {begin - position} records before {self._member.group} read them", begin
        elif number in self._known:  # by an election of a replica that was behind, say: from its begin all would be read twice
            said, next = f"it has lost its last records: it ends at {end}, before {position}, which would be next", end
        else:
            said, next = f"it ends at {end}, before {position}, which would be next: it was made anew, or has lost its last records", begin
        self._say(f"{self._topic}[{number}]: {said}; it is read from {next} on")
        return next

    def _say(self, text: str) -> None:
        self._member.on_log(Line.of(text, "error"))
