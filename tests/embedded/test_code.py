"""Deployments of the embedded engine: it is stopped, its code is replaced, and it is started again, as its user does it (G10)."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from kwflow import declarations, durable
from kwflow.cli import app, code
from kwflow.config import Config
from kwflow.errors import UsageError
from kwflow.runners.embedded.engine import Embedded
from kwflow.testing import WorkflowTester
from tests.embedded.shell import ROOT, Shell

HEAD = "import kwflow as kw\n"
OLD = HEAD + "from shop.helpers import help_\n\ndef main(opts):\n    got = yield kw.suspend('r')\n    yield kw.suspend('s')\n    return ['old', got, help_()]\n"
NEW = HEAD + "\ndef main(opts):\n    got = yield kw.suspend('r')\n    return ['new', got]\n"
MOVES = "@kw.migrate(from_='shop.flows:main')\ndef move(old):\n    return main(old.locals['opts'], old.locals['got'], old.refs['s']), ['s']\n"


class Deployments(Shell):
    """A folder with the package `shop`, and the engine that runs it."""

    def __init__(self, directory: pathlib.Path) -> None:
        super().__init__(directory / "state")
        self.folder = directory
        (directory / "shop").mkdir()
        (directory / "shop/__init__.py").write_text("")

    def deploy(self, files: dict[str, str], *modules: str) -> None:
        """Stop the engine, replace the files (empty text deletes one), and start it with these modules."""
        self.stop()
        for name, text in files.items():
            path = self.folder / "shop" / name
            path.write_text(text)
            if not text:
                path.unlink()
        self.engine(*modules, "--app-dir", str(self.folder))

    def stop(self) -> None:
        for engine in self.engines:
            if engine.poll() is None:
                engine.send_signal(signal.SIGTERM)
                engine.communicate(timeout=30)


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Iterator[Deployments]:
    site = Deployments(tmp_path)
    yield site
    site.end()


def waits_for(site: Shell, id: str, ref: str) -> None:
    site.until(lambda: f" {ref} " in subprocess.run(site.command("show", id), capture_output=True, text=True, check=False).stdout)


@pytest.mark.slow
def test_instances_outlive_a_changed_a_renamed_and_a_deleted_module(site: Deployments) -> None:
    """G10, wire §4: the engine is another process each time, and helpers that are gone come from the store."""
    site.deploy({"trips.py": OLD, "helpers.py": "def help_():\n    return 'helped'\n"}, "shop.trips")
    site("start", "w", "--input", "1")
    waits_for(site, "w", "r")
    site.deploy({"trips.py": NEW}, "shop.trips")
    site("start", "v")
    site("resume", "w", "r", "--value", "5")
    site("resume", "v", "r", "--value", "6")
    waits_for(site, "w", "s")
    site.deploy({"trips.py": "", "helpers.py": "", "journeys.py": NEW}, "shop.journeys")
    site("resume", "w", "s")
    site.until(lambda: len(site.records("workflow-result")) == 2)
    assert site.records("workflow-result") == ['0 v ["new",6]', '1 w ["old",5,"helped"]']


@pytest.mark.slow
def test_old_code_that_instances_wait_in_is_loaded_when_the_engine_starts(site: Deployments) -> None:
    """Semantics §9.6: before any record, and in a program that hosts its engine itself, too."""
    loads = site.folder / "loads"
    noted = HEAD + f"open({str(loads)!r}, 'a').write(__name__ + chr(10))\n"
    site.deploy({"trips.py": noted + "def main(opts):\n    yield kw.suspend('r')\n    return 'old'\n"}, "shop.trips")
    site("start", "w")
    waits_for(site, "w", "r")
    loads.write_text("")
    site.deploy({"trips.py": HEAD + "def main(opts):\n    yield kw.suspend('r')\n    return 'new'\n"}, "shop.trips")
    site.until(lambda: loads.read_text().startswith("shop.trips@"))
    site.stop()
    loads.write_text("")
    held = "import sys, time\nsys.path.insert(0, sys.argv[1])\nfrom kwflow.runners.hosted import Hosted\nwith Hosted(sys.argv[2], ['shop.trips']):\n    sys.stdin.read()\n"
    program = subprocess.Popen([sys.executable, "-c", held, str(site.folder), str(site.directory)], stdin=subprocess.PIPE, cwd=site.folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        site.until(lambda: loads.read_text().startswith("shop.trips@"))
        site("resume", "w", "r")
        site.until(lambda: site.records("workflow-result"))
    finally:
        program.communicate(timeout=30)
    assert site.records("workflow-result") == ['0 w "old"']


PRICED = HEAD + "class Order:\n    price = {0}\n\ndef main(opts):\n    order = Order()\n    got = yield kw.suspend('r')\n    return [{1}, got]\n\ndef side(opts):\n    yield kw.suspend('t')\n"
BROKEN = HEAD + "import shop.helpers\ndef main(opts):\n    yield kw.suspend('r')\n"
MOVED = PRICED.format(2, "'new'") + "\n@kw.migrate(from_='shop.trips:main')\ndef move(old):\n    return moved(old.refs['r']), ['r']\n\ndef moved(r):\n    return ['moved', (yield r)]\n"


@pytest.mark.slow
def test_a_deployment_is_checked_before_it_is_made_then_seen_compared_moved_and_cleared_up(site: Deployments) -> None:
    """G10: `engine --check`, `code list`, `code diff`, `code migrate`, `code gc`."""
    modules = ("shop.trips", "--app-dir", str(site.folder))
    (site.folder / "shop/helpers.py").write_text("")
    site.deploy({"broken.py": BROKEN, "trips.py": PRICED.format(1, "'old'")}, "shop.trips", "shop.broken")
    site("start", "a", "--workflow", "trips")
    site("start", "b", "--workflow", "trips")
    site("start", "c", "--workflow", "broken")
    site("schedule", "add", "weekly", "--every", "7d", "--workflow", "trips")
    waits_for(site, "c", "r")
    assert "4 waiting: 4 resume on this code, 0 stay on old code, 0 would be parked" in site("engine", "--check", "shop.trips", "shop.broken", "--app-dir", str(site.folder))
    site.stop()
    (site.folder / "shop/trips.py").write_text(MOVED)
    said = site("engine", "--check", *modules)
    assert "4 waiting: 2 resume on this code, 2 stay on old code, 0 would be parked" in said
    assert "stay on old code: a  shop.trips: main has changed; a migration is there" in said
    assert "class shop.trips.Order has changed since 2 of these instances were saved" in said
    (site.folder / "shop/broken.py").write_text(BROKEN.replace("'r'", "'s'").replace("import shop.helpers", ""))
    (site.folder / "shop/helpers.py").write_text("raise OSError('no licence')")
    said = site("engine", "--check", *modules, code=1)
    assert "1 would be parked" in said
    assert "would be parked: c  the stored version" in said
    assert "OSError: no licence" in said
    difference = site("code", "diff", "a", "--app-dir", str(site.folder))
    assert "-    price = 1\n+    price = 2\n" in difference
    site.deploy({"helpers.py": ""}, "shop.trips")
    site("code", "migrate", "a")
    site("resume", "a", "r", "--value", "5")
    site("resume", "b", "r", "--value", "6")
    site.until(lambda: len(site.records("workflow-result")) == 2)
    assert site.records("workflow-result") == ['0 a ["moved",5]', '1 b ["old",6]']
    listed = site("code", "list")
    assert listed.count("shop.trips") == 2
    assert "shop.broken" in listed
    rows = json.loads(site("code", "list", "--json"))
    assert [(row["instances"], row["ids"]) for row in rows if row["module"] == "shop.broken"] == [(1, ["c"])]
    assert {len(row["version"]) for row in rows} == {64} and None not in [row["stored"] for row in rows]
    assert "0 of 6 versions" in site("code", "gc")
    assert "at least 2 days" in site("code", "gc", "--older-than", "1", code=2)


WRONG = HEAD + "import threading\n\ndef main(opts):\n    got = yield kw.suspend('r')\n    lock = threading.Lock()\n    yield kw.suspend('s')\n    return [got, opts]\n"
RIGHT = HEAD + "\ndef main(opts):\n    if opts:\n        got = yield kw.suspend('r')\n        got += 1\n    yield kw.suspend('s')\n    return [got, opts]\n"


@pytest.mark.slow
def test_a_bug_is_fixed_under_the_instances_that_wait_in_it_parked_or_not(site: Deployments) -> None:
    """G10, decision 0061: `engine --check`, `code migrate --in-place`."""
    site.deploy({"trips.py": WRONG}, "shop.trips")
    for id in ("parked", "waits", "elsewhere"):
        site("start", id, "--input", '"opts"')
    site("resume", "parked", "r", "--value", "5")
    site.until(lambda: "UnsavableError" in site("dead-letters", "list"))
    site.stop()
    (site.folder / "shop/trips.py").write_text(RIGHT)
    said = site("engine", "--check", "shop.trips", "--app-dir", str(site.folder))
    assert "2 waiting: 0 resume on this code, 2 stay on old code, 0 would be parked" in said
    assert "is parked: parked  UnsavableError; can be migrated in place (main line 5 -> 5)" in said
    assert "stay on old code: waits  shop.trips: main has changed; can be migrated in place (main line 5 -> 5)" in said
    site.deploy({"trips.py": RIGHT}, "shop.trips")
    assert "; it runs old code (shop.trips@" in site("dead-letters", "retry", "parked", code=1)
    assert "kwflow code migrate parked --in-place moves it onto the engine's" in " ".join(site("dead-letters", "list", "--json").split())
    assert json.loads(site("code", "migrate", "elsewhere", "--in-place", "--json").splitlines()[0]) == {"id": "elsewhere", "status": "ok"}
    site("code", "migrate", "--all", "--in-place")
    for id in ("parked", "waits", "elsewhere"):
        site("resume", id, "r", "--value", "7")
        site("resume", id, "s")
    site.until(lambda: len(site.records("workflow-result")) == 3)
    assert site.records("workflow-result") == ['0 parked [6,"opts"]', '1 waits [8,"opts"]', '2 elsewhere [8,"opts"]']
    site.deploy({"trips.py": RIGHT.replace("'r'", "'q'")}, "shop.trips")
    site("start", "late", "--input", "1")
    waits_for(site, "late", "q")
    site.deploy({"trips.py": RIGHT}, "shop.trips")
    said = site("engine", "--check", "shop.trips", "--app-dir", str(site.folder))
    assert "stay on old code: late  shop.trips: main has changed; not in place: shop.trips:main waits at line 5, `yield kw.suspend('q')`, and the new code has no such wait" in said
    assert "late: rejected: shop.trips:main waits at line 5" in site("code", "migrate", "--all", "--in-place", code=1)


def test_a_move_that_no_engine_answers_says_once_how_to_repeat_it(site: Deployments) -> None:
    """M1.4."""
    site.deploy({"trips.py": RIGHT}, "shop.trips")
    site("start", "a", "--input", "1")
    waits_for(site, "a", "r")
    site.stop()
    said = site("code", "migrate", "a", "--in-place", "--command-id", "m-1", "--command-timeout", "0.3", code=3)
    assert said.count("repeat") == 1
    assert "migrate of a: no reply within 0.3 s; perhaps no engine is running; at least 0 of 1 are done; repeat with --command-id m-1, which does nothing twice" in said


MIGRATING = """
import kwflow as kw
kw.declare_topics('out')

