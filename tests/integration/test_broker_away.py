"""A broker of its own that goes away under a running engine, and what the engine logs and answers meanwhile."""

import json
import pathlib
import urllib.request
from collections.abc import Iterator

import pytest

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import OutcomeUnknown, TransportError
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka import topics
from tests.integration.broker import Broker, can_start, free_port
from tests.integration.site import Site, refs

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def own(tmp_path: pathlib.Path) -> Iterator[Broker]:
    if not can_start():
        pytest.skip("NOT TESTED: no broker that may be killed (java with mvn)")
    broker = Broker(tmp_path / "kafka")
    broker.start()
    yield broker
    broker.kill()


def test_an_engine_tells_once_why_its_broker_is_away_stays_live_and_goes_on(own: Broker, application: str, tmp_path: pathlib.Path) -> None:
    """G6; section "Watching" of OPERATIONS: every line is JSON, and an outage is one line from each process.
    A process whose client does not come back from it ends with 3, and is started again.
    """
    site = Site(own.bootstrap, application, tmp_path)
    port = free_port(2)
    log = tmp_path / "one.log"

    def lines(about: str) -> list[dict[str, object]]:
        said = [line for line in log.read_text().splitlines() if "Assertion" not in line]  # an assertion in librdkafka may end a process then
        return [line for line in map(json.loads, said) if about in str(line["message"])]

    try:
        engine = site.engine("one", "workflows/trip_booking.py", True, "--log-format", "json", "--http", f"127.0.0.1:{port}", "--processes", "2")
        site.send("trip-1", 'new:{"timeout": 60000}')
        refs(site, ["trip-1"])
        site.until(lambda: {line["process"] for line in lines("kwflow engine runs on")} == {0, 1})  # one that begins later knows of no outage
        own.kill()
        site.until(lambda: lines("Connection refused"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=30) as answer:
            assert json.loads(answer.read()) == {"live": True}
        own.start()
        site.send("trip-2", 'new:{"timeout": 60000}')
        refs(site, ["trip-2"], once=False)
        assert engine.poll() is None and {line["level"] for line in lines("Kafka: ")} == {"warning"}
        told = [line["process"] for line in lines("Kafka: ") if "Connection refused" in str(line["message"])]
        assert set(told) == {0, 1} and len(told) <= 2 + len(lines("is started again")), log.read_text()
    finally:
        site.end()


def test_a_client_goes_on_after_its_broker_has_lost_what_it_had_taken_last(own: Broker, application: str, tmp_path: pathlib.Path) -> None:
    """Kafka does not sync: a power failure loses records that were acknowledged. The next record of the same idempotent producer is out of sequence, which is fatal for it."""
    config = Config(application_id=application, bootstrap_servers=own.bootstrap, state_dir=tmp_path)
    topics.create(topics.admin(config), config, [], 1, 1)
    log = own.directory / "log" / f"{config.resume_topic}-0" / "00000000000000000000.log"

    def sent() -> list[str]:
        return [(record.key or b"").decode() for record in kafka_link.read(config, config.resume_topic)]

    with Client.kafka(config) as client:
        sizes = []
        for number in range(3):
            client.signal(f"w{number}", "s")
            client._link._producer.flush()  # type: ignore[attr-defined]
            sizes.append(log.stat().st_size)
        own.kill()
        with open(log, "r+b") as last:
            last.truncate(sizes[1])
        for snapshot in log.parent.glob("*.snapshot"):
            snapshot.unlink()
        own.start()
        assert sent() == ["w0", "w1"]
        with pytest.raises(TransportError, match="sequence"):
            client.signal("w3", "s").result(60)
        client.signal("w4", "s")
        client._link._producer.flush()  # type: ignore[attr-defined]
        assert sent() == ["w0", "w1", "w4"]


def test_what_a_broker_may_take_yet_is_told_as_unknown_with_the_id_to_repeat_it_under(own: Broker, application: str, tmp_path: pathlib.Path) -> None:
    """M1.4: a frozen broker, or a leader whose followers are away, has the record and says nothing; who were told that it was not taken would send it again under another id."""
    config = Config(application_id=application, bootstrap_servers=own.bootstrap, state_dir=tmp_path, command_timeout_s=7)
    topics.create(topics.admin(config), config, [], 1, 1)
    with Client.kafka(config) as client:
        client.signal("warm", "s")
        client._link._producer.flush()  # type: ignore[attr-defined]
        own.freeze()
        try:
            with pytest.raises(OutcomeUnknown, match="Message timed out; it may or may not have been done: repeat it under the same id, mine") as unknown:
                client.signal("w", "s", command_id="mine").result(60)
        finally:
            own.thaw()
        assert unknown.value.command_id == "mine"
        sent = [record.key for record in kafka_link.read(config, config.resume_topic)]
        assert sent == [b"warm", b"w"]
