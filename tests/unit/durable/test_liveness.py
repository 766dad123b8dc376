"""Liveness: after which wait is which variable still needed.  `tests/durable/test_dropped_variables.py` runs generators with no more than that."""

import ast
import sys
import textwrap

import corpus_harness as harness
import liveness_harness
import pytest
import random_programs

from kwflow.durable.lower.functions import ModuleLowering
from kwflow.durable.lower.inner import as_def
from kwflow.durable.lower.liveness import needed_after
from kwflow.durable.lower.scopes import analyze
from kwflow.errors import KwflowBug

# name of the case: (body of `def f(a):`, what is needed after each wait)
CASES: dict[str, tuple[str, list[str]]] = {
    "what is read later": ("x = 1\ny = 2\nyield\nreturn x", ["x"]),
    "what is bound again is not": ("x = 1\nyield\nx = 2\nyield\nreturn x", ["", "x"]),
    "the result of the wait is not": ("x = 1\nx = yield\nyield\nreturn x", ["", "x"]),
    "arguments": ("b = a\nyield 1\nyield b", ["b", ""]),
    "operands that were evaluated are not": ("x = y = 1\nz = x + (yield) + y\nreturn z", ["y"]),
    "targets are bound from left to right": ("i = 0\nyield\na[i], i = 1, 2\nyield\ni, a[i] = 1, 2", ["a i", "a"]),
    "a starred and a nested target": ("x = y = z = 0\nyield\nx, (*y, z) = a\nreturn x, y, z", ["a"]),
    "an augmented target is read": ("x = o = 0\nyield\nx += 1\no.n += 1\na[0] += 1", ["x o a"]),
    "an annotated target": ("x = y = 0\nyield\nx: int = 1\ny: x\nreturn x, y", ["y"]),
    "del needs what it deletes": ("x = y = 0\nyield\ndel x, a[y]\nyield\nreturn 1", ["x y a", ""]),
    "import, def and class bind": ("x = os = D = C = 0\nyield\nimport os.path\nfrom os import path as x\ndef D(): pass\nclass C: pass\nreturn os, x, D, C", [""]),
    "raise and assert": ("x = y = z = 0\nyield\nassert x, y\nraise x from z", ["x y z"]),
    "if needs what either branch needs": ("x = y = 0\nyield\nif a:\n  return x\nelse:\n  y = 1\nreturn y", ["a x"]),
    "a constant has one branch": ("x = y = 0\nyield\nif True:\n  x = 1\nelse:\n  y = 1\nif 0:\n  y = 2\nelse:\n  use(a)\nreturn x, y", ["a y"]),
    "one branch binds": ("x = 0\nyield\nif a:\n  x = 1\nreturn x", ["a x"]),
    "both branches bind": ("x = 0\nyield\nif a:\n  x = 1\nelse:\n  x = 2\nreturn x", ["a"]),
    "and, or evaluate the right side perhaps": ("x = y = 0\nyield\na and (x := 1) and (y := 2)\nreturn x, y", ["a x y"]),
    "the left side certainly": ("x = 0\nyield\n(x := a) or x\nreturn x", ["a"]),
    "a conditional expression": ("x = y = 0\nyield\nr = (x := 1) if a else (x := y)\nreturn x", ["a y"]),
    "a chained comparison evaluates two operands certainly": ("x = y = 0\nyield\na < (x := 1) < (y := 2)\nreturn x, y", ["a y"]),
    "a dict goes from key to value": ("x = y = 0\nyield\nreturn {(x := a): x, y: (y := 1)}", ["a y"]),
    "walrus in a call": ("x = y = 0\nyield\nreturn len((x := a), x, y, (y := 1))", ["a y"]),
    "an f-string": ("x = y = 0\nyield\nreturn f'{(x := a)} {x:>{y}}'", ["a y"]),
    "while": ("x = y = 0\nwhile a:\n  yield\n  x = y\n  use(x)\nreturn x", ["a y"]),
    "while needs for the next round what this one binds later": ("x = y = 0\nwhile a:\n  use(x)\n  yield\n  use(y)\n  x = y = 1", ["a y"]),
    "the value of an earlier round": ("x = 0\nwhile a:\n  use(x)\n  yield\n", ["a x"]),
    "while True is left only by break": ("x = 0\nwhile True:\n  yield\n  x = 1\n  if a:\n    break\nreturn x", ["a"]),
    "a loop that may have no round": ("x = 0\nyield\nwhile a:\n  x = 1\nreturn x", ["a x"]),
    "while else": ("x = y = 0\nyield\nwhile a:\n  x = 1\n  break\nelse:\n  x = y\nreturn x", ["a y"]),
    "continue goes to the condition": ("x = y = 0\nwhile x:\n  yield\n  if y:\n    continue\n  x = y", ["x y"]),
    "for binds its variable": ("x = 0\nyield\nfor x in a:\n  use(x)", ["a"]),
    "for may have no round": ("x = 0\nyield\nfor x in a:\n  pass\nreturn x", ["a x"]),
    "a wait in for": ("t = 0\nfor x in a:\n  yield x\n  t += x\nreturn t", ["t x"]),
    "for else": ("x = y = 0\nfor n in a:\n  yield\n  if n:\n    y = 1\n    break\nelse:\n  y = x\nreturn y", ["n x"]),
    "nested loops": ("s = 0\nfor x in a:\n  for y in x:\n    if y:\n      break\n    yield 1\n    s = y\n  else:\n    continue\n  yield 2\n  use(x, s)", ["x y", "s x"]),
    "a binding two loops away": ("x = y = z = 0\nwhile a:\n  while a:\n    use(x)\n    x = y\n    yield\n  y = z\nz = 1", ["a x y z"]),
    "a handler reads what the body would bind": ("x = 0\ntry:\n  yield 1\n  x = 1\nexcept E:\n  return x\nyield 2", ["x", ""]),
    "a value that only a handler does not bind": ("r = 0\ntry:\n  r = yield\nexcept E:\n  pass\nreturn r", ["r"]),
    "a finally binds on every way": ("r = 0\ntry:\n  yield\nfinally:\n  r = 1\nreturn r", [""]),
    "the name of a handler": ("e = 0\nyield\ntry:\n  use(a)\nexcept E as e:\n  use(e)", ["a"]),
    "a wait in a handler": ("x = 0\ntry:\n  use(a)\nexcept E as e:\n  yield\n  use(e)\nreturn x", ["e x"]),
    "try else": ("x = y = 0\nyield\ntry:\n  x = a\nexcept E:\n  x = y\nelse:\n  use(x)\nreturn x", ["a y"]),
    "types of clauses are read in turn": ("E = F = 0\nyield\ntry:\n  a()\nexcept E:\n  pass\nexcept F:\n  pass", ["E F a"]),
    "a bare except catches all": ("x = 0\nyield\ntry:\n  a()\n  x = 1\nexcept:\n  x = 2\nreturn x", ["a"]),
    "finally": ("x = y = 0\ntry:\n  yield\nfinally:\n  use(x)\nreturn y", ["x y"]),
    "finally on the way of an error does not go on": ("r = 0\ntry:\n  r = yield 1\nfinally:\n  yield 2\nreturn r", ["", "r"]),
    "return in finally": ("x = y = 0\ntry:\n  yield\n  x = 1\nfinally:\n  return y\nreturn x", ["y"]),
    "return, break and continue go through finally": ("x = y = 0\nfor n in a:\n  try:\n    yield\n    if n:\n      break\n    return\n  finally:\n    use(x)\nreturn y", ["n x y"]),
    "with may swallow": ("x = 0\nwith a:\n  yield\n  x = 1\nreturn x", ["x"]),
    "with binds": ("m = x = 0\nyield\nwith a as m:\n  x = 1\nreturn m", ["a"]),
    "an inner with that fails is swallowed by the outer one": ("m = x = 0\nyield\nwith a as m, a as x:\n  pass\nreturn x", ["a x"]),
    "match binds what fits": ("x = y = 0\nyield\nmatch a:\n  case [x, *y]:\n    return x, y\n  case {'k': 1, **y}:\n    return x, y", ["a x"]),
    "a guard that fails": ("x = y = 0\nyield\nmatch a:\n  case x if y:\n    pass\nreturn x", ["a y x"]),
    "match with a last case": ("x = y = 0\nyield\nmatch a:\n  case y.K:\n    x = 1\n  case _:\n    x = 2\nreturn x", ["a y"]),
    "a comprehension reads, its variables are its own": ("x = n = 0\nyield\nreturn [n + x for n in a]", ["a x"]),
    "a lambda": ("x = n = 0\nyield\nf = lambda n, m=n: n + m + x\nreturn f", ["n x"]),
    "a nested function reads when it is made": ("x = y = 0\nyield 1\nx = 1\ndef g(y):\n  z = x + y\n  return g, z\nyield 2\nreturn g", ["", "x g"]),
    "a nested function that may have been made before": ("x = 0\ndef g():\n  return x\nyield\nx = 1\nreturn a", ["x a"]),
    "in an earlier round": ("x = 0\nwhile a:\n  yield\n  x = 1\n  a.append(lambda: x)", ["a x"]),
    "a decorator may call what it decorates": ("g = 0\nyield\n@a\ndef g():\n  return g", ["a g"]),
    "what a class binds, its methods do not see": ("x = y = 0\nyield\nclass C:\n  x = 1\n  z = y\n  def m(self):\n    return x", ["x y"]),
    "nonlocal": ("x = 0\ndef g():\n  nonlocal x\n  x = 1\nyield\nreturn g", ["g x"]),
    "a generator expression": ("x = 0\ng = (n + x for n in a)\nyield\nreturn 1", ["x"]),
    "globals are no variables": ("global G\nG = 1\nyield\nreturn G, len", [""]),
    "yield from": ("x = y = 0\nx = yield from a\nreturn x, y", ["y"]),
}  # fmt: skip
if sys.version_info >= (3, 12):
    CASES["a type alias needs what it names when it is made; it cannot be saved"] = ("x = T = 0\nyield 1\ntype T = list[x]\nyield 2\nreturn T", ["x", "T"])


