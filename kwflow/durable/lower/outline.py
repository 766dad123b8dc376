"""What identifies each wait of a function in another version of its source, and what it takes to continue there.

`durable/moves.py` compares the outlines of two versions.  Nothing here compiles or changes a tree.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence

from kwflow.durable.fingerprint import lowered_hash, unit_hash
from kwflow.durable.lower.emit import Emitter
from kwflow.durable.lower.liveness import needed_after
from kwflow.durable.lower.nodes import child_nodes
from kwflow.durable.lower.scopes import Scope
from kwflow.durable.registry import RUNTIME, Outline, Part, Wait

__all__ = ["LOOPS", "NUMBER", "outline"]

LOOPS = ("async-iterator", "for-iterator")  # temporaries whose statements may change in one of two parts: what a loop goes over, or its variable
NUMBER = "number"  # what an argument is that looks like one, and so is nothing to wait for
_TEXT_MAX = 80
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_COMPOUND = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.TryStar, ast.Match, ast.AsyncFor, ast.AsyncWith, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_FREE = frozenset({"delegate", "manager", "open", "while"})  # temporaries whose statements may change: what they hold goes on


def outline(node: ast.AST, scope: Scope, lowering: Emitter | None = None, body: list[ast.stmt] | None = None) -> Outline:
    """Return the outline of a function: of a generator from what has lowered it, and its hot body."""
    owner = _class_in_function(scope)
    owners = {name: _owner(scope, name) for name in scope.captured}
    waits = _waits(scope, lowering, body or []) if lowering is not None and lowering.labels else {}
    return Outline(unit_hash(owner or node), owner is not None or not hasattr(node, "name"), _parameters(node), owners, waits)


def _waits(scope: Scope, lowering: Emitter, body: list[ast.stmt]) -> dict[str, Wait]:
    own = (scope.bound - scope.globals).union(scope.captured)
    read = {"__class__", *scope.arguments[:1]} if "__class__" in scope.free else set()  # by `super()`, under any name
    waits: dict[str, Wait] = {}
    needs = needed_after(body, len(lowering.labels), frozenset(scope.free))
    for label, line, wait, (needed, lent) in zip(lowering.labels, lowering.lines, lowering.waits, needs, strict=True):
        path, key = label.name.rpartition(" ")[0], lowered_hash(wait)
        state = tuple(_held(name, lowering.places) for name in label.live)
        around = _around(path, lowering.places) + key
        whole = around + lowered_hash(*_header(lowering.places[path]))
        waits[label.name] = Wait(line, _text(wait), key, around, whole, _call(wait), _part(getattr(wait, "value", None)), label.live, state, (needed | read) & own, lent & {*scope.captured})
    return waits


def _class_in_function(scope: Scope) -> ast.AST | None:
    """Return the outermost class between this function and the function around it."""
    found, outer = None, scope.parent
    while outer is not None and outer.kind != "module":
        if outer.kind == "function":
            return found
        if outer.kind == "class":
            found = outer.node
        outer = outer.parent
    return None


def _owner(scope: Scope, name: str) -> str:
    """Return the function that a captured variable belongs to; empty if that is this one."""
    outer: Scope | None = scope
    while outer is not None and name not in outer.cells:
        outer = outer.parent
    return "" if outer is scope else outer.qualname if outer is not None else "the class"


def _parameters(node: ast.AST) -> tuple[str, ...]:
    """Return the names of the parameters, each with how it is given."""
    args = getattr(node, "args", None)
    if not isinstance(args, ast.arguments):
        return ()
    ways = (("/", args.posonlyargs), ("", args.args), ("*", [args.vararg]), ("=", args.kwonlyargs), ("**", [args.kwarg]))
    return tuple(way + one.arg for way, some in ways for one in some if one is not None)


def _around(path: str, places: dict[str, ast.stmt]) -> str:
    """Describe the statements that a path leads through: the kind and the header of each, and the block in it."""
    found = ""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        node, block = places[".".join(parts[:depth])], parts[depth].rstrip("0123456789")
        found += f"{type(node).__name__} {lowered_hash(*_header(node))} {_block(node, block)} "
    return found + (lowered_hash(*_header(places[path])) if isinstance(places[path], ast.AsyncWith) else "")  # nothing else tells which of several is entered


def _block(node: ast.stmt, block: str) -> str:
    """Name a block of a statement; handlers and cases by what they catch, not by their number."""
    if block.startswith("except") and isinstance(node, (ast.Try, ast.TryStar)):
        handler = node.handlers[int(block[len("except") : -1])]
        return f"except {lowered_hash(*(part for part in (handler.type,) if part is not None))} {handler.name}"
    if block.startswith("case") and isinstance(node, ast.Match):
        case = node.cases[int(block[len("case") : -1])]
        return f"case {lowered_hash(case.pattern, *([case.guard] if case.guard is not None else []))}"
    return block


def _header(node: ast.stmt) -> list[ast.AST]:
    """Return the parts of a statement that are not blocks; of a match also its patterns and guards."""
    if not isinstance(node, _COMPOUND):
        return [node]
    parts: list[ast.AST] = []
    for name in node._fields:
        value = getattr(node, name, None)
        if name not in _BLOCKS:
            parts += [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST)]
    for case in getattr(node, "cases", ()):
        parts += [case.pattern, *([case.guard] if case.guard is not None else [])]
    return parts


def _held(name: str, places: dict[str, ast.stmt]) -> tuple[str, str]:
    """Return the role of a temporary, and the hash of what its value depends on, if that must not change."""
    role, _, rest = name[1:].partition(" ")
    if role in _FREE:
        return role, ""
    node = places[rest.partition(" ")[0]]
    if role == "handled":  # by the author, or by an `async with` that nothing else can leave: this one does not note that it is being left
        return role, "async with" if isinstance(node, ast.AsyncWith) else ""
    if role in LOOPS and isinstance(node, (ast.For, ast.AsyncFor)):
        return role, f"{lowered_hash(node.target)} {lowered_hash(node.iter)}"
    if role.startswith("completion"):
        entered = ast.Module([*node.body, *node.handlers, *node.orelse], []) if isinstance(node, (ast.Try, ast.TryStar)) else node  # type: ignore[list-item]
        return role, " ".join(sorted({type(way).__name__ for way in _leaving(entered)}))
    return role, lowered_hash(*_header(node))


def _leaving(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield each `break` and `continue` in this statement that leaves it."""
    for child in child_nodes(node):
        if isinstance(child, (ast.Break, ast.Continue)):
            yield child
        elif isinstance(child, (ast.For, ast.While, ast.AsyncFor)):
            for statement in child.orelse:
                yield from _leaving(ast.Module([statement], []))
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)) and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _leaving(child)


