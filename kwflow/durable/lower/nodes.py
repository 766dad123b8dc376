"""Walking trees: which nodes a node holds, which of them run with it, and which of those wait.

Half the time of lowering is spent here, so what is found is kept in the nodes themselves.  Nothing here knows names or scopes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

__all__ = ["COMPREHENSIONS", "Comprehension", "asynchronous", "child_nodes", "defaults", "elements", "every_argument", "has_yield", "node_fields", "own_parts", "produces"]

Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)
_LEAVES = (ast.Name, ast.Constant)
_WAITS = (ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith)


def has_yield(node: ast.AST | None) -> bool:
    """Whether evaluating this node in its own scope can suspend; of nested functions, only defaults, decorators and the like count."""
    if node is None or isinstance(node, _LEAVES):
        return False
    known = getattr(node, "_kw_yields", None)
    if known is None:
        known = isinstance(node, _WAITS)
        if not known:
            for part in own_parts(node):  # not `any(map(...))`: through C, 3.12 nests only some hundred calls, whatever the recursion limit is
                if has_yield(part):
                    known = True
                    break
        node._kw_yields = known  # type: ignore[attr-defined]
    return bool(known)


_NO_NODES = frozenset({"arg", "attr", "conversion", "ctx", "id", "is_lazy", "kind", "level", "module", "name", "op", "ops", "rest", "type_comment"})  # no nodes, or only operators
_fields: dict[type, tuple[str, ...]] = {ast.Constant: ()}
if sys.version_info >= (3, 12):
    _fields[ast.TypeAlias] = ast.TypeAlias._fields  # its name is a node


def node_fields(kind: type[ast.AST]) -> tuple[str, ...]:
    """Return the fields of this class that may hold nodes worth visiting."""
    fields = _fields.get(kind)
    if fields is None:
        fields = _fields[kind] = tuple(name for name in kind._fields if name not in _NO_NODES)
    return fields


def child_nodes(node: ast.AST) -> list[ast.AST]:
    """Return what `ast.iter_child_nodes` yields, without contexts and operators; several times as fast."""
    found: list[ast.AST] = []
    known = node.__dict__
    for name in node_fields(type(node)):
        value = known.get(name)
        if isinstance(value, list):
            found += [item for item in value if isinstance(item, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


def own_parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the child nodes that run in the same scope and activation as the node."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield from node.decorator_list
        yield from defaults(node.args)
        yield from _annotations(node)
    elif isinstance(node, ast.Lambda):
        yield from defaults(node.args)
    elif isinstance(node, ast.ClassDef):
        yield from [*node.decorator_list, *node.bases, *node.keywords]
    elif isinstance(node, (*COMPREHENSIONS, ast.GeneratorExp)):
        yield node.generators[0].iter
    else:
        yield from child_nodes(node)


def elements(node: Comprehension) -> list[ast.expr]:
    """Return the expressions that make one item of a comprehension; `{**m for ...}` has only one, a mapping (PEP 798, 3.15)."""
    if not isinstance(node, ast.DictComp):
        return [node.elt]
    return [node.key] if node.value is None else [node.key, node.value]


def _inner_parts(node: Comprehension) -> Iterator[ast.AST]:
    """Yield what a comprehension evaluates in its own scope: everything but its first iterable."""
    yield from elements(node)
    for number, generator in enumerate(node.generators):
        yield from [generator.iter, *generator.ifs] if number else generator.ifs


def _waits_in_async(node: ast.AST) -> bool:
    """Whether evaluating a node of a tree that is not lowered yet awaits."""
    if isinstance(node, ast.Await) or (isinstance(node, COMPREHENSIONS) and asynchronous(node)):
        return True
    return any(map(_waits_in_async, own_parts(node)))


def asynchronous(node: Comprehension) -> bool:
    """Whether a comprehension awaits: it becomes a coroutine, or with parentheses an async generator."""
    return any(generator.is_async for generator in node.generators) or any(map(_waits_in_async, _inner_parts(node)))


def produces(node: ast.AST) -> bool:
    """Whether it yields in its own scope, as opposed to what it awaits."""
    return isinstance(node, ast.Yield) or any(map(produces, own_parts(node)))


def defaults(args: ast.arguments) -> Iterator[ast.AST]:
    """Yield the defaults of parameters, which run where the function is made."""
    yield from args.defaults
    yield from (default for default in args.kw_defaults if default is not None)


def every_argument(args: ast.arguments) -> list[ast.arg]:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return every + [arg for arg in (args.vararg, args.kwarg) if arg is not None]


def _annotations(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    for arg in every_argument(node.args):
        if arg.annotation is not None:
            yield arg.annotation
    if node.returns is not None:
        yield node.returns
