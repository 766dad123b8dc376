"""`kwflow bulk …` acts on what a filter finds, once on each, and on nothing else (M2)."""

import contextlib
import io
import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kwflow import durable
from kwflow.cli.bulk import _Sent, bulk_app
from kwflow.client import Client
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.errors import OutcomeUnknown
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.hosted import Hosted
from tests import commands
from tests.waiting import until

SOURCE = """
import kwflow as kw

def waits(n):
    kw.set_status({"even": n % 2 == 0})
    try:
        return (yield kw.wait_signal("go"))
    except kw.Cancelled:
        return "cancelled"

def other(n):
    yield kw.wait_signal("go")
"""
pytestmark = pytest.mark.slow


class Many:
    """300 workflows that wait, and one command at a time."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        module = durable.load_source("bulk_case", SOURCE, "bulk_case.py")
        self.hosted = Hosted(directory, Workflows({"waits": module.waits, "other": module.other}, "waits"), Config(), on_log=lambda _: None)
        self.client = Client.embedded(self.hosted.engine, Config())
        for run in [self.client.start(f"w{number}", number) for number in range(300)] + [self.client.start("o", 1, workflow="other")]:
            run.result(20)

    def bulk(self, *arguments: str, code: int = 0, typed: str = "") -> tuple[str, str]:
        done = commands.run("bulk", *arguments, "--embedded", str(self.directory), typed=typed)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def statuses(self) -> dict[str, str]:
        rows = json.loads(commands.run("list", "--json", "--embedded", str(self.directory)).stdout)
        return {row["id"]: row["outcome"]["kind"] if row["outcome"] else row["status"] for row in rows}

    def close(self) -> None:
        self.client.close()
        self.hosted.close()


@pytest.fixture
def many(tmp_path: pathlib.Path) -> Iterator[Many]:
    many = Many(tmp_path / "state")
    yield many
    many.close()


def test_a_command_is_done_to_all_that_a_filter_finds_and_to_no_others(many: Many) -> None:
    """M2: to more of them than are in progress at a time."""
    said, _ = many.bulk("cancel", "--where", "even=true", "--dry-run")
    assert sorted(said.split()) == sorted(f"w{number}" for number in range(0, 300, 2)) and set(many.statuses().values()) == {"waiting"}
    _, counted = many.bulk("pause", "--workflow", "waits", "--reason", "audit", "--yes")
    assert counted.splitlines()[-1] == "300 ok" and many.statuses()["o"] == "waiting"
    many.bulk("unpause", "--status", "paused", "--yes")
    said, _ = many.bulk("signal", "go", "--value", "[5]", "--where", "even=true", "--id", "w1", "--yes", "--json")
    done = {json.loads(line)["id"] for line in said.splitlines()}
    assert done == {f"w{number}" for number in range(0, 300, 2) if str(number).startswith("1")}
    many.bulk("cancel", "--where", "even=false", "--yes")
    many.bulk("terminate", "--everything", "--yes")
    wanted = {f"w{number}": "result" if number % 2 or f"w{number}" in done else "terminated" for number in range(300)}
    assert many.statuses() == {**wanted, "o": "terminated"}
    assert many.client.result("w1").result(10) == "cancelled" and many.client.result("w10").result(10) == [5]
    assert many.bulk("cancel", "--everything", "--yes")[1].strip() == "0 workflows"


def test_it_asks_first_needs_a_filter_and_leaves_what_is_kwflows_own_alone(many: Many) -> None:
    """A command that hit the wrong instances could not be undone."""
    assert "which workflows?" in many.bulk("terminate", "--yes", code=2)[1]
    assert "cancel 301 workflows?" in many.bulk("cancel", "--everything", typed="n\n", code=1)[1]
    assert set(many.statuses().values()) == {"waiting"}
    commands.run("schedule", "add", "nightly", "--every", "1h", "--workflow", "other", "--embedded", str(many.directory)).check_returncode()
    many.client.query("schedule:nightly").result(10)
    assert "301 ok" in many.bulk("cancel", "--status", "waiting", typed="y\n")[1]
    assert many.statuses()["schedule:nightly"] == "waiting"
    assert "1 ok" in many.bulk("terminate", "--workflow", "kwflow.schedule", "--yes")[1]


def test_the_same_again_under_its_id_does_nothing_twice(many: Many) -> None:
    """M1.4: after an interruption. An instance that is signalled twice gets one signal."""
    many.bulk("pause", "--id", "w7", "--yes")
    for _ in range(2):
        many.bulk("signal", "go", "--workflow", "other", "--value", "1", "--command-id", "once", "--yes")
        assert "not_found" not in many.bulk("unpause", "--id", "w7", "--command-id", "also once", "--yes")[1]
    assert many.client.result("o").result(10) is None


def test_who_is_paused_keeps_the_command_and_holds_up_no_others(many: Many) -> None:
    """M2: a paused instance holds a cancel or a signal, and its reply with it. The other instances were never reached, however often the command was repeated."""
    many.bulk("pause", "--id", "w1", "--yes")
    said, counted = many.bulk("signal", "go", "--value", "1", "--workflow", "waits", "--yes", "--command-timeout", "10")
    assert counted.splitlines()[-1] in ("111 paused, 189 ok", "189 ok, 111 paused") and "w1: paused: the instance is paused: this is done" in counted
    many.bulk("unpause", "--status", "paused", "--yes")
    assert {many.client.result(f"w{number}").result(10) for number in range(300)} == {1}


def test_one_that_is_paused_between_the_list_and_the_command_is_told_when_its_reply_does_not_come(many: Many) -> None:
    """M2: as if it had been paused before."""
    many.client.pause("w7").result(10)
    sent = _Sent(many.client, "w7", "", many.client.cancel("w7"), None)
    many.client.query("w7").result(10)
    sent.future.set_exception(OutcomeUnknown("no reply"))
    assert sent.outcome() == ("w7", "paused", "the instance is paused: this is done when it is unpaused")


def test_who_interrupts_it_is_told_how_it_goes_on(many: Many, tmp_path: pathlib.Path) -> None:
    """M1.4: Ctrl-C printed nothing, and nobody knew the command's id."""
    log = tmp_path / "log"
    many.client.close()
    many.hosted.close()
    process = commands.start("bulk", "cancel", "--workflow", "waits", "--yes", "--embedded", str(many.directory), log=log)
    until(lambda: process.poll() is not None or "cancel 300 workflows, --command-id bulk-" in log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    first, *_, last = log.read_text().splitlines()  # rich repeats the line that was interrupted
    assert last == f"interrupted: at least 0 of 300 are done; repeat with --command-id {first.rpartition(' ')[2]}, which does nothing twice"


def test_who_interrupts_it_in_its_first_word_is_told_how_it_goes_on(many: Many) -> None:
    """M1.4: it printed the id when it ended, but not what had been done."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if self.getvalue().count("--command-id") == 1:
                raise KeyboardInterrupt
            return written

    with contextlib.redirect_stderr(Interrupted()) as said:
        assert bulk_app(["cancel", "--workflow", "waits", "--yes", "--embedded", str(many.directory)], standalone_mode=False) == 130
    assert "interrupted: at least 0 of 300 are done; repeat with --command-id bulk-" in said.getvalue()


def test_it_imports_nothing_once_it_has_begun(many: Many) -> None:
    """M1.4: CPython ignores exceptions in a callback, such as the one that releases a module's lock. A Ctrl-C there was lost, and the command went on."""
    command = [sys.executable, "-X", "importtime", "-m", "kwflow", "bulk", "cancel", "--workflow", "waits", "--yes", "--embedded", str(many.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    before, _, after = done.stderr.partition("cancel 300 workflows")
    assert "kwflow.runners.embedded.link" in before and [line for line in after.splitlines() if line.startswith("import time:")] == []


def test_an_entry_under_what_is_no_id_holds_up_no_others(many: Many) -> None:
    """A damaged store: the other instances are done, and the entry is named."""
    db = many.hosted.engine.db
    db[EmbeddedStore(db, Config().changelog_topic).prefix + b"a|b"] = b"KWF?"
    _, told = many.bulk("terminate", "--everything", "--yes", code=1)
    assert "a|b: bad_id: 'a|b': a workflow id must not contain NUL or |" in told and {"1 bad_id", "301 ok"} == set(told.splitlines()[-1].split(", "))
