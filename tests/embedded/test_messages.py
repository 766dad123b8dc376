"""The commands that talk to workflows, as a user types them, and a client whose engine is killed (M1-M4)."""

import json
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kwflow.client import Client
from kwflow.config import Config
from tests.embedded.shell import Shell

pytestmark = pytest.mark.slow
SOURCE = """
import kwflow as kw

def main(o):
    kw.set_status({"step": "asked"})
    return (yield kw.suspend("answer"))

@kw.workflow
def prices(o):
    updates, stop = kw.on_update("price", check), kw.signals("stop")
    while True:
        found = yield kw.race({"update": updates, "stop": stop})
        if found[0] == "stop":
            return found[1]
        kw.reply(found[1], {"was": found[1].value})

def check(value):
    if value < 0:
        raise ValueError("negative")

@kw.workflow
def parent(o):
    kw.set_status("with a child")
    return (yield kw.all([kw.start_child(prices, id="kid"), kw.sleep(3600), kw.wait_signal("never")]))
"""


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "state")
    (tmp_path / "talk.py").write_text(SOURCE)
    shell.engine(str(tmp_path / "talk.py"))
    yield shell
    shell.end()


def asked(shell: Shell, *arguments: str, code: int = 0) -> Any:
    return json.loads(shell(*arguments, "--json", code=code))


def test_signals_updates_and_queries_on_the_command_line(shell: Shell) -> None:
    shell("start", "p", "--workflow", "prices")
    assert asked(shell, "update", "p", "price", "--value", "5") == {"id": "p", "status": "ok", "value": {"was": 5}}
    assert shell("update", "p", "price", "--value", "6").strip() == '{"was":6}'
    assert "p: rejected: ValueError: negative" in shell("update", "p", "price", "--value", "-1", code=1)
    assert asked(shell, "update", "p", "colour", code=1)["status"] == "rejected"
    assert asked(shell, "query", "p")["workflow"] == "prices"
    assert shell("signal", "p", "stop", "--value", '"enough"') == ""
    assert shell("result", "p", "--timeout", "20").strip() == '"enough"'
    assert asked(shell, "signal", "p", "stop", code=1) == {"id": "p", "status": "not_found", "message": "it has ended"}
    assert asked(shell, "signal", "new", "stop", "--value", "1", "--start", "--workflow", "prices", "--ttl", "60") == {"id": "new", "status": "delivered"}
    assert asked(shell, "result", "new") == {"id": "new", "outcome": "result", "value": 1}
    assert "not JSON" in shell("signal", "p", "stop", "--value", "{", code=2)


def test_start_and_wait_and_every_outcome_has_its_exit_code(shell: Shell) -> None:
    assert "has not ended within 0.3 s; it is still running" in shell("start", "w", "--wait", "--timeout", "0.3", code=1)
    assert shell("query", "w").splitlines() == ["w  talk  waiting", '{"step":"asked"}']
    shell("resume", "w", "answer", "--value", "7")
    assert shell("result", "w").strip() == "7"
    assert "w  talk  ended  result: 7" in shell("query", "w")
    for op, said in (("cancel", "cancelled"), ("terminate", "terminated")):
        shell("start", op)
        assert asked(shell, op, op, "--reason", "why") == {"id": op, "status": "ok"}
        assert said in shell("result", op, code=1)
        assert asked(shell, "result", op, code=1)["outcome"] == said
    assert asked(shell, "start", "w", "--wait", "--workflow", "nothing", code=1)["status"] == "unknown_workflow"


def test_pause_and_unpause_on_the_command_line(shell: Shell) -> None:
    shell("start", "w")
    shell("pause", "w", "--reason", "audit")
    shell("resume", "w", "answer", "--value", "1")
    assert "paused: audit" in shell("show", "w")
    assert [row["id"] for row in asked(shell, "list", "--status", "paused")] == ["w"]
    assert asked(shell, "unpause", "w") == {"id": "w", "status": "ok"}
    assert shell("result", "w").strip() == "1"


def test_fork_on_the_command_line(shell: Shell) -> None:
    shell("start", "w", "--start-id", "first")
    assert shell("fork", "w", "copy").strip() == "copy"
    made = asked(shell, "fork", "w")
    assert made["id"].startswith("w/fork-")
    assert f"run {made['start_id']}, a fork of w" in shell("show", made["id"])
    shell("resume", "copy", "answer", "--value", "5")
    assert (shell("result", "copy").strip(), asked(shell, "fork", "copy", code=1)["status"], asked(shell, "fork", "w", "w", code=1)["status"]) == ("5", "not_found", "exists")
    shell("start", "dad", "--workflow", "parent")
    assert "dad: rejected: it waits for its child kid" in shell("fork", "dad", code=1)


def test_show_has_children_timers_signals_and_mailbox(shell: Shell) -> None:
    shell("start", "dad", "--workflow", "parent", "--start-id", "run-1")
    asked(shell, "signal", "dad", "other", "--value", "1")
    shown = shell("show", "dad")
    for part in ("dad  parent  waiting", "run run-1", "status 'with a child'", "unread signals: 1 other", "child 0:1  kid (prices)  parent  talk.py:", "timer 0:2", "signal 0:3  never"):
        assert part in shown, shown
    assert "child of dad" in shell("show", "kid")
    header = asked(shell, "show", "dad", "--locals")
    assert [(wait["kind"], wait["ref"]) for wait in header["waits"]] == [("child", "0:1"), ("timer", "0:2"), ("signal", "0:3")]
    assert (header["mailbox"], header["status_value"], header["frames"][0]["locals"]) == ({"signal": {"other": 1}}, "with a child", {"o": "None"})


def test_list_chooses_by_workflow_status_and_time(shell: Shell) -> None:
    for id, workflow in (("a", "talk"), ("b", "prices"), ("c", "talk")):
        asked(shell, "start", id, "--workflow", workflow)
    shell.until(lambda: len(asked(shell, "list")) == 3)
    shell("terminate", "c")
    chosen = lambda *arguments: [row["id"] for row in asked(shell, "list", *arguments)]
    assert chosen("--workflow", "talk") == ["a", "c"]
    assert chosen("--workflow", "talk", "--status", "waiting") == ["a"]
    assert chosen("--status", "ended") == ["c"]
    assert chosen("--since", "1h") == ["a", "b", "c"]
    assert chosen("--since", "2999-01-01") == []
    assert "ended (terminated)" in shell("list")
    assert "since must be like 30m" in shell("list", "--since", "yesterday", code=2)
    assert "a status must be one of" in shell("list", "--status", "dead", code=2)


def test_a_caller_whose_engine_is_killed_in_between_gets_its_own_outcome(shell: Shell, tmp_path: pathlib.Path) -> None:
    """A4, A5, G6: through the socket. What is sent while no engine runs waits for the next one."""
    with Client.embedded(shell.directory, Config(command_timeout_s=60)) as client:
        futures = [client.start_and_wait(f"w{n}") for n in range(5)]
        for n in range(5):
            deadline = time.monotonic() + 30
            while not client.query(f"w{n}").result(60)["waits"]:
                assert time.monotonic() < deadline
        shell.engines[0].send_signal(signal.SIGKILL)
        shell.engines[0].wait()
        answers = [client.resume(f"w{n}", "answer", n) for n in range(5)]
        shell.until(lambda: len(asked(shell, "list")) == 5)
        shell.engine(str(tmp_path / "talk.py"))
        assert [answer.result(60) for answer in answers] == [None] * 5
        assert [future.result(60) for future in futures] == list(range(5))
    assert len(shell.records("workflow-result")) == 5
