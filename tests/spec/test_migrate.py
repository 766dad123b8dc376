"""`@kw.migrate`: a waiting instance is migrated to other code in the step of the command (semantics §8.5)."""

import re
from typing import Any

import pytest

from kwflow import api, declarations, durable
from kwflow.errors import UsageError
from tests.spec.test_code import HEAD, Site

OLD = """
def leg(kind):
    r = kw.suspend(kind)
    try:
        return (yield r)
    finally:
        say("cleanup " + kind)
def main(o):
    undo = [lambda: "undo of " + o]
    first = yield kw.suspend("first")
    timer = kw.sleep(60)
    both = yield kw.all([leg("a"), leg("b"), timer])
    return both
"""
NEW = """
def main(o, first, b, undo):
    say("moved")
    got = yield b
    late = yield kw.suspend("late")
    return [o, first, got, late, undo()]
@kw.migrate(from_="{name}:main")
def move(old):
    kw.output(old.function + " " + str(len(old.tasks)), "out")
    return main(old.locals["o"], old.locals["first"], old.refs["b"], old.locals["undo"][0]), ["b"]
"""


@pytest.fixture
def site() -> Any:
    site = Site(OLD)
    site.w.start("v", "opts")
    site.w.resume("v", "first", 1)
    yield site
    declarations._migrations.clear()


def test_it_gets_frames_locals_and_refs_and_what_it_returns_goes_on_in_main_s_place(site: Site) -> None:
    """§8.5: the refs it takes over are still answered. Timers that it does not take over are cancelled. Nobody's cleanup runs (G8)."""
    site.deploy(NEW.replace("{name}", site.name))
    assert sorted(site.w.waits("v")) == ["2:1", "a", "b"]
    reply = site.w.command("v", "migrate")
    assert reply is not None
    assert reply["status"] == "ok"
    assert site.w.outputs_to("out") == [f"{site.name}:main 3", "moved"]
    assert site.w.outputs_to("workflow-scheduler")[-1] == "0"
    assert site.w.waits("v") == ["b"]
    site.w.resume("v", "b", 2)
    site.w.resume("v", "a", 9)
    assert site.w.counts[-1] == "unknown-ref"
    site.w.resume("v", "late", 3)
    assert site.w.result("v") == ["opts", 1, 2, 3, "undo of opts"]
    assert "cleanup" not in str(site.w.outputs_to("out"))


def test_a_condition_can_be_taken_over_and_the_others_are_forgotten(site: Site) -> None:
    """Decision 0067: an instance that waits for nothing but conditions would be stuck."""
    site.deploy("def main(o):\n    n = [0]\n    yield kw.race([kw.wait_condition(lambda: n[0] > 1), kw.wait_condition(lambda: n[0] > 0), kw.suspend('r')])")
    for id in ("c", "d"):
        site.w.start(id)
    [mine, other] = [wait["ref"] for wait in (site.w.header("c") or {})["waits"] if wait["kind"] == "condition"]
    site.deploy(f"""
def main(n, taken):
    kw.spawn(put(n))
    if taken is not None:
        say((yield taken))
    return (yield kw.suspend("late"))
def put(n):
    n[0] = yield kw.wait_signal("put")
@kw.migrate(from_="{site.name}:main")
def move(old):
    taken = old.refs[{other!r}] if kw.workflow_id() == "c" else None
    return main(old.locals["n"], taken), [taken] if taken is not None else []
""")
    for id in ("c", "d"):
        assert (site.w.command(id, "migrate") or {})["status"] == "ok"
        assert mine not in site.w.waits(id) and (other in site.w.waits(id)) == (id == "c")
        site.w.signal(id, "put", 1)
        site.w.resume(id, "late", id)
    assert (site.w.outputs_to("out"), site.w.result("c"), site.w.result("d")) == (["True"], "c", "d")


def test_a_moved_instance_is_on_current_code_and_what_it_brought_along_on_its_own(site: Site) -> None:
    """§8.2: the closure that was handed over belongs to the old version."""
    [old] = site.versions("v")
    site.deploy(NEW.replace("{name}", site.name))
    site.w.command("v", "migrate")
    code = (site.w.header("v") or {})["code"]
    assert {reference: entry["version"][:12] for reference, entry in code.items()} == {site.name: code[site.name]["version"][:12], f"{site.name}@{old}": old}
    assert code[site.name]["version"][:12] != old


