"""Heartbeats of activities: what an attempt says of its progress is kept in the workflow's header, and the next attempt continues there."""

import itertools
from typing import Any

import pytest

import kwflow as kw
from kwflow import durable
from kwflow.core import snapshot
from kwflow.core.dispatch import DETAILS_BYTES_MAX
from kwflow.testing import HANGS, WorkflowTester

_count = itertools.count()
BODY = """
import kwflow as kw

@kw.activity(name=__name__ + ".copy", heartbeat=30, timeout=3600, retry=kw.Retry(max_attempts=4, first=10, jitter=0))
def copy(files): ...

@kw.workflow(name=__name__ + ".kept", checkpoints=5)
def kept(files):
    return (yield copy(files))

def main(files):
    return (yield copy(files))

def two(files):
    return (yield kw.all([copy(files[:3]), copy(files[3:])]))
"""


class Site:
    """A tester whose activity copies files one by one, and fails before the file that an attempt must not reach."""

    def __init__(self, workflow: str = "main", body: str = BODY) -> None:
        name = f"heartbeats_{next(_count)}"
        self.module = durable.load_source(name, body, f"{name}.py")
        self.tester = WorkflowTester(getattr(self.module, workflow))
        self.begun: list[Any] = []  # what each attempt found
        self.fails: dict[int, Any] = {}  # attempt -> how many files it copies before it ends, and how
        self.tester.fake(f"{name}.copy", self.copy)

    def copy(self, files: list[str]) -> Any:
        info = kw.activity_info()
        self.begun.append(info.heartbeat_details)
        done = info.heartbeat_details or 0
        end = self.fails.get(info.attempt, (len(files), None))
        for n in range(done, end[0]):
            info.heartbeat(n + 1)
        if end[1] is HANGS:
            return HANGS
        if end[1] is not None:
            raise end[1]
        return len(files) - done

    @property
    def heartbeats(self) -> Any:
        return self.tester.header("w").get("heartbeats")


def test_the_next_attempt_finds_the_last_details_of_the_one_before() -> None:
    """M6.3: over a failure, another one, and the pauses between them, each step through saved bytes."""
    site = Site()
    site.fails = {1: (2, OSError("refused")), 2: (2, OSError("refused")), 3: (5, OSError("refused"))}
    site.tester.start("w", list("abcdef"))
    site.tester.finish("w")
    assert site.begun == [None, 2, 2, 5]
    assert site.tester.result("w") == 1


def test_an_attempt_that_is_over_its_timeout_leaves_its_details_to_the_next() -> None:
    site = Site()
    site.fails = {1: (4, HANGS)}
    site.tester.start("w", list("abcdef"))
    assert [given["details"] for given in site.heartbeats.values()] == [4]
    site.tester.finish("w")
    assert site.begun == [None, 4]


def test_each_call_has_details_of_its_own_and_none_stay_once_it_has_its_result() -> None:
    site = Site("two")
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", list("abcdef"))
    assert len(site.tester.calls) == 2
    refs = [wait["ref"] for wait in site.tester.header("w")["waits"] if wait["kind"] == "activity"]
    assert site.heartbeats == {ref: {"at": site.tester.now_ms, "details": 1} for ref in refs}
    site.tester.resume("w", refs[0], 3)
    assert list(site.heartbeats) == [refs[1]]
    site.tester.resume("w", refs[1], 3)
    assert site.tester.result("w") == [3, 3]
    assert site.tester.header("w") is None


def test_a_heartbeat_wakes_nobody_and_is_no_change_of_the_instance() -> None:
    """No step, no checkpoint, no newer time of change: only what queries show is different."""
    site = Site("kept")
    site.fails = {1: (0, HANGS)}
    site.tester.start("w", ["a"])
    before = site.tester.header("w")
    [ref] = [wait["ref"] for wait in before["waits"] if wait["kind"] == "activity"]
    site.tester.now_ms += 5
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": {"done": 1}}) == {"status": "ok", "message": "", "value": None}
    after = site.tester.header("w")
    assert after == before | {"heartbeats": {ref: {"at": site.tester.now_ms, "details": {"done": 1}}}}
    assert site.tester.command("w", "query")["value"]["heartbeats"] == after["heartbeats"]


