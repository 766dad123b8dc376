"""Signals, updates and status (M3): the mailbox, which wait reads a message in races, validators and replies. Each through real snapshots."""

from typing import Any

import msgspec
import pytest

import kwflow as kw
from kwflow.core.values import json_dumps
from kwflow.testing import WorkflowTester
from tests.spec.test_messages import outcomes, run, status


def signal(w: WorkflowTester, name: str, value: Any = None, **more: Any) -> Any:
    return status(w.command("w", "signal", {"name": name, "value": value, **more}))


def mailbox(w: WorkflowTester) -> Any:
    return ((w.command("w", "query") or {})["value"]).get("mailbox", {})


# -- signals -----------------------------------------------------------------------------------------------------------
def test_signals_are_kept_in_order_for_each_name_before_anybody_waits() -> None:
    """M3."""
    w = run("def main(o):\n    yield kw.suspend('go')\n    a = yield kw.wait_signal('a')\n    b = yield kw.wait_signal('b')\n    return [a, b, (yield kw.wait_signal('a'))]")
    assert [signal(w, name, value) for name, value in (("a", 1), ("b", 2), ("a", 3))] == ["delivered"] * 3
    assert mailbox(w) == {"signal": {"a": 2, "b": 1}}
    w.resume("w", "go")
    assert w.result("w") == [1, 2, 3]


def test_a_signal_wakes_who_waits_for_it() -> None:
    w = run("def main(o):\n    return (yield kw.wait_signal('a'))")
    assert ((w.header("w") or {})["waits"][0]["kind"], (w.header("w") or {})["waits"][0]["name"]) == ("signal", "a")
    signal(w, "a", {"x": 1})
    assert w.result("w") == {"x": 1}


def test_a_tester_signals_and_updates_as_a_client_does() -> None:
    w = run("""
def positive(n):
    if n <= 0:
        raise ValueError("negative")
def main(o):
    update = yield kw.on_update("n", validator=positive)
    go = yield kw.wait_signal("go")
    kw.reply(update, [update.value, go])
""")
    with pytest.raises(kw.CommandError, match="w: rejected: ValueError: negative"):
        w.update("w", "n", 0)
    assert w.update("w", "n", 1) is None  # not yet
    assert w.signal("w", "go", "now") is None
    assert [1, "now"] in [reply["value"] for reply in w.replies]
    for call in (lambda: w.signal("w", "go"), lambda: w.update("nobody", "n")):
        with pytest.raises(kw.CommandError, match="not_found"):
            call()


def test_several_waits_of_one_name_are_served_in_the_order_in_which_they_were_made() -> None:
    w = run("def one(n):\n    say([n, (yield kw.wait_signal('a'))])\ndef main(o):\n    yield kw.all([one(1), one(2), one(3)])")
    for value in "xyz":
        signal(w, "a", value)
    assert w.outputs_to("out") == ["[1, 'x']", "[2, 'y']", "[3, 'z']"]


def test_an_inbox_waits_takes_and_counts() -> None:
    w = run("""
def main(o):
    items = kw.signals('item')
    first = yield items
    yield kw.suspend('go')
    n = len(items)
    rest = items.take()
    more = yield kw.race({'item': items, 'late': kw.sleep(5)})
    return [first, n, rest, items.take(), more]
""")
    for value in range(4):
        signal(w, "item", value)
    w.resume("w", "go")
    w.advance(5)
    assert w.result("w") == [0, 3, [1, 2, 3], [], ["late", None]]


def test_a_resume_record_does_not_settle_a_wait_for_a_signal() -> None:
    w = run("def main(o):\n    return (yield kw.wait_signal('a'))")
    w.resume("w", w.waits("w")[0], "forged")
    assert w.waits("w")
    signal(w, "a", "real")
    assert w.result("w") == "real"


def test_a_wait_that_is_made_and_never_waited_for_takes_nothing() -> None:
    """M3: a message is consumed when its value reaches author code."""
    w = run("def main(o):\n    kw.wait_signal('a')\n    yield kw.suspend('go')\n    return (yield kw.wait_signal('a'))")
    signal(w, "a", 1)
    w.resume("w", "go")
    assert w.result("w") == 1


