"""Code that changes under a running workflow (G10, semantics §8): each deployment meets instances that are in the middle of their work."""

import contextlib
import importlib
import itertools
import linecache
import pathlib
import sys
import types
from typing import Any

import msgspec
import pytest

from kwflow import api, declarations, durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.wire import Record
from kwflow.durable import registry
from kwflow.runners.code import LEASE_MS, CodeStore
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.hosted import processors_of
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.outside import code_store
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore, WorkflowTester

HEAD = "import kwflow as kw\nkw.declare_topics('out')\ndef say(x):\n    kw.output(str(x), 'out')\n"
_count = itertools.count()


class Site:
    """A module that is deployed again and again, and an instance `w` that was started on its first version."""

    def __init__(self, source: str) -> None:
        self.name = f"code_case_{next(_count)}"
        self.w = WorkflowTester(self.load(source))
        self.w.start("w")

    def load(self, source: str) -> Any:
        return getattr(durable.load_source(self.name, HEAD + source, f"{self.name}.py"), "main", None)

    def deploy(self, source: str) -> None:
        self.w.deploy(self.load(source))

    def versions(self, id: str) -> list[str]:
        return [code["version"][:12] for code in (self.w.header(id) or {})["code"].values()]


def test_an_instance_finishes_on_the_code_it_started_on_while_new_ones_take_the_new() -> None:
    """G10, §8.2: with the old helpers, too."""
    text = "def price():\n    return {0}\ndef main(o):\n    first = yield kw.suspend('r')\n    yield kw.suspend('s')\n    return ['{1}', first, price()]"
    site = Site(text.format(1, "old"))
    site.deploy(text.format(2, "new"))
    site.w.start("v")
    for id in ("w", "v"):
        site.w.resume(id, "r", 5)
        site.w.resume(id, "s")
    assert site.w.result("w") == ["old", 5, 1]
    assert site.w.result("v") == ["new", 5, 2]


def test_an_instance_whose_own_units_are_unchanged_takes_the_new_code_around_them() -> None:
    """§8.2: a changed helper is used from the next step on."""
    site = Site("def price():\n    return 1\ndef main(o):\n    yield kw.suspend('r')\n    return price()")
    site.deploy("def price():\n    return 2\ndef main(o):\n    '''Docs.'''\n    yield kw.suspend('r')\n    return price()")
    site.w.resume("w", "r")
    assert site.w.result("w") == 2


def test_old_code_starts_the_workflow_that_is_registered_now_where_it_names_its_own() -> None:
    """§8.2: the function in old code is a different object from the registered one, so each instance that named one failed after a deployment."""
    text = """
@kw.workflow(name='{0}-child')
def child(o):
    yield kw.suspend(o)
    return '{1}'
def main(o):
    yield kw.suspend('r')
    found = yield kw.start_child(child, 'c', id='c')
    kw.send_signal('d', 's', start=child, input='d')
    return ['{1}', found]
"""
    site = Site(text.format("first", "old"))
    site.deploy(text.format("second", "new"))
    del declarations._workflows["first-child"]
    site.deploy(text.format("second", "newer"))
    site.w.resume("w", "r")
    site.w.resume("c", "c")
    assert (site.w.result("w"), site.w.header("d")["workflow"]) == (["old", "newer"], "second-child")


@pytest.mark.parametrize("cached", [0, 10])
def test_an_instance_that_holds_nothing_of_the_old_code_any_more_leaves_it_whether_it_was_kept_live_or_restored(cached: int) -> None:
    """§8.2, §4.1: found by simulation. An instance that was kept live went on with the old helper, and a restored one with the new helper."""
    text = """
def price():
    return {0}
def child():
    try:
        yield kw.suspend('never')
    finally:
        yield kw.suspend('c')
        say(price())
def main(o):
    kw.spawn(child())
    yield kw.suspend('r')
    return 'main {0}'
"""
    site = Site(text.format(1))
    site.w.config = site.w.config.model_copy(update={"instances_cached_max": cached})
    site.deploy(text.format(2))
    site.w.resume("w", "r")
    assert site.w.result("w") == "main 1"
    site.w.resume("w", "c")
    assert site.w.outputs_to("out") == ["2"]


