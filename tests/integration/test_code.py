"""Two engines with different code, on a real broker: instances change hands in both directions, and none is parked (G10)."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient

from kwflow.config import Config
from kwflow.core.wire import Output
from kwflow.runners.kafka.code import CodeTopic
from kwflow.runners.kafka.writer import SoleWriter
from tests.integration.test_kafka_engine import Site, answer

pytestmark = [pytest.mark.broker, pytest.mark.slow]
TEXT = """import kwflow as kw
class Item:
    def __init__(self, name):
        self.name = name{more}
def main(opts):
    item = Item("{name}")
    kw.output("r", "{topic}")
    yield kw.suspend("r")
    yield kw.suspend("s")
    return item.name
kw.declare_topics("{topic}")
"""


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    for name, more in (("old", ""), ("new", "\n        self.price = 1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shop.py").write_text(TEXT.format(name=name, more=more, topic=site.topic("asked")))
    site.run("topics", "create", "shop", "--app-dir", str(tmp_path / "old"), "--partitions", "4")
    yield site
    for process in site.processes:
        process.kill()
        process.wait()


def engine(site: Site, code: str, name: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "kwflow", "engine", "shop", "--app-dir", str(site.directory / code), "--state-dir", str(site.directory / name)]
    process = subprocess.Popen(command, env=site.environment, cwd=pathlib.Path(__file__).parents[2], stderr=open(site.directory / f"{name}.log", "a"), text=True)
    site.processes.append(process)
    return process


def test_instances_of_either_code_finish_on_it_under_engines_of_the_other(site: Site) -> None:
    """G10, K7: old instances go to the new engine, then all go to an engine that runs the old code again.
    Beside a running engine, the commands say what a deployment would do.
    """
    old_ids = [f"{site.application}-a{number}" for number in range(8)]
    new_ids = [f"{site.application}-b{number}" for number in range(8)]
    first = engine(site, "old", "one")
    for id in old_ids:
        site.send(id, "new:null")
    site.read(site.topic("asked"), 8)
    said = site.run("engine", "--check", "shop", "--app-dir", str(site.directory / "new"))
    assert "8 waiting: 0 resume on this code, 8 stay on old code, 0 would be parked" in said
    assert "class shop.Item has changed since 8 of these instances were saved" in said
    assert "shop" in site.run("code", "list")
    assert "+        self.price = 1" in site.run("code", "diff", old_ids[0], "--app-dir", str(site.directory / "new"))
    assert "0 of 1 versions" in site.run("code", "gc")
    first.kill()
    second = engine(site, "new", "two")
    for id in new_ids:
        site.send(id, "new:null")
    for id in old_ids:
        answer(site, id, "r")
    site.read(site.topic("asked"), 16)
    third = engine(site, "old", "three")  # joins beside the new one: a rolling deployment, backwards
    for id in new_ids:
        answer(site, id, "r")
    for id in old_ids[:4]:
        answer(site, id, "s")
    site.read(site.topic("result"), 4)
    second.kill()
    for id in (*old_ids[4:], *new_ids):
        answer(site, id, "s")
    results = dict(site.read(site.topic("result"), 16))
    assert results == {id: '"old"' for id in old_ids} | {id: '"new"' for id in new_ids}
    assert third.poll() is None
    entries = site.read(f"{site.application}-code", 2)
    while len({key for key, _ in entries}) < 2:  # each partition writes the version that it names, so one key may come several times first
        entries = site.read(f"{site.application}-code", len(entries) + 1)
    assert json.loads(site.read(f"{site.application}-code", 1)[0][1])["file"] == "shop.py"


COUNTS = """import threading
import kwflow as kw
def main(opts):
    inbox, total = kw.signals("n"), 0
    while True:
        n = yield inbox
        if n is None:
            return total
        total += n
        {0}
