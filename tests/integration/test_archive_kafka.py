"""Archives (decision 0065) between directories and applications on a broker: what waits continues there, and nothing is done twice."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType  # type: ignore[attr-defined]
from rocksdict import WriteBatch

from kwflow.client import Client
from kwflow.config import Config, load_config
from kwflow.core import snapshot
from kwflow.errors import CommandError, UsageError
from kwflow.runners import archive
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.kafka import moving, topics
from kwflow.runners.kafka.environment import LIVE
from kwflow.runners.kafka.member import LATEST, offsets
from kwflow.runners.kafka.stopped import Stopped
from tests import commands
from tests.embedded.test_archive import Clock
from tests.embedded.test_archive import Site as Embedding
from tests.integration.site import ROOT, Site
from tests.waiting import until

pytestmark = [pytest.mark.broker, pytest.mark.slow]

KILLS = 2  # tests/simulation/test_stopped.py lets it die everywhere
WEEK_MS = 7 * 86_400_000  # a broker's retention
MODULE = """
import os, pathlib, time
import kwflow as kw

HERE = pathlib.Path(__file__).parent

@kw.activity(queue=os.environ["ARCHIVE_QUEUE"])
def pay(cents: int) -> int:
    with open(HERE / "ran", "a") as ran:
        ran.write(f"{os.getpid()} {kw.activity_info().idempotency_key}\\n")
    while not (HERE / "gate").exists() and not kw.activity_info().wait_cancelled(0.02):
        pass
    return cents

def main(o):
    said = yield kw.wait_signal("said")
    paid = yield pay(5)
    again = yield pay(6)
    return [said, paid, again]

@kw.workflow
def sleeper(seconds):
    yield kw.sleep(seconds)
    return "slept"

@kw.workflow
def takes(o):
    return len(o)
