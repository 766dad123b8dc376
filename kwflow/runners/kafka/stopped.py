"""An application on Kafka in which nothing runs: how that is made sure of, what its topics hold, and where its input goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from confluent_kafka import ConsumerGroupState, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core.wire import Record
from kwflow.errors import TransportError, UsageError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.environment import Environment, Producer
from kwflow.runners.kafka.member import EARLIEST, LATEST, again, offsets
from kwflow.runners.kafka.reading import Kept, latest_of, read_to, unchanged
from kwflow.runners.kafka.state import POSITION, Position, importing, position_of

__all__ = ["ANSWER_S", "COMMIT_S", "Stopped", "commit", "groups_of", "marked"]

_TIMEOUT_S = 30
ANSWER_S = 6  # for one request about a group: the library may lose it, on a new cluster above all, and the next one is answered
COMMIT_S = 60  # for a transaction, and for its commit
_SESSION_MS = 6000
_LOOK_S = 0.5
_AGAIN_S = 0.05


def groups_of(config: Config) -> dict[str, tuple[str, str]]:
    """Consumer group -> (input topic, changelog)."""
    return {
        config.application_id: (config.resume_topic, config.changelog_topic),
        config.timers_group: (config.scheduler_topic, config.timers_changelog_topic),
    }


class Stopped:
    """An application whose engines and schedulers are to be stopped.  `partitions` has those of every topic of the broker.  Methods raise TransportError."""

    def __init__(self, config: Config, environment: Environment) -> None:
        self.config = config
        self.environment = environment
        self.admin = topics.admin(config, environment)
        self.partitions = topics.partitions_of(self.admin, config)

    # -- whether anything runs -------------------------------------------------------------------------------------------
    def wait(self) -> None:
        """Wait until nothing runs.  Raises UsageError that names what still runs; stopped static members stay in the group for a session timeout (KIP-345)."""
        give_up = self.environment.monotonic() + 2 * int(self.config.kafka.get("session.timeout.ms", _SESSION_MS)) / 1000
        while running := self.running():
            if self.environment.monotonic() > give_up:
                raise UsageError(f"{running} is still running; stop every engine and scheduler of {self.config.application_id} first")
            self.environment.sleep(_LOOK_S)

    def nothing_ran_since(self) -> Callable[[], None]:
        """Wait until nothing runs.  The function that is returned raises UsageError if anything has run since then, even if it has ended."""
        self.wait()
        owners = self.config.owners_topic  # whatever takes a partition writes its name to it first

        def written() -> dict[int, int]:
            return self.offsets(owners, LATEST) if owners in self.partitions else {}

        before = written()

        def check() -> None:
            running = self.running()
            if running or written() != before:
                raise UsageError(f"{running or 'an engine or a scheduler'} {'was started' if running else 'ran'} meanwhile")

        return check

    def running(self) -> str:
        """The names of our groups' members or, if they are not known, of a group that is in use; "" if nothing runs."""
        groups = self.ask(lambda: self.admin.describe_consumer_groups(list(groups_of(self.config)), request_timeout=ANSWER_S), "describe the consumer groups")
        running = [group for group in groups if group.state not in (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD) or group.members]
        return ", ".join(sorted({member.group_instance_id or member.client_id for group in running for member in group.members})) or (running[0].group_id if running else "")

    def ask(self, request: Callable[[], Mapping[Any, Any]], what: str) -> list[Any]:
        """The answers to a request about groups.  It is repeated while a coordinator is still loading or moving, or a transaction is still ending, which a partition in an answer may say, too."""
        give_up = self.environment.monotonic() + _TIMEOUT_S
        while True:
            try:
                found = [topics.result_of(future, ANSWER_S) for future in request().values()]
                failed = next((place for one in found for place in getattr(one, "topic_partitions", ()) if place.error is not None), None)
                if failed is None:
                    return found
                error, where = failed.error, f" on {failed.topic}[{failed.partition}]"
            except KafkaException as refused:
                error, where = refused.args[0], ""
            passes = topics.transient(error) or error.code() == KafkaError.UNSTABLE_OFFSET_COMMIT
            if not passes or self.environment.monotonic() > give_up:
                raise TransportError(f"cannot {what}{where}: {error.name()}: {error.str()}", retryable=False)
            self.environment.sleep(_AGAIN_S)

    # -- its topics ------------------------------------------------------------------------------------------------------
    def require(self, *names: str) -> None:
        """Raises UsageError that names those of these topics that are missing."""
        missing = [name for name in dict.fromkeys(names) if name not in self.partitions]
        if missing:
            raise UsageError(f"{self.config.bootstrap_servers} has no topic {', '.join(missing)}; create what is missing with kwflow topics create (is --application-id right?)")

    def read(self, topic: str, number: int | None = None, start: int = 0) -> Iterator[Record]:
        """Yield the committed records of one partition, or of all, from `start` to the present end of the topic."""
        ends = self.offsets(topic, LATEST, number)
        yield from read_to(self.environment, self.config, topic, ends, dict.fromkeys(ends, start))

    def latest(self, topic: str, number: int, kept: Kept = unchanged) -> dict[bytes, bytes]:
        """`latest_of` the records of one partition."""
        return latest_of(self.config, topic, self.read(topic, number), kept)

    def offsets(self, topic: str, spec: OffsetSpec, number: int | None = None) -> dict[int, int]:
        """Partition -> its first offset or its end, as `spec` says."""
        numbers = range(self.partitions[topic]) if number is None else [number]
        try:
            return offsets(self.environment, self.config, self.admin, topic, numbers, spec)
        except KafkaException as error:
            raise TransportError(f"cannot read the offsets of {topic}: {error.args[0].str()}") from None

    def check_whole(self, changelog: str, number: int, state: Mapping[bytes, bytes]) -> None:
        """Raises UsageError if an import into this state has not ended."""
        if importing(position_of(state.get(POSITION), f"{changelog}[{number}]")) is not None:
            raise UsageError(f"an archive was imported into {self.config.application_id} only in part; finish that first")

    def producer(self, transactional_id: str, written: list[str]) -> Producer:
        """A producer for these topics, to be fenced before its first transaction."""
        sizes = topics.sizes(topics.settings_of(self.admin, written).values())
        return self.environment.producer(topics.client_config(self.config, transactional_id=transactional_id, transaction_timeout_ms=COMMIT_S * 1000, **sizes))

    def fence(self, producer: Producer) -> None:
        """End the last transaction under this producer's id, which may be of a process that was killed: nobody could read what follows it before its time is over.  Raises KafkaException."""
        again(self.environment, lambda: producer.init_transactions(_TIMEOUT_S))

    # -- where its input goes on -----------------------------------------------------------------------------------------
    def committed(self, group: str) -> dict[int, int]:
        """Partition -> the offset that the group has committed on its input, once every transaction has ended; partitions without one are left out."""
        topic = groups_of(self.config)[group][0]
        asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, number) for number in range(self.partitions[topic])])
        [answer] = self.ask(lambda: self.admin.list_consumer_group_offsets([asked], require_stable=True, request_timeout=ANSWER_S), f"read the offsets of {group}")
        return {place.partition: place.offset for place in answer.topic_partitions if place.offset >= 0}

    def following(self, group: str) -> dict[int, int]:
        """Partition -> the offset of the next record to be applied: what the group has committed or, if it has forgotten that, what the state names."""
        topic, changelog = groups_of(self.config)[group]
        begins = self.offsets(topic, EARLIEST)
        found = self.committed(group)
        incarnation, _ = topics.describe(self.admin, self.config, topic)
        for number in begins.keys() - found.keys():
            state = self.latest(changelog, number) if number < self.partitions[changelog] else {}  # only the input was given partitions by a `migrate` that then failed
            known = marked(state, incarnation, f"{changelog}[{number}]")
            found[number] = begins[number] if known is None else max(begins[number], known)
        return found


def commit(producer: Producer) -> None:
    """Commit a producer's transaction.  Raises KafkaException."""
    try:
        producer.commit_transaction(COMMIT_S)
    except KafkaException as error:
        if not topics.transient(error.args[0]):
            raise
        producer.commit_transaction(COMMIT_S)  # it may have been committed: the same call again tells


def marked(state: Mapping[bytes, bytes], incarnation: str, where: str) -> int | None:
    """The offset that the state names (K16), as a group forgets its own after a week without members; None if it names none of this topic."""
    known: Position | None = position_of(state.get(POSITION), where)
    return known.next if known is not None and known.topic == incarnation else None
