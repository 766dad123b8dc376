"""Maintenance of an application on Kafka that is stopped: forget its state, move it to more partitions, or encrypt it with another key.

Each operation refuses to run beside an engine or a scheduler, and can be repeated after a crash in the middle: an entry moves
from one partition to another in one transaction, and an engine refuses to start before the last step is done (K16).  Engines can
read re-encrypted entries at any time, so `reencrypt` itself checks that none has started meanwhile.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from confluent_kafka import ConsumerGroupState, ConsumerGroupTopicPartitions, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.murmur2 import partition_of
from kwflow.errors import TransportError, UsageError
from kwflow.runners.activities.heart import HEADERS
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import FORGOTTEN
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import made
from kwflow.runners.kafka.link import latest, read
from kwflow.runners.kafka.state import POSITION, Position, importing, position_of
from kwflow.runners.moved import MOVES, Due, home_of, moves_of

__all__ = ["check_whole", "chunks", "following", "groups_of", "marked", "migrate", "reencrypt", "reset", "reset_plan", "standing_still", "nothing_ran_since"]

_TIMEOUT_S = 30
_ANSWER_S = 6  # for one request about a group: the library may lose it, on a new cluster above all, and the next one is answered
_SESSION_MS = 6000
_AGAIN_S = 0.05
_Item = TypeVar("_Item")
_MOVED_MAX = 1000  # entries in one transaction


def groups_of(config: Config) -> dict[str, tuple[str, str]]:
    """Consumer group -> (input topic, changelog)."""
    return {
        config.application_id: (config.resume_topic, config.changelog_topic),
        config.timers_group: (config.scheduler_topic, config.timers_changelog_topic),
    }


def _done(futures: dict[Any, Any], what: str) -> list[Any]:
    """The results of admin requests.  Raises TransportError."""
    try:
        return [topics.result_of(future, _TIMEOUT_S) for future in futures.values()]
    except KafkaException as error:
        raise TransportError(f"cannot {what}: {error.args[0].name()}: {error.args[0].str()}", retryable=False) from None


def standing_still(admin: AdminClient, config: Config) -> None:
    """Wait until nothing runs.  Raises UsageError that names what still runs; stopped static members stay in the group for a session timeout (KIP-345)."""
    give_up = time.monotonic() + 2 * int(config.kafka.get("session.timeout.ms", _SESSION_MS)) / 1000
    while running := _running(admin, config):
        if time.monotonic() > give_up:
            raise UsageError(f"{running} is still running; stop every engine and scheduler of {config.application_id} first")
        time.sleep(0.5)


def nothing_ran_since(admin: AdminClient, config: Config, there: Mapping[str, int]) -> Callable[[], None]:
    """Wait until nothing runs.  The function that is returned raises UsageError if anything has run since then, even if it has ended."""
    standing_still(admin, config)
    owners = config.owners_topic  # whatever takes a partition writes its name to it first

    def written() -> dict[int, int]:
        return topics.ends(admin, owners, there[owners], latest=True) if owners in there else {}

    before = written()

    def check() -> None:
        running = _running(admin, config)
        if running or written() != before:
            raise UsageError(f"{running or 'an engine or a scheduler'} {'was started' if running else 'ran'} meanwhile")

    return check


def _running(admin: AdminClient, config: Config) -> str:
    """The names of our groups' members or, if they are not known, of a group that is in use; "" if nothing runs."""
    groups = _asked(lambda: admin.describe_consumer_groups(list(groups_of(config)), request_timeout=_ANSWER_S), "describe the consumer groups")
    running = [group for group in groups if group.state not in (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD) or group.members]
    return ", ".join(sorted({member.group_instance_id or member.client_id for group in running for member in group.members})) or (running[0].group_id if running else "")


def _asked(ask: Callable[[], dict[Any, Any]], what: str) -> list[Any]:
    """The answers to a request about groups.  It is repeated while a coordinator is still loading or moving, which a partition in an answer may say, too.

    Raises TransportError.
    """
    give_up = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            found = [topics.result_of(future, _ANSWER_S) for future in ask().values()]
            failed = next((place for one in found for place in getattr(one, "topic_partitions", ()) if place.error is not None), None)
            if failed is None:
                return found
            error, where = failed.error, f" on {failed.topic}[{failed.partition}]"
        except KafkaException as refused:
            error, where = refused.args[0], ""
        if not topics.transient(error) or time.monotonic() > give_up:
            raise TransportError(f"cannot {what}{where}: {error.name()}: {error.str()}", retryable=False)
        time.sleep(_AGAIN_S)


