"""Bad input is applied, ignored by a stated rule, dead-lettered or parked; it is never lost and never fatal (G3, G4, KW-4..8)."""

import pathlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kwflow import api, durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.murmur2 import partition_of
from kwflow.core.values import LEVELS_MAX
from kwflow.core.wire import Output, Record
from kwflow.errors import UsageError
from kwflow.ports import Decision
from kwflow.runners import parked
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore, WorkflowTester
from tests.spec.test_signing import Engine

SOURCE = '''
import kwflow as kw
kw.declare_topics("out")
BROKEN = [True]

def main(opts):
    first = yield kw.suspend("first")
    handle = open(__file__) if BROKEN[0] and first == "unsavable" else None
    second = yield kw.suspend("second")
    kw.output(str(second), "out")
    return [first, second]

def undeclared(opts):
    kw.output("x", "nowhere")
    yield kw.suspend()
'''


@pytest.fixture
def engine(tmp_path: pathlib.Path) -> WorkflowTester:
    file = tmp_path / "bad_input.py"
    file.write_text(SOURCE)
    module = durable.load_source("bad_input", SOURCE, str(file))
    engine = WorkflowTester(module.main, undeclared=module.undeclared)
    engine.broken = module.BROKEN  # type: ignore[attr-defined]
    return engine


def test_values_as_deep_as_they_may_be_are_saved_and_written(engine: WorkflowTester) -> None:
    """G3: a deeper value parked its workflow, because the snapshot could not be made; how deep that was depended on the Python version."""
    engine.start("a")
    value: list[Any] = []
    for _ in range(LEVELS_MAX - 1):
        value = [value]
    engine.send("a", b'{"ref":"first","value":' + msgspec.json.encode(value) + b"}")
    assert engine.waits("a") == ["second"] and engine.header("a")["status"] == "waiting"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("a", b"{", "bad-json"),
        ("a", b"new:{", "bad-json"),
        ("a", b"", "bad-json"),
        ("a", b'{"ref":"first","value":' + b"[" * 300 + b"]" * 300 + b"}", "bad-json"),
        ("new", b"new:" + b'{"a":' * 300 + b"1" + b"}" * 300, "bad-json"),
        ("a", b"[1]", "bad-message"),
        ("a", None, "null-value"),
        (None, b"{}", "null-key"),
        ("a|b", b"{}", "bad-key"),
        ("", b"{}", "bad-key"),
    ],
)
def test_a_record_that_means_nothing_is_dead_lettered_and_the_next_one_is_processed(engine: WorkflowTester, key: str | None, value: bytes | None, reason: str) -> None:
    """KW-7, KW-8, G3."""
    engine.start("a")
    before = dict(engine.state.entries)
    engine.send(key, value)
    letter = next(output for output in engine.outputs if output.topic == "workflow-engine-dead-letter")
    assert dict(letter.headers)["kwflow-error-reason"] == reason.encode()
    assert (letter.key, letter.value) == (key.encode() if key is not None else None, value)
    assert engine.state.entries == before
    engine.resume("a", "first", 1)
    assert engine.waits("a") == ["second"]


def test_an_unknown_workflow_is_dead_lettered(engine: WorkflowTester) -> None:
    engine.start("a", None, workflow="nobody")
    assert "nobody" in dict(engine.outputs[-1].headers)["kwflow-error-message"].decode()


def test_an_undeclared_topic_raises_in_the_workflow_naming_it_and_the_remedy(engine: WorkflowTester) -> None:
    """KW-13."""
    engine.start("a", None, workflow="undeclared")
    assert "declare_topics('nowhere')" in engine.values("workflow-error")[0]


def test_an_instance_is_parked_whatever_its_error_says() -> None:
    """G4: the error is in headers. Half a surrogate pair in it ended the engine, and no broker accepts a very long one."""
    module = durable.load_source("says", """
import kwflow as kw
class Held:
    def __getstate__(self):
        raise ValueError("half \\ud800" + "x" * 100_000)
def main(o):
    held = Held()
    yield kw.suspend("r")
""")
    engine = WorkflowTester(module.main)
    engine.start("a")
    parked = (engine.header("a") or {})["parked"]
    assert (parked["reason"], len(parked["message"])) == ("UnsavableError", 10_000)
    assert "Held: half ?xxx" in parked["message"]


