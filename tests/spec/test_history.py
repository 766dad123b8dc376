"""Events of what happened: one for each step and command that is committed, without values (decision 0059)."""

from typing import Any

import msgspec
import pytest

from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.wire import Record
from kwflow.runners.history import History
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore, WorkflowTester

SOURCE = """
import kwflow as kw

@kw.activity(name="history.charge", retry=kw.Retry(first=1, jitter=0))
def charge(n):
    if kw.activity_info().attempt < 2:
        raise ValueError("secret")
    return n

def child(n):
    yield kw.wait_signal("done")
    return n

def order(n):
    kw.log("begun")
    paid = yield charge(n)
    go, _ = yield kw.all([kw.timeout(kw.wait_signal("go"), 100), kw.start_child("child", n, id="c")])
    raise ValueError("secret")

def counts(n):
    while True:
        value = yield kw.wait_signal("next")
        if value == "file":
            held = open("/dev/null")
        if value == "end":
            return n

def keeps(n):
    held = {n: open("/dev/null")}
    yield kw.wait_signal("go")
    return held

def refs(n):
    a = kw.suspend("0" * n + "a")
    while True:
        yield a
        a = kw.suspend("0" * n + "b")

def many(n):
    yield kw.race([kw.suspend(f"r{number}") for number in range(n)])
"""


@pytest.fixture
def tester(monkeypatch: pytest.MonkeyPatch) -> WorkflowTester:
    monkeypatch.setenv("KWFLOW_HISTORY_TOPIC", "history")
    module = durable.load_source("history_case", SOURCE, "history_case.py")
    return WorkflowTester(**{name: getattr(module, name) for name in ("child", "order", "counts", "many", "keeps", "refs")})


def events(tester: WorkflowTester, id: str) -> list[dict[str, Any]]:
    return [event for output, event in zip([output for output in tester.outputs if output.topic == "history"], tester.values("history"), strict=True) if output.key == id.encode()]


def test_each_step_and_each_command_is_an_event_with_what_came_and_where_it_waits_since(tester: WorkflowTester) -> None:
    """Decision 0059: no event has an input, an answer or an error."""
    tester.start("o", "secret", workflow="order")
    tester.advance(1)
    tester.command("o", "signal", {"name": "go", "value": "secret"})
    tester.command("o", "pause", {"reason": "audit"})
    tester.command("c", "signal", {"name": "done"})
    tester.command("o", "unpause")
    found = events(tester, "o")
    assert [(event["event"], event["by"]["kind"], event.get("status")) for event in found] == [
        ("started", "start", "waiting"), ("resumed", "activity", "waiting"), ("resumed", "timer", "waiting"), ("resumed", "activity", "waiting"), ("signal", "signal", "waiting"),
        ("paused", "pause", "paused"), ("held", "answer", "paused"), ("unpaused", "unpause", None), ("resumed", "child", "ended"),
    ]  # fmt: skip
    place = {"function": "order", "file": "history_case.py", "line": 16}
    assert found[0]["logs"] == ["begun"] and found[0]["waits"] == [{"ref": "0:1", "kind": "activity", "name": "history.charge", "attempt": 1, **place}]
    assert found[1]["by"] == {"kind": "activity", "ref": "0:1", "name": "history.charge", "attempt": 1, "failed": True} and "failed" not in found[3]["by"]
    assert found[4]["by"] == {"kind": "signal", "name": "go"} and found[5]["by"] == {"kind": "pause", "reason": "audit"} and found[5]["reason"] == "audit"
    assert found[-1]["outcome"] == {"kind": "error", "at": {**place, "line": 18}}
    assert {(event["workflow"], event["start_id"]) for event in found} == {("order", "0-0")}
    assert not any(b"secret" in (output.value or b"") for output in tester.outputs if output.topic == "history")
    assert [(event["event"], event["status"]) for event in events(tester, "c")] == [("started", "waiting"), ("signal", "ended")]


def test_what_changes_nothing_is_no_event(tester: WorkflowTester) -> None:
    """G3: a record that is ignored by a stated rule or refused, a query, or a dead letter, which has its own topic."""
    tester.start("w", 1, workflow="counts")
    tester.start("w", 1, workflow="counts")
    tester.start("x", 1, workflow="nobody")
    tester.resume("w", "unknown")
    tester.command("w", "query")
    tester.command("w", "signal", {"name": 5})
    tester.command("w", "migrate")
    tester.command("w", "retry")
    tester.command("nobody", "terminate")
    assert [(event["event"], event["record"]["offset"]) for event in [*events(tester, "w"), *events(tester, "x"), *events(tester, "nobody")]] == [("started", 0)]


def test_parked_retried_discarded_forked_and_terminated(tester: WorkflowTester) -> None:
    """semantics §7: each event says why, and those of held records follow it."""
    tester.start("w", 1, workflow="counts")
    tester.command("w", "signal", {"name": "next", "value": "file"})
    tester.command("w", "signal", {"name": "next", "value": 1})
    tester.command("w", "retry")
    tester.command("w", "discard")
    tester.command("w", "fork", {"id": "copy"})
    tester.command("w", "terminate", {"reason": "enough"})
    found = events(tester, "w")
    assert [event["event"] for event in found] == ["started", "parked", "held", "retried", "parked", "held", "discarded", "signal", "forked", "terminated"]
    assert found[1]["reason"] == "UnsavableError" and found[1]["status"] == "parked"
    assert found[-2]["logs"] == ["w: forked as copy"] and found[-1]["by"] == {"kind": "terminate", "reason": "enough"} and found[-1]["status"] == "ended"
    assert found[-1]["outcome"] == {"kind": "terminated"} and "reason" not in found[-1]


