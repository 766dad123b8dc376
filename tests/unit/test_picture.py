"""An instance as a picture, from bytes alone: its stacks, what they wait for, and the lines where they wait (semantics §4.1, §4.4)."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import sys
from typing import Any

import pytest

from kwflow import durable
from kwflow.core import snapshot
from kwflow.core.picture import Node, Picture, picture_of
from kwflow.durable.lower.show import shapes_of
from kwflow.durable.peek import Shown
from kwflow.durable.stubs import graph
from kwflow.errors import CorruptSnapshotError
from kwflow.testing import WorkflowTester

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = '''
import kwflow as kw

class Order:
    def __init__(self, items):
        self.items = items
        self.me = self

def ask(question):
    undo = [lambda: question]
    answer = kw.suspend()
    return (yield answer)

def deep(depth):
    if depth:
        return (yield from deep(depth - 1))
    return (yield kw.race([kw.sleep(100), ask("deep")]))

async def numbers(count):
    for number in range(count):
        yield number
        await kw.wait_signal("next")

async def paid(count):
    async for number in numbers(count):
        await kw.shield(kw.wait_signal("paid"))

def inner(order):
    return (yield paid(3))

def main(opts):
    order = Order([1, 2])
    kw.spawn(ask("beside"))
    yield kw.timeout(
        kw.all({"a": ask("budget"), "b": deep(2), "c": inner(order)}),
        86400,
    )
'''


def drawn(source: str = SOURCE, opts: Any = 1, **resumed: Any) -> Picture:
    tester = WorkflowTester(durable.load_source("drawn", source).main)
    tester.start("w", opts)
    for ref, value in resumed.items():
        tester.resume("w", ref, value)
    return picture_of(snapshot.split(tester.state.get(b"w") or b"")[1])


def line(node: Node) -> str:
    at = ""
    if node.frame is not None:
        at = f":{shapes_of(SOURCE)[node.frame.path].lines.get(node.frame.label or '')}"
    return f"{'  ' * node.depth}{f'{node.key}: ' if node.key else ''}{node.kind} {node.name}{at} {node.ref}".rstrip()


def test_the_whole_stack_is_told_from_the_outermost_generator_to_what_the_innermost_wait_for() -> None:
    """Tasks of combinators are below them; `yield` and `yield from` continue the same stack; what runs beside comes last."""
    picture = drawn()
    assert picture.whole and "\n".join(map(line, picture.nodes)) == (
        """
task main 1
  frame main:34
  timeout
    0: all
      a: task ask 3
        frame ask:12
        suspension  0:2
      b: task deep 4
        frame deep:16
        frame deep:16
        frame deep:17
        race
          0: timer  0:3
          1: task ask 5
            frame ask:12
            suspension  0:4
      c: task inner 6
        frame inner:29
        frame paid:26
        shield
          0: signal paid 0:5
    1: timer  0:6
task ask 2
  frame ask:12
  suspension  0:1
""".strip()
    )
    assert [frame.function for frame in picture.held] == ["numbers"]


def test_the_line_of_the_innermost_generator_is_what_the_header_says_of_its_wait() -> None:
    """The header has the line from the running frame, the picture has it from the source."""
    tester = WorkflowTester(durable.load_source("drawn", SOURCE).main)
    tester.start("w", 1)
    header = tester.header("w")
    nodes = drawn().nodes
    for before, node in itertools.pairwise(nodes):
        if node.kind == "suspension" and before.frame is not None:
            [wait] = [wait for wait in header["waits"] if wait["ref"] == node.ref]
            assert shapes_of(SOURCE)[before.frame.path].lines[before.frame.label or ""] == wait["line"]


def test_variables_are_told_by_name_those_that_inner_functions_share_too() -> None:
    picture = drawn()
    found = next(node.frame for node in picture.nodes if node.frame is not None and node.frame.function == "ask")
    assert shapes_of(SOURCE)["ask"].captured == ("question",)
    assert [picture.shown.text(value, 100) for value in found.cells] == ["'budget'"]
    assert {name: picture.shown.text(value, 100) for name, value in found.variables.items()} == {"undo": "[<function ask.<locals>.<lambda>>]", "answer": "<suspension 0:2 pending>"}


def test_what_was_settled_is_told_with_its_value_and_not_gone_into() -> None:
    picture = drawn(**{"0:2": {"yes": True}})
    done = next(node for node in picture.nodes if node.key == "a")
    assert (done.state, picture.shown.text(done.value, 100)) == ("ok", "{'yes': True}")


@pytest.mark.parametrize("depth", [150, 300])
def test_a_picture_has_its_limit_and_says_so(depth: int) -> None:
    picture = drawn(SOURCE.replace("deep(2)", "deep(opts)"), depth)
    assert (picture.whole, len(picture.nodes) <= 200) == (depth < 190, True)


def test_what_holds_itself_nests_or_is_long_is_cut_off() -> None:
    """A snapshot may hold what a page or a terminal could not."""
    source = """