"""


class Moves:
    """Applications that have the same module, and their archives."""

    def __init__(self, broker: str, name: str, directory: pathlib.Path) -> None:
        self.broker, self.name, self.directory = broker, name, directory
        (directory / "movers.py").write_text(MODULE)
        self.module = str(directory / "movers.py")
        self.kafka = '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "log_level": 0}'
        self.environment = {"ARCHIVE_QUEUE": f"{name}-pay", "KWFLOW_ACTIVITY_GRACE_S": "0", "KWFLOW_KAFKA": self.kafka, "PYTHONPATH": str(ROOT), "KWFLOW_EMBEDDED": str(directory / "state")}
        self.sites: list[Site] = []

    def site(self, name: str, partitions: int, **more: str) -> Site:
        directory = self.directory / name
        directory.mkdir()
        environment = {name: text for name, text in self.environment.items() if name != "KWFLOW_EMBEDDED"}
        self.sites.append(Site(self.broker, f"{self.name}-{name}", directory, partitions, (self.module,), {**environment, **more}))
        return self.sites[-1]

    def embedded(self, *arguments: str, code: int = 0) -> str:
        done = commands.run(*arguments, environment={**os.environ, **self.environment})
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + done.stderr

    def ran(self) -> list[tuple[int, str]]:
        path = self.directory / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), key) for pid, key in (line.split(" ", 1) for line in lines)]


@pytest.fixture
def moves(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Moves]:
    moves = Moves(broker, application, tmp_path)
    yield moves
    for site in moves.sites:
        site.end()


def stop(site: Site) -> None:
    for process in site.processes:
        process.terminate()
        assert process.wait(30) == 0
    site.processes.clear()


def waits(site: Site, id: str) -> list[str]:
    rows = json.loads(site.run("list", "--json"))
    return [wait["kind"] for row in rows if row["id"] == id for wait in row["waits"]]


def test_workflows_move_from_a_directory_to_a_broker_and_from_there_to_fewer_partitions(moves: Moves) -> None:
    for number in range(6):
        moves.embedded("start", f"w{number}")
    moves.embedded("start", "s", "--workflow", "sleeper", "--input", "3600")
    log = moves.directory / "embedded.log"
    engine = commands.start("engine", moves.module, log=log, environment={**os.environ, **moves.environment})
    try:
        until(lambda: "runs in" in log.read_text())
        moves.embedded("signal", "w0", "said", "--value", "1")
        until(moves.ran, 60)
    finally:
        engine.terminate()
        assert engine.wait(30) == 0
    file = str(moves.directory / "one.kwflow")
    assert "7 instances, 1 timers, 1 calls of activities" in moves.embedded("export", file)

    first = moves.site("first", 4)
    assert "7 instances" in first.run("import", file)
    assert "it has state in" in first.refused("import", file)
    again = str(moves.directory / "again.kwflow")
    first.run("export", again)
    assert contents(pathlib.Path(again)) == contents(pathlib.Path(file)), "also the call, which is in a queue by now"
    first.engine("one", moves.module)
    worker = first.started("worker.log", "worker", moves.module)
    first.until(lambda: len(moves.ran()) == 2)
    assert moves.ran()[1] == (worker.pid, "w0|7:1"), "the call of before has gone to the queue, under its idempotency key"
    (moves.directory / "gate").touch()
    assert first.read(first.topic("result"), 1) == [("w0", "[1,5,6]")]
    assert len(moves.ran()) == 3 and moves.ran()[2][1].startswith("w0|") and ":100000" in moves.ran()[2][1]
    (moves.directory / "gate").unlink()
    stop(first)
    first.engine("one", moves.module)
    for number in range(1, 6):
        first.run("signal", f"w{number}", "said", "--value", str(number))
    first.until(lambda: all(waits(first, f"w{number}") == ["job"] for number in range(1, 6)))
    file = str(moves.directory / "two.kwflow")
    assert "is still running" in first.refused("export", file)
    stop(first)
    first.run("start", "late", "--workflow", "sleeper", "--input", "0.1")
    assert "6 instances, 1 ended, 1 timers, 5 calls in queues, 1 records that are not applied yet" in first.run("export", file)

    refused = moves.embedded("import", file, "--embedded", str(moves.directory / "back"), code=2)
    assert "5 calls in" in refused and "an embedded engine has no workers" in refused
    second = moves.site("second", 2, KWFLOW_ENCRYPTION_KEYS=json.dumps(["e" * 32]), KWFLOW_ENCRYPTION_PLAIN_TOPICS=json.dumps([f"{moves.name}-second-result"]))
    second.run("import", file)
    (moves.directory / "gate").touch()
    second.engine("two", moves.module)
    second.started("worker2.log", "worker", moves.module)
    assert sorted(second.read(second.topic("result"), 6)) == [("late", '"slept"'), *((f"w{number}", f"[{number},5,6]") for number in range(1, 6))]
    keys = [key for _, key in moves.ran()]
    assert len(set(keys[1:])) == len(keys) - 1 == 12, "each call has run once where it went to, and has a key of its own"
    assert waits(second, "s") == ["timer"]


def test_calls_that_were_answered_are_not_done_again_where_their_workflows_move_to(moves: Moves) -> None:
    """M6.6: by workers that went on when the engines had stopped, or while the workflow was paused."""
    (moves.directory / "gate").touch()
    first = moves.site("first", 2)
    first.engine("one", moves.module)
    ids = ("held", "late", "open")
    for id in ids:
        first.run("start", id)
        first.run("signal", id, "said", "--value", "1")
    first.until(lambda: all(waits(first, id) == ["job"] for id in ids))
    refs = {row["id"]: row["waits"][0]["ref"] for row in json.loads(first.run("list", "--json"))}
    config = Config(bootstrap_servers=moves.broker, application_id=first.application, **{f"{name}_topic": first.topic(name) for name in ("resume", "result", "error", "scheduler")})
    with Client.kafka(config) as client:
        client.pause("held").result(30)
        with pytest.raises(CommandError, match="held"):
            client.resume("held", refs["held"], 7).result(30)
    stop(first)
    first.send("late", json.dumps({"ref": refs["late"], "value": 8}))
    file = str(moves.directory / "one.kwflow")
    assert "3 instances, 1 parked or paused, 1 calls in queues, 1 records that are not applied yet" in first.run("export", file)
    second = moves.site("second", 1)
    second.run("import", file)
    second.engine("two", moves.module)
    second.started("worker.log", "worker", moves.module)
    second.run("unpause", "held")
    assert sorted(second.read(second.topic("result"), 3)) == [("held", "[1,7,6]"), ("late", "[1,8,6]"), ("open", "[1,5,6]")]
    assert {key for _, key in moves.ran()}.isdisjoint({f"held|{refs['held']}", f"late|{refs['late']}"}) and len(moves.ran()) == 4


def test_an_import_that_has_failed_lets_no_engine_start_until_it_is_repeated(moves: Moves) -> None:
    """K16: the state is there only in part; of records and calls nothing is, until everything is."""
    moves.embedded("start", "w", "--workflow", "takes", "--input", json.dumps("x" * 300_000))
    file = str(moves.directory / "one.kwflow")
    assert "1 records that are not applied yet" in moves.embedded("export", file)
    other = str(moves.directory / "other.kwflow")
    moves.embedded("start", "another")
    moves.embedded("export", other)
    site = moves.site("first", 2)
    limit(site, 100_000)
    assert f"{site.topic('resume')} does not accept 300006 bytes under b'w'" in site.fails(1, "import", file)
    engine = site.engine("one", moves.module)
    assert engine.wait(60) == 1
    assert "an archive was imported only in part" in site.logged()
    assert "another archive was imported into it only in part" in site.refused("import", other)
    assert "only in part; finish that first" in site.refused("export", str(moves.directory / "never.kwflow"))
    assert "only in part; finish that first" in site.refused("topics", "migrate", "--partitions", "3"), "it would replace the mark"
    limit(site, 1_000_000)
    site.run("import", file)
    site.engine("one", moves.module)
    assert site.read(site.topic("result"), 1) == [("w", "300000")]
    site.processes.pop().kill()
    site.run("reset", "--yes")


def test_what_is_exported_again_is_what_was_imported_however_often_the_import_was_killed(moves: Moves) -> None:
    """All or nothing: an engine that starts in between is refused, or finds everything."""
    full = Embedding(moves.directory / "state", Clock())
    for id in ("waits", "sleeps", "parked", "late"):
        full.send(id, "new")
    full.send("done", "new", start_id="once")
    full.say("done", "end")
    full.say("sleeps", "sleep")
    full.say("parked", "lock")
    full.say("parked", "held")
    full.engine.append(full.config.resume_topic, b"waits", b"{")
    full.work()
    for number in range(50):
        full.say("late", str(number), work=False)
    store, batch = EmbeddedStore(full.engine.db, full.config.changelog_topic), WriteBatch(raw_mode=True)
    waits = store.get(b"waits") or b""
    for number in range(20_000):
        batch.put(store.prefix + b"copy%d" % number, snapshot.amend(waits, (), id=f"copy{number}"))
    full.engine.db.write(batch)
    full.close()
    first, second = moves.directory / "one.kwflow", moves.directory / "two.kwflow"
    moves.embedded("export", str(first))
    site = moves.site("first", 3)
    config = Config(bootstrap_servers=site.broker)
    admin, changelog = topics.admin(config), f"{site.application}-state-changelog"

    def written() -> int:
        return sum(offsets(LIVE, config, admin, changelog, range(3), LATEST).values())

    for _ in range(KILLS):
        before = written()
        importing = subprocess.Popen([sys.executable, "-m", "kwflow", "import", str(first)], env=site.environment, stderr=subprocess.DEVNULL)
        until(lambda before=before: written() > before, 60)  # type: ignore[misc]
        importing.kill()
        assert importing.wait(30) == -9, "it was in the middle of it"
    site.run("import", str(first))
    site.run("export", str(second))
    assert contents(second) == contents(first)
    oldest_ms = min(part.timestamp_ms for part in archive.parts(second, Config()) if isinstance(part, archive.Sent))
    assert time.time() * 1000 - oldest_ms < WEEK_MS * 0.6, "they are from 1970, and the broker would delete them before an engine, or an operator, has seen them"


def test_letters_of_a_rehearsal_are_not_there_twice(moves: Moves) -> None:
    """`reset` leaves letters: after the second import, a retry of all of them would have sent each twice."""
    source, file = Embedding(moves.directory / "state", Clock()), str(moves.directory / "one.kwflow")
    source.send("w", "new")
    source.engine.append(source.config.resume_topic, b"w", b"{", (("a", b"1"), ("b", None)))
    source.work()
    source.close()
    moves.embedded("export", file)
    site = moves.site("first", 1)
    for _ in range(2):
        site.run("import", file)
        site.run("reset", "--yes")
    assert len(json.loads(site.run("dead-letters", "list", "--json"))) == 1


def test_an_import_beside_an_engine_that_has_started_meanwhile_is_refused(moves: Moves, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has restored the state before the import has marked it: it would go on without what is imported."""
    moves.embedded("start", "w")
    file = moves.directory / "one.kwflow"
    moves.embedded("export", str(file))
    site, fence = moves.site("first", 2), moving._Target.fence

    def fence_late(target: moving._Target) -> None:
        fence(target)
        site.engine("one", moves.module)
        until(lambda: "owns" in site.logged(), 60, site.logged)

    monkeypatch.setattr(moving._Target, "fence", fence_late)
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="was started meanwhile"):
        moving.bring(load_config(None), file)
    stop(site)
    site.run("import", str(file))
    site.engine("one", moves.module)
    site.until(lambda: waits(site, "w") == ["signal"])


