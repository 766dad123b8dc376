"""The topics an application needs: what is missing is named, or created (K12).  Auto-creation is never relied on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.errors import TransportError

__all__ = ["admin", "client_config", "create", "missing", "partitions_of"]

_COMPACT = {"cleanup.policy": "compact", "delete.retention.ms": str(7 * 86_400_000), "segment.bytes": str(64 * 1024 * 1024)}


def client_config(config: Config, **settings: Any) -> dict[str, Any]:
    """Settings for one client; `[kafka]` of the config (security and all) goes to librdkafka as it is."""
    return {"bootstrap.servers": config.bootstrap_servers, "log_level": 3, **{key.replace("_", "."): value for key, value in settings.items()}, **config.kafka}


def admin(config: Config) -> AdminClient:
    return AdminClient(client_config(config))


def partitions_of(client: AdminClient, config: Config) -> dict[str, int]:
    """Topic -> partition count.  Raises TransportError when the broker does not answer."""
    try:
        found = client.list_topics(timeout=10)
    except KafkaException as error:
        raise TransportError(f"no broker at {config.bootstrap_servers}: {error.args[0].str()}") from None
    return {name: len(topic.partitions) for name, topic in found.topics.items()}


def _wanted(config: Config, declared: Iterable[str]) -> list[str]:
    plain = [config.resume_topic, config.result_topic, config.error_topic, config.scheduler_topic, config.dead_letter_topic]
    return [topic for topic in dict.fromkeys([*plain, *sorted(declared)]) if topic]


def missing(client: AdminClient, config: Config, declared: Iterable[str]) -> list[str]:
    """What is not as it must be, one sentence each."""
    there = partitions_of(client, config)
    problems = [f"topic {topic} is missing" for topic in _wanted(config, declared) if topic not in there]
    for changelog, source in ((config.changelog_topic, config.resume_topic), (config.timers_changelog_topic, config.scheduler_topic)):
        if changelog not in there:
            problems.append(f"topic {changelog} is missing")
        elif source in there and there[changelog] != there[source]:
            problems.append(f"topic {changelog} has {there[changelog]} partitions, its input {source} has {there[source]}; they must be equal")
    return problems


def create(client: AdminClient, config: Config, declared: Iterable[str], partitions: int, replication: int) -> list[str]:
    """Create the missing ones; changelogs take the partition count of their existing input.  Raises TransportError."""
    there = partitions_of(client, config)
    new = [NewTopic(topic, partitions, replication) for topic in _wanted(config, declared) if topic not in there]
    for changelog, source in ((config.changelog_topic, config.resume_topic), (config.timers_changelog_topic, config.scheduler_topic)):
        if changelog not in there:
            new.append(NewTopic(changelog, there.get(source, partitions), replication, config=_COMPACT))
    for topic, future in (client.create_topics(new, operation_timeout=30) if new else {}).items():
        try:
            future.result()
        except KafkaException as error:
            raise TransportError(f"cannot create topic {topic}: {error.args[0].str()}", retryable=False) from None
    return [topic.topic for topic in new]