def test_a_query_for_one_call_has_nothing_of_the_others() -> None:
    """A worker that takes ninety calls over asks for each: with all details in every answer, the engine would write 80 MB."""
    site = Site("two")
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", list("abcdef"))
    refs = [wait["ref"] for wait in site.tester.header("w")["waits"] if wait["kind"] == "activity"]
    for ref, other in (refs, refs[::-1]):
        answer = site.tester.command("w", "query", {"ref": ref})["value"]
        assert answer["heartbeats"] == {ref: site.heartbeats[ref]} and [wait["ref"] for wait in answer["waits"]] == [ref]
        assert other not in str(answer)
    assert site.tester.command("w", "query", {"ref": "9:9"})["value"] == {name: site.tester.header("w")[name] for name in ("id", "workflow", "status", "start_id")} | {"waits": [], "waits_total": 0}
    assert site.tester.command("w", "query", {"ref": 5})["status"] == "bad_arguments"


@pytest.mark.parametrize("op", ["park", "pause"])
def test_the_details_of_a_parked_or_paused_instance_are_kept_too(op: str) -> None:
    """A heartbeat is not held behind the record that parked it: it would come after the end of its own attempt."""
    site = Site()
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", list("abc"))
    [ref] = site.heartbeats
    if op == "park":
        stored = site.tester.state.get(b"w")
        assert stored is not None
        site.tester.state.apply({b"w": snapshot.park(stored, {}, "SomeError", "it failed", 7)})
    else:
        site.tester.command("w", "pause")
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": 2})["status"] == "ok"
    site.tester.command("w", "retry" if op == "park" else "unpause")
    site.tester.finish("w")
    assert site.begun == [None, 2]


def test_a_heartbeat_that_nobody_waits_for_changes_nothing() -> None:
    """G3: of an attempt that is over, of a wait that is no activity, of a workflow that has ended or never was."""
    site = Site()
    site.fails = {1: (1, OSError("refused"))}
    site.tester.start("w", ["a", "b"])
    [timer] = site.tester.waits("w")
    before = site.tester.state.get(b"w")
    for ref in (timer, "0:1", "another"):
        assert site.tester.command("w", "heartbeat", {"ref": ref, "details": 1})["status"] == "unknown_ref"
    assert site.tester.state.get(b"w") == before
    site.tester.finish("w")
    for id in ("w", "nobody"):
        assert site.tester.command(id, "heartbeat", {"ref": "0:1", "details": 1})["status"] == "not_found"


def test_details_that_are_too_large_are_refused_where_they_are_given_and_where_they_arrive() -> None:
    site = Site()
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", ["a"])
    [ref] = site.heartbeats
    most, more = "x" * (DETAILS_BYTES_MAX - 2), "x" * (DETAILS_BYTES_MAX - 1)
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": most})["status"] == "ok"
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": more})["status"] == "too_large"
    site.tester.send("w", b'{"ref":"%s","details":"%s"}' % (ref.encode(), more.encode()), {"kwflow-op": "heartbeat"})
    assert site.tester.logs == ["w: heartbeat details are not kept: they have at most 10000 bytes, not 10001; store the data elsewhere, and give a reference to it"] * 2
    assert not [output for output in site.tester.outputs if output.topic == site.tester.config.dead_letter_topic]
    assert site.heartbeats[ref]["details"] == most
    said = []

    def large(files: list[str]) -> None:
        for details in (more, {1, 2}.pop, object()):
            try:
                kw.activity_info().heartbeat(details)
            except kw.UsageError as error:
                said.append(str(error))

    site.tester.fake(site.module.copy, large)
    site.tester.start("v", ["a"])
    assert said[0] == "heartbeat details have at most 10000 bytes, not 10001; store the data elsewhere, and give a reference to it"
    assert all(text.startswith("these heartbeat details cannot be sent: ") for text in said[1:]) and len(said) == 3