def _call(wait: ast.AST) -> str:
    """Identify the function that the wait calls for what it waits for, and the texts among its arguments, which are often names; empty if it calls none."""
    operand = getattr(wait, "value", None)
    if not isinstance(operand, ast.Call):
        return ""
    return f"{type(wait).__name__} {lowered_hash(operand.func)} {[text for part in (*operand.args, *operand.keywords) for text in _texts(part)]}"


def _part(node: ast.AST | None) -> Part:
    """Describe an expression: a call by its function and its arguments, a list and the like by their items, anything else as a whole."""
    if isinstance(node, ast.Call) and not _is_ours(node):
        given = [(one.arg or f"** {number}", one.value) for number, one in enumerate(node.keywords)]
        return Part(f"call {lowered_hash(node.func)}", _parts([*((str(number), one) for number, one in enumerate(node.args)), *given], NUMBER))
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return Part(f"{type(node).__name__} {len(node.elts)}", _parts([(str(number), one) for number, one in enumerate(node.elts)]))
    if isinstance(node, ast.Dict):
        keys = lowered_hash(*(key if key is not None else ast.Constant(None) for key in node.keys))
        return Part(f"Dict {len(node.keys)} {keys}", {str(number): _part(one) for number, one in enumerate(node.values)})
    return Part("" if node is None else lowered_hash(node), {})


def _parts(nodes: Sequence[tuple[str, ast.expr]], number: str = "") -> dict[str, Part]:
    """Describe expressions beside each other.  Of several calls of one function, nothing but what they are called with tells which is which."""
    made = {place: Part(number, {}) if number and _is_number(node) else _part(node) for place, node in nodes}
    count = Counter(part.what for part in made.values())
    return {place: Part(lowered_hash(node), {}) if made[place].parts and count[made[place].what] > 1 else made[place] for place, node in nodes}


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) or _is_number(node.right)
    return _is_number(node.operand) if isinstance(node, ast.UnaryOp) else isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _texts(node: ast.AST) -> Iterator[str]:
    """Yield the texts in an expression that are the author's; calls of the runtime name functions by their paths."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in node.args[1:] if isinstance(node, ast.Call) and _is_ours(node) else child_nodes(node):
        yield from _texts(child)


def _is_ours(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == RUNTIME


def _text(wait: ast.AST) -> str:
    """Return the wait as the author wrote it, shortened; empty if it was not written like this."""
    text = ast.unparse(wait).removeprefix("(").removesuffix(")")
    return "" if RUNTIME in text else text if len(text) <= _TEXT_MAX else text[: _TEXT_MAX - 1] + "…"
