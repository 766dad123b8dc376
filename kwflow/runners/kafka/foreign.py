"""An input topic that belongs to somebody else (decision 0058): whatever happens to it, the engine goes on, and logs what was lost.

Its owner may add partitions, delete records, or create it anew under the same name.  The offset that the group commits has a
note that says to which of these topics it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, TopicCollection, TopicPartition

from kwflow.errors import TransportError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.member import Member, again
from kwflow.runners.logs import Line

__all__ = ["Foreign"]

_LOOK_S = 5.0
_ANSWER_S = 5


class Foreign:
    """The input topic of this member, as it was when the process began."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._topic = member.processor.input_topic
        self._look_at = member.environment.monotonic() + _LOOK_S
        self._known: set[int] = set()  # partitions whose committed offset belongs to this topic, according to its note

    def check_now_and_then(self, committed: Callable[[], Iterable[int]]) -> None:
        """Check now and then whether the topic still exists.  Raises TransportError if not.

        Called in every turn.  `committed` asks for the group's offsets, which vanish with their topic.  If no records arrive, nothing else would notice:
        the new topic may be exactly as long as what was read of the old one.  The admin client is used only once the broker has answered, as
        librdkafka may abort if the broker is unreachable (its issue 4605).
        """
        now = self._member.environment.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            if OFFSET_INVALID in committed():
                self.check()

    def check(self) -> None:
        """Check the topic's id between reading and committing.  Raises TransportError if another topic has the name now.

        1. The topic is deleted and created anew between two requests of our consumer, and gets more records than were read of the old one.
        2. The consumer goes on at its offset, and the records before that offset in the new topic are never read.

        If the id is the same, all records that were read are of this topic, as no id is used twice.
        """
        member = self._member
        if again(member.environment, self._id) != member.incarnation:
            raise TransportError(f"{self._topic} was deleted or recreated while {member.group} was reading it; the next start reads the new one from the beginning")

    def _id(self) -> str:
        """The topic's id; empty if there is no such topic.  Raises KafkaException."""
        try:
            return topics.id_of(topics.result_of(self._member.admin.describe_topics(TopicCollection([self._topic]), request_timeout=_ANSWER_S)[self._topic], _ANSWER_S))
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return ""
            raise

    def count(self) -> int:
        """The present partition count.  Raises TransportError."""
        return topics.describe(self._member.admin, self._member.config, self._topic)[1]

    def noted(self, where: TopicPartition) -> int:
        """The committed offset; OFFSET_INVALID if its note names the topic that had this name before.

        An offset that was copied to another cluster has the note of the first one; `accept_offset_reset` accepts it.
        """
        if where.metadata == self._member.incarnation:
            self._known.add(where.partition)
        if not where.metadata or where.metadata == self._member.incarnation or self._member.config.accept_offset_reset:
            return where.offset
        self.check()  # raises if it is this process that knows only the old topic
        place = f"{where.topic}[{where.partition}]"
        self._log(f"{place} was recreated while {self._member.group} was reading it, at {where.offset}: it is read from the beginning; the rest of the old topic is lost")
        return OFFSET_INVALID

    def read_on_from(self, number: int, position: int, begin: int, end: int) -> int:
        """The offset from which this partition is read on; logs what was lost."""
        if begin <= position <= end:
            return position
        if position < begin:
            said, next = f"retention deleted {begin - position} records before {self._member.group} had read them", begin
        elif number in self._known:  # such as by the election of a replica that was behind: from the beginning everything would be read twice
            said, next = f"it has lost its last records: it ends at {end}, before the next position {position}", end
        else:
            said, next = f"it ends at {end}, before the next position {position}: it was recreated, or has lost its last records", begin
        self._log(f"{self._topic}[{number}]: {said}; it is read from {next} on")
        return next

    def _log(self, text: str) -> None:
        self._member.on_log(Line.of(text, "error"))
