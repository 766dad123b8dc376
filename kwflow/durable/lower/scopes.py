"""Which names a function binds, shares with nested functions and takes from outside, and whether it waits.

This is our own analysis, not `symtable`: natively, a comprehension is a scope until 3.11 and inlined since 3.12 (PEP 709), and
what a snapshot holds must not depend on the minor that wrote it.  A comprehension that awaits is a function on all minors,
since that is what it is lowered to.  Every question about names is answered here; nothing here changes a tree.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from kwflow.durable.lower.nodes import COMPREHENSIONS, Comprehension, asynchronous, child_nodes, defaults, elements, every_argument, has_yield, own_parts, produces

__all__ = ["ITERATOR", "RESULT", "Scope", "analyze", "mangle"]

ITERATOR = ".iterator"  # the argument of a comprehension that is a function: its first iterable, evaluated outside
RESULT = ".result"  # and the variable for what it has collected so far
_NAMES = {ast.ListComp: "<listcomp>", ast.SetComp: "<setcomp>", ast.DictComp: "<dictcomp>", ast.GeneratorExp: "<genexpr>"}


@dataclass(eq=False)
class Scope:
    """One scope.  `kind` is module, class, function, types (the type parameters of a def or class) or comprehension.

    Generator expressions, and comprehensions that await, are functions.  `coroutine` is true for async code, `produces` for an
    async generator.  `lent` are the scope's own names that only comprehensions in it bind, in code that is compiled alone.
    Invariant, after `analyze`: `free` are the names taken from enclosing functions, `cells` its own names that nested
    functions take; both are sorted, and spelled as in the compiled code (mangled).
    """

    kind: str
    node: ast.AST
    parent: Scope | None
    path: str
    class_name: str | None = None
    generator: bool = False
    coroutine: bool = False
    produces: bool = False
    arguments: tuple[str, ...] = ()
    bound: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    globals: set[str] = field(default_factory=set)
    nonlocals: set[str] = field(default_factory=set)
    lent: set[str] = field(default_factory=set)
    bare_calls: list[tuple[str, int]] = field(default_factory=list)  # name and line of each `name(...)` that is a statement
    children: list[Scope] = field(default_factory=list)
    free: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    siblings: dict[str, int] = field(default_factory=dict)

    @property
    def frame_path(self) -> str:
        """The path of the function whose frames run this scope; an async generator function itself only creates the generators."""
        return f"{self.path}.<body>" if self.produces and isinstance(self.node, ast.AsyncFunctionDef) else self.path

    @property
    def captured(self) -> tuple[str, ...]:
        """The names of all cells in the function's frame, in the order in which they are saved."""
        return tuple(sorted({*self.free, *self.cells}))

    @property
    def qualname(self) -> str:
        return self.path.split("#")[0] if "#" not in self.path else ".".join(part.split("#")[0] for part in self.path.split("."))


def mangle(name: str, class_name: str | None) -> str:
    """Return a private name as the compiler spells it inside that class."""
    if class_name is None or not name.startswith("__") or name.endswith("__") or "." in name:
        return name
    stripped = class_name.lstrip("_")
    return f"_{stripped}{name}" if stripped else name


def analyze(tree: ast.Module) -> dict[ast.AST, Scope]:
    """Return the scope of every module, class, function, lambda and comprehension node."""
    builder = _Builder()
    root = Scope("module", tree, None, "")
    builder.scopes[tree] = root
    for statement in tree.body:
        builder.visit(statement, root)
    _resolve(root)
    return builder.scopes


_visitors: dict[type, Any] = {}  # node class -> method: looked up once, not for every node


