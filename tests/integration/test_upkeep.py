"""What an operator does to an application that stands still: more partitions, and a reset (K5, K6, K16)."""

import json
import pathlib
from collections.abc import Iterator

import pytest

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.murmur2 import partition_of
from kwflow.runners import kafka_link, upkeep
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import EXPIRES, FORGOTTEN
from kwflow.runners.parked import HOLD
from tests.integration.lab import Lab, turn
from tests.integration.site import Site, answer, refs

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path, partitions=2)
    site.environment["KWFLOW_KAFKA"] = '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "log_level": 0}'  # who has stopped is gone sooner
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
    assert "still runs" in site.refused("topics", "migrate", "--partitions", "5")
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
    site.producer.produce(changelog, EXPIRES + b"9" * 20, FORGOTTEN, 0)  # what moves there may have to be forgotten sooner
    assert site.producer.flush(20) == 0
    said = site.run("topics", "migrate", "--partitions", "5")
    first = [record.value for record in kafka_link.read(config, changelog, 0) if record.key == FORGOTTEN]
    assert first[0] and first[-1] is None
    assert all(any(key.startswith(WRITTEN) for key in kafka_link.latest(config, changelog, number)) for number in range(5)), "whoever takes one over loads the code that is waited in there"
    assert f"{site.topic('resume')} and {changelog} have 5 partitions" in said and "; 0 entries moved" not in said
    assert site.run("topics", "migrate", "--partitions", "5").count("; 0 entries moved") == 2  # once more changes nothing
    assert "only add" in site.refused("topics", "migrate", "--partitions", "3")
    assert sorted(row["id"] for row in json.loads(site.run("list", "--json"))) == sorted(ids)
    site.engine("two")
    for id in ids:
        for kind in ("car", "hotel", "flight")[id == paused :]:
            answer(site, id, asked[id][kind])
    site.run("unpause", paused)  # its hold has moved with it
    assert sorted(id for id, _ in site.read(site.topic("result"), len(ids))) == sorted(ids)
    site.until(lambda: not any(key.startswith(timers.DUE) for key in kafka_link.latest(config, f"{site.application}-timers-changelog")))  # the scheduler follows the engine
    stopped(site)
    site.environment["KWFLOW_STATE_DIR"] = str(site.directory / "two")
    assert "(0 timers)" in site.fails(1, "reset", typed="n\n"), "each was cancelled where it had moved to"


def test_what_has_moved_is_not_taken_for_deleted_because_it_was_where_it_had_been(site: Site) -> None:
    """An entry is what its own partition says of it; in which order partitions are read is chance."""
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
    stopped(site)
    site.environment["KWFLOW_STATE_DIR"] = str(site.directory / "one")
    refused = site.fails(1, "reset", typed="n\n")
    assert "state-changelog (3 instances)" in refused and "timers-changelog (3 timers)" in refused and "records that are there are skipped" in refused
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
    """K8: the new changelog has come as far as the old one was by then."""
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