def _offsets(admin: AdminClient, group: str, topic: str, partitions: int) -> dict[int, int]:
    """Partition -> the offset that the group committed; partitions without one are left out."""
    asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, number) for number in range(partitions)])
    [answer] = _asked(lambda: admin.list_consumer_group_offsets([asked], request_timeout=_ANSWER_S), f"read the offsets of {group}")
    return {place.partition: place.offset for place in answer.topic_partitions if place.offset >= 0}


def following(config: Config, admin: AdminClient, group: str, topic: str, changelog: str, partitions: int) -> dict[int, int]:
    """Partition -> the offset of the next record to be applied: what the group has committed or, if it has forgotten that, what the state names."""
    begins, (incarnation, _) = topics.ends(admin, topic, partitions, latest=False), topics.describe(admin, config, topic)
    found = _offsets(admin, group, topic, partitions)
    for number in begins.keys() - found.keys():
        known = marked(latest(config, changelog, number), incarnation, f"{changelog}[{number}]")
        found[number] = begins[number] if known is None else max(begins[number], known)
    return found


def check_whole(config: Config, state: dict[bytes, bytes], where: str) -> None:
    """Raises UsageError if an import into this state has not ended."""
    if importing(position_of(state.get(POSITION), where)) is not None:
        raise UsageError(f"an archive was imported into {config.application_id} only in part; finish that first")


def marked(state: dict[bytes, bytes], incarnation: str, where: str) -> int | None:
    """The offset that the state names (K16), as a group forgets its own after a week without members; None if it names none of this topic."""
    known = position_of(state.get(POSITION), where)
    return known.next if known is not None and known.topic == incarnation else None


# -- reset --------------------------------------------------------------------------------------------------------------


def reset_plan(config: Config, input_from: str) -> list[str]:
    """What `reset` would do, one line for each action.  Raises UsageError while something runs, TransportError."""
    admin = topics.admin(config)
    there = topics.partitions_of(admin, config)
    standing_still(admin, config)
    lines = []
    for group, (source, changelog) in groups_of(config).items():
        if changelog in there:
            live = sum(not key.startswith(b"\0") for number in range(there[changelog]) for key in latest(config, changelog, number))
            lines.append(f"delete and create again {changelog} ({live} {'instances' if changelog == config.changelog_topic else 'timers'})")
        if source in there:
            where = "end: records that are there now are skipped" if input_from == "latest" else "beginning: every record that is there is applied again"
            lines.append(f"set the offsets of {group} on {source} to the {where}")
    directory = config.state_dir / config.application_id
    if directory.exists():
        lines.append(f"delete the local state in {directory} (on other machines, it is deleted when their engines start)")
    return lines


def reset(config: Config, input_from: str, say: Callable[[str], None]) -> None:
    """Forget every instance and timer.  Results, errors, dead letters and stored code stay.  Raises UsageError, TransportError."""
    admin = topics.admin(config)
    there = topics.partitions_of(admin, config)
    standing_still(admin, config)
    for group, (source, changelog) in groups_of(config).items():
        if changelog in there:
            _emptied(admin, config, changelog, there[changelog])
            say(f"{changelog} is empty")
        if source in there:
            ends = topics.ends(admin, source, there[source], latest=input_from == "latest")
            asked = ConsumerGroupTopicPartitions(group, [TopicPartition(source, number, offset) for number, offset in ends.items()])
            _asked(functools.partial(admin.alter_consumer_group_offsets, [asked], request_timeout=_ANSWER_S), f"set the offsets of {group}")
            say(f"{group} starts at the {input_from} of {source}")
    if config.owners_topic in there:  # its notes of owners, and of the records that they died at, no longer apply
        producer = made(Producer, topics.client_config(config, enable_idempotence=True))
        for record in read(config, config.owners_topic):
            producer.produce(config.owners_topic, None, record.key)
        producer.flush(_TIMEOUT_S)
    shutil.rmtree(config.state_dir / config.application_id, ignore_errors=True)