import kwflow as kw
class Node: pass
def main(opts):
    me = Node()
    me.other = Node()
    me.other.other = me
    many = []
    for _ in range(60):
        many = [many, many, many]
    number, text = 10 ** 6000, "x" * 100_000
    numbers, cut = range(10 ** 6000), slice(many, me)
    yield kw.suspend("r")
"""
    picture = drawn(source)
    [frame] = [node.frame for node in picture.nodes if node.frame is not None]
    told = {name: picture.shown.text(value, 60) for name, value in frame.variables.items()}
    assert told["me"] == "drawn.Node(other=drawn.Node(other=…))"
    assert told["number"] == "<int of 19932 bits>" and told["text"] == "'" + "x" * 59 + "…"
    assert told["numbers"] == "<range of large numbers>"
    assert len(told["many"]) <= 61 and told["many"].startswith("[[[[") and told["cut"].startswith("slice([[[[") and len(told["cut"]) <= 61


def test_a_combinator_may_have_any_keys() -> None:
    """They are shown as other values are. An object that holds itself, or a number with thousands of digits, used to end the process that looked at it."""
    picture = drawn("""
import kwflow as kw
class Key: pass
def main(opts):
    me = Key()
    me.me = me
    yield kw.all({me: kw.suspend("a"), 10 ** 6000: kw.suspend("b"), ("x", 1): kw.suspend("c")})
""")
    assert [node.key for node in picture.nodes if node.kind == "suspension"] == ["drawn.Key(me=…)", "<int of 19932 bits>", "('x', 1)"]


def test_values_are_told_as_a_person_reads_them() -> None:
    source = """
import datetime, kwflow as kw
def main(opts):
    at, error, one, none = datetime.date(2026, 1, 31), KeyError("k"), (1,), {"a": [None, {2}]}
    yield kw.suspend("r")
"""
    picture = drawn(source)
    told = {name: picture.shown.text(value, 100) for node in picture.nodes if node.frame is not None for name, value in node.frame.variables.items()}
    assert told == {"opts": "1", "at": "2026-01-31", "error": "KeyError('k',)", "one": "(1,)", "none": "{'a': [None, {2}]}"}


def test_bytes_that_hold_no_instance_are_refused_by_name() -> None:
    body = durable.dumps({"main": 3, "tasks": {}})
    with pytest.raises(CorruptSnapshotError, match="not an instance"):
        picture_of(body)
    with pytest.raises(CorruptSnapshotError):
        picture_of(b"\2no pickle")
    assert Shown(graph(durable.dumps([sys.maxsize]))[1]).text([1], 100) == "[1]"


def test_a_source_tells_the_line_of_every_wait_and_where_each_function_begins_and_ends() -> None:
    """The line is that of the wait itself, as a traceback has it. Nothing is compiled or run."""
    shapes = shapes_of("import nowhere\n@nowhere.decorated\nasync def main(o):\n    async with o as p:\n        x = [1,\n            await p]\n    raise SystemExit\n")
    assert (shapes["main"].first, shapes["main"].last) == (2, 7)
    assert {4, 6} == set(shapes["main"].lines.values())


def test_every_wait_of_what_cpython_s_tests_and_ours_have_has_a_line_of_its_function() -> None:
    counted = 0
    for path in [*sorted((ROOT / "tests/durable/corpus").rglob("*.py")), *sorted((ROOT / "kwflow/flows").glob("*.py"))]:
        with contextlib.suppress(SyntaxError):  # it needs a later Python
            for shape in shapes_of(path.read_text(encoding="utf-8")).values():
                assert all(shape.first <= line <= shape.last for line in shape.lines.values()), path
                counted += len(shape.lines)
    assert counted > 500
