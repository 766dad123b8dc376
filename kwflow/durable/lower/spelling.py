"""Trees rebuilt for another place: names as the compiler would spell them there, checked where it would no longer check them.

Code that is compiled alone stands neither in its class, so private names have to be mangled, nor in its own frame: the cold twin has the
variables that it shares with closures as free ones, and its state as first argument.  Nothing here knows functions; new nodes are
made, and none is changed.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

from kwflow.durable.lower.emit import call, constant, is_bound, load
from kwflow.durable.lower.nodes import has_yield, node_fields
from kwflow.durable.lower.scopes import Scope, mangle

__all__ = ["Spelling"]

_visitors: dict[type, Any] = {}  # node class -> method of the one subclass, `functions.Rewriter`: looked up once, not for every node


class Spelling:
    """Rebuilds what is inside one scope.

    `mangled` is the class whose private names have to be spelled out, because the code is compiled outside it.
    `lowered` means that the enclosing function is a generator being lowered: its declarations move to its top.  With `cold`,
    zero-argument `super()` gets its arguments, since the first argument of the cold twin is its state.
    """

    def __init__(self, scope: Scope, mangled: str | None, lowered: bool, cold: bool) -> None:
        self.scope = scope
        self.mangled = mangled
        self.lowered = lowered
        self.cold = cold
        self.direct = cold  # inside the frame of the cold twin itself, not in a comprehension, which may be a function

    def visit(self, node: Any) -> Any:
        """Return the lowered form of a node or a list of nodes: the same object if nothing changes."""
        if isinstance(node, ast.AST):
            kind = type(node)
            if kind not in _visitors:
                _visitors[kind] = getattr(type(self), f"visit_{kind.__name__}", Spelling.rebuilt)
            return _visitors[kind](self, node)
        if isinstance(node, list):
            lowered = [self.visit(item) for item in node]
            return node if all(map(operator.is_, lowered, node)) else lowered
        return node

    def rebuilt(self, node: Any, **given: Any) -> Any:
        """Return the node with these fields and with what it holds lowered: the same object if nothing changes."""
        changed = given
        held = node.__dict__
        for name in node_fields(type(node)):
            value = held.get(name)
            if isinstance(value, (ast.AST, list)) and name not in given:
                new = self.visit(value)
                if new is not value:
                    changed[name] = new
        if not changed:
            return node
        fields = {name: changed.get(name, getattr(node, name, None)) for name in node._fields if name in changed or hasattr(node, name)}
        return ast.copy_location(type(node)(**fields), node)

    def name(self, name: str) -> str:
        return mangle(name, self.mangled)

    def arguments(self, args: ast.arguments, bare: bool = False) -> ast.arguments:
        """Return the parameters as this code spells them; with `bare`, without defaults and annotations, for code compiled alone."""

        def one(arg: ast.arg | None) -> ast.arg | None:
            if arg is None:
                return None
            return ast.copy_location(ast.arg(self.name(arg.arg), None if bare else self.visit(arg.annotation)), arg)

        def every(many: list[ast.arg]) -> list[ast.arg]:
            return [found for found in map(one, many) if found is not None]

        defaults = [] if bare else self.visit(args.defaults)
        named = [None] * len(args.kwonlyargs) if bare else self.visit(args.kw_defaults)
        return ast.arguments(every(args.posonlyargs), every(args.args), one(args.vararg), every(args.kwonlyargs), named, one(args.kwarg), defaults)

    def visit_Call(self, node: ast.Call) -> Any:
        if self.cold and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and not node.keywords and self.scope.arguments:
            return ast.copy_location(ast.Call(node.func, [load("__class__"), load(self.scope.arguments[0])], []), node)
        if self.lowered and isinstance(node.func, ast.Name) and node.func.id in ("locals", "vars", "dir") and not node.args and not node.keywords:
            return ast.copy_location(call("looked", self.visit(node.func), node), node)
        return self.rebuilt(node)

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> Any:
        if self.lowered:
            return ast.copy_location(ast.Pass(), node)
        return self.rebuilt(node, names=[self.name(name) for name in node.names])

    visit_Nonlocal = visit_Global

    def visit_Name(self, node: ast.Name) -> Any:
        spelled = self.name(node.id)
        named = node if spelled == node.id else ast.copy_location(ast.Name(spelled, node.ctx), node)
        if self.direct and spelled in self.scope.cells and isinstance(node.ctx, ast.Load):
            return self._own(named)
        return named

    def _own(self, name: ast.Name) -> ast.expr:
        return ast.copy_location(ast.IfExp(is_bound(self.scope, name.id), name, call("unbound", constant(name.id))), name)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        """Check the target as `visit_Name` does, without adding a statement, since paths contain the numbers of statements.

        One that waits is checked when it is lowered.
        """
        rebuilt = self.rebuilt(node)
        target = rebuilt.target
        return self._if_bound(rebuilt, target.id) if self._is_own(target) and not has_yield(node) else rebuilt

    def visit_Delete(self, node: ast.Delete) -> Any:
        rebuilt = self.rebuilt(node)
        if has_yield(node) or not any(map(self._is_own, rebuilt.targets)):
            return rebuilt
        each = [ast.copy_location(ast.Delete([target]), node) for target in rebuilt.targets]
        checked = [self._if_bound(one, target.id) if self._is_own(target) else one for one, target in zip(each, rebuilt.targets, strict=True)]
        return checked[0] if len(checked) == 1 else ast.copy_location(ast.If(constant(True), checked, []), node)

    def _is_own(self, target: ast.expr) -> bool:
        return self.direct and isinstance(target, ast.Name) and target.id in self.scope.cells

    def _if_bound(self, node: ast.stmt, name: str) -> ast.stmt:
        unbound = ast.copy_location(ast.Expr(call("unbound", constant(name))), node)
        return ast.copy_location(ast.If(is_bound(self.scope, name), [node], [unbound]), node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        spelled = self.name(node.attr)
        return self.rebuilt(node) if spelled == node.attr else self.rebuilt(node, attr=spelled)

    def visit_ExceptHandler(self, node: ast.ExceptHandler | ast.MatchAs | ast.MatchStar) -> Any:
        if node.name is None or self.name(node.name) == node.name:
            return self.rebuilt(node)
        return self.rebuilt(node, name=self.name(node.name))

    visit_MatchAs = visit_MatchStar = visit_ExceptHandler

    def visit_match_case(self, node: ast.match_case) -> Any:
        """Leave names in patterns as they are: a pattern can name values, but not compute them."""
        direct, self.direct = self.direct, False
        pattern = self.visit(node.pattern)
        self.direct = direct
        return self.rebuilt(node, pattern=pattern)

    def visit_MatchMapping(self, node: ast.MatchMapping) -> Any:
        return self.rebuilt(node) if node.rest is None else self.rebuilt(node, rest=self.name(node.rest))

    def visit_alias(self, node: ast.alias) -> Any:
        bound = node.asname or node.name
        spelled = self.name(bound)
        return node if spelled == bound else ast.copy_location(ast.alias(node.name, spelled), node)
