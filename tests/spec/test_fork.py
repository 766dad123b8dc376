"""`fork`: a second instance goes on from where the first one waits, and the first is unchanged (decision 0048)."""

from typing import Any

import pytest

import kwflow as kw
from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.dispatch import PREFIX, Dispatch, decode
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output, Record
from kwflow.runners.budget import Budget
from kwflow.runners.clock import SystemClock
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import HANGS, MemoryStore, WorkflowTester
from tests.spec.test_messages import HEAD, outcomes, run, status

FORK = (("kwflow-op", b"fork"),)
CHARGES = "from tests.spec.test_fork import fork_case_charge\ndef main(o):\n    return (yield fork_case_charge(o))\n"

WAITS = """
def main(o):
    seen = [o]
    with_cells = lambda: seen
    while True:
        got = yield kw.wait_signal("s")
        seen.append(got)
        if got == "end":
            return with_cells()
"""
TIMED = """
def main(o):
    try:
        yield kw.timeout(kw.suspend("r"), 60)
    except TimeoutError:
        return "late"
    return "answered"
"""
PARKS = """
import threading
def main(o):
    lock = None
    if (yield kw.suspend("r")) == "park":
        lock = threading.Lock()
        yield kw.suspend("never")
    return o
"""


@kw.activity
def fork_case_charge(amount: int) -> str:
    return f"{kw.activity_info().idempotency_key} {amount}"


def forked(w: WorkflowTester, to: str | None = "copy", **headers: str) -> dict[str, Any]:
    reply = w.command("w", "fork", {"id": to}, **headers)
    assert reply is not None
    return reply


def test_both_go_on_by_themselves_with_all_that_was_done_before() -> None:
    """ARCHITECTURE §1: a saved instance can be copied, inspected and forked."""
    w = run(WAITS, "start")
    w.command("w", "signal", {"name": "s", "value": 1})
    before = w.state.entries[b"w"]
    assert forked(w) == {"status": "ok", "message": "", "value": {"id": "copy", "start_id": w.header("copy")["start_id"]}}
    assert w.state.entries[b"w"] == before
    for id, value in (("copy", "a"), ("w", "b"), ("copy", "end"), ("w", "c"), ("w", "end")):
        w.command(id, "signal", {"name": "s", "value": value})
    assert (w.result("copy"), w.result("w")) == (["start", 1, "a", "end"], ["start", 1, "b", "c", "end"])
    assert len({start_id for _, start_id in outcomes(w)}) == 2


def test_a_fork_says_of_whom_it_is_one_and_whoever_waits_for_the_first_does_not_wait_for_it() -> None:
    """M1: `client`, `parent` and open updates belong to one run."""
    body = "def main(o):\n    update = yield kw.on_update('u')\n    yield kw.suspend('r')\n    kw.reply(update, 'done')\n    return o\n"
    w = run(body, 5, **{"kwflow-client": "me", "kwflow-start-id": "first", "kwflow-parent": "p|1:1"})
    w.send("w", b'{"name":"u"}', {"kwflow-op": "update", "kwflow-request": "q", "kwflow-reply-to": "0/me", "kwflow-id": "once"})
    forked(w)
    assert (w.header("copy")["forked"], w.header("w").get("forked")) == ({"id": "w", "start_id": "first"}, None)
    assert w.command("copy", "query")["value"]["forked"]["id"] == "w"
    assert not {"client", "parent", "ids"} & w.header("copy").keys()
    w.resume("copy", "r")
    assert (w.result("copy"), w.reply("q")) == (5, None)
    told = [output for output in w.outputs if output.key == b"p"]
    w.resume("w", "r")
    assert (w.result("w"), status(w.reply("q"))) == (5, "ok")
    assert (told, len([output for output in w.outputs if output.key == b"p"])) == ([], 1)


def test_its_timers_are_due_when_those_of_the_first_are() -> None:
    """SC-1: each instance cancels only its own."""
    w = run(TIMED)
    w.advance(20)
    forked(w)
    assert w.header("copy")["waits"] == w.header("w")["waits"]
    w.resume("w", "r")
    w.advance(39.9)
    assert (w.result("w"), w.waits("copy")) == ("answered", ["r", w.waits("copy")[1]])
    w.advance(0.2)
    assert w.result("copy") == "late"


def test_when_a_timer_is_due_is_in_the_header_as_the_record_alone_says_it() -> None:
    """semantics §4.1: state holds no clock. §9: a delay counts from when its record is received, which may be later."""
    w = run("def main(o):\n    yield kw.suspend('r')\n    yield kw.sleep(60)\n")
    at = w.now_ms
    w.now_ms += 3_600_000
    w._log(Output(w.config.resume_topic, b"w", b'{"ref":"r"}', (), at))
    assert [wait["due"] - at for wait in w.header("w")["waits"]] == [60_000]
    forked(w)
    assert sorted(int(key.split(b"\0")[2]) - at for key in w.timers.entries if key.startswith(b"\0due\0")) == [60_000, 3_660_000]


