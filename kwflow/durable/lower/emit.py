"""Sequences of lowered statements, labels, temporaries and the guards of the cold twin.

The hot twin runs from the start; the cold one is entered with `@r` set to the label to reach (0: run normally).  Every
construct keeps this invariant: when a block with the labels first..last runs, `@r` is 0 or one of them.  Only `close`, in this
file, decides how a list of statements keeps it.  This module must not know the statements themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kwflow.durable.lower.nodes import child_nodes
from kwflow.durable.lower.scopes import Scope
from kwflow.durable.registry import RUNTIME, Label
from kwflow.errors import KwflowBug, UnsupportedError

__all__ = ["Block", "Emitter", "Finally", "Label", "assign", "call", "constant", "helper", "is_bound", "load", "located", "store"]


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def store(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def constant(value: Any) -> ast.Constant:
    return ast.Constant(value)


def assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([store(name)], value)


def helper(name: str) -> ast.Attribute:
    """Return a reference to a function of the module's injected runtime; that is a single global, so that no author's name can shadow it."""
    return ast.Attribute(load(RUNTIME), name, ast.Load())


def call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(helper(name), list(arguments), [])


def is_bound(scope: Scope, name: str) -> ast.expr:
    """Return the test whether a variable that this generator shares with closures is bound.

    In the cold twin it is a free variable, and reading it unbound would raise only a NameError.
    """
    cell = ast.Subscript(load("@c"), constant(scope.captured.index(name)), ast.Load())
    return ast.Compare(cell, [ast.NotEq()], [load("__@empty__")])


def located(tree: ast.Module) -> ast.Module:
    """Do what `ast.fix_missing_locations` does: nodes without a position get that of the enclosing node.  Parsed nodes have their own, all the way down."""
    stack: list[tuple[ast.AST, tuple[int, int, int, int]]] = [(tree, (1, 0, 1, 0))]
    while stack:
        node, place = stack.pop()
        known = node.__dict__
        if "lineno" in known:
            place = (known["lineno"], known["col_offset"], known.get("end_lineno") or known["lineno"], known.get("end_col_offset") or known["col_offset"])
        elif node._attributes:
            known["lineno"], known["col_offset"], known["end_lineno"], known["end_col_offset"] = place
            if type(node) is ast.Attribute:  # the compiler puts a call on the line where its method's name ends: for a whole def that would be its last line
                known["end_lineno"], known["end_col_offset"] = place[:2]
        stack += [(child, place) for child in child_nodes(node) if "_kw_parsed" not in child.__dict__]
    return tree


def _take_out(statements: list[ast.stmt], wanted: ast.stmt) -> bool:
    """Remove this very statement from these, at any depth; return whether it was there."""
    for number, statement in enumerate(statements):
        if statement is wanted:
            del statements[number]
            return True
        known = statement.__dict__
        blocks = [known[name] for name in ("body", "orelse", "finalbody") if name in known]
        blocks += [part.body for name in ("handlers", "cases") if name in known for part in known[name]]
        if any(_take_out(block, wanted) for block in blocks):
            return True
    return False


@dataclass
class Block:
    """Lowered statements and the range of their labels.  Invariant: first > last if there are no labels inside."""

    body: list[ast.stmt]
    first: int
    last: int

    @property
    def labelled(self) -> bool:
        return self.first <= self.last


@dataclass
class Finally:
    """An enclosing `finally` that waits.  Every way out of its body has to be noted in `completion` (and `value`)."""

    completion: str
    value: str
    breaks: bool = False
    continues: bool = False


_LASTING = {"async-iterator", "entered", "for-iterator", "for-value", "manager"}  # cleared at the end of their compound statement, unless an exception or a return leaves it
LOOP = "loop"
_HOLDING = {"augment", "bool", "compare", "delegate", "if", "spill", "unpack"}  # roles of temporaries whose values end with their statement
RAISED, RETURNED, BROKE, CONTINUED = 1, 2, 3, 4
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)


@dataclass
class Emitter:
    """The state of lowering one function: where statements go, which temporaries are live, which labels there are."""

    scope: Scope
    filename: str
    cold: bool
    labels: list[Label] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # the line of the wait at each label, for display
    waits: list[ast.AST] = field(default_factory=list)  # the wait at each label, its operand not lowered
    places: dict[str, ast.stmt] = field(default_factory=dict)  # each statement by its path
    live: list[str] = field(default_factory=list)
    temporaries: dict[str, None] = field(default_factory=dict)
    exits: list[str | Finally] = field(default_factory=list)
    path: str = ""
    at: ast.AST | None = None
    holding: list[str] = field(default_factory=list)
    _held: list[str] = field(default_factory=list)
    _items: list[Block] = field(default_factory=list)
    _label_counts: dict[str, int] = field(default_factory=dict)
    _label_stores: list[ast.Assign] = field(default_factory=list)

    # -- refusing ------------------------------------------------------------------------------------------------
    def refuse(self, node: ast.AST, construct: str) -> UnsupportedError:
        line = getattr(node, "lineno", getattr(self.at, "lineno", 0))
        return UnsupportedError(f"{self.filename}:{line}: {construct} is not supported in a durable generator ({self.scope.qualname})")

    # -- emitting ------------------------------------------------------------------------------------------------
    def emit(self, *statements: ast.stmt) -> None:
        for statement in statements:
            self._items.append(Block([self.place(statement)], 1, 0))

    def emit_block(self, block: Block) -> None:
        for statement in block.body:
            self.place(statement)
        self._items.append(block)

    def emit_labelled(self, statement: ast.stmt, first: int) -> None:
        """Emit a statement that contains every label from `first` to the newest."""
        self.emit_block(Block([statement], first, len(self.labels)))

    def emit_compound(self, statement: ast.stmt, first: int) -> None:
        """Emit a statement whose parts have been lowered since `first` was the next label."""
        if len(self.labels) >= first:
            self.emit_labelled(statement, first)
        else:
            self.emit(statement)

    def place(self, statement: ast.stmt) -> ast.stmt:
        if not hasattr(statement, "lineno") and self.at is not None:
            ast.copy_location(statement, self.at)
        return statement

    @contextmanager
    def collect(self) -> Iterator[Block]:
        """Collect the statements emitted inside the `with`; when it ends, they become the body of the yielded block, with guards."""
        saved, self._items = self._items, []
        block = Block([], len(self.labels) + 1, 0)
        try:
            yield block
            block.last = len(self.labels)
            block.body = self.close(self._items)
        finally:
            self._items = saved

    def close(self, items: list[Block]) -> list[ast.stmt]:
        """Return one list of statements, in which everything before a label is skipped while that label is to be reached."""
        marked = [number for number, item in enumerate(items) if item.labelled]
        if not self.cold or not marked:
            return [statement for item in items for statement in item.body] or [self.place(ast.Pass())]
        result: list[ast.stmt] = []
        plain: list[ast.stmt] = []
        for number, item in enumerate(items):
            if not item.labelled and number < marked[-1]:
                plain += item.body
                continue
            if plain:
                result.append(self.guard(ast.UnaryOp(ast.Not(), load("@r")), plain))
                plain = []
            if item.labelled and number < marked[-1]:
                result.append(self.guard(self.up_to(item.last), item.body))
            else:
                result += item.body
        return result

    def guard(self, test: ast.expr, body: list[ast.stmt]) -> ast.If:
        return ast.copy_location(ast.If(test, body, []), body[0])

    @staticmethod
    def up_to(last: int) -> ast.Compare:
        return ast.Compare(load("@r"), [ast.LtE()], [constant(last)])

    @staticmethod
    def within(first: int, last: int) -> ast.Compare:
        return ast.Compare(constant(first), [ast.LtE(), ast.LtE()], [load("@r"), constant(last)])

    @staticmethod
    def unless_entering(normally: ast.expr, entering: ast.expr) -> ast.IfExp:
        """Return the choice between the expression that the author wrote, and another one while a label is to be reached."""
        return ast.IfExp(ast.UnaryOp(ast.Not(), load("@r")), normally, entering)

    def branch(self, test: ast.expr, body: Block, orelse: Block | None = None) -> Block:
        """Return an `if` with labels in either branch."""
        blocks = [block for block in (body, orelse) if block is not None and block.labelled]
        if self.cold and blocks:
            test = self.unless_entering(test, self.up_to(body.last) if body.labelled else constant(False))
        statement = ast.If(test, body.body, orelse.body if orelse is not None else [])
        return Block([statement], blocks[0].first if blocks else 1, blocks[-1].last if blocks else 0)

    # -- names ---------------------------------------------------------------------------------------------------
    def temporary(self, role: str) -> str:
        """Return a fresh temporary, named by its meaning: its role and the path of its statement (semantics §4.2)."""
        name = base = f"@{role} {self.path}"
        number = 1
        while name in self.temporaries:
            number += 1
            name = f"{base} {number}"
        self.temporaries[name] = None
        if role in _HOLDING:
            self.holding.append(name)
        if role in _HOLDING or role in _LASTING:
            self._held.append(name)
        return name

    def held(self, since: int) -> list[str]:
        """Return the temporaries beyond the first `since` that hold values; the caller must release them."""
        names, self.holding[since:] = self.holding[since:], []
        return names

    def held_in(self, since: int) -> list[str]:
        """Return the temporaries that may still hold values after an exception or a return, created since `mark_held` returned `since`."""
        return self._held[since:]

    def mark_held(self) -> int:
        return len(self._held)

    def release(self, names: list[str], at: ast.AST | None = None) -> None:
        """Emit statements that clear these temporaries: an object must not live longer because of a wait beside it.

        `at` is the node whose line a debugger shows.
        """
        if names:
            released = ast.Assign([store(name) for name in names], constant(None))
            self.emit(ast.copy_location(released, at) if at is not None else released)

    def label(self, wait: ast.AST) -> int:
        """Create a label for this wait, and emit the store that tells `capture` where the generator waits."""
        number = len(self.labels) + 1
        same = self._label_counts[self.path] = self._label_counts.get(self.path, 0) + 1
        self.labels.append(Label(f"{self.path} {same}", tuple(dict.fromkeys(self.live))))
        self.lines.append(getattr(wait, "lineno", getattr(self.at, "lineno", 0)))
        self.waits.append(wait)
        stored = assign("@l", constant(number))
        self._label_stores.append(stored)
        self.emit(stored)
        return number

    def store_before_loop(self, node: ast.stmt, body: list[ast.stmt], first: int) -> None:
        """If the body of a loop has one label, let the hot twin store it once, before the loop, since it is the same in every round."""
        if not self.cold and len(self.labels) == first:
            stored = self._label_stores[first - 1]
            if not _take_out(body, stored):
                raise KwflowBug(f"label {first} of {self.scope.qualname} is not in its loop")
            self.emit(ast.copy_location(stored, node))

    # -- provided by the other passes ------------------------------------------------------------------------------
    def statement(self, node: ast.stmt) -> None:
        raise NotImplementedError

    def block(self, statements: list[ast.stmt], name: str) -> Block:
        """Lower a list of statements; `name` is the field that it is in, for the paths of what is inside."""
        outer, outer_at = self.path, self.at
        with self.collect() as block:
            for number, node in enumerate(statements):
                self.path, self.at = f"{outer}{'.' if outer else ''}{name}{number}", node
                self.places[self.path] = node
                mark, holding = len(self.live), len(self.holding)
                self.statement(node)
                del self.live[mark:]
                names = self.held(holding)
                if not isinstance(node, _LEAVING):
                    self.release(names)
            self.path, self.at = outer, outer_at
        return block
