"""Activities on embedded engines that run as processes: killed in the middle of an activity, or stopped while one runs (M6.5)."""

import contextlib
import json
import pathlib
import re
import signal
import time
from collections.abc import Iterator

import pytest

from kwflow import durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import submit
from kwflow.runners.loop import WorkflowProcessor
from tests.embedded.shell import Shell

MODULE = str(pathlib.Path(__file__).parent / "site_of_activities.py")
pytestmark = pytest.mark.slow
ANSWERED = """
import kwflow as kw

RAN = []

@kw.activity()
def work():
    RAN.append("again")

def main(opts):
    return (yield work())

@kw.workflow(park_on_error=True)
def fragile(opts):
    raise ValueError((yield work()))
"""


@pytest.fixture
def shell(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setenv("ACTIVITIES_TEST_DIRECTORY", str(tmp_path))
    shell = Shell(tmp_path / "state")
    yield shell
    shell.end()


def ran(shell: Shell) -> list[str]:
    path = shell.directory.parent / "ran"
    return path.read_text().splitlines() if path.exists() else []


def results(shell: Shell) -> dict[str, object]:
    """Workflow id -> result; each occurs exactly once."""
    found = [line.split(" ", 2)[1:] for line in shell.records("workflow-result")]
    assert len({id for id, _ in found}) == len(found)
    return {id: json.loads(value) for id, value in found}


def test_an_activity_whose_result_is_in_the_log_already_is_not_begun_again(tmp_path: pathlib.Path) -> None:
    """M6.5: its engine was killed before it could apply the result, and many records are in front of it."""
    module = durable.load_source("answered", ANSWERED, "answered.py")
    config = Config(batch_records_max=1)
    with contextlib.closing(Embedded(tmp_path, config, sync=False)) as held:
        processor = WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation, lambda _: None)
        held.append(config.resume_topic, b"w", b"new:null")
        held.step([processor])  # its call is in the state, but nobody has begun it
        for n in range(5):
            held.append(config.resume_topic, b"other-%d" % n, b'{"ref":"late"}')
        held.append(config.resume_topic, b"w", b'{"ref":"0:1","value":"kept"}')
        held.run([processor], lambda: held.position(config.resume_topic) == held.end(config.resume_topic), lambda _: None)
        assert [record.value for record in held.read(config.result_topic or "")] == [b'"kept"']
    assert module.RAN == []


@pytest.mark.parametrize(("workflow", "before"), [("main", [(b'{"reason":""}', "pause")]), ("fragile", [])], ids=["paused", "parked"])
def test_an_activity_whose_result_is_held_is_not_begun_again(tmp_path: pathlib.Path, workflow: str, before: list[tuple[bytes, str]]) -> None:
    """M6.5: each engine that took the partition over repeated it, for as long as the workflow was paused or parked. A fork calls it for itself."""
    module, config = durable.load_source("answered", ANSWERED, "answered.py"), Config()
    functions = {name: getattr(module, name) for name in ("main", "fragile")}

    def engine(results: int, *records: tuple[bytes, bytes, str]) -> list[bytes | None]:
        """The results once there are so many; with none, nothing that is dispatched begins."""
        with contextlib.closing(Embedded(tmp_path, config, sync=False)) as held:
            processor = WorkflowProcessor(config, Workflows(functions, "main"), frozenset(), held.incarnation, lambda _: None)
            for key, value, op in records:
                held.append(config.resume_topic, key, value, (("kwflow-op", op.encode()),) if op else (("kwflow-workflow", (workflow if key == b"w" else "main").encode()),))
                held.step([processor])
            if results:
                held.run([processor], lambda: held.end(config.result_topic or "") == results, lambda _: None)
            return [record.value for record in held.read(config.result_topic or "")]

    engine(0, (b"w", b"new:null", ""), *((b"w", *one) for one in before), (b"w", b'{"ref":"0:1","value":"kept"}', ""))
    assert engine(1, (b"other", b"new:null", "")) == [b"null"]
    assert module.RAN == ["again"], "for the other one"
    if workflow == "main":
        assert engine(2, (b"w", b'{"id":"fork"}', "fork")) == [b"null", b"null"]
        assert module.RAN == ["again", "again"]
        assert engine(3, (b"w", b"null", "unpause")) == [b"null", b"null", b'"kept"']
        assert module.RAN == ["again", "again"]