# -- consumption in races (M3) -----------------------------------------------------------------------------------------
RACES = {
    "the loser of a race that had mail when it began": (
        "first = yield kw.race([kw.wait_signal('a'), kw.wait_signal('b')])\n    return [first, kw.signals('a').take(), kw.signals('b').take()]",
        ["a1", ["a2"], ["b1"]],
    ),
    "a race that a timer wins over an incomplete all": (
        "got = yield kw.race([kw.all([kw.wait_signal('a'), kw.suspend('never')]), kw.suspend('quick')])\n    return [got, kw.signals('a').take()]",
        ["q", ["a1", "a2"]],
    ),
    "a timeout over an incomplete all": (
        "try:\n        yield kw.timeout(kw.all([kw.wait_signal('a'), kw.suspend('never')]), 1)\n    except TimeoutError:\n        return kw.signals('a').take()",
        ["a1", "a2"],
    ),
    "an all that fails": (
        "try:\n        yield kw.all([kw.wait_signal('a'), kw.suspend('bad')])\n    except kw.WorkflowError:\n        return kw.signals('a').take()",
        ["a1", "a2"],
    ),
    "a race inside an all that fails": (
        "try:\n        yield kw.all([kw.race([kw.wait_signal('a'), kw.wait_signal('z')]), kw.suspend('bad')])\n    except kw.WorkflowError:\n        return kw.signals('a').take()",
        ["a1", "a2"],
    ),
    "two waits of one name go back in order": (
        "try:\n        yield kw.all([kw.wait_signal('a'), kw.wait_signal('a'), kw.suspend('bad')])\n    except kw.WorkflowError:\n        return kw.signals('a').take()",
        ["a1", "a2"],
    ),
    "a shielded wait whose waiter is cancelled": (
        "t = kw.spawn(shielded())\n    yield kw.suspend('go')\n    kw.cancel(t)\n    try:\n        yield t\n    except kw.Cancelled:\n        pass\n    return kw.signals('c').take()",
        ["c1"],
    ),
    "what a task of the race has read is read": (
        "yield kw.race([reader(), kw.suspend('quick')])\n    return kw.signals('a').take()",
        ["a2"],
    ),
    "all of them": (
        "got = yield kw.all([kw.wait_signal('a'), kw.wait_signal('b')])\n    return [got, kw.signals('a').take(), kw.signals('b').take()]",
        [["a1", "b1"], ["a2"], []],
    ),
    "a loser that is waited for afterwards is cancelled": (
        "b = kw.wait_signal('b')\n    yield kw.race([kw.wait_signal('a'), b])\n    try:\n        yield b\n    except kw.Cancelled:\n        return kw.signals('b').take()",
        ["b1"],
    ),
    "a wait that is twice in what loses goes back once": (
        "a = kw.wait_signal('a')\n    try:\n"
        "        yield kw.all([kw.all([a, kw.suspend('never')]), kw.race([a, kw.suspend('never2')]), kw.suspend('bad')])\n    except kw.WorkflowError:\n        return kw.signals('a').take()",
        ["a1", "a2"],
    ),
    "with cancel_rest=False the loser keeps waiting": (
        "b = kw.wait_signal('b')\n    got = yield kw.race([kw.wait_signal('a'), b], cancel_rest=False)\n    return [got, (yield b)]",
        ["a1", "b1"],
    ),
    "with cancel_rest=False the wait that was made of an inbox is cancelled all the same": (
        "try:\n        yield kw.all({1: kw.signals('a'), 2: kw.suspend('bad')}, cancel_rest=False)\n    except kw.WorkflowError:\n        return kw.signals('a').take()",
        ["a1", "a2"],
    ),
}


@pytest.mark.parametrize("case", RACES)
def test_a_race_hands_back_what_its_losers_did_not_read(case: str) -> None:
    """M3."""
    body, expected = RACES[case]
    w = run(f"""
def shielded():
    yield kw.shield(kw.wait_signal('c'))
def reader():
    say((yield kw.wait_signal('a')))
    yield kw.suspend('never')
def main(o):
    yield kw.suspend('begin')
    {body}
""")
    for name, value in (("a", "a1"), ("b", "b1"), ("a", "a2")):
        signal(w, name, value)
    w.resume("w", "begin")
    w.resume("w", "quick", "q")
    w.resume("w", "bad", error="boom")
    w.resume("w", "go")
    signal(w, "c", "c1")
    w.advance(1)
    assert w.result("w") == expected