@kw.workflow(name='trips', park_on_error=True)
def main(opts):
    yield kw.suspend('r')

@kw.migrate(from_='shop.trips:main')
def move(old):
    return after(old.locals['opts'], old.refs['r']), ['r']

def after(opts, r):
    print('tried')
    kw.output('x', 'out')
    if not opts:
        raise ValueError(opts)
    yield r
    return 10 / opts

@kw.migrate(from_='shop.trips:mian')
def moves_nobody(old): ...

@kw.migrate(from_='shop.tirps:main')
def moves_nobody_either(old): ...

@kw.migrate(from_='shop.trips:main@0123456789ab')
def moves_nobody_at_all(old): ...
"""


@pytest.mark.slow
def test_migrations_are_tried_on_copies_and_change_nothing(site: Deployments) -> None:
    """G10: `engine --check --migrations`. Whether one would fail was known once it had parked an instance."""
    site.deploy({"trips.py": WRONG}, "shop.trips")
    for id, opts in (("good", "5"), ("parked", "5"), ("again", '"x"'), ("paused", "5"), ("bad", "[]")):
        site("start", id, "--input", opts)
    for id in ("parked", "again"):
        site("resume", id, "r", "--value", "7")
    site("pause", "paused")
    site.until(lambda: len(json.loads(site("dead-letters", "list", "--json"))) == 2)
    site.stop()
    before = [site.stored(id) for id in ("good", "parked", "again", "paused", "bad")]
    check = "engine", "--check", "shop.trips", "--app-dir", str(site.folder)
    (site.folder / "shop/trips.py").write_text(MIGRATING)
    said = site(*check)
    assert "tried" not in said and "a migration is there" in said
    assert "@kw.migrate(from_='shop.trips:mian'): no stored version has shop.trips:mian (did you mean main?)" in said
    assert "@kw.migrate(from_='shop.tirps:main'): no version of shop.tirps is stored (did you mean shop.trips?)" in said
    assert "@kw.migrate(from_='shop.trips:main@0123456789ab'): no stored version of shop.trips is 0123456789ab; there are " in said
    assert said.count("@kw.migrate(") == 3
    said = site(*check, "--migrations", code=1)
    assert "tried" in said and "3 would be migrated by @kw.migrate, 2 would not" in said
    line = MIGRATING.splitlines().index("    yield r") + 1
    for id in ("good", "paused"):
        assert f"would be migrated: {id}  then it waits in after (shop/trips.py:{line})" in said
    assert "would be migrated: parked  then it ends" in said
    assert f"would not be migrated: bad  UncaughtError: ValueError: [] in after (shop/trips.py:{line - 1})" in said
    assert "would not be migrated: again  then it is parked: UncaughtError: TypeError: " in said
    assert [site.stored(id) for id in ("good", "parked", "again", "paused", "bad")] == before
    assert site.records("out") == []
    assert "--migrations is for --check" in site("engine", "shop.trips", "--migrations", code=2)


class Ago:
    """A clock that is this many days behind."""

    def __init__(self, days: float) -> None:
        self.days = days

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 - round(self.days * 86_400_000)


@pytest.mark.slow
def test_gc_removes_what_no_instance_runs_and_nobody_has_used_for_days_with_what_it_imports_kept(site: Deployments) -> None:
    """Wire §4: entries are removed only by gc."""
    site.deploy({"trips.py": NEW}, "shop.trips")
    site("start", "w")
    waits_for(site, "w", "r")
    site.stop()
    topic = Config().code_topic
    held = Embedded(site.directory, clock=Ago(30))
    [entry] = [record for record in held.read(topic) if (record.key or b"").startswith(b"shop.trips@")]
    stored = json.loads(entry.value or b"")
    held.append(topic, entry.key, json.dumps({**stored, "imports": {"shop.kept": "1" * 64}}).encode())
    for name in ("shop.kept", "shop.gone"):
        held.append(topic, f"{name}@{'1' * 64}".encode(), b'{"source": "", "file": "", "package": false, "imports": {}}')
    held.close()
    assert "would remove shop.gone@111111111111\n1 of" in site("code", "gc", "--dry-run")
    assert "removed shop.gone@111111111111\n1 of" in site("code", "gc")
    assert "shop.gone" not in site("code", "list")
    assert "shop.kept" in site("code", "list")
    held = Embedded(site.directory)
    before = len(held.read(topic))
    assert held.compact(topic) == 3, "one entry that was written again, one that is gone and what says so"
    assert len(held.read(topic)) == before - 3
    held.close()


def test_gc_keeps_what_an_engine_begins_to_run_while_it_looks_at_the_instances(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: looking at a million instances takes long. A rollback meanwhile writes its source again, in the transaction of the first snapshot that names it."""
    topic, snapshots = Config().code_topic, code.all_snapshots

    def written(ago: float) -> None:
        held = Embedded(tmp_path, clock=Ago(ago))
        held.append(topic, b"shop.trips@" + b"1" * 64, b'{"source": "", "file": "", "package": false, "imports": {}}')
        held.close()

    def look(settings: Config, embedded: pathlib.Path | None) -> dict[bytes, bytes]:
        found = snapshots(settings, embedded)
        written(0)
        return found

    written(30)
    monkeypatch.setattr(code, "all_snapshots", look)
    assert "0 of 1 versions" in CliRunner().invoke(app, ["code", "gc", "--embedded", str(tmp_path)]).output


