"""Signed snapshots: only what one of the application's keys signed is ever unpickled. Everything else parks its instance and waits for a key."""

import hashlib
import hmac
import json
import pathlib
import pickle
import struct
import subprocess
import sys
import time
from typing import Any

import pytest
from pydantic import ValidationError

from kwflow import durable
from kwflow.config import Config, load_config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.wire import Record
from kwflow.errors import CorruptSnapshotError, UsageError
from kwflow.ports import Decision
from kwflow.runners import code, deployment
from kwflow.runners import parked as parking
from kwflow.runners.code import CodeStore
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore

ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32
BY_NONE = "but no key of snapshot_keys signed it"
SOURCE = """
import kwflow as kw

def main(opts):
    total = opts
    while True:
        total += yield kw.suspend("more")
        if total > 100:
            return total
"""
RAN: list[str] = []


class Bomb:
    """Reports that it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("unpickled",)


class Engine:
    """Engines on the same store, one after another, each with its own keys."""

    def __init__(self, store: MemoryStore, offset: int, *keys: str, **more: Any) -> None:
        module = durable.load_source("signing", SOURCE, "signing.py")
        self.processor = WorkflowProcessor(Config(snapshot_keys=list(keys), **more), Workflows({"main": module.main}, "main"), frozenset())
        self.store = store
        self.offset = offset

    def send(self, value: bytes, *headers: tuple[str, bytes | None]) -> Decision:
        overlay = Overlay(self.store)
        self.offset += 1
        (made,) = self.processor.decide(overlay, [Record("workflow-resume", 0, self.offset, 0, b"a", value, headers)], 0)
        self.store.apply(overlay.changes)
        return made


def parked(store: MemoryStore) -> str:
    """The reason."""
    return str(snapshot.read_header(store.entries[b"a"])["parked"]["message"])


@pytest.mark.parametrize(("before", "after", "why"), [((), (ONE,), "not signed"), ((TWO,), (ONE,), BY_NONE), ((ONE,), (), BY_NONE), ((ONE,), (TWO, THREE), BY_NONE)])
def test_what_no_key_of_ours_signed_is_parked_and_goes_on_once_its_key_is_there(before: tuple[str, ...], after: tuple[str, ...], why: str) -> None:
    """G4, and the way out of G10: nothing is lost, and a retry with the right keys drains the hold."""
    store = MemoryStore()
    assert Engine(store, 0, *before).send(b"new:1").counts == ("started",)
    engine = Engine(store, 10, *after)
    assert engine.send(b'{"ref":"more","value":1}').counts == ("parked",)
    assert why in parked(store)
    (not_forked,) = engine.send(b"null", ("kwflow-op", b"fork")).logs
    assert not_forked.startswith("a: not forked: the snapshot ") and why in not_forked
    assert engine.send(b'{"ref":"more","value":200}').counts == ("held",)
    assert engine.send(b"null", ("kwflow-op", b"retry")).counts == ("retried", "parked", "held")
    if before and after:
        repaired = Engine(store, 20, *after, *before)  # the wrapper was signed with a new key, its content with the old one
        made = repaired.send(b"null", ("kwflow-op", b"retry"))
        assert made.counts == ("retried", "resumed", "resumed")
        assert made.outputs[-1].value == b"202"


def test_the_first_key_signs_and_all_are_accepted_so_that_keys_can_be_rotated() -> None:
    store = MemoryStore()
    Engine(store, 0, ONE).send(b"new:1")
    rotated = Engine(store, 10, TWO, ONE)
    assert rotated.send(b'{"ref":"more","value":1}').counts == ("resumed",)
    assert snapshot.seal_of(store.entries[b"a"], [TWO.encode()]).startswith("verified with key ")
    assert Engine(store, 20, TWO).send(b'{"ref":"more","value":200}').outputs[-1].value == b"202"


def test_whatever_a_record_or_a_command_leaves_of_an_instance_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, a paused, draining or parked instance, one that is both, and what stays after the end. Otherwise the next record would park it."""
    monkeypatch.setattr(parking, "DRAINED_MAX", 1)
    store, more, start = MemoryStore(), b'{"ref":"more","value":1}', (b"new:1", ("kwflow-start-id", b"mine"))
    engine = Engine(store, 0, ONE)

    def leaves(status: str) -> None:
        assert snapshot.read_header(store.entries[b"a"])["status"] == status
        assert snapshot.seal_of(store.entries[b"a"], [ONE.encode()]).startswith("verified")

    def command(op: bytes, status: str) -> None:
        assert engine.send(b"null", ("kwflow-op", op), ("kwflow-id", b"%s at %d" % (op, engine.offset))).counts
        leaves(status)

    engine.send(*start)
    leaves("waiting")
    command(b"fork", "waiting")
    (copy,) = [value for key, value in store.entries.items() if key.startswith(b"a/fork-")]
    assert snapshot.seal_of(copy, [ONE.encode()]).startswith("verified")
    command(b"pause", "parked")
    for _ in range(2):
        engine.send(more)
        leaves("parked")
    command(b"unpause", "parked")  # half of what it holds is then applied
    command(b"retry", "waiting")
    overlay = Overlay(store)
    engine.processor.refuse(overlay, Record("workflow-resume", 0, engine.offset, 0, b"a", more), "it is too much")
    store.apply(overlay.changes)
    leaves("parked")
    for op, status in ((b"pause", "parked"), (b"unpause", "parked"), (b"discard", "waiting")):
        command(op, status)
    assert engine.send(b'{"ref":"more","value":200}').outputs[-1].value == b"203"
    leaves("ended")
    assert engine.send(*start).counts == ("duplicate-start",)


