"""Commands and their replies (M1, M2, M4), each through real snapshots."""

import pathlib
from typing import Any

import pytest

from kwflow import durable
from kwflow.core.values import LEVELS_MAX
from kwflow.core.wire import Output
from kwflow.runners import parked
from kwflow.testing import WorkflowTester

HEAD = "import kwflow as kw\nkw.declare_topics('out')\ndef say(x):\n    kw.output(str(x), 'out')\n"
WAITS = """
def main(o):
    try:
        return (yield kw.suspend("r"))
    except BaseException as e:
        say(type(e).__name__)
        raise
"""
_count = [0]


def run(body: str, options: Any = None, **headers: str) -> WorkflowTester:
    """A started tester for a module with this text."""
    _count[0] += 1
    module = durable.load_source(f"message_case_{_count[0]}", HEAD + body, f"message_case_{_count[0]}.py")
    tester = WorkflowTester(module.main, **{name: getattr(module, name) for name in ("big", "broken", "double", "node") if hasattr(module, name)})
    tester.start("w", options, **headers)
    return tester


def status(reply: dict[str, Any] | None) -> Any:
    assert reply is not None, "no reply"
    return reply["status"]


def outcomes(tester: WorkflowTester) -> list[tuple[str, str]]:
    """(kwflow-outcome, kwflow-start-id) of every result and error record."""
    ends = (tester.config.result_topic, tester.config.error_topic)
    headers = [dict(output.headers) for output in tester.outputs if output.topic in ends]
    return [((found["kwflow-outcome"] or b"").decode(), (found["kwflow-start-id"] or b"").decode()) for found in headers]


def test_what_is_as_deep_as_json_may_be_is_replied_too() -> None:
    """G3: a reply is one level deeper than what it carries; it ended the engine."""
    body = """
def nest(n):
    return [nest(n - 1)] if n else []
def main(n):
    kw.set_status(nest(n))
    update = yield kw.on_update("u")
    kw.reply(update, nest(n))
    yield kw.suspend("s")
"""
    for depth in (LEVELS_MAX - 1, LEVELS_MAX):
        w = run(body, depth)
        assert status(w.command("w", "query")) == status(w.command("w", "update", {"name": "u"})) == "ok"


# -- start -----------------------------------------------------------------------------------------------------------
def test_a_start_is_replied_started_then_duplicate_or_exists_and_duplicate_also_after_the_end() -> None:
    """M2, K20."""
    w = run(WAITS, **{"kwflow-start-id": "first"})

    def start(start_id: str) -> Any:
        request = f"r{len(w.replies)}"
        w.start("w", **{"kwflow-start-id": start_id, "kwflow-request": request, "kwflow-reply-to": "0/p"})
        return status(w.reply(request))

    assert [start("first"), start("second")] == ["duplicate", "exists"]
    w.resume("w", "r", 1)
    assert [start("first"), start("third"), start("third")] == ["duplicate", "started", "duplicate"]


@pytest.mark.parametrize("start_id", ["2026-17", "0-017", "0-99999", "٠-٠"])
def test_a_start_id_that_looks_like_one_of_ours_is_known_after_the_end_too(start_id: str) -> None:
    """K20: the engine's are `<partition>-<offset>`, and an order may have such a number, too."""
    w = run("def main(o):\n    return 1\n    yield")
    assert w.header("w") is None, "nobody named that start"
    for _ in range(2):
        w.start("x", **{"kwflow-start-id": start_id})
    assert w.counts[1:] == ["started", "duplicate-start"]


def test_an_unknown_workflow_is_a_dead_letter_and_a_reply_that_names_the_known_ones() -> None:
    """M2."""
    w = run(WAITS)
    w.start("x", workflow="nothing", **{"kwflow-request": "r", "kwflow-reply-to": "0/p"})
    reply = w.reply("r")
    assert status(reply) == "unknown_workflow"
    assert "main" in (reply or {})["message"]
    assert len(w.outputs_to(w.config.dead_letter_topic)) == 1


def test_a_resume_is_replied_delivered_unknown_ref_or_not_found() -> None:
    w = run(WAITS)
    for number, (id, ref) in enumerate([("w", "other"), ("w", "r"), ("w", "r"), ("nobody", "r")]):
        w.send(id, b'{"ref":"%s","value":7}' % ref.encode(), {"kwflow-request": str(number), "kwflow-reply-to": "0/p"})
    assert [status(w.reply(str(number))) for number in range(4)] == ["unknown_ref", "delivered", "not_found", "not_found"]


