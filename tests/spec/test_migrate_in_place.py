"""`kwflow code migrate --in-place`: a waiting instance goes on after the same wait of the edited code, parked or not (decision 0061)."""

from typing import Any

import pytest

from kwflow import declarations
from kwflow.core.wire import Record
from kwflow.durable import registry
from kwflow.runners.overlay import Overlay
from tests.spec.test_code import Site

PAID = """
def main(o):
    paid = kw.suspend("paid")
    amount = yield paid
    yield kw.suspend("shipped")
    return ["old", o, amount]
"""
FIXED = PAID.replace('"old", o, amount', '"fixed", o, amount + 1')
LOCKED = """
import threading
def main(o):
    amount = yield kw.suspend("paid")
    {0}
    yield kw.suspend("shipped")
    return [o, amount]
"""
PARKS, MENDED = LOCKED.format("lock = threading.Lock()"), LOCKED.format("amount += 1")


def moved(site: Site, id: str = "v") -> dict[str, Any]:
    reply = site.w.command(id, "migrate", {"in_place": True})
    assert reply is not None
    return reply


def test_it_goes_on_with_its_variables_in_the_edited_function() -> None:
    """Without it, the instance would end on the code that it began on (semantics §8.2)."""
    site = Site(PAID)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    site.deploy(FIXED)
    [old] = site.versions("v")
    assert moved(site) == {"status": "ok", "message": "", "value": None}
    assert site.versions("v") != [old]
    assert site.w.counts[-1] == "migrate"
    site.w.resume("v", "shipped")
    assert site.w.result("v") == ["fixed", "order", 6]


def test_what_waits_beside_main_and_what_it_waits_for_go_on_too() -> None:
    """Tasks, combinators, timers, and calls that are under way."""
    text = """
def leg(name):
    got = yield kw.suspend(name)
    return [name, got]
def main(o):
    timer = kw.sleep(60)
    undo = [lambda: o + " undone"]
    both = yield kw.all([leg("a"), leg("b"), timer])
    return [both, undo[0]()]
"""
    site = Site(text)
    site.w.start("v", "order")
    site.w.resume("v", "a", 1)
    site.deploy(text.replace("return [name, got]", "return {name: got}").replace("[both, ", "['fixed', both, ").replace("timer = kw.sleep(60)", "timer = kw.sleep(90)"))
    assert moved(site)["status"] == "ok"
    site.w.resume("v", "b", 2)
    site.w.advance(60)
    assert site.w.result("v") == ["fixed", [["a", 1], {"b": 2}, None], "order undone"]


CHAIN = """
def d(o):
    yield kw.suspend("r")
    return o
def c(o):
    return (yield from d(o))
def b(o):
    return (yield from c(o))
def main(o):
    return (yield from b(o))
"""


@pytest.mark.parametrize(("text", "frames"), [
    (PAID, "main line 8 -> 9"), (CHAIN.replace("from c", "from d"), "main line 14 -> 16, b line 12 -> 14, d line 7 -> 8"), (CHAIN, "main line 14 -> 16, … 1 more, c line 10 -> 12, d line 7 -> 8"),
])  # fmt: skip
def test_the_log_says_from_which_line_to_which_each_frame_was_moved(text: str, frames: str) -> None:
    site = Site(text)
    site.w.start("v", "order")
    site.deploy(text.replace("\ndef", "\n# a comment\ndef", 1).replace("return", "yield kw.suspend('x')\n    return", 1))
    assert moved(site)["status"] == "ok"
    assert site.w.logs[-1] == f"v: migrated in place ({frames})"


def test_a_frame_in_a_module_that_has_not_changed_is_told_where_it_is() -> None:
    helper = Site("def help_(o):\n    yield kw.suspend('r')")
    text = f"import {helper.name}\ndef main(o):\n    yield from {helper.name}.help_(o)\n    return {{0}}"
    site = Site(text.format(1))
    site.w.start("v")
    site.deploy(text.format(2))
    assert moved(site)["status"] == "ok"
    assert site.w.logs[-1] == "v: migrated in place (main line 7 -> 7, help_ line 6)"