def test_activities_that_run_are_called_for_it_too_under_a_key_of_its_own() -> None:
    """M6.2: the call is made twice because there are two workflows."""
    w = WorkflowTester(durable.load_source("fork_case_charges", HEAD + CHARGES).main)
    w.fake(fork_case_charge, lambda amount: HANGS)
    w.start("w", 8)
    ((ref,), before) = w.waits("w"), len(w.calls)
    w.fake(fork_case_charge, fork_case_charge.function)
    forked(w)
    assert [call.workflow_id for call in w.calls[before:]] == ["copy"]
    assert w.result("copy") == f"copy|{ref} 8"
    assert w.waits("w") == [ref]


def test_one_that_waits_for_an_update_takes_updates_of_its_own() -> None:
    w = run("def main(o):\n    update = yield kw.on_update('u')\n    kw.reply(update, o)\n    yield kw.suspend('end')", 7)
    forked(w)
    for id in ("copy", "w"):
        assert (w.command(id, "update", {"name": "u"}) or {})["value"] == 7


def test_a_call_of_the_same_batch_is_found_too() -> None:
    """K15: calls that a batch hands out are stored at its end."""
    module = durable.load_source("fork_case_batch", HEAD + CHARGES)
    processor, state = WorkflowProcessor(Config(), Workflows({"main": module.main}, "main"), frozenset()), Overlay(MemoryStore())
    sent = [(b"w", b"new:1", ()), (b"w", b'{"id":"copy"}', FORK), (b"copy", b'{"id":"third"}', FORK)]
    made = processor.decide(state, [Record("workflow-resume", 0, offset, 1, key, value, headers) for offset, (key, value, headers) in enumerate(sent)], 1)
    assert [(decision.counts, [call.workflow_id for call in decision.dispatch if isinstance(call, Dispatch)]) for decision in made] == [
        (("started",), ["w"]), (("forked",), ["copy"]), (("forked",), ["third"]),
    ]  # fmt: skip
    assert {decode(value).workflow_id for _, value in state.scan(PREFIX)} == {"w", "copy", "third"}


def test_a_fork_whose_record_is_read_again_is_there_once_and_answered_again() -> None:
    """G1: Faust reads records at least once."""
    processor = WorkflowProcessor(Config(), Workflows({"main": durable.load_source("fork_case_again", HEAD + WAITS).main}, "main"), frozenset())
    state, asked = Overlay(MemoryStore()), (*FORK, ("kwflow-request", b"q"), ("kwflow-reply-to", b"0/me"))
    processor.decide(state, [Record("workflow-resume", 0, 0, 1, b"w", b"new:1")], 1)
    made = [processor.decide(state, [Record("workflow-resume", 0, 1, 1, b"w", b'{"id":"copy"}', asked)], 1)[0]]
    copy = state.get(b"copy")
    made += processor.decide(state, [Record("workflow-resume", 0, 1, 1, b"w", b'{"id":"copy"}', asked)], 1)
    assert [decision.counts for decision in made] == [("forked",), ("repeated",)]
    assert (made[0].replies, state.get(b"copy")) == (made[1].replies, copy)


def test_copies_count_in_what_a_batch_may_write() -> None:
    """The bytes of a transaction are limited before it is made, and so is its memory."""
    module = durable.load_source("fork_case_large", HEAD + "def main(o):\n    large = 'x' * 100_000\n    yield kw.suspend('r')\n    return large\n")
    processor, state = WorkflowProcessor(Config(), Workflows({"main": module.main}, "main"), frozenset()), Overlay(MemoryStore())
    processor.decide(state, [Record("workflow-resume", 0, 0, 1, b"w", b"new:1")], 1)
    forks = [Record("workflow-resume", 0, offset, 1, b"w", b"null", FORK) for offset in range(1, 100)]
    assert len(processor.decide(state, forks, 1, Budget(1_000_000, 60_000, SystemClock()))) == 10


def test_without_an_id_it_gets_one_that_lies_in_the_same_partition() -> None:
    """KW-1: a fork is stored beside its original."""
    w = run(WAITS)
    w._workflows.partitions = 7
    ids = []
    for _ in range(20):
        reply = w.command("w", "fork")
        if status(reply) == "ok":
            ids.append(reply["value"]["id"])
    w._workflows.partitions = 1
    assert w.command("w", "fork")["value"]["id"].startswith("w/fork-")
    assert ids and all(partition_of(id.encode(), 7) == 0 for id in ids) and len(set(ids)) == len(ids)