def test_what_is_handed_back_wakes_the_next_who_waits_in_the_same_step() -> None:
    """M3."""
    w = run("""
def other():
    say((yield kw.wait_signal('a')))
def main(o):
    first = kw.all([kw.wait_signal('a'), kw.suspend('never'), kw.suspend('bad')])
    kw.spawn(other())
    try:
        yield first
    except kw.WorkflowError:
        pass
    yield kw.suspend('end')
""")
    signal(w, "a", "again")
    assert w.outputs_to("out") == []
    w.resume("w", "bad", error=1)
    assert w.outputs_to("out") == ["again"]
    assert w.waits("w") == ["end"]
    assert mailbox(w) == {}


# -- limits and times ----------------------------------------------------------------------------------------------------
SLEEPS = "def main(o):\n    yield kw.suspend('go')\n    return len(kw.signals('a').take())"


@pytest.mark.parametrize("early", [True, False])
def test_a_wait_that_did_not_decide_a_race_takes_its_signal_while_the_race_waits_for_the_rest(early: bool) -> None:
    """M3, semantics §1.5: its message is there already, or comes later."""
    w = run("""
def main(o):
    yield kw.suspend("go")
    b, unused = kw.wait_signal("b"), kw.wait_signal("b")
    first = yield kw.race([kw.wait_signal("a"), b], cancel_rest=False, wait_rest=True)
    return [first, (yield b), unused.settled]""")
    for step in ("a", "b", "go") if early else ("go", "a", "b"):
        w.resume("w", step) if step == "go" else signal(w, step, step.upper())
    assert w.result("w") == ["A", "B", False]


def test_over_1000_messages_the_reply_is_full_or_there_is_a_dead_letter() -> None:
    """M3, at the limit and one past it. Messages that were read make room."""
    w = run("def main(o):\n    yield kw.suspend('go')\n    say(len(kw.signals('a').take()))\n    return (yield kw.suspend('end'))")
    for number in range(1000):
        w.send("w", b'{"name":"a","value":%d}' % number, {"kwflow-op": "signal"})
    assert mailbox(w) == {"signal": {"a": 1000}}
    before = w.state.entries[b"w"]
    assert signal(w, "a") == "full"
    assert w.state.entries[b"w"] == before
    w.send("w", b'{"name":"a"}', {"kwflow-op": "signal"})
    [letter] = [output for output in w.outputs if output.topic == w.config.dead_letter_topic]
    assert dict(letter.headers)["kwflow-error-reason"] == b"mailbox-full"
    w.resume("w", "go")
    assert w.outputs_to("out") == ["1000"]
    assert signal(w, "a") == "delivered"


def test_large_signals_fill_the_mailbox_before_they_could_fill_the_snapshot() -> None:
    w = run(SLEEPS)
    assert [signal(w, "a", "x" * 100_000) for _ in range(3)] == ["delivered", "delivered", "full"]


@pytest.mark.parametrize("size", [262_144, 262_145])
def test_the_first_signal_fits_into_a_mailbox_too_be_there_one_or_not(size: int) -> None:
    """M3, at the limit and one past it: a signal larger than a snapshot may be would park a workflow that reads no signals."""
    w = run("def main(o):\n    yield kw.suspend('go')")
    value = "x" * (size - len('{"name":"a","value":""}'))
    start = {"name": "a", "start": {}, "value": "x" * (size - len('{"name":"a","start":{},"value":""}'))}
    said = [w.command("w", "signal", {"name": "a", "value": value}), w.command("new", "signal", start)]
    if size == 262_144:
        assert [status(reply) for reply in said] == ["delivered", "delivered"]
    else:
        message = f"it has {size} bytes, more than a mailbox may hold (limit mailbox_bytes_max = 262144); send a reference instead, or raise the limit"
        assert said == [{"status": "full", "message": message, "value": None}] * 2
        assert w.header("new") is None and "mailbox" not in (w.header("w") or {})


