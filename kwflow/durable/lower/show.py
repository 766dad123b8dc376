"""Lowered code for people: as Python text, with readable names for its temporaries; and where in its source a function waits."""

from __future__ import annotations

import ast
import copy
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kwflow.durable.lower.functions import ModuleLowering
from kwflow.durable.lower.scopes import Scope, analyze
from kwflow.durable.registry import RUNTIME
from kwflow.errors import UsageError

__all__ = ["Shape", "functions_of", "lowered_text", "shapes_of"]

_SPECIAL = {
    RUNTIME: "runtime", "@l": "label_", "@r": "reach_", "@c": "cells_", "@S": "saved_",
    "__@type__": "type", "__@exc_info__": "exc_info", "__@managers__": "known_managers", "__@iter__": "iter", "__@iterators__": "known_iterators", "__@empty__": "empty_cell",
}


def lowered_text(source: str, path: str, filename: str = "<source>", cold: bool = False) -> str:
    """Return what a function of this source is compiled as: the hot twin, or with `cold` the one that restored generators run.

    Raises UsageError for an unknown path, with the known ones, and what `lower_module` raises.
    """
    tree = ast.parse(source, filename)
    scopes = analyze(tree)
    found = {scope.frame_path: (node, scope) for node, scope in scopes.items() if scope.kind == "function"}
    if path not in found:
        raise UsageError(f"{filename} has no function {path!r}; there are: {', '.join(found) or 'none'}")
    node, scope = found[path]
    if cold and not scope.generator:
        raise UsageError(f"{path} is not a generator, so it has no cold twin")
    lowering = ModuleLowering(filename, scopes, 0)
    definition = lowering.cold_def(node, scope) if cold else lowering.plain_def(node, scope)
    return readable(definition)


def functions_of(source: str) -> list[str]:
    """Return the paths that `lowered_text` accepts."""
    return [scope.frame_path for scope in _functions(analyze(ast.parse(source)))]


def _functions(scopes: dict[ast.AST, Scope]) -> list[Scope]:
    return [scope for scope in scopes.values() if scope.kind == "function"]


def readable(tree: ast.AST) -> str:
    """Return the Python text of a tree whose names are not all identifiers."""
    shown = copy.deepcopy(tree)
    for node in ast.walk(shown):
        for field in ("id", "name", "arg"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                setattr(node, field, _name(value))
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            node.names = [_name(name) for name in node.names]
    return ast.unparse(ast.fix_missing_locations(shown))


def _name(name: str) -> str:
    if name in _SPECIAL:
        return _SPECIAL[name]
    name = name.removeprefix("@def ")
    return name if name.isidentifier() else re.sub(r"\W+", "_", name.lstrip("@")).strip("_") + "_"


@dataclass(frozen=True, slots=True)
class Shape:
    """A function in its source: its first and last line, the names of its cells in the order of a snapshot, and the line of each wait by its label."""

    first: int
    last: int
    captured: tuple[str, ...]
    lines: Mapping[str, int]


@functools.lru_cache(maxsize=64)
def shapes_of(source: str) -> Mapping[str, Shape]:
    """Return the shape of every generator of this source by path; nothing is compiled or run.  Raises what `lower_module` raises."""
    scopes = analyze(ast.parse(source))
    lowering = ModuleLowering("<source>", scopes, 0)
    found: dict[str, Shape] = {}
    for node, scope in scopes.items():
        if scope.kind == "function" and scope.generator:
            first = min([getattr(node, "lineno", 1), *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
            found[scope.frame_path] = Shape(first, getattr(node, "end_lineno", first), scope.captured, lowering.lines(node, scope))
    return found