def test_no_topic_at_all_is_refused_also_where_outcomes_are_not_written() -> None:
    """KW-12: a topic that is turned off cannot be written to. The engine could not write the record, and ended."""
    module = durable.load_source("nowhere", "import kwflow as kw\ndef main(o):\n    kw.output('x', o)\n    yield kw.suspend('r')\n")
    processor = WorkflowProcessor(Config(result_topic=""), Workflows({"main": module.main}, "main"), frozenset())
    [made] = processor.decide(Overlay(MemoryStore()), [Record("workflow-resume", 0, 0, 1, b"w", b"new:null")], 1)
    [error] = made.outputs
    assert (error.topic, error.value) == ("workflow-error", b'"UsageError: topic None is not declared; write kw.declare_topics(None) at module level"')


def test_what_cannot_be_saved_parks_the_instance_naming_variable_function_place_and_type(engine: WorkflowTester) -> None:
    """G4, semantics §7."""
    engine.start("a")
    before = engine.state.get(b"a")
    engine.resume("a", "first", "unsavable")
    parked = (engine.header("a") or {})["parked"]
    assert parked["reason"] == "UnsavableError"
    for named in ("'handle'", "main", "bad_input.py:", "TextIOWrapper"):
        assert named in parked["message"]
    engine.resume("a", "second", 2)
    assert engine.counts[-1] == "held"
    assert before is not None
    engine.broken[0] = False  # type: ignore[attr-defined]
    engine.send("a", b"null", {"kwflow-op": "retry"})
    assert engine.result("a") == ["unsavable", 2]
    assert engine.ids() == []


def test_discard_drops_the_record_that_parked_it_and_applies_the_rest(engine: WorkflowTester) -> None:
    """Semantics §7."""
    engine.start("a")
    engine.resume("a", "first", "unsavable")
    engine.resume("a", "first", "fine")
    engine.send("a", b"null", {"kwflow-op": "discard"})
    engine.resume("a", "second", 2)
    assert engine.result("a") == ["fine", 2]


def test_a_record_on_another_partition_than_its_keys_is_forwarded_once_as_it_was() -> None:
    """K6: a record that is on the wrong partition even then, or has no key, is a dead letter; it must not circulate."""
    config, record = Config(), Record("workflow-resume", 0, 7, 1, b"w1", b"{}", (("mine", b"travels"),))
    home = partition_of(b"w1", 4)
    made = parked.forward(config, record, 4, 0)
    assert home != 0 and made.counts == ("forwarded",)
    assert made.outputs == (Output("workflow-resume", b"w1", b"{}", (("mine", b"travels"), ("kwflow-forwarded", b"0")), 1, home),)
    for wrong in (msgspec.structs.replace(record, headers=made.outputs[0].headers), msgspec.structs.replace(record, key=None)):
        made = parked.forward(config, wrong, 4, 0)
        assert made.counts == ("dead-letter",) and dict(made.outputs[0].headers)["kwflow-error-reason"] == b"wrong-partition"


def test_an_endless_loop_without_a_wait_is_logged_with_its_line_and_its_instance_is_parked() -> None:
    """K19: even if author code swallows everything."""
    source = "def main(opts):\n    while opts != 'fine':\n        try:\n            sum(range(100))\n        except BaseException:\n            pass\n    return 'ended'\n    yield\n"
    module = durable.load_source("endless", source.replace("pass", "break"), "endless.py")
    lines: list[str] = []
    config = Config(step_timeout_ms=50, step_abort_ms=200)
    processor = WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), "i", lines.append)
    store = MemoryStore()
    changes = Overlay(store)
    processor.decide(changes, [Record("workflow-resume", 0, 0, 1, b"a", b"new:1")], 1)
    store.apply(changes.changes)
    header = snapshot.read_header(store.entries[b"a"])
    assert header["parked"]["reason"] == "StepTimeout"
    assert "a: its step has been running for" in lines[0]
    assert "endless.py:" in lines[0]
    patient = WorkflowProcessor(Config(), Workflows({"main": module.main}, "main"), frozenset(), "i")  # a good step may take 200 ms on a busy machine
    [made] = patient.decide(Overlay(store), [Record("workflow-resume", 0, 1, 1, b"b", b'new:"fine"')], 1)
    assert made.outputs[-1].value == b'"ended"'