def test_details_for_which_a_snapshot_has_no_room_are_told_of_and_become_no_dead_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call gives thousands of them.  The earlier details stay, and the workflow goes on."""
    monkeypatch.setenv("KWFLOW_SNAPSHOT_BYTES_MAX", "5000")
    site = Site()
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", ["a"])
    [ref] = site.heartbeats
    reply = site.tester.command("w", "heartbeat", {"ref": ref, "details": "x" * 5_000})
    assert reply is not None and reply["status"] == "too_large"
    assert reply["message"].startswith("heartbeat details are not kept: its snapshot would have ") and site.tester.logs == [f"w: {reply['message']}"]
    assert not [output for output in site.tester.outputs if output.topic == site.tester.config.dead_letter_topic]
    assert site.heartbeats[ref]["details"] == 1
    site.tester.resume("w", ref, 0)
    assert site.tester.result("w") == 0


def test_a_workflow_that_grows_is_not_parked_for_the_heartbeats_of_its_activities(monkeypatch: pytest.MonkeyPatch) -> None:
    """They make way, and the log says so. One that is too large without them is parked as ever."""
    monkeypatch.setenv("KWFLOW_SNAPSHOT_BYTES_MAX", "9000")
    site = Site("grows", BODY + """

def grows(files):
    held = [copy(files)]
    while True:
        held.append((yield kw.wait_signal("more")))
""")
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", ["a"])
    [ref] = site.heartbeats
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": "x" * 4000})["status"] == "ok"
    site.tester.command("w", "signal", {"name": "more", "value": "y" * 4000})
    assert site.tester.header("w")["status"] == "waiting" and site.heartbeats is None
    assert site.tester.logs == ["w: the heartbeat details of its activities are dropped, as its snapshot would exceed snapshot_bytes_max = 9000 with them"]
    site.tester.command("w", "signal", {"name": "more", "value": "z" * 4000})
    assert site.tester.header("w")["status"] == "parked"


def test_a_fork_begins_with_the_details_of_its_original_and_going_back_with_those_of_then() -> None:
    site = Site("kept")
    site.fails = {1: (1, HANGS)}
    site.tester.start("w", list("abc"))
    [ref] = site.heartbeats
    assert site.tester.command("w", "fork", {"id": "copy"})["status"] == "ok"
    assert site.begun == [None, 1]
    site.tester.command("w", "heartbeat", {"ref": ref, "details": 2})
    site.fails = {}
    site.tester.resume("w", ref, error={"kind": "activity", "type": "OSError", "message": "refused"})
    assert "heartbeats" not in site.tester.header("w")
    assert site.tester.command("w", "rewind", {"to": 0})["status"] == "ok"
    assert site.begun == [None, 1, 2]
    assert site.tester.result("w") == 1


def test_a_batch_gives_heartbeats_for_each_of_its_calls() -> None:
    site = Site("two", BODY + """

@kw.batch_of(copy, size=2)
def together(calls):
    for call in calls:
        call.info.heartbeat([call.info.heartbeat_details, call.info.attempt])
        if call.info.attempt == 2:
            call.complete(call.info.heartbeat_details)
        else:
            call.fail(OSError("refused"))
