"""Calls of activities with a queue, as a step makes them and a worker reads them (M6.6), each step through real snapshots."""

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kwflow as kw
from kwflow import activities, api, durable, worker
from kwflow.core import queues
from kwflow.core.dispatch import PREFIX, Dispatch, Withdraw, state_key
from kwflow.core.wire import Record
from kwflow.errors import ProtocolError
from kwflow.runners.moved import MOVES
from kwflow.testing import WorkflowTester
from tests.spec.test_checkpoints_attacked import Partition

_count = itertools.count()
SOURCE = """
import kwflow as kw

@kw.activity(name=__name__ + ".work", queue=__name__, retry=kw.Retry(max_attempts=2, first=10, jitter=0), timeout=60)
def work(n: int) -> int:
    return n + 1

def main(n):
    try:
        return (yield work(n))
    except kw.ActivityError as error:
        return error.type
"""


def made(queues: bool = True) -> tuple[WorkflowTester, str]:
    """A tester whose engine hands calls out or runs them, and the queue."""
    name = f"queue_case_{next(_count)}"
    tester = WorkflowTester(durable.load_source(name, SOURCE, f"{name}.py").main)
    tester._workflows.queues = queues
    return tester, name


def handed(tester: WorkflowTester, queue: str) -> list[tuple[str, Any]]:
    return [((output.key or b"").decode(), json.loads(output.value) if output.value is not None else None) for output in tester.outputs if output.topic == queue]


def test_a_call_is_a_record_of_its_queue_and_nothing_lies_beside_the_state() -> None:
    """M6.6, G1: outputs of a step become visible together with its state."""
    tester, queue = made()
    tester.start("w", 4)
    ref = next(wait["ref"] for wait in tester.header("w")["waits"] if wait["kind"] == "job")
    [(key, job)] = handed(tester, queue)
    assert key == f"w|{ref}"
    assert job == {
        "resume_topic": "workflow-resume", "workflow_id": "w", "ref": ref, "activity": f"{queue}.work", "attempt": 1, "idempotency_key": f"w|{ref}", "arguments": {"n": 4},
    }  # fmt: skip
    assert tester.calls == [] and not any(key.startswith(PREFIX) for key in tester.state.entries)
    tester.resume("w", ref, 5)
    assert tester.result("w") == 5
    assert len(handed(tester, queue)) == 1, "who has answered need not be told"


def test_who_answers_a_call_of_a_paused_workflow_is_told_at_once_that_the_answer_is_kept() -> None:
    """ET-21: nothing is left to do for whoever has done the call. A gateway that waited in vain for the reply lent it again each time its lock was over, until the hold was full."""
    tester, _ = made()
    tester.start("w", 4)
    ref = next(wait["ref"] for wait in tester.header("w")["waits"] if wait["kind"] == "job")
    tester.command("w", "pause", {"reason": "audit"})
    for number, answered in enumerate((ref, "0:9", "own")):
        tester.send("w", json.dumps({"ref": answered, "value": 5}).encode(), {"kwflow-request": f"q{number}", "kwflow-reply-to": "0/g"})
    for number in range(2):  # the second one answers a call that nobody waits for any more
        kept = tester.reply(f"q{number}")
        assert (kept["status"], kept["message"]) == ("held", "it is paused (audit); this record is kept and applied when the instance is unpaused")
    assert tester.reply("q2") is None, "others wait as their records do"
    tester.command("w", "unpause")
    assert tester.result("w") == 5 and tester.reply("q2")["status"] == "not_found"


def test_where_no_worker_can_read_a_topic_the_engine_runs_the_call() -> None:
    """In embedded engines, and in tests."""
    tester, queue = made(queues=False)
    tester.start("w", 4)
    assert tester.result("w") == 5 and handed(tester, queue) == []


