"""Old code beside new code in one process: what the names in a snapshot mean (semantics §8)."""

import itertools
import sys
from typing import Any

import pytest

from kwflow import durable
from kwflow.durable import codec, registry, versions
from kwflow.errors import CodeChangedError, UnsavableError

_count = itertools.count()


class Deployed:
    """One module, deployed again and again under one name. `stored` keeps the sources that ran, as an engine does."""

    def __init__(self, name: str = "") -> None:
        self.name = name or f"versioned_{next(_count)}"
        self.stored: dict[str, bytes] = {}

    def deploy(self, source: str) -> Any:
        return durable.load_source(self.name, source, f"{self.name}.py")

    def save(self, graph: Any, pins: registry.Pins | None = None) -> tuple[bytes, dict[str, Any]]:
        body, held, _ = codec.dumps_with_code(graph, pins or {})
        for module, _ in held.values():
            for found in versions.stored_with(module):
                self.stored[versions.entry_key(found.name, found.version)] = versions.entry(found)
        return body, {reference: {"version": module.version, "units": units} for reference, (module, units) in held.items()}

    def asleep(self, gen: Any) -> tuple[bytes, dict[str, Any]]:
        """Run a generator to its first wait and return what it is saved as."""
        next(gen)
        return self.save(gen)

    def load(self, saved: tuple[bytes, dict[str, Any]]) -> tuple[Any, registry.Pins]:
        return versions.loads(*saved, self.stored.get)

    def again(self, saved: tuple[bytes, dict[str, Any]]) -> Any:
        """Load, save and load once more, which is what a second step meets."""
        return self.load(self.save(*self.load(saved)))[0]


@pytest.fixture
def site() -> Deployed:
    return Deployed()


def test_an_unchanged_unit_takes_the_new_module_and_all_that_it_calls(site: Deployed) -> None:
    """§8.2."""
    gen = site.deploy("def helper():\n    return 1\ndef main():\n    yield\n    yield helper()").main()
    saved = site.asleep(gen)
    site.deploy("# moved\n\ndef main():\n    '''told'''\n    yield  # here\n    yield helper()\ndef helper():\n    return 2")
    restored, pins = site.load(saved)
    assert not pins
    assert next(restored) == 2


def test_a_changed_unit_stays_on_the_stored_module_with_all_that_it_calls(site: Deployed) -> None:
    """§8.2: versions are never mixed; the helper is the old one, too."""
    gen = site.deploy("def helper():\n    return 1\ndef main():\n    yield\n    yield helper()").main()
    saved = site.asleep(gen)
    module = site.deploy("def helper():\n    return 2\ndef main():\n    yield\n    yield helper() * 10")
    assert next(site.again(saved)) == 1
    fresh = module.main()
    next(fresh)
    assert next(fresh) == 20


def test_a_change_of_a_unit_that_is_not_held_changes_nothing_a_nested_def_belongs_to_its_outermost(site: Deployed) -> None:
    """§8.1."""
    text = "def other():\n    return {}\ndef main():\n    def inner():\n        yield\n        yield {}\n    return inner()\n"
    gen = site.deploy(text.format(1, 1)).main()
    saved = site.asleep(gen)
    assert saved[1][site.name]["units"].keys() == {"main"}
    site.deploy(text.format(2, 1))
    assert not site.load(saved)[1]
    site.deploy(text.format(1, 2))
    assert site.load(saved)[1]


@pytest.mark.parametrize("change", ["def main(x: int = 2) -> None:", "@str\ndef main(x=3):", "def main(x: 'y'):\n    'docs'"])
def test_docstring_annotations_decorators_and_defaults_are_no_part_of_a_unit(site: Deployed, change: str) -> None:
    """§8.1."""
    gen = site.deploy("def main(x=1):\n    yield\n    yield x").main()
    saved = site.asleep(gen)
    site.deploy(f"{change}\n    yield\n    yield x")
    restored, pins = site.load(saved)
    assert not pins
    assert next(restored) == 1


