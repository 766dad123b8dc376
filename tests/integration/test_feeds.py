"""Feeds on a real broker: each record of a foreign topic once, whoever is killed and whatever happens to the topic (decision 0058)."""

import gc
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
from confluent_kafka import ConsumerGroupState, ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition, Uuid
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions, NewTopic, ResourceType

from kwflow.config import Config
from kwflow.core.wire import Record, header
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka import topics
from tests.integration.site import ROOT, Site

MODULE = str(pathlib.Path(__file__).parent / "site_of_feeds.py")
pytestmark = [pytest.mark.broker, pytest.mark.slow]


class Feeds(Site):
    """A site with feeds, and a topic that belongs to somebody else."""

    def __init__(self, broker: str, application: str, directory: pathlib.Path) -> None:
        self.events = f"{application}-events-of-others"
        self.config = Config(bootstrap_servers=broker, application_id=application)
        super().__init__(broker, application, directory, modules=(MODULE,), environment={"FEEDS_TEST_DIRECTORY": str(directory), "FEEDS_TEST_TOPIC": self.events})
        self.others = Producer({"bootstrap.servers": broker, "log_level": 0})
        self.admin = AdminClient({"bootstrap.servers": broker, "log_level": 0})

    def feed(self, name: str, *more: str) -> "subprocess.Popen[str]":
        log = open(self.directory / f"feed-{name}.log", "a")
        command = [sys.executable, "-m", "kwflow", "feed", MODULE, "--state-dir", str(self.directory / f"feed-{name}"), *more]
        process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stderr=log, text=True)
        self.processes.append(process)
        return process

    def said(self, name: str = "one") -> str:
        return (self.directory / f"feed-{name}.log").read_text()

    def event(self, kind: str, id: str = "", number: int = 0, key: str | None = None, partition: int = 0, **headers: bytes) -> None:
        self.others.produce(self.events, json.dumps({"kind": kind, "id": id, "number": number}), key, partition, headers=list(headers.items()))
        assert self.others.flush(20) == 0

    def results(self, count: int) -> dict[str, object]:
        found = self.read(self.topic("result"), count)
        assert len({id for id, _ in found}) == len(found), "each result once"
        return {id: json.loads(value) for id, value in found}

    def letters(self) -> list[Record]:
        return [record for record in kafka_link.read(self.config, self.config.dead_letter_topic) if header(record, "kwflow-error-reason")]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Feeds]:
    site = Feeds(broker, application, tmp_path)
    yield site
    site.end()


def test_records_of_a_topic_start_workflows_and_signal_them_and_their_headers_go_on(site: Feeds) -> None:
    """Decision 0058, semantics §9.3: in the order of their partition, with any key or none."""
    site.event("start", "early", 21, tenant=b"a")  # before there is any feed
    site.feed("one")
    site.engine("one", MODULE)
    for number in range(1, 201):
        site.event("count", "sum", number, key=random.choice(["x", "y", None]))
    site.event("nothing")
    site.event("both", "pair", 3)
    for id in ("sum", "pair-a", "pair-b"):
        site.event("count", id, 0)
    assert site.results(4) == {"early": 42, "sum": [200, 20_100, True], "pair-a": [1, 3, True], "pair-b": [1, 3, True]}
    assert [record.key for record in kafka_link.read(site.config, site.topic("result")) if ("tenant", b"a") in record.headers] == [b"early"]


def test_what_a_feed_does_not_take_is_a_dead_letter_and_is_asked_about_again_where_nobody_else_sees_it(site: Feeds) -> None:
    """G3, K13: a retry does not write to the foreign topic."""
    site.engine("one", MODULE, True, "--with-feeds")
    for value in ("{", '{"kind": 5}', None):
        site.others.produce(site.events, value, "k", 1)
    site.event("unless mended", "late", key="k", partition=2)
    site.event("start", "next", 4, partition=2)
    assert site.results(1) == {"next": 8}
    site.until(lambda: len(site.letters()) == 4)
    assert sorted((header(record, "kwflow-error-reason") or "", record.value or b"") for record in site.letters()) == [
        ("bad-input", b""), ("bad-input", b'{"kind": 5}'), ("bad-json", b"{"), ("feed-failed", b'{"kind": "unless mended", "id": "late", "number": 0}'),
    ]  # fmt: skip
    failed = next(header(record, "kwflow-error-message") or "" for record in site.letters() if header(record, "kwflow-error-reason") == "feed-failed")
    assert failed.startswith("ValueError: late (") and failed.endswith("site_of_feeds.py:35)")
    assert site.run("dead-letters", "retry", "--all", "--reason", "feed-failed").count("sent again") == 1
    site.until(lambda: len(site.letters()) == 5)  # not fixed yet
    (site.directory / "mended").touch()
    site.run("dead-letters", "retry", "--all", "--reason", "feed-failed")
    assert site.results(2) == {"next": 8, "late": [site.events, 2, 0, "k"]}, "it is shown the record as it was"
    assert len(list(kafka_link.read(site.config, site.events))) == 5


