"""Several processes of one engine, supervised (K1), and what each reports about itself on Kafka."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from tests.integration.broker import free_port
from tests.integration.test_kafka_engine import ROOT, TRIP, Site

pytestmark = [pytest.mark.broker, pytest.mark.slow]


class Many(Site):
    """An engine of two processes; process n answers on `port + n`."""

    def __init__(self, broker: str, application: str, directory: pathlib.Path) -> None:
        super().__init__(broker, application, directory)
        self.port = free_port(2)
        self.log = directory / "many.log"

    def supervisor(self, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "kwflow", "engine", TRIP, "--processes", "2", "--with-scheduler", "--http", f"127.0.0.1:{self.port}", "--state-dir", str(self.directory / "many"), *more]
        process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stderr=open(self.log, "a"), text=True)
        self.processes.append(process)
        return process

    def health(self, number: int) -> dict[str, object]:
        """Empty as long as it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port + number}/health", timeout=5) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            return dict(json.loads(error.read()))
        except OSError:
            return {}

    def metric(self, number: int, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port + number}/metrics", timeout=5) as answer:
            return sum(float(line.rpartition(" ")[2]) for line in answer.read().decode().splitlines() if line.startswith(name))

    def owned(self, number: int) -> list[int]:
        runners = self.health(number).get("runners", [])
        return [partition for runner in runners if runner["name"] == self.application for partition in runner["owned"]]  # type: ignore[attr-defined]

    def children(self, supervisor: "subprocess.Popen[str]") -> list[int]:
        return [int(pid) for pid in pathlib.Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()]


def until(what: Callable[[], object], log: pathlib.Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.fixture
def many(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Many]:
    many = Many(broker, application, tmp_path)
    yield many
    for process in many.processes:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_two_processes_share_the_partitions_a_killed_one_comes_back_and_sigterm_ends_all_cleanly(many: Many) -> None:
    """K1: each has its own identity and state directory. The kill loses and doubles nothing."""
    supervisor = many.supervisor()
    until(lambda: sorted(many.owned(0) + many.owned(1)) == [0, 1, 2, 3] and many.owned(0) and many.owned(1), many.log)
    until(lambda: all(many.health(number).get("ready") for number in (0, 1)), many.log)
    assert sorted(path.name for path in (many.directory / "many" / many.application).iterdir()) == ["0", "1"]
    ids = [f"{many.application}-{number}" for number in range(20)]
    for id in ids[:10]:
        many.send(id, 'new:{"timeout": 1}')
    victim = many.children(supervisor)[0]
    os.kill(victim, signal.SIGKILL)
    for id in ids[10:]:
        many.send(id, 'new:{"timeout": 1}')
    errors = many.read(many.topic("error"), len(ids))
    assert sorted(id for id, _ in errors) == sorted(ids)
    until(lambda: sorted(many.owned(0) + many.owned(1)) == [0, 1, 2, 3], many.log)
    assert "was killed by SIGKILL; restarting at once" in many.log.read_text()
    assert victim not in many.children(supervisor) and len(many.children(supervisor)) == 2
    # a commit of the killed process may be counted by nobody, because its successor begins at zero
    assert sum(many.metric(number, 'kwflow_records_total{outcome="started"}') for number in (0, 1)) >= 10
    assert all(many.metric(number, "kwflow_commit_seconds_count") > 0 for number in (0, 1) if many.metric(number, 'kwflow_records_total{outcome="started"}'))
    until(lambda: sum(many.metric(number, "kwflow_lag_records") for number in (0, 1)) == 0, many.log)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(60) == 0
    assert many.log.read_text().count("records: ") == 2, "each ended by itself"


def test_a_start_that_can_never_work_ends_all_with_its_code(many: Many) -> None:
    supervisor = many.supervisor("--app-dir", str(many.directory), "no_such_module")
    assert supervisor.wait(60) == 2
    assert "restarting would not help" in many.log.read_text()


def test_processes_whose_supervisor_was_killed_end_by_themselves(many: Many) -> None:
    supervisor = many.supervisor()
    until(lambda: many.health(0).get("ready") and many.health(1).get("ready"), many.log)
    children = many.children(supervisor)
    supervisor.kill()
    supervisor.wait()
    until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in children), many.log)
    assert many.log.read_text().count("records: ") == 2