""")
    site.tester._fakes.clear()
    site.tester.start("w", list("abcdef"))
    site.tester.finish("w")
    assert site.tester.result("w") == [[[None, 1], 2]] * 2


def test_an_activity_that_declares_no_heartbeats_is_told_how_to() -> None:
    site = Site(body=BODY.replace("heartbeat=30, ", ""))
    said = []

    def beat(files: list[str]) -> None:
        for call in (kw.activity_info().heartbeat, lambda: kw.activity_info().heartbeat_details):
            with pytest.raises(kw.UsageError) as raised:
                call()
            said.append(str(raised.value))

    site.tester.fake(site.module.copy, beat)
    site.tester.start("w", ["a"])
    assert site.tester.header("w") is None
    name = site.module.copy.name
    assert set(said) == {f"activity {name} has no heartbeats: declare them with @kw.activity(heartbeat=60), the seconds after which an attempt without one has failed"}


@pytest.mark.parametrize("given", [0, -1, True, "30", float("nan"), float("inf")])
def test_a_heartbeat_that_is_no_time_is_refused_where_it_is_declared(given: Any) -> None:
    with pytest.raises(kw.UsageError) as raised:
        kw.activity(name=f"never{given}", heartbeat=given)(lambda: None)
    assert str(raised.value) == f"@kw.activity(heartbeat=...) must be a timedelta or a number of seconds above 0, not {given!r}"


def test_calls_that_were_made_before_the_heartbeat_was_declared_go_on() -> None:
    """Semantics §8: they wait in `attempts1`, whose next attempt is given no details; the calls made from then on do."""
    site = Site(body=BODY.replace("heartbeat=30, ", ""))
    site.tester.fake(site.module.copy, lambda files: HANGS)
    site.tester.start("w", list("abc"))
    site.module.copy.heartbeat_s = 30.0
    site.tester.fake(site.module.copy, site.copy)
    [ref] = [wait["ref"] for wait in site.tester.header("w")["waits"] if wait["kind"] == "activity"]
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": 1})["status"] == "ok"
    site.tester.finish("w")
    assert (site.begun, site.tester.result("w")) == ([None], 3)


@pytest.mark.parametrize("forged", [5, None, ["0:1"], {"0:1": 5}, {"0:1": {"at": "now"}}])
def test_with_forged_heartbeats_an_instance_is_damaged_and_continues_once_it_is_repaired(forged: Any) -> None:
    """Without `signing_keys`, whoever writes to the changelog may write anything there."""
    site = Site()
    site.fails = {1: (1, HANGS), 2: (1, OSError("refused"))}
    site.tester.start("w", list("abc"))
    [ref] = site.heartbeats
    stored = site.tester.state.get(b"w")
    assert stored is not None
    site.tester.state.apply({b"w": snapshot.amend(stored, (), heartbeats=forged)})
    assert site.tester.command("w", "heartbeat", {"ref": ref, "details": 2})["status"] == "unknown_ref"
    site.tester.resume("w", ref, error={"kind": "activity", "type": "OSError", "message": "refused"})
    assert "heartbeats" in site.tester.header("w")["parked"]["message"]
    mark = site.tester.header("w")["parked"]
    site.tester.state.apply({b"w": snapshot.park(stored, {}, mark["reason"], mark["message"], mark["offset"])})
    site.tester.command("w", "retry")
    site.tester.finish("w")
    assert site.begun == [None, 1, 1] and site.tester.result("w") == 2


@pytest.mark.parametrize("waits", [5, None, [5], [{}], [{"ref": "0:1"}], {"ref": "0:1"}])
def test_waits_of_a_forged_header_are_refused_by_a_heartbeat_and_every_other_command(waits: Any) -> None:
    """An error would end the engine, and with it all other workflows."""
    for op, arguments in {"heartbeat": {"ref": "0:1", "details": 1}, "query": None, "fork": None, "pause": None, "terminate": None}.items():
        site = Site()
        site.fails = {1: (1, HANGS)}
        site.tester.start("w", ["a"])
        stored = site.tester.state.get(b"w")
        assert stored is not None
        site.tester.state.apply({b"w": snapshot.amend(stored, (), waits=waits)})
        reply = site.tester.command("w", op, arguments)
        assert reply is not None and reply["status"] in ("ok", "rejected", "unknown_ref"), (op, reply)