"""


def test_a_bug_is_fixed_under_what_waits_and_a_kill_in_the_middle_changes_nothing(site: Site) -> None:
    """Decision 0061, K17: what a parked instance holds is more than one transaction applies; each record counts once."""
    for name, line in (("old", "lock = threading.Lock()"), ("new", "n = None")):
        (site.directory / name / "shop.py").write_text(COUNTS.format(line))
    first = engine(site, "old", "one")
    parked, waits = (f"{site.application}-{name}" for name in ("parked", "waits"))
    for id in (parked, waits):
        site.send(id, "new:null")
    for _ in range(700):
        site.producer.produce(site.topic("resume"), '{"name": "n", "value": 1}', parked, headers={"kwflow-op": b"signal"})
    assert site.producer.flush(20) == 0
    while {row["id"]: row["holds"] for row in json.loads(site.run("dead-letters", "list", "--json"))} != {parked: 700}:
        assert first.poll() is None
    site.until(lambda: waits in site.run("list", "--json"))
    first.kill()
    second = engine(site, "new", "two")
    assert site.run("code", "migrate", parked, waits, "--in-place", "--json").count('"status":"ok"') == 2
    second.kill()
    engine(site, "new", "three")
    for id in (parked, waits):
        for value in ("2", "null"):
            site.producer.produce(site.topic("resume"), f'{{"name": "n", "value": {value}}}', id, headers={"kwflow-op": b"signal"})
    assert site.producer.flush(20) == 0
    assert dict(site.read(site.topic("result"), 2)) == {parked: "702", waits: "2"}


def test_gc_removes_what_nobody_has_used_for_days(site: Site) -> None:
    """Wire §4."""
    for name, days in (("gone", 30), ("new", 1)):
        entry = json.dumps({"source": "", "file": "", "package": False, "imports": {}})
        site.producer.produce(f"{site.application}-code", entry, f"{name}@{'1' * 64}", timestamp=time.time_ns() // 1_000_000 - days * 86_400_000)
    assert site.producer.flush(20) == 0
    assert "removed gone@111111111111\n1 of 2 versions" in site.run("code", "gc")
    assert "0 of 1 versions" in site.run("code", "gc")


def test_the_code_topic_is_read_to_its_end_when_nothing_but_the_marker_of_a_transaction_is_left(site: Site) -> None:
    """G10: the look-up of a version that is not stored reads on behind the last entry, where no record shows how far it is."""
    config = Config(bootstrap_servers=site.broker, application_id=site.application)
    with SoleWriter(config, "code-test") as writer:
        writer.write([Output(config.code_topic, b"shop@0", b"{}")])
    topic = CodeTopic(config)
    assert [record.offset for record in topic.read(0)] == [0]
    assert topic.read(1) == []


def test_what_instances_wait_in_is_loaded_before_the_first_record_and_its_topics_must_be_there(site: Site) -> None:
    """Semantics §9.6, K12: a topic that only stored code declares is missing. It is named and created, and the engine starts."""
    only_old, loads = site.topic("only-old"), site.directory / "loads"
    text = (site.directory / "old" / "shop.py").read_text()
    (site.directory / "old" / "shop.py").write_text(f"{text}kw.declare_topics({only_old!r})\nopen({str(loads)!r}, 'a').write(__name__ + chr(10))\n")
    site.run("topics", "create", "shop", "--app-dir", str(site.directory / "old"))
    first = engine(site, "old", "one")
    site.send(f"{site.application}-w", "new:null")
    site.read(site.topic("asked"), 1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    admin = AdminClient({"bootstrap.servers": site.broker})
    admin.delete_topics([only_old])[only_old].result(30)
    loads.write_text("")
    second = engine(site, "new", "two")
    assert second.wait(60) != 0
    said = (site.directory / "two.log").read_text()
    assert f"topic {only_old} is missing: shop@" in said and "declares it, and instances of" in said
    assert f"topic {only_old} is missing" in site.fails(1, "topics", "check", "shop", "--app-dir", str(site.directory / "new"))
    assert f"created {only_old}" in site.run("topics", "create", "shop", "--app-dir", str(site.directory / "new"))
    loads.write_text("")
    engine(site, "new", "two")
    site.until(lambda: loads.read_text().startswith("shop@"))
    answer(site, f"{site.application}-w", "r")
    answer(site, f"{site.application}-w", "s")
    assert site.read(site.topic("result"), 1) == [(f"{site.application}-w", '"old"')]


CALLS = """import kwflow as kw
@kw.activity(name="work", queue="{queue}", timeout=600)
def work(n):
    with open({calls!r}, "a") as calls:
        calls.write(f"{{n}} ")
    return n + 1
def main(opts):
    found = []
    for n in opts:
        found.append((yield work(n)))
        {line}
    return found
"""


def test_calls_in_a_queue_are_answered_in_the_code_that_their_instances_were_moved_to_with_everything_encrypted_and_signed(site: Site) -> None:
    """M6.6, decision 0061: one waits while nobody works, one was parked by its result; each call is made once, and the source that is moved from is one that was encrypted and signed."""
    queue, calls = site.topic("queue"), site.directory / "calls"
    for name, line in (("old", "lock = __import__('threading').Lock() if n == 9 else None"), ("new", "found[-1] *= 100")):
        (site.directory / name / "shop.py").write_text(CALLS.format(queue=queue, calls=str(calls), line=line))
    site.environment |= {"KWFLOW_ENCRYPTION_KEYS": json.dumps(["1" * 32]), "KWFLOW_SNAPSHOT_KEYS": json.dumps(["2" * 32]), "KWFLOW_REPLY_TOPIC": site.topic("reply")}
    site.run("topics", "create", "shop", "--app-dir", str(site.directory / "old"))
    first = engine(site, "old", "one")
    parked, waits = (f"{site.application}-{name}" for name in ("parked", "waits"))
    site.run("start", parked, "--input", "[9, 2]")
    worker = site.started("worker.log", "worker", "shop", "--app-dir", str(site.directory / "old"), "--queue", queue)
    site.until(lambda: parked in site.run("dead-letters", "list", "--json"))
    worker.terminate()
    site.run("start", waits, "--input", "[1, 2]")
    site.until(lambda: waits in site.run("list", "--json"))
    first.terminate()
    engine(site, "new", "two")
    assert site.run("code", "migrate", parked, waits, "--in-place", "--json").count('"status":"ok"') == 2
    site.started("worker.log", "worker", "shop", "--app-dir", str(site.directory / "old"), "--queue", queue)
    for id, result in ((parked, [1000, 300]), (waits, [200, 300])):
        assert json.loads(site.run("result", id, "--timeout", "60")) == result
    assert sorted(calls.read_text().split()) == ["1", "2", "2", "9"]
