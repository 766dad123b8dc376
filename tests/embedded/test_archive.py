"""Archives (decision 0065): what a directory's workflows are, in one file, and a new directory in which they continue."""

import errno
import gzip
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

import kwflow as kw
from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.errors import TransportError, UsageError
from kwflow.runners import archive, parked
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.moving import bring, take
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.hosted import processors_of
from kwflow.runners.kafka.moving import _OpenCalls
from kwflow.runners.kafka.stopped import Stopped
from kwflow.runners.letters import letters_of, settle
from kwflow.testing.kafka import Broker, SimulatedEnvironment
from tests.embedded.shell import Shell

SOURCE = """
import kwflow as kw
from tests.embedded.test_archive import archive_case_pay

def main(o):
    seen = []
    note = lambda text: seen.append(text)
    while (said := (yield kw.wait_signal("say"))) != "end":
        note(said)
        if said == "pay":
            seen.append((yield archive_case_pay(1)))
        if said == "sleep":
            yield kw.sleep(60)
        if said == "lock":
            lock = __import__("threading").Lock()
            yield kw.suspend("r")
    return seen

main.kwflow_checkpoints = 5
"""
KEY, OTHER = "k" * 32, "o" * 32


@kw.activity(queue="archive-case")
def archive_case_pay(cents: int) -> str:
    return f"paid {cents}"


class Clock:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def now_ms(self) -> int:
        return self.ms


class Site:
    """An engine in a directory, of which the test makes every step."""

    def __init__(self, directory: pathlib.Path, clock: Clock, source: str = SOURCE, **config: Any) -> None:
        self.config = Config(**config)
        self.lines: list[str] = []
        self.closed = False
        self.clock = clock
        self.engine = Embedded(directory, self.config, sync=False, clock=clock)
        functions = {"main": durable.load_source("archived", source, "archived.py").main}
        self.processors = processors_of(self.engine, Workflows(functions, "main"), self.config, self.lines.append)

    def close(self) -> None:
        if not self.closed:
            self.engine.close()
        self.closed = True

    def work(self) -> None:
        while self.engine.step(self.processors, self.lines.append):
            pass

    def send(self, id: str, value: Any, op: str = "", work: bool = True, **headers: str) -> None:
        pairs = tuple((f"kwflow-{name.replace('_', '-')}", text.encode()) for name, text in ({"op": op} if op else {} | headers).items())
        self.engine.append(self.config.resume_topic, id.encode(), b"new:null" if value == "new" else msgspec.json.encode(value), pairs)
        if work:
            self.work()

    def say(self, id: str, text: str, work: bool = True) -> None:
        self.send(id, {"name": "say", "value": text}, "signal", work)

    def state(self) -> dict[bytes, bytes]:
        return dict(EmbeddedStore(self.engine.db, self.config.changelog_topic).scan(b""))

    def header(self, id: str) -> dict[str, Any]:
        return snapshot.read_header(self.state()[id.encode()])

    def results(self) -> dict[str, Any]:
        return {(record.key or b"").decode(): msgspec.json.decode(record.value or b"") for record in self.engine.read(self.config.result_topic)}


@pytest.fixture
def open_site(tmp_path: pathlib.Path) -> Iterator[Callable[..., Site]]:
    clock, opened = Clock(), list[Site]()

    def make(name: str = "from", **more: Any) -> Site:
        opened.append(Site(tmp_path / name, clock, **more))
        return opened[-1]

    yield make
    for site in opened:
        site.close()


def moved(site: Site, to: str = "to", **config: Any) -> Site:
    """The workflows of a site in a new one."""
    where = site.engine.directory
    site.close()
    path = where.with_name(f"{where.name}.kwflow")
    given = Config(**config)
    take(site.config, where, path)
    bring(given, path, where.with_name(to))
    return Site(where.with_name(to), site.clock, **config)


