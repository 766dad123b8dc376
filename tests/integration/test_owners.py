"""Who owns which partition, on a real broker: `show` and `list` ask the owner, and deaths are counted whoever died (K19)."""

import json
import pathlib
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from confluent_kafka import Producer

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.errors import TransportError
from kwflow.runners import outside
from kwflow.runners.instances import Filter
from kwflow.runners.kafka import link as kafka_link
from tests.integration.lab import Lab, stop, turn
from tests.integration.site import Site, refs

pytestmark = [pytest.mark.broker, pytest.mark.slow]

CHANGELOG = "read from the changelog"
DEADLY = """
import os, signal
import kwflow as kw

def main(opts):
    if opts == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return opts
    yield
"""


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path, partitions=2)
    yield site
    site.end()


def owned(site: Site, name: str) -> set[str]:
    return set(re.findall(rf"{site.application}: owns {site.topic('resume')}\[(\d)\]", (site.directory / f"{name}.log").read_text()))


def answered(site: Site, *command: str) -> str:
    """What a command prints once engines answer. A partition may be on its way to the other engine."""
    said: list[str] = []
    site.until(lambda: said.append(site.fails(0, *command)) or CHANGELOG not in said[-1])
    return said[-1]


def test_show_and_list_ask_the_engines_that_own_the_partitions_and_read_the_changelog_when_they_do_not_answer(site: Site) -> None:
    ids = [f"{site.application}-{number}" for number in range(6)]
    engines = [site.engine(name, "workflows.trip_booking", name == "one", "--http", "127.0.0.1:0") for name in ("one", "two")]
    for id in ids:
        site.send(id, 'new:{"timeout": 86400000}')
    refs(site, ids)
    site.until(lambda: owned(site, "two"))
    listed, shown = answered(site, "list", "--json"), answered(site, "show", ids[0], "--json")
    assert sorted(row["id"] for row in json.loads(listed)) == sorted(ids)
    config = Config(bootstrap_servers=site.broker, application_id=site.application, resume_topic=site.topic("resume"))
    found = outside.asked(config, None, Filter(status="waiting"), 4)
    assert (len(found.rows), found.counts) == (4, {"waiting": 6}), "what GET /workflows of a gateway gives"
    assert "no instance 'nobody'" in site.refused("show", "nobody")
    assert "kind = " in site.run("show", ids[0], "--locals"), "variables come from the changelog"
    for engine in engines:
        engine.send_signal(signal.SIGKILL)
        engine.wait()
    with pytest.raises(TransportError, match=r"does not answer at 127.0.0.1:.*engines started with --http list"):
        outside.asked(config, None, Filter(), 4)
    for said, before in ((site.fails(0, "list", "--json"), listed), (site.fails(0, "show", ids[0], "--json"), shown)):
        assert f"{CHANGELOG}: {site.application}-" in said and "does not answer at 127.0.0.1:" in said
        found = json.loads(next(line for line in said.splitlines() if line[0] in "[{"))
        assert found == json.loads(before), "word for word what the engines said"


def test_an_answer_counts_only_if_the_engine_that_is_named_gives_it(site: Site) -> None:
    id = f"{site.application}-w"
    site.engine("one", "workflows.trip_booking", True, "--http", "127.0.0.1:0")
    site.send(id, 'new:{"timeout": 86400000}')
    refs(site, [id])
    assert CHANGELOG not in site.fails(0, "list"), "one that owns both partitions is asked once"
    config = Config(bootstrap_servers=site.broker, application_id=site.application, resume_topic=site.topic("resume"))
    key = f"{site.topic('resume')}/{partition_of(id.encode(), 2)}".encode()
    owner = json.loads([record.value or b"" for record in kafka_link.read(config, config.owners_topic) if record.key == key][-1])
    producer = Producer({"bootstrap.servers": site.broker, "log_level": 0})
    for value, why in ((json.dumps({**owner, "engine": "another"}), f"{owner['engine']} answers at {owner['address']}, not another"), ("nonsense", "cannot be read"), (None, "no engine owns")):
        producer.produce(config.owners_topic, value, key)
        assert producer.flush(20) == 0
        said = site.fails(0, "show", id)
        assert f"{CHANGELOG}: " in said and why in said and "suspension" in said