def test_large_updates_fill_the_mailbox_too_until_they_are_read() -> None:
    w = run("def main(o):\n    updates = kw.on_update('u')\n    yield kw.suspend('go')\n    for update in updates.take():\n        kw.reply(update, None)\n    yield kw.suspend('end')")
    for number in range(2):
        assert update(w, "x" * 100_000, "u", kwflow_id=str(number)) is None, "it waits"
    assert status(update(w, "x" * 100_000, "u")) == "full"
    w.resume("w", "go")
    assert update(w, "x" * 100_000, "u") is None


def test_a_full_signal_may_be_sent_again_under_its_id() -> None:
    """M1.4: only what was applied is recognised."""
    w = run("def main(o):\n    yield kw.suspend('go')\n    kw.signals('a').take()\n    return (yield kw.wait_signal('a'))")
    for _ in range(2):
        signal(w, "a", "x" * 100_000)
    big = {"name": "a", "value": "y" * 100_000}
    assert status(w.command("w", "signal", big, kwflow_id="once")) == "full"
    w.resume("w", "go")
    assert status(w.command("w", "signal", big, kwflow_id="once")) == "delivered"
    assert w.result("w") == "y" * 100_000


def test_a_signal_whose_ttl_is_over_is_not_delivered_and_that_is_logged() -> None:
    """M3, AF-32: at the limit and one past it."""
    w = run("def main(o):\n    yield kw.suspend('go')\n    return kw.signals('a').take()")
    signal(w, "a", "short", ttl_ms=1000)
    signal(w, "a", "long", ttl_ms=1001)
    w.now_ms += 1000
    w.resume("w", "go")
    assert w.result("w") == ["long"]
    assert any("1 signals expired" in line for line in w.logs)


@pytest.mark.parametrize(("after_ms", "said", "there"), [(4, "full", 2), (5, "delivered", 1)])
def test_expired_signals_do_not_fill_the_mailbox(after_ms: int, said: str, there: int) -> None:
    w = run(SLEEPS)
    for _ in range(2):
        signal(w, "a", "x" * 100_000, ttl_ms=5)
    w.now_ms += after_ms
    assert signal(w, "a", "x" * 100_000) == said
    assert mailbox(w) == {"signal": {"a": there}}
    assert [line for line in w.logs if "expired" in line] == (["w: 2 signals expired before they were read (ttl_ms)"] if said == "delivered" else [])


# -- signal-with-start ---------------------------------------------------------------------------------------------------
def test_signal_with_start_starts_what_does_not_run_and_its_first_line_finds_the_signal() -> None:
    """M2."""
    w = run("def main(o):\n    return [o, kw.signals('a').take(), (yield kw.wait_signal('a'))]")
    start = {"name": "a", "value": 1, "start": {"workflow": "main", "input": {"n": 7}}}
    assert status(w.command("new", "signal", start, kwflow_start_id="s", kwflow_id="1")) == "delivered"
    assert status(w.command("new", "signal", start, kwflow_start_id="s", kwflow_id="1")) == "delivered"
    assert status(w.command("new", "signal", {**start, "value": 2}, kwflow_start_id="other", kwflow_id="2")) == "delivered"
    assert w.result("new") == [{"n": 7}, [1], 2]
    assert status(w.command("new", "signal", start, kwflow_start_id="s", kwflow_id="1")) == "delivered"
    assert status(w.command("new", "signal", start, kwflow_start_id="s", kwflow_id="3")) == "not_found"
    assert w.header("new") == {**(w.header("new") or {}), "status": "ended"}
    assert status(w.command("new", "signal", start, kwflow_start_id="again")) == "delivered"
    assert w.waits("new")