def test_all_that_waits_continues_in_the_new_directory(open_site: Callable[..., Site]) -> None:
    site = open_site()
    for id in ("talks", "sleeps", "pays", "parked", "paused", "late"):
        site.send(id, "new")
    site.send("done", "new", start_id="once")
    site.say("done", "end")
    site.say("talks", "a")
    site.say("sleeps", "sleep")
    site.say("pays", "pay")
    site.say("parked", "lock")
    site.say("parked", "held")
    site.send("paused", {"reason": "lunch"}, "pause")
    site.say("paused", "b")
    site.engine.append(site.config.resume_topic, b"talks", b"{")
    site.work()
    site.say("late", "c", work=False)
    before = {key: snapshot.read_header(data) if data.startswith(b"KWF1") else data for key, data in site.state().items() if not key.startswith(b"\0code\0")}
    site.close()
    path = site.engine.directory.with_name("x.kwflow")
    counts, left_out = take(site.config, site.engine.directory, path)
    assert left_out == []
    assert archive.described(counts) == (
        "6 instances, 2 parked or paused, 1 ended, 1 timers, 1 calls of activities, 1 records that are not applied yet, 1 open dead letters, 2 modules"
    )  # fmt: skip
    assert bring(site.config, path, path.with_name("to")) == counts
    new = open_site("to")
    after = {key: snapshot.read_header(data) if data.startswith(b"KWF1") else data for key, data in new.state().items() if not key.startswith((b"\0code\0", b"\0moves"))}
    assert after == before
    new.work()
    assert new.header("late")["checkpoints"] == [0, 1], "what was not applied there is applied here"
    new.send("done", "new", start_id="once")
    assert not new.results(), "it is known which run has ended"
    new.clock.ms += 60_001
    new.work()
    new.send("paused", None, "unpause")
    new.send("parked", None, "discard")
    for id in ("talks", "sleeps", "paused", "parked", "late"):
        new.say(id, "end")
    new.send("pays", {"ref": new.header("pays")["waits"][0]["ref"], "value": "paid"})
    new.say("pays", "end")
    assert new.results() == {"talks": ["a"], "sleeps": ["sleep"], "paused": ["b"], "late": ["c"], "parked": ["held"], "pays": ["pay", "paid"]}
    [letter] = [record for record in new.engine.read(new.config.dead_letter_topic) if dict(record.headers)["kwflow-error-reason"] == b"bad-json"]
    assert (letter.key, letter.value) == (b"talks", b"{")


def test_a_call_after_the_move_has_no_idempotency_key_of_before(open_site: Callable[..., Site]) -> None:
    """Decision 0064: offsets begin anew, in a directory that was moved twice, too."""
    site, keys = open_site(), list[str]()
    site.send("w", "new")
    for to in ("second", "third", "fourth"):
        site.say("w", "pay")
        keys += [wait["ref"] for wait in site.header("w")["waits"] if wait["kind"] == "activity"]
        site.send("w", {"ref": keys[-1], "value": "paid"})
        site = moved(site, to)
    site.say("w", "end")
    assert keys == ["1:1", "0:1000001", "0:2000001"]
    site.send("w", "new")
    site.say("w", "pay")
    assert site.header("w")["waits"][0]["ref"] == "2:3000001", "neither has that of a new run"
    site.close()


def test_an_instance_on_old_code_continues_on_it(open_site: Callable[..., Site]) -> None:
    """G10."""
    old = "import kwflow as kw\ndef main(o):\n    yield kw.suspend('r')\n    return 'old'\n"
    site = open_site(source=old)
    site.send("w", "new")
    site.close()
    take(site.config, site.engine.directory, site.engine.directory.with_name("x.kwflow"))
    bring(site.config, site.engine.directory.with_name("x.kwflow"), site.engine.directory.with_name("to"))
    new = open_site("to", source=old.replace("'old'", "'new'"))
    new.send("w", {"ref": "r", "value": None})
    assert new.results() == {"w": "old"}


def test_a_backup_is_of_one_moment_and_needs_no_engine_to_stop(open_site: Callable[..., Site]) -> None:
    site = open_site()
    for id in ("a", "b"):
        site.send(id, "new")
    path = site.engine.directory.with_name("x.kwflow")
    take(site.config, site.engine.directory, path)
    site.say("a", "end")
    bring(site.config, path, path.with_name("to"))
    new = open_site("to")
    assert (new.header("a")["status"], site.results()) == ("waiting", {"a": []})


@pytest.mark.parametrize("cut", [0, 1, 9, 40, 200, -30, -9, -1])
def test_a_file_that_is_not_whole_is_refused_before_anything_is_done(open_site: Callable[..., Site], cut: int) -> None:
    site = open_site()
    site.send("w", "new")
    path = site.engine.directory.with_name("x.kwflow")
    take(site.config, site.engine.directory, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"x\.kwflow (cannot be read|is not whole|is not an archive)"):
        bring(site.config, path, path.with_name("to"))
    assert not path.with_name("to").exists()


