"""The trip saga on a real broker, the engine as a process through its command line (T-KW-2..5, G1, G2, G6, K5, K6)."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from tests.integration.site import ROOT, SHOP, TRIP, Site, answer, refs
from tests.spec.trips import TRIPS, Trip

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    yield site
    site.end()


def test_many_sagas_survive_kill_9_and_a_deleted_state_directory(site: Site) -> None:
    """G1, G6, KW-9, KW-15, K5, K6: four partitions, a producer with default settings, bad records in between."""
    ids = [f"{site.application}-{number}" for number in range(12)]
    engine = site.engine()
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    site.send(ids[0], "{not json")
    site.send(None, "{}")
    asked = refs(site, ids)
    for id in ids:
        answer(site, id, asked[id]["car"])
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    shutil.rmtree(site.directory / "one")
    for id in ids:
        answer(site, id, asked[id]["hotel"])
    site.engine("two")
    for id in ids:
        answer(site, id, asked[id]["flight"])
    results = site.read(site.topic("result"), len(ids))
    assert sorted(key for key, _ in results) == sorted(ids)
    for id, value in results:
        assert all(f'"{asked[id][kind]}"' in value for kind in ("car", "hotel", "flight"))
    assert len(site.read(f"{site.application}-dead-letter", 2)) == 2


def test_a_second_engine_takes_over_and_sigterm_ends_with_0(site: Site) -> None:
    """G6, K7."""
    ids = [f"{site.application}-{number}" for number in range(4)]
    first = site.engine("one")
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids)
    site.engine("two")
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    for id in ids:
        for kind in ("hotel", "car", "flight"):
            answer(site, id, asked[id][kind])
    site.read(site.topic("result"), len(ids))
    site.send(ids[0], '{"ref": "nobody"}')  # one more committed step on each engine before the last look
    assert sorted(id for id, _ in site.read(site.topic("result"), len(ids))) == sorted(ids)


STOPPED = """
import pathlib, sys, time
from kwflow.config import load_config
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.timers import TimerProcessor

for number in range(40):
    config = load_config(state_dir=pathlib.Path(sys.argv[1]))
    runner = KafkaRunner(config, lambda _: TimerProcessor(config), config.timers_group, lambda _: None)
    time.sleep(number % 8 * 0.03)  # at which moment of its joining it is asked to end is the point of the test
    runner.run(lambda: True) if number % 2 else runner.close()
"""


def test_an_engine_that_is_asked_to_end_while_it_joins_its_group_ends(site: Site) -> None:
    """K7: in its own process, because librdkafka would hold it with Python's lock, so that no thread and no signal handler got its turn."""
    subprocess.run([sys.executable, "-c", STOPPED, str(site.directory / "one")], env=site.environment, cwd=ROOT, timeout=120, check=True)


LEAVES_A_CONSUMER = """
import os
from confluent_kafka import Consumer, KafkaException
from confluent_kafka.admin import AdminClient

group, where = os.environ["KWFLOW_APPLICATION_ID"] + "-mine", {"bootstrap.servers": os.environ["KWFLOW_BOOTSTRAP_SERVERS"], "log_level": 0}
mine, admin = Consumer({**where, "group.id": group, "partition.assignment.strategy": "cooperative-sticky"}), AdminClient(where)
mine.subscribe([os.environ["KWFLOW_RESUME_TOPIC"]])

def joined():
    try:
        return any(member.assignment.topic_partitions for member in admin.describe_consumer_groups([group])[group].result().members)
    except KafkaException:
        return False

while not joined():
    pass

def main(opts):
    yield
"""


def test_a_process_ends_although_somebody_has_left_a_client_in_it_that_never_would(site: Site) -> None:
    """G10: a consumer that has joined and is no longer polled is waited for, for ever. An engine whose scheduler could not start had such a consumer, reported its end, and stayed."""
    module = site.directory / "leaves_a_consumer.py"
    module.write_text(LEAVES_A_CONSUMER)
    site.fails(0, "topics", "create", str(module))


def test_a_timer_fires_on_kafka_and_the_saga_is_undone(site: Site) -> None:
    """SC-1, T-KW-5."""
    site.engine()
    site.send(f"{site.application}-t", 'new:{"timeout": 1500}')
    assert site.read(site.topic("error"), 1)[0] == (f"{site.application}-t", '"timeout"')


