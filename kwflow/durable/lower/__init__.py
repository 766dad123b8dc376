"""Lowering: source -> a module whose generators can be saved at every yield.  Start reading at `lower_module`.

    nodes.py        walking trees
    scopes.py       which names and cells a function has, and whether it waits
    emit.py         statement lists, labels, temporaries, guards
    expressions.py  hoisting
    protected.py    try, with
    asyncs.py       async for, async with
    statements.py   the rest
    inner.py        functions without a def: lambdas, generator expressions
    liveness.py     which names are still needed after each wait
    spelling.py     names in code that is compiled elsewhere
    functions.py    nested functions, the twins, functions compiled alone
    outline.py      what identifies a wait in another version of the source
    lint.py         calls whose result is thrown away
    upgrade.py      reading what an older lowering wrote
    show.py         lowered code for people

At load, only the module with its hot twins is compiled.  Cold twins, functions compiled alone and hashes of units are made
from the source when they are first needed.  docs/LOWERING.md shows every construct before and after.
"""

from __future__ import annotations
import __future__

import ast
import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, TypeVar

from kwflow.durable.fingerprint import source_version, unit_hash
from kwflow.durable.lower.functions import ModuleLowering
from kwflow.durable.lower.lint import lost_calls, warn_of
from kwflow.durable.lower.nodes import child_nodes
from kwflow.durable.lower.scopes import Scope, analyze
from kwflow.durable.registry import Function, Label, Module, Outline
from kwflow.errors import UnsupportedError

__all__ = ["LOWERING_VERSION", "Lowered", "lower_module", "lowered", "module_of", "units_in"]

LOWERING_VERSION = 1
_DEEP = 5  # with more nested blocks than this, the cold twin is compiled at load: it may exceed CPython's limit of 20
_CALLS_MAX = 8000  # two or three for each level of a tree
_P = ParamSpec("_P")
_T = TypeVar("_T")
_BLOCKS = (ast.For, ast.While, ast.Try, ast.TryStar, ast.With, ast.AsyncFor, ast.AsyncWith, ast.comprehension)
_PLAIN, _MAKER = "plain", "maker"
Facts = tuple[str, str, str, str, bool, bool, str, int, tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]
Warned = tuple[tuple[str, int], ...]
Lowered = tuple[types.CodeType, tuple[Facts, ...], Warned]  # code, facts about each function, warnings: plain data that `marshal` accepts


def lower_module(name: str, source: str | ast.Module, filename: str, bound: frozenset[str] = frozenset()) -> Module:
    """Lower one module.  Top-level classes in `bound` are not created but taken from the runtime (semantics §8.4).

    Raises SyntaxError as the compiler does, UnsupportedError for code that cannot be durable.
    """
    text = source if isinstance(source, str) else ast.unparse(source)
    later = _Later(text, filename, None if isinstance(source, str) else source)
    code, facts, warnings = later.lowered(bound)
    made = _module(name, source_version(text), later, code, lambda: facts, warnings)
    made.whole = isinstance(source, str)
    return made


def lowered(source: str, filename: str) -> Lowered:
    """Return what lowering makes of a source, as plain data that a cache may keep.  Raises what `lower_module` raises."""
    return _Later(source, filename, None).lowered(frozenset())


def module_of(name: str, text: str, version: str, filename: str, code: types.CodeType, facts: Callable[[], tuple[Facts, ...]], warnings: Warned) -> Module:
    """Rebuild a module from its text, its version and the parts of what `lowered` returned; facts are read only when needed.  Its warnings are shown again."""
    return _module(name, version, _Later(text, filename, None), code, facts, warnings)


def _module(name: str, version: str, later: _Later, code: types.CodeType, facts: Callable[[], tuple[Facts, ...]], warnings: Warned) -> Module:
    functions = _Functions(name, version, later, facts)
    warn_of(warnings, later.filename)
    functions.home = Module(name, version, later.filename, later.text, code, functions, _Units(later, functions))
    return functions.home


def units_in(source: str) -> dict[str, str]:
    """Return the hash of each unit of a source; nothing is lowered."""
    later = _Later(source, "<source>", None)
    outermost = {_outermost(scope).path for _, scope in later.nodes.values()}
    return {path: unit_hash(later.nodes[path][0]) for path in outermost}


class _Functions(Mapping[str, Function]):
    """Functions by path, each created when it is first asked for: most are in no snapshot, and creating all of them took a third of a cached import."""

    home: Module

    def __init__(self, name: str, version: str, later: _Later, facts: Callable[[], tuple[Facts, ...]]) -> None:
        self._name = name
        self._version = version
        self._later = later
        self._facts = facts
        self._made: dict[str, Function] = {}

    @functools.cached_property
    def facts(self) -> dict[str, Facts]:
        return {fact[0]: fact for fact in self._facts()}

    def __getitem__(self, path: str) -> Function:
        made = self._made.get(path)
        if made is None:
            made = self._made.setdefault(path, self._function(self.facts[path]))
        return made

    def _function(self, fact: Facts) -> Function:
        path, unit, own_name, qualname, generator, coroutine, how, lineno, arguments, free, captured, labels = fact
        kind, compiled = "generator" if generator else "function", functools.partial(self._later.compile, path)
        where, names, labelled = (lineno, self._later.filename), (arguments, free, captured), tuple(map(Label._make, labels))
        cold, plain, annotated = [functools.partial(compiled, one) for one in ("cold", how, "annotated")]
        outlined = functools.partial(self._later.outline, path)
        made = Function(self._name, self._version, path, unit, own_name, qualname, kind, coroutine, *where, *names, labelled, cold, plain, annotated, outlined)
        made.home = self.home
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)


