"""Earlier states on a broker, encrypted: after kills, in another engine, from the shell, and in another partition (decision 0062)."""

import json
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from kwflow.client import Client
from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.runners.checkpoints import of_checkpoint
from kwflow.runners.kafka import link
from tests.integration.site import Site

pytestmark = [pytest.mark.broker, pytest.mark.slow]

KEYS = ["3" * 64]
SOURCE = """
import kwflow as kw


@kw.activity
def price(item: str) -> str:
    return f"{item} {kw.activity_info().idempotency_key.partition('|')[0]}"


@kw.workflow(checkpoints=20)
def order(item):
    said = [(yield price(item))]
    while len(said) < 4:
        said.append((yield kw.race([kw.wait_signal("said"), kw.sleep(86_400)])))
    return said
"""


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    (tmp_path / "past_flows.py").write_text(SOURCE)
    environment = {
        "KWFLOW_ENCRYPTION_KEYS": json.dumps(KEYS),
        "KWFLOW_SNAPSHOT_KEYS": json.dumps(["4" * 64]),
        "KWFLOW_REPLY_TOPIC": f"{application}-reply",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "KWFLOW_KAFKA": '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "log_level": 0}',
    }
    site = Site(broker, application, tmp_path, partitions=2, modules=("past_flows",), environment=environment)
    yield site
    site.end()


def config_of(site: Site) -> Config:
    named = {f"{name}_topic": site.topic(name) for name in ("resume", "result", "error", "scheduler", "reply")}
    return Config(bootstrap_servers=site.broker, application_id=site.application, encryption_keys=KEYS, **named)


def states(site: Site, id: str) -> list[tuple[int, list[str]]]:
    """The number of each earlier state, and what it waited for."""
    rows: list[dict[str, Any]] = json.loads(site.run("checkpoints", id, "--json"))
    return [(row["number"], [wait["kind"] for wait in row["waits"]]) for row in rows]


def test_an_instance_goes_back_over_a_kill_and_in_the_partition_that_it_has_moved_to(site: Site) -> None:
    """G1, K5: once, with its calls and its timer, by whichever engine has it then."""
    id = next(id for id in (f"{site.application}-{number}" for number in range(50)) if partition_of(id.encode(), 2) != partition_of(id.encode(), 5))
    engine = site.engine("one", "past_flows")
    with Client.kafka(config_of(site)) as client:
        client.start(id, "tea", workflow="order").result(60)
        site.until(lambda: "past_flows.py:14" in site.run("show", id))
        for value in ("a", "b"):
            client.signal(id, "said", value).result(60)
        assert states(site, id) == [(0, ["activity"]), (1, ["signal", "timer"]), (2, ["signal", "timer"])]
        assert "said = ['tea " in (seen := site.run("show", id, "--at", "2", "--locals")) and "'a']" in seen
        back = client.rewind(id, 2)
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        site.engine("two", "past_flows")
        back.result(60)
        client.signal(id, "said", "c").result(60)
        assert [number for number, _ in states(site, id)] == [0, 1, 2, 3, 4]
        copy = site.run("fork", id, "--at", "1").strip()
        for value in ("x", "y", "z"):
            client.signal(copy, "said", value).result(60)
        assert client.result(copy).result(60) == [f"tea {id}", "x", "y", "z"]
    for process in site.processes[1:]:
        process.terminate()
        assert process.wait(30) == 0
    site.run("topics", "migrate", "--partitions", "5")
    changelog, home = f"{site.application}-state-changelog", partition_of(id.encode(), 5)
    assert len([key for key in link.latest(config_of(site), changelog, home) if of_checkpoint(key) == id.encode()]) == 5
    site.engine("three", "past_flows")
    site.run("rewind", id, "--to", "0")
    site.until(lambda: "past_flows.py:14" in site.run("show", id))  # the call was made again
    assert [number for number, _ in states(site, id)] == list(range(7))
    site.run("rewind", id, "--to", "4")
    site.run("signal", id, "said", "--value", '"d"')
    assert "'c']" not in (seen := site.run("show", id, "--at", "4", "--locals")) and "'a']" in seen
    site.run("signal", id, "said", "--value", '"e"')
    assert json.loads(site.run("result", id)) == [f"tea {id}", "a", "d", "e"]
