"""rest.call on an embedded engine that is a process and is killed in the middle, while the service and `kwflow gateway` go on."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.embedded.shell import ROOT, Shell
from tests.spec import rest_service
from tests.spec.rest_service import Answer, Asked, Service

MODULE = str(pathlib.Path(__file__).parent / "site_of_rest.py")
pytestmark = pytest.mark.slow


@pytest.fixture
def service() -> Iterator[Service]:
    with rest_service.service() as made:
        made.answers = {"/build": Answer({"id": 7}, 202), "/cancel": Answer({})}
        yield made


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@pytest.fixture
def shell(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """Engines are told the gateway's address before it runs."""
    monkeypatch.setenv("KWFLOW_GATEWAY_URL", f"http://127.0.0.1:{free_port()}")
    shell = Shell(tmp_path / "state")
    yield shell
    shell.end()


def begin(shell: Shell, base: str) -> None:
    """An engine, a gateway, and a workflow whose service is there."""
    shell.engine(MODULE)
    gateway = subprocess.Popen(shell.command("gateway", "--port", os.environ["KWFLOW_GATEWAY_URL"].rpartition(":")[2]), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    shell.engines.insert(0, gateway)
    assert gateway.stderr is not None and "listens on" in gateway.stderr.readline()
    shell("start", "w", "--workflow", "build", "--input", json.dumps(base))


def post(url: str, value: Any) -> int:
    """Sends a callback; returns its status."""
    return httpx.post(url, json=value, timeout=60, trust_env=False).status_code


def waits(shell: Shell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(shell("show", "w", "--json"))["waits"]
    return found


def killed(shell: Shell) -> None:
    engine = shell.engines[-1]
    engine.send_signal(signal.SIGKILL)
    engine.wait()


def test_a_callback_that_comes_after_a_kill_finds_the_workflow_waiting(shell: Shell, service: Service) -> None:
    """LR-12, LR-17, LR-21: the engine is killed while the job runs, and again after a heartbeat."""
    begin(shell, service.base)
    shell.until(lambda: service.asked and not any(wait["kind"] == "activity" for wait in waits(shell)))
    told = service.last("/build").body
    killed(shell)
    shell.engine(MODULE)
    assert post(told["heartBeatUrl"], None) == 204
    killed(shell)
    shell.engine(MODULE)
    assert post(told["callbackUrl"], {"status": "SUCCESS", "revision": "r7"}) == 204
    assert post(told["callbackUrl"], {"status": "SUCCESS", "revision": "r8"}) == 410
    shell.until(lambda: shell.records("workflow-result"))
    [line] = shell.records("workflow-result")
    assert json.loads(line.split(" ", 2)[2]) == {"response": {"status": "SUCCESS", "revision": "r7"}, "attempts": 1}
    assert service.paths() == ["/build"]


def test_a_request_that_was_under_way_is_sent_again_under_its_key_and_its_first_callback_counts(shell: Shell, service: Service) -> None:
    """LR-13, defect 5.3.8: at least once. The service recognises it by its Idempotency-Key and its callback URL."""
    gone_on = threading.Event()

    def slow(asked: Asked) -> Answer:
        gone_on.wait(60)
        return Answer({"id": 7}, 202)

    service.answers["/build"] = slow
    begin(shell, service.base)
    shell.until(lambda: len(service.asked) == 1)
    killed(shell)
    shell.engine(MODULE)
    shell.until(lambda: len(service.asked) == 2)
    gone_on.set()
    first, second = service.asked
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.body == second.body
    post(first.body["callbackUrl"], {"status": "SUCCESS"})
    shell.until(lambda: shell.records("workflow-result"))
    assert json.loads(shell.records("workflow-result")[0].split(" ", 2)[2])["attempts"] == 1


def test_a_cancel_procedure_goes_on_after_a_kill(shell: Shell, service: Service) -> None:
    """LR-16: the job is told to stop, the engine is killed, and the job's last word ends the wait."""
    begin(shell, service.base)
    shell.until(lambda: service.asked and not any(wait["kind"] == "activity" for wait in waits(shell)))
    shell("cancel", "w")
    shell.until(lambda: "/cancel" in service.paths())
    killed(shell)
    shell.engine(MODULE)
    post(service.last("/build").body["callbackUrl"], {"cancelled": True})
    shell.until(lambda: shell.records("workflow-error"))
    assert shell.records("workflow-result") == []
    assert service.last("/cancel").body == {"id": 7}
