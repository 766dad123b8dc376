"""rest.call on a real broker: the engine that sent the request is killed, and another one receives the callback."""

import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from tests.embedded.test_rest import free_port, post
from tests.integration.site import ROOT, Site
from tests.spec import rest_service
from tests.spec.rest_service import Answer

MODULE = str(pathlib.Path(__file__).parents[1] / "embedded/site_of_rest.py")
pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    """With a gateway."""
    site = Site(broker, application, tmp_path)
    port = free_port()
    site.environment["KWFLOW_GATEWAY_URL"] = f"http://127.0.0.1:{port}"
    gateway = subprocess.Popen([sys.executable, "-m", "kwflow", "gateway", "--port", str(port)], env=site.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    site.processes.append(gateway)
    assert gateway.stderr is not None and "listens on" in gateway.stderr.readline()
    yield site
    site.end()


def test_jobs_that_were_begun_by_a_killed_engine_call_back_to_its_heir(site: Site) -> None:
    """LR-12, LR-13, G6: each job is requested once, by its key, and each workflow gets the answer of its own job."""
    ids = [f"build/{n}" for n in range(8)]
    with rest_service.service() as service:
        service.answers["/build"] = Answer({"id": 7}, 202)
        first = site.engine("one", MODULE)
        for id in ids:
            site.producer.produce(site.topic("resume"), f"new:{json.dumps(service.base)}", id, headers=[("kwflow-workflow", b"build")])
        assert site.producer.flush(20) == 0
        site.until(lambda: len(service.asked) >= len(ids))
        first.send_signal(signal.SIGKILL)
        first.wait()
        site.engine("two", MODULE)
        told = {asked.headers["idempotency-key"]: asked.body for asked in service.asked}
        assert len(told) == len(ids)
        for body in told.values():
            assert 204 == post(body["callbackUrl"], {"status": "SUCCESS", "of": unquote(body["callbackUrl"].split("/")[4])})
        assert {id: json.loads(value)["response"]["of"] for id, value in site.read(site.topic("result"), len(ids))} == {id: id for id in ids}
        assert {asked.headers["idempotency-key"] for asked in service.asked} == set(told)
