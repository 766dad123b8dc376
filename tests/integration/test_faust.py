"""The same steps in a Faust agent (`kwflow engine --runner faust`): at least once, on a real broker."""

import contextlib
import importlib.util
import json
import pathlib
import re
import signal
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.integration.site import TRIP, Site, answer, refs

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("faust") is None, reason="NOT TESTED: faust-streaming is not installed (kwflow[faust])"),
]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    yield site
    site.end()


def test_sagas_go_on_after_kill_9_of_a_faust_engine_and_no_state_changes_twice(site: Site) -> None:
    """G6: outputs may appear twice, results do not change. `show` and `list` read the same changelog; bad records are dead letters."""
    ids = [f"{site.application}-{number}" for number in range(3)]
    engine = site.engine("one", TRIP, False, "--runner", "faust")
    site.send("bad", "{not json")
    site.send(ids[0], None)
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids, once=False)
    for id in ids:
        answer(site, id, asked[id]["car"])
    deadline = time.monotonic() + 60
    while any(f"suspension {asked[id]['car']} " in site.run("show", id) for id in ids):
        assert time.monotonic() < deadline, "the answers were not applied"
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    for id in ids:
        answer(site, id, asked[id]["hotel"])
    site.engine("one", TRIP, False, "--runner", "faust")
    for id in ids:
        answer(site, id, asked[id]["flight"])
    found: dict[str, set[str]] = {}
    seen = 0
    deadline = time.monotonic() + 90
    while len(found) < len(ids):
        assert time.monotonic() < deadline, found
        results = site.read(site.topic("result"), seen + 1, 90)
        seen = len(results)
        for id, value in results:
            found.setdefault(id, set()).add(value)
    assert {id: sorted(values) for id, values in found.items()} == {id: [json.dumps({kind: {"id": asked[id][kind]} for kind in ("car", "hotel", "flight")}, separators=(",", ":"))] for id in ids}
    assert {id for id, _ in site.read(f"{site.application}-dead-letter", 2)} == {"bad", ids[0]}


def test_a_faust_engine_refuses_what_it_cannot_do_and_says_what_to_do_instead(site: Site) -> None:
    faust = ("engine", TRIP, "--runner", "faust")
    for option in ("--with-scheduler", "--with-feeds"):
        assert "run `kwflow scheduler` and `kwflow feed` beside it" in site.refused(*faust, option)
    assert "leave out --embedded, --with-scheduler and --with-feeds" in site.refused(*faust, "--embedded", str(site.directory / "embedded"))
    assert "start as many workers as you like, each with its own --state-dir" in site.refused(*faust, "--processes", "2")
    settings = site.directory / "kwflow.toml"
    settings.write_text('[kafka]\n"security.protocol" = "SSL"\n')
    assert "pass it to kwflow.runners.faust.attach" in site.refused(*faust, "--config", str(settings))
    (site.directory / "faust.py").write_text("raise ImportError('not here')")
    site.environment["PYTHONPATH"] = str(site.directory)
    assert "pip install 'kwflow[faust]'" in site.refused(*faust)


WITH_ACTIVITY = """
import kwflow as kw

@kw.activity
def double(n):
    return 2 * n

def main(opts):
    return (yield double(opts))
"""


def log(site: Site) -> str:
    return (site.directory / "one.log").read_text()


def asked(site: Site, path: str) -> tuple[int, str]:
    """What the engine answers."""
    [port] = re.findall(r"answered on port (\d+)", log(site))[-1:]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_activities_run_beside_a_faust_agent_and_it_can_be_watched(site: Site) -> None:
    """M6: their results come back as records. Health and metrics are the same as those of the other runners."""
    module = site.directory / "doubling.py"
    module.write_text(WITH_ACTIVITY)
    site.engine("one", str(module), False, "--runner", "faust", "--http", "127.0.0.1:0")
    site.until(lambda: "answered on port" in log(site))
    site.until(lambda: asked(site, "/health/ready")[0] == 200)
    [seen] = json.loads(asked(site, "/health")[1])["runners"]
    assert (seen["name"], seen["owned"], seen["waiting"]) == ("faust", [0, 1, 2, 3], [])
    for number in range(3):
        site.send(f"{site.application}-{number}", f"new:{number}")
    assert {id[-1]: value for id, value in site.read(site.topic("result"), 3)} == {"0": "0", "1": "2", "2": "4"}
    site.until(lambda: 'kwflow_steps_total{outcome="resumed"} 3.0' in asked(site, "/metrics")[1])
    metrics = asked(site, "/metrics")[1]
    assert 'kwflow_records_total{outcome="started"} 3.0' in metrics
    assert re.search(r'kwflow_lag_records{partition="\d",topic="[^"]*-resume"} 0.0', metrics), metrics
    assert re.search(r"kwflow_commit_seconds_count [1-9]", metrics)
    assert asked(site, "/instances")[0] == 404, "kwflow list reads the changelog"
    assert asked(site, "/health/live")[0] == 200
    assert stat.S_IMODE((site.directory / "one" / site.application / "faust").stat().st_mode) == 0o700


