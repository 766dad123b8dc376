"""`confluent_kafka.admin.AdminClient` on the simulated broker: its methods return futures that are already done."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from confluent_kafka import ConsumerGroupState, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from kwflow.testing.kafka.broker import Broker
from kwflow.testing.kafka.time import Host
from kwflow.testing.kafka.transactions import Refused

__all__ = ["SimulatedAdmin"]


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
        named = {name: types.SimpleNamespace(partitions={partition.place[1]: partition for partition in found.partitions}, error=None) for name, found in self._broker.topics.items()}
        return types.SimpleNamespace(topics=named if topic is None else {topic: named[topic]}, brokers={1: "simulated"})

    def describe_topics(self, topics: TopicCollection, request_timeout: float = -1) -> dict[str, Future[Any]]:
        self._host.call("describe_topics")

        def describe(name: str) -> Any:
            if name not in self._broker.topics:
                raise Refused(KafkaError.UNKNOWN_TOPIC_OR_PART, f"topic {name} does not exist")
            return types.SimpleNamespace(topic_id=self._broker.topics[name].id, partitions=self._broker.topics[name].partitions)

        return {name: self._done("describe_topics", lambda name=name: describe(name)) for name in topics.topic_names}  # type: ignore[misc]

    def describe_configs(self, resources: Iterable[Any], request_timeout: float = -1) -> dict[Any, Future[Any]]:
        self._host.call("describe_configs")

        def describe(name: str) -> Any:
            return {key: types.SimpleNamespace(value=value) for key, value in self._broker.topics[name].config.items()}

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

    def create_topics(self, new_topics: Iterable[Any], operation_timeout: float = 0) -> dict[str, Future[Any]]:
        self._host.call("create_topics")
        return {new.topic: self._done("create_topics", lambda new=new: self._broker.create(new.topic, new.num_partitions, dict(new.config or {}))) for new in new_topics}  # type: ignore[misc]

    def delete_topics(self, topics: list[str], operation_timeout: float = 0) -> dict[str, Future[Any]]:
        self._host.call("delete_topics")
        return {name: self._done("delete_topics", lambda name=name: self._broker.delete(name)) for name in topics}  # type: ignore[misc]

    def create_partitions(self, new_partitions: Iterable[Any], operation_timeout: float = 0) -> dict[str, Future[Any]]:
        self._host.call("create_partitions")
        return {new.topic: self._done("create_partitions", lambda new=new: self._broker.add_partitions(new.topic, new.new_total_count)) for new in new_partitions}  # type: ignore[misc]
