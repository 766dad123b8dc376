"""From the tree of a module to its lowered code: nested functions, the two twins, and single functions compiled alone.

A function is compiled in three ways: in place (hot), alone and cold (to restore a generator), alone and plain (to rebuild a
closure).  "Alone" means inside a factory that makes every captured name a free variable, so that saved cells fit.
"""

from __future__ import annotations
import __future__

import ast
import sys
import types
from typing import Any

from kwflow.durable.fingerprint import without_docstring
from kwflow.durable.lower.emit import assign, call, constant, helper, load, located, store
from kwflow.durable.lower.inner import as_def, forwarded, no_arguments, spread, template
from kwflow.durable.lower.nodes import Comprehension, every_argument
from kwflow.durable.lower.outline import outline
from kwflow.durable.lower.scopes import Scope
from kwflow.durable.lower.spelling import Spelling
from kwflow.durable.lower.statements import Statements
from kwflow.durable.registry import Label, Outline

__all__ = ["ModuleLowering"]


class ModuleLowering:
    """Lowers the functions of one module.  It never changes a tree that it is given."""

    def __init__(self, filename: str, scopes: dict[ast.AST, Scope], flags: int) -> None:
        self.filename = filename
        self.scopes = scopes
        self.flags = flags
        self.constants = {name for node in scopes if isinstance(node, ast.Module) for name in _constants(node)}
        self.labels: dict[str, tuple[Label, ...]] = {}

    def module(self, tree: ast.Module, bound: frozenset[str]) -> ast.Module:
        rewriter = Rewriter(self, self.scopes[tree], None)
        body = [_taken(node) if isinstance(node, ast.ClassDef) and node.name in bound else lowered for node, lowered in [(node, rewriter.visit(node)) for node in tree.body]]
        return located(ast.Module(body, tree.type_ignores))

    def compile(self, tree: ast.Module) -> types.CodeType:
        return compile(tree, self.filename, "exec", flags=self.flags, dont_inherit=True, optimize=0)  # type: ignore[no-any-return]

    # -- one function --------------------------------------------------------------------------------------------
    def hot(self, node: ast.FunctionDef, scope: Scope, mangled: str | None) -> list[ast.stmt]:
        """Return the body of a durable generator in place: it runs from the start and can be captured at every label."""
        body = self._lower(node, scope, mangled, cold=False)[1]
        head: list[ast.stmt] = [*node.body[: len(node.body) - len(without_docstring(node.body))], *self._declarations(scope)]
        begin = next(iter(without_docstring(node.body)), node)  # has the line that a debugger shows first
        lent = sorted(scope.lent - scope.globals - scope.nonlocals)
        if lent:  # bound only in code compiled alone, so this tells the compiler that they are names of this function
            head.append(ast.copy_location(ast.If(constant(False), [assign(name, constant(None)) for name in lent], []), begin))
        if scope.captured:
            head.append(ast.copy_location(assign("@c", cells_of(scope)), begin))
        return [*head, *body]

    def _declarations(self, scope: Scope) -> list[ast.stmt]:
        kinds = ((ast.Global, scope.globals), (ast.Nonlocal, scope.nonlocals))
        return [ast.copy_location(kind(sorted(names)), scope.node) for kind, names in kinds if names]

    def _lower(self, node: ast.FunctionDef, scope: Scope, mangled: str | None, cold: bool) -> tuple[Statements, list[ast.stmt]]:
        rewriter = Rewriter(self, scope, mangled, lowered=True, cold=cold)
        statements = [rewriter.visit(statement) for statement in without_docstring(node.body)]
        lowering = Statements(scope, self.filename, cold, at=node)
        body = lowering.block(statements, "").body
        if not lowering.labels:  # async code that never waits has to be a generator nevertheless
            body = [ast.copy_location(ast.If(constant(False), [ast.Expr(ast.Yield())], []), node), *body]
        if not cold:
            self.labels[scope.frame_path] = tuple(Label(label.name, label.live) for label in lowering.labels)
        return lowering, body

    def live(self, node: ast.GeneratorExp, scope: Scope, mangled: str | None) -> tuple[str, ...]:
        """Return the names of the iterators of a generator expression's loops, outermost first."""
        return self._lower(as_def(node), scope, mangled, cold=False)[0].labels[0].live

    def lines(self, node: ast.AST, scope: Scope) -> dict[str, int]:
        """Return the line of each wait by the name of its label."""
        lowering = self._lower(as_def(node), scope, scope.class_name, cold=False)[0]
        return {label.name: line for label, line in zip(lowering.labels, lowering.lines, strict=True)}

    def outline(self, node: ast.AST, scope: Scope) -> Outline:
        """Return what identifies the function and its waits in another version of the module."""
        return outline(node, scope, *self._lower(as_def(node), scope, scope.class_name, cold=False)) if scope.generator else outline(node, scope)

    def cold(self, node: ast.AST, scope: Scope) -> types.CodeType:
        """Compile the twin that restored generators run, alone."""
        return self._alone(self.cold_def(node, scope), scope, scope.captured, node)

    def cold_def(self, node: ast.AST, scope: Scope) -> ast.FunctionDef:
        definition = as_def(node)
        lowering, body = self._lower(definition, scope, scope.class_name, cold=True)
        captured = set(scope.captured)
        names = [name for name in sorted(scope.bound) if name not in captured and name not in scope.globals]
        saved = [name for name in lowering.temporaries if any(name in label.live for label in lowering.labels)]
        prologue: list[ast.stmt] = [_if_saved(name) for name in [*names, *saved]]
        prologue.append(assign("@c", _saved("@c")))
        prologue.append(ast.Assign([ast.Name("@l", ast.Store()), ast.Name("@r", ast.Store())], _saved("@l")))
        prologue += self._without_state(scope)
        declared: list[ast.stmt] = [ast.Global(sorted(scope.globals))] if scope.globals else []
        if captured:
            declared.append(ast.Nonlocal(list(scope.captured)))
        arguments = ast.arguments([], [ast.arg("@S")], None, [], [], None, [])
        for statement in (*declared, *prologue):
            ast.copy_location(statement, node)
        return ast.FunctionDef(f"@def {definition.name}", arguments, [*declared, *prologue, *body], [], None)

    def _without_state(self, scope: Scope) -> list[ast.stmt]:
        """Return statements that empty the state, whoever holds it.

        If `super` is used, under any name, they also make the first variable of the frame the first argument again.
        """
        if "__class__" not in scope.free or not scope.arguments:
            return [ast.Expr(call("first", load("@S"))), ast.Delete([ast.Name("@S", ast.Del())])]
        name = scope.arguments[0]
        cell = [ast.Subscript(load("@c"), constant(scope.captured.index(name)), ast.Load())] if name in scope.captured else []
        return [assign("@S", call("first", load("@S"), constant(name), *cell))]

    def plain(self, node: ast.AST, scope: Scope) -> types.CodeType:
        """Compile the function as it stands in the module, alone."""
        return self._alone(self.plain_def(node, scope), scope, scope.free, node)

    def plain_def(self, node: ast.AST, scope: Scope) -> ast.FunctionDef | ast.Lambda:
        rewriter = Rewriter(self, scope, scope.class_name)
        if isinstance(node, ast.Lambda) and not scope.generator:
            return ast.Lambda(rewriter.arguments(node.args, bare=True), rewriter.visit(node.body))
        definition = as_def(node)
        body = self.hot(definition, scope, scope.class_name) if scope.generator else [rewriter.visit(statement) for statement in definition.body]
        return ast.FunctionDef(f"@def {definition.name}", rewriter.arguments(definition.args, bare=True), body, [], None)

    def maker(self, node: ast.AST, scope: Scope) -> types.CodeType:
        """Compile the function that creates async generators, alone."""
        if not isinstance(node, ast.AsyncFunctionDef):
            raise TypeError(type(node).__name__)
        arguments = Rewriter(self, scope, scope.class_name).arguments(node.args, bare=True)
        return self._alone(ast.FunctionDef(f"@def {node.name}", arguments, forwarded(node, scope, scope.frame_path), [], None), scope, scope.free, node)

    def annotated(self, node: ast.AST, scope: Scope) -> types.CodeType:
        """Compile code that returns a function with the annotations of this one, except those that use variables of enclosing functions and classes."""
        local, outer = set[str](), scope.parent
        while outer is not None and outer.kind != "module":
            local, outer = local | outer.bound, outer.parent

        def known(annotation: ast.expr | None) -> ast.expr | None:
            if annotation is None or self.flags & __future__.annotations.compiler_flag:
                return annotation
            return None if any(isinstance(one, ast.Name) and one.id in local for one in ast.walk(annotation)) else annotation

        factory: Any = ast.parse("def factory():\n    def annotated(): pass\n    return annotated").body[0]
        made, written = factory.body[0], as_def(node).args
        made.args, made.returns = Rewriter(self, scope, scope.class_name).arguments(written, bare=True), known(getattr(node, "returns", None))
        for argument, at in zip(every_argument(made.args), every_argument(written), strict=True):
            argument.annotation = known(at.annotation)
        return next(const for const in self.compile(located(ast.Module([factory], []))).co_consts if isinstance(const, types.CodeType))

    def _alone(self, inner: Any, scope: Scope, captured: tuple[str, ...], at: ast.AST) -> types.CodeType:
        """Compile code with `captured` as free variables.  `inner` is a lambda, or a def named `@...`, a name that recursive calls do not mean."""
        ast.copy_location(inner, at)
        if decorators := getattr(at, "decorator_list", []):  # never run; but the first line of a function is that of its first decorator
            inner.decorator_list = [ast.copy_location(constant(None), decorators[0])]
        body: list[ast.stmt] = [assign(name, constant(None)) for name in captured]
        body += [ast.Return(inner)] if isinstance(inner, ast.Lambda) else [inner]
        factory = ast.copy_location(ast.FunctionDef("@factory", no_arguments(), body, [], None), at)
        for definition in (factory, inner):
            if "type_params" in definition._fields and not hasattr(definition, "type_params"):
                setattr(definition, "type_params", [])  # noqa: B010
        tree = located(ast.Module([factory], []))
        outer = next(const for const in self.compile(tree).co_consts if isinstance(const, types.CodeType))
        code = next(const for const in outer.co_consts if isinstance(const, types.CodeType))
        name = code.co_name.removeprefix("@def ")
        return _renamed(code.replace(co_name=name), f"@factory.<locals>.{code.co_name}", scope.qualname)