def test_the_variables_of_an_instance_on_old_code_are_shown_objects_of_old_classes_too() -> None:
    """§4.4, §8.4: this needs no code of either version."""
    text = """
class Order:
    price = {0}
    def __init__(self):
        self.count = 3
def tell():
    return {0}
def main(o):
    order, kind, told = Order(), Order, tell
    yield kw.suspend('r')
    yield kw.suspend('s')
    return {0}
"""
    site = Site(text.format(1))
    site.deploy(text.format(2))
    site.w.resume("w", "r")
    [(_, shown)] = durable.peek(snapshot.split(site.w.state.entries[b"w"])[1])
    assert {name: repr(value) for name, value in shown.items()} == {
        "o": "None",
        "order": f"<{site.name}.Order {{'count': 3}}>",
        "kind": f"<class '{site.name}.Order'>",
        "told": f"<class '{site.name}.tell'>",
    }


DEPLOYMENTS = {
    "a renamed function": (
        "def step_(o):\n    yield kw.suspend('r')\n    return 'old'\ndef main(o):\n    return (yield step_(o))",
        "def renamed(o):\n    yield kw.suspend('r')\n    return 'new'\ndef main(o):\n    return (yield renamed(o))",
    ),
    "a deleted function": ("def step_(o):\n    yield kw.suspend('r')\n    return 'old'\ndef main(o):\n    return (yield step_(o))", "def main(o):\n    yield kw.suspend('q')"),
    "a workflow that is no longer there": ("def main(o):\n    yield kw.suspend('r')\n    return 'old'", "def other():\n    return 1"),
    "a changed exception class": (
        """
class Refused(Exception):
    def __init__(self, n):
        super().__init__(n)
        self.n = n
def main(o):
    try:
        raise Refused(1)
    except Refused as e:
        held = e
        yield kw.suspend('r')
    try:
        raise held
    except Refused as e:
        return 'old' if e.n == 1 else 'wrong'
""",
        "class Refused(Exception):\n    def __init__(self, n, why):\n        super().__init__(n, why)\ndef main(o):\n    yield kw.suspend('r')\n    raise Refused(1, 2)",
    ),
    "a changed enum": (
        """
import enum
class Color(enum.Enum):
    RED = 1
    BLUE = 2
def main(o):
    held = {Color.RED: 'old'}
    yield kw.suspend('r')
    return held[Color.RED] if list(Color) == [Color.RED, Color.BLUE] else 'wrong'
""",
        "import enum\nclass Color(enum.Enum):\n    GREEN = 1\ndef main(o):\n    yield kw.suspend('r')\n    return Color.GREEN.name",
    ),
    "a changed dataclass": (
        """
from dataclasses import dataclass
@dataclass
class Order:
    price: int
def main(o):
    order = Order(3)
    yield kw.suspend('r')
    return 'old' if order == Order(3) and isinstance(order, Order) else 'wrong'
""",
        """
from dataclasses import dataclass
@dataclass(frozen=True)
class Order:
    price: str
    currency: str
def main(o):
    order = Order('3', 'EUR')
    yield kw.suspend('r')
    return order.currency
""",
    ),
    "a changed nested function": (
        "def main(o):\n    def undo():\n        return 'old'\n    yield kw.suspend('r')\n    return undo()",
        "def main(o):\n    def undo():\n        return 'new'\n    yield kw.suspend('r')\n    return undo()",
    ),
    "a changed function held by name": (
        "def undo():\n    return 'old'\ndef main(o):\n    held = [undo]\n    yield kw.suspend('r')\n    return held[0]()",
        "def undo():\n    return 'new'\ndef main(o):\n    held = [undo]\n    yield kw.suspend('r')\n    return held[0]()",
    ),
}


@pytest.mark.parametrize("what", DEPLOYMENTS)
def test_an_instance_that_waits_in_the_middle_survives(what: str) -> None:
    """G10: each change meets an instance that waits, followed by two more steps of the old code."""
    before, after = DEPLOYMENTS[what]
    waits = before.replace("yield kw.suspend('r')", "yield kw.suspend('r'); yield kw.suspend('s')")
    site = Site(waits)
    site.deploy(after)
    site.w.resume("w", "r")
    assert site.w.waits("w") == ["s"]
    site.w.resume("w", "s")
    assert site.w.result("w") == "old"


