"""Which names a lowered body may still read after each of its waits before it binds them again: classic backward liveness.

Its one rule: the answer is never too small.  Where a path cannot be told, it is taken: an exception may come from any statement
and at any wait, a `with` may swallow it, a loop may have no round, a nested function may be called as soon as it is made.
What looks names up by their text at run time (`locals`, `eval`) is not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from kwflow.durable.lower.nodes import child_nodes
from kwflow.durable.lower.scopes import Scope, analyze
from kwflow.durable.registry import RUNTIME
from kwflow.errors import KwflowBug

__all__ = ["needed_after"]

Names: TypeAlias = frozenset[str]
_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, *([ast.TypeAlias] if hasattr(ast, "TypeAlias") else []))
_WAITS = (ast.Yield, ast.YieldFrom)
_NONE: Names = frozenset()


def needed_after(body: list[ast.stmt], waits: int, outer: Names = _NONE) -> tuple[tuple[Names, Names], ...]:
    """Return, for each wait in order, the names that may be read after it before they are bound again, and those that closures may read.

    `body` is a hot body, in which names are spelled as compiled (mangled); it cannot be compiled afterwards, as `analyze` marks nodes.
    `outer` are variables of enclosing functions: others can see them, so binding one needs it as well.  A closure may read what a
    nested function reads that may have been made before the wait; it matters only if a closure that is saved holds that variable's
    cell.  Raises KwflowBug if the body has another number of waits.
    """
    found = list(_waits(body))
    if len(found) != waits:
        raise KwflowBug(f"a lowered body has {waits} labels and {len(found)} waits")
    walk = _Walk({id(wait): number for number, (wait, _) in enumerate(found)}, outer)
    walk.run(body)
    return tuple((needed, lent) for needed, (_, lent) in zip(walk.needed, found, strict=True))


def _waits(nodes: Iterable[ast.AST], made: set[str] | None = None) -> Iterator[tuple[ast.AST, Names]]:
    """Yield each wait of these nodes, and what the nested functions read that may have been made before it."""
    made = set() if made is None else made
    for node in nodes:
        if isinstance(node, _NESTED):
            made |= _inside(node)[1]
            continue
        if isinstance(node, (ast.For, ast.While)):  # an earlier round has made all that is in it
            made.update(*(_inside(one)[1] for one in _nested(node)))
        yield from _waits(child_nodes(node), made)
        if isinstance(node, _WAITS):
            yield node, frozenset(made)


def _nested(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, _NESTED):
        yield node
    else:
        for child in child_nodes(node):
            yield from _nested(child)


def _inside(node: ast.AST) -> tuple[Names, Names]:
    """Return the names that creating this function, class or comprehension takes from outside, and those that running what is in it takes."""
    root = analyze(ast.Module([node if isinstance(node, ast.stmt) else ast.Expr(node)], []))  # type: ignore[arg-type]
    scope = next(iter(root.values()))
    return frozenset(scope.used), _NONE.union(*map(_free, scope.children))


def _made(node: ast.AST) -> Names:
    """Return what is needed to create it, since it may run at once.  The name of a function itself is bound by then, unless a decorator of the author's runs it."""
    created, run = _inside(node)
    return created | (run - {node.name} if isinstance(node, ast.FunctionDef) and all(map(_is_mark, node.decorator_list)) else run)