def test_what_happened_to_an_id_is_told_from_its_partition(site: Site) -> None:
    """Decision 0059: events are in the transactions of the steps, and survive kill -9."""
    assert "no history is kept" in site.refused("history", "w")
    site.environment["KWFLOW_HISTORY_TOPIC"] = site.topic("history")
    assert site.topic("history") in site.fails(1, "engine", TRIP)
    site.run("topics", "create", TRIP, "--partitions", "4")
    engine = site.engine()
    ids = [f"{site.application}-{number}" for number in range(6)]
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    for id in ids:
        for kind in ("car", "hotel", "flight"):
            answer(site, id, asked[id][kind])
    site.engine("two")
    site.read(site.topic("result"), len(ids))
    for id in ids:
        events = json.loads(site.run("history", id, "--json"))
        assert [event["event"] for event in events] == ["started", "resumed", "resumed", "resumed"] and events[-1]["outcome"] == {"kind": "result"}
        assert {event["by"].get("ref") for event in events[1:]} == set(asked[id].values())
    assert "ended: result" in site.run("history", ids[0])
    told = site.fails(0, "history", "nobody")
    assert told.strip() == f"{site.topic('history')} has no events of nobody: it never ran, none were kept then, or they have been deleted"


def test_a_frozen_engine_whose_partitions_moved_writes_nothing_when_it_wakes(site: Site) -> None:
    """K2, K7, G6: trap 1, frozen."""
    ids = [f"{site.application}-{number}" for number in range(4)]
    first = site.engine("one")
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids)
    first.send_signal(signal.SIGSTOP)
    for id in ids:
        answer(site, id, asked[id]["car"])
    site.engine("two")
    for id in ids:
        answer(site, id, asked[id]["hotel"])
        answer(site, id, asked[id]["flight"])
    site.read(site.topic("result"), len(ids))
    first.send_signal(signal.SIGCONT)
    late = f"{site.application}-late"
    site.send(late, 'new:{"timeout": 1}')  # ends in an error record, which is written by the present owner of its partition
    site.read(site.topic("error"), 1)
    assert sorted(id for id, _ in site.read(site.topic("result"), len(ids))) == sorted(ids)


LARGE = """
import kwflow as kw
kw.declare_topics("saga-reserve-car")

def main(opts):
    kw.output("small", "saga-reserve-car")
    kw.output("x" * opts["bytes"], "saga-reserve-car")
    return opts["bytes"]
    yield
"""


GROWS = """
import kwflow as kw

def main(o):
    more = yield kw.suspend("more")
    yield kw.suspend("end")
    return len(o + more)
"""


def test_a_full_disk_ends_the_engine_with_its_reason_and_with_room_again_all_goes_on(site: Site) -> None:
    """G1, K8, K19: exit code 3, start me again. What the disk did not take is in the changelog."""
    grows = site.directory / "grows.py"
    grows.write_text(GROWS)
    engine = site.engine(module=str(grows))
    id = f"{site.application}-w"
    site.send(id, f'new:"{"x" * 100_000}"')
    site.until(lambda: "waiting" in site.run("list"))
    resource.prlimit(engine.pid, resource.RLIMIT_FSIZE, (150_000, 150_000))
    site.send(id, f'{{"ref": "more", "value": "{"x" * 100_000}"}}')
    assert engine.wait(60) == 3
    said = (site.directory / "one.log").read_text()
    assert f"{site.directory / 'one'}" in said and "cannot be used: IO error" in said and "File too large" in said
    assert "a bug of" not in said
    site.engine(module=str(grows))
    site.send(id, '{"ref": "end", "value": null}')
    assert site.read(site.topic("result"), 1) == [(id, "200000")]


def test_an_output_larger_than_the_broker_takes_parks_its_instance_and_no_innocent_one(site: Site) -> None:
    """K11, K15, G4: traps 3 and 4."""
    module = site.directory / "large.py"
    module.write_text(LARGE)
    site.environment["KWFLOW_VALUE_BYTES_MAX"] = "4000000"  # the topic accepts less than the workflow may write
    ids = [f"{site.application}-{number}" for number in range(9)]
    for number, id in enumerate(ids):
        site.send(id, f'new:{{"bytes": {3_000_000 if number == 4 else 10}}}')
    site.engine("one", str(module))
    results = site.read(site.topic("result"), len(ids) - 1)
    assert sorted(id for id, _ in results) == sorted(set(ids) - {ids[4]})
    assert site.read(f"{site.application}-dead-letter", 1)[0][0] == ids[4]
    mine = [id for id, value in site.read("saga-reserve-car", 2 * len(ids) - 2) if id == ids[4]]
    assert mine == [], "nothing of the refused step is visible"
    site.send(ids[4], '{"ref": "held"}')
    again = f"{site.application}-after"
    site.send(again, 'new:{"bytes": 10}')
    assert again in {id for id, _ in site.read(site.topic("result"), len(ids))}


