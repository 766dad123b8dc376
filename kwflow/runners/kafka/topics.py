"""The topics that an application needs: names what is missing or wrong, or creates it (K12).  kwflow never relies on auto-creation."""

from __future__ import annotations

import contextlib
import ctypes
import operator
import sys
import time
import types
from collections.abc import Collection, Iterable
from typing import Any, cast

import confluent_kafka
from confluent_kafka import IsolationLevel, KafkaError, KafkaException, Message, TopicCollection, TopicPartition, Uuid
from confluent_kafka.admin import AclOperation, AdminClient, ConfigResource, ConfigSource, NewTopic, OffsetSpec, ResourceType  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core.wire import UNREADABLE, Record
from kwflow.errors import TransportError
from kwflow.runners.kafka.broker_errors import NO_LOG
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import LIVE, Environment

__all__ = [
    "FORGETFUL", "TOPIC_MS", "admin", "client_config", "committed_ends", "create", "describe", "id_of", "made_like", "needed", "offset_of", "partitions_of", "problems",
    "record_of", "result_of", "settings_of", "sizes", "transient",
]  # fmt: skip

_DAY_MS = 86_400_000
_LATE_S = 5.0
_LOOK_S = 0.02
_MESSAGE_BYTES_MAX = 1_000_000_000  # librdkafka's maximum; a topic may allow twice as much
_TRANSIENT = {  # answers of a leader or coordinator that moves or is new, or connections that fail, perhaps as a token has expired; librdkafka marks only few of them as retriable
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._AUTHENTICATION,
    KafkaError._RESOLVE,
    KafkaError._SSL,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
    KafkaError._TRANSPORT,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.NOT_COORDINATOR,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.REPLICA_NOT_AVAILABLE,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.UNKNOWN_LEADER_EPOCH,
}
TOPIC_MS = 5_000  # how long an unknown topic may still be one that was just created; with librdkafka's 30 s a record would report a timeout before it
_REPLY_MS = 3_600_000
_COMPACT = {"cleanup.policy": "compact", "delete.retention.ms": str(7 * _DAY_MS), "segment.bytes": str(64 * 1024 * 1024)}


def client_config(config: Config, **settings: Any) -> dict[str, Any]:
    """Settings for one client.  `[kafka]` of the config, security included, goes to librdkafka unchanged.  The client's own log is off (broker_errors.py)."""
    quiet = {} if "log_level" in config.kafka else {"log_level": 0, "logger": NO_LOG}
    return {"bootstrap.servers": config.bootstrap_servers, **quiet, **{key.replace("_", "."): value for key, value in settings.items()}, **config.kafka}


def transient(error: KafkaError) -> bool:
    """Whether repeating the call may help; false if a transaction must be aborted or the client is lost."""
    return not error.fatal() and not error.txn_requires_abort() and (error.retriable() or error.code() in _TRANSIENT)


def result_of(future: Any, within_s: float) -> Any:
    """The result of an admin request with this timeout; if there is none soon after it, the library has lost the request.  Raises KafkaException."""
    try:
        return future.result(within_s + _LATE_S)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer within {within_s:g} s")) from None


def offset_of(future: Any, within_s: float) -> int:
    """The offset that `list_offsets` found.  Raises KafkaException, also for -1001, which the library may return without an error if the leader has just moved:

    1. An engine takes a partition over while a broker stops.
    2. Its changelog would seem to end at -1001: the local copy, which is ahead of that, would be wiped, and nothing restored.
    3. The workflows that wait there would be unknown from then on.
    """
    offset = int(result_of(future, within_s).offset)
    if offset < 0:
        raise KafkaException(KafkaError(KafkaError.OFFSET_NOT_AVAILABLE, "the leader did not return an offset"))
    return offset


def admin(config: Config, environment: Environment = LIVE) -> AdminClient:
    return environment.admin(client_config(config))


def partitions_of(client: AdminClient, config: Config) -> dict[str, int]:
    """Topic -> partition count, of all topics.  Raises TransportError if the broker does not answer."""
    try:
        found = client.list_topics(timeout=config.client_connect_s)
    except KafkaException as error:
        raise TransportError(f"no broker at {config.bootstrap_servers}: {error.args[0].str()}") from None
    return {name: len(topic.partitions) for name, topic in found.topics.items()}