@pytest.mark.parametrize("damage", [lambda parts: parts[:-1], lambda parts: parts[:2] + parts[3:], lambda parts: [parts[0], *parts], lambda parts: [*parts, parts[1]], lambda parts: parts[1:]])
def test_a_file_from_which_a_part_is_missing_or_in_which_one_is_too_many_is_refused(open_site: Callable[..., Site], damage: Callable[[list[bytes]], list[bytes]]) -> None:
    site = open_site()
    site.send("w", "new")
    path = site.engine.directory.with_name("x.kwflow")
    take(site.config, site.engine.directory, path)
    data, parts = gzip.decompress(path.read_bytes()), list[bytes]()
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        parts.append(data[:end])
        data = data[end:]
    path.write_bytes(gzip.compress(b"".join(damage(parts))))
    with pytest.raises(UsageError, match=r"x\.kwflow is (damaged|not whole|not an archive)"):
        bring(site.config, path, path.with_name("to"))


def test_an_archive_of_a_later_version_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    head = msgspec.msgpack.encode(msgspec.structs.replace(archive.Head(2, "id", "app", "9.9", 0, False)))
    (tmp_path / "x").write_bytes(gzip.compress(len(head).to_bytes(4, "big") + head))
    with pytest.raises(UsageError, match=r"version 2, which kwflow .* does not know; it was written by 9\.9"):
        bring(Config(), tmp_path / "x", tmp_path / "to")


def test_an_import_that_was_killed_is_repeated_and_no_engine_starts_before(open_site: Callable[..., Site]) -> None:
    site = open_site()
    for id in ("a", "b"):
        site.send(id, "new")
    path = site.engine.directory.with_name("x.kwflow")
    to = path.with_name("to")
    take(site.config, site.engine.directory, path)
    script = f"""import os, pathlib
from kwflow.config import Config
from kwflow.runners.embedded import moving
moving._put = lambda *_: os.kill(os.getpid(), 9)
moving.bring(Config(), pathlib.Path({str(path)!r}), pathlib.Path({str(to)!r}))"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    for use in (lambda: open_site("to"), lambda: take(site.config, to, path.with_name("y.kwflow"))):
        with pytest.raises(TransportError, match="imported only in part; finish it with kwflow import, or remove the directory"):
            use()
    bring(site.config, path, to)
    assert {"a", "b"} == {key.decode() for key in open_site("to").state() if not key.startswith(b"\0")}


def test_an_import_goes_into_a_directory_that_is_there_whatever_it_is(open_site: Callable[..., Site], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted volume, a link, the current directory: none of them can be replaced by another directory."""
    site = open_site()
    site.send("w", "new")
    take(site.config, site.engine.directory, tmp_path / "x.kwflow")
    for name in ("there", "current"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "current")
    for where in (tmp_path / "link", pathlib.Path(), pathlib.Path("of/none/that/is/there")):
        before = where.stat().st_ino if where.exists() else None
        bring(site.config, tmp_path / "x.kwflow", where)
        assert before in (None, where.stat().st_ino)
        new = open_site(str(where.absolute()))
        assert new.header("w")["status"] == "waiting"
        with pytest.raises(UsageError, match="is not empty"):
            bring(site.config, tmp_path / "x.kwflow", where)
    with pytest.raises(UsageError, match=r"x\.kwflow is not a directory"):
        bring(site.config, tmp_path / "x.kwflow", tmp_path / "x.kwflow")


def test_an_import_beside_an_engine_or_another_import_is_refused(open_site: Callable[..., Site], tmp_path: pathlib.Path) -> None:
    site = open_site()
    site.send("w", "new")
    take(site.config, site.engine.directory, tmp_path / "x.kwflow")
    running = Embedded(tmp_path / "to", imports=True)
    with pytest.raises(TransportError, match="is held by another process"):
        bring(site.config, tmp_path / "x.kwflow", tmp_path / "to")
    running.close()
    bring(site.config, tmp_path / "x.kwflow", tmp_path / "to")


@pytest.mark.parametrize(("name", "why"), [("none/x", "No such file or directory"), ("n" * 255, "File name too long")])
def test_a_file_that_cannot_be_written_is_named(open_site: Callable[..., Site], tmp_path: pathlib.Path, name: str, why: str) -> None:
    site = open_site()
    site.send("w", "new")
    with pytest.raises(TransportError, match=f"{name} cannot be written: {why}"):
        take(site.config, site.engine.directory, tmp_path / name)


