"""Lowering: source -> a module whose generators can be saved at every yield.  Start reading at `lower_module`.

    scopes.py       which names, cells and yields a function has
    emit.py         statement lists, labels, temporaries, guards
    expressions.py  hoisting
    protected.py    try, with
    asyncs.py       async for, async with
    statements.py   the rest
    inner.py        functions without a def: lambdas, generator expressions
    functions.py    nested functions, the twins, functions compiled alone
    lint.py         calls that are thrown away
"""

from __future__ import annotations
import __future__

import ast
import functools
import types
from collections.abc import Callable

from kwflow.durable.fingerprint import source_version, unit_hash
from kwflow.durable.lower.functions import ModuleLowering
from kwflow.durable.lower.lint import warn_lost_calls
from kwflow.durable.lower.scopes import Scope, analyze
from kwflow.durable.registry import Function, Module
from kwflow.errors import UnsupportedError

__all__ = ["LOWERING_VERSION", "lower_module"]

LOWERING_VERSION = 1
_DEEP = 5  # nested blocks from which on the cold twin is compiled at load: it may pass CPython's limit of 20
_BLOCKS = (ast.For, ast.While, ast.Try, ast.TryStar, ast.With, ast.AsyncFor, ast.AsyncWith, ast.comprehension)


def lower_module(name: str, source: str | ast.Module, filename: str, bound: frozenset[str] = frozenset()) -> Module:
    """Lower one module; top-level classes in `bound` are not made but taken from the runtime (semantics §8.4).

    Raises SyntaxError as the compiler does, UnsupportedError for what cannot be durable.
    """
    tree = source if isinstance(source, ast.Module) else ast.parse(source, filename)
    text = source if isinstance(source, str) else ast.unparse(source)
    version = source_version(text)
    compile(tree, filename, "exec", dont_inherit=True, optimize=0)  # the compiler's own errors come first, in its own words
    scopes = analyze(tree)
    warn_lost_calls(tree, scopes, filename)
    lowering = ModuleLowering(name, filename, scopes, _future_flags(tree))
    try:
        code = lowering.compile(lowering.module(tree, bound))
        functions, units = _functions(lowering, scopes, version)
        nodes = {scope.frame_path: node for node, scope in scopes.items() if scope.kind == "function"}
        for function in functions.values():
            if function.kind == "generator" and _depth(nodes[function.path]) > _DEEP:
                function.compile_cold()
    except RecursionError:
        raise UnsupportedError(f"{filename}: code nested too deeply to be made durable") from None
    except SyntaxError as error:
        raise UnsupportedError(f"{filename}:{error.lineno}: {error.msg} once made durable; nest less") from error
    return Module(name, version, filename, text, code, functions, units, whole=isinstance(source, str))


def _future_flags(tree: ast.Module) -> int:
    flags = 0
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for alias in node.names:
                flags |= getattr(__future__, alias.name).compiler_flag
    return flags


def _functions(lowering: ModuleLowering, scopes: dict[ast.AST, Scope], version: str) -> tuple[dict[str, Function], dict[str, str]]:
    functions: dict[str, Function] = {}
    units: dict[str, str] = {}
    for node, scope in scopes.items():
        if scope.kind != "function" or (scope.generator and scope.frame_path not in lowering.labels):  # a function opted out
            continue
        outermost = _outermost(scope)
        unit = outermost.path
        if unit not in units:
            units[unit] = unit_hash(outermost.node)
        kinds: list[tuple[str, bool, Callable[[ast.AST, Scope], types.CodeType]]] = [(scope.frame_path, scope.generator, lowering.plain)]
        if scope.frame_path != scope.path:
            kinds.append((scope.path, False, lowering.maker))
        for path, generator, plain in kinds:
            functions[path] = Function(
                module=lowering.name,
                version=version,
                path=path,
                unit=unit,
                name=getattr(node, "name", "") or scope.qualname.rpartition(".")[2],
                qualname=scope.qualname,
                kind="generator" if generator else "function",
                coroutine=scope.coroutine and not scope.produces,
                lineno=getattr(node, "lineno", 0),
                filename=lowering.filename,
                arguments=scope.arguments,
                free=scope.free,
                captured=scope.captured,
                labels=lowering.labels.get(path, ()),
                compile_cold=functools.partial(lowering.cold, node, scope),
                compile_plain=functools.partial(plain, node, scope),
            )
    return functions, units


def _outermost(scope: Scope) -> Scope:
    """The function that is no other function's inside: the unit whose change pins an instance (semantics §8.1)."""
    found, outer = scope, scope.parent
    while outer is not None:
        if outer.kind == "function":
            found = outer
        outer = outer.parent
    return found


def _depth(node: ast.AST) -> int:
    inner = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, _BLOCKS)