def test_changed_classes_alone_pin_nothing() -> None:
    """§8.4: the new class receives what was saved of the old one; `__setstate__` is for that."""
    text = "class Order:\n    def __init__(self):\n        self.price = 3\n{}\ndef main(o):\n    order = Order()\n    yield kw.suspend('r')\n    return vars(order)"
    site = Site(text.format(""))
    site.deploy(text.format("    def __setstate__(self, state):\n        self.cents = state['price'] * 100"))
    site.w.resume("w", "r")
    assert site.w.result("w") == {"cents": 300}


def test_old_code_sees_an_exception_of_current_code_if_its_class_did_not_change() -> None:
    """§8.4: top-level classes with an unchanged AST are the current ones."""
    helper = f"code_helper_{next(_count)}"
    text = f"class Mine(Exception):\n    pass\ndef main(o):\n    yield kw.suspend('r')\n    import {helper}\n    try:\n        {helper}.fail()\n    except Mine:\n        return {{}}"
    site = Site(text.format("'old'"))
    site.deploy(text.format("'new'"))
    durable.load_source(helper, f"from {site.name} import Mine\ndef fail():\n    raise Mine")
    site.w.resume("w", "r")
    assert site.w.result("w") == "old"


def test_a_module_that_was_renamed_is_found_in_the_store_with_the_helpers_it_imports() -> None:
    """G10, §8.3."""
    helper = f"code_helper_{next(_count)}"
    durable.load_source(helper, "def help_():\n    return 'helped'")
    site = Site(f"from {helper} import help_\ndef main(o):\n    yield kw.suspend('r')\n    yield kw.suspend('s')\n    return help_()")
    for gone in (site.name, helper):
        del sys.modules[gone]
        del registry.modules()[gone]  # type: ignore[attr-defined] # as in a process that never had it
    site.w.deploy(durable.load_source(f"{site.name}_renamed", "def main(o):\n    yield").main)
    site.w.resume("w", "r")
    site.w.resume("w", "s")
    assert site.w.result("w") == "helped"


def test_what_the_store_cannot_answer_parks_the_instance_and_a_retry_goes_on_with_the_code_that_is_deployed_again(tmp_path: pathlib.Path) -> None:
    """G10: functions that were made durable one by one have no module whose source could be run."""
    name = f"code_case_{next(_count)}"
    text = "from kwflow.durable import durable\nimport kwflow as kw\n@durable\ndef main(o):\n    yield kw.suspend('r')\n    return {}\n"

    def load(source: str) -> Any:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        linecache.clearcache()
        sys.modules[name] = module = types.ModuleType(name)
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module.main

    w = WorkflowTester(load(text.format(1)))
    w.start("w")
    w.deploy(load(text.format(2)))
    w.resume("w", "r")
    parked = (w.header("w") or {})["parked"]
    assert parked["reason"] == "CodeChangedError"
    assert "main has changed" in parked["message"]
    w.deploy(load(text.format(1)))
    w.send("w", b"null", {"kwflow-op": "retry"})
    assert w.result("w") == 1


@pytest.mark.parametrize(("raised", "said"), [("OSError('no licence')", "OSError: no licence"), ("SystemExit(3)", "SystemExit: 3"), ("kw.UsageError('no')", "UsageError: no")])
def test_an_exception_while_old_code_loads_parks_the_instance_alone(raised: str, said: str) -> None:
    """§8.4: loading is tried again with a retry."""
    site = Site(f"import sys\nif 'code_is_broken' in sys.modules:\n    raise {raised}\ndef main(o):\n    yield kw.suspend('r')\n    return 'old'")
    site.deploy("def main(o):\n    yield kw.suspend('r')\n    return 'new'")
    site.w.start("v")
    sys.modules["code_is_broken"] = sys
    try:
        site.w.resume("w", "r")
    finally:
        del sys.modules["code_is_broken"]
    site.w.resume("v", "r")
    assert f"cannot be loaded: {said}" in (site.w.header("w") or {})["parked"]["message"]
    assert site.w.result("v") == "new"
    site.w.send("w", b"null", {"kwflow-op": "retry"})
    assert site.w.result("w") == "old"


def test_registrations_of_old_code_are_ignored_and_its_topics_are_added() -> None:
    """§8.4, §9.6."""
    topic = f"only-old-{next(_count)}"
    head = f"@kw.workflow(name='{topic}')\ndef extra(o):\n    yield\nkw.declare_topics('{topic}')\n"
    site = Site(f"{head}def main(o):\n    yield kw.suspend('r')\n    kw.output('x', '{topic}')\n    return 'old'")
    declarations._topics.discard(topic)  # as in a process that never had the old code
    declarations._workflows.pop(topic)
    site.deploy("def main(o):\n    yield kw.suspend('r')\n    return 'new'")
    site.w.resume("w", "r")
    assert site.w.result("w") == "old"
    assert site.w.outputs_to(topic) == ["x"]
    assert topic not in api.registered_workflows()


