"""Functions without a def: generator expressions, lambdas that wait, comprehensions that await, bodies of async generators.

Each has a form as a def, `as_def`, which the rest of the lowering works on.  In place, a generator expression stays one, so that
creating it costs nothing; the others are created from code compiled alone (`template` lends its cells).  Nothing here rewrites
what is inside.
"""

from __future__ import annotations

import ast

from kwflow.durable.lower.emit import assign, call, constant, load
from kwflow.durable.lower.nodes import Comprehension, elements
from kwflow.durable.lower.scopes import ITERATOR, RESULT, Scope, mangle

__all__ = ["as_def", "forwarded", "no_arguments", "spread", "template"]

_RESULTS: dict[type, tuple[ast.expr, str, str]] = {  # the empty container, the helper that adds an item, the helper that adds a whole display
    ast.ListComp: (ast.List([], ast.Load()), "append", "extend"),
    ast.SetComp: (call("set"), "add", "update"),
    ast.DictComp: (ast.Dict([], []), "setitem", "merge"),
}
_EACH = "@each"


def no_arguments() -> ast.arguments:
    return ast.arguments([], [], None, [], [], None, [])


def template(scope: Scope) -> ast.Lambda:
    """Return a lambda that closes over the free names of this scope, in the same order."""
    return ast.Lambda(no_arguments(), ast.Tuple([load(name) for name in scope.free], ast.Load()))


def as_def(node: ast.AST) -> ast.FunctionDef:
    """Return the function as a def with the same name, the same parameters and a body of statements."""
    if isinstance(node, ast.FunctionDef):
        return node
    if isinstance(node, ast.AsyncFunctionDef):
        return _def(node, node.name, node.args, node.body)
    if isinstance(node, ast.Lambda):
        return _def(node, "<lambda>", node.args, [ast.copy_location(ast.Return(node.body), node.body)])
    if not isinstance(node, Comprehension):
        raise TypeError(type(node).__name__)
    iterator = ast.arguments([], [ast.arg(ITERATOR)], None, [], [], None, [])
    if isinstance(node, ast.GeneratorExp):
        node = spread(node)
        produced = ast.copy_location(ast.Expr(ast.copy_location(ast.Yield(node.elt), node.elt)), node.elt)
        return _def(node, "<genexpr>", iterator, [_loops(node, produced)])
    empty, adding, adding_all = _RESULTS[type(node)]
    parts = elements(node)
    display = _display(node)
    added = ast.copy_location(ast.Expr(call(adding, load(RESULT), *parts) if display is None else call(adding_all, load(RESULT), display)), parts[0])
    begin = ast.copy_location(assign(RESULT, empty), node)
    end = ast.copy_location(ast.Return(load(RESULT)), node)
    return _def(node, f"<{type(node).__name__.lower()}>", iterator, [begin, _loops(node, added), end])


def spread(node: ast.GeneratorExp) -> ast.GeneratorExp:
    """Return `(*e for ...)` with its star written as one more loop (PEP 798)."""
    if not isinstance(node.elt, ast.Starred):
        return node
    each, name = (ast.copy_location(ast.Name(_EACH, context), node.elt) for context in (ast.Store(), ast.Load()))
    return ast.copy_location(ast.GeneratorExp(name, [*node.generators, ast.comprehension(each, node.elt.value, [], 0)]), node)


def _display(node: ast.ListComp | ast.SetComp | ast.DictComp) -> ast.expr | None:
    """Return what `[*e for ...]`, `{*e for ...}` or `{**e for ...}` adds each time, as a display; None without a star.

    A display raises Python's own error if e is of the wrong type.
    """
    made: ast.expr
    if isinstance(node, ast.DictComp):
        if node.value is not None:
            return None
        made = ast.Dict([None], [node.key])
    elif isinstance(node.elt, ast.Starred):
        made = ast.List([node.elt], ast.Load()) if isinstance(node, ast.ListComp) else ast.Set([node.elt])
    else:
        return None
    return ast.copy_location(made, node)


def _def(node: ast.AST, name: str, arguments: ast.arguments, body: list[ast.stmt]) -> ast.FunctionDef:
    return ast.copy_location(ast.FunctionDef(name, arguments, body, [], None), node)


def _loops(node: Comprehension, innermost: ast.stmt) -> ast.stmt:
    """Return the clauses of a comprehension as nested statements; the first iterable is the argument."""
    statement = innermost
    for number in reversed(range(len(node.generators))):
        clause = node.generators[number]
        for condition in reversed(clause.ifs):
            statement = ast.copy_location(ast.If(condition, [statement], []), condition)
        loop = ast.AsyncFor if clause.is_async else ast.For
        source = clause.iter if number else ast.copy_location(load(ITERATOR), clause.iter)
        statement = ast.copy_location(loop(clause.target, source, [statement], []), clause.target)
    return statement


def forwarded(node: ast.AsyncFunctionDef, scope: Scope, path: str) -> list[ast.stmt]:
    """Return the body of the def that replaces an async generator function: it calls the generator and wraps it."""
    args = node.args

    def spelled(arg: ast.arg) -> str:
        return mangle(arg.arg, scope.class_name)

    positional: list[ast.expr] = [load(spelled(arg)) for arg in [*args.posonlyargs, *args.args]]
    if args.vararg is not None:
        positional.append(ast.Starred(load(spelled(args.vararg)), ast.Load()))
    named = [ast.keyword(spelled(arg), load(spelled(arg))) for arg in args.kwonlyargs]
    if args.kwarg is not None:
        named.append(ast.keyword(None, load(spelled(args.kwarg))))
    made = ast.Call(call("closure", constant(path), template(scope)), positional, named)
    return [ast.copy_location(ast.Return(call("async_generator", made)), node)]