def test_an_id_of_another_partition_is_refused_with_the_place_of_both() -> None:
    w = run(WAITS)
    w._workflows.partitions = 7
    elsewhere = next(id for id in "abcdefghijk" if partition_of(id.encode(), 7) != 0)
    reply = forked(w, elsewhere)
    assert status(reply) == "rejected" and f"{elsewhere} belongs to partition {partition_of(elsewhere.encode(), 7)}" in reply["message"]
    assert elsewhere.encode() not in w.state.entries


PARENT = """
def main(o):
    yield kw.start_child("double", 1, id="kid")
def double(o):
    yield kw.suspend("r")
"""
CLEANS = """
def tidy():
    try:
        yield kw.suspend("a")
    finally:
        yield kw.suspend("b")
def main(o):
    kw.spawn(tidy())
    yield kw.suspend("r")
"""
REFUSED = {"child": (PARENT, [], "child kid"), "closing": (CLEANS, ["r"], "it has ended and is cleaning up")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_forked_says_why(case: str) -> None:
    body, resumed, said = REFUSED[case]
    w = run(body)
    for ref in resumed:
        w.resume("w", ref)
    entries = dict(w.state.entries)
    reply = forked(w)
    assert (status(reply), said in reply["message"]) == ("rejected", True)
    assert w.state.entries == entries


def test_one_that_does_not_say_when_its_timers_are_due_is_forked_after_its_next_step() -> None:
    """Earlier versions did not write it."""
    w = run("def main(o):\n    yield kw.sleep(60)\n    return o\n", 4)
    (wait,) = w.header("w")["waits"]
    w.state.entries[b"w"] = snapshot.amend(w.state.entries[b"w"], waits=[{name: value for name, value in wait.items() if name != "due"}])
    assert "it was saved by an earlier version of kwflow" in forked(w)["message"]
    w.command("w", "signal", {"name": "nobody reads this"})
    assert (w.header("w")["waits"], status(forked(w))) == ([wait], "ok")
    w.advance(60)
    assert (w.result("w"), w.result("copy")) == (4, 4)


def test_one_that_is_parked_is_forked_as_it_was_before_the_record_that_parked_it() -> None:
    """semantics §7: held records belong to the original."""
    w = run(PARKS, 3)
    w.resume("w", "r", "park")
    held = {key for key in w.state.entries if key.startswith(b"\0hold")}
    assert (w.header("w")["status"], status(forked(w)), w.header("copy")["status"], "parked" in w.header("copy")) == ("parked", "ok", "waiting", False)
    w.resume("copy", "r", 1)
    assert (w.result("copy"), w.header("w")["status"], {key for key in w.state.entries if key.startswith(b"\0hold")}) == (3, "parked", held)


def test_a_fork_that_begins_paused_holds_what_comes_until_it_is_unpaused() -> None:
    """Otherwise a timer that is due would wake the code that is to be fixed."""
    w = run(TIMED, 3)
    w.advance(59)
    w.command("w", "fork", {"id": "copy", "paused": True})
    assert w.header("copy")["parked"] == {"reason": "paused", "message": "", "offset": 1, "was": "waiting"}
    w.advance(2)
    assert (w.result("w"), w.header("copy")["status"]) == ("late", "parked")
    w.command("copy", "unpause")
    assert w.result("copy") == "late"


def test_a_start_that_failed_cannot_be_forked() -> None:
    w = run("import threading\ndef main(o):\n    lock = threading.Lock()\n    yield kw.suspend('r')\n")
    assert (w.header("w")["status"], forked(w)["message"]) == ("parked", "its start failed, so there is nothing to continue from")


def test_what_runs_under_the_id_is_not_touched_and_what_has_ended_may_be_followed() -> None:
    """G5."""
    w = run(WAITS)
    w.start("other", "other", **{"kwflow-start-id": "named"})
    before = w.state.entries[b"other"]
    assert [status(forked(w, to)) for to in ("other", "w")] == ["exists", "exists"]
    assert w.state.entries[b"other"] == before
    w.command("other", "signal", {"name": "s", "value": "end"})
    assert (w.header("other")["status"], status(forked(w, "other")), w.header("other")["status"]) == ("ended", "ok", "waiting")


def test_a_fork_that_is_repeated_is_the_same_one() -> None:
    """M1.4. A record that is read again under at-least-once finds the copy further on."""
    w = run(WAITS)
    first = forked(w, None, kwflow_id="once")
    w.command(first["value"]["id"], "signal", {"name": "s", "value": 1})
    copy = w.state.entries[first["value"]["id"].encode()]
    assert forked(w, None, kwflow_id="once") == first
    assert (w.counts[-1], w.state.entries[first["value"]["id"].encode()]) == ("repeated", copy)


def test_an_id_that_is_none_makes_a_dead_letter() -> None:
    """G3."""
    w = run(WAITS)
    for id in ("", "a|b", "a\0b", "ü" * 300):
        assert status(w.command("w", "fork", {"id": id})) == "bad_arguments"
    assert w.ids() == ["w"]