def describe(client: Any, config: Config, topic: str) -> tuple[str, int]:
    """(topic id, partition count) of a topic.  Raises TransportError."""
    try:
        found = result_of(client.describe_topics(TopicCollection([topic]), request_timeout=10)[topic], 10)
    except KafkaException as error:
        raise TransportError(f"topic {topic} at {config.bootstrap_servers}: {error.args[0].str()}; create topics with: kwflow topics create") from None
    return id_of(found), len(found.partitions)


FORGETFUL = getattr(confluent_kafka, "__version__", "") == "2.16.1"


def id_of(found: Any) -> str:
    """The topic id in a description, as text.  Its object is freed with the description:

    1. confluent-kafka forgets a reference to each id that it returns, which then stays in memory for ever.
    2. A feed asks for the id of its topic with each transaction, and would grow by up to some hundred MB a day.
    3. A later version may keep a reference for a reason; dropping that one would end the process.  So only the version that was looked at is helped.
    """
    text = str(found.topic_id)
    if FORGETFUL and type(found.topic_id) is Uuid and _references(found) == _references(types.SimpleNamespace(topic_id=object())) + 1:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(found.topic_id))
    return text


def _references(found: Any) -> int:
    return sys.getrefcount(found.topic_id)


def settings_of(client: AdminClient, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Topic -> its configuration.  Raises TransportError."""
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    asked = client.describe_configs(resources, request_timeout=10) if resources else {}
    found: dict[str, dict[str, str]] = {}
    for resource, future in asked.items():
        try:
            found[resource.name] = {name: entry.value for name, entry in result_of(future, 10).items()}
        except KafkaException as error:
            raise TransportError(f"cannot read the configuration of topic {resource.name}: {error.args[0].str()}") from None
    return found


def sizes(settings: Iterable[dict[str, str]]) -> dict[str, int]:
    """Producer sizes for topics with these settings: the largest record limit of them, and a batch size that all of them accept (K11)."""
    limits = [int(found["max.message.bytes"]) for found in settings]
    return {"message_max_bytes": min(_MESSAGE_BYTES_MAX, max(limits)), "batch_size": min(1_000_000, min(limits) * 9 // 10)}


def _changelogs(config: Config) -> tuple[tuple[str, str], ...]:
    return (config.changelog_topic, config.resume_topic), (config.timers_changelog_topic, config.scheduler_topic)


def _plain(config: Config, declared: Iterable[str]) -> list[str]:
    own = [config.resume_topic, config.result_topic, config.error_topic, config.history_topic, config.scheduler_topic, config.dead_letter_topic]
    return [topic for topic in dict.fromkeys([*own, *sorted(declared)]) if topic]


def _reply(config: Config) -> dict[str, str]:
    """Settings of the reply topic: a short retention, as a reply is read at once by whoever waits for it."""
    return {"cleanup.policy": "delete", "retention.ms": str(_REPLY_MS)}


def needed(config: Config, declared: Iterable[str]) -> list[str]:
    """Every topic that the application reads or writes."""
    return [*_plain(config, declared), config.reply_topic, config.code_topic, config.owners_topic, *(changelog for changelog, _ in _changelogs(config))]


def _rights(config: Config, declared: Iterable[str], groups: Collection[str]) -> dict[str, list[AclOperation]]:
    """Topic -> what these groups do with it: the groups of engines, schedulers, workers (on the declared queues) and feeds.

    All of them read settings of topics for `sizes`; engines and schedulers read those of all topics, for `problems`.
    """
    read, written, fed = set[str](), set[str](), _fed(config, groups)
    if config.application_id in groups:
        read |= {config.resume_topic, config.changelog_topic, config.code_topic}
        written |= {*_plain(config, declared), config.reply_topic, config.code_topic, config.changelog_topic}
    if config.timers_group in groups:
        read |= {config.scheduler_topic, config.timers_changelog_topic}
        written |= {config.resume_topic, config.dead_letter_topic, config.timers_changelog_topic}
    if config.workers_group in groups:
        read |= set(declared)
        written |= {config.resume_topic, config.dead_letter_topic}
    if fed:
        read |= {*fed, config.owners_topic}
        written |= {config.resume_topic, config.dead_letter_topic, config.owners_topic}
    return {
        topic: [*[AclOperation.READ] * (topic in read), *[AclOperation.WRITE] * (topic in written), *[AclOperation.DESCRIBE_CONFIGS] * (topic not in fed)]
        for topic in dict.fromkeys([*(needed(config, declared) if _keep_state(config, groups) else ()), *sorted(read | written)])
    }


def _fed(config: Config, groups: Collection[str]) -> list[str]:
    """The topics of feeds that these groups read."""
    begin = config.feed_group("")
    return [group.removeprefix(begin) for group in groups if group.startswith(begin)]


def _keep_state(config: Config, groups: Collection[str]) -> bool:
    return config.application_id in groups or config.timers_group in groups


def _unusable(client: Any, config: Config, rights: dict[str, list[AclOperation]]) -> list[str]:
    """Name the topics that are missing, or that the broker does not let us use as we must.  Raises TransportError."""
    missing, lacked = [], dict[str, list[str]]()
    for topic, future in client.describe_topics(TopicCollection(list(rights)), include_authorized_operations=True, request_timeout=10).items():
        try:
            allowed = result_of(future, 10).authorized_operations
            lacking = [right.name for right in rights[topic] if right not in allowed] if allowed else []  # empty if the broker does not report them
            if lacking:
                lacked.setdefault(" and ".join(lacking), []).append(topic)
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                missing.append(f"topic {topic} is missing")
            elif code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                lacked.setdefault("anything, not even seeing whether it exists,", []).append(topic)
            else:
                raise TransportError(f"topic {topic} at {config.bootstrap_servers}: {error.args[0].str()}") from None
    return [*missing, *(f"the user of [kafka] has no ACL for {what} on topic {', '.join(names)}" for what, names in lacked.items())]


def problems(client: AdminClient, config: Config, declared: Iterable[str], groups: Collection[str]) -> list[str]:
    """What is wrong with the topics for these groups (of engines, schedulers, workers, feeds), one sentence each; empty if all is well.  Raises TransportError."""
    there = partitions_of(client, config)
    found = _unusable(client, config, _rights(config, declared, groups))
    if not all(problem.endswith("is missing") for problem in found):
        return found  # without the right to see a topic, nothing more about it can be checked
    if config.application_id in groups:  # engines write to these topics
        found += [f"topic {name}, which encryption_topics names, is missing" for name in config.encryption_topics if name not in there]
    found += _compacted(client, [topic for topic in _inputs(config, declared, groups) if topic in there])
    if not _keep_state(config, groups):
        return found
    for changelog, source in _changelogs(config):
        if changelog in there and source in there and there[changelog] != there[source]:
            remedy = f"run kwflow topics migrate --partitions {max(there[source], there[changelog])}"
            found.append(f"topic {changelog} has {there[changelog]} partitions, its input {source} has {there[source]}; they must be equal ({remedy})")
    for changelog, settings in settings_of(client, [changelog for changelog, _ in _changelogs(config) if changelog in there]).items():
        if settings["cleanup.policy"] != "compact":
            found.append(f"topic {changelog} has cleanup.policy={settings['cleanup.policy']}; it must be compact only, or running workflows would be deleted")
        if int(settings["delete.retention.ms"]) < _DAY_MS:
            found.append(f"topic {changelog} has delete.retention.ms={settings['delete.retention.ms']}; it must be at least a day ({_DAY_MS}), or ended workflows could come back")
    for topic, lost in ((config.code_topic, "the code of waiting workflows"), (config.owners_topic, "who owns which partition")):
        found += _single_problems(client, topic, there[topic], lost) if topic in there else []
    return found + (_reply_problems(client, config) if config.reply_topic in there else [])


def _single_problems(client: AdminClient, topic: str, partitions: int, lost: str) -> list[str]:
    """Problems of a topic that must have one partition, so that reading it to the end reads all of it."""
    found = [f"topic {topic} has {partitions} partitions; it must have one"] if partitions != 1 else []
    policy = settings_of(client, [topic])[topic]["cleanup.policy"]
    return found + ([f"topic {topic} has cleanup.policy={policy}; it must be compact only, or {lost} would be lost"] if policy != "compact" else [])


def _inputs(config: Config, declared: Iterable[str], groups: Collection[str]) -> list[str]:
    """What these groups read record by record; workers declare their queues."""
    engines, timers = [config.resume_topic] * (config.application_id in groups), [config.scheduler_topic] * (config.timers_group in groups)
    return [*engines, *timers, *(declared if config.workers_group in groups else ())]


def _compacted(client: AdminClient, names: list[str]) -> list[str]:
    """A broker whose log.cleanup.policy is compact makes them so."""
    policies = {topic: settings["cleanup.policy"] for topic, settings in settings_of(client, names).items()}
    compact = [topic for topic, policy in policies.items() if "compact" in policy]
    return [f"topic {topic} has cleanup.policy={policies[topic]}; it must be delete, or only the last of the waiting records of each key would be kept" for topic in compact]


def _reply_problems(client: AdminClient, config: Config) -> list[str]:
    policy = settings_of(client, [config.reply_topic])[config.reply_topic]["cleanup.policy"]
    return [] if policy == "delete" else [f"topic {config.reply_topic} has cleanup.policy={policy}; it must be delete: replies are kept for an hour"]


def create(client: AdminClient, config: Config, declared: Iterable[str], partitions: int, replication: int) -> list[str]:
    """Create the missing topics (`declared` includes those of feeds), and wait until the broker knows them; return their names.

    A changelog gets the partition count of its input, if that exists.  Raises TransportError.
    """
    there = partitions_of(client, config)
    new = [NewTopic(topic, partitions, replication) for topic in _plain(config, declared) if topic not in there]
    if config.reply_topic not in there:
        new.append(NewTopic(config.reply_topic, partitions, replication, config=_reply(config)))
    new += [NewTopic(topic, 1, replication, config=_COMPACT) for topic in (config.code_topic, config.owners_topic) if topic not in there]
    for changelog, source in _changelogs(config):
        if changelog not in there:
            new.append(NewTopic(changelog, there.get(source, partitions), replication, config=_COMPACT))
    for topic, future in (client.create_topics(new, operation_timeout=30) if new else {}).items():
        try:
            result_of(future, 30)
        except KafkaException as error:
            raise TransportError(f"cannot create topic {topic}: {error.args[0].str()}", retryable=False) from None
    made = [topic.topic for topic in new]
    give_up = time.monotonic() + config.client_connect_s
    while unknown := sorted(set(made) - partitions_of(client, config).keys()):  # the controller knows a new topic first, the other brokers a little later
        if time.monotonic() > give_up:
            raise TransportError(f"{config.bootstrap_servers} does not know these yet: {', '.join(unknown)}; kwflow topics check shows when it does")
        time.sleep(_LOOK_S)
    return made


def committed_ends(client: AdminClient, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """Partition -> the offset up to which its transactions are decided.  Partitions for which the broker does not answer now are left out."""
    asked = {TopicPartition(topic, number): OffsetSpec.latest() for number in partitions}  # type: ignore[no-untyped-call] # the library has no types here
    found: dict[int, int] = {}
    for where, future in (client.list_offsets(asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=2) if asked else {}).items():
        with contextlib.suppress(KafkaException):
            found[where.partition] = offset_of(future, 2)
    return found


def made_like(client: AdminClient, topic: str) -> NewTopic:
    """What creates this topic again: its partitions, its replication factor, and the settings that are its own and not the broker's.  Raises TransportError."""
    try:
        partitions = client.list_topics(topic, timeout=10).topics[topic].partitions
        [future] = client.describe_configs([ConfigResource(ResourceType.TOPIC, topic)], request_timeout=10).values()
        settings = {name: entry.value for name, entry in result_of(future, 10).items() if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}
    except KafkaException as error:
        raise TransportError(f"cannot read the settings of {topic}: {error.args[0].str()}") from None
    return NewTopic(topic, len(partitions), len(partitions[0].replicas), config=settings)


_headers = operator.methodcaller("headers")  # methodcaller checks whether the call left an error set; a call that the interpreter has specialized does not


def record_of(message: Message, encryption: Encryption) -> Record:
    """Convert a consumed message to the core's Record, decrypted if we have its key."""
    try:
        headers = cast("list[tuple[str, Any]] | None", _headers(message))
    except (SystemError, UnicodeDecodeError):  # the library returns no headers at all if the name of one is not UTF-8
        headers = [UNREADABLE]
    pairs = tuple((name, value if value is None or isinstance(value, bytes) else str(value).encode()) for name, value in headers) if headers else ()
    value = encryption.decrypt(message.value())
    return Record(message.topic() or "", message.partition() or 0, message.offset() or 0, message.timestamp()[1], message.key(), value, encryption.decrypt_headers(pairs) if pairs else pairs)