def test_a_signal_that_is_repeated_after_the_end_starts_no_second_run() -> None:
    """M1.4: a client that was given no start id makes one up for each call."""
    w = run("def main(o):\n    return (yield kw.wait_signal('a'))")
    start = {"name": "a", "value": 1, "start": {"workflow": "main", "input": None}}
    for run_id in ("made-up", "another"):
        assert w.command("new", "signal", start, kwflow_start_id=run_id, kwflow_id="1") == {"status": "delivered", "message": "", "value": None}
    w.send("new", msgspec.json.encode(start), {"kwflow-op": "signal", "kwflow-id": "1"})
    assert w.counts[1:] == ["started", "repeated", "repeated"]
    assert w.values("workflow-result") == [1]


def test_a_loop_over_an_inbox_and_what_goes_on_leaves_no_waits_behind() -> None:
    """Nobody else holds the wait that a race makes from an inbox. Each round of a queue's loop left one behind, for as long as the workflow ran."""
    w = run("""
def main(o):
    jobs, running = kw.signals('job'), {}
    while len(running) < 50:
        which, job = yield kw.race({'job': jobs, **running}, cancel_rest=False)
        running.pop(which, None)
        if which == 'job':
            running[job] = kw.suspend(job)
""")
    for number in range(20):
        signal(w, "job", f"job-{number}")
        signal(w, "job", f"other-{number}")
        w.resume("w", f"job-{number}")
    assert len(w.waits("w")) == 21
    assert b"Some" in w.state.entries[b"w"], "which a kwflow that cancels all of them or none does not know, so that it parks it (G7)"


# -- updates -------------------------------------------------------------------------------------------------------------
PRICES = """
def positive(value):
    if value <= 0:
        raise ValueError(f"{value} is no price")
def main(o):
    price = 1
    kw.set_status({"price": price})
    updates = kw.on_update("price", validator=positive)
    while True:
        update = yield updates
        old, price = price, update.value
        kw.set_status({"price": price})
        kw.reply(update, {"old": old})
        if price == 99:
            return "done"
"""


def update(w: WorkflowTester, value: Any, name: str = "price", **headers: str) -> Any:
    return w.command("w", "update", {"name": name, "value": value}, **headers)


def test_an_update_gets_the_reply_of_the_workflow() -> None:
    """M3."""
    w = run(PRICES)
    assert update(w, 5) == {"status": "ok", "message": "", "value": {"old": 1}}
    assert update(w, 6) == {"status": "ok", "message": "", "value": {"old": 5}}
    assert ((w.command("w", "query") or {})["value"])["status_value"] == {"price": 6}


def test_an_update_that_its_validator_refuses_changes_nothing_and_says_why() -> None:
    """M3."""
    w = run(PRICES)
    assert update(w, -1) == {"status": "rejected", "message": "ValueError: -1 is no price", "value": None}
    assert status(update(w, "x")) == "rejected"
    assert update(w, 5, name="colour") == {"status": "rejected", "message": "no update 'colour' is accepted; there are: price", "value": None}
    assert ((w.command("w", "query") or {})["value"])["status_value"] == {"price": 1}
    assert mailbox(w) == {}
    assert (update(run("def main(o):\n    yield kw.suspend('r')"), 5) or {})["message"] == "no update 'price' is accepted; there are: none"


def test_a_validator_cannot_act() -> None:
    w = run("def check(value):\n    kw.output('x', 'out')\ndef main(o):\n    yield kw.on_update('u', check)")
    assert "only inside a running workflow step" in (update(w, 1, name="u") or {})["message"]
    assert w.outputs_to("out") == []


def test_an_update_is_answered_in_a_later_step_and_a_repeated_one_too() -> None:
    """M1.4, M3: a client that repeats it waits for the same answer."""
    w = run("def main(o):\n    u = yield kw.on_update('u')\n    answer = yield kw.suspend('slow')\n    kw.reply(u, answer)\n    yield kw.suspend('end')")
    requests = []
    for _ in range(2):
        requests.append(f"request-{len(w.outputs)}")
        assert update(w, 1, name="u", kwflow_id="once") is None
    w.resume("w", "slow", 42)
    assert [w.reply(request) for request in requests] == [{"status": "ok", "message": "", "value": 42}] * 2
    assert update(w, 1, name="u", kwflow_id="once") == {"status": "ok", "message": "", "value": 42}


