"""The identity of an engine in its consumer group, and how it asks the broker (K1, K4).  The parts of the Kafka runner share this."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.errors import FencedError, TransportError
from kwflow.ports import Clock, Processor
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import Environment

__all__ = ["EARLIEST", "END_WAIT_MS", "LATEST", "RETRY_S", "TRANSACTION_S", "Member", "again", "offsets"]

TRANSACTION_S = 15  # a dead engine with another identity blocks its partitions for this long (K1)
RETRY_S = 0.02
_ANSWER_S = 5.0
EARLIEST, LATEST = OffsetSpec.earliest(), OffsetSpec.latest()  # type: ignore[no-untyped-call] # the library has no types here
_NOT_KNOWN_YET = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._NOENT)  # of a topic that was just created, or of partition leaders by a broker that was just started
END_WAIT_MS = 10  # fetch.wait.max.ms of consumers that read a topic to its end


def again(environment: Environment, call: Callable[[], Any]) -> Any:
    """Repeat a call while its error is retriable, for twice the transaction timeout (K4); then TransportError ends the process.  Raises FencedError, KafkaException."""
    give_up = environment.monotonic() + 2 * TRANSACTION_S
    while True:
        try:
            return call()
        except KafkaException as error:
            code = error.args[0]
            if code.code() == KafkaError._FENCED:
                raise FencedError(code.str()) from None
            if code.txn_requires_abort() or not (topics.transient(code) or code.code() in (KafkaError._STATE, *_NOT_KNOWN_YET)):
                raise
            if environment.monotonic() > give_up:
                raise TransportError(f"no answer for {2 * TRANSACTION_S} s: {code.str()}") from None
        environment.sleep(RETRY_S)


def offsets(environment: Environment, config: Config, admin: AdminClient, topic: str, partitions: Iterable[int], spec: OffsetSpec) -> dict[int, int]:
    """Partition -> its first offset or its end, as `spec` says; what open transactions have written is included (K5).  Raises KafkaException, TransportError."""
    asked = {TopicPartition(topic, number): spec for number in partitions}
    clients = [admin]

    def ask() -> dict[int, int]:
        futures = clients[-1].list_offsets(asked, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=10)
        try:
            return {where.partition: topics.offset_of(future, 10) for where, future in futures.items()}
        except KafkaException as error:
            if error.args[0].code() == KafkaError.FENCED_LEADER_EPOCH:  # after a broker's restart; a client that knows an older epoch never refreshes it
                clients.append(topics.admin(config, environment))
            raise

    found: dict[int, int] = again(environment, ask)
    return found


@dataclass(frozen=True)
class Member:
    """One engine as a member of its consumer group.

    `name` is both its `group.instance.id` and its `transactional.id`.  `incarnation` (topic id) and `partitions` belong to
    the input topic; `outputs` are the topics that workflows declare.
    """

    config: Config
    environment: Environment
    clock: Clock
    on_log: Callable[[str], None]
    group: str
    name: str
    directory: Path
    admin: AdminClient
    processor: Processor
    incarnation: str
    partitions: int
    changelog: str
    outputs: frozenset[str] = frozenset()

    @functools.cached_property
    def encryption(self) -> Encryption:
        return Encryption(self.config)

    @property
    def written(self) -> list[str]:
        """Every topic that this engine's transactions may write to, and those that it reads."""
        return topics.needed(self.config, self.outputs) if self.processor.changelog_topic else [self.config.resume_topic, self.config.dead_letter_topic]

    def settings(self, **more: Any) -> dict[str, Any]:
        """The settings for another client of this engine."""
        return topics.client_config(self.config, **more)

    def present(self) -> set[str] | None:
        """The names of the engines that are in the group now; None if the broker does not answer."""
        try:
            found = topics.result_of(self.admin.describe_consumer_groups([self.group], request_timeout=_ANSWER_S)[self.group], _ANSWER_S)
        except KafkaException:
            return None
        return {known.group_instance_id for known in found.members}

    def ends(self, topic: str, numbers: Iterable[int]) -> dict[int, int]:
        return offsets(self.environment, self.config, self.admin, topic, numbers, LATEST)

    def starts(self, topic: str, numbers: Iterable[int]) -> dict[int, int]:
        return offsets(self.environment, self.config, self.admin, topic, numbers, EARLIEST)