def test_it_has_changed_when_it_is_parked_and_when_it_is_moved_however_old_the_records_are_that_it_has_held() -> None:
    """`kwflow list --status parked --since 10m` showed nobody who had waited for longer, and without the status nobody who had just been moved."""
    site = Site(PARKS)
    for id in ("v", "parked"):
        site.w.start(id, "order")
    begun = site.w.now_ms
    site.w.advance(3600)
    site.w.resume("parked", "paid", 5)
    assert (site.w.header("v")["updated"], site.w.header("parked")["updated"]) == (begun, site.w.now_ms)
    site.w.advance(3600)
    site.deploy(MENDED)
    for id in ("v", "parked"):
        assert moved(site, id)["status"] == "ok"
        assert site.w.header(id)["updated"] == site.w.now_ms
    assert site.w.waits("parked") == ["shipped"]


def test_there_may_be_nothing_to_move() -> None:
    """The command may be repeated."""
    site = Site(PAID)
    site.w.start("v")
    before = site.w.state.entries[b"v"]
    assert (moved(site)["status"], site.w.counts[-1]) == ("unchanged", "not-migrated")
    site.deploy("# only a comment" + PAID)
    assert moved(site)["message"] == "it runs the code of the engine that was asked; if other code has been deployed, restart the engines first"
    assert site.w.state.entries[b"v"] == before
    assert moved(site, "nobody")["status"] == "not_found"


def test_what_is_not_certain_is_refused_and_nothing_changes() -> None:
    """G4: the instance is not parked for it."""
    site = Site(PAID)
    site.w.start("v")
    before = site.w.state.entries[b"v"]
    site.deploy(PAID.replace('"paid"', '"amount"').replace("yield paid", "yield kw.suspend('x')"))
    reply = moved(site)
    assert (reply["status"], site.w.state.entries[b"v"]) == ("rejected", before)
    assert reply["message"] == f"{site.name}:main waits at line 8, `yield paid`, and the new code has no such wait"
    assert site.w.logs[-1] == f"v: not migrated: {reply['message']}"
    site.w.resume("v", "paid", 1)
    site.w.resume("v", "shipped")
    assert site.w.result("v") == ["old", None, 1]


def test_what_the_new_code_would_need_and_the_instance_does_not_have_is_named() -> None:
    site = Site(PAID)
    site.w.start("v")
    site.deploy(PAID.replace("    amount = yield paid\n", "    rate = 2\n    amount = yield paid\n").replace('"old", o, amount', '"fixed", amount * rate'))
    assert moved(site)["message"].endswith(" of the new code, `yield paid`, and then needs rate: a variable that this instance does not have")
    site.deploy(PAID.replace("    amount = yield paid\n", "    rate = 2\n    amount = yield paid\n    rate = 3\n").replace('"old", o, amount', '"fixed", amount * rate'))
    assert moved(site)["status"] == "ok", "it is bound again before it is read"


def test_a_parked_instance_goes_on_in_mended_code_and_loses_nothing() -> None:
    """Semantics §7: the record that parked it is applied again, then those that were held behind it, in order."""
    site = Site(PARKS)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    site.w.resume("v", "shipped")
    assert site.w.header("v")["status"] == "parked"
    site.deploy(MENDED)
    site.w.command("v", "retry")
    assert site.w.header("v")["status"] == "parked", "a retry alone runs the code that it began on"
    assert moved(site)["status"] == "ok"
    assert site.w.result("v") == ["order", 6]


def test_a_retry_that_runs_old_code_again_says_so_and_what_to_do() -> None:
    """Semantics §8.2: it looked as if the fix did not help."""
    site = Site(PARKS)
    site.w.start("v 1", "order")
    site.w.resume("v 1", "paid", 5)
    said = site.w.header("v 1")["parked"]["message"]
    assert site.w.command("v 1", "retry")["message"] == f"it is parked again: UnsavableError: {said}", "it is the engine's code"
    runs = f"it runs old code ({site.name}@{site.versions('v 1')[0]}): kwflow code migrate 'v 1' --in-place moves it onto the engine's"
    site.deploy(MENDED)
    said = said.replace(".py:", f".py@{site.versions('v 1')[0]}:")
    assert site.w.command("v 1", "retry") == {"status": "parked", "message": f"it is parked again: UnsavableError: {said}; {runs}", "value": None}
    assert site.w.header("v 1")["parked"]["message"] == f"{said}; {runs}"
    assert site.w.logs[-1] == f"v 1 is parked: UnsavableError: {said}; {runs}"
    assert moved(site, "v 1")["status"] == "ok"