def test_an_instance_is_saved_with_its_code_and_goes_on_in_a_test(site: Deployments) -> None:
    """ARCHITECTURE §1: a saved instance can be copied. The package need not be installed there."""
    site.deploy({"flows.py": OLD, "helpers.py": "def help_():\n    return 'helped'\n"}, "shop.flows")
    site("start", "a", "--input", "5")
    waits_for(site, "a", "r")
    site("resume", "a", "r", "--value", "7")
    waits_for(site, "a", "s")
    site("show", "a", "--save", str(site.folder / "a.json"))
    assert (site.folder / "a.json").stat().st_mode & 0o777 == 0o600
    before = site.stored("a")
    tester = WorkflowTester(lambda opts: opts)
    assert (tester.load(site.folder / "a.json"), tester.waits("a")) == ("a", ["s"])
    tester.resume("a", "s")
    assert tester.result("a") == ["old", 7, "helped"]
    assert site.stored("a") == before
    mended = durable.load_source("shop.flows", HEAD + "def main(opts, got, s):\n    return ['moved', got, (yield s)]\n" + MOVES)  # deployed, and tried with what waits there
    try:
        tester = WorkflowTester(mended.main)
        tester.load(site.folder / "a.json")
        assert tester.command("a", "migrate")["status"] == "ok"
        tester.resume("a", "s", 8)
        assert tester.result("a") == ["moved", 7, 8]
    finally:
        declarations._migrations.clear()
    site("terminate", "a")
    assert "is not waiting: it has ended" in site("show", "a", "--save", str(site.folder / "b.json"), code=2)
    assert not (site.folder / "b.json").exists()


