"""Feeds of an embedded engine, from what its workflows write, in the same log (decision 0058)."""

import json
import pathlib
import signal

import pytest

from tests.embedded.shell import Shell

MODULE = """
import json
import os
import kwflow as kw

kw.declare_topics("numbers")

@kw.workflow
def counts(n):
    for number in range(n):
        kw.output_json({"number": number}, "numbers")
    kw.output("no number", "numbers")
    yield kw.wait_signal("never")

@kw.feed("numbers")
def numbers(record: kw.Record):
    if not os.path.exists(MENDED) or record.value != b"no number":
        number = json.loads(record.value)["number"]
        return kw.Signal(f"sum-{number % 2}", "number", number, start=sums)
    return [kw.Signal("sum-0", "number"), kw.Signal("sum-1", "number")]

@kw.workflow
def sums(_):
    found = []
    while (number := (yield kw.wait_signal("number"))) is not None:
        found.append(number)
    return found
"""


@pytest.mark.slow
def test_what_workflows_write_is_fed_once_over_kill_9_and_a_letter_is_asked_about_again(shell: Shell, tmp_path: pathlib.Path) -> None:
    """G1, G3, K13."""
    module, mended = tmp_path / "fed.py", tmp_path / "mended"
    module.write_text(f"MENDED = {str(mended)!r}\n{MODULE}")
    shell("start", "w", "--workflow", "counts", "--input", "3000")
    engine = shell.engine(str(module))
    shell.until(lambda: shell.stored("sum-0") is not None)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    shell.engine(str(module))
    shell.until(lambda: "feed-failed" in shell("dead-letters", "list"))
    [letter] = json.loads(shell("dead-letters", "list", "--json"))
    assert letter["message"].startswith("JSONDecodeError: ") and letter["message"].endswith("fed.py:19)")
    mended.touch()
    assert "sent again" in shell("dead-letters", "retry", "--all", "--reason", "feed-failed")
    shell.until(lambda: len(shell.records("workflow-result")) == 2)
    found = {line.split()[1]: line.split()[2] for line in shell.records("workflow-result")}
    assert found == {f"sum-{rest}": str(list(range(rest, 3000, 2))).replace(" ", "") for rest in (0, 1)}
    assert len(shell.records("numbers")) == 3001