def test_a_call_over_its_time_is_taken_back_and_handed_out_again_under_the_same_key() -> None:
    """M6.4: the pause in between is durable. The second attempt has its own ref."""
    tester, queue = made()
    tester.start("w", 4)
    tester.advance(60)
    (key, first), (again, nothing) = handed(tester, queue)
    assert key == again and nothing is None
    tester.advance(10)
    _, _, (other, second) = handed(tester, queue)
    assert other != key and (second["attempt"], second["idempotency_key"]) == (2, first["idempotency_key"])
    tester.resume("w", first["ref"], 0)  # too late
    tester.resume("w", second["ref"], 5)
    assert tester.result("w") == 5


def test_whoever_ends_an_instance_takes_its_calls_back() -> None:
    """M3: from the header alone."""
    for op in ("terminate", "cancel"):
        tester, queue = made()
        tester.start("w", 4)
        tester.command("w", op, {"reason": "over"})
        assert [value for _, value in handed(tester, queue)][1:] == [None], op


def test_a_result_that_parks_its_workflow_and_is_discarded_ends_the_call() -> None:
    """Semantics §7."""
    name = f"queue_case_{next(_count)}"
    parks = SOURCE.replace("return (yield work(n))", "value = yield work(n)\n        lock = __import__('threading').Lock()\n        yield kw.suspend('x')")
    tester = WorkflowTester(durable.load_source(name, parks, f"{name}.py").main)
    tester._workflows.queues = True
    tester.start("w", 4)
    [(_, job)] = handed(tester, name)
    tester.resume("w", job["ref"], 5)
    assert tester.header("w")["status"] == "parked"
    tester.command("w", "discard")
    assert tester.result("w") == "Discarded"


def test_an_activity_that_calls_a_queue_declares_its_topic_and_a_name_that_is_none_is_refused() -> None:
    tester, queue = made()
    assert queue in api.declared_topics()
    for name in ("", "no spaces", "ä", "x" * 250, 5):
        with pytest.raises(kw.UsageError, match="must be a topic name"):
            kw.activity(queue=name)(lambda: None)  # type: ignore[call-overload]
    assert queue in worker.queues_served() and worker.queues_served([queue, queue]) == [queue]
    assert activities.find_activity(f"{queue}.work").queue == queue  # type: ignore[union-attr]


def _dots(n: int) -> int: ...


def _documented(n: int) -> int:
    """Runs elsewhere."""


async def _later(n: int) -> None:
    pass


def _three(n: int) -> int:
    return 3


def _none(n: int) -> None:
    print(n)


@pytest.mark.parametrize(("function", "refused"), [(_dots, True), (_documented, True), (_later, True), (_three, False), (_none, False)])
def test_a_worker_does_not_answer_for_an_activity_that_is_only_declared(function: Any, refused: bool) -> None:
    """Each call would be answered with null, and its workflow would go on with that."""
    queue = f"stub-{next(_count)}"
    activity = kw.activity(name=queue, queue=queue)(function)
    if refused:
        with pytest.raises(kw.UsageError, match=f"activity {queue} has no body in these modules"):
            worker.queues_served([queue])
        assert queue not in worker.queues_served()
        kw.batch_of(activity, size=2)(lambda calls: None)
    assert worker.queues_served([queue]) == [queue] and queue in worker.queues_served()


def record(key: bytes | None, value: bytes | None) -> Record:
    return Record("q", 0, 7, 0, key, value)


GOOD = {"resume_topic": "r", "workflow_id": "w", "ref": "1:2", "activity": "a", "attempt": 3, "idempotency_key": "w|0:1", "arguments": {"n": 1}}


def test_the_headers_of_a_call_go_on_with_its_answer() -> None:
    """Semantics §9.3: all but kwflow's own."""
    written = msgspec.structs.replace(record(b"w|1:2", json.dumps(GOOD).encode()), headers=(("tenant", b"a"), ("kwflow-due-ms", b"1"), ("traceparent", b"00-")))
    call = queues.read(written, "r")
    assert isinstance(call, Dispatch) and call.headers == (("tenant", b"a"), ("traceparent", b"00-"))