def test_activities_of_what_is_loaded_can_be_faked_before_it_calls_one(site: Deployments) -> None:
    """Without the package nobody knew their names, and the first step really called them."""
    body = "@kw.activity\ndef charge_once(n: int) -> str:\n    raise AssertionError('called')\n\ndef main(opts):\n    yield kw.suspend('r')\n    return (yield charge_once(opts))\n"
    site.deploy({"flows.py": HEAD + body}, "shop.flows")
    site("start", "a", "--input", "5")
    waits_for(site, "a", "r")
    site("show", "a", "--save", str(site.folder / "a.json"))
    tester = WorkflowTester(lambda opts: opts)
    tester.load(site.folder / "a.json")
    tester.fake("charge_once", lambda n: f"faked {n}")
    tester.resume("a", "r")
    assert tester.result("a") == "faked 5"


def test_what_is_saved_paused_stays_so_and_its_timers_are_due_when_they_were(site: Deployments) -> None:
    site.deploy({"flows.py": HEAD + "\ndef main(opts):\n    yield kw.all([kw.suspend('r'), kw.sleep(3600)])\n    yield kw.suspend('s')\n"}, "shop.flows")
    site("start", "a")
    waits_for(site, "a", "r")
    site("pause", "a")
    site("show", "a", "--save", str(site.folder / "a.json"))
    tester = WorkflowTester(lambda opts: opts)
    tester.load(site.folder / "a.json")
    assert tester.header("a")["parked"]["reason"] == "paused"
    tester.resume("a", "r")
    assert len(tester.waits("a")) == 2
    tester.command("a", "unpause")
    tester.advance(3590)
    assert len(tester.waits("a")) == 1
    tester.advance(10)
    assert tester.waits("a") == ["s"]