def _is_mark(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and _of_runtime(decorator.func) in ("mark", "mark_coroutine")


def _of_runtime(function: ast.expr) -> str:
    """Return the name of a function of the runtime; empty for any other."""
    return function.attr if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == RUNTIME else ""


def _free(scope: Scope) -> Names:
    """Return the names that a nested scope takes from outside; what a class binds is not seen by the functions in it."""
    own = scope.globals | (scope.bound - scope.nonlocals)
    inner = _NONE.union(*map(_free, scope.children))
    inner -= scope.globals | {"__class__"} if scope.kind == "class" else own
    return inner | (scope.used | scope.nonlocals) - own


@dataclass(frozen=True, slots=True)
class _Ways:
    """What is needed where control may go from a statement, other than to the next one."""

    raised: Names = _NONE
    broke: Names = _NONE
    continued: Names = _NONE
    returned: Names = _NONE


class _Walk:
    """Walks a body backwards; each method gets what is needed after a node, and returns what is needed before it."""

    def __init__(self, numbers: dict[int, int], outer: Names) -> None:
        self.numbers = numbers
        self.outer = outer
        self.needed = [_NONE] * len(numbers)
        self.heads: dict[int, Names] = {}  # what is needed before each round of a loop, as far as it is known

    def run(self, body: list[ast.stmt]) -> None:
        """Walk until no loop needs more than was assumed.  What is assumed only grows, and there are only so many names."""
        before = None
        while before != self.heads:
            before = dict(self.heads)
            self.block(body, _NONE, _Ways())

    def block(self, body: list[ast.stmt], after: Names, ways: _Ways) -> Names:
        for node in reversed(body):
            after = self.statement(node, after, ways) | ways.raised
        return after

    def bound(self, name: str, after: Names) -> Names:
        return after | {name} if name in self.outer else after - {name}

    # -- expressions -------------------------------------------------------------------------------------------------
    def every(self, nodes: Iterable[ast.AST | None], after: Names, ways: _Ways) -> Names:
        """Go over nodes that are given in the order in which they are evaluated."""
        for node in reversed([node for node in nodes if node is not None]):
            after = self.expression(node, after, ways)
        return after

    def first_of(self, nodes: list[ast.expr], after: Names, ways: _Ways) -> Names:
        """Go over nodes of which only the first is certain to be evaluated."""
        before = self.expression(nodes[-1], after, ways)
        for node in reversed(nodes[:-1]):
            before = self.expression(node, before | after, ways)
        return before

    def expression(self, node: ast.AST, after: Names, ways: _Ways) -> Names:
        match node:
            case ast.Name():
                return self.bound(node.id, after) if isinstance(node.ctx, ast.Store) else after | {node.id}  # `del` of an unbound name raises, as reading it does
            case ast.NamedExpr():
                return self.expression(node.value, self.bound(node.target.id, after), ways)
            case ast.BoolOp():
                return self.first_of(node.values, after, ways)
            case ast.Compare():
                return self.expression(node.left, self.first_of(node.comparators, after, ways), ways)
            case ast.IfExp():
                return self.expression(node.test, self.expression(node.body, after, ways) | self.expression(node.orelse, after, ways), ways)
            case ast.Dict():
                return self.every((part for pair in zip(node.keys, node.values, strict=True) for part in pair), after, ways)
            case ast.Yield() | ast.YieldFrom():
                after |= ways.raised
                self.needed[self.numbers[id(node)]] |= after
                return self.every([node.value], after, ways)
        return after | _made(node) if isinstance(node, _NESTED) else self.every(child_nodes(node), after, ways)

    # -- statements --------------------------------------------------------------------------------------------------
    def statement(self, node: ast.stmt, after: Names, ways: _Ways) -> Names:
        method: Any = getattr(self, f"statement_{type(node).__name__}", None)
        if method is None:
            raise KwflowBug(f"{type(node).__name__} in a lowered body")
        found: Names = method(node, after, ways)
        return found

    def statement_Expr(self, node: ast.Expr | ast.Delete, after: Names, ways: _Ways) -> Names:
        return self.every(child_nodes(node), after, ways)

    statement_Delete = statement_Pass = statement_Global = statement_Nonlocal = statement_Expr

    def statement_Assign(self, node: ast.Assign, after: Names, ways: _Ways) -> Names:
        return self.every([node.value, *node.targets], after, ways)

    def statement_AugAssign(self, node: ast.AugAssign, after: Names, ways: _Ways) -> Names:
        before = self.expression(node.value, after, ways)
        return before | {node.target.id} if isinstance(node.target, ast.Name) else self.expression(node.target, before, ways)

    def statement_AnnAssign(self, node: ast.AnnAssign, after: Names, ways: _Ways) -> Names:
        """Functions do not evaluate annotations of variables."""
        if node.value is None and isinstance(node.target, ast.Name):
            return after
        return self.every([node.value, node.target], after, ways)

    def statement_TypeAlias(self, node: Any, after: Names, ways: _Ways) -> Names:
        return self.bound(node.name.id, after) | _made(node)

    def statement_Import(self, node: ast.Import | ast.ImportFrom, after: Names, ways: _Ways) -> Names:
        for alias in node.names:
            after = self.bound(alias.asname or alias.name.split(".")[0], after)
        return after

    statement_ImportFrom = statement_Import

    def statement_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef, after: Names, ways: _Ways) -> Names:
        return self.bound(node.name, after) | _made(node)

    statement_ClassDef = statement_FunctionDef

    def statement_Assert(self, node: ast.Assert, after: Names, ways: _Ways) -> Names:
        return self.expression(node.test, after | self.every([node.msg], ways.raised, ways), ways)

    def statement_Raise(self, node: ast.Raise, after: Names, ways: _Ways) -> Names:
        return self.every([node.exc, node.cause], ways.raised, ways)

    def statement_Return(self, node: ast.Return, after: Names, ways: _Ways) -> Names:
        return self.every([node.value], ways.returned, ways)

    def statement_Break(self, node: ast.Break, after: Names, ways: _Ways) -> Names:
        return ways.broke

    def statement_Continue(self, node: ast.Continue, after: Names, ways: _Ways) -> Names:
        return ways.continued

    def statement_If(self, node: ast.If, after: Names, ways: _Ways) -> Names:
        if _is_kept(node.test):  # the cleanup of a `finally`: passed over only if the generator is being forgotten, and then nothing follows
            return self.expression(node.test, self.block(node.body, after, ways), ways)
        if isinstance(node.test, ast.Constant):
            return self.block(node.body if node.test.value else node.orelse, after, ways)
        return self.expression(node.test, self.block(node.body, after, ways) | self.block(node.orelse, after, ways), ways)

    def statement_While(self, node: ast.While, after: Names, ways: _Ways) -> Names:
        head = self.heads.get(id(node), _NONE)
        ended = _NONE if isinstance(node.test, ast.Constant) and node.test.value else self.block(node.orelse, after, ways)
        around = self.block(node.body, head, replace(ways, broke=after, continued=head))
        self.heads[id(node)] = head = head | self.expression(node.test, around | ended, ways) | ways.raised
        return head

    def statement_For(self, node: ast.For, after: Names, ways: _Ways) -> Names:
        head = self.heads.get(id(node), _NONE)
        around = self.block(node.body, head, replace(ways, broke=after, continued=head))
        head |= self.expression(node.target, around, ways) | self.block(node.orelse, after, ways) | ways.raised
        self.heads[id(node)] = head
        return self.expression(node.iter, head, ways)

    def statement_With(self, node: ast.With, after: Names, ways: _Ways) -> Names:
        """Go over a `with`.  Each manager may swallow what is raised after it was entered."""
        inside = replace(ways, raised=ways.raised | after)
        around = self.block(node.body, after, inside)
        for item in reversed(node.items):
            if item.optional_vars is not None:
                around = self.expression(item.optional_vars, around, inside)
                around |= _NONE if isinstance(item.optional_vars, ast.Name) else after  # to unpack what was entered may fail
            around = self.expression(item.context_expr, around, ways) | (after if item is not node.items[0] else _NONE)
        return around

    def statement_Match(self, node: ast.Match, after: Names, ways: _Ways) -> Names:
        """Go over a `match`.  A pattern has bound all its names if it fits; if not, perhaps some."""
        rest = after
        for case in reversed(node.cases):
            certain = isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None and case.guard is None
            fits = self.block(case.body, after, ways)
            if case.guard is not None:
                fits = self.expression(case.guard, fits | rest, ways)
            for name in _captures(case.pattern):
                fits = self.bound(name, fits)
            rest = self.expression(case.pattern, fits if certain else fits | rest, ways)
        return self.expression(node.subject, rest, ways)

    # -- try ---------------------------------------------------------------------------------------------------------
    def statement_Try(self, node: Any, after: Names, ways: _Ways) -> Names:
        if node.finalbody:  # once for each way that leads into it, so that what is bound on one of them does not count for all
            leads = {way: self.block(node.finalbody, way, ways) for way in {after, ways.raised, ways.broke, ways.continued, ways.returned}}
            after, ways = leads[after], _Ways(*(leads[way] for way in (ways.raised, ways.broke, ways.continued, ways.returned)))
        handled = self.handlers(node, after, ways) if node.handlers else ways.raised
        ended = self.block(node.orelse, after, ways)
        return self.block(node.body, ended, replace(ways, raised=handled))

    def statement_TryStar(self, node: Any, after: Names, ways: _Ways) -> Names:
        return self.statement_Try(node, after, ways)

    def handlers(self, node: Any, after: Names, ways: _Ways) -> Names:
        """Return what is needed where an exception reaches the handlers; after one of `except*`, whether it raises or not, come the others."""
        several, rest = not isinstance(node, ast.Try), ways.raised
        for handler in reversed(node.handlers):
            here = self.block(handler.body, after | rest, replace(ways, raised=after | rest)) if several else self.block(handler.body, after, ways)
            if handler.name is not None:
                here = self.bound(handler.name, here)
            rest = here if handler.type is None else self.expression(handler.type, here | rest, ways)
        return rest


def _is_kept(test: ast.expr) -> bool:
    last = test.values[-1] if isinstance(test, ast.BoolOp) else test
    return isinstance(last, ast.Call) and _of_runtime(last.func) == "kept"


def _captures(pattern: ast.pattern) -> Iterator[str]:
    for node in ast.walk(pattern):
        name = node.rest if isinstance(node, ast.MatchMapping) else node.name if isinstance(node, (ast.MatchAs, ast.MatchStar)) else None
        if name is not None:
            yield name
