"""What an operator does to an application that is stopped: more partitions, and a reset (K5, K6, K16)."""

import json
import pathlib
import threading
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.murmur2 import partition_of
from kwflow.errors import TransportError
from kwflow.runners.activities.heart import HEADERS
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import EXPIRES, FORGOTTEN
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka import topics, upkeep
from kwflow.runners.kafka.environment import LIVE
from kwflow.runners.kafka.stopped import Stopped
from kwflow.runners.parked import HOLD
from tests.integration.lab import Lab, turn
from tests.integration.site import Site, answer, refs

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path, partitions=2)
    site.environment["KWFLOW_KAFKA"] = '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "log_level": 0}'  # so that a process that has stopped leaves the group sooner
    yield site
    site.end()


def stopped(site: Site) -> None:
    for process in site.processes:
        process.terminate()
        assert process.wait(30) == 0
    site.processes.clear()


def test_waiting_workflows_and_their_timers_move_with_their_keys_to_more_partitions(site: Site) -> None:
    ids = [f"{site.application}-{number}" for number in range(8)]
    site.engine("one")
    for id in ids:
        site.send(id, 'new:{"timeout": 86400000}')
    asked = refs(site, ids)
    assert "is still running" in site.refused("topics", "migrate", "--partitions", "5")
    stopped(site)
    site.send("late", "new:null")
    assert f"1 records of {site.topic('resume')} are not applied yet" in site.refused("topics", "migrate", "--partitions", "5")
    site.engine("one")
    site.until(lambda: "late" in site.run("tail", site.topic("error")))
    changelog, config = f"{site.application}-state-changelog", Config(bootstrap_servers=site.broker)
    paused = next(id for id in ids if partition_of(id.encode(), 2) != partition_of(id.encode(), 5))
    site.run("pause", paused)
    answer(site, paused, asked[paused]["car"])
    site.until(lambda: any(key.startswith(HOLD) for key in kafka_link.latest(config, changelog)))
    stopped(site)
    site.producer.produce(changelog, EXPIRES + b"9" * 20, FORGOTTEN, 0)  # an instance that moves there may have to be forgotten sooner
    assert site.producer.flush(20) == 0
    site.producer.produce(site.topic("resume"), b'{"ref":"9:9","details":1}', paused, 1, headers=list(HEADERS))  # activities that are left behind give their last ones when nobody reads any more
    assert site.producer.flush(20) == 0
    said = site.run("topics", "migrate", "--partitions", "5")
    first = [record.value for record in kafka_link.read(config, changelog, 0) if record.key == FORGOTTEN]
    assert first[0] and first[-1] is None
    assert all(any(key.startswith(WRITTEN) for key in kafka_link.latest(config, changelog, number)) for number in range(5)), "whoever takes one over loads the code that is waited in there"
    assert f"{site.topic('resume')} and {changelog} have 5 partitions" in said and "; 0 entries moved" not in said
    assert site.run("topics", "migrate", "--partitions", "5").count("; 0 entries moved") == 2  # another run changes nothing
    assert "only add" in site.refused("topics", "migrate", "--partitions", "3")
    assert sorted(row["id"] for row in json.loads(site.run("list", "--json"))) == sorted(ids)
    site.engine("two")
    for id in ids:
        for kind in ("car", "hotel", "flight")[id == paused :]:
            answer(site, id, asked[id][kind])
    site.run("unpause", paused)  # what it held has moved with it
    assert sorted(id for id, _ in site.read(site.topic("result"), len(ids))) == sorted(ids)
    site.until(lambda: not any(key.startswith(timers.DUE) for key in kafka_link.latest(config, f"{site.application}-timers-changelog")))  # the scheduler follows the engine
    stopped(site)
    site.environment["KWFLOW_STATE_DIR"] = str(site.directory / "two")
    assert "(0 timers)" in site.fails(1, "reset", typed="n\n"), "each was cancelled where it had moved to"


def test_what_has_moved_is_not_taken_for_deleted_because_it_was_where_it_had_been(site: Site) -> None:
    """An entry is what its own partition says it is. The order in which partitions are read is chance."""
    topic = f"{site.application}-state-changelog"
    for old, new in ((0, 1), (1, 0)):
        for partition, value in ((old, "state"), (new, "state"), (old, None)):
            site.producer.produce(topic, value, f"moved to {new}", partition)
    site.producer.produce(topic, None, "ended", 0)
    assert site.producer.flush(20) == 0
    assert kafka_link.latest(Config(bootstrap_servers=site.broker), topic) == {b"moved to 0": b"state", b"moved to 1": b"state"}


def test_a_reset_says_what_it_would_do_and_forgets_every_instance(site: Site) -> None:
    ids = [f"{site.application}-{number}" for number in range(3)]
    site.engine("one")
    for id in ids:
        site.send(id, 'new:{"timeout": 86400000}')
    refs(site, ids)
    due = f"{site.application}-timers-changelog"
    site.until(lambda: sum(key.startswith(timers.DUE) for key in kafka_link.latest(Config(bootstrap_servers=site.broker), due)) == 3)  # the scheduler follows the engine
    stopped(site)
    site.environment["KWFLOW_STATE_DIR"] = str(site.directory / "one")
    refused = site.fails(1, "reset", typed="n\n")
    assert "state-changelog (3 instances)" in refused and "timers-changelog (3 timers)" in refused and "records that are there now are skipped" in refused
    assert ids[0] in site.run("list")
    assert (local := site.directory / "one" / site.application).is_dir() and f"delete the local state in {local}" in refused
    site.producer.produce(f"{site.application}-owners", b"{}", f"{site.topic('resume')}/0/attempts")
    assert site.producer.flush(20) == 0
    site.run("reset", "--yes")
    assert kafka_link.latest(Config(bootstrap_servers=site.broker), f"{site.application}-owners") == {}, "records are counted from the begin again, and so are deaths"
    assert not local.exists()
    assert ids[0] not in site.run("list")
    site.engine("one")
    site.send(ids[0], 'new:{"timeout": 86400000}')
    site.until(lambda: site.run("list").count(site.application) == 1)
    stopped(site)
    site.run("reset", "--yes", "--input-from", "earliest")
    site.engine("one")
    site.until(lambda: all(id in site.run("list") for id in ids))


