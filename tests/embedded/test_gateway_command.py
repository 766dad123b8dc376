"""`kwflow gateway` as a process, on an engine in another process: how it begins, ends, and is killed."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.embedded.shell import ROOT, Shell

pytestmark = pytest.mark.slow
SOURCE = """
import kwflow as kw

def main(o):
    return (yield kw.suspend("answer"))
"""


class Gateways:
    """Gateway processes, each with a client of it."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.stack = contextlib.ExitStack()

    def start(self, *options: str, **environment: str) -> "tuple[subprocess.Popen[str], httpx.Client, str]":
        """Returns what it prints when it begins, too."""
        command = self.shell.command("gateway", "--port", "0", *options)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment})
        self.shell.engines.append(process)
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"listens on http://(?:0\.0\.0\.0|127\.0\.0\.1):(\d+)", said)
        assert found is not None, said + process.stderr.read()
        http = self.stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=30, trust_env=False))
        return process, http, said


@pytest.fixture
def gateways(shell: Shell, tmp_path: pathlib.Path) -> Iterator[Gateways]:
    module = tmp_path / "flows.py"
    module.write_text(SOURCE)
    shell.engine(str(module))
    gateways = Gateways(shell)
    yield gateways
    gateways.stack.close()


def asking(http: httpx.Client, path: str) -> tuple[threading.Thread, list[Any]]:
    """A caller that waits for an outcome and puts it into the list."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(http.post(path))
        except httpx.HTTPError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, found


def test_callers_of_a_gateway_that_was_killed_have_their_outcome_from_another(gateways: Gateways) -> None:
    """A4, A5: SIGKILL while they wait. They repeat their request under the same key."""
    one, http, _ = gateways.start()
    callers = [asking(http, f"/workflows/w{n}?start_id=s{n}&wait=60") for n in range(5)]
    gateways.shell.until(lambda: all(http.get(f"/workflows/w{n}").status_code == 200 for n in range(5)))
    one.kill()
    one.wait()
    for thread, found in callers:
        thread.join(30)
        assert isinstance(found[0], httpx.HTTPError)
    _, other, _ = gateways.start()
    again = [asking(other, f"/workflows/w{n}?start_id=s{n}&wait=60") for n in range(5)]
    for n in range(5):
        assert other.post(f"/workflows/w{n}/refs/answer", json=n).status_code == 204
    for n, (thread, found) in enumerate(again):
        thread.join(30)
        assert (found[0].status_code, found[0].json()["value"]) == (200, n)


def test_sigterm_answers_who_waits_and_ends_with_0(gateways: Gateways) -> None:
    process, http, said = gateways.start("--log-format", "json")
    thread, found = asking(http, "/workflows/w?wait=60")
    gateways.shell.until(lambda: http.get("/health").json()["waiting"] == 1 and http.get("/workflows/w").status_code == 200)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    thread.join(30)
    assert (found[0].status_code, found[0].headers["location"].startswith("/workflows/w/outcome?start_id=")) == (202, True)
    assert process.stderr is not None
    lines = [json.loads(line) for line in (said, *process.stderr.read().splitlines())]
    assert [line["message"] for line in lines[1:]] == ["everybody who can reach the gateway may do everything: set gateway_tokens to require a token"]


def test_with_tokens_it_listens_on_every_address_and_without_on_this_machine_s(gateways: Gateways) -> None:
    token = "t" * 32
    for environment, address, status in (({}, "127.0.0.1", 404), ({"KWFLOW_GATEWAY_TOKENS": f'["{token}"]'}, "0.0.0.0", 401)):
        _, http, said = gateways.start(**environment)
        assert address in said
        assert http.get("/workflows/w").status_code == status
        assert http.get("/workflows/w", headers={"Authorization": f"Bearer {token}"}).status_code == 404


def test_without_the_extra_it_says_what_to_install() -> None:
    for module in ("starlette", "uvicorn"):
        code = f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = ['gateway']; from kwflow.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (2, f"kwflow: kwflow gateway needs {module}: pip install 'kwflow[gateway]'\n")


def test_an_address_that_is_taken_is_wrong_usage(gateways: Gateways) -> None:
    _, http, _ = gateways.start()
    said = gateways.shell("gateway", "--port", str(http.base_url.port), code=2)
    assert f"--host 127.0.0.1 --port {http.base_url.port}: " in said and "Address already in use" in said