def test_a_version_that_is_deployed_again_is_simply_current() -> None:
    """§8.3: snapshots hold logical names."""
    first = "def main(o):\n    yield kw.suspend('r')\n    yield kw.suspend('s')\n    return __name__"
    site = Site(first)
    site.deploy("def main(o):\n    yield kw.suspend('x')")
    site.w.resume("w", "r")
    site.deploy(first)
    site.w.resume("w", "s")
    assert site.w.result("w") == site.name


def test_headers_say_which_version_an_instance_waits_in_and_where() -> None:
    """Wire §3: the file is the old one."""
    site = Site("def main(o):\n    yield kw.suspend('r')\n    yield kw.suspend('s')")
    [version] = site.versions("w")
    site.deploy("\n\n\ndef main(o):\n    yield kw.suspend('r')\n    yield kw.suspend('other')")
    site.w.resume("w", "r")
    assert site.versions("w") == [version]
    [wait] = (site.w.header("w") or {})["waits"]
    assert (wait["ref"], wait["file"], wait["line"]) == ("s", f"{site.name}.py@{version}", 7)


# -- the store -------------------------------------------------------------------------------------------------------
class Engine:
    """One processor and the records it wrote to the code topic. `commit` False stands for a transaction that was aborted."""

    def __init__(self, log: list[Record], store: MemoryStore, source: str, name: str, keys: tuple[str, ...] = ()) -> None:
        self.log, self.store = log, store
        main = durable.load_source(name, HEAD + source, f"{name}.py").main
        config = Config(instances_cached_max=0, snapshot_keys=list(keys))
        code = CodeStore(lambda offset: [record for record in log if record.offset >= offset], config.signing_keys)
        self.processor = WorkflowProcessor(config, Workflows({"main": main}, "main"), api.declared_topics(), sources=code)

    def batch(self, *values: tuple[str, bytes], at: int = 0, commit: bool = True) -> list[str]:
        """The values of the records written beside code entries."""
        overlay = Overlay(self.store)
        records = [Record("workflow-resume", 0, at + number, at, id.encode(), value) for number, (id, value) in enumerate(values)]
        made = [output for decision in self.processor.decide(overlay, records, at) for output in decision.outputs]
        if commit:
            self.store.apply(overlay.changes)
            for output in made:
                if output.topic == self.processor.config.code_topic:
                    self.log.append(Record(output.topic, 0, len(self.log), at, output.key, output.value))
        return [(output.value or b"").decode() for output in made if output.topic != self.processor.config.code_topic]

    def code_of(self, id: str) -> dict[str, Any]:
        code: dict[str, Any] = snapshot.read_header(self.store.entries[id.encode()])["code"]
        return code


def test_a_source_is_written_with_the_first_snapshot_that_names_it_and_again_after_an_abort() -> None:
    """Wire §4: it is written in that snapshot's transaction. To take an aborted one for written would lose the code."""
    log: list[Record] = []
    engine = Engine(log, MemoryStore(), "def main(o):\n    yield kw.suspend('r')\n    yield kw.suspend('s')", f"code_case_{next(_count)}")
    engine.batch(("a", b"new:1"), commit=False)
    assert log == []
    engine.batch(("a", b"new:1"), ("b", b"new:1"))
    engine.batch(("a", b'{"ref":"r"}'), at=10)
    [(name, code)] = engine.code_of("a").items()
    assert [record.key for record in log] == [f"{name}@{code['version']}".encode()]
    engine.batch(("b", b'{"ref":"r"}'), at=LEASE_MS + 20)
    assert len(log) == 2, "in use for a day: written again, so that gc can tell"


def test_an_engine_with_other_code_asks_for_the_version_that_a_snapshot_names() -> None:
    """G10: after a rebalance, an instance arrives that another engine wrote a minute ago. It is not parked."""
    log: list[Record] = []
    store, name = MemoryStore(), f"code_case_{next(_count)}"
    old = "def main(o):\n    yield kw.suspend('r')\n    yield kw.suspend('s')\n    return 'old'"
    new = "def main(o):\n    yield kw.suspend('r')\n    return 'new'"
    second = Engine(log, store, new, name)  # it has read the topic to its end, where nothing was yet
    first = Engine(log, store, old, name)
    first.batch(("w", b"new:1"))
    first.batch(("w", b'{"ref":"r"}'), at=10)
    durable.load_source(name, HEAD + new, f"{name}.py")
    assert second.batch(("w", b'{"ref":"s"}'), at=20) == ['"old"']


