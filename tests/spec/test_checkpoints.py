"""Checkpoints: earlier states are kept, shown, forked from and gone back to (decision 0062)."""

from __future__ import annotations

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
from kwflow.core.wire import Record
from kwflow.errors import UsageError
from kwflow.runners.budget import Budget
from kwflow.runners.checkpoints import CHECKPOINT, entry_key, number_of
from kwflow.runners.clock import SystemClock
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import HANGS, MemoryStore, WorkflowTester
from tests.spec.test_fork import CLEANS
from tests.spec.test_messages import HEAD, run, status
from tests.spec.test_vectors import Site, program, value_of
from tests.spec.vectors import VECTORS, Vector

TALK = """
def main(o):
    said = [o]
    while True:
        said.append((yield kw.wait_signal("said")))
        if said[-1] == "end":
            return said
main.kwflow_checkpoints = 3
"""


@kw.activity
def checkpoint_case_charge(amount: object) -> str:
    return f"{kw.activity_info().idempotency_key} {amount}"


@kw.activity(queue="checkpoint-case")
def checkpoint_case_print(page: int) -> None:
    """Runs at workers only."""


def talk(*said: str, body: str = TALK, **headers: str) -> WorkflowTester:
    w = run(body, "tea?", **headers)
    say(w, *said)
    return w


def say(w: WorkflowTester, *said: Any, id: str = "w") -> None:
    for value in said:
        w.command(id, "signal", {"name": "said", "value": value})


def numbers(w: WorkflowTester, id: str = "w") -> list[int]:
    prefix = CHECKPOINT + id.encode() + b"\0"
    return [number_of(key) for key in sorted(w.state.entries) if key.startswith(prefix)]


def rewound(w: WorkflowTester, to: int, id: str = "w") -> Any:
    return w.command(id, "rewind", {"to": to})


# -- what is kept ------------------------------------------------------------------------------------------------------
def test_each_record_leaves_the_state_before_it_and_the_oldest_goes() -> None:
    w = run(TALK, "tea?")
    assert (numbers(w), w.header("w")["checkpoints"]) == ([], [0, 0])
    states = []
    for number in range(6):
        states.append(w.state.entries[b"w"])
        say(w, number)
    assert (numbers(w), w.header("w")["checkpoints"]) == ([3, 4, 5], [3, 6])
    assert [w.state.entries[entry_key(b"w", number)] for number in numbers(w)] == states[3:]


def test_a_record_that_changes_nothing_leaves_none() -> None:
    """G3: ignored by a stated rule."""
    w = talk("a")
    before = dict(w.state.entries)
    w.resume("w", "nobody waits for this")
    w.start("w", "again")
    assert w.state.entries == before


def test_an_update_that_is_refused_leaves_none() -> None:
    """M3: it changes nothing, however often it is sent; otherwise its sender could push all useful states out."""
    body = """
def main(o):
    updates = kw.on_update("u", lambda value: 1 / 0)
    kw.on_update("v")
    yield kw.wait_signal("said")
    yield kw.wait_signal("said")
main.kwflow_checkpoints = 9
"""
    w = run(body)
    say(w, "a")
    for name in ("u", "unknown"):
        assert status(w.command("w", "update", {"name": name})) == "rejected"
    for _ in range(2):
        w.send("w", b'{"name":"v"}', {"kwflow-op": "update", "kwflow-id": "pending"})
    assert (numbers(w), w.header("w")["checkpoints"]) == ([0, 1], [0, 2])


@pytest.mark.parametrize("given", [-1, 1_001, True, 2.0, "3"])
def test_the_number_to_keep_is_checked_where_it_is_declared(given: Any) -> None:
    with pytest.raises(UsageError, match="the number of earlier states to keep, from 0 to 1000, not "):
        kw.workflow(checkpoints=given)


def test_the_decorator_declares_it() -> None:
    assert kw.workflow(name="checkpoint-case-declared", checkpoints=7)(lambda o: o).kwflow_checkpoints == 7  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.booleans(), min_size=8, max_size=8), cached=st.sampled_from([0, 100]))
