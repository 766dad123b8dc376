"""Liveness is sound: a generator that keeps, at each wait, only the variables that it is said to need goes on as if it had kept all."""

import functools
from collections.abc import Callable
from typing import Any

import corpus_harness as harness
import liveness_harness
import pytest
import random_programs

from kwflow import durable
from kwflow.durable.lower import liveness

pytestmark = pytest.mark.filterwarnings("ignore")  # as in test_corpus, and random programs that warn
LIFETIMES = {  # an object that no longer is in an unneeded variable ends earlier than natively, and its end is logged
    "lifetimes.g_sent_value_and_display",
    "lifetimes.g_finally_that_waits",
    "asyncs.g_async_generator_ignores_close",
}
PROGRAMS, EACH = 200, 50
CASES = [(m, g) for m in harness.module_names() for g in harness.generators_of(harness.load_native(m)) if f"{m}.{g}" not in LIFETIMES]
native = functools.cache(harness.load_native)
lowered = functools.cache(harness.load_lowered)


@pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{m}.{g}" for m, g in CASES])
def test_a_generator_needs_no_variable_but_those_that_liveness_names(module: str, name: str) -> None:
    plain, other = native(module), lowered(module)
    found = harness.difference(plain[name], plain["LOG"], other[name], other["LOG"], liveness_harness.trimmed)
    assert found is None, found


@pytest.mark.slow
@pytest.mark.parametrize("maker", [liveness_harness.Dense, random_programs.Maker])
@pytest.mark.parametrize("first", range(0, PROGRAMS, EACH))
def test_a_random_program_needs_no_variable_but_those_that_liveness_names(first: int, maker: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure shows the seed, the script and the program."""
    monkeypatch.setattr(random_programs, "TRIPS", {"trimmed": liveness_harness.trimmed})
    for seed in range(first, first + EACH):
        found = random_programs.difference(seed, maker(seed).source())
        assert found is None, str(found)


def test_variables_and_cells_are_dropped_from_every_generator_that_is_saved() -> None:
    """Teeth: the harness drops what it says."""
    source = "def f():\n  x = y = z = 1\n  yield from g(x)\n  y = z\n  yield (lambda: y)()\ndef g(n):\n  m = n\n  yield m"
    gen = vars(durable.load_source("dropped_variables", source, "dropped_variables.py"))["f"]()
    next(gen)
    with liveness_harness.dropping() as dropped:
        loaded = harness.deep(gen)
    assert sorted(dropped) == ["f: x", "g: m", "g: n"]
    assert [(frame.function, set(frame.locals)) for frame in durable.describe(loaded)] == [("f", {"z"}), ("g", set())]
    assert [*loaded] == [1]


def _once(self: Any, body: Any) -> None:
    self.block(body, frozenset(), liveness._Ways())


SLIPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "what handlers need is not needed in the body": ("handlers", lambda self, node, after, ways: frozenset()),
    "loops are gone over once": ("run", _once),
}


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_found(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth."""
    name, wrong = SLIPS[slip]
    monkeypatch.setattr(liveness._Walk, name, wrong)
    liveness_harness.needs_of.cache_clear()
    try:
        plain, other = native("trys"), lowered("trys")
        found = (harness.difference(plain[g], plain["LOG"], other[g], other["LOG"], liveness_harness.trimmed) for g in harness.generators_of(plain))
        assert any(found)
    finally:
        liveness_harness.needs_of.cache_clear()
