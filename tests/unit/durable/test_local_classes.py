"""Classes that generated code has made inside a function: refused with the remedy, or, where it is allowed, saved by cloudpickle and bound to this minor."""

import gc
import json
import pathlib
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from kwflow import durable
from kwflow.core import snapshot
from kwflow.durable import rebuild
from kwflow.durable.canonical import canonical_bytes
from kwflow.durable.peek import peek
from kwflow.errors import SnapshotError, UnsavableError
from kwflow.testing import WorkflowTester

SOURCE = '''
import collections
import enum
import kwflow as kw

def main(o):
    class Colour(enum.Enum):
        RED = 1
        def shown(self):
            return self.name.lower()
    Point = collections.namedtuple("Point", "x y")
    Point.__qualname__ = "main.<locals>.Point"
    red, point = Colour.RED, Point(1, 2)
    yield kw.suspend("a")
    return [red is Colour.RED, red.shown(), point == Point(1, 2), point.y]
'''


def test_classes_that_are_made_again_and_again_do_not_stay() -> None:
    """Each call makes its own class, and an engine runs for months."""
    source = """
def main():
    class Failed(Exception):
        pass
    class Row:
        pass
    class Table(dict):
        def __durable_reenter__(self):
            pass
    failed, row, table = Failed(), Row(), Table()
    yield
    return failed, row, table
"""
    module = durable.load_source("makes_classes", source, "makes_classes.py")
    made: weakref.WeakSet[type] = weakref.WeakSet()
    for _ in range(100):
        gen = module.main()
        next(gen)
        durable.dumps(gen)
        with pytest.raises(StopIteration) as stop:
            next(gen)
        made.update(map(type, stop.value.value))
        del gen, stop
    gc.collect()
    assert len(made) < 100


@pytest.fixture
def by_value() -> Iterator[None]:
    durable.allow_classes_by_value(True)
    yield
    durable.allow_classes_by_value(False)


def test_an_enum_made_in_a_function_is_refused_with_the_remedies() -> None:
    module = durable.load_source("refused_enum", "import enum\ndef g():\n    class Colour(enum.Enum):\n        RED = 1\n    yield 1\n    yield Colour\n")
    gen = module.g()
    next(gen)
    with pytest.raises(UnsavableError, match=r"at module level, or allow snapshot_cloudpickle"):
        durable.dumps(gen)


def test_where_it_is_allowed_the_class_is_saved_and_the_header_names_the_minor() -> None:
    """The header alone shows that only this minor can go on."""
    tester = WorkflowTester(durable.load_source("coloured", SOURCE).main)
    durable.allow_classes_by_value(True)  # as `snapshot_cloudpickle` does for an engine
    try:
        tester.start("w")
        assert (tester.header("w") or {})["minor"] == rebuild.MINOR
        tester.resume("w", "a")
        assert tester.result("w") == [True, "red", True, 2]
    finally:
        durable.allow_classes_by_value(False)


@pytest.mark.usefixtures("by_value")
def test_another_minor_is_refused_by_name_before_anything_is_unpickled() -> None:
    """G7."""
    tester = WorkflowTester(durable.load_source("coloured", SOURCE).main)
    durable.allow_classes_by_value(True)
    tester.start("w")
    stored = tester.state.get(b"w")
    assert stored is not None
    header, _ = snapshot.split(stored)
    with pytest.raises(SnapshotError, match=r"code of Python 3\.7"):
        snapshot.wake({**header, "minor": "3.7"}, b"never read")


@pytest.mark.usefixtures("by_value")
def test_objects_of_classes_that_no_import_finds_are_shown() -> None:
    """Semantics §4.4: `show --locals` used to mistake a snapshot that holds one for a damaged one."""
    source = """
import dataclasses
import enum
def main():
    @dataclasses.dataclass
    class Row:
        x: int
    class Colour(enum.Enum):
        RED = 1
    row, red = Row(3), Colour.RED
    yield
    return row, red
"""
    waiting = durable.load_source("shown_classes", source, "shown_classes.py").main()
    next(waiting)
    body = durable.dumps(waiting)
    [(_, shown)] = peek(body)
    assert {name: repr(shown[name]) for name in ("row", "red")} == {"row": "<Row {'x': 3}>", "red": "<class_by_value 1>"}
    assert "Row" in canonical_bytes(body)


@pytest.mark.usefixtures("by_value")
def test_such_a_snapshot_goes_on_in_another_process_and_is_refused_where_it_is_not_allowed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "coloured.py").write_text(SOURCE.replace("kw.suspend('a')", "1").replace('kw.suspend("a")', "1"))
    module = durable.load_source("coloured", (tmp_path / "coloured.py").read_text())
    gen = module.main(None)
    next(gen)
    (tmp_path / "bytes").write_bytes(durable.dumps(gen))
    script = "import sys, json\nfrom kwflow import durable\ndurable.allow_classes_by_value(sys.argv[1] == 'yes')\ndurable.install(['coloured'])\nimport coloured\n" + (
        "try:\n    next(durable.loads(open('bytes', 'rb').read()))\nexcept StopIteration as end:\n    print(json.dumps(end.value))\nexcept Exception as error:\n    print(json.dumps(str(error)))"
    )
    said = [json.loads(subprocess.run([sys.executable, "-c", script, how], cwd=tmp_path, capture_output=True, text=True, check=True).stdout) for how in ("yes", "no")]
    assert said[0] == [True, "red", True, 2]
    assert "snapshot_cloudpickle does not allow here" in said[1]
