"""Three brokers that go away and come back one after the other: leaders and coordinators move under running engines (G1, G6, K4, K5)."""

import collections
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import NewTopic, OffsetSpec  # type: ignore[attr-defined]

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import OutcomeUnknown, TransportError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.environment import LIVE
from kwflow.runners.kafka.link import read
from kwflow.runners.kafka.member import offsets
from tests.integration.broker import Cluster, can_start
from tests.integration.site import ROOT

pytestmark = [pytest.mark.broker, pytest.mark.nightly, pytest.mark.timeout(1200)]
SOURCE = """
import kwflow as kw
kw.declare_topics("cluster-out")

@kw.activity
def square(n: int) -> int:
    return n * n

@kw.workflow
def chain(count):
    total = 0
    for n in range(count):
        total += yield square(n)
        kw.output(str(n), "cluster-out")
        yield kw.sleep(0.2)
    return total
"""
LINKS, ROUNDS = 10, 6


@pytest.fixture
def cluster(tmp_path: pathlib.Path) -> Iterator[Cluster]:
    if not can_start():
        pytest.skip("NOT TESTED: no brokers that may be killed (java with mvn)")
    cluster = Cluster(tmp_path / "kafka")
    cluster.start()
    yield cluster
    cluster.kill()


def test_a_partition_that_nobody_leads_has_no_offset_and_is_asked_for_again(cluster: Cluster) -> None:
    """K5: this is librdkafka's answer in the moment after the leader has gone. It would pass for an empty changelog."""
    [made] = cluster.admin.create_topics([NewTopic("lone", 3, replica_assignment=[[1], [2], [3]])]).values()
    made.result(30)
    config = Config(bootstrap_servers=cluster.bootstrap)
    begins = offsets(LIVE, config, topics.admin(config), "lone", range(3), OffsetSpec.latest())  # type: ignore[no-untyped-call]
    assert begins == {0: 0, 1: 0, 2: 0}
    cluster.nodes[1].kill()
    asked = cluster.admin.list_offsets({TopicPartition("lone", 1): OffsetSpec.latest()}, request_timeout=10)  # type: ignore[no-untyped-call]
    with pytest.raises(KafkaException) as refused:
        topics.offset_of(asked[TopicPartition("lone", 1)], 10)
    assert topics.transient(refused.value.args[0])
    cluster.nodes[1].start()
    assert offsets(LIVE, config, cluster.admin, "lone", range(3), OffsetSpec.latest()) == begins  # type: ignore[no-untyped-call]


def test_every_workflow_ends_and_every_output_is_there_once_while_brokers_go_and_come(cluster: Cluster, tmp_path: pathlib.Path) -> None:
    """An engine that ends with 3 is started again, as its supervisor does."""
    seed = int(os.environ.get("KWFLOW_SEED", str(random.randrange(1 << 30))))
    print("KWFLOW_SEED", seed)
    chance = random.Random(seed)
    module = tmp_path / "cluster_cases.py"
    module.write_text(SOURCE)
    environment = {**os.environ, "KWFLOW_BOOTSTRAP_SERVERS": cluster.bootstrap, "KWFLOW_APPLICATION_ID": "cluster"}
    config = Config(bootstrap_servers=cluster.bootstrap, application_id="cluster")
    command = [sys.executable, "-m", "kwflow"]
    subprocess.run([*command, "topics", "create", str(module), "--partitions", "6", "--replication", "3"], env=environment, cwd=ROOT, check=True, capture_output=True, timeout=120)

    def engine(name: str) -> "subprocess.Popen[bytes]":
        with open(tmp_path / f"{name}.log", "a") as log:
            return subprocess.Popen([*command, "engine", str(module), "--with-scheduler", "--state-dir", str(tmp_path / name), "--wait-for-broker", "60"], env=environment, cwd=ROOT, stderr=log)

    engines = {name: engine(name) for name in ("one", "two")}

    def look_after() -> None:
        for name, process in list(engines.items()):
            if process.poll() is not None:
                assert process.returncode in (3, -6), (tmp_path / f"{name}.log").read_text()[-3000:]
                engines[name] = engine(name)

    outcomes = {}
    try:
        with Client.kafka(config) as client:
            for _ in range(ROUNDS):
                node = chance.choice(cluster.nodes)
                (node.kill if chance.random() < 0.5 else node.stop)()
                back_at = time.monotonic() + chance.uniform(1, 8)
                while time.monotonic() < back_at:  # the moment of its return is the point of the test; nothing waits for this
                    outcomes[f"c{len(outcomes)}"] = client.start_and_wait(f"c{len(outcomes)}", LINKS, workflow="chain", start_id=f"s{len(outcomes)}", timeout=600)
                    look_after()
                    time.sleep(0.1)
                node.launch()
                cluster.settle()
            for number, (id, outcome) in enumerate(outcomes.items()):
                while True:
                    look_after()
                    try:
                        assert outcome.result(5) == sum(n * n for n in range(LINKS))
                        break
                    except (OutcomeUnknown, TransportError):
                        outcome = client.start_and_wait(id, LINKS, workflow="chain", start_id=f"s{number}", timeout=600)
                    except TimeoutError:
                        continue
        counts = collections.Counter((record.key, record.value) for record in read(config, "cluster-out"))
        assert counts == {(id.encode(), str(n).encode()): 1 for id in outcomes for n in range(LINKS)}
    finally:
        for process in engines.values():
            process.kill()
            process.wait()