VERSION = """
import sys
import kwflow as kw

print("loaded: VERSION", file=sys.stderr, flush=True)

def main(opts):
    answer = yield kw.suspend("go")
    return ["VERSION", answer]
"""


def test_old_code_that_instances_wait_in_is_loaded_before_the_first_record(site: Site) -> None:
    """Semantics §9.6: as soon as the table is restored, even if no record comes."""
    module = site.directory / "versions.py"
    module.write_text(VERSION.replace("VERSION", "first"))
    engine = site.engine("one", str(module), False, "--runner", "faust")
    site.send(f"{site.application}-w", "new:1")
    site.until(lambda: "-w " in site.run("list"))
    engine.send_signal(signal.SIGTERM)
    engine.wait()
    module.write_text(VERSION.replace("VERSION", "second"))
    site.engine("one", str(module), False, "--runner", "faust")
    site.until(lambda: log(site).count("loaded: first") == 2)
    site.send(f"{site.application}-w", '{"ref": "go", "value": 1}')
    assert site.read(site.topic("result"), 1) == [(f"{site.application}-w", '["first",1]')]


def read_again(site: Site) -> None:
    """Set the group back to the beginning, as a lost commit does with its last records. Refused as long as the group has a member."""
    admin, deadline = AdminClient({"bootstrap.servers": site.broker}), time.monotonic() + 60
    while True:
        places = [TopicPartition(site.topic("resume"), number, 0) for number in range(4)]
        [future] = admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(site.application, places)]).values()
        with contextlib.suppress(KafkaException):
            if all(place.error is None for place in future.result().topic_partitions):
                return
        assert time.monotonic() < deadline


def test_records_that_are_read_again_are_recognised_and_not_applied_twice(site: Site) -> None:
    """By the offset in the header of waiting instances and in what is kept of ended ones. Neither had a start id from a client."""
    module = site.directory / "versions.py"
    module.write_text(VERSION)
    engine = site.engine("one", str(module), False, "--runner", "faust")
    for id in ("waits", "ended"):
        site.send(id, "new:1")
    site.send("ended", '{"ref": "go", "value": 1}')
    assert [id for id, _ in site.read(site.topic("result"), 1)] == ["ended"]
    site.until(lambda: "waits " in site.run("list"))
    engine.send_signal(signal.SIGTERM)
    engine.wait()
    read_again(site)
    site.engine("one", str(module), False, "--runner", "faust", "--http", "127.0.0.1:0")
    site.until(lambda: "answered on port" in log(site) and 'outcome="repeated"} 3.0' in asked(site, "/metrics")[1])
    assert 'kwflow_steps_total{outcome="started"} 0.0' in asked(site, "/metrics")[1]


KEEPING = """
import kwflow as kw

def main(opts):
    kept = "x" * opts
    answer = yield kw.suspend("go")
    return [len(kept), answer]
"""


def test_what_the_broker_does_not_take_is_refused_and_the_engine_goes_on(site: Site) -> None:
    """K11: a dead letter, a state, and a reply to a partition that does not exist. The state was reported as written, and was not."""
    small = ConfigResource(ResourceType.TOPIC, f"{site.application}-state-changelog", incremental_configs=[ConfigEntry("max.message.bytes", "20000", incremental_operation=AlterConfigOpType.SET)])
    admin = AdminClient({"bootstrap.servers": site.broker})
    [future] = admin.incremental_alter_configs([small]).values()
    future.result()
    module = site.directory / "keeping.py"
    module.write_text(KEEPING)
    engine = site.engine("one", str(module), False, "--runner", "faust")
    site.send("large", "x" * 999_800)
    site.send("kept", "new:50000")
    site.producer.produce(site.topic("resume"), "null", "asks", headers={"kwflow-op": "query", "kwflow-request": "r", "kwflow-reply-to": "77/r"})
    for id in ("large", "kept", "asks", "good"):  # of each partition, the last
        site.send(id, "new:5")
        site.send(id, '{"ref": "go", "value": 1}')
    results = dict(site.read(site.topic("result"), 3))
    assert results == {id: "[5,1]" for id in ("large", "asks", "good")}
    assert engine.poll() is None
    assert "kept  parked" in site.run("list") or "RefusedError" in site.run("show", "kept")
    assert {("large", "null")} < set(site.read(f"{site.application}-dead-letter", 2))


def test_an_application_that_the_kafka_runner_ran_is_refused_by_name(site: Site) -> None:
    """Its changelog ends with a transaction marker, for which Faust would wait for ever. A reset recreates it."""
    engine = site.engine("kafka")
    site.send("trip-1", 'new:{"timeout": 600000}')
    refs(site, ["trip-1"])
    engine.terminate()
    assert engine.wait(60) == 0
    said = site.refused("engine", TRIP, "--runner", "faust", "--state-dir", str(site.directory / "faust"))
    assert f"{site.application}-state-changelog was written in transactions" in said and "kwflow reset first" in said
    site.run("reset", "--yes")
    site.engine("faust", TRIP, False, "--runner", "faust")
    site.send(f"{site.application}-2", 'new:{"timeout": 600000}')
    refs(site, [f"{site.application}-2"], once=False)
