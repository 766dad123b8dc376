"""A parked instance on a real broker: what it holds is applied in order, exactly once, whoever has the partition meanwhile (semantics §7, K17)."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output
from kwflow.errors import TransportError
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka.writer import SoleWriter
from tests.integration.site import ROOT, Site

pytestmark = [pytest.mark.broker, pytest.mark.slow]
RECORDS = 1200  # three transactions of a drain
COUNTING = """
import os
import kwflow as kw

kw.declare_topics("counted")

def main(opts):
    while True:
        value = yield kw.suspend("next")
        held = open(__file__) if value == 0 and not os.path.exists(opts["mended"]) else None
        kw.output(str(value), "counted")
        if held is not None:
            yield kw.suspend("never")
        if value == opts["last"]:
            return "done"
"""


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    yield site
    site.end()


def test_a_takeover_and_a_restore_in_the_middle_of_a_retry_change_nothing(site: Site) -> None:
    module, mended, id = site.directory / "counting.py", site.directory / "mended", f"{site.application}-w"
    module.write_text(COUNTING.replace('"counted"', f'"{site.application}-counted"'))
    site.run("topics", "create", str(module))
    first = site.engine("one", str(module), False)
    site.send(id, "new:" + json.dumps({"mended": str(mended), "last": RECORDS - 1}))
    for value in range(RECORDS):
        site.producer.produce(site.topic("resume"), f'{{"ref":"next","value":{value}}}', id)
    assert site.producer.flush(30) == 0
    site.until(lambda: f" {RECORDS} " in site.run("dead-letters", "list"))
    assert f"{RECORDS - 1} records wait behind it" in site.run("dead-letters", "show", id)
    mended.touch()
    site.run("dead-letters", "retry", id)
    site.read(f"{site.application}-counted", 1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    site.engine("two", str(module), False)  # another identity, an empty state directory
    assert site.read(site.topic("result"), 1) == [(id, '"done"')]
    assert [value for _, value in site.read(f"{site.application}-counted", RECORDS)] == [str(value) for value in range(RECORDS)]


# -- dead letters ------------------------------------------------------------------------------------------------------
LETTERS = 1200  # twelve transactions


def letters(site: Site, count: int = LETTERS, topic: str | None = None, value: bytes = b"{not json") -> list[str]:
    """This many dead letters, as an engine writes them; returns their keys."""
    headers = [("kwflow-error-reason", "bad-json"), ("kwflow-error-topic", topic or site.topic("resume")), ("kwflow-error-message", "no JSON")]
    for number in range(count):
        site.producer.produce(f"{site.application}-dead-letter", value, f"k{number:04}", headers=headers)
    assert site.producer.flush(20) == 0
    return [f"k{number:04}" for number in range(count)]


def resent(site: Site) -> list[str]:
    return sorted((record.key or b"").decode() for record in kafka_link.read(Config(bootstrap_servers=site.broker), site.topic("resume")))


def test_letters_are_sent_again_once_although_the_command_is_killed_again_and_again(site: Site) -> None:
    """K13: a letter and its mark are in one transaction. The next command ends the transaction that a killed one left open."""
    expected, chance = letters(site), random.Random(5)
    command = [sys.executable, "-m", "kwflow", "dead-letters", "retry", "--all"]
    for _ in range(5):
        process = subprocess.Popen(command, env={**site.environment, "PYTHONUNBUFFERED": "1"}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for _ in range(chance.choice((1, 95, 100, 105))):  # a hundred letters are done, and the next ones are in progress
            process.stdout.readline()
        time.sleep(chance.random() * 0.01)  # the moment of the kill is the point of the test; nothing waits for this
        process.kill()
        process.communicate()
    assert 500 <= len(resent(site)) < LETTERS
    site.run("dead-letters", "retry", "--all")
    assert resent(site) == expected
    assert "no instance is parked" in site.refused("dead-letters", "retry", "--all")


def test_many_letters_are_one_transaction_and_one_that_the_broker_refuses_is_named_and_holds_up_none_of_the_others(site: Site) -> None:
    """After an outage there are thousands."""
    expected = letters(site, 100)
    site.run("dead-letters", "retry", "--all")
    assert resent(site) == expected
    reader = Consumer({"bootstrap.servers": site.broker, "group.id": "reader"})
    ends = [reader.get_watermark_offsets(TopicPartition(site.topic("resume"), number), 10)[1] for number in range(4)]
    reader.close()
    assert 100 < sum(ends) <= 104, "a transaction leaves one marker in each partition"
    small, client = f"{site.application}-small", AdminClient({"bootstrap.servers": site.broker})
    client.create_topics([NewTopic(small, 1, config={"max.message.bytes": "2000"})])[small].result(20)
    letters(site, 2, small, b"x" * 3000)
    letters(site, 50)
    said = site.fails(1, "dead-letters", "retry", "--all")
    assert said.count("sent again") == 50 and said.count("too large") == 2
    assert resent(site) == sorted([*expected, *expected[:50]])
    site.producer.produce(f"{site.application}-dead-letter", b"{", b"gone", headers=[("kwflow-error-reason", "bad-json"), ("kwflow-error-topic", f"{site.application}-gone")])
    assert site.producer.flush(20) == 0
    said = site.fails(1, "dead-letters", "retry", "--all")
    assert "sent again" not in said and said.count("too large") == 2 and said.count("Unknown topic") == 1


def test_of_two_who_write_under_one_name_the_first_is_told_and_its_open_transaction_is_undone(site: Site) -> None:
    config = Config(bootstrap_servers=site.broker, application_id=site.application)
    first = SoleWriter(config, "dead-letters")
    first._producer.begin_transaction()
    first._producer.produce(site.topic("resume"), b"half", b"a")
    first._producer.flush(20)
    second = SoleWriter(config, "dead-letters")
    second.write([Output(site.topic("resume"), b"b", b"whole"), Output(f"{site.application}-dead-letter", b"b", None)])
    with pytest.raises(TransportError, match="another process has started to do this meanwhile"):
        first.write([Output(site.topic("resume"), b"a", b"late")])
    assert resent(site) == ["b"]


def test_a_letter_that_the_broker_does_not_take_leaves_the_writer_fit_for_the_next(site: Site) -> None:
    config = Config(bootstrap_servers=site.broker, application_id=site.application)
    with SoleWriter(config, "dead-letters") as writer:
        with pytest.raises(TransportError, match="(?i)too large"):
            writer.write([Output(site.topic("resume"), b"a", b"x" * 2_000_000)])
        writer.write([Output(site.topic("resume"), b"b", b"fine")])
    assert resent(site) == ["b"]


def test_a_letter_that_was_too_large_is_sent_again_once_the_limit_is_raised(site: Site) -> None:
    """As its message says. A client's own limit is 1,000,000."""
    config = Config(bootstrap_servers=site.broker, application_id=site.application, value_bytes_max=1_040_000)
    with SoleWriter(config, "dead-letters") as writer:
        writer.write([Output(site.topic("resume"), b"large", b"x" * 1_039_000)])
    assert resent(site) == ["large"]


def test_what_was_committed_behind_a_transaction_that_is_open_is_waited_for(site: Site) -> None:
    """K5: an engine has written a letter and not committed. The mark that an operator has made since is behind it, and without that mark a letter would be sent twice."""
    config = Config(bootstrap_servers=site.broker, application_id=site.application)
    topic, place = config.dead_letter_topic, partition_of(b"k", 4)
    site.producer.produce(topic, b"first", b"k", place)
    assert site.producer.flush(20) == 0
    engine = Producer({"bootstrap.servers": site.broker, "transactional.id": f"{site.application}-open", "log_level": 0})
    engine.init_transactions(20)
    engine.begin_transaction()
    engine.produce(topic, b"undone", b"k", place)
    engine.flush(20)
    with SoleWriter(config, "dead-letters") as writer:
        writer.write([Output(topic, b"k", b"mark")])
    found = kafka_link.read(config, topic)
    assert next(found).value == b"first"
    engine.abort_transaction(20)
    assert [record.value for record in found] == [b"mark"]