def _constants(tree: ast.Module) -> list[str]:
    """Return the names to which the module's top level assigns a text, bytes or a number: objects that are made again with each restore."""
    made = [(node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value) for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return [target.id for target, value in made if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and type(value.value) in (str, bytes, int, float, complex)]


def _taken(node: ast.ClassDef) -> ast.stmt:
    """Return what replaces a class statement: an assignment of the class that the runtime has for it."""
    return ast.copy_location(assign(node.name, ast.Subscript(helper("bound"), constant(node.name), ast.Load())), node)


def _renamed(code: types.CodeType, inside: str, real: str) -> types.CodeType:
    """Return the code, and the code nested in it, with the qualified names that they have in the author's module."""

    def name(text: str) -> str:
        rest = text[len(inside) :]
        return real + (rest.removeprefix(".<locals>") if real.endswith("<genexpr>") else rest)  # names inside an expression have no <locals>

    def one(const: object) -> object:
        if isinstance(const, types.CodeType):
            return _renamed(const, inside, real)
        if isinstance(const, str) and const.startswith(inside):  # the __qualname__ of a class body
            return name(const)
        return const

    qualname = code.co_qualname  # that of a function declared global does not name the enclosing function
    return code.replace(co_qualname=name(qualname) if qualname.startswith(inside) else qualname, co_consts=tuple(map(one, code.co_consts)))


def cells_of(scope: Scope) -> ast.expr:
    """Return an expression for the cells of the frame, in the order of `captured`."""
    lender = ast.Lambda(no_arguments(), ast.Tuple([load(name) for name in scope.captured], ast.Load()))
    return ast.Attribute(lender, "__closure__", ast.Load())


def _saved(name: str) -> ast.expr:
    return ast.Subscript(load("@S"), constant(name), ast.Load())


def _if_saved(name: str) -> ast.If:
    return ast.If(ast.Compare(constant(name), [ast.In()], [load("@S")]), [assign(name, _saved(name))], [])


class Rewriter(Spelling):
    """Replaces what is inside a function by its lowered form; `module` lowers the functions that it meets there."""

    def __init__(self, module: ModuleLowering, scope: Scope, mangled: str | None, lowered: bool = False, cold: bool = False) -> None:
        super().__init__(scope, mangled, lowered, cold)
        self.module = module
        self.apart = False  # inside a comprehension of the cold twin that has to be a function

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        if _native(node):
            return self.rebuilt(node, body=node.body)
        scope = self.module.scopes[node]
        if scope.generator:
            body = self.module.hot(node, scope, self.mangled)
        else:
            inner = Rewriter(self.module, scope, self.mangled)
            body = [inner.visit(statement) for statement in node.body]
        return self.rebuilt(node, **self._marked(node, "mark", scope, body))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> Any:
        if _native(node):
            return self.rebuilt(node, body=node.body)
        scope = self.module.scopes[node]
        body = self.module.hot(as_def(node), scope, self.mangled)
        if scope.produces:
            docstring = node.body[: len(node.body) - len(without_docstring(node.body))]
            body = [*docstring, *forwarded(node, scope, scope.frame_path)]
        changed = self._marked(node, "mark" if scope.produces else "mark_coroutine", scope, body)
        fields = {name: changed[name] if name in changed else self.visit(getattr(node, name)) for name in node._fields if hasattr(node, name)}
        return ast.copy_location(ast.FunctionDef(**fields), node)

    def _marked(self, node: ast.FunctionDef | ast.AsyncFunctionDef, helper: str, scope: Scope, body: list[ast.stmt]) -> dict[str, Any]:
        mark = ast.copy_location(call(helper, constant(scope.path)), node)
        return {"name": self.name(node.name), "args": self.arguments(node.args), "body": body, "decorator_list": [*self.visit(node.decorator_list), mark]}

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        scope = self.module.scopes[node]
        if scope.generator:
            self.module.hot(as_def(node), scope, self.mangled)  # for its labels, and to refuse at load what cannot be lowered
            lender = template(scope)
            lender.args = self.arguments(node.args)
            return ast.copy_location(call("closure", constant(scope.path), ast.copy_location(lender, node)), node)
        inner = Rewriter(self.module, scope, self.mangled)
        rebuilt = ast.copy_location(ast.Lambda(self.arguments(node.args), inner.visit(node.body)), node)
        return self._named(call("marked", constant(scope.path), rebuilt), node, scope)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> Any:
        """Keep a generator expression as one, but give its iterators names, so that they can be saved; the first one natively has the name `.0`."""
        scope = self.module.scopes[node]
        if scope.coroutine:
            return ast.copy_location(call("async_generator", self._made(node, scope)), node)
        inner = Rewriter(self.module, scope, self.mangled)
        clauses: list[ast.comprehension] = []
        flat = spread(node)
        for name, clause in zip(self.module.live(node, scope, self.mangled), flat.generators, strict=True):
            source = (inner if clauses else self).visit(clause.iter)
            started = ast.copy_location(call("iter", source), clause.iter)
            target, ifs = inner.visit(clause.target), inner.visit(clause.ifs)
            if clauses:
                clauses.append(_binding(name, started))
                clauses.append(ast.comprehension(target, load(name), ifs, 0))
            elif scope.captured:
                clauses.append(ast.comprehension(target, started, [], 0))
                clauses.append(_binding("@c", cells_of(scope), ifs))
            else:
                clauses.append(ast.comprehension(target, started, ifs, 0))
        rebuilt = ast.copy_location(ast.GeneratorExp(inner.visit(flat.elt), clauses), node)
        return self._named(call("generator", constant(scope.path), rebuilt), node, scope)

    def _named(self, made: ast.expr, node: ast.expr, scope: Scope) -> ast.expr:
        ast.copy_location(made, node)
        return ast.copy_location(call("called", constant(scope.qualname), made), node) if self.apart else made

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp) -> Any:
        scope = self.module.scopes[node]
        if scope.kind == "comprehension":
            outermost, self.apart = not self.apart, self.apart or (self.cold and _INLINED and _shadows(scope, set(self.scope.captured)))
            rebuilt = self._in_place(node) if self.direct else self.rebuilt(node)
            made = _function(rebuilt) if self.apart else rebuilt
            self.apart = self.apart and not outermost
            return made
        return ast.copy_location(ast.Await(ast.copy_location(self._made(node, scope), node)), node)

    visit_SetComp = visit_DictComp = visit_ListComp

    def _in_place(self, node: Comprehension) -> Any:
        """Rebuild a comprehension; its first iterable is evaluated in the enclosing frame, and the rest only where the compiler inlines it (PEP 709)."""
        first, *rest = node.generators
        source = self.visit(first.iter)
        self.direct = _INLINED and not self.apart
        rebuilt = self.rebuilt(node, generators=[self.rebuilt(first, iter=source), *self.visit(rest)])
        self.direct = True
        return rebuilt

    def _made(self, node: Comprehension, scope: Scope) -> ast.expr:
        """Return a call of the function that an awaiting comprehension becomes."""
        self.module.hot(as_def(node), scope, self.mangled)
        first = node.generators[0]
        started = ast.copy_location(call("aiter" if first.is_async else "iter", self.visit(first.iter)), first.iter)
        return ast.Call(ast.copy_location(call("closure", constant(scope.path), template(scope)), node), [started], [])

    def visit_Compare(self, node: ast.Compare) -> Any:
        """Have `x is NAME`, where NAME is a text or number of the module, also true for an equal one: a restored value is another object."""
        if len(node.ops) > 1 or not isinstance(node.ops[0], (ast.Is, ast.IsNot)) or not any(map(self._is_constant, (node.left, *node.comparators))):
            return self.rebuilt(node)
        same = ast.copy_location(call("same", self.visit(node.left), self.visit(node.comparators[0])), node)
        return same if isinstance(node.ops[0], ast.Is) else ast.copy_location(ast.UnaryOp(ast.Not(), same), node)

    def _is_constant(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Name) or node.id not in self.module.constants:
            return False
        scope: Scope | None = self.scope
        while scope is not None and scope.kind != "module" and (node.id not in scope.bound or node.id in scope.globals):
            scope = scope.parent
        return scope is None or scope.kind == "module"

    def visit_Yield(self, node: ast.Yield) -> Any:
        if not self.scope.produces:
            return self.rebuilt(node)
        return ast.copy_location(ast.Yield(call("Item", self.visit(node.value) if node.value is not None else constant(None))), node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        inner = Rewriter(self.module, self.module.scopes[node], None)
        body = [inner.visit(statement) for statement in node.body]
        return self.rebuilt(node, name=self.name(node.name), body=body)

_INLINED = sys.version_info >= (3, 12)


def _shadows(scope: Scope, captured: set[str]) -> bool:
    """Whether a comprehension has a cell of its own under a name that is free around it; after inlining it, CPython 3.12 and 3.13 use that cell for both."""
    return not captured.isdisjoint(scope.cells) or any(child.kind == "comprehension" and _shadows(child, captured) for child in scope.children)


def _function(node: ast.ListComp | ast.SetComp | ast.DictComp) -> ast.expr:
    """Return a comprehension in a form that no version of Python inlines."""
    if not isinstance(node, ast.DictComp):
        item = node.elt
    else:
        item = _pairs(node.key) if node.value is None else ast.Tuple([node.key, node.value], ast.Load())
    way = {ast.ListComp: "list", ast.SetComp: "set", ast.DictComp: "dict"}[type(node)]
    return ast.copy_location(call(way, ast.copy_location(ast.GeneratorExp(item, node.generators), node)), node)


def _pairs(mapping: ast.expr) -> ast.expr:
    """Return `*{**mapping}.items()`."""
    items = ast.Attribute(ast.Dict([None], [mapping]), "items", ast.Load())
    return ast.copy_location(ast.Starred(ast.Call(items, [], []), ast.Load()), mapping)


def _binding(name: str, value: ast.expr, ifs: Any = ()) -> ast.comprehension:
    """Return `for name in [value]`, which the compiler turns into an assignment."""
    return ast.comprehension(store(name), ast.List([value], ast.Load()), list(ifs), 0)


def _native(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function is opted out by `@durable.native` or `@native`, or runs outside steps: activities, their batches and feeds."""
    for decorator in node.decorator_list:
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        last = name.attr if isinstance(name, ast.Attribute) else name.id if isinstance(name, ast.Name) else ""
        called = name is not decorator
        if last in ("activity", "batch_of") or (last == "feed" and called) or (last == "native" and not called):
            return True
    return False