def _emptied(admin: AdminClient, config: Config, topic: str, partitions: int) -> None:
    """Empty a compacted topic.  It cannot be truncated, so it is deleted and created again with the same settings."""
    settings = topics.overridden(admin, topic)
    replication = topics.replication(admin, topic)
    known = {None, topics.describe(admin, config, topic)[0]}
    _done(admin.delete_topics([topic], operation_timeout=_TIMEOUT_S), f"delete {topic}")
    while True:
        try:
            for future in admin.create_topics([NewTopic(topic, partitions, replication, config=settings)], operation_timeout=_TIMEOUT_S).values():
                future.result(_TIMEOUT_S)
            return
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # its deletion is not over yet
                raise TransportError(f"cannot create {topic}: {error.args[0].str()}", retryable=False) from None
        if _id(admin, config, topic) not in known:
            raise TransportError(
                f"{topic} was deleted, then created by something else (auto.create.topics.enable?) without its settings; stop that, delete it, run kwflow topics create, reset again", retryable=False
            )
        time.sleep(_AGAIN_S)


def _id(admin: AdminClient, config: Config, topic: str) -> str | None:
    try:
        return topics.describe(admin, config, topic)[0]
    except TransportError:  # the topic does not exist now
        return None


# -- migrate --------------------------------------------------------------------------------------------------------------


def migrate(config: Config, partitions: int, say: Callable[[str], None]) -> None:
    """Give the input topics and their changelogs this many partitions, and move every entry to the one that its key belongs to.

    Everything that was produced must be applied already, and nothing may be produced meanwhile, as the order between an old
    and a new partition is not kept.  Raises UsageError, TransportError.
    """
    admin = topics.admin(config)
    there = topics.partitions_of(admin, config)
    standing_still(admin, config)
    for group, (source, changelog) in groups_of(config).items():
        if source not in there or changelog not in there:
            raise UsageError(f"topic {source if source not in there else changelog} is missing; create it with kwflow topics create")
        if there[source] > partitions:
            raise UsageError(f"{source} has {there[source]} partitions; Kafka can only add partitions, not remove them; fewer are possible with kwflow export and kwflow import")
        for number in range(there[changelog]):
            check_whole(config, latest(config, changelog, number, lambda key, value: value if key == POSITION else None), f"{changelog}[{number}]")
        _applied(config, admin, group, source, changelog, there[source])
    for group, (source, changelog) in groups_of(config).items():
        more = [NewPartitions(topic, partitions) for topic in (source, changelog) if there[topic] < partitions]
        if more:
            _done(admin.create_partitions(more, operation_timeout=_TIMEOUT_S), f"add partitions to {source} and {changelog}")
        try:
            moved = _move(config, admin, group, source, changelog, partitions)
        except KafkaException as error:
            raise TransportError(f"cannot move the entries of {changelog}: {error.args[0].str()}; no engine starts until kwflow topics migrate --partitions {partitions} has finished") from None
        say(f"{source} and {changelog} have {partitions} partitions; {moved} entries moved")


def _applied(config: Config, admin: AdminClient, group: str, topic: str, changelog: str, partitions: int) -> None:
    """Raises UsageError if records of the topic are not applied yet.  They are read, as offsets alone do not tell: transaction markers have offsets too.

    Heartbeats may be left, as their order does not matter: activities that run when an engine stops give their last ones after it has read its last record.
    """
    committed = following(config, admin, group, topic, changelog, partitions)
    waiting = sum(1 for number in range(partitions) for record in read(config, topic, number, committed[number]) if not set(HEADERS) <= set(record.headers))
    if waiting:
        raise UsageError(f"{waiting} records of {topic} are not applied yet; stop what produces them, let the engines finish, and stop the engines")