def test_who_comes_after_the_end_is_told_that_it_was_the_end() -> None:
    """K20, M1.5: as long as the entry stays, and not for an id that never ran or for another run of it."""
    w = run(WAITS, **{"kwflow-start-id": "s"})
    w.resume("w", "r", 1)
    w.send("w", b'{"ref":"r"}', {"kwflow-request": "late", "kwflow-reply-to": "0/p"})
    late = [w.reply("late"), *(w.command("w", op, {"name": "n"} if op == "signal" else None) for op in ("signal", "cancel", "migrate", "terminate"))]
    assert [(status(reply), (reply or {})["message"]) for reply in late] == [("not_found", "it has ended")] * 5
    for reply in (w.command("nobody", "signal", {"name": "n"}), w.command("w", "signal", {"name": "n"}, kwflow_start_id="another")):
        assert (status(reply), (reply or {})["message"]) == ("not_found", "")


# -- query -----------------------------------------------------------------------------------------------------------
def test_a_query_shows_the_header_without_running_author_code() -> None:
    """M2."""
    w = run(WAITS, **{"kwflow-start-id": "s", "kwflow-client": "me"})
    shown = w.command("w", "query")
    assert status(shown) == "ok"
    value = (shown or {})["value"]
    assert (value["id"], value["workflow"], value["status"], value["start_id"], value["client"]) == ("w", "main", "waiting", "s", "me")
    assert [(wait["ref"], wait["kind"], wait["function"]) for wait in value["waits"]] == [("r", "suspension", "main")]
    assert not {"code", "applied", "v"} & value.keys()
    assert value["created"] == value["updated"] == w.now_ms and value["waits_total"] == 1
    assert status(w.command("nobody", "query")) == "not_found"


def test_a_query_after_the_end_gives_the_outcome() -> None:
    """M4, K20."""
    w = run(WAITS, **{"kwflow-start-id": "s"})
    w.resume("w", "r", {"answer": 42})
    value = (w.command("w", "query") or {})["value"]
    assert (value["status"], value["outcome"]) == ("ended", {"kind": "result", "value": '{"answer":42}'})


FAILS = """
import json

def checked(answer):
    return json.loads(answer)

def inner(answer):
    yield kw.suspend("r")
    return checked(answer)

def main(o):
    return (yield from inner("{"))
"""


def test_what_an_ended_workflow_failed_at_is_kept_the_authors_innermost_frame() -> None:
    """K20, M4: not a frame of a library or of kwflow. The full traceback is in the error record."""
    w = run(FAILS, **{"kwflow-start-id": "s"})
    w.resume("w", "r")
    outcome = (w.command("w", "query") or {})["value"]["outcome"]
    line = FAILS.splitlines().index("    return json.loads(answer)") + HEAD.count("\n") + 1
    assert outcome["kind"] == "error" and outcome["at"] == {"function": "checked", "file": outcome["at"]["file"], "line": line}
    assert outcome["at"]["file"].startswith("message_case_")


@pytest.mark.parametrize(("body", "function"), [("def main(o):\n    raise ValueError", "main"), ("def main(o):\n    return {1, 2}\n    yield", None)])
def test_a_plain_function_fails_somewhere_too_and_a_result_that_has_no_json_nowhere(body: str, function: str | None) -> None:
    w = run(body, **{"kwflow-start-id": "s"})
    assert (w.header("w") or {})["outcome"].get("at", {}).get("function") == function


# -- cancel ------------------------------------------------------------------------------------------------------------
def test_cancel_raises_cancelled_at_the_innermost_wait_and_its_outcome_is_cancelled() -> None:
    """M2, M4."""
    w = run(WAITS, **{"kwflow-start-id": "s"})
    assert status(w.command("w", "cancel", {"reason": "too late"})) == "ok"
    assert w.outputs_to("out") == ["Cancelled"]
    assert outcomes(w) == [("cancelled", "s")]
    assert status(w.command("w", "cancel")) == "not_found"