@pytest.fixture
def single(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    """One partition, so that offsets, and with them refs, are known beforehand."""
    site = Site(broker, application, tmp_path, partitions=1)
    yield site
    site.end()


@pytest.mark.parametrize("case", TRIPS, ids=lambda case: case.name)
def test_a_saga_of_the_reference_ends_as_it_should_on_a_broker(single: Site, case: Trip) -> None:
    """T-KW-2..5: no scheduler runs, and the test gives the timer's answer."""
    id = single.application
    single.send(id, "new:" + json.dumps(case.options))
    for ref, failed in case.answers:
        single.send(id, json.dumps({"ref": ref, **({"error": failed} if failed else {"value": "ok"})}))
    single.send(id, '{"ref": "nope"}')
    single.engine(scheduler=False)
    topic, value = ("result", case.result) if case.error is None else ("error", case.error)
    assert [(key, json.loads(text)) for key, text in single.read(single.topic(topic), 1)] == [(id, value)]
    for kind in case.cancelled:
        seen: list[tuple[str, str]] = []
        while id not in dict(seen):
            seen = single.read(f"saga-cancel-{kind}", len(seen) + 1)
        assert [text for key, text in seen if key == id] == [case.cancelled[kind]]
    timers = dict(single.read(single.topic("scheduler"), 1))
    assert timers[f'{id}|{{"ref":"0:4"}}'] in ("1000", "0")


def test_a_cart_is_filled_and_checked_out_on_a_broker(single: Site) -> None:
    """T-KW-1: refs of timers are offsets of records, results and state as in the reference."""
    one, two = f"{single.application}-1", f"{single.application}-2"

    def say(id: str, **message: object) -> None:
        single.send(id, json.dumps({"ref": "main", "value": message}))

    single.send(one, 'new:{"abandonedCartTimeoutMS":2000}')
    say(one, type="updateEmail", email="someone@example.com")
    say(one, type="addToCart", quantity=10, productId="teapot")
    single.send(two, 'new:{"abandonedCartTimeoutMS":1000}')
    say(two, type="updateEmail", email="vitaliy.akimov@gmail.com")
    single.engine(module=SHOP, scheduler=False)
    for message in (
        {"type": "addToCart", "quantity": 11, "productId": "sigar"},
        {"type": "addToCart", "quantity": 20, "productId": "teapot"},
        {"type": "updateEmail", "email": "vitaliy.akimov@gmail.com"},
        {"type": "removeFromCart", "quantity": 11, "productId": "sigar"},
        {"type": "addToCart", "quantity": 2, "productId": "sugar"},
        {"type": "checkout"},
    ):
        say(one, **message)
    cart = '{"items":[{"quantity":30,"productId":"teapot"},{"quantity":2,"productId":"sugar"}],"email":"vitaliy.akimov@gmail.com"}'
    assert single.read(single.topic("result"), 1) == [(one, cart)]
    timers = single.read(single.topic("scheduler"), 3)
    assert timers[:3] == [(f'{one}|{{"ref":"0:1"}}', "2000"), (f'{one}|{{"ref":"1:1"}}', "2000"), (f'{one}|{{"ref":"0:1"}}', "0")]
    assert timers[-1] == (f'{one}|{{"ref":"9:1"}}', "0")
    assert f"no instance '{one}'" in single.refused("show", one)
    assert "suspension main" in single.run("show", two)
    assert two in single.run("list")


def test_dead_letters_on_a_broker_are_listed_shown_and_closed(single: Site) -> None:
    """G3."""
    single.send(single.application, "{not json")
    single.engine(scheduler=False)
    single.read(f"{single.application}-dead-letter", 1)
    assert "bad-json" in single.run("dead-letters", "list")
    assert "{not json" in single.run("dead-letters", "show", "0:0")
    single.run("dead-letters", "discard", "0:0")
    assert "bad-json" not in single.run("dead-letters", "list")


def test_missing_or_wrong_topics_stop_the_engine_with_one_line(broker: str, application: str, tmp_path: pathlib.Path) -> None:
    """K12."""
    admin = AdminClient({"bootstrap.servers": broker, "log_level": 0})

    def started(*more: str) -> str:
        command = [sys.executable, "-m", "kwflow", "engine", TRIP, "--bootstrap-servers", broker, "--application-id", application, "--state-dir", str(tmp_path), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "KWFLOW_RESUME_TOPIC": f"{application}-resume"})
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert f"topic {application}-resume is missing" in started("--wait-for-broker", "0.6")
    start = [sys.executable, "-m", "kwflow", "start", "w", "--bootstrap-servers", broker]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "KWFLOW_RESUME_TOPIC": f"{application}-resume"})
    assert f"did not accept the record for {application}-resume: Broker: Unknown topic" in done.stderr, done.stderr
    wrong = NewTopic(f"{application}-state-changelog", 3, 1, config={"cleanup.policy": "delete"})
    compact = NewTopic(f"{application}-resume", 2, 1, config={"cleanup.policy": "compact,delete"})
    for future in admin.create_topics([compact, wrong]).values():
        future.result()
    said = started()
    assert f"topic {application}-resume has cleanup.policy=compact,delete; it must be delete" in said
    assert f"topic {application}-state-changelog has 3 partitions, its input {application}-resume has 2" in said
    assert "must be compact only" in said
