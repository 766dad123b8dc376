"""Save and load generators, and drop every variable that liveness says is not needed: what is left must suffice.

Owns the dropping, and programs that bind and read few variables often; those of random_programs seldom bind one only on some ways. What a generator
does with what is left is compared by corpus_harness.
"""

import ast
import contextlib
import functools
import random
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import corpus_harness as harness
import pytest

from kwflow.durable import loading, registry
from kwflow.durable.frames import SUSPENDED, refill
from kwflow.durable.lower.functions import ModuleLowering
from kwflow.durable.lower.scopes import analyze

Needs = dict[str, dict[str, frozenset[str]]]


@functools.lru_cache(maxsize=64)
def needs_of(source: str) -> Needs:
    """What each generator of this source needs, by its path and its label."""
    scopes = analyze(ast.parse(source))
    lowering = ModuleLowering("<source>", scopes, 0)
    outlines = {scope.frame_path: lowering.outline(node, scope) for node, scope in scopes.items() if scope.kind == "function" and scope.generator}
    return {path: {label: wait.needed | wait.lent for label, wait in outline.waits.items()} for path, outline in outlines.items()}


@contextlib.contextmanager
def dropping() -> Iterator[list[str]]:
    """Let `loads` meanwhile drop what waiting generators do not need; the list has what was dropped.

    Cells that a generator owns are emptied when the block ends, because the loading may fill them last. Those of enclosing functions are left alone.
    """
    dropped: list[str] = []
    cells: list[types.CellType] = []

    def fill(gen: Any, status: str, saved: dict[str, Any]) -> None:
        function = registry.function_of(gen.gi_code)
        if status == SUSPENDED and function is not None:
            needed = needs_of(function.home.source)[function.path][saved["@l"]]
            own = gen.gi_frame.f_locals["@S"]["@c"]
            cells.extend(cell for name, cell in zip(function.captured, own, strict=True) if name not in function.free and name not in needed)
            unneeded = [name for name in saved if name[0] != "@" and name not in needed]
            for name in unneeded:
                del saved[name]
            dropped.extend(f"{function.path}: {name}" for name in unneeded)
        refill(gen, status, saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "refill", fill)
        yield dropped
    for cell in cells:
        with contextlib.suppress(ValueError):
            del cell.cell_contents


def trimmed(gen: Any) -> Any:
    """A trip of corpus_harness."""
    with dropping():
        return harness.deep(gen)


# N stands for a name, E for an expression, B for a block, L for a block in a loop, K for a fresh name
EXPRESSIONS = ["N", "N", "N", "0", "1", *["(N := E)"] * 3, "log(E)", "boom(N == 2)", "(E and E)", "(E or E)", "(E if E else E)", "(E == E == E)"]
EXPRESSIONS += ["len({E: E, E: 1})", "len([E for n in (1, 2)])", "(lambda: N)()"]
WAITS = ["N = yield E", "log((yield E))", "yield", "log((N, (yield E), N))"]
SIMPLE = [*WAITS, *WAITS, "N = E", "N = 1", "N = 2", "N = 0", "log(E)", "log(N)", "log((N, N))", "N += 1", "boom(N == 1)", "del N", "f = lambda: N", "log(f())"]
COMPOUND = ["if E:B", "if E:Belse:B", "for N in (0, E):L", "for N in (0, 1)[:E]:Lelse:B", "K = iter((1, 2))\nwhile next(K, 0):L", "K = iter((1, 2))\nwhile next(K, 0):Lelse:B"]
COMPOUND += ["with M(1, 0) as N:B", "with M(1, 1) as N:B", "try:Bexcept ValueError as N:B", "try:Bexcept (TypeError, NameError):Belse:B", "try:Bexcept TypeError:Bfinally:B"]
COMPOUND += ["try:Bfinally:B", "match E:\n  case 0:B\n  case N if E:B", "match E:\n  case N if E:B", "match E:\n  case 0:B\n  case _:B"]


class Dense:
    """Makes a generator `g`, for the prelude of random_programs, from a seed: four variables, many waits."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(f"dense {seed}")
        self.fresh = 0

    def source(self) -> str:
        return "def g():\n" + textwrap.indent(f"a = b = c = d = 1\n{self.block(2)}\n{self.block(2)}\n{self.block(2)}\nlog((a, b))\n", "    ")

    def filled(self, template: str, depth: int, loop: bool) -> str:
        self.fresh += "K" in template
        fresh = f"k{self.fresh}"

        def part(found: re.Match[str]) -> str:
            what = found.group()
            if what in "BL":
                return "\n" + textwrap.indent(self.block(depth - 1, loop or what == "L"), "    ") + "\n"
            return fresh if what == "K" else self.dice.choice("abcd") if what == "N" else self.expression(2 if depth else 1)

        return re.sub(r"\b[NEK]\b|(?<=:)[BL]", part, template).rstrip()

    def expression(self, depth: int) -> str:
        template = self.dice.choice(EXPRESSIONS if depth else EXPRESSIONS[:5])
        return re.sub(r"\b[NE]\b", lambda found: self.dice.choice("abcd") if found.group() == "N" else self.expression(depth - 1), template)

    def block(self, depth: int, loop: bool = False) -> str:
        return "\n".join(self.statement(depth, loop) for _ in range(self.dice.randint(1, 3)))

    def statement(self, depth: int, loop: bool) -> str:
        if self.dice.random() < 0.1:
            return self.filled(f"if E:\n    {self.dice.choice(('break', 'continue') if loop else ('return 1',))}", 0, loop)
        simple = depth == 0 or self.dice.random() < 0.3
        return self.filled(self.dice.choice(SIMPLE if simple else COMPOUND), depth, loop)
