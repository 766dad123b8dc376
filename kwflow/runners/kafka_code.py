"""The topic `<app>-code` on Kafka, read from an offset to its end, and the code that instances of a partition need."""

from __future__ import annotations

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.wire import Record
from kwflow.durable import versions
from kwflow.errors import SnapshotError, TransportError
from kwflow.ports import Processor, Store
from kwflow.runners import topics
from kwflow.runners.deployment import code_of
from kwflow.runners.environment import LIVE, Environment
from kwflow.runners.kafka_member import END_WAIT_MS, again

__all__ = ["CodeTopic", "take_over"]

_GIVE_UP_S = 40  # an entry behind somebody's open transaction becomes visible when that ends, after 15 s at the latest (K1)


class CodeTopic:
    """`read` for a CodeStore.  Raises TransportError."""

    def __init__(self, config: Config, environment: Environment = LIVE) -> None:
        self._config = config
        self._environment = environment
        self._admin = topics.admin(config, environment)
        self._reached = 0  # what was read, marks of transactions included

    def read(self, offset: int) -> list[Record]:
        """The committed records from this offset, after those that were read before, to the end of now, also if transactions are still open before it."""
        where = TopicPartition(self._config.code_topic, 0)
        settings = {"group_id": f"{self._config.application_id}-code", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "earliest"}
        found: list[Record] = []
        try:
            end = int(again(self._environment, lambda: self._end(where)))
        except KafkaException as error:
            raise TransportError(f"topic {where.topic} at {self._config.bootstrap_servers}: {error.args[0].str()}") from None
        if end <= self._reached:
            return found
        consumer = self._environment.consumer(topics.client_config(self._config, **settings, enable_partition_eof=True, fetch_wait_max_ms=END_WAIT_MS))
        try:
            consumer.assign([TopicPartition(where.topic, 0, offset)])
            reached, give_up = offset, self._environment.monotonic() + _GIVE_UP_S
            while reached < end:
                for message in consumer.consume(1000, 0.2):
                    wrong = message.error()
                    if wrong is None:
                        found.append(topics.record_of(message))
                    elif wrong.code() == KafkaError._PARTITION_EOF:  # the only sign, if all that is left is the marker of a transaction: no record, no position
                        reached = max(reached, message.offset() or 0)
                    elif not topics.transient(wrong):
                        raise TransportError(f"topic {where.topic}: {wrong.str()}")
                reached = max(reached, consumer.position([where])[0].offset)
                if reached < end and self._environment.monotonic() > give_up:
                    raise TransportError(f"topic {where.topic} could not be read to its end within {_GIVE_UP_S} s")
            self._reached = reached
        except KafkaException as error:
            raise TransportError(f"topic {where.topic} at {self._config.bootstrap_servers}: {error.args[0].str()}") from None
        finally:
            consumer.close()
        return found

    def _end(self, where: TopicPartition) -> int:
        latest = {where: OffsetSpec.latest()}  # type: ignore[no-untyped-call]
        return int(topics.told(self._admin.list_offsets(latest, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=10)[where], 10).offset)


def take_over(processor: Processor, store: Store, admin: AdminClient, config: Config, where: str) -> None:
    """Load what instances of a restored partition need, before its first record (semantics §9.6).

    The topics that stored code declares must be there like all others, unless no instance runs it any more.  Raises TransportError.
    """
    declared = processor.taken_over(store)
    there = topics.partitions_of(admin, config) if declared else {}
    missing = {topic: key for topic, key in declared.items() if topic not in there}
    run = _run_by(store) if missing else set()
    for topic, key in missing.items():
        if key in run:
            name, _, version = key.rpartition("@")
            raise TransportError(
                f"topic {topic} is missing: {name}@{version[:12]} declares it, in which instances of {where} wait (kwflow topics create MODULE makes it, for code that is stored, too)", retryable=False
            )


def _run_by(store: Store) -> set[str]:
    """`<module>@<sha256>` of every version that a snapshot names; a look at each of them, so only for who is in trouble."""
    found: set[str] = set()
    for key, data in store.scan(b""):
        if not key.startswith(b"\0"):
            try:
                found |= {versions.entry_key(name, saved["version"]) for name, saved in code_of(snapshot.read_header(data))}
            except SnapshotError:  # it parks when it wakes
                continue
    return found