def test_a_copy_of_what_a_reset_has_emptied_is_made_anew_on_machines_that_come_back_late(lab: Lab) -> None:
    """K8: by then the new changelog is as long as the old one was."""
    other = lab.engine("other")
    lab.send("resume", "ghost", "new:{}")
    turn(other, lambda: other.owned and other.owned[0].position == 1)
    other.run(lambda: True)
    upkeep.reset(lab.config("here"), "latest", lambda _: None)
    here = lab.engine("here")
    for number in range(8):
        lab.send("resume", f"w{number}", "new:{}")
        turn(here, lambda number=number: here.owned and here.owned[0].position >= number + 2)  # type: ignore[misc]
    here.run(lambda: True)
    other = lab.engine("other")
    turn(other, lambda: other.owned)
    assert other.owned[0].store.get(b"w7") is not None and other.owned[0].store.get(b"ghost") is None


def test_what_a_changelog_takes_is_moved_however_large_or_small_its_limit(lab: Lab) -> None:
    """K11: a client's own limit is a megabyte, for a record and for a batch. If the move stops half-way, no engine starts."""
    config = lab.config("one")
    for partitions, limit, sizes in ((8, 300_000, [100_000] * 8), (9, 3_000_000, [2_000_000])):
        limited(lab, config.changelog_topic, limit)
        producer = Producer({"bootstrap.servers": lab.base["bootstrap_servers"], "message.max.bytes": 3_000_000, "batch.size": 200_000})
        for number, size in enumerate(sizes):
            producer.produce(config.changelog_topic, b"x" * size, f"{limit}-{number}")
        assert producer.flush(20) == 0
        upkeep.migrate(config, partitions, lambda _: None)
    found = [partition_of(key, 9) == number for number in range(9) for key in kafka_link.latest(config, config.changelog_topic, number) if not key.startswith(b"\0")]
    assert found == [True] * 9
    limited(lab, config.changelog_topic, 50_000)
    with pytest.raises(TransportError, match=f"cannot move the entries of {config.changelog_topic}: .* too large.*; no engine starts until kwflow topics migrate --partitions 30"):
        upkeep.migrate(config, 30, lambda _: None)


def test_a_topic_that_takes_more_than_the_client_can_send_is_no_wrong_setting(lab: Lab) -> None:
    """K11."""
    limited(lab, lab.base["result_topic"], 2**31 - 1)
    assert lab.engine("one").owned == {}


def test_a_reset_that_could_not_set_an_offset_says_so(lab: Lab) -> None:
    """The broker reports it for each partition, although the request as a whole succeeded."""
    config = lab.config("one")
    member = Consumer({"bootstrap.servers": lab.base["bootstrap_servers"], "group.id": config.application_id})

    def say(line: str) -> None:
        member.subscribe([config.resume_topic])
        while not member.assignment():
            member.poll(0.1)

    with pytest.raises(TransportError, match=f"cannot set the offsets of {config.application_id} on {config.resume_topic}.*Unknown member"):
        upkeep.reset(config, "latest", say)
    member.close()


def test_what_a_group_has_forgotten_is_known_from_the_state_when_partitions_are_added(lab: Lab) -> None:
    """K16: offsets expire after a week without an engine. Applied records counted as waiting, for ever."""
    config, stopped = lab.config("one"), Stopped(lab.config("one"), LIVE)
    engine = lab.engine("one")
    lab.send("resume", "w", "new:{}")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)
    engine.run(lambda: True)
    stopped.wait()
    [done] = stopped.admin.delete_consumer_groups([config.application_id]).values()
    done.result(10)
    upkeep.migrate(config, 2, lambda _: None)
    engine = lab.engine("one")
    turn(engine, lambda: len(engine.owned) == 2)
    assert engine.owned[0].position == 1


def limited(lab: Lab, topic: str, limit: int) -> None:
    """This topic accepts this many bytes at a time."""
    entry = ConfigEntry("max.message.bytes", str(limit), incremental_operation=AlterConfigOpType.SET)
    admin = topics.admin(lab.config("any"))
    [done] = admin.incremental_alter_configs([ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])]).values()
    done.result(10)


def test_a_reset_ends_where_somebody_else_makes_the_topic_that_it_has_deleted(lab: Lab) -> None:
    """As any client does where topics are created automatically. The reset tried to create it for ever, and none of its settings were in force."""
    config = lab.config("any")
    admin = topics.admin(config)
    over = threading.Event()

    def make() -> None:
        while not over.is_set():
            for future in admin.create_topics([NewTopic(config.changelog_topic, 1, 1)]).values():
                future.exception()

    maker = threading.Thread(target=make)
    maker.start()
    try:
        with pytest.raises(TransportError, match=f"{config.changelog_topic} was deleted, then created by something else") as refused:
            upkeep.reset(config, "latest", print)
    finally:
        over.set()
        maker.join()
    assert not refused.value.retryable
