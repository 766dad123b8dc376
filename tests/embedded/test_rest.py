"""rest.call on the embedded engine as a process that is killed in the middle; the service and the gateway go on."""

import json
import pathlib
import signal
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest

from tests.embedded.shell import Shell
from tests.spec import rest_service
from tests.spec.rest_service import Answer, Asked, Service

MODULE = str(pathlib.Path(__file__).parent / "site_of_rest.py")
pytestmark = pytest.mark.slow


@pytest.fixture
def service() -> Iterator[Service]:
    with rest_service.service() as made:
        made.answers = {"/build": Answer({"id": 7}, 202), "/cancel": Answer({})}
        yield made


@pytest.fixture
def shell(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """With a receiver of callbacks, as the gateway is one, that does not belong to the engine."""
    shell = Shell(tmp_path / "state")

    def receive(asked: Asked) -> Answer:
        _, _, id, ref = asked.path.split("/")
        shell("resume", unquote(id), unquote(ref), "--value", asked.data.decode() or "null")
        return Answer(status=204)

    with rest_service.serving(receive) as base:
        monkeypatch.setenv("KWFLOW_GATEWAY_URL", base)
        yield shell
        shell.end()


def post(url: str, value: Any) -> None:
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"}), timeout=60).close()


def waits(shell: Shell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(shell("show", "w", "--json"))["waits"]
    return found


def killed(shell: Shell) -> None:
    engine = shell.engines[-1]
    engine.send_signal(signal.SIGKILL)
    engine.wait()


def test_a_callback_that_comes_after_a_kill_finds_the_workflow_waiting(shell: Shell, service: Service) -> None:
    """LR-12, LR-17, LR-21: the engine is killed while the job runs, and again after a heartbeat."""
    shell.engine(MODULE)
    shell("start", "w", "--workflow", "build", "--input", json.dumps(service.base))
    shell.until(lambda: service.asked and not any(wait["kind"] == "activity" for wait in waits(shell)))
    told = service.last("/build").body
    killed(shell)
    shell.engine(MODULE)
    post(told["heartBeatUrl"], None)
    killed(shell)
    shell.engine(MODULE)
    post(told["callbackUrl"], {"status": "SUCCESS", "revision": "r7"})
    shell.until(lambda: shell.records("workflow-result"))
    [line] = shell.records("workflow-result")
    assert json.loads(line.split(" ", 2)[2]) == {"response": {"status": "SUCCESS", "revision": "r7"}, "attempts": 1}
    assert service.paths() == ["/build"]


def test_a_request_that_was_under_way_is_sent_again_under_its_key_and_its_first_callback_counts(shell: Shell, service: Service) -> None:
    """LR-13, defect 5.3.8: at least once; the service knows it by its Idempotency-Key and its callback URL."""
    gone_on = threading.Event()

    def slow(asked: Asked) -> Answer:
        gone_on.wait(60)
        return Answer({"id": 7}, 202)

    service.answers["/build"] = slow
    shell.engine(MODULE)
    shell("start", "w", "--workflow", "build", "--input", json.dumps(service.base))
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
    shell.engine(MODULE)
    shell("start", "w", "--workflow", "build", "--input", json.dumps(service.base))
    shell.until(lambda: service.asked and not any(wait["kind"] == "activity" for wait in waits(shell)))
    shell("cancel", "w")
    shell.until(lambda: "/cancel" in service.paths())
    killed(shell)
    shell.engine(MODULE)
    post(service.last("/build").body["callbackUrl"], {"cancelled": True})
    shell.until(lambda: shell.records("workflow-error"))
    assert shell.records("workflow-result") == []
    assert service.last("/cancel").body == {"id": 7}
