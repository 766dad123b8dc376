"""What is legal Python and almost surely a mistake: `book("car")` alone on a line runs nothing when `book` is a generator."""

from __future__ import annotations

import ast
import warnings

from kwflow.durable.lower.scopes import Scope
from kwflow.errors import LostCallWarning

__all__ = ["warn_lost_calls"]


def warn_lost_calls(tree: ast.Module, scopes: dict[ast.AST, Scope], filename: str) -> None:
    """Warn of each call of a generator function of this module whose result is thrown away (semantics §1.4)."""
    generators = {(scope.parent, node.name): scope for node, scope in scopes.items() if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}

    def means(name: str, scope: Scope | None) -> Scope | None:
        while scope is not None:
            if (scope, name) in generators and scope.kind != "class":
                return generators[scope, name]
            scope = scope.parent
        return None

    stack: list[tuple[ast.AST, Scope]] = [(tree, scopes[tree])]
    while stack:
        node, scope = stack.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            called = means(node.value.func.id, scope)
            if called is not None and called.generator:
                name = node.value.func.id
                wait = "await" if scope.coroutine else "yield"
                warnings.warn_explicit(f"{name}(...) is thrown away: it runs nothing; write `{wait} {name}(...)` or kw.spawn({name}(...))", LostCallWarning, filename, node.lineno)
        inner = scopes.get(node, scope)
        stack += [(child, inner) for child in ast.iter_child_nodes(node)]