def _move(config: Config, admin: AdminClient, group: str, source: str, changelog: str, partitions: int) -> int:
    """Move each entry to its home, then write the entries that each partition has of its own; the mark that lets engines start comes last."""
    producer, put = _writer(config, admin, group, changelog)
    states = {number: latest(config, changelog, number) for number in range(partitions)}
    moved = 0
    for number, state in states.items():
        away = [(key, value, home) for key, value in state.items() if (of := home_of(key)) is not None and (home := partition_of(of, partitions)) != number]
        for chunk in chunks(away):
            producer.begin_transaction()
            for key, value, home in chunk:
                put(value, key, home)
                put(None, key, number)
                states[home][key] = value
            producer.commit_transaction(60)
            moved += len(chunk)
        for key, _, _ in away:
            del state[key]
    incarnation, _ = topics.describe(admin, config, source)
    committed = _offsets(admin, group, source, partitions)
    producer.begin_transaction()
    moves = 1 + max(moves_of(state.get(MOVES)) for state in states.values())
    written = {key: value for state in states.values() for key, value in state.items() if key.startswith(WRITTEN)}
    for number, state in states.items():
        for key in written.keys() - state.keys():  # the partition to which an instance moved must know that the instance's code is stored
            put(written[key], key, number)
        if source == config.scheduler_topic:
            due = Due()
            for key in state:
                due.see(key)
            put(due.entry, timers.COUNT, number)
        else:
            put(b"%d" % moves, MOVES, number)
            put(None, FORGOTTEN, number)  # entries that moved here may expire sooner: the first one is looked up anew
        following = committed.get(number, marked(state, incarnation, f"{changelog}[{number}]") or 0)
        put(msgspec.json.encode(Position(incarnation, following, partitions)), POSITION, number)
    producer.commit_transaction(60)
    return moved


def _writer(config: Config, admin: AdminClient, group: str, topic: str) -> tuple[Producer, Callable[[bytes | None, bytes, int], None]]:
    """A transactional producer, and a function that writes an entry (value, key, partition) to this topic with it."""
    sizes, encryption = topics.sizes(topics.settings_of(admin, [topic]).values()), Encryption(config)
    producer = made(Producer, topics.client_config(config, transactional_id=f"{group}-migrate", transaction_timeout_ms=60_000, **sizes))
    producer.init_transactions(_TIMEOUT_S)
    return producer, lambda value, key, number: producer.produce(topic, encryption.encrypt(topic, value)[0], key, partition=number)


def chunks(items: list[_Item]) -> Iterator[list[_Item]]:
    for start in range(0, len(items), _MOVED_MAX):
        yield items[start : start + _MOVED_MAX]


# -- reencrypt --------------------------------------------------------------------------------------------------------------


def reencrypt(config: Config, say: Callable[[str], None]) -> None:
    """Write all entries of state and stored code again, encrypted with the first key: after compaction no other is needed.  Raises UsageError, TransportError."""
    if not config.cipher_keys:
        raise UsageError("encryption_keys are not set, so there is no key to encrypt with")
    admin = topics.admin(config)
    there = topics.partitions_of(admin, config)
    standing_still(admin, config)
    for group, topic in (*((group, changelog) for group, (_, changelog) in groups_of(config).items()), (config.application_id, config.code_topic)):
        if topic not in there:
            raise UsageError(f"topic {topic} is missing; create it with kwflow topics create")
        try:
            producer, put = _writer(config, admin, group, topic)
            written = 0
            for number in range(there[topic]):
                for chunk in chunks(list(latest(config, topic, number).items())):
                    producer.begin_transaction()
                    for key, value in chunk:
                        put(value, key, number)
                    _commit_alone(producer, admin, config)
                    written += len(chunk)
        except KafkaException as error:
            raise TransportError(f"cannot rewrite the entries of {topic}: {error.args[0].str()}; run the command again") from None
        say(f"{topic}: {written} entries rewritten")


def _commit_alone(producer: Producer, admin: AdminClient, config: Config) -> None:
    """Commit, if nobody has begun to run meanwhile.  Raises UsageError otherwise.

    1. An engine starts after we have read the entries, and steps a workflow.
    2. The entry that we read is written after that step's entry: the next takeover would restore the workflow as it was before the step.

    An engine that is not a member yet when everything is sent will read the changelog beyond what was sent.
    """
    if producer.flush(60):
        raise KafkaException(KafkaError(KafkaError._MSG_TIMED_OUT, "the broker has not accepted everything within 60 s"))
    if running := _running(admin, config):
        producer.abort_transaction(60)
        raise UsageError(f"{running} was started meanwhile; stop every engine and scheduler of {config.application_id}, and run the command again")
    producer.commit_transaction(60)
