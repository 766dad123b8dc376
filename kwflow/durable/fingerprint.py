"""Hashes of source that do not change with formatting, comments, docstrings, moved lines and CPython minors.

They are taken over a canonical walk of the AST, without positions and contexts, with constants by `ascii()`, because
`ast.dump`, `ast.unparse` and bytecode all differ between minors.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from kwflow.durable.registry import RUNTIME

__all__ = ["canonical_hash", "class_hashes", "imports_of", "lowered_hash", "source_version", "unit_hash", "without_docstring"]

_POSITIONLESS = frozenset({"ctx", "is_lazy", "kind", "type_comment", "type_ignores"})  # in functions no import is lazy (3.15)
_SKIPPED = _POSITIONLESS | {"returns", "annotation", "type_params"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_TEMPORARY = re.compile(r"(?<=\0id\0str:'@)([a-z-]+) [^']*")  # with its path in the source
_PATH = re.compile(rf"(\0id\0str:'{RUNTIME}'\0\)\0attr\0str:'\w+'\0\)\0args\0\[\0Constant\(\0value\0str:')([^'\0]*)")  # of a function, in a call of the runtime
_NUMBER = re.compile(r"#\d+")  # of a function among those of the same name


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if is_doc else body


def source_version(source: str) -> str:
    """Return the name of a version of a module: the sha256 of its source, 64 hex digits."""
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def canonical_hash(*nodes: ast.AST, annotations: bool = False) -> str:
    """Return 16 hex digits of the hash over the canonical form."""
    digest = hashlib.sha256()
    for node in nodes:
        for token in _tokens(node, _POSITIONLESS if annotations else _SKIPPED):
            digest.update(token.encode())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def lowered_hash(*nodes: ast.AST) -> str:
    """Return the canonical hash of parts of a lowered tree, the same wherever in the function they stand."""
    text = "\0".join(token for node in nodes for token in _tokens(node, _SKIPPED))
    text = _PATH.sub(lambda found: found[1] + _NUMBER.sub("", found[2]), _TEMPORARY.sub(r"\1", text))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unit_hash(node: ast.AST) -> str:
    """Return the hash that pins an instance: over the arguments and body of the outermost def, without docstring, annotations, decorators and defaults."""
    if not isinstance(node, _FUNCTIONS):
        return canonical_hash(node)
    args = node.args
    names: list[ast.AST] = [ast.Name(a.arg) for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if a is not None]
    return canonical_hash(*names, ast.Constant(len(names)), *without_docstring(node.body))


@functools.lru_cache(16)  # whoever loads a stored version looks three times at the classes of it and of the current source
def class_hashes(source: str) -> dict[str, tuple[str, set[str]]]:
    """Return by name of each top-level class its hash and the names that its bases mention.

    The hash includes annotations, since a dataclass is made from them.  Names that are defined twice are left out.
    """
    classes: dict[str, list[ast.ClassDef]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            classes.setdefault(node.name, []).append(node)
    mentioned = {name: {part.id for base in [*found[0].bases, *found[0].keywords] for part in ast.walk(base) if isinstance(part, ast.Name)} for name, found in classes.items()}
    return {name: (canonical_hash(*found, annotations=True), mentioned[name]) for name, found in classes.items() if len(found) == 1}


def imports_of(source: str, package: str, in_functions: bool = False) -> frozenset[str]:
    """Return every module name that the source's import statements may mean, or only those in its functions.  `package` is its `__package__`."""
    return _imports(source, package)[in_functions]


@functools.lru_cache(4096)  # each partition asks this for each module once a day; a library may have six hundred
def _imports(source: str, package: str) -> tuple[frozenset[str], frozenset[str]]:
    statements: list[tuple[bool, ast.stmt]] = []
    todo: list[tuple[bool, ast.stmt]] = [(False, node) for node in ast.parse(source).body]
    while todo:  # no expression holds an import
        within, node = todo.pop()
        statements.append((within, node))
        within = within or isinstance(node, _FUNCTIONS)
        todo += [(within, below) for below in _statements_in(node)]
    return _imported([node for _, node in statements], package), _imported([node for within, node in statements if within], package)


def _statements_in(node: ast.AST) -> list[ast.stmt]:
    held = [one for name in ("body", "orelse", "finalbody", "handlers", "cases") for one in getattr(node, name, ())]
    return [below for one in held for below in ([one] if isinstance(one, ast.stmt) else _statements_in(one))]


def _imported(statements: list[ast.stmt], package: str) -> frozenset[str]:
    found: set[str] = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    parents = {".".join(name.split(".")[:count]) for name in found for count in range(1, name.count(".") + 1)}
    return frozenset(found | parents)


def _tokens(node: object, skipped: frozenset[str]) -> Iterator[str]:
    """Yield the tokens of the canonical form; iterative, so that a long chain of operators does not hit the recursion limit."""
    stack: list[object] = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, ast.AST):
            stack.append(")")
            for name in reversed(item._fields):
                value: Any = getattr(item, name, None)
                if isinstance(item, ast.JoinedStr):  # 3.12 ends a nested format spec with an empty constant
                    value = [part for part in value if not (isinstance(part, ast.Constant) and part.value == "")]
                if name in skipped or value is None or value == []:
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