def test_however_records_are_cut_into_batches_the_same_checkpoints_are_kept(cuts: list[bool], cached: int) -> None:
    """K15: unlike other instances, one with checkpoints is saved after each record."""
    values = [b"new:1", *[b'{"name":"said","value":%d}' % n for n in range(6)], b'{"name":"said","value":"end"}']
    records = [Record("workflow-resume", 0, n, 1000 + n, b"w", value, (("kwflow-op", b"signal"),) if n else ()) for n, value in enumerate(values)]
    batches: list[list[Record]] = [[]]
    for record, cut in zip(records, cuts, strict=True):
        batches += [[]] if cut else []
        batches[-1].append(record)
    assert _stored(batches, cached) == _stored([[record] for record in records], 0)


def _stored(batches: list[list[Record]], cached: int) -> dict[bytes, bytes]:
    module = durable.load_source("checkpoint_case_cut", HEAD + TALK)
    processor, store = WorkflowProcessor(Config(instances_cached_max=cached), Workflows({"main": module.main}, "main"), frozenset()), MemoryStore()
    for batch in batches:
        changes = Overlay(store)
        processor.decide(changes, batch, 1)
        store.apply(changes.changes)
    processor.live.forget()
    return store.entries


def test_they_count_in_what_a_batch_may_write() -> None:
    """The bytes of a transaction are limited before it is made."""
    body = TALK.replace("said = [o]", "large = 'x' * 100_000\n    said = [o]")
    module = durable.load_source("checkpoint_case_large", HEAD + body)
    processor, state = WorkflowProcessor(Config(), Workflows({"main": module.main}, "main"), frozenset()), Overlay(MemoryStore())
    processor.decide(state, [Record("workflow-resume", 0, 0, 1, b"w", b"new:1")], 1)
    said = [Record("workflow-resume", 0, offset, 1, b"w", b'{"name":"said"}', (("kwflow-op", b"signal"),)) for offset in range(1, 100)]
    assert len(processor.decide(state, said, 1, Budget(1_000_000, 60_000, SystemClock()))) == 5  # each writes the new state and keeps the one before


def test_a_state_that_is_too_large_with_its_calls_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """K13: one that no broker takes would stop the engine."""
    body = """
from tests.spec.test_checkpoints import checkpoint_case_charge
def main(o):
    yield checkpoint_case_charge('x' * 1000)
    while True:
        yield kw.wait_signal('said')
main.kwflow_checkpoints = 9
"""
    monkeypatch.setenv("KWFLOW_SNAPSHOT_BYTES_MAX", "2500")
    w = WorkflowTester(durable.load_source("checkpoint_case_gap", HEAD + body).main)
    w.fake(checkpoint_case_charge, lambda amount: HANGS)
    w.start("w")
    w.resume("w", w.waits("w")[0], "charged")
    say(w, 1, 2)
    assert (numbers(w), w.header("w")["checkpoints"]) == ([1, 2], [0, 3])
    assert rewound(w, 0)["message"] == "it has no checkpoint 0: there are 0 to 2"


def test_with_a_smaller_number_or_without_the_option_the_next_step_drops_what_is_too_much() -> None:
    w = talk("a", "b", "c", "d")
    module = durable.load_source("checkpoint_case_less", HEAD + TALK.replace("= 3", "= 1"))
    w.deploy(module.main)
    say(w, "e")
    assert (numbers(w), w.header("w")["checkpoints"]) == ([4], [4, 5])
    w.deploy(durable.load_source("checkpoint_case_none", HEAD + TALK.replace("main.kwflow_checkpoints = 3", "")).main)
    say(w, "f")
    assert (numbers(w), "checkpoints" in w.header("w")) == ([], False)


# -- beyond one run ------------------------------------------------------------------------------------------------------
def test_they_stay_after_the_end_as_long_as_its_entry_and_one_can_fork_from_them() -> None:
    """K20."""
    w = talk("a", "end")
    assert (w.result("w"), numbers(w), w.header("w")["status"]) == (["tea?", "a", "end"], [0, 1], "ended")
    assert status(w.command("w", "fork", {"id": "again", "at": 1})) == "ok"
    say(w, "b", "end", id="again")
    assert w.result("again") == ["tea?", "a", "b", "end"]
    assert status(rewound(w, 1)) == "not_found", "its outcome is written"
    assert w.command("w", "fork", {"id": "late"})["message"] == "it has ended"
    w.now_ms += w.config.ended_retention_ms + 1
    changes = Overlay(w.state)
    w._workflows.due(changes, w.now_ms, 100)
    w.state.apply(changes.changes)
    assert not [key for key in w.state.entries if key == b"w" or key.startswith(CHECKPOINT)]