def needed(source: str, path: str = "f") -> list[str]:
    return [" ".join(sorted(names)) for names in liveness_harness.needs_of(source)[path].values()]


@pytest.mark.parametrize("case", CASES)
def test_a_wait_needs_what_may_be_read_before_it_is_bound_again(case: str) -> None:
    body, expected = CASES[case]
    assert needed("def f(a):\n" + textwrap.indent(body, "  ")) == [" ".join(sorted(names.split())) for names in expected]


def test_except_star_may_run_several_handlers() -> None:
    body = "x = y = 0\nyield\ntry:\n  a()\nexcept* E:\n  x = 1\nexcept* F:\n  use(x)\nreturn y"
    assert needed("def f(a):\n" + textwrap.indent(body, "  ")) == ["a x y"]


def test_private_names_are_spelled_as_compiled() -> None:
    source = "class C:\n  def f(self):\n    __x = __y = 1\n    yield\n    __y = 2\n    return __x, __y"
    assert needed(source, "C.f") == ["_C__x"]


def test_super_reads_the_class_and_the_first_argument() -> None:
    """As in semantics §5: under any name, so wherever it is used at all."""
    assert needed("class C:\n  def f(self, a):\n    made = super\n    yield\n    return made().f", "C.f") == ["__class__ made self"]