def test_a_workflow_that_swallows_the_cancel_goes_on() -> None:
    w = run("def main(o):\n    try:\n        yield kw.suspend('r')\n    except kw.Cancelled:\n        pass\n    return (yield kw.suspend('more'))")
    w.command("w", "cancel", {"reason": "stop"})
    assert w.waits("w") == ["more"]
    assert ((w.command("w", "query") or {})["value"])["cancel"]["reason"] == "stop"
    w.resume("w", "more", 5)
    assert w.result("w") == 5


# -- terminate -------------------------------------------------------------------------------------------------------
def test_terminate_ends_without_author_code_and_cancels_timers() -> None:
    """M2, M3: each wait's entry in the header has what this needs."""
    w = run("def main(o):\n    try:\n        yield kw.all([kw.sleep(60), kw.suspend('r'), kw.sleep(90)])\n    finally:\n        say('ran')", **{"kwflow-start-id": "s"})
    assert status(w.command("w", "terminate", {"reason": "by hand"})) == "ok"
    assert w.outputs_to("out") == []
    assert w.values("workflow-error") == ["Terminated: by hand"]
    assert outcomes(w) == [("terminated", "s")]
    assert [dict(output.headers)["kwflow-failure-type"] for output in w.outputs if output.topic == "workflow-error"] == [b"Terminated"]
    assert [output.value for output in w.outputs if output.topic == "workflow-scheduler"] == [b"60000", b"90000", b"0", b"0"]
    assert w.timers.entries == {b"\0timers": b"0 "}, "none is set"
    assert status(w.command("w", "terminate")) == "not_found"
    assert ((w.command("w", "query") or {})["value"])["outcome"]["kind"] == "terminated"


def test_what_is_held_behind_a_parked_instance_is_answered_at_once_and_applied_by_a_retry(tmp_path: pathlib.Path) -> None:
    """M1.4: otherwise its caller would hear nothing and take it for lost. One request, one reply."""
    mended = tmp_path / "mended"
    body = "import os, threading\ndef main(o):\n    yield kw.suspend('r')\n    held = None if os.path.exists(o) else threading.Lock()\n    return (yield kw.wait_signal('s'))"
    w = run(body, str(mended))
    w.send("w", b'{"ref":"r"}', {"kwflow-request": "culprit", "kwflow-reply-to": "0/p"})
    assert (w.header("w") or {})["status"] == "parked"
    said = w.reply("culprit") or {}
    assert said["status"] == "held" and "it is parked (UnsavableError: " in said["message"] and "applied when the instance is retried" in said["message"]
    assert status(w.command("w", "signal", {"name": "s", "value": 7})) == "held"
    w.command("w", "pause")
    assert status(w.command("w", "signal", {"name": "s", "value": 8})) == "held", "it failed before it was paused"
    w.command("w", "unpause")
    mended.touch()
    assert status(w.command("w", "retry")) == "ok"
    assert w.values("workflow-result") == [7]


def test_terminate_reaches_an_instance_that_is_parked() -> None:
    """K17, G3."""
    w = run("import threading\ndef main(o):\n    yield kw.suspend('r')\n    lock = threading.Lock()\n    yield kw.suspend('s')")
    w.resume("w", "r")
    assert (w.header("w") or {})["status"] == "parked"
    w.send("w", b"null", {"kwflow-op": "cancel", "kwflow-request": "held", "kwflow-reply-to": "0/p"})
    assert status(w.reply("held")) == "held"
    assert status(w.command("w", "terminate")) == "ok"
    assert w.ids() == []


