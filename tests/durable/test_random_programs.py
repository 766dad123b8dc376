"""Random programs: native against lowered, restored and pickled at every yield (H6). For 10,000 of them: make nightly."""

import ast
from typing import Any

import pytest
import random_programs

from kwflow.durable.lower.statements import Statements

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # programs that warn, and generators that are dropped while they ignore GeneratorExit
]
PROGRAMS, EACH = 500, 50


@pytest.mark.parametrize("first", range(0, PROGRAMS, EACH))
def test_a_random_program_does_what_it_does_natively(first: int) -> None:
    """G8. A failure shows the seed, the script and the shrunk program."""
    for seed in range(first, first + EACH):
        found = random_programs.check(seed)
        assert found is None, str(found)


def test_programs_are_what_they_are_meant_to_be() -> None:
    """The same seed makes the same program, programs use the grammar, and most run for a while."""
    sources = [random_programs.Maker(seed).source() for seed in range(200)]
    assert sources == [random_programs.Maker(seed).source() for seed in range(200)]
    text = "\n".join(sources)
    for construct in ("yield from", "finally:", "except", "with ", "match ", "while ", "for ", "nonlocal", "lambda", ":=", "break", "continue", "else:", "return", "raise", " += ", "f'{"):
        assert text.count(construct) > 10, construct


def test_a_fault_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: the right side of an operator is evaluated first."""

    def backwards(self: Statements, node: Any) -> Any:
        right, left = self.sequence([("plain", node.right), ("plain", node.left)])
        return ast.BinOp(left, node.op, right)

    monkeypatch.setattr(Statements, "value_BinOp", backwards)
    found = next(filter(None, map(random_programs.check, range(200))), None)
    assert found is not None
    assert len(found.source.splitlines()) < 12 and any(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(found.source))), found.source