def test_a_long_hold_is_drained_in_bounded_transactions_and_what_arrives_meanwhile_joins_it(engine: WorkflowTester) -> None:
    """K17: exactly once and in order, each record with its own offset."""
    source = 'import kwflow as kw\ndef main(opts):\n    met = []\n    while len(met) < 1200:\n        met.append((yield kw.suspend("r")))\n    return met\n'
    module = durable.load_source("counting", source, "counting.py")
    store = MemoryStore()
    processor = WorkflowProcessor(Config(), Workflows({"main": module.main}, "main"), frozenset())
    offset = 0
    sizes: list[int] = []

    def send(value: bytes, headers: tuple[tuple[str, bytes | None], ...] = ()) -> Decision:
        nonlocal offset
        changes = Overlay(store)
        [made] = processor.decide(changes, [Record("workflow-resume", 0, offset, 1, b"c", value, headers)], 1)
        store.apply(changes.changes)
        offset += 1
        return made

    send(b"new:{}")
    good = store.entries[b"c"]
    store.entries[b"c"] = good[:-1] + b"?"  # damaged, and repaired later
    for n in range(1198):
        assert send(b'{"ref":"r","value":%d}' % n).counts[-1] in ("parked", "held")
    parked, hold = snapshot.split(store.entries[b"c"]), b'{"ref":"r","value":%d}'
    store.entries[b"c"] = snapshot.park(good, parked[0], "repaired", "by hand", 1)
    commands = [send(b"null", (("kwflow-op", b"retry"),))]
    late = 1198
    while (outputs := [output for output in commands[-1].outputs if output.topic == "workflow-resume"]) and late < 1210:
        sizes.append(commands[-1].counts.count("resumed"))
        assert send(hold % late).counts == ("held",), "it joins the hold"
        late += 1
        commands.append(send(outputs[0].value or b"", outputs[0].headers))
    sizes.append(commands[-1].counts.count("resumed"))
    assert sizes == [500, 500, 200]
    result = commands[-1].outputs[-1]
    assert result.value == msgspec.json.encode(list(range(1200)))
    assert store.entries == {}


@pytest.mark.parametrize("op", [b"retry", b"discard"])
def test_a_hold_keeps_its_order_on_a_partition_whose_offsets_begin_again(op: bytes) -> None:
    """G2, K17: after `kwflow topics migrate`, or with a topic that was recreated. Otherwise a discard would drop a record that has not failed."""
    source = """
import kwflow as kw
FAILS = [True]
def main(o):
    seen = []
    while len(seen) < 5:
        seen.append((yield kw.suspend("r")))
        if seen[-1] == "bad" and FAILS[0]:
            raise MemoryError
    return seen
"""
    module = durable.load_source("moved", source)
    config, store = Config(), MemoryStore()
    processor = WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), "topic")

    def send(partition: int, offset: int, value: bytes, *headers: tuple[str, bytes | None]) -> Decision:
        changes = Overlay(store)
        [made] = processor.decide(changes, [Record("workflow-resume", partition, offset, 1, b"w", value, headers)], 1)
        store.apply(changes.changes)
        return made

    def resume(partition: int, offset: int, value: str) -> tuple[str, ...]:
        return send(partition, offset, b'{"ref":"r","value":"%s"}' % value.encode()).counts

    send(0, 1000, b"new:null")
    assert [resume(0, 1001 + number, value)[0] for number, value in enumerate(("good", "bad", "first"))] == ["resumed", "parked", "held"]
    assert [resume(3, 0, "second"), resume(3, 1, "third")] == [("held",), ("held",)]
    assert send(3, 2, b"null", ("kwflow-op", b"retry")).counts == ("retried", "parked", "held", "held", "held"), "it goes back to where it was"
    module.FAILS[0] = op == b"discard"
    made = [send(3, 3, b"null", ("kwflow-op", op)), send(3, 4, b'{"ref":"r","value":"last"}')]
    [result] = [output.value for one in made for output in one.outputs]
    assert msgspec.json.decode(result or b"") == ["good", *(["bad"] if op == b"retry" else []), "first", "second", "third", *(["last"] if op == b"discard" else [])]