def test_feeds_that_are_killed_again_and_again_read_each_record_once(site: Feeds) -> None:
    """K1, K2: messages and position are one transaction. Two processes share the partitions, and one ends the transaction that the other died in."""
    site.engine("one", MODULE)
    counts = {partition: 0 for partition in range(4)}
    feeds = {name: site.feed(name) for name in ("one", "two")}
    chance = random.Random(7)
    for turn in range(12):
        for _ in range(200):
            partition = chance.randrange(4)
            counts[partition] += 1
            site.others.produce(site.events, json.dumps({"kind": "count", "id": f"sum-{partition}", "number": counts[partition]}), None, partition)
        site.others.flush(20)
        name = chance.choice(list(feeds))
        site.until(lambda name=name: "owns" in site.said(name))  # type: ignore[misc]
        if turn % 2:
            feeds[name].send_signal(signal.SIGKILL)
            feeds[name].wait()
            feeds[name] = site.feed(name)
    for partition in range(4):
        site.event("count", f"sum-{partition}", 0, partition=partition)
    assert site.results(4) == {f"sum-{partition}": [count, count * (count + 1) // 2, True] for partition, count in counts.items()}
    assert not site.letters()


def test_a_record_that_kills_the_feed_is_a_dead_letter_in_the_end_and_the_others_go_on(site: Feeds) -> None:
    """K19."""
    site.engine("one", MODULE)
    for number in range(5):
        site.event("start", f"w{number}", number)
    site.event("die", "deadly", 3)
    site.event("start", "behind", 9)
    site.feed("one", "--processes", "2")  # which restart a process that dies
    assert site.results(6) == {**{f"w{number}": 2 * number for number in range(5)}, "behind": 18}
    [letter] = site.letters()
    assert header(letter, "kwflow-error-reason") == "refused"
    (site.directory / "mended").touch()
    site.run("dead-letters", "retry", "--all")
    assert site.results(7)["deadly"] == 6


def test_a_topic_that_is_made_anew_shortened_or_given_partitions_is_read_on(site: Feeds) -> None:
    """The topic belongs to somebody else, so this is no reason to stand still. What was lost is reported."""
    site.environment["KWFLOW_KAFKA"] = '{"topic.metadata.refresh.interval.ms": 500}'
    site.engine("one", MODULE)
    first = site.feed("one")
    for number in range(4):
        site.event("start", f"first-{number}", number)
    site.results(4)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    assert "4 fed" in site.said()
    for number in range(4):
        site.event("start", f"lost-{number}", number)
    site.event("start", "kept", 1)
    site.admin.delete_records([TopicPartition(site.events, 0, 8)])[TopicPartition(site.events, 0)].result(20)
    second = site.feed("one")
    assert site.results(5)["kept"] == 2
    assert f"{site.events}[0]: retention deleted 4 records before {site.application}-feed-{site.events} had read them; it is read from 8 on" in site.said()
    site.admin.create_partitions([NewPartitions(site.events, 6)])[site.events].result(20)
    site.until(lambda: len(site.admin.list_topics(site.events, timeout=10).topics[site.events].partitions) == 6)
    time_to_know = Producer({"bootstrap.servers": site.broker, "log_level": 0})
    time_to_know.produce(site.events, json.dumps({"kind": "start", "id": "fifth", "number": 5}), None, 5)
    assert time_to_know.flush(20) == 0
    assert site.results(6)["fifth"] == 10
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
    site.admin.delete_topics([site.events])[site.events].result(20)
    site.until(lambda: site.events not in site.admin.list_topics(timeout=10).topics)
    site.admin.create_topics([NewTopic(site.events, 2, 1)])[site.events].result(20)
    site.others = Producer({"bootstrap.servers": site.broker, "log_level": 0})
    site.event("start", "anew", 6)
    site.feed("one")
    assert site.results(7)["anew"] == 12


def test_a_topic_that_is_made_anew_while_it_is_read_is_read_from_its_begin(site: Feeds) -> None:
    """Nothing is lost silently, and nothing is read twice. The consumer alone would go on at its offset in the old topic."""
    site.engine("one", MODULE)
    site.feed("one", "--processes", "2")
    for number in range(20):
        site.event("start", f"first-{number}", number)
    site.results(20)
    site.until(lambda: re.search(r"process 1: \S+: owns ", site.said()))  # a process that starts without the topic ends for good
    site.admin.delete_topics([site.events])[site.events].result(20)

    def made() -> bool:
        try:
            site.admin.create_topics([NewTopic(site.events, 4, 1)])[site.events].result(20)
        except KafkaException:  # the topic still exists
            return False
        return True

    site.until(made)
    site.others = Producer({"bootstrap.servers": site.broker, "log_level": 0})
    for number in range(60):
        site.others.produce(site.events, json.dumps({"kind": "start", "id": f"anew-{number}", "number": number}), None, 0)
    assert site.others.flush(20) == 0
    site.until(lambda: "the next start reads the new one from the beginning" in site.said())
    expected = [*(f"anew-{number}".encode() for number in range(60)), *(f"first-{number}".encode() for number in range(20))]
    site.until(lambda: sorted(record.key or b"" for record in kafka_link.read(site.config, site.topic("result"))) == sorted(expected))


def test_a_topic_that_has_lost_its_last_records_is_read_from_its_end(site: Feeds) -> None:
    """As after the election of a replica that was behind: it is the same topic, and what is left of it was read."""
    site.engine("one", MODULE)
    for number in range(4):
        site.event("start", f"read-{number}", number)
    first = site.feed("one")
    site.results(4)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    group = site.config.feed_group(site.events)
    [read] = site.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, [TopicPartition(site.events, 0)])])[group].result(20).topic_partitions
    lost = ConsumerGroupTopicPartitions(group, [TopicPartition(site.events, 0, 9, read.metadata)])
    site.until(lambda: site.admin.describe_consumer_groups([group])[group].result(20).state == ConsumerGroupState.EMPTY)
    site.admin.alter_consumer_group_offsets([lost])[group].result(20)
    site.feed("one")
    site.until(lambda: "it has lost its last records: it ends at 4, before the next position 9; it is read from 4 on" in site.said())
    site.event("start", "next", 5)
    assert site.results(5)["next"] == 10