def test_activities_that_ran_when_the_engine_was_killed_run_again_with_the_same_key_and_count_once(shell: Shell) -> None:
    """M6.5: at least once, but the workflow sees one result for each."""
    engine = shell.engine(MODULE)
    shell("start", "w", "--workflow", "fan_out", "--input", "5")
    shell.until(lambda: len(ran(shell)) == 5)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    (shell.directory.parent / "gate").touch()
    shell.engine(MODULE)
    shell.until(lambda: results(shell))
    assert results(shell) == {"w": 30}
    assert sorted(ran(shell)) == sorted([f"square {n} 1 w|0:{n + 1}" for n in range(5)] * 2)


def test_a_long_activity_continues_where_its_heartbeats_say_after_a_kill_and_after_a_failure(shell: Shell) -> None:
    """M6.5: the engine's next process, and the next attempt, find the last details; `kwflow show` tells them."""
    here = shell.directory.parent
    engine = shell.engine(MODULE)
    shell("start", "w", "--workflow", "copies", "--input", "5")
    for n in range(3):
        (here / f"file-{n}").touch()
    shell.until(lambda: re.search(r"activity 0:1  copy attempt 1  copies  \S+:\d+  since .{25}  heartbeat .{25}: 3\n", shell("show", "w")))
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    shell.engine(MODULE)
    shell.until(lambda: "copy from 3 in attempt 1" in ran(shell))
    (here / "file-3").write_text("damaged")
    shell.until(lambda: "copy from 3 in attempt 2" in ran(shell))
    (here / "file-4").touch()
    shell.until(lambda: results(shell))
    assert results(shell) == {"w": 3}
    assert [line for line in ran(shell) if line.startswith("copied")] == [f"copied {n}" for n in (0, 1, 2, 3, 3, 4)]


def test_many_chains_end_right_through_three_kills(shell: Shell) -> None:
    """M6.5, G1."""
    (shell.directory.parent / "gate").touch()
    ids = [f"c{n}" for n in range(30)]
    engine = shell.engine(MODULE)
    for id in ids:
        submit(shell.directory, "workflow-resume", id.encode(), b"new:8", (("kwflow-workflow", b"chain"),))
    for kill in range(1, 4):
        shell.until(lambda kill=kill: len(ran(shell)) >= kill * 50)
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        engine = shell.engine(MODULE)
    shell.until(lambda: len(results(shell)) == len(ids))
    assert results(shell) == dict.fromkeys(ids, 140)
    assert shell.records("workflow-error") == []


def test_an_engine_that_is_asked_to_end_lets_activities_finish_and_nothing_runs_twice(shell: Shell) -> None:
    """M6.5: grace."""
    engine = shell.engine(MODULE)
    shell("start", "w", "--workflow", "fan_out", "--input", "2")
    shell.until(lambda: len(ran(shell)) == 2)
    engine.send_signal(signal.SIGTERM)
    (shell.directory.parent / "gate").touch()
    assert engine.wait(20) == 0
    shell.engine(MODULE)
    shell.until(lambda: results(shell))
    assert results(shell) == {"w": 1}
    assert len(ran(shell)) == 2


def test_activities_that_exit_hang_and_fail_end_as_errors_at_the_yield_and_the_engine_ends_in_time(shell: Shell) -> None:
    """M6: each ends as a clear ActivityError and the engine goes on. A thread that hangs does not keep the process alive."""
    engine = shell.engine(MODULE)
    shell("start", "w", "--workflow", "bad")
    shell.until(lambda: results(shell))
    assert results(shell) == {"w": ["SystemExit", "Timeout", 1]}
    assert ran(shell).count("flaky 1") == 3
    begun = time.monotonic()
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(20) == 0
    assert time.monotonic() - begun < 15


def resident_bytes(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads /proc")
def test_ten_thousand_activities_that_wait_in_one_engine_keep_its_memory_flat(shell: Shell) -> None:
    """M6.2: waiting calls are in the store. A thousand live instances are kept in memory either way."""
    engine = shell.engine(MODULE)

    def waiting() -> int:
        return sum(row["workflow"] == "one" for row in json.loads(shell("list", "--json")))

    def spread(id: str, count: int) -> None:
        submit(shell.directory, "workflow-resume", id.encode(), b"new:%d" % count, (("kwflow-workflow", b"spread"),))

    spread("first", 2000)
    shell.until(lambda: waiting() == 2000)
    before = resident_bytes(engine.pid)
    spread("second", 8000)
    shell.until(lambda: waiting() == 10_000)
    assert resident_bytes(engine.pid) - before < 40_000_000
    assert len(ran(shell)) == 64