def test_in_the_middle_of_a_drain_a_discard_drops_nothing_until_the_log_has_refused_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """K11, K17: the next record has not failed yet. Once it has, the instance says so, and a discard is the way out."""
    monkeypatch.setattr(parked, "DRAINED_MAX", 1)
    store, more = MemoryStore(), b'{"ref":"more","value":1}'
    engine = Engine(store, 0)

    def refuse(value: bytes, *headers: tuple[str, bytes | None]) -> None:
        engine.offset += 1
        overlay = Overlay(store)
        assert "dead-letter" in str(engine.processor.refuse(overlay, Record("workflow-resume", 0, engine.offset, 0, b"a", value, headers), "too large").outputs)
        store.apply(overlay.changes)

    def command(op: bytes) -> None:
        assert engine.send(b"null", ("kwflow-op", op)).counts[0] != "not-parked"

    def said() -> str:
        return str((snapshot.read_header(store.entries[b"a"]).get("parked") or {}).get("reason"))

    engine.send(b"new:0")
    refuse(b'{"ref":"more","value":1000}')
    for _ in range(4):
        engine.send(more)
    command(b"discard")
    assert said() == "draining"
    command(b"discard")
    assert said() == "draining"
    refuse(b"null", ("kwflow-op", b"retry"))
    assert said() == "RefusedError"
    for op in (b"pause", b"query"):
        before = dict(store.entries)
        refuse(b"null", ("kwflow-op", op))
        assert store.entries == before, "of any other command nothing is done"
    for _ in range(3):
        command(b"discard" if said() == "RefusedError" else b"retry")
    assert said() == "None"
    before = dict(store.entries)
    refuse(b"null", ("kwflow-op", b"retry"))
    assert store.entries == before, "nor of one for what is not parked"
    for _ in range(2):
        refuse(more)  # even after it was parked twice, it is what it was before the first time
    command(b"discard")
    command(b"retry")
    assert (said(), snapshot.read_header(store.entries[b"a"])["status"]) == ("None", "waiting")
    assert engine.send(b'{"ref":"more","value":200}').outputs[-1].value == b"204"


def test_what_ended_in_the_middle_of_a_long_hold_is_known_to_the_rest_of_it(engine: WorkflowTester, monkeypatch: pytest.MonkeyPatch) -> None:
    """K17, K20: a start that its client repeated meanwhile does not begin a second run, and whoever comes too late is told so."""
    monkeypatch.setattr(parked, "DRAINED_MAX", 3)
    engine.start("a", **{"kwflow-start-id": "mine"})
    engine.resume("a", "first", "unsavable")
    engine.resume("a", "second", 2)
    for number in range(4):
        engine.start("a", **{"kwflow-start-id": "mine", "kwflow-request": f"again {number}", "kwflow-reply-to": "0/p"})
    engine.broken[0] = False  # type: ignore[attr-defined]
    engine.send("a", b"null", {"kwflow-op": "retry"})
    assert engine.values("workflow-result") == [["unsavable", 2]] and engine.counts.count("started") == 1
    assert [(engine.header("a") or {})[name] for name in ("status", "start_id")] == ["ended", "mine"]
    engine.start("a", **{"kwflow-start-id": "mine"})
    assert engine.counts.count("started") == 1