def test_a_batch_whose_steps_are_made_again_has_one_event_for_each(tester: WorkflowTester) -> None:
    """K15: the last state cannot be saved, so all steps are made again one by one, and the last one parks the instance."""
    config = Config(instances_cached_max=0)
    processor = WorkflowProcessor(config, Workflows({"counts": tester._workflows.workflows.functions["counts"]}, "counts"), frozenset())
    values = [b"new:1", *[b'{"name": "next", "value": %s}' % value for value in (b"1", b"2", b'"file"', b"4")]]
    records = [Record(config.resume_topic, 0, number, 1, b"w", value, (("kwflow-op", b"signal"),) * (number > 0)) for number, value in enumerate(values)]
    made = processor.decide(Overlay(MemoryStore()), records, 77)
    told = [[output for output in decision.outputs if output.topic == "history"] for decision in made]
    assert [len(one) for one in told] == [1] * 5
    assert [b'"event":"%s"' % word in one[0].value for word, one in zip((b"started", b"signal", b"signal", b"parked", b"held"), told, strict=True)] == [True] * 5  # type: ignore[operator]
    assert all(one[0].timestamp_ms == 77 for one in told)


def test_of_many_waits_the_first_are_told(tester: WorkflowTester) -> None:
    """An event stays small, however much an instance waits for."""
    tester.start("w", 5_000, workflow="many")
    [event] = events(tester, "w")
    assert len(event["waits"]) == 20 and event["more_waits"] == 4_980


def test_without_the_setting_there_is_none() -> None:
    assert WorkflowTester(main=lambda o: o)._workflows.history is None
    assert isinstance(WorkflowProcessor(Config(history_topic="h"), Workflows({}), frozenset()).history, History)


def test_why_it_is_parked_is_named_and_not_told(tester: WorkflowTester) -> None:
    """Decision 0059: the key of a dict in a variable, and the text of a class that cannot be saved, are values."""
    tester.start("k", "secret", workflow="keeps")
    [event] = events(tester, "k")
    assert (event["event"], event["reason"]) == ("parked", "UnsavableError") and "secret" not in str(event)
    assert any(b"secret" in (value or b"") for output in tester.outputs if output.topic.endswith("dead-letter") for _, value in output.headers)


def test_refs_of_authors_and_of_senders_are_told_by_their_begin(tester: WorkflowTester) -> None:
    """This is a limit. Many topics would refuse an event of 900,000 bytes for each record that a paused instance holds."""
    tester.start("r", 25_000, workflow="refs")
    tester.resume("r", "0" * 25_000 + "a", 1)
    tester.command("r", "pause", {"reason": "x" * 1_000})
    tester.resume("r", "y" * 900_000, 1)
    found = [output.value or b"" for output in tester.outputs if output.topic == "history"]
    assert [event["event"] for event in events(tester, "r")] == ["started", "resumed", "paused", "held"] and max(map(len, found)) < 30_000


def test_what_was_not_paused_is_not_unpaused(tester: WorkflowTester) -> None:
    """Nothing has changed."""
    tester.start("w", 1, workflow="counts")
    tester.command("w", "unpause")
    tester.command("w", "pause")
    tester.command("w", "unpause")
    tester.command("w", "unpause")
    assert [event["event"] for event in events(tester, "w")] == ["started", "paused", "unpaused"]


def test_a_header_that_is_none_is_damaged_in_events_too() -> None:
    """Its bytes are intact, but no engine of ours writes such a header. Terminate ends the instance."""
    processor = WorkflowProcessor(Config(history_topic="h"), Workflows({}), frozenset())
    for header in ({"status": "waiting"}, {"status": "parked", "parked": None, "start_id": "", "waits": []}, {"status": "waiting", "workflow": "w", "start_id": "", "waits": []}):
        state = Overlay(MemoryStore())
        state.put(b"w", snapshot.copy(b"", {"v": 1, "id": "w", "start_id": "s", **header}))
        [made] = processor.decide(state, [Record("workflow-resume", 0, 9, 1, b"w", b"null", (("kwflow-op", b"terminate"),))], 77)
        assert b'"event":"terminated"' in (made.outputs[0].value or b"") and made.outputs[0].topic == "h"


def test_an_event_that_its_topic_does_not_take_parks_the_instance_and_nothing_is_lost(tester: WorkflowTester) -> None:
    """K11: the event of the parking was refused as well, and only the place of the record was left."""
    config = Config(history_topic="h")
    processor, state = WorkflowProcessor(config, Workflows({}), frozenset()), Overlay(MemoryStore())
    record = Record(config.resume_topic, 0, 3, 1, b"w", b"new:1")
    for topic, topics in (("h", ["workflow-engine-dead-letter"]), ("ask", ["h", "workflow-engine-dead-letter"])):
        assert [output.topic for output in processor.refuse(state, record, f"{topic}: Broker: Message size too large", topic).outputs] == topics
    [event] = [msgspec.json.decode(output.value or b"") for output in processor.refuse(state, record, "ask: no").outputs if output.topic == "h"]
    assert (event["event"], event["status"], event["reason"]) == ("parked", "parked", "RefusedError")
    discard = Record(config.resume_topic, 0, 4, 1, b"w", b"null", (("kwflow-op", b"discard"),))
    made = processor.refuse(state, discard, "ask: no")
    assert [msgspec.json.decode(output.value or b"")["event"] for output in made.outputs if output.topic == "h"] == ["discarded"]