def test_updates_that_are_open_at_the_end_are_answered_ended() -> None:
    """M3."""
    w = run("def main(o):\n    kw.on_update('u')\n    yield kw.suspend('go')", **{"kwflow-start-id": "s"})
    request = f"request-{len(w.outputs)}"
    assert update(w, 1, name="u", kwflow_id="x") is None
    w.resume("w", "go")
    assert status(w.reply(request)) == "ended"
    assert [status(update(w, 1, name="u", kwflow_id=id)) for id in ("x", "y")] == ["ended", "ended"]
    assert w.counts[-2:] == ["repeated", "unknown-id"]
    assert "updates" not in (w.header("w") or {})


def test_while_it_cleans_up_no_update_is_taken_and_the_reply_to_one_that_was_does_nothing() -> None:
    """M3: all of them were answered when main ended."""
    w = run("""
def helper(u):
    try:
        yield kw.suspend("never")
    finally:
        kw.reply(u, "late")
        yield kw.suspend("clean")
        say("cleaned")
def main(o):
    kw.spawn(helper((yield kw.on_update("u"))))
""")
    assert status(update(w, 1, name="u")) == "ended"
    assert update(w, 2, name="u") == {"status": "ended", "message": "it has ended and is cleaning up", "value": None}
    w.resume("w", "clean")
    assert (w.outputs_to("out"), w.values("workflow-error")) == (["cleaned"], [])


def test_updates_that_are_open_when_it_is_terminated_are_answered_ended() -> None:
    """M3: without author code."""
    w = run("def main(o):\n    kw.on_update('u')\n    yield kw.suspend('go')")
    request = f"request-{len(w.outputs)}"
    update(w, 1, name="u")
    w.command("w", "terminate")
    assert status(w.reply(request)) == "ended"


def test_an_update_is_answered_once() -> None:
    w = run("def main(o):\n    u = yield kw.on_update('u')\n    kw.reply(u, 1)\n    try:\n        kw.reply(u, 2)\n    except kw.UsageError as e:\n        return str(e)")
    update(w, 1, name="u")
    assert "has already been answered" in w.result("w")


def test_an_update_nobody_waits_for_needs_no_address() -> None:
    w = run("def main(o):\n    u = yield kw.on_update('u')\n    kw.reply(u, 1)\n    return u.value")
    w.send("w", b'{"name":"u","value":3}', {"kwflow-op": "update"})
    assert w.result("w") == 3


def test_values_that_were_answered_are_kept_for_the_last_16_ids() -> None:
    """M1.4, at the limit and one past it. A value over 4 KiB is not kept."""
    w = run("def main(o):\n    updates = kw.on_update('u')\n    while True:\n        u = yield updates\n        kw.reply(u, u.value)")
    for number in range(17):
        assert (update(w, number, name="u", kwflow_id=str(number)) or {})["value"] == number
    assert status(update(w, 0, name="u", kwflow_id="0")) == "repeated"
    assert update(w, 1, name="u", kwflow_id="1") == {"status": "ok", "message": "", "value": 1}
    for size, again in ((4094, "ok"), (4095, "repeated")):
        assert len((update(w, "x" * size, name="u", kwflow_id=f"big {size}") or {})["value"]) == size
        assert status(update(w, 0, name="u", kwflow_id=f"big {size}")) == again


def test_a_workflow_may_reject_an_update_that_it_has_taken() -> None:
    """M3: a validator cannot know what only an activity finds out. A reason that is not valid UTF-8 failed where replies are encoded, outside any step."""
    w = run("def main(o):\n    u = yield kw.on_update('u')\n    yield kw.suspend('r')\n    kw.reject(u, f'{u.value} is sold out\\ud800')\n    yield kw.suspend('end')")
    request = f"request-{len(w.outputs)}"
    assert update(w, 1, name="u", kwflow_id="x") is None
    w.resume("w", "r")
    rejected = {"status": "rejected", "message": "1 is sold out?", "value": None}
    assert [w.reply(request), update(w, 1, name="u", kwflow_id="x")] == [rejected] * 2
    assert "updates" not in w.header("w")