def test_the_code_of_one_whose_key_is_missing_is_still_in_use() -> None:
    """G10: otherwise `kwflow code gc` would remove what its retry needs once the key is there."""
    store = MemoryStore()
    Engine(store, 0, ONE).send(b"new:1")
    running = deployment.versions_in(store.entries)
    assert Engine(store, 10, TWO).send(b'{"ref":"more","value":1}').counts == ("parked",)
    assert deployment.versions_in(store.entries) == running != {}


def test_keys_are_introduced_while_unsigned_instances_wait() -> None:
    """They go on, and are signed when they are saved. Those that were parked for it go on with a retry. Then nothing unsigned is left."""
    store = MemoryStore()
    Engine(store, 0).send(b"new:1")
    assert Engine(store, 10, ONE).send(b'{"ref":"more","value":1}').counts == ("parked",)
    introduced = Engine(store, 20, ONE, snapshot_unsigned="accept")
    assert introduced.send(b"null", ("kwflow-op", b"retry")).counts == ("retried", "resumed")
    assert snapshot.seal_of(store.entries[b"a"], [ONE.encode()]).startswith("verified with key ")
    other = MemoryStore()
    Engine(other, 0).send(b"new:1")
    assert Engine(other, 10, ONE, snapshot_unsigned="accept").send(b'{"ref":"more","value":1}').counts == ("resumed",)
    waiting = MemoryStore()
    Engine(waiting, 0).send(b"new:1")
    patient = Engine(waiting, 10, ONE, snapshot_unsigned="accept")
    patient.send(b"null", ("kwflow-op", b"pause"))
    patient.send(b"null", ("kwflow-op", b"unpause"))
    for closed, total in ((store, b"202"), (other, b"202"), (waiting, b"201")):
        assert Engine(closed, 30, ONE).send(b'{"ref":"more","value":200}').outputs[-1].value == total


def test_what_an_engine_without_keys_has_parked_goes_on_once_it_has_them() -> None:
    """G4: keys are given to one engine after the other, and an instance has come to one that had none yet. A header that it could not sign is taken off by a retry."""
    store = MemoryStore()
    Engine(store, 0, ONE).send(b"new:1")
    assert Engine(store, 10).send(b'{"ref":"more","value":1}').counts == ("parked",)
    all_have_it = Engine(store, 20, ONE)
    assert all_have_it.send(b'{"ref":"more","value":100}').counts == ("held",)
    made = all_have_it.send(b"null", ("kwflow-op", b"retry"))
    assert (made.counts, made.outputs[-1].value) == (("retried", "resumed", "resumed"), b"102")


