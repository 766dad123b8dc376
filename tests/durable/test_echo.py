"""A sample of CPython's own tests with a yield in every place (H3). echo.py explains how, and make nightly runs them all."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import echo
import pytest
import reentered

from kwflow.durable.lower.emit import Emitter
from kwflow.durable.lower.expressions import Expressions
from kwflow.durable.lower.protected import Protected

pytestmark = [
    pytest.mark.skipif(echo.source_file("test_grammar") is None, reason="NOT TESTED: this interpreter comes without CPython's test package"),
    pytest.mark.slow,
]
METHODS_EACH = 9
SAMPLE = """
    test_argparse test_augassign test_bool test_builtin test_bytes test_calendar test_class test_collections test_compare test_complex
    test_context test_contextlib test_copy test_csv test_dataclasses test_decorators test_dict test_dictviews test_enumerate test_except_star
    test_exception_variations test_exceptions test_float test_fstring test_funcattrs test_functools test_grammar test_heapq test_isinstance test_iter
    test_keywordonlyarg test_list test_listcomps test_metaclass test_named_expressions test_ordered_dict test_patma test_positional_only_arg test_property test_raise
    test_richcmp test_scope test_set test_slice test_string test_struct test_super test_textwrap test_tuple test_types
    test_unpack_ex test_userdict test_weakset test_with test_yield_from
""".split()


def outcomes(*modules: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-W", "ignore", str(pathlib.Path(echo.__file__)), *modules], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("group", range(5))
def test_mutated_tests_of_cpython_pass_when_restored_at_their_yields(group: int) -> None:
    """G8: eleven modules per group, each from the interpreter's own `test` package."""
    done = outcomes(*(f"{module}:{METHODS_EACH}" for module in SAMPLE[group * 11 : group * 11 + 11]))
    assert len(done) == 11
    for outcome in done:
        assert outcome["failed"] == {}, outcome["module"]
    assert sum(outcome["mutated"] for outcome in done) >= 79
    assert sum(outcome["restores"] for outcome in done) > 1000


@pytest.mark.parametrize(("module", "tests_min", "restores_min"), [
    ("test_generators", 20, 50), ("test_yield_from", 30, 200), ("test_contextlib", 80, 80), ("test_with", 50, 80),
    ("test_raise", 30, 3), ("test_exceptions", 80, 30), ("test_patma", 300, 0), ("test_named_expressions", 60, 0),
])  # fmt: skip
def test_cpythons_tests_of_generators_pass_when_every_generator_is_restored_before_every_resume(module: str, tests_min: int, restores_min: int) -> None:
    """H1, G8: the last two have no generators of their own, so there it is the lowered module that passes."""
    done = subprocess.run([sys.executable, "-W", "ignore", str(pathlib.Path(reentered.__file__)), module], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["failed"] == {}
    assert outcome["run"] >= tests_min and outcome["restores"] >= restores_min


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="later minors lack some")
def test_what_is_left_out_is_there_and_has_a_reason() -> None:
    for module, methods in [*echo.EXCLUDED.items(), *reentered.EXCLUDED.items()]:
        source = echo.source_file(module)
        assert source is not None
        names = source.read_text(encoding="utf-8")
        assert all(f"def {method.split('.')[1]}(" in names and reason for method, reason in methods.items()), module


def test_native_generators_pass_too() -> None:
    """The mutation itself changes nothing."""
    done = subprocess.run([sys.executable, str(pathlib.Path(echo.__file__)), "--native", "test_grammar"], capture_output=True, text=True, check=True, timeout=100)
    outcome = json.loads(done.stdout)
    assert outcome["failed"] == {} and outcome["yields"] > 5000 and outcome["restores"] == 0


# -- teeth: a lowering with one fault is noticed ----------------------------------------------------------------------


def backwards(self: Expressions, parts: list[Any]) -> list[Any]:
    """Fault: the parts of an expression are evaluated from right to left."""
    return CORRECT_SEQUENCE(self, parts[::-1])[::-1]


def off_by_one(last: int) -> Any:
    """Fault: the last label of a block is looked up in the next block."""
    return CORRECT_UP_TO(last - 1)


def no_exit(self: Protected, manager: str, *error: Any) -> Any:
    """Fault: `__exit__` is not called."""
    return echo.ast.Constant(None)


def no_chain(self: Expressions, result: str, op: Any, values: list[Any]) -> None:
    """Fault: the right side of `and` and `or` is not examined."""
    self.assign_into(result, values[0])


CORRECT_SEQUENCE = Expressions.sequence
CORRECT_UP_TO = Emitter.up_to
FAULTS = {
    "order": (Expressions, "sequence", backwards, "test_keywordonlyarg"),
    "guards": (Emitter, "up_to", staticmethod(off_by_one), "test_grammar"),
    "exits": (Protected, "_exit", no_exit, "test_with"),
    "short circuit": (Expressions, "_operands", no_chain, "test_grammar"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_lowering_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the lowering pass with one fault. Without the fault, the same tests pass (above and nightly)."""
    owner, name, wrong, module = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    try:
        outcome = echo.run(module, 40)
    finally:
        sys.modules.pop(f"test.{module}", None)
    assert outcome.failed, f"{outcome.run} tests noticed nothing"
