"""Every generator of the corpus, moved at each of its waits onto an edited source, does what it does natively (decision 0061).

The edit changes the hash of every function and the place of every wait, and not what the code does: a constant as a statement of its own, before each statement.
"""

import ast
import functools
import sys
from typing import Any

import corpus_harness as harness
import pytest
import random_programs

from kwflow import durable
from kwflow.durable import codec, registry, versions

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s)Exception ignored (in|while).*(ignored GeneratorExit|ZeroDivisionError|already running):pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*with a literal:SyntaxWarning"),
]
DIFFERS = {
    "g_lines_of_a_decorated_generator",  # it returns line numbers
    "g_patterns_name_shared_variables",  # it holds an object of a class that is defined in it, and edited
}
CASES = [(m, g) for m in harness.module_names() for g in harness.generators_of(harness.load_native(m)) if g not in DIFFERS]
MOVES_MAX = 6
PROGRAMS, EACH = 100, 25
native = functools.cache(harness.load_native)


class Edit(ast.NodeTransformer):
    """Put a constant before each statement in a function."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and not isinstance(node, (ast.Module, ast.ClassDef)):
                head = 1 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None else 0
                later = [part for statement in block[head:] for part in (ast.Expr(ast.Constant(0)), statement)]
                setattr(node, name, [*block[:head], *later])
        return node


def edited(source: str) -> str:
    return ast.unparse(ast.fix_missing_locations(Edit().visit(ast.parse(source))))


@functools.cache
def both(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The module as it is, and the edited one, which is the current one."""
    source = harness.source_of(name)
    before = vars(durable.load_source(f"corpus_moved_{name}", source, str(harness.CORPUS / f"{name}.py")))
    return dict(before), vars(durable.load_source(f"corpus_moved_{name}", edited(source), str(harness.CORPUS / f"{name}.py")))


def moved(generator: Any) -> Any:
    body, held, _ = codec.dumps_with_code(generator, {})
    durable.discard(generator)
    code = {reference: {"version": module.version, "units": units} for reference, (module, units) in held.items()}
    return versions.loads(body, code, versions.no_sources, moving=versions.moving(code, versions.no_sources))[0]


@pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{m}.{g}" for m, g in CASES])
def test_a_generator_moved_onto_an_edited_source_goes_on_as_it_would_have(module: str, name: str) -> None:
    plain, (before, after) = native(module), both(module)
    for values in ("ints", "false"):
        for thrown in (None, "ValueError"):
            ops = list(harness.stream(values))
            for place in range(MOVES_MAX):
                told = _moved_at(place, ops, thrown, plain[name], plain["LOG"], lambda generator: generator, plain["LOG"])
                if told is None:
                    break
                got = _moved_at(place, ops, thrown, before[name], before["LOG"], moved, after["LOG"])
                assert got == told, (values, thrown, place)


def _moved_at(place: int, ops: list[Any], thrown: str | None, start: Any, log: list[str], trip: Any, later: list[str]) -> list[Any] | None:
    """Drive it, with a trip after `place` waits and then perhaps a throw; return the outcomes and what was logged.  None if it does not wait there."""
    log.clear()
    later.clear()
    generator = start()
    harness.KEPT.append(generator)
    trace: list[Any] = []
    for op in ops[: place + 1]:
        trace.append(harness.apply(generator, op))
        if trace[-1][0] != "yield":
            return None
    trace += log
    generator = trip(generator)
    log.clear()
    later.clear()
    harness.KEPT.append(generator)
    rest = ([("throw", harness.THROWN[thrown])] if thrown is not None else []) + ops[place + 1 :]
    for op in rest:
        trace.append(harness.apply(generator, op))
        if trace[-1][0] != "yield":
            break
    return trace + later


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, PROGRAMS, EACH))
def test_a_random_program_moved_to_and_fro_at_each_wait_goes_on_as_it_would_have(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure shows the seed, the script and the program."""
    for seed in range(first, first + EACH):
        source = random_programs.Maker(seed).source()
        monkeypatch.setattr(random_programs, "TRIPS", {"moved": _to_and_fro(source)})
        found = random_programs.difference(seed, source)
        assert found is None, str(found)


def _to_and_fro(source: str) -> Any:
    """Return a trip that moves a generator onto the source that it does not run: the program as it is, or edited."""
    loaded: dict[str, tuple[registry.Module, Any]] = {}
    for text in (edited(source), source):
        random_programs.lowered(text)
        home = registry.modules()[random_programs.NAME]
        loaded[home.version] = home, sys.modules[random_programs.NAME]

    def trip(generator: Any) -> Any:
        function = registry.function_of(generator.gi_code)
        assert function is not None
        [other] = loaded.keys() - {function.version}
        if "G" in function.namespace:  # globals of a module are not saved
            loaded[other][0].namespace["G"] = function.namespace["G"]
        registry._modules[random_programs.NAME], sys.modules[random_programs.NAME] = loaded[other]
        return moved(generator)

    return trip