def test_an_old_version_is_a_module_of_its_own_in_sys_modules(site: Deployed) -> None:
    """§8.3: dataclasses need it. `__package__` and `__file__` are those of M."""
    source = "import sys\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    source += "def main():\n    p = P(1)\n    yield\n    yield p, __name__, __file__, __package__, sys.modules[__name__].P is P"
    gen = site.deploy(source).main()
    saved = site.asleep(gen)
    version = saved[1][site.name]["version"]
    module = site.deploy("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 0\ndef main():\n    yield")
    p, name, file, package, found = next(site.again(saved))
    assert (name, file, package, found) == (f"{site.name}@{version[:12]}", f"{site.name}.py", "", True)
    assert repr(p) == "P(x=1)"
    assert name in sys.modules
    assert module.P is not type(p)


def test_snapshots_write_logical_names_so_a_version_that_comes_back_is_simply_current(site: Deployed) -> None:
    """§8.3."""
    first = "class P:\n    pass\ndef make(p):\n    return lambda: p\ndef main():\n    f = make(P())\n    yield\n    yield f, f()"
    gen = site.deploy(first).main()
    saved = site.asleep(gen)
    site.deploy("class P:\n    x = 1\ndef main():\n    yield")
    on_old = site.save(*site.load(saved))
    assert on_old[1] == saved[1]
    assert b"@" not in on_old[0].replace(b"@l", b"").replace(b"@c", b"")
    module = site.deploy(first)
    restored, pins = site.load(on_old)
    f, p = next(restored)
    assert not pins
    assert type(p) is module.P
    assert f.__module__ == site.name


def test_unchanged_top_level_classes_are_the_current_ones_changed_ones_and_what_derives_from_them_are_not(site: Deployed) -> None:
    """§8.4."""
    first = "class Same(Exception):\n    pass\nclass Changed(Exception):\n    pass\nclass Below(Changed):\n    pass\ndef main():\n    yield\n    yield Same, Changed, Below"
    gen = site.deploy(first).main()
    saved = site.asleep(gen)
    module = site.deploy(first.replace("Changed(Exception):\n    pass", "Changed(Exception):\n    code = 1").replace("yield Same", "yield 0, Same"))
    same, changed, below = next(site.again(saved))
    assert same is module.Same
    assert changed is not module.Changed
    assert below is not module.Below
    assert issubclass(below, changed)
    assert versions.changed_classes(first, registry.modules()[site.name].source) == ["Below", "Changed"]


def test_class_changes_alone_pin_nothing(site: Deployed) -> None:
    """§8.4: `__setstate__` handles them."""
    text = "class P:\n    def __init__(self):\n        self.x = 1\n{}\ndef main():\n    p = P()\n    yield\n    yield p"
    gen = site.deploy(text.format("")).main()
    saved = site.asleep(gen)
    site.deploy(text.format("    def __setstate__(self, state):\n        self.y = state['x'] + 1"))
    restored, pins = site.load(saved)
    assert not pins
    assert next(restored).y == 2