@pytest.mark.parametrize("records", [1, 5])
def test_what_is_held_behind_a_paused_instance_is_answered_when_it_is_terminated(records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: all of it, even more than one drain would take. Each record is counted."""
    monkeypatch.setattr(parked, "DRAINED_MAX", 2)
    w = run("def main(o):\n    yield kw.suspend('r')")
    w.command("w", "pause")
    for number in range(records):
        w.send("w", b"null", {"kwflow-op": "cancel", "kwflow-request": f"held {number}", "kwflow-reply-to": "0/p"})
        assert w.reply(f"held {number}") is None
    assert status(w.command("w", "terminate")) == "ok"
    assert [status(w.reply(f"held {number}")) for number in range(records)] == ["not_found"] * records
    assert w.counts.count("unknown-id") == records and not any(key.startswith(parked.HOLD) for key in w.state.entries)


def test_an_instance_that_was_parked_by_its_start_is_told_by_its_run_and_client() -> None:
    """M4: whoever waits for that run learns of its end."""
    w = run("import threading\ndef main(o):\n    lock = threading.Lock()\n    yield kw.suspend('r')", **{"kwflow-start-id": "s", "kwflow-client": "c"})
    header = w.header("w") or {}
    assert (header["status"], header["start_id"], header["client"]) == ("parked", "s", "c")
    assert status(w.command("w", "terminate", kwflow_start_id="another")) == "not_found"
    assert status(w.command("w", "terminate", kwflow_start_id="s")) == "ok"
    headers = dict(next(output for output in w.outputs if output.topic == "workflow-error").headers)
    assert (headers["kwflow-start-id"], headers["kwflow-client"]) == (b"s", b"c")


def test_what_comes_while_a_long_hold_is_applied_is_answered_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request, one reply: the record is not at fault, nor behind one that is."""
    monkeypatch.setattr(parked, "DRAINED_MAX", 1)
    w = run("def main(o):\n    yield kw.suspend('r')\n    return (yield kw.suspend('s'))")
    w.command("w", "pause")
    w.resume("w", "nobody")
    w.send("w", b'{"ref":"r"}', {"kwflow-request": "applied", "kwflow-reply-to": "0/p"})
    log, late = w._log, ["late", "too late"]

    def meanwhile(output: Output) -> None:
        """These are written before the command with which the engine continues."""
        if late and output.topic == w.config.resume_topic and dict(output.headers).get("kwflow-op") == b"retry":
            request = late.pop(0)
            address = (("kwflow-request", request.encode()), ("kwflow-reply-to", b"0/p"))
            log(Output(w.config.resume_topic, b"w", b'{"ref":"s","value":"%s"}' % request.encode(), address))
        log(output)

    w._log = meanwhile  # type: ignore[method-assign]
    assert status(w.command("w", "unpause")) == "ok"
    assert [status(w.reply(request)) for request in ("applied", "late", "too late")] == ["delivered", "delivered", "not_found"]
    assert w.result("w") == "late"


def test_terminate_of_a_closing_instance_writes_no_second_outcome() -> None:
    """Semantics §2.4."""
    w = run("def rest():\n    try:\n        yield kw.suspend('a')\n    finally:\n        yield kw.suspend('b')\ndef main(o):\n    kw.spawn(rest())\n    return 1")
    assert (w.header("w") or {})["status"] == "closing"
    w.command("w", "terminate")
    assert [kind for kind, _ in outcomes(w)] == ["result"]
    assert w.header("w") is None


# -- pause -----------------------------------------------------------------------------------------------------------
def test_while_paused_records_join_the_hold_and_unpause_applies_them_in_order() -> None:
    """M2, K17."""
    w = run("def main(o):\n    said = []\n    for n in range(3):\n        said.append((yield kw.suspend(f'r{n}')))\n    return said")
    assert status(w.command("w", "pause", {"reason": "audit"})) == "ok"
    for number in range(3):
        w.resume("w", f"r{number}", number)
    value = (w.command("w", "query") or {})["value"]
    assert (value["status"], value["parked"]["reason"], value["parked"]["message"]) == ("parked", "paused", "audit")
    assert w.command("w", "retry") == {"status": "paused", "message": "unpause it first", "value": None}
    assert status(w.command("w", "unpause")) == "ok"
    assert w.result("w") == [0, 1, 2]


def test_a_parked_instance_that_is_paused_stays_parked_when_it_is_unpaused() -> None:
    w = run("import threading\ndef main(o):\n    yield kw.suspend('r')\n    lock = threading.Lock()\n    yield kw.suspend('s')")
    w.resume("w", "r")
    w.command("w", "pause")
    assert status(w.command("w", "retry")) == "paused"
    assert (w.command("w", "unpause") or {})["message"] == "it is still parked; retry or discard it"
    assert (w.header("w") or {})["status"] == "parked"
    assert status(w.command("w", "discard")) == "ok"
    assert w.waits("w") == ["r"]


def test_unpause_of_what_is_not_paused_changes_nothing() -> None:
    w = run(WAITS)
    assert w.command("w", "unpause") == {"status": "ok", "message": "it was not paused", "value": None}
    assert [status(w.command("nobody", op)) for op in ("pause", "unpause", "terminate", "retry", "discard")] == ["not_found"] * 5


def test_a_damaged_instance_is_paused_and_unpaused_like_any_other() -> None:
    """G4: nothing of it can be changed, and that must not end the engine. The next record parks it."""
    w = run(WAITS)
    damaged = w.state.entries[b"w"] = (w.state.get(b"w") or b"")[:-1] + b"?"
    for op in ("unpause", "pause", "unpause"):
        assert status(w.command("w", op, kwflow_id=f"{op} {len(w.outputs)}")) == "ok"
    assert w.state.get(b"w") == damaged
    w.resume("w", "r")
    assert w.counts[-1] == "parked"
    assert status(w.command("w", "discard", kwflow_id="gives up")) == "ok"
    assert w.state.get(b"w") == damaged


# -- idempotency (M1.4) and runs (M1.5) --------------------------------------------------------------------------------
def test_a_command_repeated_with_its_id_changes_nothing_and_gets_the_same_reply() -> None:
    """M1.4."""
    w = run("def main(o):\n    while True:\n        try:\n            yield kw.suspend('r')\n        except kw.Cancelled:\n            say('cancelled')")
    for _ in range(3):
        assert status(w.command("w", "cancel", kwflow_id="once")) == "ok"
    assert w.outputs_to("out") == ["cancelled"]
    w.command("w", "cancel", kwflow_id="twice")
    assert w.outputs_to("out") == ["cancelled"] * 2
    for op, id in (("pause", "a"), ("unpause", "b"), ("pause", "a"), ("cancel", "once")):
        assert status(w.command("w", op, kwflow_id=id)) == "ok"
    assert w.outputs_to("out") == ["cancelled"] * 2 and (w.header("w") or {})["status"] == "waiting", "nor one that runs no author code, whatever came between"


def test_the_last_256_ids_are_known_again_and_no_more() -> None:
    """M1.4, at the limit and one past it."""
    w = run("def main(o):\n    while True:\n        try:\n            yield kw.suspend('r')\n        except kw.Cancelled:\n            say('cancelled')")
    for number in range(257):
        w.command("w", "cancel", kwflow_id=f"id-{number}")
    w.command("w", "cancel", kwflow_id="id-1")
    assert len(w.outputs_to("out")) == 257
    w.command("w", "cancel", kwflow_id="id-0")
    assert len(w.outputs_to("out")) == 258


@pytest.mark.parametrize("op", ["pause", "terminate", "discard"])
def test_an_op_on_the_header_is_idempotent_too(op: str) -> None:
    """M1.4: a repeated discard must not drop another record, and a repeated pause must not pause again what was unpaused."""
    w = run("import threading\ndef main(o):\n    while True:\n        if (yield kw.suspend('r')):\n            lock = threading.Lock()\n            yield kw.suspend('s')", **{"kwflow-start-id": "s"})
    if op == "discard":
        w.resume("w", "r", True)
        w.resume("w", "r", True)
    first = w.command("w", op, kwflow_id="once")
    again = (w.command("w", "unpause"), w.header("w"))[1] if op == "pause" else w.header("w")
    assert w.command("w", op, kwflow_id="once") == first
    assert w.header("w") == again


def test_a_start_id_on_an_op_limits_it_to_that_run() -> None:
    """M1.5."""
    w = run(WAITS, **{"kwflow-start-id": "one"})
    ops = ("query", "cancel", "pause", "terminate")
    assert [status(w.command("w", op, kwflow_start_id="two")) for op in ops] == ["not_found"] * 4
    assert w.waits("w") == ["r"]
    assert status(w.command("w", "query", kwflow_start_id="one")) == "ok"


def test_the_outcome_record_names_run_and_client() -> None:
    """M4."""
    w = run(WAITS, **{"kwflow-start-id": "s", "kwflow-client": "c"})
    w.resume("w", "r", 1)
    headers = dict(next(output for output in w.outputs if output.topic == "workflow-result").headers)
    assert (headers["kwflow-start-id"], headers["kwflow-client"], headers["kwflow-outcome"]) == (b"s", b"c", b"result")