def _deep(walk: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let trees be walked that the interpreter has compiled, such as a sum of a thousand terms; from 3.11 on, our calls take no space on the C stack."""

    @functools.wraps(walk)
    def deeper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(before, _CALLS_MAX))
        try:
            return walk(*args, **kwargs)
        finally:
            sys.setrecursionlimit(before)

    return deeper


class _Later:
    """The tree and scopes of a module, made when something has to be compiled from them."""

    def __init__(self, text: str, filename: str, tree: ast.Module | None) -> None:
        self.text = text
        self.filename = filename
        self.given = tree

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.fix_missing_locations(self.given) if self.given is not None else ast.parse(self.text, self.filename)

    @functools.cached_property
    @_deep
    def lowering(self) -> ModuleLowering:
        return ModuleLowering(self.filename, analyze(self.tree), _future_flags(self.tree))

    @functools.cached_property
    def nodes(self) -> dict[str, tuple[ast.AST, Scope]]:
        """Function nodes by path; an async generator function has two paths, its own and that of its body."""
        found: dict[str, tuple[ast.AST, Scope]] = {}
        for node, scope in self.lowering.scopes.items():
            if scope.kind == "function":
                found[scope.frame_path] = found[scope.path] = (node, scope)
        return found

    @_deep
    def compile(self, path: str, how: str) -> types.CodeType:
        node, scope = self.nodes[path]
        made: types.CodeType = getattr(self.lowering, how)(node, scope)
        return made

    @_deep
    def outline(self, path: str) -> Outline:
        return self.lowering.outline(*self.nodes[path])

    def lowered(self, bound: frozenset[str]) -> Lowered:
        collecting = gc.isenabled()
        gc.disable()  # everything made here lives until it is done: a collection would find nothing
        try:
            return self._lowered(bound)
        finally:
            if collecting:
                gc.enable()

    def _lowered(self, bound: frozenset[str]) -> Lowered:
        compile(self.tree if self.given is not None else self.text, self.filename, "exec", dont_inherit=True, optimize=0)  # so that the compiler's own errors come first, in its own words
        try:
            lowering = self.lowering
            code = _deep(lambda: lowering.compile(lowering.module(self.tree, bound)))()
            facts = tuple(_facts(lowering))
            for path, *_ in facts:
                node, scope = self.nodes[path]
                if scope.generator and path == scope.frame_path and _depth(node) > _DEEP:
                    lowering.cold(node, scope)
        except RecursionError:
            raise UnsupportedError(f"{self.filename}: code nested too deeply to be made durable") from None
        except SyntaxError as error:
            raise UnsupportedError(f"{self.filename}:{error.lineno}: {error.msg} in the durable version of the code; reduce the nesting") from error
        return code, facts, lost_calls(lowering.scopes)


def _facts(lowering: ModuleLowering) -> Iterator[Facts]:
    for node, scope in lowering.scopes.items():
        if scope.kind != "function" or (scope.generator and scope.frame_path not in lowering.labels):  # a function opted out
            continue
        unit, name = _outermost(scope).path, getattr(node, "name", "") or scope.qualname.rpartition(".")[2]
        lineno, names = getattr(node, "lineno", 0), (scope.arguments, scope.free, scope.captured)
        labels = tuple((label.name, label.live) for label in lowering.labels.get(scope.frame_path, ()))
        coroutine = scope.coroutine and not scope.produces
        yield scope.frame_path, unit, name, scope.qualname, scope.generator, coroutine, _PLAIN, lineno, *names, labels
        if scope.frame_path != scope.path:
            yield scope.path, unit, name, scope.qualname, False, False, _MAKER, lineno, *names, ()


class _Units(Mapping[str, str]):
    """Hashes by unit, each computed when it is asked for: most units are in no snapshot."""

    def __init__(self, later: _Later, functions: _Functions) -> None:
        self._later = later
        self._functions = functions
        self._hashes: dict[str, str] = {}

    @functools.cached_property
    def _names(self) -> dict[str, None]:
        return dict.fromkeys(fact[1] for fact in self._functions.facts.values())

    def __getitem__(self, unit: str) -> str:
        if unit not in self._hashes:
            if unit not in self._names:
                raise KeyError(unit)
            self._hashes[unit] = unit_hash(self._later.nodes[unit][0])
        return self._hashes[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _future_flags(tree: ast.Module) -> int:
    flags = 0
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for alias in node.names:
                flags |= getattr(__future__, alias.name).compiler_flag
    return flags


def _outermost(scope: Scope) -> Scope:
    """Return the outermost function around a scope: the unit whose change pins an instance (semantics §8.1)."""
    found, outer = scope, scope.parent
    while outer is not None:
        if outer.kind == "function":
            found = outer
        outer = outer.parent
    return found


def _depth(node: ast.AST) -> int:
    inner = max((_depth(child) for child in child_nodes(node) if not isinstance(child, ast.expr)), default=0)
    return inner + isinstance(node, _BLOCKS)