class _Builder:
    """Walks the tree once and fills `bound`, `used` and the declarations; names are mangled when they are entered."""

    def __init__(self) -> None:
        self.scopes: dict[ast.AST, Scope] = {}

    def visit(self, node: ast.AST | None, scope: Scope) -> None:
        if node is None:
            return
        kind = type(node)
        node._kw_parsed = True  # type: ignore[attr-defined]
        if kind not in _visitors:
            _visitors[kind] = getattr(_Builder, f"visit_{kind.__name__}", _Builder.visit_children)
        _visitors[kind](self, node, scope)

    def visit_children(self, node: ast.AST, scope: Scope) -> None:
        for child in child_nodes(node):
            self.visit(child, scope)

    def _child(self, kind: str, node: ast.AST, scope: Scope, name: str) -> Scope:
        owner = scope
        while owner.kind in ("comprehension", "types") and owner.parent is not None:
            owner = owner.parent
        number = owner.siblings.get(name, 0) + 1
        owner.siblings[name] = number
        prefix = "" if owner.kind == "module" else f"{owner.path}." if owner.kind == "class" else f"{owner.path}.<locals>."
        path = scope.path if kind == "comprehension" else prefix + (name if number == 1 else f"{name}#{number}")
        child = Scope(kind, node, scope, path, class_name=scope.class_name)
        scope.children.append(child)
        self.scopes[node] = child
        return child

    def bind(self, name: str, scope: Scope) -> None:
        scope.bound.add(mangle(name, scope.class_name))

    def visit_Name(self, node: ast.Name, scope: Scope) -> None:
        name = mangle(node.id, scope.class_name)
        if isinstance(node.ctx, ast.Load):
            scope.used.add(name)
            if name == "super" and scope.kind != "module":
                scope.used.add("__class__")
        else:
            scope.bound.add(name)

    def visit_Expr(self, node: ast.Expr, scope: Scope) -> None:
        if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            scope.bare_calls.append((node.value.func.id, node.lineno))
        self.visit(node.value, scope)

    def visit_NamedExpr(self, node: ast.NamedExpr, scope: Scope) -> None:
        """Bind the target; in a comprehension, its name belongs to the enclosing function."""
        self.visit(node.value, scope)
        name = mangle(node.target.id, scope.class_name)
        inside: list[Scope] = []
        owner = scope
        while isinstance(owner.node, (*COMPREHENSIONS, ast.GeneratorExp)) and owner.parent is not None:
            inside.append(owner)
            owner = owner.parent
        owner.bound.add(name)
        if inside:
            owner.used.add(name)
        for passed in inside:
            passed.used.add(name)
            if passed.coroutine:
                owner.lent.add(name)
            if passed.kind == "function":
                (passed.globals if owner.kind == "module" or name in owner.globals else passed.nonlocals).add(name)

    def visit_Global(self, node: ast.Global, scope: Scope) -> None:
        scope.globals.update(mangle(name, scope.class_name) for name in node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal, scope: Scope) -> None:
        names = {mangle(name, scope.class_name) for name in node.names}
        scope.nonlocals |= names
        scope.used |= names

    def visit_Import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        for alias in node.names:
            if alias.name != "*":
                self.bind(alias.asname or alias.name.split(".")[0], scope)

    visit_ImportFrom = visit_Import

    def visit_ExceptHandler(self, node: ast.ExceptHandler, scope: Scope) -> None:
        self.visit(node.type, scope)
        if node.name:
            self.bind(node.name, scope)
        for statement in node.body:
            self.visit(statement, scope)

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar, scope: Scope) -> None:
        self.visit(getattr(node, "pattern", None), scope)
        if node.name:
            self.bind(node.name, scope)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping, scope: Scope) -> None:
        for child in child_nodes(node):
            self.visit(child, scope)
        if node.rest:
            self.bind(node.rest, scope)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> None:
        for part in own_parts(node):
            self.visit(part, scope)
        self.bind(node.name, scope)
        self._function(node, self._type_parameters(node, scope), node.name, node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef, scope: Scope) -> None:
        self.visit_FunctionDef(node, scope)
        child = self.scopes[node]
        child.generator = child.coroutine = True
        child.produces = any(map(produces, node.body))

    def _type_parameters(self, node: ast.AST, scope: Scope) -> Scope:
        """Return the scope that `def f[T]` puts between a function and its surroundings (PEP 695)."""
        parameters = getattr(node, "type_params", [])
        if not parameters:
            return scope
        child = Scope("types", node, scope, scope.path, class_name=scope.class_name)
        scope.children.append(child)
        for parameter in parameters:
            child.bound.add(mangle(parameter.name, scope.class_name))
        return child

    def visit_Lambda(self, node: ast.Lambda, scope: Scope) -> None:
        for part in defaults(node.args):
            self.visit(part, scope)
        self._function(node, scope, "<lambda>", [node.body])

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, scope: Scope, name: str, body: list[ast.stmt] | list[ast.expr]) -> None:
        child = self._child("function", node, scope, name)
        arguments = [mangle(arg.arg, scope.class_name) for arg in every_argument(node.args)]
        child.arguments = tuple(arguments)
        child.bound.update(arguments)
        for part in body:
            self.visit(part, child)
        child.generator = any(map(has_yield, body))

    def visit_ClassDef(self, node: ast.ClassDef, scope: Scope) -> None:
        for part in own_parts(node):
            self.visit(part, scope)
        self.bind(node.name, scope)
        child = self._child("class", node, self._type_parameters(node, scope), node.name)
        child.class_name = node.name
        for statement in node.body:
            self.visit(statement, child)

    def visit_GeneratorExp(self, node: ast.GeneratorExp, scope: Scope) -> None:
        self._comprehension(node, scope, "function")
        self.scopes[node].produces = self.scopes[node].coroutine

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp, scope: Scope) -> None:
        self._comprehension(node, scope, "function" if asynchronous(node) else "comprehension")

    visit_SetComp = visit_DictComp = visit_ListComp

    def _comprehension(self, node: Comprehension, scope: Scope, kind: str) -> None:
        self.visit(node.generators[0].iter, scope)
        child = self._child(kind, node, scope, _NAMES[type(node)] if kind == "function" else "<comprehension>")
        child.generator = kind == "function"
        child.coroutine = asynchronous(node)
        if child.generator:
            child.bound |= {ITERATOR, RESULT}
        for number, generator in enumerate(node.generators):
            if number:
                self.visit(generator.iter, child)
            self.visit(generator.target, child)
            for condition in generator.ifs:
                self.visit(condition, child)
        for element in elements(node):
            self.visit(element, child)