def test_an_archive_is_written_where_files_have_no_links(open_site: Callable[..., Site], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT, and some directories that containers share with their host."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    site = open_site()
    site.send("w", "new")
    monkeypatch.setattr(os, "link", refused)
    take(site.config, site.engine.directory, tmp_path / "x.kwflow")
    assert [path.name for path in tmp_path.glob("x.*")] == ["x.kwflow"]
    bring(site.config, tmp_path / "x.kwflow", tmp_path / "to")


@pytest.mark.parametrize("part", [
    ["entry", "resume", b"w", b"x"], ["entry", "other", b"w", b"x"], ["sent", "state", b"w", b"x", [], 0], ["sent", "resume", b"w", b"x", [], 1 << 63], ["entry", "state", "w", b"x"], ["none"], 5, {},
    b"\x95\xa5entry\xa5state\xc4\x01w\xc4\x01x" + b"\x91" * 100_000,
])  # fmt: skip
def test_a_forged_archive_is_refused_before_anything_is_done(tmp_path: pathlib.Path, part: Any) -> None:
    head = archive.Head(1, "id", "workflow", "0.2.0", 0, False)
    parts = [msgspec.msgpack.encode(head), part if isinstance(part, bytes) else msgspec.msgpack.encode(part), msgspec.msgpack.encode(["end", {"parts": 1}, 0])]
    (tmp_path / "x").write_bytes(gzip.compress(b"".join(len(part).to_bytes(4, "big") + part for part in parts)))
    with pytest.raises(UsageError, match="is not an archive of kwflow, or is damaged"):
        bring(Config(), tmp_path / "x", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_letter_that_is_retried_after_the_move_goes_where_the_topics_have_other_names(open_site: Callable[..., Site]) -> None:
    """G3: it was sent to the topic of before, which nobody reads, or the application of before."""
    site = open_site(resume_topic="old-resume", scheduler_topic="old-scheduler")
    site.send("w", "new")
    site.send("w", None, "pause")
    site.engine.append("old-resume", b"w", b"{", ())
    site.engine.append("old-resume", b"x", b"{", ())
    site.engine.append("old-scheduler", b"x|1", b"soon", ())
    site.work()
    new = moved(site)
    new.send("w", None, "unpause")
    new.close()
    assert len(list(settle(new.config, new.engine.directory, None, None, "retry"))) == 3
    again = open_site("to")
    again.work()
    reasons = [dict(letter.headers)["kwflow-error-reason"] for letter in letters_of(again.config, again.engine.directory).values()]
    assert sorted(reasons) == [b"bad-delay", b"bad-json", b"bad-json"]


@pytest.mark.parametrize("calls", [[{}], [{"ref": 1}]])
def test_calls_that_a_forged_header_has_do_not_end_an_export(open_site: Callable[..., Site], calls: Any) -> None:
    site = open_site()
    site.send("w", "new")
    site.say("w", "pay")
    [wait] = site.header("w")["waits"]
    forged = snapshot.amend(site.state()[b"w"], (), calls=calls, waits=[wait | {"kind": "job", "queue": "q"}])
    left_out: list[str] = []
    found = _OpenCalls(Stopped(site.config, SimulatedEnvironment(Broker())))
    found.see({b"w": forged})
    assert list(found.found([], left_out)) == []
    assert left_out == ["the call w|1:1 is no longer in q: its workflow waits for it until its timeout"]


@pytest.mark.parametrize(("before", "after", "why"), [
    ({"snapshot_keys": [KEY]}, {}, "signed with key"), ({"snapshot_keys": [KEY]}, {"snapshot_keys": [OTHER]}, "signed with key"), ({}, {"snapshot_keys": [KEY]}, "w is not signed"),
])  # fmt: skip
def test_snapshots_that_would_all_be_parked_for_their_signature_are_refused_before(open_site: Callable[..., Site], before: dict[str, Any], after: dict[str, Any], why: str) -> None:
    site = open_site(**before)
    site.send("w", "new")
    with pytest.raises(UsageError, match=f"1 snapshots in .* would be parked: .*{why}"):
        moved(site, **after)


@pytest.mark.parametrize(("before", "after"), [({"snapshot_keys": [KEY]}, {"snapshot_keys": [OTHER, KEY]}), ({}, {"snapshot_keys": [KEY], "snapshot_unsigned": "accept"})])
def test_with_the_keys_of_before_they_continue(open_site: Callable[..., Site], before: dict[str, Any], after: dict[str, Any]) -> None:
    site = open_site(**before)
    site.send("w", "new")
    new = moved(site, **after)
    new.say("w", "end")
    assert new.results() == {"w": []}
    new.close()


def test_with_encryption_keys_nobody_reads_it_without_them(open_site: Callable[..., Site]) -> None:
    """Decision 0060: of an application that encrypts what it gives to a broker, a file has no plain text either."""
    pytest.importorskip("cryptography")
    site, path = open_site(), open_site("other").engine.directory.with_name("x.kwflow")
    site.send("w", "new")
    site.say("w", "a secret")
    take(Config(encryption_keys=[KEY]), site.engine.directory, path)
    assert b"a secret" not in gzip.decompress(path.read_bytes())
    for config in (Config(), Config(encryption_keys=[OTHER])):
        with pytest.raises(UsageError, match="which is not in encryption_keys"):
            bring(config, path, path.with_name("to"))
    bring(Config(encryption_keys=[OTHER, KEY]), path, path.with_name("to"))
    new = open_site("to")
    new.say("w", "end")
    assert new.results() == {"w": ["a secret"]}


def test_an_entry_that_nobody_knows_is_named_and_left_out(open_site: Callable[..., Site]) -> None:
    site = open_site()
    site.send("w", "new")
    prefix = EmbeddedStore(site.engine.db, site.config.changelog_topic).prefix
    for key in (b"\0later\0w", b"\0dispatch\0"):
        site.engine.db[prefix + key] = b"x"
    counts, left_out = take(site.config, site.engine.directory, site.engine.directory.with_name("x.kwflow"))
    assert counts["instances"] == 1
    assert [line.partition(" is left out")[0] for line in left_out] == [r"an entry with the key b'\x00dispatch\x00'", r"an entry with the key b'\x00later\x00w'"]


def test_what_is_held_is_applied_after_a_move_and_what_follows_is_not_taken_for_repeated(open_site: Callable[..., Site]) -> None:
    """Decision 0064: its offset is larger than those that follow."""
    site = open_site()
    for number in range(20):
        site.send(f"other{number}", "new", work=False)
    site.send("w", "new")
    site.send("w", None, "pause")
    site.say("w", "held")
    new = moved(site)
    assert [parked.kept(key, value).offset for key, value in new.state().items() if key.startswith(parked.HOLD)] == [22]
    new.send("w", None, "unpause")
    new.say("w", "a")
    new.say("w", "end")
    assert new.results() == {"w": ["held", "a"]}
    new.close()


@pytest.mark.slow
def test_the_commands_say_what_they_did_and_refuse_what_would_overwrite_anything(shell: Shell, tmp_path: pathlib.Path) -> None:
    file, other = tmp_path / "x.kwflow", Shell(tmp_path / "other")
    (tmp_path / "flow.py").write_text("import kwflow as kw\ndef main(o):\n    return (yield kw.wait_signal('s'))\n")
    assert "holds no embedded engine" in shell("export", str(file), code=3)
    shell.engine("flow", "--app-dir", str(tmp_path))
    shell("start", "w")
    shell.until(lambda: "waiting" in shell("list"))
    said = shell("export", str(file))
    assert f"{file}: 1 instances, 1 modules" in said and "this is a backup of what was there just now" in said
    assert file.stat().st_mode & 0o777 == 0o600
    assert "exists; give the archive another name" in shell("export", str(file), code=2)
    assert "(is application_id right?)" in shell("export", str(tmp_path / "y"), "--application-id", "another", code=2)
    assert not (tmp_path / "y").exists() and not list(tmp_path.glob("*.part"))
    assert "is not empty" in shell("import", str(file), code=2)
    full = subprocess.run(["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *other.command("import", str(file))], capture_output=True, text=True, check=False)
    assert full.returncode == 1 and "File too large" in full.stderr, full.stderr
    assert f"{other.directory}: 1 instances, 1 modules" in other("import", str(file))
    shell.end()
    another = other.engine("flow", "--app-dir", str(tmp_path), "--application-id", "another")
    said = another.stderr.readline() if another.stderr is not None else ""
    assert "it leaves what belongs to the application workflow-engine alone: to continue that, start it with --application-id workflow-engine" in said
    another.terminate()
    assert another.wait(30) == 0
    other.engine("flow", "--app-dir", str(tmp_path))
    other("signal", "w", "s", "--value", "5")
    assert other("result", "w").strip() == "5"
    other.end()