# -- from workflow to workflow -----------------------------------------------------------------------------------------
LOCK = """
def take(lock):
    granted = kw.suspend()
    kw.send_signal(lock, "take", {"id": kw.workflow_id(), "ref": granted.id}, start="locked")
    yield granted

@kw.workflow
def locked(o):
    takes, releases = kw.signals("take"), kw.signals("release")
    while len(takes) or o != "once":
        owner = yield takes
        kw.output_json({"ref": owner["ref"], "value": None}, "workflow-resume", key=owner["id"])
        yield releases

def main(lock):
    yield take(lock)
    say(f"{kw.workflow_id()} has it")
    yield kw.suspend("r")
    kw.send_signal(lock, "release")
    return kw.workflow_id()
"""


def test_a_workflow_signals_another_and_starts_it_with_its_first_signal() -> None:
    """M2, M3, in the transaction of its step. Headers are passed on."""
    w = run(LOCK, "lock", trace="t-1")
    assert dict(next(output for output in w.outputs if output.key == b"lock").headers) == {"trace": b"t-1", "kwflow-op": b"signal"}
    w.start("second", "lock")
    assert (w.outputs_to("out"), w.header("lock")["mailbox"]) == (["w has it"], {"signal": {"take": 1}})
    w.resume("w", "r")
    assert w.outputs_to("out") == ["w has it", "second has it"]
    w.resume("second", "r")
    assert [w.result("w"), w.result("second"), w.header("lock")["status"]] == ["w", "second", "waiting"]


def test_a_signal_of_a_workflow_that_reaches_nobody_is_a_dead_letter() -> None:
    """G3."""
    w = run("def main(o):\n    kw.send_signal('nobody', 'a', 5)\n    kw.send_signal('w', 'self', 6)\n    return (yield kw.wait_signal('self'))")
    [letter] = [output for output in w.outputs if output.topic == w.config.dead_letter_topic]
    assert (letter.key, letter.value, dict(letter.headers)["kwflow-error-reason"]) == (b"nobody", b'{"name":"a","value":5}', b"not-found")
    assert w.result("w") == 6


def test_workflows_that_signal_each_other_for_ever_do_not_stop_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine does other work in between; a tester would never return."""
    monkeypatch.setattr("kwflow.testing._FOLLOWING_MAX", 100)
    with pytest.raises(AssertionError, match="one record led to 100 more, the last for ping, w; do these workflows answer each other forever"):
        run("def main(o):\n    while True:\n        kw.send_signal(o, 's', start='ping')\n        yield kw.wait_signal('s')\nkw.workflow(name='ping')(lambda o: main('w'))", "ping")


@pytest.mark.parametrize(
    "body",
    [
        "go = kw.wait_signal('go')\n    while True:\n        yield kw.race([go, kw.sleep(1)])",
        "r = kw.suspend()\n    for _ in range(2):\n        try:\n            yield kw.timeout(r, 1)\n        except TimeoutError:\n            pass",
    ],
    ids=["race", "timeout"],
)
def test_a_workflow_that_ends_at_a_wait_that_has_lost_before_is_told_that_nobody_cancelled_it(body: str) -> None:
    """A wait can be used once. In its second race it is Cancelled at once, which looks as if somebody had cancelled the workflow."""
    w = run(f"def main(o):\n    {body}")
    w.advance(5)
    assert outcomes(w) == [("cancelled", "0-0")]
    assert "nobody cancelled it" in w.logs[-1] and "kw.signals" in w.logs[-1]
    w.start("x")
    w.command("x", "cancel")
    assert (len(outcomes(w)), "nobody" in w.logs[-1], len(w.logs)) == (2, True, 1)


# -- status --------------------------------------------------------------------------------------------------------------
def test_a_status_is_a_copy_and_has_a_limit() -> None:
    """M3, at the limit and one past it."""
    w = run("def main(o):\n    said = ['a']\n    kw.set_status(said)\n    said.append('b')\n    yield kw.suspend('go')\n    kw.set_status('x' * 16382)\n    kw.set_status('x' * 16383)")
    assert ((w.command("w", "query") or {})["value"])["status_value"] == ["a"]
    w.resume("w", "go")
    assert "at most 16384 bytes" in w.values("workflow-error")[0]
    assert len(json_dumps("x" * 16382)) == 16_384


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("kw.wait_signal('')", "1 to 200 characters"),
        ("kw.wait_signal('x' * 201)", "1 to 200 characters"),
        ("kw.signals(5)", "1 to 200 characters"),
        ("kw.on_update('u', 5)", "a validator must be a plain function"),
        ("kw.on_update('u', gen)", "a validator must be a plain function"),
        ("kw.reply(5)", "takes an update"),
        ("kw.reject(5, 'x')", "takes an update"),
        ("kw.send_signal('', 's')", "UsageError: ''"),
        ("kw.send_signal(5, 's')", "a workflow id must be a str"),
        ("kw.send_signal('x', '')", "1 to 200 characters"),
        ("kw.send_signal('x', 's', start=gen)", "takes the name of a workflow"),
        ("kw.send_signal('x', 's', start='w' * 201)", "the name of a workflow must be a str of 1 to 200 characters"),
        ("kw.send_signal('x', 's', input=5)", "start="),
        ("kw.send_signal('x', 's', object())", "TypeError"),
        ("kw.send_signal('x', 's', 'v' * 262_122)", "a signal has 262145 bytes, more than a mailbox may hold (limit mailbox_bytes_max = 262144)"),
        ("kw.set_status({1, object()})", "TypeError"),
    ],
)
def test_wrong_calls_are_named(call: str, said: str) -> None:
    assert said in run(f"def gen(v):\n    yield v\ndef main(o):\n    {call}\n    yield kw.suspend('r')").values("workflow-error")[0]


# -- `with update:` ------------------------------------------------------------------------------------------------------
HANDLED = """
def handle(update):
    with update:
        answer = yield kw.suspend(f'ask-{update.value}')
        if answer == 'reply':
            kw.reply(update, 'said')
        if answer != 'end':
            raise ValueError(answer)
