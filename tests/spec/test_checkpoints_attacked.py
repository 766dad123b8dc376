"""Checkpoints where something else goes on: batches, forks onto ids of old, starts that fail, keys that are gone, forged entries (decision 0062)."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kwflow as kw
from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.dispatch import PREFIX, state_key
from kwflow.core.wire import Record
from kwflow.ports import Decision
from kwflow.runners.checkpoints import entry_key
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore, WorkflowTester
from tests.spec.test_checkpoints import TALK, numbers, rewound, say, talk
from tests.spec.test_messages import HEAD, status


@kw.activity
def checkpoint_attack_charge(amount: int) -> object:
    """Never runs here: its answers are records."""


@kw.activity(queue="checkpoint-attack")
def checkpoint_attack_print(page: int) -> object:
    """Runs at workers only."""


CALLS = """
from tests.spec.test_checkpoints_attacked import checkpoint_attack_charge, checkpoint_attack_print
def main(o):
    said = []
    first = checkpoint_attack_charge(1)
    while True:
        said.append((yield kw.race({"said": kw.wait_signal("said"), "first": first, "late": kw.sleep(60)}, cancel_rest=False)))
        if said[-1][1] == "lock" and len(said) > 1:
            import threading
            held = threading.Lock()
        if said[-1][1] == "again" or said[-1][0] == "first":
            first = (checkpoint_attack_print if len(said) % 2 else checkpoint_attack_charge)(len(said))
        if said[-1][1] == "end":
            return said
