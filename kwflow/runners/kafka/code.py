"""Reading the topic `<app>-code` on Kafka from an offset to its end, and loading the code that instances of a partition need."""

from __future__ import annotations

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from kwflow.config import Config
from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.ports import Processor, Store
from kwflow.runners.deployment import run_by
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.encryption import Encryption, Unread
from kwflow.runners.kafka.environment import LIVE, Environment
from kwflow.runners.kafka.member import LATEST, offsets
from kwflow.runners.kafka.reading import read_to

__all__ = ["CodeTopic", "take_over"]


class CodeTopic:
    """`read` for a CodeStore.  Raises TransportError."""

    def __init__(self, config: Config, environment: Environment = LIVE) -> None:
        self._config = config
        self._environment = environment
        self._admin = topics.admin(config, environment)
        self._reached = 0  # the offset up to which the topic was read, transaction markers included

    def read(self, offset: int) -> list[Record]:
        """The committed records from this offset, which follows those read before, to the present end, even if transactions before that end are still open."""
        topic = self._config.code_topic
        try:
            end = offsets(self._environment, self._config, self._admin, topic, [0], LATEST)[0]
        except KafkaException as error:
            raise TransportError(f"topic {topic} at {self._config.bootstrap_servers}: {error.args[0].str()}") from None
        if end <= self._reached:
            return []
        unread = Unread(Encryption(self._config))
        found = [record for record in read_to(self._environment, self._config, topic, {0: end}, {0: offset}) if not unread.passes(record.key, record.value)]
        unread.check(topic)
        self._reached = end
        return found


def take_over(processor: Processor, store: Store, admin: AdminClient, config: Config, where: str) -> None:
    """Load the code that instances of a restored partition need, before its first record (semantics §9.6).

    Topics that stored code declares must exist, as all others, unless no instance runs that code any more.  Raises TransportError.
    """
    declared = processor.taken_over(store)
    there = topics.partitions_of(admin, config) if declared else {}
    missing = {topic: key for topic, key in declared.items() if topic not in there}
    run = run_by(store) if missing else frozenset()
    for topic, key in missing.items():
        if key in run:
            name, _, version = key.rpartition("@")
            raise TransportError(
                f"topic {topic} is missing: {name}@{version[:12]} declares it, and instances of {where} wait in it (kwflow topics create MODULE creates topics of stored code, too)", retryable=False
            )