def test_a_retry_that_helps_says_so_if_the_instance_still_runs_old_code(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site("import os\n" + PARKS.replace("lock = threading.Lock()", "lock = threading.Lock() if 'LOCKED' in os.environ else None"))
    monkeypatch.setenv("LOCKED", "1")
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    site.deploy(MENDED)
    monkeypatch.delenv("LOCKED")
    runs = f"it runs old code ({site.name}@{site.versions('v')[0]}): kwflow code migrate v --in-place moves it onto the engine's"
    assert site.w.command("v", "retry") == {"status": "ok", "message": runs, "value": None}
    site.w.resume("v", "shipped")
    assert site.w.result("v") == ["order", 5]


def test_a_parked_instance_that_cannot_be_moved_stays_as_it_is() -> None:
    site = Site(PARKS)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    before = dict(site.w.state.entries)
    site.deploy(MENDED.replace('"paid"', '"amount"'))
    assert moved(site)["status"] == "rejected"
    assert site.w.state.entries == before
    site.deploy(PARKS)
    assert moved(site)["status"] == "unchanged"
    assert site.w.state.entries == before


def test_a_start_that_failed_has_nothing_to_move_and_takes_the_new_code_when_it_is_retried() -> None:
    site = Site("import threading\ndef main(o):\n    lock = threading.Lock()\n    yield kw.suspend('r')")
    site.w.start("v", "order")
    assert site.w.header("v")["status"] == "parked"
    site.deploy("def main(o):\n    yield kw.suspend('r')\n    return o")
    assert moved(site)["message"] == "it has no state that could be moved; once it is retried, what begins takes the current code"
    site.w.command("v", "retry")
    site.w.resume("v", "r")
    assert site.w.result("v") == "order"


def test_a_paused_instance_is_moved_and_stays_paused() -> None:
    """Pause, move, look at it, unpause."""
    site = Site(PAID)
    site.w.start("v", "order")
    site.w.command("v", "pause", {"reason": "audit"})
    site.w.resume("v", "paid", 5)
    site.deploy(FIXED)
    assert moved(site)["status"] == "ok"
    assert site.w.header("v")["parked"]["reason"] == "paused"
    site.w.command("v", "unpause")
    site.w.resume("v", "shipped")
    assert site.w.result("v") == ["fixed", "order", 6]


def test_a_command_with_an_id_is_done_once_and_answered_twice() -> None:
    """M1.4."""
    site = Site(PAID)
    site.w.start("v", "order")
    site.deploy(FIXED)
    first, second = (site.w.command("v", "migrate", {"in_place": True}, kwflow_id="m-1") for _ in range(2))
    assert first == second == {"status": "ok", "message": "", "value": None}
    assert site.w.counts[-1] == "repeated"


def test_a_wrong_argument_is_a_dead_letter() -> None:
    """G3."""
    site = Site(PAID)
    site.w.start("v")
    site.w.command("v", "migrate", {"in_place": "yes"})
    assert site.w.counts[-1] == "dead-letter"


MIGRATION = """
@kw.migrate(from_="{name}:main")
def move(old):
    return after(old.locals["o"], old.refs["paid"]), ["paid"]
def after(o, paid):
    amount = yield paid
    {0}
    yield kw.suspend("shipped")
    return ["moved", o, amount]
"""


@pytest.fixture
def forgets() -> Any:
    yield
    declarations._migrations.clear()


@pytest.mark.usefixtures("forgets")
def test_whoever_moves_an_instance_hears_that_what_it_held_has_failed_again() -> None:
    """Nobody would look at it again after `ok`."""
    site = Site(PARKS)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    site.deploy(LOCKED.format("lock = threading.RLock()"))
    reply = moved(site)
    assert reply["status"] == "parked" and reply["message"].startswith("it is parked again: UnsavableError: ")


def test_the_migration_of_a_parked_instance_is_not_held_behind_what_parked_it() -> None:
    """§8.5: it was, so that nothing but a discard could help."""
    site = Site(PARKS)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    site.w.resume("v", "shipped")
    site.deploy(MENDED + MIGRATION.format("pass", name=site.name))
    assert (site.w.command("v", "migrate") or {})["status"] == "ok"
    assert site.w.counts.count("migrate") == 1
    assert site.w.result("v") == ["moved", "order", 5]


@pytest.mark.usefixtures("forgets")
def test_a_migration_that_fails_leaves_a_parked_instance_as_it_is() -> None:
    site = Site(PARKS)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    before = dict(site.w.state.entries)
    site.deploy(MENDED + MIGRATION.format("pass", name=site.name).replace('old.locals["o"]', "1 / 0"))
    reply = site.w.command("v", "migrate") or {}
    assert reply["status"] == "rejected"
    assert reply["message"].startswith("MigrationError: the migration move failed: ZeroDivisionError: division by zero in move (code_case_")
    assert site.w.state.entries == before
    site.deploy(MENDED + MIGRATION.format("lock = __import__('threading').Lock()", name=site.name))
    assert (site.w.command("v", "migrate") or {})["status"] == "ok", "it waits for paid again, and was saved"
    assert site.w.header("v")["status"] == "parked", "then the record at fault has parked it anew"
    assert site.w.header("v")["waits"][0]["function"] == "after"


@pytest.mark.usefixtures("forgets")
def test_a_parked_instance_without_a_migration_is_left_alone() -> None:
    """`migrate --all` retries nobody."""
    site = Site(PARKS)
    site.w.start("v", "order")
    site.w.resume("v", "paid", 5)
    before = dict(site.w.state.entries)
    site.deploy(MENDED)
    assert (site.w.command("v", "migrate") or {})["status"] == "unchanged"
    assert site.w.state.entries == before


def test_a_class_that_does_not_take_what_was_saved_is_named() -> None:
    site = Site("class Order:\n    pass\ndef main(o):\n    order = Order()\n    order.n = 1\n    yield kw.suspend('r')\n    return order.n")
    site.w.start("v")
    site.deploy("class Order:\n    def __setstate__(self, state):\n        raise ValueError(state)\ndef main(o):\n    order = Order()\n    yield kw.suspend('r')\n    return 2")
    reply = moved(site)
    assert (reply["status"], site.w.header("v")["status"]) == ("rejected", "waiting")
    assert reply["message"].startswith(f"classes that have changed since it was saved ({site.name}.Order) may not accept what was saved: ValueError: ")


def test_what_was_parked_unread_says_so() -> None:
    """Once what made it unreadable is mended, such as a missing key, a retry brings it back."""
    site = Site(PAID)
    site.w.start("v")
    site.w.state.entries[b"v"] = site.w.state.entries[b"v"][:-1] + b"?"
    site.w.resume("v", "paid")
    site.deploy(FIXED)
    assert moved(site)["message"] == "it was parked unread, so it is not known what it holds; retry it first"


@pytest.mark.parametrize("stored", [b"{}", b"not JSON", b'{"source": "def main(o): pass"}', b"null"])
def test_a_stored_source_that_is_not_the_right_one_is_refused(stored: bytes) -> None:
    """G4: it would be read as another function, and an engine must not fail for it."""
    site = Site(PAID)
    site.w.start("v")
    site.deploy(FIXED)
    registry._replaced.clear()
    [key] = site.w._code
    site.w._code[key] = stored
    assert moved(site)["status"] == "rejected"
    assert site.w.header("v")["status"] == "waiting"


@pytest.mark.parametrize("is_parked", [False, True])
def test_a_move_that_the_log_refuses_is_dead_lettered_alone(is_parked: bool) -> None:
    """K11, K19: the instance is not parked for it, nor does it lose the reason why it was parked, and nothing waits behind the command."""
    site = Site(PARKS)
    site.w.start("v", "order")
    if is_parked:
        site.w.resume("v", "paid", 5)
    before = dict(site.w.state.entries)
    changes = Overlay(site.w.state)
    record = Record(site.w.config.resume_topic, 0, 99, 1, b"v", b'{"in_place":true}', (("kwflow-op", b"migrate"),))
    made = site.w._workflows.refuse(changes, record, "too large")
    assert [output.topic for output in made.outputs] == [site.w.config.dead_letter_topic]
    site.w.state.apply(changes.changes)
    assert site.w.state.entries == before
