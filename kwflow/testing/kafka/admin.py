"""`confluent_kafka.admin.AdminClient` on the simulated broker: its methods return futures that are already done."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from confluent_kafka import OFFSET_INVALID, ConsumerGroupState, ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import ConfigSource, OffsetSpec  # type: ignore[attr-defined]

from kwflow.testing.kafka.broker import Broker
from kwflow.testing.kafka.groups import Metadata
from kwflow.testing.kafka.log import Place
from kwflow.testing.kafka.time import Host
from kwflow.testing.kafka.transactions import Refused

__all__ = ["SimulatedAdmin"]


def _answer(place: Place, offset: int, error: KafkaError | None) -> Any:
    return types.SimpleNamespace(topic=place[0], partition=place[1], offset=offset, error=error)


class SimulatedAdmin:
    """The part of an AdminClient that kwflow uses, and the tests that compare the simulation with a real broker; no more."""

    def __init__(self, broker: Broker, host: Host) -> None:
        self._broker = broker
        self._host = host

    def _done(self, what: str, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            result = work()
            if not self._host.answered(what):
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{what}: no answer in time", retriable=True))
            future.set_result(result)
        except Refused as refused:
            future.set_exception(KafkaException(KafkaError(refused.code, refused.reason)))
        except KafkaException as error:
            future.set_exception(error)
        return future

    def list_topics(self, topic: str | None = None, timeout: float = -1) -> Any:
        self._host.call("list_topics")
        if not self._host.answered("list_topics"):
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "list_topics: no answer in time", retriable=True))
        named = {
            name: types.SimpleNamespace(partitions={partition.place[1]: types.SimpleNamespace(id=partition.place[1], replicas=[1]) for partition in found.partitions}, error=None)
            for name, found in self._broker.topics.items()
        }
        return types.SimpleNamespace(topics=named if topic is None else {topic: named[topic]}, brokers={1: "simulated"})

    def describe_topics(self, topics: TopicCollection, include_authorized_operations: bool = False, request_timeout: float = -1) -> dict[str, Future[Any]]:
        self._host.call("describe_topics")

        def describe(name: str) -> Any:
            if name not in self._broker.topics:
                raise Refused(KafkaError.UNKNOWN_TOPIC_OR_PART, f"topic {name} does not exist")
            return types.SimpleNamespace(topic_id=self._broker.topics[name].id, partitions=self._broker.topics[name].partitions, authorized_operations=[])

        return {name: self._done("describe_topics", lambda name=name: describe(name)) for name in topics.topic_names}  # type: ignore[misc]

    def describe_configs(self, resources: Iterable[Any], request_timeout: float = -1) -> dict[Any, Future[Any]]:
        self._host.call("describe_configs")

        def describe(name: str) -> Any:
            topic = self._broker.topics[name]
            sources = {key: ConfigSource.DYNAMIC_TOPIC_CONFIG if key in topic.overridden else ConfigSource.DEFAULT_CONFIG for key in topic.config}
            return {key: types.SimpleNamespace(value=value, source=sources[key].value) for key, value in topic.config.items()}

        return {resource: self._done("describe_configs", lambda resource=resource: describe(resource.name)) for resource in resources}  # type: ignore[misc]

    def list_offsets(
        self, places: dict[TopicPartition, OffsetSpec], isolation_level: IsolationLevel = IsolationLevel.READ_UNCOMMITTED, request_timeout: float = -1
    ) -> dict[TopicPartition, Future[Any]]:
        self._host.call("list_offsets")
        committed = isolation_level == IsolationLevel.READ_COMMITTED

        def offset(place: TopicPartition, spec: OffsetSpec) -> Any:
            partition = self._broker.partition((place.topic, place.partition))
            earliest = type(spec) is type(OffsetSpec.earliest())  # type: ignore[no-untyped-call]
            return types.SimpleNamespace(offset=partition.start if earliest else partition.stable if committed else partition.end)

        return {place: self._done("list_offsets", lambda place=place, spec=spec: offset(place, spec)) for place, spec in places.items()}  # type: ignore[misc]

    def describe_consumer_groups(self, group_ids: list[str], request_timeout: float = -1) -> dict[str, Future[Any]]:
        self._host.call("describe_groups")

        def describe(name: str) -> Any:
            group = self._broker.group(name)
            state = ConsumerGroupState.PREPARING_REBALANCING if group.rebalancing else ConsumerGroupState.STABLE if group.members else ConsumerGroupState.EMPTY
            shares = [(member, types.SimpleNamespace(topic_partitions=[TopicPartition(*place) for place in sorted(member.given)])) for member in group.members.values()]
            members = [types.SimpleNamespace(member_id=member.id, group_instance_id=member.instance, assignment=share) for member, share in shares]
            return types.SimpleNamespace(state=state, members=members)

        return {name: self._done("describe_groups", lambda name=name: describe(name)) for name in group_ids}  # type: ignore[misc]

    def list_consumer_group_offsets(self, asked: list[ConsumerGroupTopicPartitions], require_stable: bool = False, request_timeout: float = -1) -> dict[str, Future[Any]]:
        self._host.call("list_group_offsets")

        def committed(one: ConsumerGroupTopicPartitions) -> Any:
            known, found = self._broker.group(one.group_id), []
            for partition in one.topic_partitions or []:
                place = (partition.topic, partition.partition)
                unstable = KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT) if require_stable and known.unstable(place) else None
                found.append(_answer(place, known.offsets.get(place, OFFSET_INVALID), unstable))
            return types.SimpleNamespace(group_id=one.group_id, topic_partitions=found)

        return {one.group_id: self._done("list_group_offsets", lambda one=one: committed(one)) for one in asked}  # type: ignore[misc]

    def alter_consumer_group_offsets(self, asked: list[ConsumerGroupTopicPartitions], request_timeout: float = -1) -> dict[str, Future[Any]]:
        self._host.call("alter_group_offsets")

        def alter(one: ConsumerGroupTopicPartitions) -> Any:
            offsets = {(place.topic, place.partition): place.offset for place in one.topic_partitions or []}
            error = None
            try:
                self._broker.group(one.group_id).commit({place: (offset, "") for place, offset in offsets.items()}, Metadata(one.group_id, "", None, -1))
            except Refused as refused:  # reported for each partition; the request as a whole succeeds
                error = KafkaError(refused.code, refused.reason)
            return types.SimpleNamespace(group_id=one.group_id, topic_partitions=[_answer(place, offset, error) for place, offset in offsets.items()])

        return {one.group_id: self._done("alter_group_offsets", lambda one=one: alter(one)) for one in asked}  # type: ignore[misc]

    def create_topics(self, new_topics: Iterable[Any], operation_timeout: float = 0) -> dict[str, Future[Any]]:
        self._host.call("create_topics")
        return {new.topic: self._done("create_topics", lambda new=new: self._broker.create(new.topic, new.num_partitions, dict(new.config or {}))) for new in new_topics}  # type: ignore[misc]

    def delete_topics(self, topics: list[str], operation_timeout: float = 0) -> dict[str, Future[Any]]:
        self._host.call("delete_topics")
        return {name: self._done("delete_topics", lambda name=name: self._broker.delete(name)) for name in topics}  # type: ignore[misc]

    def create_partitions(self, new_partitions: Iterable[Any], operation_timeout: float = 0) -> dict[str, Future[Any]]:
        self._host.call("create_partitions")
        return {new.topic: self._done("create_partitions", lambda new=new: self._broker.add_partitions(new.topic, new.new_total_count)) for new in new_partitions}  # type: ignore[misc]