@pytest.mark.parametrize("body", [b"", b"no snapshot", pickle.dumps(Bomb())])
@pytest.mark.parametrize("more", [{}, {"parent": "p|1:1", "client": "c"}, {"id": 7}, {"parked": {"was": "damaged", "reason": 7}}, {"parked": "damaged"}, {"status": "ended"}])
def test_an_unsigned_header_around_something_unread_is_not_believed(body: bytes, more: dict[str, Any]) -> None:
    """It parks its instance at most, and what it is around is not unpickled."""
    forged = snapshot.copy(body, {"v": 1, "id": "a", "workflow": "main", "status": "parked", "waits": [], "parked": {"was": "damaged", "reason": "r", "message": "m", "offset": 1}, **more})
    store, before = MemoryStore(), len(RAN)
    store.entries[b"a"] = forged
    engine = Engine(store, 10, ONE)
    assert engine.send(b'{"ref":"more","value":1}').counts in (("held",), ("parked",))
    for op in (b"pause", b"unpause", b"retry", b"discard", b"fork", b"migrate", b"query"):
        assert not {output.topic for output in engine.send(b"null", ("kwflow-op", op)).outputs} - {"workflow-engine-dead-letter"}, op
    ended = engine.send(b"null", ("kwflow-op", b"terminate"))
    assert not [output for output in ended.outputs if output.key in (b"p", b"c")] and len(RAN) == before


def test_where_unsigned_ones_are_accepted_wrongly_signed_ones_are_not() -> None:
    """The marker that accepts unsigned ones is not a key, either."""
    keys = Config(snapshot_keys=[ONE], snapshot_unsigned="accept").signing_keys
    assert keys == (ONE.encode(), snapshot.UNSIGNED)
    for key, name in ((b"guess" * 8, ONE.encode()), (b"", b""), (TWO.encode(), TWO.encode())):
        with pytest.raises(CorruptSnapshotError):
            snapshot.split(forge({"key": snapshot.key_id(name)}, key), keys)
    assert snapshot.seal_of(forge({"key": snapshot.key_id(b"")}, b""), keys).startswith("not verified")
    entries = [code._signature(b"", b"m@1", b"{}"), code._signature(TWO.encode(), b"m@1", b"{}"), None]
    records = [Record("code", 0, number, 0, f"m@{number}".encode(), b"{}" + (code._SEAL + digest if digest else b"")) for number, digest in enumerate(entries)]
    assert list(CodeStore(lambda _: records, keys).entries) == ["m@2"]
    assert list(CodeStore(lambda _: records, keys[:1]).entries) == []


def forge(header: dict[str, Any], key: bytes | None) -> bytes:
    """Bytes of a snapshot whose body runs code when it is unpickled."""
    text = json.dumps({"v": 1, "id": "a", "workflow": "main", "status": "waiting", "start_id": "", "created": 0, "updated": 0, "waits": [], **header}).encode()
    data = b"KWF1" + struct.pack(">I", len(text)) + text + pickle.dumps(Bomb())
    return data + (hashlib.sha256(data).digest() if key is None else hmac.digest(key, data, "sha256"))


@pytest.mark.parametrize(
    "forged",
    [
        forge({}, None),
        forge({"key": snapshot.key_id(ONE.encode())}, b"guess" * 8),
        forge({"key": "00000000"}, ONE.encode()),
        forge({"key": 1}, ONE.encode()),
        forge({"status": "parked", "parked": {"was": "waiting"}}, None),
    ],
    ids=["plain checksum", "wrong key", "another key's name", "no name", "says that it is parked"],
)
def test_a_forged_snapshot_is_never_unpickled(forged: bytes) -> None:
    """Where keys are set, the checksum proves nothing, because anybody can compute it. Unpickling is never tried to find out."""
    RAN.clear()
    store = MemoryStore()
    store.entries[b"a"] = forged
    engine = Engine(store, 0, ONE)
    assert engine.send(b'{"ref":"more","value":1}').counts == ("parked",)
    engine.send(b"null", ("kwflow-op", b"retry"))
    assert RAN == []
    with pytest.raises(CorruptSnapshotError):
        snapshot.load(forged, keys=[ONE.encode()])
    assert RAN == []