def test_with_keys_an_entry_that_no_key_signed_is_not_there() -> None:
    """Write access to the topic must not be enough to run code. The name is signed with the source, and keys are rotated as those of snapshots are."""
    log: list[Record] = []
    store, name = MemoryStore(), f"code_case_{next(_count)}"
    old, new = "def main(o):\n    yield kw.suspend('r')\n    return 'old'", "def main(o):\n    yield kw.suspend('r')\n    return 'new'"
    first, second = "1" * 32, "2" * 32
    Engine(log, store, old, name, (first,)).batch(("a", b"new:1"), ("b", b"new:1"), ("c", b"new:1"))
    [written] = log
    assert Engine(log, store, new, name, (second, first)).batch(("a", b'{"ref":"r"}'), at=10) == ['"old"']
    Engine(log, store, old, name, (second, first)).batch(("d", b"new:1"), at=15)
    assert len(log) == 2, "the key that signs now has not signed it yet"
    durable.load_source(name, HEAD + "def main(o):\n    yield kw.suspend('x')", f"{name}.py")  # the old version is loaded again
    log[:] = [msgspec.structs.replace(written, value=(written.value or b"").partition(b"\n")[0])]
    Engine(log, store, new, name, (second, first)).batch(("b", b'{"ref":"r"}'), at=20)
    assert "is not stored" in snapshot.read_header(store.entries[b"b"])["parked"]["message"]
    log[:] = [msgspec.structs.replace(written, value=(written.value or b"").replace(b"'old'", b"'bad'"))]
    Engine(log, store, new, name, (second, first)).batch(("c", b'{"ref":"r"}'), at=30)
    assert "is not stored" in snapshot.read_header(store.entries[b"c"])["parked"]["message"]


def test_commands_and_hosted_engines_too_take_only_code_that_is_signed_where_there_are_keys(tmp_path: pathlib.Path) -> None:
    log: list[Record] = []
    name = f"code_case_{next(_count)}"
    Engine(log, MemoryStore(), "def main(o):\n    yield kw.suspend('r')", name).batch(("a", b"new:1"))
    [written] = log
    key = (written.key or b"").decode()
    with contextlib.closing(Embedded(tmp_path, sync=False)) as held:
        held.append(Config().code_topic, written.key, written.value)
        for keys, there in (([], True), (["1" * 32], False)):
            hosted = processors_of(held, Workflows({}), Config(snapshot_keys=keys), print)[0].sources(key)
            assert ((hosted is not None), (code_store(Config(snapshot_keys=keys), tmp_path)(key) is not None)) == (there, there)


# -- before the first record -----------------------------------------------------------------------------------------
def test_what_instances_of_a_partition_run_is_loaded_before_its_first_record_with_its_topics() -> None:
    """§9.6."""
    log: list[Record] = []
    store, name, topic = MemoryStore(), f"code_case_{next(_count)}", f"only-old-{next(_count)}"
    new = "def main(o):\n    yield kw.suspend('r')\n    return 'new'"
    first = Engine(log, store, f"kw.declare_topics('{topic}')\ndef main(o):\n    yield kw.suspend('r')\n    kw.output('x', '{topic}')\n    return 'old'", name)
    first.batch(("w", b"new:1"))
    declarations._topics.discard(topic)  # as in a process that never had the old code
    engine = Engine(log, store, new, name)
    assert topic not in engine.processor.topics.declared
    [key] = [(record.key or b"").decode() for record in log]
    for _ in range(2):  # the next partition names it, too
        assert engine.processor.taken_over(store) == {"out": key, topic: key}
    assert topic in engine.processor.topics.declared
    assert engine.batch(("w", b'{"ref":"r"}'), at=10) == ["x", '"old"']


