"""`kwflow schedule …` against a running engine that is killed in between."""

import json
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.embedded.shell import Shell

pytestmark = pytest.mark.slow


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "state")
    (tmp_path / "jobs.py").write_text("import kwflow as kw\n\n\ndef main(o):\n    return (yield o)\n")
    yield shell
    shell.end()


def listed(shell: Shell) -> dict[str, Any]:
    return {found["name"]: found for found in json.loads(shell("schedule", "list", "--json"))}


def runs(shell: Shell) -> list[str]:
    return [line.split()[1] for line in shell.records("workflow-result") if "@" in line]


def test_a_schedule_is_added_listed_paused_triggered_and_removed_and_survives_kill_9(shell: Shell) -> None:
    """Each command as a user types it."""
    module = str(shell.directory.parent / "jobs.py")
    engine = shell.engine(module)
    shell("schedule", "add", "quick", "--every", "1s", "--workflow", "jobs", "--input", '{"n": 1}')
    shell("schedule", "add", "nightly", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin", "--workflow", "jobs", "--overlap", "queue")
    shell.until(lambda: len(runs(shell)) >= 2)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    before = len(runs(shell))
    shell.engine(module)
    shell.until(lambda: len(runs(shell)) >= before + 2)
    found = runs(shell)
    assert len(set(found)) == len(found), "no time twice"
    shell("schedule", "pause", "quick")
    shell.until(lambda: listed(shell)["quick"]["paused"])
    shell("schedule", "trigger", "nightly")
    shell.until(lambda: any(run.startswith("nightly@") for run in runs(shell)))
    assert listed(shell)["nightly"]["plan"]["timezone"] == "Europe/Berlin"
    assert "every 1 s" in shell("schedule", "list")
    shell("schedule", "add", "typo", "--cron", "0 3 * * *", "--workflow", "jbos")
    shell("schedule", "trigger", "typo")
    shell.until(lambda: str(listed(shell)["typo"].get("last_failed")).endswith(": unknown_workflow"))
    assert "unknown_workflow" in shell("schedule", "list")
    shell("schedule", "remove", "typo")
    shell("schedule", "remove", "quick")
    shell.until(lambda: set(listed(shell)) == {"nightly"})
    assert "no schedule 'quick'; there are: nightly" in shell("schedule", "trigger", "quick", code=2)


def test_what_means_nothing_is_one_line_before_anything_is_sent(shell: Shell) -> None:
    assert "cron expression '* *': Wrong number of fields" in shell("schedule", "add", "x", "--cron", "* *", "--workflow", "w", code=2)
    assert "like 90s" in shell("schedule", "add", "x", "--every", "soon", "--workflow", "w", code=2)
    assert "either a cron expression or an interval" in shell("schedule", "add", "x", "--workflow", "w", code=2)