def test_nothing_that_a_forged_header_says_is_told_or_acted_on() -> None:
    """Commands run on headers alone. A forged header is damaged: whoever it names is not told of its end."""
    waits = [{"ref": "0:1", "kind": "timer", "since": 0}, {"ref": "0:2", "kind": "child", "since": 0, "child": "victim", "workflow": "w", "policy": "terminate"}]
    for told in ({"ended": 0, "status": "ended", "ids": {"once": ["ok", "forged", None]}}, {"start_id": "theirs", "parent": "victim|0:1", "waits": waits, "status_value": "forged"}):
        store = MemoryStore()
        store.entries[b"a"] = forge(told, None)
        engine = Engine(store, 0, ONE)
        asked = (("kwflow-request", b"r"), ("kwflow-reply-to", b"0/p"), ("kwflow-id", b"once"))
        said = json.loads(engine.send(b"null", ("kwflow-op", b"query"), *asked).replies[0].value or b"")
        assert (said["status"], said["value"]["status"]) == ("ok", "damaged") and "forged" not in str(said) and "theirs" not in str(said)
        [output] = engine.send(b"null", ("kwflow-op", b"terminate"), *asked).outputs
        assert (output.topic, output.key, output.value) == ("workflow-error", b"a", b'"Terminated"')


def test_without_keys_too_nothing_but_the_listed_names_is_called_by_a_snapshot() -> None:
    """The allow list of the codec: a pickle that names anything else is refused."""
    RAN.clear()
    store = MemoryStore()
    store.entries[b"a"] = forge({}, None)
    assert Engine(store, 0).send(b'{"ref":"more","value":1}').counts == ("parked",)
    assert RAN == []


def test_one_bit_changed_anywhere_is_noticed() -> None:
    store = MemoryStore()
    Engine(store, 0, ONE).send(b"new:1")
    good = store.entries[b"a"]
    snapshot.split(good, [ONE.encode()])
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 4
        with pytest.raises(snapshot.SnapshotError):
            snapshot.split(bytes(bad), [ONE.encode()])


def test_a_snapshot_under_another_id_is_not_loaded() -> None:
    """A good signature says what the state is, not where it belongs."""
    store = MemoryStore()
    Engine(store, 0, ONE).send(b"new:1")
    moved = MemoryStore()
    moved.entries[b"b"] = store.entries[b"a"]
    engine = Engine(moved, 5, ONE)
    (made,) = engine.processor.decide(Overlay(moved), [Record("workflow-resume", 0, 9, 0, b"b", b'{"ref":"more","value":1}')], 0)
    assert made.counts == ("parked",) and "stored under another id" in made.logs[0]


def test_show_needs_no_key_and_says_what_the_header_is_worth(tmp_path: pathlib.Path) -> None:
    (tmp_path / "signing.py").write_text(SOURCE)
    command = [sys.executable, "-m", "kwflow"]
    keyed = {"KWFLOW_SNAPSHOT_KEYS": json.dumps([ONE]), "KWFLOW_EMBEDDED": str(tmp_path / "state")}
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}

    def kwflow(*arguments: str, **more: str) -> str:
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    running = subprocess.Popen([*command, "engine", "signing.py"], cwd=tmp_path, env={**environment, **keyed}, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None and "runs in" in running.stderr.readline()
    kwflow("start", "a", "--input", "1", **keyed)
    deadline = time.monotonic() + 30
    while "suspension more" not in kwflow("show", "a", **keyed):
        assert time.monotonic() < deadline
    running.terminate()
    running.communicate(timeout=60)
    bare = {"KWFLOW_EMBEDDED": keyed["KWFLOW_EMBEDDED"]}
    assert "(verified with key " in kwflow("show", "a", **keyed)
    assert "not verified" in kwflow("show", "a", **bare) and "suspension more" in kwflow("show", "a", **bare)
    assert "total = 1" in kwflow("show", "a", "--locals", **keyed)
    assert "no key of snapshot_keys" in kwflow("show", "a", "--locals", **bare)


def test_a_key_is_long_enough_and_never_shown(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValidationError):
        Config(snapshot_keys=[ONE, "1" * 31])
    (tmp_path / "kwflow.toml").write_text('[app]\nsnapshot_keys = ["short"]\n')
    with pytest.raises(UsageError, match="openssl rand") as caught:
        load_config(tmp_path / "kwflow.toml")
    assert "'short'" not in str(caught.value)
    assert ONE not in repr(Config(snapshot_keys=[ONE]))