@pytest.mark.parametrize("cached", [0, 10])
def test_an_object_of_a_class_that_changed_is_the_current_one_s_after_a_move_whether_the_instance_was_kept_live_or_restored(cached: int) -> None:
    """§8.5, §4.1: in an instance that was kept live, it had the old class until the instance was evicted."""
    text = "class Order:\n    {0}\n    def __init__(self, o):\n        self.o = o\n"
    site = Site(text.format("price = 1") + "def main(o):\n    order = Order(o)\n    yield kw.suspend('r')\n")
    site.w.config = site.w.config.model_copy(update={"instances_cached_max": cached})
    site.deploy(
        text.format("price = 2")
        + f"@kw.migrate(from_='{site.name}:main')\ndef move(old):\n    return moved(old.locals['order'], old.refs['r']), ['r']\n"
        + "def moved(order, r):\n    yield r\n    return [order.price, isinstance(order, Order)]\ndef main(o):\n    yield kw.suspend('s')\n"
    )
    try:
        site.w.command("w", "migrate")
    finally:
        declarations._migrations.clear()
    site.w.resume("w", "r")
    assert site.w.result("w") == [2, True]


def test_a_signal_that_old_code_had_taken_and_not_read_is_read_by_the_new() -> None:
    """§8.5, M3: a signal is consumed when its value reaches author code."""
    site = Site("def main(o):\n    yield kw.all([kw.wait_signal('s'), kw.suspend('never')])")
    site.w.start("v")
    for value in (1, 2):
        site.w.command("v", "signal", {"name": "s", "value": value})
    site.deploy(f"def main(o):\n    return [(yield kw.wait_signal('s')), kw.signals('s').take()]\n@kw.migrate(from_='{site.name}:main')\ndef move(old):\n    return main(None)\n")
    site.w.command("v", "migrate")
    declarations._migrations.clear()
    assert site.w.result("v") == [1, [2]]


def test_a_call_that_a_worker_has_is_taken_back_or_taken_over() -> None:
    """§8.5, M6.6: as timers are."""
    for takes in (False, True):
        queue = f"moving-{takes}"
        called = f"@kw.activity(name='{queue}', queue='{queue}')\ndef work(n: int) -> int: ...\n"
        site = Site(called + "def main(o):\n    return (yield kw.race([work(7), kw.suspend('never')]))")
        site.w._workflows.queues = True
        site.w.start("v")
        [job] = [wait for wait in site.w.header("v")["waits"] if wait["kind"] == "job"]
        given = f"old.refs[{job['ref']!r}]), [{job['ref']!r}]" if takes else "None)"
        site.deploy(called + "def main(o):\n    return (yield o if o is not None else kw.suspend('x'))\n" + f"@kw.migrate(from_='{site.name}:main')\ndef move(old):\n    return main({given}\n")
        site.w._workflows.queues = True
        try:
            assert (site.w.command("v", "migrate") or {})["status"] == "ok"
        finally:
            declarations._migrations.clear()
        told = [output.value for output in site.w.outputs if output.topic == queue and output.key == f"v|{job['ref']}".encode()]
        assert (told[-1] is None) is not takes
        site.w.resume("v", job["ref"] if takes else "x", 49)
        assert site.w.result("v") == 49


def test_a_second_migrate_and_one_without_a_migration_change_nothing(site: Site) -> None:
    """A migration is for code that is not current."""
    site.deploy("def main(o):\n    yield kw.suspend('x')")
    before = site.w.state.entries[b"v"]
    reply = site.w.command("v", "migrate")
    assert reply is not None
    assert (reply["status"], site.w.counts[-1]) == ("unchanged", "not-migrated")
    assert site.w.state.entries[b"v"] == before
    site.deploy(NEW.replace("{name}", site.name))
    site.w.command("v", "migrate")
    reply = site.w.command("v", "migrate")
    assert reply is not None
    assert reply["status"] == "unchanged"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no way')", "failed: ValueError: no way"),
        ("return 5", "a call of a durable generator function"),
        ("return main(1), ['nowhere']", "takes over nowhere"),
        ("return main(1), 'a'", "iterable of ref ids"),
        ("return main(0)", "failed before its first wait: ZeroDivisionError"),
        ("old = main(1); next(old); return old", "a call of a durable generator function"),
        ("return (wait for wait in [kw.suspend('new')])", "what it returned cannot be run: a generator expression is not a wait"),
    ],
)
def test_a_migration_that_fails_parks_the_instance_as_it_was(site: Site, body: str, said: str) -> None:
    """§8.5: a discard goes on with the old code, a retry with a corrected migration."""
    text = f"def main(o):\n    1 / o\n    yield kw.suspend('new')\n    return 'moved'\n@kw.migrate(from_='{site.name}:main')\ndef move(old):\n    {{}}\n"
    site.deploy(text.format(body))
    site.w.command("v", "migrate")
    parked = (site.w.header("v") or {})["parked"]
    assert parked["reason"] == "MigrationError"
    assert said in parked["message"]
    assert site.w.outputs_to("out") == []
    site.deploy(text.format("return main(1), []"))
    site.w.send("v", b"null", {"kwflow-op": "retry"})
    assert site.w.waits("v") == ["new"]