def test_what_ended_in_the_middle_of_a_long_hold_is_forgotten_in_its_time_and_terminated_writes_no_second_outcome(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K17, K20: its retention may end between two transactions of the drain, or an operator may act."""
    monkeypatch.setattr(parked, "DRAINED_MAX", 1)
    module = durable.load_source("bad_input", SOURCE, str(tmp_path / "bad_input.py"))
    (tmp_path / "bad_input.py").write_text(SOURCE)
    for meanwhile, headers in ((b"null", (("kwflow-op", b"terminate"),)), (b'{"ref":"late"}', ())):
        processor, store, offsets = WorkflowProcessor(Config(), Workflows({"main": module.main}, "main"), frozenset({"out"})), MemoryStore(), iter(range(20))

        def send(value: bytes, *headers: tuple[str, bytes | None], processor: WorkflowProcessor = processor, store: MemoryStore = store, offsets: Iterator[int] = offsets) -> Decision:
            changes = Overlay(store)
            [made] = processor.decide(changes, [Record("workflow-resume", 0, next(offsets), 1, b"a", value, headers)], 1)
            store.apply(changes.changes)
            return made

        def forget(processor: WorkflowProcessor = processor, store: MemoryStore = store) -> None:
            changes = Overlay(store)
            processor.due(changes, 10**9, 10)
            store.apply(changes.changes)

        module.BROKEN[0] = True
        send(b"new:null", ("kwflow-start-id", b"mine"))
        for value in (b'{"ref":"first","value":"unsavable"}', b'{"ref":"second"}', b'{"ref":"late"}', b'{"ref":"late"}'):
            send(value)
        module.BROKEN[0] = False
        outputs = [output for _ in range(2) for output in send(b"null", ("kwflow-op", b"retry")).outputs if output.topic != "workflow-resume"]
        assert [output.topic for output in outputs] == ["out", "workflow-result"]
        forget()
        assert send(meanwhile, *headers).outputs == ()
        while any(key.startswith(parked.HOLD) for key in store.entries):
            send(b"null", ("kwflow-op", b"retry"))
        forget()
        assert [key for key in store.entries if not key.startswith(b"\0ended")] == []


@pytest.mark.parametrize("cached", [0, 1], ids=["restored", "live"])
def test_under_a_runner_that_may_read_a_record_again_an_ended_start_is_not_begun_anew(cached: int) -> None:
    """G5; `kwflow engine --runner faust`: the record that started it and the one that ended it are recognised by their offsets."""
    module = durable.load_source("read_again", "import kwflow as kw\ndef main(o):\n    yield kw.suspend('r')\n")
    processor, store = WorkflowProcessor(Config(instances_cached_max=cached), Workflows({"main": module.main}, "main"), frozenset(), "topic id"), MemoryStore()
    processor.at_least_once = True
    start, end = (Record("workflow-resume", 0, offset, 1, b"w", value) for offset, value in enumerate((b"new:null", b'{"ref":"r"}')))
    counts = []
    for record in (start, start, end, end, start, Record("workflow-resume", 0, 2, 1, b"w", b"new:null")):
        changes = Overlay(store)
        [made] = processor.decide(changes, [record], 1)
        store.apply(changes.changes)
        counts.append(made.counts[0])
    assert counts == ["started", "repeated", "resumed", "repeated", "repeated", "started"]


def test_a_topic_that_kafka_could_not_have_is_refused_where_it_is_declared() -> None:
    """§9.6: before, an engine reported at its start that the topic was missing, and `topics create` that the broker refused it."""
    for name in ("two words", "", "x" * 250, "ä", ["out"], 5):
        with pytest.raises(UsageError, match="a topic name consists of letters, digits"):
            api.declare_topics(name)  # type: ignore[arg-type]
    assert "two words" not in api.declared_topics()


def test_a_start_that_names_no_workflow_where_none_is_the_default_says_what_there_is() -> None:
    """G3; it said `no workflow None`."""
    processor = WorkflowProcessor(Config(), Workflows({"trip": lambda opts: opts}, None), frozenset())
    [made] = processor.decide(Overlay(MemoryStore()), [Record("workflow-resume", 0, 7, 0, b"w", b"new:1")], 0)
    assert made.counts == ("dead-letter",)
    assert "@7: it names no workflow, and there is no default one, as the engine's first module has no main; there are: " in made.logs[0] and made.logs[0].endswith(", trip")


@pytest.fixture
def forgeable() -> WorkflowTester:
    return WorkflowTester(durable.load_source("forgeable", SOURCE, "forgeable.py").main)


FIELDS = (
    "applied", "calls", "cancel", "checkpoints", "client", "code", "created", "forked", "heartbeats", "id", "ids", "key", "lowering", "mailbox", "minor", "moves", "outcome", "parent", "parked",
    "start_id", "status", "status_value", "trace", "updated", "updates", "v", "waits", "workflow",
)  # fmt: skip
FORGED: list[Any] = ["x", None, 5.5, [1], {"a": 1}, {"x": {}}, 10**18]
WAITS = [[{"ref": "x", "kind": kind, "since": 1}] for kind in ("activity", "child", "job", "signal", "suspension", "timer", "update", "x")]
COMMANDS = {
    "cancel": None, "discard": None, "fork": {"id": "copy"}, "heartbeat": {"ref": "first", "details": 1}, "migrate": {"in_place": True}, "pause": None, "query": None, "retry": None,
    "rewind": {"to": 0}, "signal": {"name": "s"}, "terminate": None, "unpause": None, "update": {"name": "u"},
}  # fmt: skip


@pytest.mark.parametrize("paused", [False, True], ids=["waiting", "paused"])
@pytest.mark.parametrize("field", FIELDS)
def test_whatever_a_forged_header_says_stops_no_engine(forgeable: WorkflowTester, field: str, paused: bool) -> None:
    """G3: without signing keys, the changelog is as trustworthy as those who may write to it.  One record must not end an engine, and then the next one, by what its header says or lacks."""
    w = forgeable
    w.start("w")
    if paused:
        w.command("w", "pause")
    was = w.state.entries[b"w"]
    header, body = snapshot.split(was)
    without = snapshot.copy(body, {name: told for name, told in header.items() if name != field})
    marks = [{"reason": "paused", "message": ""}, {"reason": "paused", "message": "", "offset": 1}]
    for data in [without, *(snapshot.amend(was, **{field: forged}) for forged in FORGED + {"waits": WAITS, "parked": marks}.get(field, []))]:
        for op, arguments in [("resume", None), ("start", None), *COMMANDS.items()]:
            w.state.apply({b"w": data, b"copy": None})
            if op == "resume":
                w.resume("w", "first", "unsavable")
            elif op == "start":
                w.start("w")
            else:
                w.send("w", msgspec.json.encode(arguments), {"kwflow-op": op, "kwflow-id": "x", "kwflow-request": "r", "kwflow-reply-to": "0/test"})
            w.send("w", b"null", {"kwflow-op": "terminate"})
    w.start("other")
    assert w.header("other")["status"] == "waiting"


@pytest.mark.parametrize("entry", [b"", b"rubbish", b"5", msgspec.msgpack.encode(["w", 0])])
@pytest.mark.parametrize("op", ["retry", "discard", "terminate"])
def test_an_entry_of_a_hold_that_nobody_can_read_is_dead_lettered_in_its_turn_and_hides_no_other(engine: WorkflowTester, entry: bytes, op: str) -> None:
    """G3: it was damaged, or forged."""
    engine.start("w")
    engine.resume("w", "first", "unsavable")
    engine.resume("w", "second", 2)
    engine.broken[0] = False  # type: ignore[attr-defined]
    [_, key] = [key for key in engine.state.entries if key.startswith(parked.HOLD)]
    engine.state.apply({key: entry})
    assert [record.value for record in parked.holds(engine.state.entries)["w"]][1] == entry
    assert engine.command("w", op)["status"] == "ok"
    letters = [output.value for output in engine.outputs if output.topic == engine.config.dead_letter_topic and (output.value or b"") == entry]
    assert letters == ([entry] if op != "terminate" else []) and not parked.holds(engine.state.entries)