def test_a_worker_reads_what_a_step_has_written() -> None:
    call = Dispatch("w", "1:2", "a", 3, "0:1", b'{"n":1}')
    assert queues.read(record(queues.key_of("w", "1:2"), queues.handed_out(call, "r")), "r") == call
    assert queues.read(record(queues.key_of("w", "1:2"), None), "r") == Withdraw("w", "1:2")
    assert queues.read(record(None, queues.handed_out(call, "r")), "another") is None


@pytest.mark.parametrize("wrong", [
    {"ref": "mine"}, {"ref": "1:2\n"}, {"workflow_id": ""}, {"workflow_id": "a|b"}, {"workflow_id": "x" * 600}, {"activity": ""}, {"attempt": 0}, {"attempt": "1"},
    {"idempotency_key": "v|0:1"}, {"idempotency_key": "w"}, {"arguments": [1]}, {"arguments": None}, {"resume_topic": 5},
])  # fmt: skip
def test_what_is_no_call_is_said_to_be_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        queues.read(record(b"w|1:2", json.dumps({**GOOD, **wrong}).encode()), "r")


_almost = st.dictionaries(st.sampled_from(sorted(GOOD)), st.text(max_size=9)).map(lambda some: json.dumps({**GOOD, **some}).encode())


@given(st.one_of(st.none(), st.binary(max_size=80)), st.one_of(st.none(), st.binary(max_size=200), _almost))
def test_reading_is_total(key: bytes | None, value: bytes | None) -> None:
    """wire.md §5: it gives a value or a ProtocolError, whatever the bytes."""
    try:
        queues.read(record(key, value), "r")
    except ProtocolError:
        pass


def moved_into_a_queue() -> Partition:
    """An instance whose call an engine without workers had stored, in an engine that has workers."""
    site = Partition("""
from tests.spec.test_checkpoints_attacked import checkpoint_attack_print
def main(o):
    yield kw.wait_signal("go")
    yield kw.race([checkpoint_attack_print(1), kw.wait_signal("enough")])
    while True:
        yield kw.wait_signal("said")
main.kwflow_checkpoints = 5
""")
    site.send("start")
    site.processor.queues = False
    site.send("signal", {"name": "go", "value": 1})
    site.processor.queues = True
    site.store.entries[MOVES] = b"1"
    return site


@pytest.mark.parametrize(("op", "value"), [("terminate", {"reason": ""}), ("rewind", {"to": 0}), ("signal", {"name": "enough", "value": 1}), ("cancel", {"reason": ""})])
def test_such_a_call_is_withdrawn_from_its_queue_when_nobody_waits_for_it_any_more(op: str, value: Any) -> None:
    """M6.6: a worker that has not begun it does not begin it."""
    site = moved_into_a_queue()
    made = site.send(op, value)
    assert [(output.key, output.value) for output in made.outputs if output.topic == "checkpoint-attack"] == [(b"w|2:1", None)]
    assert state_key("w", "2:1") not in site.store.entries


def test_it_is_withdrawn_once_also_if_a_command_follows_in_the_same_batch() -> None:
    """K15: the command's batch had removed what tells of the queue by then."""
    site = moved_into_a_queue()
    made = site.batch(site.record("signal", {"name": "enough", "value": 1}), site.record("pause", {"reason": ""}), site.record("terminate", {"reason": ""}))
    assert [output.key for one in made for output in one.outputs if output.topic == "checkpoint-attack"] == [b"w|2:1"]


@pytest.mark.parametrize(("op", "value"), [("fork", {"id": "w2"}), ("rewind", {"to": 1})])
def test_a_call_of_a_queue_that_an_engine_without_workers_has_stored_is_handed_out_when_it_is_made_again(op: str, value: Any) -> None:
    """Decision 0065: from there the state has moved to Kafka, and no engine has what a worker has."""
    site = moved_into_a_queue()
    if op == "rewind":
        site.send("answer", {"ref": "2:1", "value": None})
    made = site.send(op, value)
    id = value.get("id", "w")
    [called] = [output for output in made.outputs if output.topic == "checkpoint-attack" and output.value is not None]
    assert called.key == f"{id}|2:1".encode() and b"page" in (called.value or b"")
    assert state_key(id, "2:1") in site.store.entries, "from there, the next export has it"
