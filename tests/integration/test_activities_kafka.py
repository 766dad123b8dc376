"""Activities on a real broker: engines killed in the middle, partitions that move, and an engine that stops (M6.5)."""

import json
import pathlib
import signal
from collections.abc import Iterator

import pytest

from tests.integration.test_kafka_engine import Site

MODULE = str(pathlib.Path(__file__).parents[1] / "embedded/site_of_activities.py")
pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    site.environment["ACTIVITIES_TEST_DIRECTORY"] = str(tmp_path)
    yield site
    for process in site.processes:
        process.kill()
        process.wait()


def ran(site: Site) -> list[str]:
    path = site.directory / "ran"
    return path.read_text().splitlines() if path.exists() else []


def start(site: Site, id: str, workflow: str, value: object) -> None:
    site.producer.produce(site.topic("resume"), f"new:{json.dumps(value)}", id, headers=[("kwflow-workflow", workflow.encode())])
    assert site.producer.flush(20) == 0


def results(site: Site, count: int) -> dict[str, object]:
    found = site.read(site.topic("result"), count)
    assert len({id for id, _ in found}) == len(found), "each result once"
    return {id: json.loads(value) for id, value in found}


def test_the_next_owner_begins_again_what_the_killed_engine_ran(site: Site) -> None:
    """M6.5, G6: it has a local copy the second time, and none the third."""
    ids = [f"w{n}" for n in range(6)]
    first = site.engine("one", MODULE)
    for id in ids:
        start(site, id, "fan_out", 3)
    site.until(lambda: len(ran(site)) == 18)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = site.engine("one", MODULE)
    site.until(lambda: len(ran(site)) == 36)
    second.send_signal(signal.SIGKILL)
    second.wait()
    (site.directory / "gate").touch()
    site.engine("two", MODULE)
    assert results(site, 6) == dict.fromkeys(ids, 5)
    lines = ran(site)
    assert {lines.count(line) for line in lines} == {3}, "the same call, the same attempt, the same key"


def test_chains_go_on_through_kills_and_rebalances(site: Site) -> None:
    """M6.5, G1: two engines share the partitions, and one after the other is killed."""
    (site.directory / "gate").touch()
    ids = [f"c{n}" for n in range(20)]
    engines = [site.engine("one", MODULE), site.engine("two", MODULE)]
    for id in ids:
        start(site, id, "chain", 10)
    for kill, name in enumerate(("one", "two"), 1):
        site.until(lambda kill=kill: len(ran(site)) >= kill * 50)
        engines[kill - 1].send_signal(signal.SIGKILL)
        engines[kill - 1].wait()
        site.engine(name, MODULE)
    assert results(site, 20) == dict.fromkeys(ids, 285)


def test_an_engine_that_is_asked_to_end_lets_activities_finish_and_nothing_runs_twice(site: Site) -> None:
    """M6.5: grace."""
    first = site.engine("one", MODULE)
    start(site, "w", "fan_out", 2)
    site.until(lambda: len(ran(site)) == 2)
    first.send_signal(signal.SIGTERM)
    (site.directory / "gate").touch()
    assert first.wait(30) == 0
    site.engine("two", MODULE)
    assert results(site, 1) == {"w": 1}
    assert len(ran(site)) == 2


def test_retries_and_time_outs_are_timers_of_the_scheduler(site: Site) -> None:
    """M6.4."""
    site.engine("one", MODULE)
    start(site, "w", "bad", None)
    assert results(site, 1) == {"w": ["SystemExit", "Timeout", 1]}
    assert ran(site).count("flaky 1") == 3


def test_a_schedule_runs_on_kafka_and_goes_on_after_a_kill(site: Site) -> None:
    """The commands are the same, and no time of the schedule runs twice."""
    (site.directory / "gate").touch()
    first = site.engine("one", MODULE)
    site.run("schedule", "add", "squares", "--every", "1s", "--workflow", "chain", "--input", "2", "--overlap", "allow")
    site.read(site.topic("result"), 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    site.engine("one", MODULE)
    found = site.read(site.topic("result"), len(site.read(site.topic("result"), 2)) + 3)
    assert len({id for id, _ in found}) == len(found)
    assert all(id.startswith("squares@") and value == "1" for id, value in found)
    [listed] = json.loads(site.run("schedule", "list", "--json"))
    assert (listed["name"], listed["plan"]["every_ms"]) == ("squares", 1000)