def test_one_version_can_be_named_also_if_its_unit_has_not_changed(site: Site) -> None:
    """`module:function@<12 hex>`: for code that is current, too."""
    [version] = site.versions("v")
    site.deploy(OLD + f"\ndef other():\n    return (yield kw.suspend('else'))\n@kw.migrate(from_='{site.name}:main@{version}')\ndef move(old):\n    return other()\n")
    reply = site.w.command("v", "migrate")
    assert reply is not None
    assert reply["status"] == "unchanged", "it runs the new version: nothing that it holds has changed"
    durable.load_source(site.name, HEAD + OLD, f"{site.name}.py")
    site.w.command("v", "migrate")
    assert site.w.waits("v") == ["else"]


def test_keys_are_checked_and_two_migrations_from_one_key_are_refused() -> None:
    for key in ("main", "shop/orders.py:main", "shop.orders:main:inner", "shop.orders:main@1234", ":main", 5):
        with pytest.raises(UsageError, match=re.escape(f'main as "module:function", such as "shop.orders:main", or one version, "module:function@<12 hex>" (see kwflow code list), not {key!r}')):
            api.migrate(from_=key)  # type: ignore[arg-type]
    try:
        api.migrate(from_="m:main")(test_keys_are_checked_and_two_migrations_from_one_key_are_refused)
        with pytest.raises(UsageError, match="two migrations"):
            api.migrate(from_="m:main")(site)
    finally:
        declarations._migrations.clear()


def test_a_migration_is_for_instances_of_which_only_a_helper_in_another_module_has_changed_and_for_each_once() -> None:
    """§8.5: it was ignored, as main's own module had not changed; and in place it may be refused, so nothing was left."""
    helper = durable.load_source("migrating_helper", HEAD + "def pack():\n    yield kw.suspend('packed')\n    return 1", "migrating_helper.py")
    site = Site("import migrating_helper\ndef main(o):\n    undo = lambda: o\n    return (yield from migrating_helper.pack())")
    durable.load_source("migrating_helper", HEAD + "def pack():\n    cents = 5\n    yield kw.suspend('ready')\n    return cents", helper.__file__ or "")
    moves = f"@kw.migrate(from_='{site.name}:main')\ndef move(old):\n    return main(old.locals['o'])\n"
    site.deploy("import migrating_helper\ndef main(o):\n    undo = lambda: o\n    return (yield from migrating_helper.pack())\n" + moves)
    try:
        replies = [site.w.command("w", "migrate") or {} for _ in range(2)]
    finally:
        declarations._migrations.clear()
    assert [reply["status"] for reply in replies] == ["ok", "unchanged"]
    assert replies[1]["message"].startswith(f"there is no migration for {site.name}:main@") and replies[1]["message"].endswith(", which it runs")
    site.w.resume("w", "ready")
    assert site.w.result("w") == 5


def test_a_migration_that_fails_says_where(site: Site) -> None:
    site.deploy(NEW.replace("{name}", site.name).replace('old.locals["o"]', "old.locals['nothing']"))
    site.w.command("v", "migrate")
    assert re.fullmatch(r"the migration move failed: KeyError: 'nothing' in move \(code_case_\d+.py:\d+\)", site.w.header("v")["parked"]["message"])
    site.w.command("v", "discard")
    site.deploy(NEW.replace("{name}", site.name).replace(', ["b"]', ""))
    site.w.command("v", "migrate")
    assert site.w.header("v")["parked"]["message"] == "the migration move: what it returned failed before its first wait: it waits for a ref that it does not take over"