def main(o):
    inbox = kw.on_update('n')
    while True:
        kw.spawn(handle((yield inbox)))
"""


def answer(w: WorkflowTester, id: str = "w") -> list[Any]:
    return [(reply["status"], reply["message"], reply["value"]) for reply in w.replies if reply["status"] in ("ok", "rejected", "ended")]


@pytest.mark.parametrize(
    ("given", "told"), [("no", ("rejected", "ValueError: no", None)), ("end", ("ok", "", None)), ("reply", ("ok", "", "said"))]
)
def test_an_update_is_answered_however_its_block_ends(given: str, told: Any) -> None:
    """M3: whoever has sent it would wait for an answer that never comes, when its handler has failed. The block is saved and restored in between."""
    w = run(HANDLED)
    assert w.update("w", "n", 1) is None
    w.resume("w", "ask-1", given)
    assert answer(w) == [told]
    assert ("failed, and nobody awaits it: ValueError" in " ".join(w.logs)) == (given != "end"), "the error goes on"
    assert w.update("w", "n", 2) is None, "and the workflow takes the next one"


def test_an_update_whose_handler_is_cancelled_is_rejected_and_one_that_is_open_at_the_end_has_ended() -> None:
    w = run("""
def handle(update):
    with update:
        yield kw.suspend(f'ask-{update.value}')
def main(o):
    inbox = kw.on_update('n')
    task = kw.spawn(handle((yield inbox)))
    kw.spawn(handle((yield inbox)))
    kw.cancel(task)
    yield kw.suspend('r')
""")
    for n in (1, 2):
        w.update("w", "n", n)
    w.resume("w", "r")
    assert [status for status, *_ in answer(w)] == ["rejected", "ended"]


def test_a_block_answers_an_update_once_although_its_sender_has_asked_again() -> None:
    """M1.4."""
    w = run(HANDLED)
    for _ in range(2):
        w.command("w", "update", {"name": "n", "value": 1}, kwflow_id="same")
    w.resume("w", "ask-1", "no")
    assert answer(w) == [("rejected", "ValueError: no", None)] * 2
    assert (w.command("w", "update", {"name": "n", "value": 1}, kwflow_id="same") or {})["message"] == "ValueError: no"