def test_a_durable_module_that_only_a_workflow_imports_is_imported_before_the_first_record(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """§9.6."""
    package, topic = f"code_package_{next(_count)}", f"only-later-{next(_count)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / "later.py").write_text(f"import kwflow as kw\nkw.declare_topics('{topic}')\ndef wait():\n    yield kw.suspend('r')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    durable.install([package])
    log: list[Record] = []
    store, source = MemoryStore(), f"def main(o):\n    from {package} import later\n    yield from later.wait()"
    name = f"code_case_{next(_count)}"
    importlib.import_module(f"{package}.later")  # another MODULE of that engine imported it; a step could not import a module that declares a topic
    Engine(log, store, source, name).batch(("w", b"new:1"))
    del sys.modules[f"{package}.later"], registry.modules()[f"{package}.later"]  # type: ignore[attr-defined] # as in a process that has just begun
    declarations._topics.discard(topic)
    engine = Engine(log, store, source, name)
    assert list(engine.processor.taken_over(store)) == [topic]
    assert f"{package}.later" in registry.modules()


def test_a_version_of_which_no_unit_has_changed_is_not_loaded_beside_the_current_one() -> None:
    """§8.2, §9.6."""
    log: list[Record] = []
    store, name = MemoryStore(), f"code_case_{next(_count)}"
    Engine(log, store, "def main(o):\n    yield kw.suspend('r')", name).batch(("w", b"new:1"))
    engine = Engine(log, store, "def more():\n    return 1\n\n\ndef main(o):\n    'Documented.'\n    yield kw.suspend('r')", name)
    assert engine.processor.taken_over(store) == {}
    assert registry.version(registry.version_name(name, (log[0].key or b"").decode().partition("@")[2])) is None


def test_of_many_stored_versions_those_that_no_instance_runs_any_more_are_not_loaded_at_a_takeover() -> None:
    """§9.6: after a year of daily deployments without `code gc`, an engine loaded hundreds of them before its first record, each at 0.1 s and a megabyte."""
    log: list[Record] = []
    store, name, topic = MemoryStore(), f"code_case_{next(_count)}", f"only-old-{next(_count)}"
    Engine(log, store, f"kw.declare_topics('{topic}')\ndef main(o):\n    yield kw.suspend('r')\n    kw.output('x', '{topic}')\n    return 'first'", name).batch(("w", b"new:1"))
    for n in range(1, 41):
        engine = Engine(log, store, f"def main(o):\n    yield kw.suspend('r')\n    return {n}", name)
        engine.batch((f"v{n}", b"new:1"), at=100 * n)
        waiting = store.entries[b"v%d" % n]
        engine.batch((f"v{n}", b'{"ref":"r"}'), at=100 * n + 50)
    stored = [(record.key or b"").decode() for record in log]
    assert len(stored) == 41
    declarations._topics.discard(topic)
    engine = Engine(log, store, "def main(o):\n    yield kw.suspend('r')\n    return 'new'", name)
    assert engine.processor.taken_over(store)[topic] == stored[0]
    loaded = [key for key in stored if registry.version(registry.version_name(*key.split("@"))) is not None]
    assert stored[0] in loaded and len(loaded) <= 17
    assert stored[40] not in loaded
    other = MemoryStore()  # the next partition: an instance there waits in another of the same versions
    other.entries = {**store.entries, b"v40": waiting}
    engine.processor.taken_over(other)
    assert registry.version(registry.version_name(*stored[40].split("@"))) is not None
    assert engine.batch(("w", b'{"ref":"r"}'), at=10_000) == ["x", '"first"']


def test_old_code_that_does_not_load_is_said_at_once_and_parks_only_what_needs_it() -> None:
    """§8.4, §9.6."""
    log: list[Record] = []
    said: list[str] = []
    store, name = MemoryStore(), f"code_case_{next(_count)}"
    Engine(log, store, f"import sys\nif '{name}_broken' in sys.modules:\n    raise OSError('no licence')\ndef main(o):\n    yield kw.suspend('r')", name).batch(("w", b"new:1"))
    engine = Engine(log, store, "def main(o):\n    yield kw.suspend('q')", name)
    engine.processor.on_log = said.append
    sys.modules[f"{name}_broken"] = sys
    try:
        assert engine.processor.taken_over(store) == {}
        [line] = said
        assert line.startswith(f"{name}@") and line.endswith("cannot be loaded: OSError: no licence")
        engine.batch(("w", b'{"ref":"r"}'), at=10)
    finally:
        del sys.modules[f"{name}_broken"]
    assert "no licence" in snapshot.read_header(store.entries[b"w"])["parked"]["message"]