def test_a_terminated_instance_keeps_its_last_state_too() -> None:
    w = talk("a")
    w.command("w", "terminate", {"reason": "by mistake"})
    assert (numbers(w), w.header("w")["checkpoints"]) == ([0, 1], [0, 2])
    w.command("w", "fork", {"id": "again", "at": 1})
    say(w, "end", id="again")
    assert w.result("again") == ["tea?", "a", "end"]


def test_numbers_go_on_in_the_next_run_and_states_of_the_one_before_can_be_forked_but_not_gone_back_to() -> None:
    w = talk("a", "end")
    w.start("w", "coffee?", **{"kwflow-start-id": "another"})
    say(w, "b")
    assert (numbers(w), w.header("w")["checkpoints"]) == ([0, 1, 2], [0, 3])
    assert "is of an earlier run" in rewound(w, 1)["message"]
    w.command("w", "fork", {"id": "again", "at": 1})
    say(w, "end", id="again")
    assert w.result("again") == ["tea?", "a", "end"]
    say(w, "c", "d")
    assert numbers(w) == [2, 3, 4]


def test_a_restart_keeps_the_state_that_it_ends() -> None:
    w = talk("a", body=TALK + "main.kwflow_restart = True\n", **{"kwflow-start-id": "first"})
    w.start("w", "coffee?", **{"kwflow-start-id": "second"})
    assert (numbers(w), w.header("w")["checkpoints"], w.header("w")["start_id"]) == ([0, 1], [0, 2], "second")
    w.command("w", "fork", {"id": "again", "at": 1})
    say(w, "end", id="again")
    assert w.result("again") == ["tea?", "a", "end"]


def test_a_fork_begins_without_any() -> None:
    w = talk("a", "b")
    w.command("w", "fork", {"id": "copy"})
    assert (numbers(w, "copy"), w.header("copy").get("checkpoints")) == ([], None)
    say(w, "c", id="copy")
    assert (numbers(w, "copy"), numbers(w)) == ([0], [0, 1])


# -- going back ----------------------------------------------------------------------------------------------------------
def test_an_instance_goes_back_and_what_it_was_is_a_checkpoint_from_which_it_can_come_back() -> None:
    w = talk("a", "b")
    assert rewound(w, 1) == {"status": "ok", "message": "", "value": None}
    assert w.header("w")["checkpoints"] == [0, 3]
    say(w, "c")
    assert rewound(w, 2)["status"] == "ok"
    say(w, "end")
    assert w.result("w") == ["tea?", "a", "b", "end"]


def test_who_started_it_hears_its_outcome_once() -> None:
    """AF-10: the run, its parent and what it has applied are those that they were."""
    w = talk("a", **{"kwflow-start-id": "first", "kwflow-client": "me", "kwflow-parent": "p|1:1"})
    w.command("w", "signal", {"name": "said", "value": "b"}, kwflow_id="once")
    rewound(w, 0)
    assert {name: w.header("w")[name] for name in ("start_id", "client", "parent")} == {"start_id": "first", "client": "me", "parent": "p|1:1"}
    w.command("w", "signal", {"name": "said", "value": "b"}, kwflow_id="once")
    say(w, "end")
    assert w.result("w") == ["tea?", "end"], "a command with an id is applied once"
    assert len([output for output in w.outputs if output.key == b"p"]) == 1


def test_an_unknown_number_is_refused_with_those_that_there_are() -> None:
    w, none = talk("a", "b"), run("def main(o):\n    yield kw.suspend('r')\n")
    assert rewound(w, 2)["message"] == w.command("w", "fork", {"at": 2})["message"] == "it has no checkpoint 2: there are 0 to 1"
    assert rewound(w, -1)["message"] == "it has no checkpoint -1: there are 0 to 1"
    assert rewound(none, 0)["message"] == "it has no checkpoint 0: there are none; @kw.workflow(checkpoints=...) keeps them"
    assert status(w.command("w", "rewind")) == status(w.command("w", "rewind", {"to": "1"})) == "bad_arguments"


