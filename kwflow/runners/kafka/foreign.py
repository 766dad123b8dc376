"""An input topic that is somebody else's (decision 0058): what becomes of it is no reason to stand still, and what was lost is said.

Its owner may give it partitions, shorten it, and make it anew under the same name.  Which of these topics a position is
of, is noted with the offset that the group commits.
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
    """The input topic of this member, as it was when its process began."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._topic = member.processor.input_topic
        self._look_at = member.environment.monotonic() + _LOOK_S
        self._known: set[int] = set()  # partitions whose committed offset is one of this topic, as its note says

    def look(self, committed: Callable[[], Iterable[int]]) -> None:
        """Asked in every turn, with what asks for the group's offsets: they go with their topic.  Raises TransportError once it is not there any more.

        Where nothing comes nobody else would ask: the new one may be exactly as long as what was read of the old.  A broker that is away is
        asked nothing by the admin client: librdkafka may abort (its issue 4605).
        """
        now = self._member.environment.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            if OFFSET_INVALID in committed():
                self.same()

    def same(self) -> None:
        """Asked between reading and committing.  Raises TransportError once another topic has the name; else all that was read is of this one, as no id comes back.

        1. it is deleted and made anew between two requests of our consumer, and gets more records than were read of the old one
        2. the consumer goes on at the offset where it was, and what lies before that in the new one is never read
        """
        member = self._member
        if again(member.environment, self._id) != member.incarnation:
            raise TransportError(f"{self._topic} was deleted, or made anew, while {member.group} read it; the next start reads the new one from its begin")

    def _id(self) -> str:
        """Empty if there is no such topic.  Raises KafkaException."""
        try:
            return str(topics.told(self._member.admin.describe_topics(TopicCollection([self._topic]), request_timeout=_ANSWER_S)[self._topic], _ANSWER_S).topic_id)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return ""
            raise

    def count(self) -> int:
        """Its partitions now.  Raises TransportError."""
        return topics.describe(self._member.admin, self._member.config, self._topic)[1]

    def noted(self, where: TopicPartition) -> int:
        """A committed offset; none if it was noted for the topic that had this name before.

        Copied to another cluster it has the note of the first: who wants it says so.
        """
        if where.metadata == self._member.incarnation:
            self._known.add(where.partition)
        if not where.metadata or where.metadata == self._member.incarnation or self._member.config.accept_offset_reset:
            return where.offset
        self.same()  # it may be this process that knows only the old one
        place = f"{where.topic}[{where.partition}]"
        self._say(f"{place} was made anew while {self._member.group} read it, up to {where.offset}: it is read from its begin; what was left of the old one is lost")
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