@pytest.mark.parametrize(
    ("status", "partitions", "body", "why"),
    [(200, "0", b"[]", "partitions are moving from one engine to another"), (503, "0,1", b"[]", "answers 503"), (200, "0,1", b'[{"id":"w"}', "is incomplete")],
)
def test_a_list_counts_only_if_it_is_whole_and_of_all_partitions(site: Site, status: int, partitions: str, body: bytes, why: str) -> None:
    """While partitions move, nobody reports some of them. The changelog has all."""

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Kwflow-Engine", "moving")
            self.send_header("Kwflow-Partitions", partitions)
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        owner = json.dumps({"engine": "moving", "address": f"127.0.0.1:{server.server_port}", "since": 0})
        for number in range(2):
            site.producer.produce(f"{site.application}-owners", owner, f"{site.topic('resume')}/{number}")
        site.producer.produce(f"{site.application}-state-changelog", b"KWF?", "w")
        assert site.producer.flush(20) == 0
        said = site.fails(0, "list", "--json")
        server.shutdown()
    assert f"{CHANGELOG}: " in said and why in said and '"status":"damaged"' in said


def test_an_engine_without_http_is_named_and_one_that_ended_cleanly_owns_nothing(site: Site) -> None:
    engine = site.engine("one")
    site.send("w", 'new:{"timeout": 86400000}')
    refs(site, ["w"], once=False)
    assert "was started without --http" in site.fails(0, "show", "w")
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(30) == 0
    assert "no engine owns" in site.fails(0, "list")


def test_a_record_that_kills_two_engines_in_turn_ends_in_dead_letters(site: Site) -> None:
    """K19: with state directories of their own. Three times alone, after one batch that nobody suspected, and perhaps once among a few suspects."""
    site.environment["KWFLOW_KAFKA"] = '{"session.timeout.ms": 1500, "heartbeat.interval.ms": 300, "log_level": 0}'  # so that a dead engine leaves the group sooner
    module = site.directory / "deadly.py"
    module.write_text(DEADLY)
    site.send(site.application, 'new:"deadly"')
    site.send(f"{site.application}-other", "new:7")
    config = Config(bootstrap_servers=site.broker, application_id=site.application, resume_topic=site.topic("resume"))
    deaths = 0
    while not (letters := [record.key for record in kafka_link.read(config, config.dead_letter_topic)]):
        engine = site.engine(("one", "two")[deaths % 2], str(module), False)
        site.until(lambda engine=engine: engine.poll() is not None or any(kafka_link.read(config, config.dead_letter_topic)))  # type: ignore[misc]
        if engine.poll() is not None:
            assert engine.returncode == -signal.SIGKILL
            deaths += 1
    assert letters == [site.application.encode()]
    assert 4 <= deaths <= 5
    assert site.read(site.topic("result"), 1) == [(f"{site.application}-other", "7")]


class Died(BaseException):
    pass


class Dying:
    """A producer whose process dies at the commit or, once its outputs are sent, at this topic."""

    def __init__(self, producer: Producer, topic: str | None) -> None:
        self._producer = producer
        self._topic = topic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def produce(self, topic: str, *arguments: Any, **named: Any) -> None:
        if topic == self._topic:
            self._producer.flush(20)
            raise Died
        self._producer.produce(topic, *arguments, **named)

    def commit_transaction(self, _: float) -> None:
        raise Died


@pytest.mark.parametrize("outputs_only", [False, True], ids=["with its offsets", "outputs only"])
def test_a_transaction_that_its_dead_engine_left_open_is_ended_by_the_next_owner(lab: Lab, outputs_only: bool) -> None:
    """K1: on a real coordinator. With another identity the transaction would be open for fifteen seconds."""
    id = lab.base["application_id"]
    first = lab.engine("one")
    lab.send("resume", id, "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("resume", id, '{"ref": "r", "value": "once"}')
    first.transactions._producer = Dying(first.transactions._producer, first.processor.changelog_topic if outputs_only else None)  # type: ignore[assignment,arg-type]
    with pytest.raises(Died):
        turn(first, lambda: False)
    stop(first)
    second = lab.engine("two")
    turn(second, lambda: second.owned and second.owned[0].position == 2)
    turn(second, lambda: not second.takeover._leftovers.turn())
    assert lab.written("trap-out", id) == ["once"]
    assert second.takeover._fencing._next_s, "it was fenced, not waited for"
