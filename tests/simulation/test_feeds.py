"""Defects that simulated feeds have shown, in the fewest turns (decision 0058)."""

import json
import pathlib

import pytest

from kwflow.config import Config
from kwflow.errors import TransportError
from kwflow.feeds import registered_feeds
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.testing.kafka import Broker, SimulatedEnvironment
from tests.simulation.others import EVENTS
from tests.simulation.test_found import Losing

GROUP = f"feeds-feed-{EVENTS}"


class Lab:
    """Feeds of one topic, which move turn by turn."""

    def __init__(self, directory: pathlib.Path, partitions: int = 1) -> None:
        self.broker = Broker()
        self.client = SimulatedEnvironment(self.broker)
        self.config = Config(application_id="feeds", state_dir=directory)
        topics.create(topics.admin(self.config, self.client), self.config, [], 1, 1)
        self.broker.create(EVENTS, partitions)
        self.producer = self.client.producer({})
        self.hosts: dict[str, Losing] = {}
        self.said: list[str] = []
        self._sent = 0

    def feed(self, name: str, **settings: object) -> KafkaRunner:
        host = self.hosts[name] = Losing(self.broker, name)
        config = self.config.model_copy(update={"instance_id": name, "state_dir": self.config.state_dir / f"{name}-{len(self.said)}", **settings})
        make = FeedProcessor(config, registered_feeds()[EVENTS], self.said.append)
        return KafkaRunner(config, lambda _: make, GROUP, self.said.append, host, (), SimulatedEnvironment(self.broker, host))

    def send(self, count: int, partition: int = 0) -> None:
        for _ in range(count):
            self.producer.produce(EVENTS, json.dumps({"number": self._sent, "kind": "tell", "to": ["w"]}), None, partition)
            self._sent += 1
        self.producer.flush()

    def anew(self, partitions: int = 1) -> None:
        self.broker.delete(EVENTS)
        self.broker.create(EVENTS, partitions)

    def fed(self) -> list[int]:
        """The numbers of the events that were fed, in order."""
        return [int(json.loads(entry.value or b"")["value"]["event"].split(".")[0]) for entry in self.broker.partition((self.config.resume_topic, 0)).committed()]

    def stop(self, name: str, feed: KafkaRunner) -> None:
        self.hosts[name].alive = False
        feed._lock.close()


def until_fed(lab: Lab, feed: KafkaRunner, count: int) -> None:
    for _ in range(200):
        feed.turn()
        if len(lab.fed()) >= count:
            return
    raise AssertionError(f"only {lab.fed()}")


def test_a_feed_does_not_read_on_in_a_topic_that_was_made_anew_and_is_longer_already(tmp_path: pathlib.Path) -> None:
    """G3: librdkafka goes on where it was and reports nothing. What is before that position was never read."""
    lab = Lab(tmp_path)
    lab.send(5)
    feed = lab.feed("one")
    until_fed(lab, feed, 5)
    lab.anew()
    lab.send(8)
    with pytest.raises(TransportError, match=f"{EVENTS} was deleted or recreated while {GROUP} was reading it") as raised:
        until_fed(lab, feed, 6)
    assert raised.value.retryable
    lab.stop("one", feed)
    until_fed(lab, lab.feed("one"), 13)
    assert lab.fed() == [*range(13)]


def test_a_feed_that_has_nothing_to_read_hears_within_seconds_that_its_topic_was_made_anew(tmp_path: pathlib.Path) -> None:
    """G3: the new topic is exactly as long as the old one was, so nothing arrives where the feed reads."""
    lab = Lab(tmp_path)
    lab.send(5)
    feed = lab.feed("one")
    until_fed(lab, feed, 5)
    lab.anew()
    lab.send(5)
    begun = lab.broker.time.now
    with pytest.raises(TransportError, match="recreated"):
        until_fed(lab, feed, 6)
    assert lab.broker.time.now - begun < 12_000


def test_a_position_in_a_topic_that_is_no_more_is_none_in_the_next_one(tmp_path: pathlib.Path) -> None:
    """G3: it was committed just after the new topic existed, by a feed that had not heard of it."""
    lab = Lab(tmp_path)
    lab.send(5)
    feed = lab.feed("one")
    lab.hosts["one"].before["send_offsets"] = lab.anew
    with pytest.raises(TransportError):
        until_fed(lab, feed, 6)
    assert lab.broker.group(GROUP).offsets == {(EVENTS, 0): 5}
    lab.stop("one", feed)
    lab.send(7)
    until_fed(lab, lab.feed("one"), 12)
    assert lab.fed() == [*range(12)]
    assert f"{EVENTS}[0] was recreated while {GROUP} was reading it, at 5: it is read from the beginning; the rest of the old topic is lost" in lab.said


def test_who_says_so_begins_at_the_position_all_the_same(tmp_path: pathlib.Path) -> None:
    """--accept-offset-reset: a mirrored cluster has the positions, but its topics have other ids."""
    lab = Lab(tmp_path)
    lab.send(5)
    feed = lab.feed("one")
    lab.hosts["one"].before["send_offsets"] = lab.anew
    with pytest.raises(TransportError):
        until_fed(lab, feed, 6)
    lab.stop("one", feed)
    lab.send(7)
    until_fed(lab, lab.feed("one", accept_offset_reset=True), 7)
    assert lab.fed() == [*range(5), 10, 11]


def test_a_position_without_a_note_is_taken_as_it_is(tmp_path: pathlib.Path) -> None:
    """An operator set it with Kafka's own tools, to where the feed is to begin."""
    lab = Lab(tmp_path)
    lab.send(5)
    lab.broker.group(GROUP).offsets[EVENTS, 0] = 3
    until_fed(lab, lab.feed("one"), 2)
    assert lab.fed() == [3, 4]