def due_of(w: WorkflowTester) -> list[int]:
    return sorted(int(key.split(b"\0")[2]) - 1_700_000_000_000 for key in w.timers.entries if key.startswith(b"\0due\0"))


def test_timers_are_those_of_the_state_that_it_goes_back_to() -> None:
    """SC-1."""
    body = """
def main(o):
    kept = kw.sleep(100)
    yield kw.race([kw.sleep(60), kw.wait_signal('said')])
    yield kw.race([kw.sleep(500), kw.wait_signal('said')])
    yield kept
    return kw.now()
main.kwflow_checkpoints = 9
"""
    w = run(body)
    w.advance(10)
    say(w, "a")
    assert due_of(w) == [100_000, 510_000]
    rewound(w, 0)
    assert due_of(w) == [60_000, 100_000]
    w.advance(20)
    say(w, "b")
    assert due_of(w) == [100_000, 530_000]
    rewound(w, 1)  # a timer that is due already fires at once
    assert due_of(w) == [100_000, 510_000]
    w.now_ms += 600_000
    rewound(w, 0)
    w.advance(0.1)
    assert w.header("w")["checkpoints"][1] >= 5


def test_a_call_is_made_again_under_its_own_key_and_one_that_runs_is_left_alone() -> None:
    """M6.2: a service that knows the key does nothing twice."""
    body = """
from tests.spec.test_checkpoints import checkpoint_case_charge
def main(o):
    first = yield checkpoint_case_charge(1)
    second = yield checkpoint_case_charge(2)
    return [first, second]
main.kwflow_checkpoints = 9
"""
    w = WorkflowTester(durable.load_source("checkpoint_case_calls", HEAD + body).main)
    w.fake(checkpoint_case_charge, lambda amount: HANGS)
    w.start("w")
    (first,) = w.waits("w")
    w.resume("w", first, "one")
    (second,) = w.waits("w")
    assert rewound(w, 0)["status"] == "ok"
    assert ([call.arguments for call in w.calls], w.waits("w")) == ([{"amount": 1}, {"amount": 2}, {"amount": 1}], [first])
    w.resume("w", second, "nobody waits for it any more")
    w.fake(checkpoint_case_charge, checkpoint_case_charge.function)
    rewound(w, 0)
    assert len(w.calls) == 3, "it waited for the same call"
    rewound(w, 1)
    assert w.result("w") == ["one", f"w|{second} 2"]


def test_a_fork_of_a_checkpoint_makes_its_calls_under_a_key_of_its_own() -> None:
    body = """
from tests.spec.test_checkpoints import checkpoint_case_charge
def main(o):
    first = yield checkpoint_case_charge(1)
    yield kw.suspend('r')
    return first
main.kwflow_checkpoints = 9
"""
    w = WorkflowTester(durable.load_source("checkpoint_case_forks", HEAD + body).main)
    w.start("w")
    (waited,) = snapshot.read_header(w.state.entries[entry_key(b"w", 0)])["waits"]
    w.command("w", "fork", {"id": "copy", "at": 0})
    w.resume("copy", "r")
    assert (w.result("copy"), w.waits("w")) == (f"copy|{waited['ref']} 1", ["r"])


def test_a_child_that_still_runs_is_waited_for_and_one_that_began_later_is_told() -> None:
    body = """
def main(o):
    first = kw.start_child("double", 1, id="first")
    yield kw.wait_signal("said")
    second = kw.start_child("double", 2, id="second")
    yield kw.wait_signal("said")
    return (yield kw.all([first, second]))
def double(o):
    return (yield kw.suspend("r"))
main.kwflow_checkpoints = 9
"""
    w = run(body)
    say(w, "a", "b")
    assert rewound(w, 0)["status"] == "ok"
    assert w.header("second")["status"] == "ended" and w.header("first")["status"] == "waiting"
    say(w, "c", "d")
    w.resume("first", "r", 1)
    assert "waits for its child first" in rewound(w, 0)["message"]
    w.resume("second", "r", 2)
    assert w.result("w") == [1, 2]