def test_what_the_broker_takes_no_letter_of_answers_nobody_whatever_its_headers_say(site: Feeds) -> None:
    """K11: of a record that is too large for our topics, only its position is kept. kwflow headers in a foreign topic are not an address of ours."""
    larger = ConfigResource(ResourceType.TOPIC, site.events, incremental_configs=[ConfigEntry("max.message.bytes", "4000000", incremental_operation=AlterConfigOpType.SET)])
    site.admin.incremental_alter_configs([larger])[larger].result(20)
    site.others = Producer({"bootstrap.servers": site.broker, "log_level": 0, "message.max.bytes": 4_000_000})
    site.engine("one", MODULE, True, "--with-feeds")
    waiting = site.application.encode()  # all tests share the topic of replies
    headers, refused = {"kwflow-parent": waiting + b"|0:1", "kwflow-request": b"r", "kwflow-reply-to": b"0/" + waiting}, list[object]()
    while not refused or refused[-1] is not None:  # the new setting reaches the broker a little later
        site.others.produce(site.events, b"new:" + random.Random(5).randbytes(3_000_000), "k", 0, headers=headers, on_delivery=lambda error, _: refused.append(error))
        site.others.flush(20)
    site.event("start", "next", 4)
    assert site.results(1) == {"next": 8}
    site.until(site.letters)
    [letter] = site.letters()
    assert (letter.key, letter.value, header(letter, "kwflow-error-reason"), header(letter, "kwflow-error-offset")) == (b"k", None, "refused", "0")
    assert not any(record.key == waiting for topic in (site.topic("resume"), site.config.reply_topic) for record in kafka_link.read(site.config, topic))


@pytest.mark.skipif(not topics.FORGETFUL, reason="nobody has looked whether this version of confluent-kafka still forgets references to topic ids (kafka/topics.py, id_of)")
def test_the_id_of_a_topic_is_freed_however_often_it_is_asked_for_and_not_before_its_description(site: Feeds) -> None:
    """A feed asks for it with each transaction, and confluent-kafka forgets a reference to each."""

    def ids() -> int:
        gc.collect()
        return sum(type(found) is Uuid for found in gc.get_objects())

    before, others = ids(), {topics.describe(site.admin, site.config, site.config.owners_topic) for _ in range(20)}
    assert len(others) == 1 and ids() == before
    ours = types.SimpleNamespace(topic_id=Uuid(1, 2))  # of a library that forgets none
    for _ in range(20):
        assert topics.id_of(ours) == str(Uuid(1, 2))
    assert ids() == before + 1


def test_feeds_that_nobody_runs_are_told_of_and_what_cannot_be_a_feed_is_wrong_usage(site: Feeds, tmp_path: pathlib.Path) -> None:
    """A feed runs only where it is asked for, as timers do."""
    site.engine("one", MODULE)
    site.until(lambda: any(f"{site.events}: not read here" in log.read_text() for log in site.directory.glob("one.log")))
    assert "no feed in" in site.refused("feed", str(ROOT / "workflows/order.py"))
    assert "--with-feeds" in site.refused("engine", MODULE, "--runner", "faust", "--with-feeds")
    (tmp_path / "own.py").write_text(f"import kwflow as kw\n\n@kw.feed('{site.topic('resume')}')\ndef f(x): ...\n")
    assert "this topic belongs to kwflow" in site.refused("feed", str(tmp_path / "own.py"))
    (tmp_path / "missing.py").write_text("import kwflow as kw\n\n@kw.feed('nobody-has-this')\ndef f(x): ...\n")
    assert "topic nobody-has-this is missing" in site.fails(1, "feed", str(tmp_path / "missing.py"))
