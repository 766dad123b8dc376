"""What a supervisor does when its children end. The processes are real (K1)."""

import pathlib
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from kwflow.runners import supervise as supervising
from kwflow.runners.logs import Line
from kwflow.runners.supervise import _Child, supervise

CHILD = """
import os, pathlib, signal, sys
signal.alarm(20)  # nobody else ends it if the supervisor does not
signal.signal(signal.SIGTERM, {on_sigterm})
pathlib.Path(sys.argv[1], os.environ["KWFLOW_PROCESS"]).touch()
while True:
    signal.pause()
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


def asking(directory: pathlib.Path, signals: int) -> Callable[[], int]:
    """Return a function that gives 0 until both children are ready for a signal, then one more at each call."""
    asked = [0]

    def count() -> int:
        asked[0] += len(list(directory.iterdir())) == 2
        return min(asked[0], signals)

    return count


@pytest.mark.parametrize(
    ("on_sigterm", "signals", "code"),
    [("lambda *_: sys.exit(0)", 1, 0), ("lambda *_: sys.exit(5 * (os.environ['KWFLOW_PROCESS'] == '1'))", 1, 5), ("signal.SIG_IGN", 2, 128 + 9)],
    ids=["all end well", "one ends badly", "the second signal kills"],
)
def test_the_exit_code_is_that_of_a_process_that_did_not_end_well(tmp_path: pathlib.Path, on_sigterm: str, signals: int, code: int) -> None:
    command = [sys.executable, "-c", CHILD.format(on_sigterm=on_sigterm), str(tmp_path)]
    assert supervise(command, 2, asking(tmp_path, signals), print) == code


def test_a_process_that_keeps_dying_is_started_again_later_and_later_and_one_that_ran_for_over_a_minute_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes are real, the clock is the test's."""
    now = [0.0]
    monkeypatch.setattr(supervising, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    child = _Child(0, ["sh", "-c", "exit 3"], print)

    def waits_after(seconds: float) -> float:
        """The pause before the next start, after the process has run for this long."""
        now[0] = child.again_at - 0.001
        assert child.look() is None and child.process is None, "not before its time"
        now[0] = child.again_at
        assert child.look() is None and child.process is not None
        child.process.wait()
        now[0] += seconds
        assert child.look() is None
        return child.again_at - now[0]

    assert [waits_after(1) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert [waits_after(seconds) for seconds in (60, 61, 1)] == [30, 0, 1]


def test_a_process_that_cannot_be_started_again_is_tried_later(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, the system lacked the memory for it. The supervisor used to end, and all others with it. Here the program is missing for a moment."""
    now, said = [0.0], list[str]()
    monkeypatch.setattr(supervising, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    child = _Child(0, [str(program)], said.append)
    child.start()
    assert child.process is not None
    child.process.wait()
    away = program.rename(tmp_path / "away")
    for _ in range(3):
        assert child.look() is None and child.process is None
        now[0] = child.again_at
    assert [line.partition("; ")[2] for line in said] == ["restarting at once", "restarting in 1 s", "restarting in 2 s"]
    assert said[1].startswith("process 0 cannot be started: No such file")
    assert {line.level for line in said if isinstance(line, Line)} == {"warning"}, "an end that nobody asked for is not among what is only told"
    away.rename(program)
    child.look()
    assert child.process is not None
    child.process.wait()


def test_a_file_beside_the_workflows_is_no_module_of_pythons_to_the_processes(tmp_path: pathlib.Path) -> None:
    """A single engine runs as a script, so Python does not import from the directory where it is started."""
    (tmp_path / "token.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "plain.py").write_text("def main(opts):\n    return 1\n    yield\n")
    (tmp_path / "kwflow.toml").write_text("[app]\nbootstrap_servers = '127.0.0.1:1'\nclient_connect_s = 0.2\nwait_for_broker_s = 3600\n")
    words = [pathlib.Path(sys.executable).with_name("kwflow"), "engine", "plain", "--processes", "2"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stderr is not None
        try:
            said = {supervisor.stderr.readline()[:29] for _ in range(2)}
            assert said == {"process 0: waiting: no broker", "process 1: waiting: no broker"}
            supervisor.terminate()
            assert supervisor.wait(30) == 0
        finally:
            supervisor.kill()
