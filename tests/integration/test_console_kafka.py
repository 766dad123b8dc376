"""The console on a real broker: rows from the engines, variables from the changelog, forms as commands (docs/CONSOLE.md)."""

import html
import json
import pathlib
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from kwflow.client import Client
from kwflow.config import Config
from kwflow.console.site import Site as Console
from tests.embedded.serving import console
from tests.integration.site import ROOT, Site, refs

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path, partitions=2)
    yield site
    site.end()


@pytest.fixture
def http(site: Site) -> Iterator[httpx.Client]:
    topics = {f"{name}_topic": site.topic(name) for name in ("resume", "result", "error", "scheduler")}
    config = Config(bootstrap_servers=site.broker, application_id=site.application, **topics)
    with console(Console(config, None, lambda: Client.kafka(config), ["--bootstrap-servers", site.broker], ROOT / "workflows")) as http:
        yield http


def said(http: httpx.Client, path: str) -> str:
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", answer.text)).split())


def test_rows_come_from_the_engines_and_from_the_changelog_when_they_do_not_answer_the_stack_from_the_changelog(site: Site, http: httpx.Client) -> None:
    ids = [f"{site.application}-{number}" for number in range(3)]
    engine = site.engine("one", "workflows.trip_booking", True, "--http", "127.0.0.1:0")
    for id in ids:
        site.send(id, 'new:{"timeout": 86400000}')
    refs(site, ids)
    site.until(lambda: "from the engines in" in said(http, "/"))
    page = said(http, f"/?workflow=trip_booking&id={ids[1]}")
    assert "Newest first: 1 to 1 of 1." in page and f"kwflow list --workflow trip_booking --id {ids[1]} --bootstrap-servers {site.broker}" in page
    looked = said(http, f"/instances/{ids[1]}")
    assert "waits here" in looked and "undo []" in looked and "deadline" in looked and "as the file here" in looked and "Its variables are not shown" not in looked
    assert http.post(f"/instances/{ids[1]}/pause", data={"reason": "audit"}).status_code == 303
    site.until(lambda: "Paused. audit" in said(http, f"/instances/{ids[1]}"))
    rows = json.loads(site.run("list", "--json"))
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    page = said(http, "/?status=paused")
    assert "from the changelog in" in page and "does not answer at 127.0.0.1:" in page and "paused 1" in page
    assert_an_older_engine_is_filtered(site, http, rows, ids[1])


def assert_an_older_engine_is_filtered(site: Site, http: httpx.Client, rows: list[dict[str, object]], paused: str) -> None:
    """An engine that knows neither filters nor limits returns all that it has."""

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in (("Kwflow-Engine", "older"), ("Kwflow-Partitions", "0,1")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(rows).encode())

    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        owner = json.dumps({"engine": "older", "address": f"127.0.0.1:{server.server_port}", "since": 0})
        for number in range(2):
            site.producer.produce(f"{site.application}-owners", owner, f"{site.topic('resume')}/{number}")
        assert site.producer.flush(20) == 0
        page = said(http, "/?status=paused")
        assert "from the engines in" in page and "Newest first: 1 to 1 of 1." in page and paused in page
        server.shutdown()