def test_what_is_saved_parked_has_what_it_holds_and_is_moved_and_goes_on_as_in_an_engine(site: Deployments) -> None:
    """Decision 0061: the fix can be tried with the very records that wait for it. Ids of waits that the test makes are not those of the engine's."""
    sleeps = WRONG.replace("    yield kw.suspend('s')", "    yield kw.all([kw.suspend('s'), kw.sleep(60)])")
    site.deploy({"flows.py": sleeps}, "shop.flows")
    site("start", "a", "--input", "5")
    site("resume", "a", "r", "--value", "7")
    site("resume", "a", "s", "--value", "1")
    site.until(lambda: [row["holds"] for row in json.loads(site("dead-letters", "list", "--json"))] == [2])
    site("show", "a", "--save", str(site.folder / "a.json"))
    right = durable.load_source("shop.flows", sleeps.replace("threading.Lock()", "None"))
    tester = WorkflowTester(right.main)
    tester.start("other", 1)
    assert (tester.load(site.folder / "a.json"), tester.header("a")["parked"]["reason"], tester.waits("a")) == ("a", "UnsavableError", ["r"])
    tester.command("a", "retry")
    assert tester.header("a")["status"] == "parked"
    assert tester.command("a", "migrate", {"in_place": True})["status"] == "ok"
    [timer] = tester.waits("a")
    assert timer.partition(":")[0] == str(json.loads(site("show", "a", "--json"))["parked"]["offset"])
    tester.advance(60)
    assert tester.result("a") == [7, 5]


