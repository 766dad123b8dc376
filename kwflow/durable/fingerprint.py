"""Hashes of source that stay equal over formatting, comments, docstrings, line moves and CPython minors.

A canonical walk of the AST: no positions, no contexts, constants by `ascii()`; `ast.dump`, `ast.unparse` and bytecode
all differ between minors.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from typing import Any

__all__ = ["canonical_hash", "unit_hash", "without_docstring"]

_SKIPPED = {"ctx", "kind", "type_comment", "type_ignores", "returns", "annotation", "type_params"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if is_doc else body


def canonical_hash(*nodes: ast.AST) -> str:
    """16 hex digits over the canonical form."""
    digest = hashlib.sha256()
    for node in nodes:
        for token in _tokens(node):
            digest.update(token.encode())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def unit_hash(node: ast.AST) -> str:
    """What pins an instance: the outermost def's arguments and body, not its docstring, annotations, decorators, defaults."""
    if not isinstance(node, _FUNCTIONS):
        return canonical_hash(node)
    args = node.args
    names: list[ast.AST] = [ast.Name(a.arg) for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if a is not None]
    return canonical_hash(*names, ast.Constant(len(names)), *without_docstring(node.body))


def _tokens(node: object) -> Iterator[str]:
    """Iterative, so that a long chain of operators does not meet the recursion limit."""
    stack: list[object] = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, ast.AST):
            stack.append(")")
            for name in reversed(item._fields):
                value: Any = getattr(item, name, None)
                if name in _SKIPPED or value is None or value == []:
                    if not (name == "value" and isinstance(item, ast.Constant)):
                        continue
                if name == "body" and isinstance(item, (*_FUNCTIONS, ast.ClassDef)):
                    value = without_docstring(value)
                stack += [_Leaf(value) if not isinstance(value, (ast.AST, list)) else value, name]
            yield type(item).__name__ + "("
        elif isinstance(item, list):
            stack.append("]")
            stack.extend(reversed(item))
            yield "["
        elif isinstance(item, _Leaf):
            yield f"{type(item.value).__name__}:{ascii(item.value)}"
        else:
            yield item if isinstance(item, str) else f"{type(item).__name__}:{ascii(item)}"


class _Leaf:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value