def test_no_archive_is_written_of_an_application_whose_engine_ran_meanwhile(moves: Moves, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has stopped again: of some partitions the archive has the state before it ran, of others that after it."""
    site, file, waiting = moves.site("first", 2), moves.directory / "one.kwflow", moving._waiting
    site.producer.produce(f"{site.application}-dead-letter", b"{", b"w", headers={"kwflow-error-reason": b"bad-json"})
    site.run("start", "w")

    def waiting_late(stopped: Stopped) -> Any:
        engine = site.engine("one", moves.module)
        site.until(lambda: waits(site, "w") == ["signal"])
        engine.terminate()
        assert engine.wait(30) == 0
        stopped.wait()
        return waiting(stopped)

    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(moving, "_waiting", waiting_late)
    with pytest.raises(UsageError, match="ran meanwhile; no archive was written"):
        moving.take(load_config(None), file)
    assert not file.exists()


def contents(path: pathlib.Path) -> tuple[list[archive.Entry], list[archive.Sent]]:
    """What is in an archive but for the times of records, in the order of its keys; records of one key in theirs."""
    _, *parts, _ = archive.parts(path, Config())
    entries = {(part.table, part.key): part for part in parts if isinstance(part, archive.Entry)}
    sent = [msgspec.structs.replace(part, timestamp_ms=0) for part in parts if isinstance(part, archive.Sent)]
    return [entries[key] for key in sorted(entries)], sorted(sent, key=lambda part: (part.role, part.key or b""))


def limit(site: Site, size: int) -> None:
    resource = ConfigResource(ResourceType.TOPIC, site.topic("resume"), incremental_configs=[ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)])
    admin = AdminClient({"bootstrap.servers": site.broker, "log_level": 0})
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(10)
