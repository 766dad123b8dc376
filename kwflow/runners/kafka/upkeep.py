"""Maintenance of an application on Kafka that is stopped: forget its state, move it to more partitions, or encrypt it with another key.

Each operation refuses to run beside an engine or a scheduler, and can be repeated after a crash in the middle: an entry moves
from one partition to another in one transaction, and an engine refuses to start before the last step is done (K16).  Engines can
read re-encrypted entries at any time, so `reencrypt` itself checks that none has started meanwhile.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.murmur2 import partition_of
from kwflow.errors import TransportError, UsageError
from kwflow.runners.activities.heart import HEADERS
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import FORGOTTEN
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.environment import LIVE, Environment, Producer
from kwflow.runners.kafka.member import EARLIEST, LATEST
from kwflow.runners.kafka.state import POSITION, Position
from kwflow.runners.kafka.stopped import ANSWER_S, COMMIT_S, Stopped, commit, groups_of, marked
from kwflow.runners.moved import MOVES, Due, home_of, moves_of

__all__ = ["chunks", "migrate", "reencrypt", "reset", "reset_plan"]

_TIMEOUT_S = 30
_AGAIN_S = 0.05
_MOVED_MAX = 1000  # entries in one transaction
_Item = TypeVar("_Item")


def _done(futures: dict[Any, Any], what: str) -> None:
    """Wait for the results of admin requests.  Raises TransportError."""
    try:
        for future in futures.values():
            topics.result_of(future, _TIMEOUT_S)
    except KafkaException as error:
        raise TransportError(f"cannot {what}: {error.args[0].name()}: {error.args[0].str()}", retryable=False) from None


# -- reset --------------------------------------------------------------------------------------------------------------


def reset_plan(config: Config, input_from: str, environment: Environment = LIVE) -> list[str]:
    """What `reset` would do, one line for each action.  Raises UsageError while something runs, TransportError."""
    stopped, lines = _complete(config, environment), []
    for group, (source, changelog) in groups_of(config).items():
        live = sum(not key.startswith(b"\0") for number in range(stopped.partitions[changelog]) for key in stopped.latest(changelog, number))
        lines.append(f"delete and create again {changelog} ({live} {'instances' if changelog == config.changelog_topic else 'timers'})")
        where = "end: records that are there now are skipped" if input_from == "latest" else "beginning: every record that is there is applied again"
        lines.append(f"set the offsets of {group} on {source} to the {where}")
    directory = config.state_dir / config.application_id
    if directory.exists():
        lines.append(f"delete the local state in {directory} (on other machines, it is deleted when their engines start)")
    return lines


def reset(config: Config, input_from: str, say: Callable[[str], None], environment: Environment = LIVE) -> None:
    """Forget every instance and timer.  Results, errors, dead letters and stored code stay.  Raises UsageError, TransportError."""
    stopped = _complete(config, environment)
    for group, (source, changelog) in groups_of(config).items():
        _emptied(stopped, changelog)
        say(f"{changelog} is empty")
        starts = stopped.offsets(source, LATEST if input_from == "latest" else EARLIEST)
        asked = ConsumerGroupTopicPartitions(group, [TopicPartition(source, number, offset) for number, offset in starts.items()])
        stopped.ask(functools.partial(stopped.admin.alter_consumer_group_offsets, [asked], request_timeout=ANSWER_S), f"set the offsets of {group}")
        say(f"{group} starts at the {input_from} of {source}")
    if config.owners_topic in stopped.partitions:  # its notes of owners, and of the records that they died at, no longer apply
        producer = environment.producer(topics.client_config(config, enable_idempotence=True))
        for record in stopped.read(config.owners_topic):
            producer.produce(config.owners_topic, None, record.key)
        if producer.flush(_TIMEOUT_S):
            raise TransportError(f"{config.owners_topic} could not be emptied: the broker has not accepted everything within {_TIMEOUT_S} s; run the command again")
    shutil.rmtree(config.state_dir / config.application_id, ignore_errors=True)


def _complete(config: Config, environment: Environment) -> Stopped:
    """An application in which nothing runs, and which has its topics.  Raises UsageError, also after a `reset` that ended between deleting a changelog and creating it: it would look empty already."""
    stopped = Stopped(config, environment)
    stopped.wait()
    stopped.require(*(topic for pair in groups_of(config).values() for topic in pair))
    return stopped


def _emptied(stopped: Stopped, topic: str) -> None:
    """Empty a compacted topic.  It cannot be truncated, so it is deleted and created again with the same settings."""
    config, admin = stopped.config, stopped.admin
    new = topics.made_like(admin, topic)
    known = {None, topics.describe(admin, config, topic)[0]}
    _done(admin.delete_topics([topic], operation_timeout=_TIMEOUT_S), f"delete {topic}")
    while True:
        try:
            [future] = admin.create_topics([new], operation_timeout=_TIMEOUT_S).values()
            topics.result_of(future, _TIMEOUT_S)
            return
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # its deletion is not over yet
                raise TransportError(f"cannot create {topic}: {error.args[0].str()}", retryable=False) from None
        if _id(admin, config, topic) not in known:
            raise TransportError(
                f"{topic} was deleted, then created by something else (auto.create.topics.enable?) without its settings; stop that, delete it, run kwflow topics create, reset again", retryable=False
            )
        stopped.environment.sleep(_AGAIN_S)


def _id(admin: AdminClient, config: Config, topic: str) -> str | None:
    try:
        return topics.describe(admin, config, topic)[0]
    except TransportError:  # the topic does not exist now
        return None


# -- migrate --------------------------------------------------------------------------------------------------------------


def migrate(config: Config, partitions: int, say: Callable[[str], None], environment: Environment = LIVE) -> None:
    """Give the input topics and their changelogs this many partitions, and move every entry to the one that its key belongs to.

    Everything that was produced must be applied already, and nothing may be produced meanwhile, as the order between an old
    and a new partition is not kept.  Raises UsageError, TransportError.
    """
    stopped = _complete(config, environment)
    there = stopped.partitions
    for group, (source, changelog) in groups_of(config).items():
        if there[source] > partitions:
            raise UsageError(f"{source} has {there[source]} partitions; Kafka can only add partitions, not remove them; fewer are possible with kwflow export and kwflow import")
        for number in range(there[changelog]):
            stopped.check_whole(changelog, number, stopped.latest(changelog, number, lambda key, value: value if key == POSITION else None))
        _check_applied(stopped, group)
    for group, (source, changelog) in groups_of(config).items():
        more = [NewPartitions(topic, partitions) for topic in (source, changelog) if there[topic] < partitions]
        if more:
            _done(stopped.admin.create_partitions(more, operation_timeout=_TIMEOUT_S), f"add partitions to {source} and {changelog}")
            stopped = _grown(stopped, partitions, source, changelog)
        try:
            moved = _move(stopped, group)
        except KafkaException as error:
            raise TransportError(f"cannot move the entries of {changelog}: {error.args[0].str()}; no engine starts until kwflow topics migrate --partitions {partitions} has finished") from None
        say(f"{source} and {changelog} have {partitions} partitions; {moved} entries moved")


def _grown(stopped: Stopped, partitions: int, *names: str) -> Stopped:
    """The same application with a client that knows the new partitions: one that knows the old ones does not ask for others.  Raises TransportError."""
    environment, config = stopped.environment, stopped.config
    give_up = environment.monotonic() + _TIMEOUT_S
    while environment.monotonic() < give_up:
        found = Stopped(config, environment)
        if all(found.partitions[name] == partitions for name in names):
            return found
        environment.sleep(_AGAIN_S)
    raise TransportError(f"{config.bootstrap_servers} does not know the new partitions of {' and '.join(names)} yet; run the command again", retryable=False)


def _check_applied(stopped: Stopped, group: str) -> None:
    """Raises UsageError if records of the group's input are not applied yet.  They are read, as offsets alone do not tell: transaction markers have offsets too.

    Heartbeats may be left, as their order does not matter: activities that run when an engine stops give their last ones after it has read its last record.
    """
    topic, _ = groups_of(stopped.config)[group]
    waiting = sum(1 for number, start in stopped.following(group).items() for record in stopped.read(topic, number, start) if not set(HEADERS) <= set(record.headers))
    if waiting:
        raise UsageError(f"{waiting} records of {topic} are not applied yet; stop what produces them, let the engines finish, and stop the engines")


def _move(stopped: Stopped, group: str) -> int:
    """Move each entry to its home, then write the entries that each partition has of its own; the mark that lets engines start comes last."""
    source, changelog = groups_of(stopped.config)[group]
    partitions = stopped.partitions[changelog]
    producer, put = _writer(stopped, group, changelog)
    states = {number: stopped.latest(changelog, number) for number in range(partitions)}
    moved = 0
    for number, state in states.items():
        away = [(key, value, home) for key, value in state.items() if (of := home_of(key)) is not None and (home := partition_of(of, partitions)) != number]
        for chunk in chunks(away):
            producer.begin_transaction()
            for key, value, home in chunk:
                put(value, key, home)
                put(None, key, number)
                states[home][key] = value
            commit(producer)
            moved += len(chunk)
        for key, _, _ in away:
            del state[key]
    incarnation, _ = topics.describe(stopped.admin, stopped.config, source)
    committed = stopped.committed(group)
    producer.begin_transaction()
    moves = 1 + max(moves_of(state.get(MOVES)) for state in states.values())
    written = {key: value for state in states.values() for key, value in state.items() if key.startswith(WRITTEN)}
    for number, state in states.items():
        for key in written.keys() - state.keys():  # the partition to which an instance moved must know that the instance's code is stored
            put(written[key], key, number)
        if source == stopped.config.scheduler_topic:
            due = Due()
            for key in state:
                due.see(key)
            put(due.entry, timers.COUNT, number)
        else:
            put(b"%d" % moves, MOVES, number)
            put(None, FORGOTTEN, number)  # entries that moved here may expire sooner: the first one is looked up anew
        following = committed.get(number, marked(state, incarnation, f"{changelog}[{number}]") or 0)
        put(msgspec.json.encode(Position(incarnation, following, partitions)), POSITION, number)
    commit(producer)
    return moved


def _writer(stopped: Stopped, group: str, topic: str) -> tuple[Producer, Callable[[bytes | None, bytes, int], None]]:
    """A transactional producer, and a function that writes an entry (value, key, partition) to this topic with it."""
    producer, encryption = stopped.producer(f"{group}-migrate", [topic]), Encryption(stopped.config)
    stopped.fence(producer)
    return producer, lambda value, key, number: producer.produce(topic, encryption.encrypt(topic, value)[0], key, partition=number)


def chunks(items: list[_Item]) -> Iterator[list[_Item]]:
    for start in range(0, len(items), _MOVED_MAX):
        yield items[start : start + _MOVED_MAX]


# -- reencrypt --------------------------------------------------------------------------------------------------------------


def reencrypt(config: Config, say: Callable[[str], None], environment: Environment = LIVE) -> None:
    """Write all entries of state and stored code again, encrypted with the first key: after compaction no other is needed.  Raises UsageError, TransportError."""
    if not config.cipher_keys:
        raise UsageError("encryption_keys are not set, so there is no key to encrypt with")
    stopped = _complete(config, environment)
    stopped.require(config.code_topic)
    rewritten = [*((group, changelog) for group, (_, changelog) in groups_of(config).items()), (config.application_id, config.code_topic)]
    for group, topic in rewritten:
        try:
            producer, put = _writer(stopped, group, topic)
            written = 0
            for number in range(stopped.partitions[topic]):
                for chunk in chunks(list(stopped.latest(topic, number).items())):
                    producer.begin_transaction()
                    for key, value in chunk:
                        put(value, key, number)
                    _commit_alone(producer, stopped)
                    written += len(chunk)
        except KafkaException as error:
            raise TransportError(f"cannot rewrite the entries of {topic}: {error.args[0].str()}; run the command again") from None
        say(f"{topic}: {written} entries rewritten")


def _commit_alone(producer: Producer, stopped: Stopped) -> None:
    """Commit, if nobody has begun to run meanwhile.  Raises UsageError otherwise.

    1. An engine starts after we have read the entries, and steps a workflow.
    2. The entry that we read is written after that step's entry: the next takeover would restore the workflow as it was before the step.

    An engine that is not a member yet when everything is sent will read the changelog beyond what was sent.
    """
    if producer.flush(COMMIT_S):
        raise KafkaException(KafkaError(KafkaError._MSG_TIMED_OUT, f"the broker has not accepted everything within {COMMIT_S} s"))
    if running := stopped.running():
        producer.abort_transaction(COMMIT_S)
        raise UsageError(f"{running} was started meanwhile; stop every engine and scheduler of {stopped.config.application_id}, and run the command again")
    commit(producer)