def test_a_start_that_failed_is_saved_and_can_be_retried_on_other_code(site: Deployments) -> None:
    text = HEAD + "\ndef main(opts):\n    with open('/dev/null') as held:\n        yield kw.suspend('r')\n    return opts\n"
    site.deploy({"flows.py": text}, "shop.flows")
    site("start", "a", "--input", "5", "--workflow", "flows")
    site.until(lambda: "UnsavableError" in site("dead-letters", "list"))
    site("show", "a", "--save", str(site.folder / "a.json"))
    tester = WorkflowTester(flows=durable.load_source("shop.flows", text.replace("with open('/dev/null') as held", "if opts")).main)
    tester.load(site.folder / "a.json")
    tester.command("a", "retry")
    tester.resume("a", "r")
    assert tester.result("a") == 5


@pytest.mark.parametrize("text", ["", "KWF1", "{}", '{"snapshot": "AAAA", "sources": {}}', '{"snapshot": "S1dGMQ==", "sources": []}', '{"snapshot": "", "sources": {}, "hold": [1]}', "\xff"])
def test_a_file_that_is_none_of_ours_is_named(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=re.escape(f"{file} is not what `kwflow show ID --save FILE` writes, or was changed since: ")):
        WorkflowTester(lambda opts: opts).load(file)


def test_a_file_from_before_holds_were_saved_is_read(site: Deployments) -> None:
    site.deploy({"flows.py": RIGHT}, "shop.flows")
    site("start", "a", "--input", "5")
    waits_for(site, "a", "r")
    site("show", "a", "--save", str(site.folder / "a.json"))
    saved = json.loads((site.folder / "a.json").read_text())
    assert saved.pop("hold") == []
    (site.folder / "a.json").write_text(json.dumps(saved))
    tester = WorkflowTester(lambda opts: opts)
    tester.load(site.folder / "a.json")
    assert tester.waits("a") == ["r"]