def test_binding_a_variable_of_an_enclosing_function_needs_it() -> None:
    """Others read it, so what is bound must not be a variable of nobody's."""
    source = "def outer():\n  x = y = 0\n  def f():\n    nonlocal x, y\n    y = 1\n    yield\n    x = 2\n  return f, x, y"
    assert needed(source, "outer.<locals>.f") == ["x"]


def test_functions_made_before_a_wait_count_only_for_the_variables_that_they_may_hold() -> None:
    source = "def f(a):\n  x = y = 0\n  g = lambda: x + y\n  yield\n  return a"
    scopes = analyze(ast.parse(source))
    (node, scope), lowering = next((node, scope) for node, scope in scopes.items() if scope.path == "f"), ModuleLowering("", scopes, 0)
    [wait] = lowering.outline(node, scope).waits.values()
    assert (wait.needed, wait.lent) == ({"a"}, {"x", "y"})


def test_other_functions() -> None:
    """Lambdas that wait, generator expressions, comprehensions that await, async generators, and functions without a wait."""
    source = "async def f(a, b):\n  c = [await x + b for x in a]\n  yield c\n  return\nasync def g(): pass\nh = lambda a, b: ((yield), b)\ni = (x for x in ())"
    assert needed(source, "f.<body>") == ["b", "b"]  # the comprehension, a function that has been made, reads it
    assert needed(source, "f.<locals>.<listcomp>") == [".result b"]
    assert (needed(source, "g"), needed(source, "<lambda>"), needed(source, "<genexpr>")) == ([], ["b"], [""])


def test_a_body_with_another_number_of_waits_is_refused() -> None:
    with pytest.raises(KwflowBug, match="2 labels and 1 waits"):
        needed_after(ast.parse("yield").body, 2)


def lowerings() -> list[tuple[str, str]]:
    made = [(f"seed {seed}", random_programs.Maker(seed).source()) for seed in range(100)]
    return [*((name, harness.source_of(name)) for name in harness.module_names()), *made]


@pytest.mark.slow
def test_waits_are_numbered_in_the_order_of_the_tree_and_temporaries_that_are_needed_are_saved() -> None:
    """Over the corpus and random programs: two analyses, this one and that of the lowering, agree on what a label needs."""
    agreed = 0
    for name, source in lowerings():
        scopes = analyze(ast.parse(source))
        module = ModuleLowering(name, scopes, 0)
        for node, scope in scopes.items():
            if scope.kind != "function" or not scope.generator:
                continue
            lowering, body = module._lower(as_def(node), scope, scope.class_name, cold=False)
            if not lowering.labels:
                continue
            assert stored_before_waits(body) == [*range(1, len(lowering.labels) + 1)], (name, scope.path)
            for label, (names, _) in zip(lowering.labels, needed_after(body, len(lowering.labels)), strict=True):
                temporaries = {one for one in names if one[0] == "@" and " " in one}  # the others are globals of the runtime
                assert temporaries <= set(label.live), (name, scope.path, label)
                agreed += len(temporaries)
    assert agreed > 1000


def stored_before_waits(body: list[ast.stmt]) -> list[int]:
    """The label that was stored last before each wait, in the order of the tree."""
    found, stored = [], 0

    def visit(node: ast.AST) -> None:
        nonlocal stored
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp)):
            return
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            found.append(stored)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "@l" and isinstance(node.value, ast.Constant):
            stored = node.value.value
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in body:
        visit(statement)
    return found