def test_a_call_that_a_worker_has_is_waited_for_and_one_that_was_answered_is_handed_out_again() -> None:
    """M6.6: its arguments are kept in the header, as only the queue had them."""
    body = """
from tests.spec.test_checkpoints import checkpoint_case_print
def main(o):
    printed = checkpoint_case_print(1)
    yield kw.wait_signal('said')
    yield printed
    yield kw.suspend('r')
main.kwflow_checkpoints = 9
"""
    w = WorkflowTester(durable.load_source("checkpoint_case_jobs", HEAD + body).main)
    w._workflows.queues = True
    w.start("w")
    (ref, _) = w.waits("w")
    say(w, "a")
    assert rewound(w, 0)["status"] == "ok"
    assert w.values("checkpoint-case") == [asked := w.values("checkpoint-case")[0]]
    say(w, "a")
    w.resume("w", ref)
    assert rewound(w, 1)["status"] == "ok"
    w.command("w", "fork", {"id": "copy", "at": 0})
    w.command("copy", "fork", {"id": "second"})
    other = [{**asked, "workflow_id": id, "idempotency_key": f"{id}|{ref}"} for id in ("copy", "second")]
    assert w.values("checkpoint-case") == [asked, asked, *other]
    for id in ("w", "copy", "second"):
        say(w, "b", id=id)
        w.resume(id, ref)
        assert (w.waits(id), "calls" in w.header(id)) == (["r"], False)
    w.command("w", "terminate")
    assert "calls" not in w.header("w")


def test_an_update_that_came_later_is_rejected_and_one_that_was_open_stays_so() -> None:
    """M3: each sender is answered once."""
    body = """
def main(o):
    first = yield kw.on_update('u')
    yield kw.wait_signal('said')
    second = yield kw.on_update('u')
    yield kw.wait_signal('said')
    kw.reply(first, 1)
    yield kw.suspend('r')
main.kwflow_checkpoints = 9
"""
    w = run(body)
    update = {"kwflow-op": "update", "kwflow-reply-to": "0/me"}
    w.send("w", b'{"name":"u"}', {**update, "kwflow-request": "first"})
    say(w, "a")
    w.send("w", b'{"name":"u"}', {**update, "kwflow-request": "second"})
    rewound(w, 1)
    assert (w.reply("first"), status(w.reply("second"))) == (None, "rejected")
    say(w, "a")
    w.send("w", b'{"name":"u"}', {**update, "kwflow-request": "third"})
    say(w, "b")
    assert (w.reply("first")["value"], w.reply("third")) == (1, None)
    rewound(w, 1)
    assert (list(w.header("w")["updates"].values()), status(w.reply("third"))) == ([{"id": None, "to": []}], "rejected")


def test_an_update_that_has_the_number_of_one_before_it_is_not_taken_for_it() -> None:
    """M3: numbers are part of the state, and so they are given again after going back; its sender would get the answer to another question."""
    body = """
def main(o):
    yield kw.wait_signal("said")
    update = yield kw.on_update("u")
    yield kw.wait_signal("said")
    kw.reply(update, update.value)
    yield kw.suspend("r")
main.kwflow_checkpoints = 9
"""
    w = run(body.replace("    yield kw.wait_signal", "    kw.on_update('u')\n    yield kw.wait_signal", 1))

    def ask(value: int, **headers: str) -> None:
        w.send("w", b'{"name":"u","value":%d}' % value, {"kwflow-op": "update", "kwflow-reply-to": "0/me", "kwflow-request": f"q{value}", **headers})

    say(w, "a")
    ask(1, **{"kwflow-id": "first"})  # state 2
    rewound(w, 1)
    ask(2)
    rewound(w, 2)
    assert [status(w.reply(f"q{number}")) for number in (1, 2)] == ["rejected", "rejected"]
    say(w, "b")
    ask(3, **{"kwflow-id": "first"})
    assert (w.header("w")["status"], status(w.reply("q3"))) == ("waiting", "rejected"), "the same command, applied before"


PARKS = """
def main(o):
    said = []
    while True:
        said.append((yield kw.wait_signal("said")))
        if said[-1] == "bad":
            yield object()
        if said[-1] == "lock":
            import threading
            held = threading.Lock()
        if said[-1] == "end":
            return said
main.kwflow_checkpoints = 9
"""