def _resolve(root: Scope) -> None:
    """Fill `free` and `cells` of every scope: a name taken from outside is a cell in the scope that owns it, and free in all scopes on the way."""
    free: dict[Scope, set[str]] = {}
    cells: dict[Scope, set[str]] = {}
    order = [root]
    for scope in order:
        order.extend(scope.children)
    for scope in order:
        for name in (scope.used | scope.nonlocals) - scope.globals:
            if name in scope.bound and name not in scope.nonlocals:
                continue
            way = _way_out(scope, name)
            if way is None:
                continue
            owner = way.pop()
            real = any(step.kind != "comprehension" for step in way)
            for step in way:
                free.setdefault(step, set()).add(name)
            if real:
                cells.setdefault(owner, set()).add(name)
    for scope in order:
        scope.free = tuple(sorted(free.get(scope, ())))
        scope.cells = tuple(sorted(cells.get(scope, set()) - {"__class__"} if scope.kind == "class" else cells.get(scope, ())))


def _way_out(scope: Scope, name: str) -> list[Scope] | None:
    """Return the scopes from this one to the one that owns the name, which is last; None for globals and builtins."""
    way = [scope]
    outer = scope.parent
    while outer is not None:
        if outer.kind == "class":
            if name == "__class__":
                return [*way, outer]
        elif outer.kind == "module" or name in outer.globals:
            return None
        elif name in outer.bound and name not in outer.nonlocals:
            return [*way, outer]
        way.append(outer)
        outer = outer.parent
    return None