main.kwflow_checkpoints = 5
"""


@functools.cache
def _main(body: str) -> Any:
    return durable.load_source(f"checkpoint_attack_{abs(hash(body))}", HEAD + body, "checkpoint_attack.py").main


class Partition:
    """One processor over a store in memory, that is given records in batches."""

    def __init__(self, body: str = CALLS, **config: Any) -> None:
        self.config = Config(**config)
        self.functions = {"main": _main(body)}
        self.store = MemoryStore()
        self.sent, self.now_ms = 0, 1000
        self.use(self.config)

    def use(self, config: Config, **functions: Any) -> None:
        self.processor = WorkflowProcessor(config, Workflows(functions or self.functions, "main"), frozenset())
        self.processor.queues = True

    def record(self, op: str, value: Any = None, id: str = "w") -> Record:
        self.sent += 1
        self.now_ms += 1
        headers = (("kwflow-op", op.encode()),) if op not in ("start", "answer") else ()
        content = b"new:null" if op == "start" else msgspec.json.encode(value)
        return Record("workflow-resume", 0, self.sent, self.now_ms, id.encode(), content, headers)

    def batch(self, *records: Record, at_ms: int = 5000) -> list[Decision]:
        changes = Overlay(self.store)
        made = self.processor.decide(changes, records, at_ms)
        self.store.apply(changes.changes)
        return made

    def send(self, op: str, value: Any = None, id: str = "w", at_ms: int = 5000) -> Decision:
        [made] = self.batch(self.record(op, value, id), at_ms=at_ms)
        return made

    def expire(self) -> None:
        changes = Overlay(self.store)
        while self.processor.due(changes, 10**15, 1000) is not None:
            pass
        self.store.apply(changes.changes)

    def headers(self) -> dict[bytes, Any]:
        """What is stored, but of snapshots only the headers: a body depends on which of its equal texts are one object."""
        return {key: snapshot.read_header(data) if data.startswith(b"KWF1") else data for key, data in self.store.entries.items()}

    def left(self) -> list[bytes]:
        """What is stored now, but for a note of the table of ended instances."""
        return sorted(key for key in self.store.entries if key != b"\0ended")


OPS = st.sampled_from([
    ("signal", {"name": "said", "value": 1}), ("signal", {"name": "said", "value": "again"}), ("signal", {"name": "said", "value": "lock"}), ("pause", {"reason": "x"}),
    ("unpause", None), ("retry", None), ("discard", None), ("rewind", {"to": 0}), ("rewind", {"to": 1}), ("rewind", {"to": 2}), ("rewind", {"to": 3}),
    ("fork", {"id": "copy"}), ("fork", {"id": "copy", "at": 1}), ("answer", {"ref": "1:1", "value": 7}), ("answer", {"ref": "2:1", "value": 7}), ("answer", {"ref": "3:1", "value": 7}),
    ("terminate", {"reason": ""}), ("start", None), ("signal", {"name": "said", "value": "end"}),
])  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(ops=st.lists(OPS, min_size=3, max_size=14), cuts=st.lists(st.sampled_from([False, False, True]), min_size=16, max_size=16), cached=st.sampled_from([0, 100]))
def test_however_commands_are_cut_into_batches_the_same_is_kept(ops: list[tuple[str, Any]], cuts: list[bool], cached: int) -> None:
    """K15: calls of activities, which are stored only at the end of a batch, included."""
    one_by_one, cut = Partition(), Partition(instances_cached_max=cached)
    sent = [one_by_one.record(op, value) for op, value in [("start", None), *ops]]
    expected = [made for record in sent for made in one_by_one.batch(record)]
    batches: list[list[Record]] = [[]]
    for record, ends in zip(sent, cuts, strict=False):
        batches[-1].append(record)
        batches += [[]] if ends else []
    made = [made for batch in batches if batch for made in cut.batch(*batch)]
    assert cut.headers() == one_by_one.headers()
    assert made == expected
    waited = {state_key(id, wait["ref"]) for id in ("w", "copy") for wait in cut.headers().get(id.encode(), {}).get("waits", []) if wait["kind"] == "activity"}
    assert {key for key in cut.store.entries if key.startswith(PREFIX)} == waited, "each call that is waited for is stored, and no other"
    for header in cut.headers().values():
        if isinstance(header, dict) and header["status"] != "ended":
            assert {wait["ref"] for wait in header["waits"] if wait["kind"] == "job"} <= {call["ref"] for call in header.get("calls", ())}, "and each call in a queue"
    for id in ("w", "copy"):
        cut.send("terminate", {"reason": ""}, id)
    cut.expire()
    assert cut.left() == []
    for site in (one_by_one, cut):
        site.processor.live.forget()


def calls_in(site: Partition, number: int) -> list[str]:
    return [call["ref"] for call in snapshot.read_header(site.store.entries[entry_key(b"w", number)]).get("calls", [])]


SAID = {"name": "said", "value": 1}


def test_calls_that_a_batch_has_made_are_kept_with_what_it_applies_from_a_hold() -> None:
    """K17, M6.2: they are stored only at the end of the batch."""
    site = Partition()
    site.batch(site.record("start"), site.record("pause", {"reason": "x"}), site.record("signal", SAID), site.record("unpause"))
    assert calls_in(site, 0) == ["1:1"]


@pytest.mark.parametrize("at_once", [False, True])
def test_calls_that_going_back_makes_again_are_kept_with_what_is_then_applied_from_the_hold(at_once: bool) -> None:
    """K17, M6.2."""
    site = Partition()
    ops = [("start", None), ("answer", {"ref": "1:1", "value": 7}), ("signal", {"name": "said", "value": "lock"}), ("rewind", {"to": 0})]
    records = [site.record(op, value) for op, value in ops]
    for batch in [records] if at_once else [[record] for record in records]:
        site.batch(*batch)
    assert site.headers()[b"w"]["checkpoints"] == [0, 3]
    assert [calls_in(site, number) for number in range(3)] == [["1:1"], ["2:1"], ["1:1"]]


def left_after_all(w: WorkflowTester, *ids: str) -> list[bytes]:
    for id in ids:
        w.command(id, "terminate", {"reason": ""})
    w.now_ms += w.config.ended_retention_ms + 1
    changes = Overlay(w.state)
    w._workflows.due(changes, w.now_ms, 100)
    w.state.apply(changes.changes)
    return sorted(key for key in w.state.entries if key != b"\0ended" and not key.startswith(b"\0code\0"))


def test_a_fork_under_the_id_of_an_ended_instance_goes_on_numbering() -> None:
    """Otherwise its first states would stand among those of the other, and these would stay for ever."""
    w = talk("a", "b", "end")
    w.start("old", "coffee?", **{"kwflow-start-id": "old"})
    say(w, "a", "b", "c", "end", id="old")
    assert numbers(w, "old") == [1, 2, 3]
    w.start("w", "tea?", **{"kwflow-start-id": "second"})
    say(w, "x")
    assert status(w.command("w", "fork", {"id": "old"})) == "ok"
    say(w, "d", id="old")
    assert (numbers(w, "old"), w.header("old")["checkpoints"]) == ([2, 3, 4], [2, 5])
    assert left_after_all(w, "w", "old") == []


FAILS = TALK.replace("said = [o]", "said = [o]\n    if o == 'fail':\n        import threading\n        held = threading.Lock()")


@pytest.mark.parametrize("then", ["discard", "terminate", "retry"])
def test_a_start_that_fails_after_the_end_of_another_run_leaves_nothing_that_nobody_removes(then: str) -> None:
    w = talk("a", "end", body=FAILS, **{"kwflow-start-id": "first"})
    assert numbers(w) == [0, 1]
    w.start("w", "fail", **{"kwflow-start-id": "second"})
    assert w.header("w")["status"] == "parked"
    w.deploy(durable.load_source("checkpoint_attack_mended", HEAD + FAILS.replace("threading.Lock()", "1")).main)
    w.command("w", then)
    if then == "retry":
        say(w, "x")
        assert (w.header("w")["status"], numbers(w)) == ("waiting", list(range(*w.header("w")["checkpoints"])))
    assert left_after_all(w, "w") == []


KEYS = {name: {"snapshot_keys": [name * 64]} for name in "abc"}


def test_what_a_key_signed_that_is_gone_can_be_ended_and_nothing_stays() -> None:
    """G3: an operator must be able to end it; it stopped the engine."""
    site = Partition(TALK, **KEYS["a"])
    site.send("start")
    for _ in range(3):
        site.send("signal", SAID)
    site.use(Config(**KEYS["b"]))
    assert site.send("signal", SAID).counts == ("parked",)
    assert site.send("rewind", {"to": 0}).counts == ("not-rewound",)
    assert site.send("fork", {"id": "copy", "at": 1}).counts == ("not-forked",)
    assert "terminated" in site.send("terminate", {"reason": ""}).counts
    site.expire()
    assert site.left() == []


def test_checkpoints_that_a_key_signed_that_is_gone_are_refused_and_dropped_in_turn() -> None:
    site = Partition(TALK, **KEYS["a"])
    site.send("start")
    site.send("signal", SAID)
    site.use(Config(snapshot_keys=["b" * 64, "a" * 64]))
    site.send("signal", SAID)
    site.use(Config(**KEYS["b"]))
    site.send("rewind", {"to": 1})
    assert site.send("rewind", {"to": 0}).counts == ("not-rewound",)
    for _ in range(4):
        site.send("signal", SAID)
    assert site.send("rewind", {"to": 4}).counts == ("rewound",)
    site.send("terminate", {"reason": ""})
    site.expire()
    assert site.left() == []


def test_of_a_damaged_instance_nothing_stays_once_it_is_ended() -> None:
    site = Partition(TALK)
    site.send("start")
    for _ in range(3):
        site.send("signal", SAID)
    site.store.entries[b"w"] = b"rubbish"
    assert site.send("fork", {"id": "copy", "at": 1}).counts == ("forked",), "earlier states are whole"
    site.send("signal", SAID)
    site.send("terminate", {"reason": ""})
    site.send("terminate", {"reason": ""}, "copy")
    site.expire()
    assert site.left() == []


FORGED: list[Any] = ["x", None, [1], ["a", "b"], [0, 10**18], [-5, 3], [5, 2], [10**40, 10**40], {"a": 1, "b": 2}]


@pytest.mark.parametrize("forged", FORGED, ids=str)
@pytest.mark.parametrize("op", ["signal", "rewind", "fork", "terminate", "start", "query"])
def test_what_a_forged_header_says_of_checkpoints_stops_no_engine(forged: Any, op: str) -> None:
    """Headers without a signature come from a log that others may write."""
    for end in (False, True):
        site = Partition(TALK)
        site.send("start")
        site.send("signal", SAID)
        if end:
            site.send("terminate", {"reason": ""})
        site.store.entries[b"w"] = snapshot.amend(site.store.entries[b"w"], checkpoints=forged)
        site.send(op, {"signal": SAID, "rewind": {"to": 0}, "fork": {"at": 0}, "terminate": {"reason": ""}}.get(op))
        site.send("terminate", {"reason": ""})
        site.expire()
        assert b"w" not in site.store.entries


@pytest.mark.parametrize("fields", [{"waits": "x"}, {"waits": [{}]}, {"workflow": None}, {"calls": [{}]}, {"updates": {"1": 7}}, {"status": "ended"}, {"created": "x"}], ids=str)
@pytest.mark.parametrize("op", ["rewind", "fork"])
def test_a_forged_checkpoint_stops_no_engine(fields: dict[str, Any], op: str) -> None:
    site = Partition(CALLS)
    site.send("start")
    site.send("answer", {"ref": "1:1", "value": 7})
    key = entry_key(b"w", 0)
    site.store.entries[key] = snapshot.amend(site.store.entries[key], **fields)
    site.send(op, {"to": 0} if op == "rewind" else {"at": 0})
    site.send("signal", SAID)


@pytest.mark.parametrize("op", ["rewind", "fork"])
def test_the_checkpoint_of_another_instance_is_not_taken(op: str) -> None:
    """What is signed, but stored under another key."""
    site = Partition(TALK)
    for id in ("w", "other"):
        site.send("start", id=id)
        site.send("signal", SAID, id=id)
    header = site.headers()[b"w"]
    site.store.entries[entry_key(b"w", 0)] = snapshot.amend(site.store.entries[entry_key(b"other", 0)], start_id=header["start_id"])
    assert site.send(op, {"to": 0} if op == "rewind" else {"at": 0}).counts[0].startswith("not-")


def test_the_states_of_a_workflow_that_is_no_longer_registered_are_kept() -> None:
    """Decision 0062: commands work whether or not its code still exists."""
    w = talk("a", "b")
    w.deploy(**{"another": _main(TALK)})
    assert status(rewound(w, 0)) == "ok"
    assert (numbers(w), w.header("w")["checkpoints"]) == ([1, 2], [1, 3])
    assert status(rewound(w, 2)) == "ok"
    w.command("w", "terminate", {"reason": ""})
    assert status(w.command("w", "fork", {"id": "again", "at": numbers(w)[-1]})) == "ok"
    say(w, "end", id="again")
    assert w.result("again") == ["tea?", "a", "b", "end"]
    assert left_after_all(w, "w", "again") == []


TWO_TIMERS = """
def main(o):
    for seconds in (60, 900):
        yield kw.race([kw.sleep(seconds), kw.wait_signal("said")])
    yield kw.suspend("r")