def test_one_that_has_failed_goes_back_ahead_of_what_it_holds_which_is_then_applied() -> None:
    """K17."""
    w = talk("a", "lock", "b", body=PARKS)
    assert w.header("w")["status"] == "parked"
    w.deploy(durable.load_source("checkpoint_case_mended", HEAD + PARKS.replace('"lock"', '"unlock"')).main)
    reply = rewound(w, 0)  # on the code that it began on, the record at fault fails again: it is parked in the earlier state
    assert reply["status"] == "parked" and reply["message"].startswith("it is parked again: UnsavableError: ")
    w.command("w", "discard")
    say(w, "end")
    assert w.result("w") == ["b", "end"]


def test_one_that_is_paused_goes_back_and_stays_paused() -> None:
    w = talk("a", "b")
    w.command("w", "pause", {"reason": "audit"})
    say(w, "c")
    assert rewound(w, 0)["status"] == "ok"
    assert w.header("w")["parked"]["message"] == "audit"
    w.command("w", "unpause")
    say(w, "end")
    assert w.result("w") == ["tea?", "c", "end"]


def test_one_that_has_failed_and_is_paused_is_only_paused_then() -> None:
    w = talk("a", "lock", body=PARKS)
    w.command("w", "pause", {"reason": "audit"})
    assert rewound(w, 0)["status"] == "ok"
    assert w.header("w")["parked"]["reason"] == "paused"
    w.command("w", "unpause")
    assert w.header("w")["status"] == "parked", "the record at fault is still there"


LOCKS = """
import threading
def main(o):
    held = threading.Lock()
    yield kw.suspend("r")
main.kwflow_checkpoints = 9
"""


def test_a_start_that_failed_and_one_that_cleans_up_cannot_go_back() -> None:
    w = run(CLEANS + "main.kwflow_checkpoints = 9\n")
    w.resume("w", "r")
    assert rewound(w, 0)["message"] == "it has ended and is cleaning up"
    failed = run(LOCKS)
    assert rewound(failed, 0)["message"] == "its start failed, so there is nothing to continue from"


def test_a_migration_in_place_can_be_undone() -> None:
    """Decision 0061: the state before it is a checkpoint."""
    w = talk("a")
    w.deploy(durable.load_source("checkpoint_case_moved", HEAD + TALK).main)
    text = TALK.replace("said[-1] == \"end\":\n            return said", "said[-1] == \"end\":\n            return said[1:]")
    source = f"message_case_{_module_of(w)}"
    w.deploy(durable.load_source(source, HEAD + text, f"{source}.py").main)
    assert w.command("w", "migrate", {"in_place": True})["status"] == "ok"
    assert w.header("w")["checkpoints"] == [0, 2]
    w.command("w", "fork", {"id": "moved"})
    assert rewound(w, 1)["status"] == "ok"
    for id in ("w", "moved"):
        say(w, "end", id=id)
    assert (w.result("w"), w.result("moved")) == (["tea?", "a", "end"], ["a", "end"])


def _module_of(w: WorkflowTester) -> str:
    (reference,) = w.header("w")["code"]
    return str(reference).partition("@")[0].rpartition("_")[2]


# -- of any program ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cached", [0, 100])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_from_each_state_of_a_vector_the_rest_of_it_is_written_again(vector: Vector, cached: int) -> None:
    """A fork of each checkpoint, and the instance itself each time it goes back, write what the first run wrote from there on."""
    main = program(vector)
    main.kwflow_checkpoints = 1_000
    site = Site(main, cached)
    site.send("w", b"new:{}")
    until = next((number for number, (_, written) in enumerate(vector.events) if any(line.startswith(("result ", "error ")) for line in written)), len(vector.events))
    events, before = vector.events[:until], []  # what has an outcome cannot go back
    for event, _ in events:
        before.append(snapshot.read_header(site.store.entries[b"w"])["checkpoints"][1])  # some events change nothing
        site.send("w", value_of(event))
    for number in reversed(range(until)):
        site.send("w", msgspec.json.encode({"id": f"copy{number}", "at": before[number]}), ("kwflow-op", b"fork"))
        site.send("w", msgspec.json.encode({"to": before[number]}), ("kwflow-op", b"rewind"))
        for event, written in events[number:]:
            assert site.send(f"copy{number}", value_of(event)) == site.send("w", value_of(event)) == written
    site.processor.live.forget()
