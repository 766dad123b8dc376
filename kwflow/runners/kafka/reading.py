"""Reading a topic on Kafka to its present end, for callers that must know everything that is committed there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from kwflow.config import Config
from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.encryption import Encryption, Unread
from kwflow.runners.kafka.environment import Consumer, Environment
from kwflow.runners.kafka.member import END_WAIT_MS

__all__ = ["Kept", "gather", "latest_of", "read_to", "unchanged"]

Kept = Callable[[bytes, bytes], bytes | None]  # (key, value) -> what to keep of an entry; None leaves it out

_STILL_S = 40  # without a new record: records behind an open transaction become visible when it ends, after 15 s at most if it is kwflow's (K1)


def gather(consumer: Consumer, most: int, seconds: float) -> list[Message]:
    """Return the messages that have arrived, after waiting at most `seconds` for the first.  `consume` alone would wait for all of them, or for the whole time."""
    first = consumer.poll(seconds)
    if first is None:
        return []
    return [first, *consumer.consume(most - 1, 0)] if most > 1 else [first]


def read_to(environment: Environment, config: Config, topic: str, ends: Mapping[int, int], starts: Mapping[int, int]) -> Iterator[Record]:
    """Yield the committed records from these offsets (0 if none is given) to these ends, and perhaps some more.

    A consumer of committed records is told of an end that lies before the first open transaction, whatever follows that.  So an
    end that is reported counts only once it is as far as the given one.  Raises TransportError.
    """
    left = {number for number, end in ends.items() if starts.get(number, 0) < end}
    if not left:
        return
    encryption = Encryption(config)
    settings = {"group_id": f"{config.application_id}-read", "enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "earliest", "fetch_wait_max_ms": END_WAIT_MS}
    consumer = environment.consumer(topics.client_config(config, **settings, enable_partition_eof=True))
    try:
        consumer.assign([TopicPartition(topic, number, starts.get(number, 0)) for number in sorted(left)])
        give_up = environment.monotonic() + _STILL_S
        while left:
            for message in gather(consumer, 1000, 0.2):
                number, reached, error = message.partition() or 0, message.offset() or 0, message.error()
                if error is None:
                    yield topics.record_of(message, encryption)
                    reached, give_up = reached + 1, environment.monotonic() + _STILL_S
                elif error.code() != KafkaError._PARTITION_EOF:  # the end is the only sign if all that is left is a transaction marker, which is not a record
                    if not topics.transient(error):
                        raise TransportError(f"topic {topic} at {config.bootstrap_servers}: {error.str()}")
                    continue
                if reached >= ends[number]:
                    left.discard(number)
            if left and environment.monotonic() > give_up:
                raise TransportError(f"topic {topic} could not be read to its end: nothing has arrived for {_STILL_S} s; a transaction may be open")
    except KafkaException as error:
        raise TransportError(f"topic {topic} at {config.bootstrap_servers}: {error.args[0].str()}") from None
    finally:
        consumer.close()


def unchanged(_key: bytes, value: bytes) -> bytes:
    """Keep the whole value."""
    return value


def latest_of(config: Config, topic: str, records: Iterable[Record], kept: Kept = unchanged) -> dict[bytes, bytes]:
    """Key -> what `kept` returns for the last value of each key among these records of a compacted topic.

    Deleted keys, and keys for which `kept` returns None, are left out.  Raises TransportError if one that is left is encrypted with another key.
    """
    found: dict[tuple[int, bytes], bytes] = {}  # by partition too, as a migration leaves a tombstone in the partition where an entry was
    unread = Unread(Encryption(config))
    for record in records:
        if record.key is None or unread.passes((record.partition, record.key), record.value):
            continue
        value = kept(record.key, record.value) if record.value is not None else None
        if value is not None:
            found[record.partition, record.key] = value
        else:
            found.pop((record.partition, record.key), None)
    unread.check(topic)
    return {key: value for (_, key), value in found.items()}
