"""A broker of its own that goes away under a running engine, and what the engine says and answers meanwhile."""

import json
import pathlib
import urllib.request
from collections.abc import Iterator

import pytest

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
    """G6; section "Watching" of OPERATIONS: every line is JSON, and an outage is a line of each process.  One whose client does not come back from it ends with 3, and is started again."""
    site = Site(own.bootstrap, application, tmp_path)
    port = free_port(2)
    log = tmp_path / "one.log"

    def lines(about: str) -> list[dict[str, object]]:
        said = [line for line in log.read_text().splitlines() if "Assertion" not in line]  # librdkafka's own, of which a process may die then
        return [line for line in map(json.loads, said) if about in str(line["message"])]

    try:
        engine = site.engine("one", "workflows/trip_booking.py", True, "--log-format", "json", "--http", f"127.0.0.1:{port}", "--processes", "2")
        site.send("trip-1", 'new:{"timeout": 60000}')
        refs(site, ["trip-1"])
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