SHOWN = "[(name, getattr(value, name, 'absent')) for name in 'abz']"
FIELDS = {"before": "    z: int = 9\n    a: int = 1\n    b: int = 2\n", "after": "    a: int = 1\n    b: int = 2\n    z: int = 9\n"}
KEPT, SHIFTED = [("a", 1), ("b", 3), ("z", "absent")], [("a", 3), ("b", "absent"), ("z", 1)]
DEFAULTED = [*KEPT[:2], ("z", 9)]
CHANGED = {
    "a dataclass": ("@dataclass\nclass P:\n", DEFAULTED, DEFAULTED),
    "a frozen one": ("@dataclass(frozen=True)\nclass P:\n", DEFAULTED, DEFAULTED),
    "one with slots": ("@dataclass(slots=True)\nclass P:\n", KEPT, KEPT),
    "a frozen one with slots": ("@dataclass(frozen=True, slots=True)\nclass P:\n", SHIFTED, KEPT),
    "a named tuple": ("class P(NamedTuple):\n", [("a", 3), ("b", 2), ("z", 1)], DEFAULTED),
    "an attrs class": ("@attrs.define\nclass P:\n", KEPT, KEPT),
    "a pydantic model": ("class P(pydantic.BaseModel):\n", KEPT, KEPT),
    "a msgspec struct": ("class P(msgspec.Struct):\n", [("a", 3), ("b", 2), ("z", 1)], DEFAULTED),
    "one with kw_only": ("class P(msgspec.Struct, kw_only=True):\n", DEFAULTED, DEFAULTED),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_old_objects_are_in_a_class_that_got_a_field(site: Deployed, what: str) -> None:
    """As docs/CODE.md describes it, for a field put before the others and for one put after them."""
    head, *expected = CHANGED[what]
    imports = "from dataclasses import dataclass\nfrom typing import NamedTuple\nimport attrs, msgspec, pydantic\n"
    text = f"{imports}{head}{{}}def hold():\n    value = P(a=1, b=3)\n    yield\n    yield {SHOWN}\n"
    gen = site.deploy(text.format("    a: int = 1\n    b: int = 2\n")).hold()
    saved = site.asleep(gen)
    for place, found in zip(FIELDS, expected, strict=True):
        site.deploy(text.format(FIELDS[place]))
        assert next(site.load(saved)[0]) == found


def test_a_class_that_exits_when_it_gets_what_was_saved_ends_no_process(site: Deployed) -> None:
    """The instance is parked, as for any other error in `__setstate__`."""
    text = "class C:\n    def __init__(self):\n        self.x = 1\n{0}\ndef main():\n    c = C()\n    yield"
    saved = site.asleep(site.deploy(text.format("")).main())
    site.deploy(text.format("    def __setstate__(self, state):\n        raise SystemExit(3)"))
    with pytest.raises(CodeChangedError, match=r"classes that have changed since it was saved \(.*C\) may not accept what was saved: SystemExit: 3"):
        site.load(saved)


@pytest.mark.parametrize("head", ["@attrs.define", "@dataclass(frozen=True, slots=True)"])
def test_an_object_that_lacks_a_field_is_not_saved_again_unless_setstate_sets_it(site: Deployed, head: str) -> None:
    """As docs/CODE.md describes it: the methods that such a class generates read every field."""
    text = f"from dataclasses import dataclass\nimport attrs\n{head}\nclass P:\n{{}}def hold():\n    value = P(a=1, b=3)\n    yield\n    yield {SHOWN}\n"
    gen = site.deploy(text.format("    a: int = 1\n    b: int = 2\n")).hold()
    saved = site.asleep(gen)
    site.deploy(text.format(FIELDS["after"]))
    with pytest.raises(UnsavableError, match="no attribute 'z'"):
        site.again(saved)
    setstate = "    def __setstate__(self, state):\n        for name, value in zip('abz', [*state, 9]):\n            object.__setattr__(self, name, value)\n"
    if "attrs" not in head:  # attrs saves the state in another form once there is a __setstate__
        site.deploy(text.format(FIELDS["after"] + setstate))
        assert next(site.again(saved)) == DEFAULTED


ENUMS = {"RED = 1\n    ROUND = 3": "RED", "ROUGE = 1": "ROUGE", "NEW = enum.auto()\n    RED = enum.auto()": "NEW", "RED = enum.auto()\n    NEW = enum.auto()": "RED"}


@pytest.mark.parametrize(("now", "found"), ENUMS.items())
def test_an_enums_member_is_the_one_that_has_its_value_now(site: Deployed, now: str, found: str) -> None:
    """As docs/CODE.md describes it."""
    text = "import enum\nclass C(enum.Enum):\n    {}\ndef hold():\n    value = [*C][0]\n    yield\n    yield value.name\n"
    gen = site.deploy(text.format("RED = enum.auto()")).hold()
    saved = site.asleep(gen)
    site.deploy(text.format(now))
    assert next(site.again(saved)) == found


def test_a_class_that_is_gone_is_found_in_the_stored_version(site: Deployed) -> None:
    """G10: no unit that it waits in has changed, but the object used to be unreadable."""
    gen = site.deploy("class P:\n    pass\ndef hold(p):\n    yield\n    yield type(p).__name__\ndef main():\n    return hold(P())").main()
    saved = site.asleep(gen)
    site.deploy("def hold(p):\n    yield\n    yield type(p).__name__")
    assert next(site.again(saved)) == "P"


def test_a_function_held_by_name_is_code_that_is_held(site: Deployed) -> None:
    """§8.1: when it is called later, it does what it did when it was kept."""
    gen = site.deploy("def undo():\n    return 'old'\ndef main():\n    f = [undo]\n    yield\n    yield f[0]()").main()
    saved = site.asleep(gen)
    site.deploy("def main():\n    f = [undo]\n    yield\n    yield f[0]()\ndef undo():\n    return 'new'")
    assert next(site.again(saved)) == "old"


def test_code_of_two_versions_in_one_graph_stays_apart(site: Deployed) -> None:
    """§8.2: a class that did not change is current, and so is the generator that its method makes in old code."""
    text = "LIMIT = {0}\nclass Loop:\n    def steps(self):\n        while True:\n            yield LIMIT\n"
    text += "def main():\n    inner = Loop().steps()\n    yield\n    yield LIMIT, next(inner)\n    yield LIMIT, next(inner), {0}"
    gen = site.deploy(text.format(1)).main()
    saved = site.asleep(gen)
    site.deploy(text.format(2))
    restored, pins = site.load(saved)
    assert next(restored) == (1, 1)
    fresh = next(iter(registry.modules()[site.name].namespace["Loop"]().steps() for _ in [0]))
    next(fresh)
    graph, held = site.save([restored, fresh], pins)
    assert len(held) == 2
    (old, new), _ = site.load((graph, held))
    assert next(old) == (1, 1, 1)
    assert next(new) == 2
    site.deploy(text.format(3))
    (old, new), _ = site.load((graph, held))
    assert (next(old), next(new)) == ((1, 1, 1), 3), "its unit is unchanged, so it takes the newest"


def test_a_sentinel_is_the_object_of_the_version_that_runs(site: Deployed) -> None:
    """§4.3 with §8.2."""
    text = "MISSING = object()\ndef main():\n    mark = MISSING\n    yield\n    yield mark is MISSING, {}"
    gen = site.deploy(text.format(1)).main()
    saved = site.asleep(gen)
    site.deploy(text.format(2))
    assert next(site.again(saved)) == (True, 1)


def test_a_plain_object_that_is_an_attribute_of_a_class_is_that_attribute_again(site: Deployed) -> None:
    """§4.3: only its identity shows what it is. In old code, for a class that has changed, it is the attribute of the old class."""
    text = "class Options:\n    MISSING = object()\n    limit = {0}\ndef main():\n    mark = Options.MISSING\n    yield\n    yield mark is Options.MISSING, {0}"
    gen = site.deploy(text.format(1)).main()
    saved = site.asleep(gen)
    assert next(site.again(saved)) == (True, 1)
    site.deploy(text.format(2))
    assert next(site.again(saved)) == (True, 1)


def test_a_sentinel_that_several_modules_import_is_that_of_the_module_which_made_it(site: Deployed) -> None:
    """§4.3: what it is does not depend on which module was imported last. A module that merely imports it too does not count as code that is held."""
    made, other = Deployed(), Deployed()
    made.deploy("MISSING = object()\n")
    gen = site.deploy(f"from {made.name} import MISSING as mark\ndef main():\n    held = mark\n    yield\n    yield held is mark").main()
    other.deploy(f"from {made.name} import MISSING\n")
    saved = site.asleep(gen)
    assert saved[1].keys() == {site.name, made.name}
    made.deploy("MISSING = object()\n")
    again = site.save(gen)
    assert again[1].keys() == {site.name}, "it is no longer what that module has"
    assert next(site.again(again))


VALUES = {
    "an enum's member": ("C.RED", "C.BLUE", "C.RED"),
    "a zone, which zoneinfo shares": ("zoneinfo.ZoneInfo('Europe/Berlin')", "zoneinfo.ZoneInfo('America/New_York')", "zoneinfo.ZoneInfo('Europe/Berlin')"),
    "a pattern, which re shares": ("re.compile('a+')", "re.compile('b+')", "re.compile('a+')"),
    "an ellipsis": ("...", "object()", "..."),
    "a number": ("decimal.Decimal('0.19')", "decimal.Decimal('0.25')", "GLOBAL"),
    "a time": ("datetime.timedelta(1)", "datetime.timedelta(2)", "GLOBAL"),
    "a path": ("pathlib.Path('a')", "pathlib.Path('b')", "GLOBAL"),
}


@pytest.mark.parametrize("what", VALUES)
def test_a_value_stays_what_it_was_whatever_a_global_that_was_bound_to_it_is_bound_to_now(site: Deployed, what: str) -> None:
    """§4.3 is for objects with an identity. No name stands for a value, just as none does for a float."""
    before, now, held = VALUES[what]
    head = "import datetime, decimal, enum, pathlib, re, zoneinfo\nclass C(enum.Enum):\n    RED = 1\n    BLUE = 2\n"
    text = head + "GLOBAL = {}\ndef main():\n    held = {}\n    yield held\n    yield held\n"
    gen = site.deploy(text.format(before, held)).main()
    was = next(gen)
    saved = site.save(gen)
    site.deploy(text.format(now, held))
    assert repr(next(site.again(saved))) == repr(was)


def test_a_zone_that_has_no_key_is_saved_as_the_global_that_it_is_bound_to(site: Deployed) -> None:
    """§4.3."""
    head = "import importlib.resources, zoneinfo\nwith importlib.resources.files('tzdata.zoneinfo').joinpath('UTC').open('rb') as file:\n    ZONE = zoneinfo.ZoneInfo.from_file(file)\n"
    gen = site.deploy(head + "def main():\n    zone = ZONE\n    yield\n    yield zone is ZONE\n").main()
    next(gen)
    assert next(site.again(site.save(gen)))


@pytest.mark.parametrize(("name", "remedy"), [("", ""), ("kwflow.flows.later9", "; another version of kwflow wrote it: upgrade all engines, then retry")])
def test_an_exception_while_old_code_loads_names_the_version_and_what_to_do_if_the_code_is_ours(name: str, remedy: str) -> None:
    """§8.4, G10."""
    site = Deployed(name)
    gen = site.deploy("import sys\nif 'broken_now' in sys.modules:\n    raise OSError('not here')\ndef main():\n    yield\n    yield 1").main()
    saved = site.asleep(gen)
    site.deploy("def main():\n    yield")
    sys.modules["broken_now"] = sys
    try:
        with pytest.raises(CodeChangedError, match=f"cannot be loaded: OSError: not here{remedy}$"):
            site.load(saved)
    finally:
        del sys.modules["broken_now"]
    assert next(site.load(saved)[0]) == 1, "tried again"
    other = Deployed(site.name)
    site.deploy("def main():\n    yield 3")
    with pytest.raises(CodeChangedError, match="main has changed .* is not stored"):
        other.load(saved)


def test_old_code_imports_current_modules_and_stored_ones_only_where_they_are_gone(site: Deployed) -> None:
    """§8.4: a helper module that was deleted or renamed is found with the code that needs it."""
    helper = Deployed()
    helper.deploy("def help_():\n    return 'old'")
    gen = site.deploy(f"from {helper.name} import help_\nimport {helper.name} as h\ndef main():\n    yield\n    yield help_(), h.help_()").main()
    saved = site.asleep(gen)
    site.deploy("def main():\n    yield 2")
    del sys.modules[helper.name]
    del registry.modules()[helper.name]  # type: ignore[attr-defined] # as in a process that never had it
    assert next(site.again(saved)) == ("old", "old")
    assert helper.name not in sys.modules
    site.deploy("def main():\n    yield 3")
    assert next(site.again(saved)) == ("old", "old"), "what stood in is stored with it again"
    site.deploy("def main():\n    yield 4")
    helper.deploy("def help_():\n    return 'new'")
    assert next(site.again(saved)) == ("new", "new")


def test_a_module_that_is_gone_is_found_in_the_store(site: Deployed) -> None:
    gen = site.deploy("class P:\n    pass\ndef main():\n    p = P()\n    yield\n    yield p").main()
    saved = site.asleep(gen)
    del sys.modules[site.name]
    del registry.modules()[site.name]  # type: ignore[attr-defined] # as in a process that never had it
    assert type(next(site.again(saved))).__name__ == "P"


def test_a_stored_source_that_was_changed_is_refused(site: Deployed) -> None:
    """The header names it by its sha256, and the header is verified."""
    gen = site.deploy("def main():\n    yield").main()
    saved = site.asleep(gen)
    site.deploy("def main():\n    yield 2")
    site.stored = {key: data.replace(b"yield", b"yield 3") for key, data in site.stored.items()}
    with pytest.raises(CodeChangedError, match="sha256"):
        site.load(saved)


CLASS = "class P:\n    def __init__(self):\n        self.x = 1\n"
MAIN = "def main():\n    p = P()\n    yield\n    yield type(p), p.x\n"


@pytest.mark.parametrize("there", ["from {other} import P", "from {other} import Q as P", "class Q:\n    pass\nP = Q", "import {other}\nP = {other}.Q"])
def test_a_class_that_has_moved_or_was_renamed_is_what_its_old_name_means_now(site: Deployed, there: str) -> None:
    """§8.4: treated as a class that has changed. When it is saved again, its new name is used, so that the old name may be removed then."""
    other = Deployed(f"{site.name}_other")
    gen = site.deploy(CLASS + MAIN).main()
    saved = site.asleep(gen)
    other.deploy("class P:\n    pass\nclass Q:\n    pass")
    module = site.deploy(there.format(other=other.name) + "\n" + MAIN)
    restored, pins = site.load(saved)
    assert not pins
    saved = site.save(restored)
    assert next(restored) == (module.P, 1)
    new = module.P.__qualname__
    site.deploy(f"from {other.name} import P as moved, Q\n" + MAIN if new == "P" else there.format(other=other.name).replace("P = ", "R = ") + "\n" + MAIN)
    assert next(site.load(saved)[0])[0].__qualname__ == new


@pytest.mark.parametrize("there", ["from subprocess import Popen as P", "import os as P", "P = None", "from os import system as P"])
def test_a_class_whose_name_means_something_else_now_is_found_in_the_stored_version(site: Deployed, there: str) -> None:
    """G10, wire.md §3: a name never leads to an object that could not have been named itself."""
    gen = site.deploy(CLASS + MAIN).main()
    saved = site.asleep(gen)
    site.deploy(f"{there}\n{MAIN}")
    cls, x = next(site.again(saved))
    assert (cls.__module__, x) == (f"{site.name}@{saved[1][site.name]['version'][:12]}", 1)


@pytest.mark.parametrize("now", ["None", "'missing'", "[]", "P", "P()"])
def test_what_a_global_is_bound_to_after_a_deployment_is_what_was_saved_as_that_global(site: Deployed, now: str) -> None:
    """§4.3, docs/LOCALS.md."""
    text = "class P:\n    pass\nMISSING = {}\ndef main():\n    mark = MISSING\n    yield\n    yield mark is MISSING\n"
    gen = site.deploy(text.format("object()")).main()
    saved = site.asleep(gen)
    site.deploy(text.format(now))
    restored, pins = site.load(saved)
    assert not pins
    assert next(restored)


@pytest.mark.parametrize("now", ["import os as MISSING", "from os import system as MISSING", "from subprocess import Popen as MISSING"])
def test_a_global_that_is_bound_to_what_no_snapshot_may_name_is_found_in_the_stored_version(site: Deployed, now: str) -> None:
    """wire.md §3."""
    text = "{}\ndef main():\n    mark = MISSING\n    yield\n    yield mark is MISSING, type(mark)\n"
    gen = site.deploy(text.format("MISSING = object()")).main()
    saved = site.asleep(gen)
    site.deploy(text.format(now))
    assert next(site.again(saved)) == (True, object)


@pytest.mark.parametrize(("now", "why"), [
    ("@dataclasses.dataclass(slots=True)\nclass P:\n    x: int = 1", "no attribute '__dict__'"),
    ("class P:\n    def __setstate__(self, state):\n        raise KeyError('y')", "KeyError: 'y'"),
])  # fmt: skip
def test_a_class_that_cannot_take_what_was_saved_is_named_with_the_remedy(site: Deployed, now: str, why: str) -> None:
    """§8.4: the error used to say that the snapshot cannot be read."""
    text = "import dataclasses\n{}\ndef main():\n    p = P()\n    yield\n    yield p\n"
    gen = site.deploy(text.format("@dataclasses.dataclass\nclass P:\n    x: int = 1")).main()
    saved = site.asleep(gen)
    site.deploy(text.format(now))
    with pytest.raises(CodeChangedError, match=rf"changed since it was saved \({site.name}\.P\) .*{why}.*__setstate__"):
        site.load(saved)