main.kwflow_checkpoints = 9
"""


def test_a_ref_is_not_given_again_once_a_topic_was_recreated() -> None:
    """Semantics §9.2, decision 0064: offsets begin anew; the timer of then would be taken for that of now, and never be set."""
    site = Partition(TWO_TIMERS)
    site.send("start")
    site.sent, site.processor.incarnation = 0, "recreated"
    site.send("signal", SAID)
    refs = [[wait["ref"] for wait in site.headers()[key]["waits"] if wait["kind"] == "timer"] for key in (b"w", entry_key(b"w", 0))]
    assert refs == [["1:1000001"], ["1:1"]]
    made = site.send("rewind", {"to": 0}).outputs
    assert [(output.value, dict(output.headers).get("kwflow-due-ms")) for output in made] == [(b"0", None), (b"59998", b"61001")]


def test_a_rewind_that_is_read_twice_does_not_undo_what_came_after_it() -> None:
    """A Faust application reads records again after a crash; the signal would be taken for one that was applied already."""
    site = Partition(TALK)
    for op in ("start", "signal", "signal"):
        site.send(op, SAID)
    sent = [site.record("rewind", {"to": 0}), site.record("signal", {"name": "said", "value": "end"})]
    site.batch(*sent[:1])
    before = dict(site.store.entries)
    assert site.batch(*sent[:1])[0].counts == ("repeated",)
    assert site.store.entries == before
    ended = site.batch(*sent)
    assert [made.counts for made in ended] == [("repeated",), ("signal",)]


def test_the_history_says_to_which_state_and_not_what_came_after_it() -> None:
    """Decision 0059: the records that it had held have events of their own."""
    site = Partition(CALLS, history_topic="history")

    def events(made: Decision) -> list[dict[str, Any]]:
        return [msgspec.json.decode(output.value or b"") for output in made.outputs if output.topic == "history"]

    site.send("start")
    site.send("signal", SAID)
    assert events(site.send("fork", {"id": "copy", "at": 0}))[0]["by"] == {"kind": "fork", "at": 0}
    [plain] = events(site.send("rewind", {"to": 0}))
    assert (plain["event"], plain["by"], [wait["ref"] for wait in plain["waits"]]) == ("rewound", {"kind": "rewind", "to": 0}, ["1:1", "1:2", "1:3"])
    site.send("signal", SAID)
    site.send("signal", {"name": "said", "value": "lock"})
    first, held = events(site.send("rewind", {"to": 0}))
    assert (first["event"], "waits" in first, held["event"], "waits" in held) == ("rewound", False, "signal", True)


WRONG = """
def main(o):
    yield kw.sleep(1)
    say("wrong")
    yield kw.wait_signal("said")
main.kwflow_checkpoints = 9
"""


def test_a_fix_gets_ahead_of_what_begins_again_if_the_instance_is_paused_first() -> None:
    """Docs, "Going back": a timer that is due fires at once, and the code that waits for it is that of then."""

    def deploy(w: WorkflowTester, body: str) -> None:
        w.deploy(durable.load_source("checkpoint_attack_fixed", HEAD + body, "checkpoint_attack_fixed.py").main)

    w = WorkflowTester(durable.load_source("checkpoint_attack_fixed", HEAD + WRONG, "checkpoint_attack_fixed.py").main)
    w.start("w")
    w.advance(2)
    deploy(w, WRONG.replace('"wrong"', '"right"'))
    for op, arguments in (("pause", {"reason": "fix"}), ("rewind", {"to": 0}), ("migrate", {"in_place": True})):
        assert status(w.command("w", op, arguments)) == "ok"
        w.advance(2)
    assert status(w.command("w", "unpause")) == "ok"
    assert w.outputs_to("out") == ["wrong", "right"]
    w.command("w", "terminate", {"reason": ""})
    assert rewound(w, 0) == {"status": "not_found", "message": "it has ended; kwflow fork --at continues from a state before that", "value": None}
