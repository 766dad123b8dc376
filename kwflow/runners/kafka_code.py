"""The topic `<app>-code` on Kafka, read from an offset to its end."""

from __future__ import annotations

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.runners import topics
from kwflow.runners.environment import LIVE, Environment

__all__ = ["CodeTopic"]

_GIVE_UP_S = 40  # an entry behind somebody's open transaction becomes visible when that ends, after 15 s at the latest (K1)


class CodeTopic:
    """`read` for a CodeStore.  Raises TransportError."""

    def __init__(self, config: Config, environment: Environment = LIVE) -> None:
        self._config = config
        self._environment = environment
        self._admin = topics.admin(config, environment)

    def read(self, offset: int) -> list[Record]:
        """The committed records from this offset to the end of now, also if transactions are still open before it."""
        where = TopicPartition(self._config.code_topic, 0)
        settings = {"group_id": f"{self._config.application_id}-code", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "earliest"}
        consumer = self._environment.consumer(topics.client_config(self._config, **settings, enable_partition_eof=True))
        found: list[Record] = []
        try:
            end = self._admin.list_offsets({where: OffsetSpec.latest()}, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=10)[where].result().offset  # type: ignore[no-untyped-call]
            consumer.assign([TopicPartition(where.topic, 0, offset)])
            reached, give_up = offset, self._environment.monotonic() + _GIVE_UP_S
            while reached < end:
                for message in consumer.consume(1000, 0.2):
                    error = message.error()
                    if error is None:
                        found.append(topics.record_of(message))
                    elif error.code() == KafkaError._PARTITION_EOF:  # the only sign, if all that is left is the marker of a transaction: no record, no position
                        reached = max(reached, message.offset() or 0)
                    elif not error.retriable():
                        raise TransportError(f"topic {where.topic}: {error.str()}")
                reached = max(reached, consumer.position([where])[0].offset)
                if reached < end and self._environment.monotonic() > give_up:
                    raise TransportError(f"topic {where.topic} could not be read to its end within {_GIVE_UP_S} s")
        except KafkaException as error:
            raise TransportError(f"topic {where.topic} at {self._config.bootstrap_servers}: {error.args[0].str()}") from None
        finally:
            consumer.close()
        return found
