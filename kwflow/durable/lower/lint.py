"""Code that is legal Python and almost certainly a mistake: `book("car")` alone on a line runs nothing if `book` is a generator."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable

from kwflow.durable.lower.scopes import Scope
from kwflow.errors import LostCallWarning

__all__ = ["lost_calls", "warn_of"]

Warned = tuple[str, int]


def lost_calls(scopes: dict[ast.AST, Scope]) -> tuple[Warned, ...]:
    """Return a text and a line for each call of a generator function of this module whose result is thrown away (semantics §1.4)."""
    generators = {(scope.parent, node.name): scope for node, scope in scopes.items() if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}

    def means(name: str, scope: Scope | None) -> Scope | None:
        while scope is not None:
            if (scope, name) in generators and scope.kind != "class":
                return generators[scope, name]
            scope = scope.parent
        return None

    found = []
    for scope in scopes.values():
        wait = "await" if scope.coroutine else "yield"
        for name, lineno in scope.bare_calls:
            called = means(name, scope)
            if called is not None and called.generator:
                found.append((f"the result of {name}(...) is discarded, so nothing runs; write `{wait} {name}(...)` or kw.spawn({name}(...))", lineno))
    return tuple(found)


def warn_of(found: Iterable[Warned], filename: str) -> None:
    """Issue these warnings."""
    for text, lineno in found:
        warnings.warn_explicit(text, LostCallWarning, filename, lineno)
