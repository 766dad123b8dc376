"""A generator that stayed live and one that was restored at every yield are saved as the same bytes."""

import functools
import gc
from typing import Any

import corpus_harness as harness
import pytest

from kwflow import durable
from kwflow.durable import set_abandoning

lowered = functools.cache(harness.load_lowered)
SHOWS_ITS_FRAME = "g_locals_are_kept"  # holds `locals()`, which until 3.12 is the frame's own dict, so it changes when the frame is looked at
CASES = [(m, g) for m in harness.module_names() for g in harness.generators_of(harness.load_native(m)) if g != SHOWS_ITS_FRAME]
SCRIPTS = ("ints", "none")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{m}.{g}" for m, g in CASES])
def test_hot_then_saved_equals_restored_all_along(module: str, name: str, script: str) -> None:
    """K3: the canonical form after k operations does not show which of the two it was."""
    if name == "g_locals_are_kept":
        pytest.skip("it holds its locals(), which until 3.12 are the frame's own dict: what is in them depends on who looked at the frame last")
    space = lowered(module)
    hot, restored = space[name](), space[name]()
    harness.KEPT += [hot, restored]
    for k, op in enumerate(harness.stream(script)):
        one = harness.apply(hot, op)
        space["LOG"].clear()
        two = harness.apply(restored, op)
        space["LOG"].clear()
        assert one[0] == two[0], f"op {k}: {one} {two}"
        if one[0] != "yield":
            return
        assert durable.canonical(hot) == durable.canonical(restored), f"after op {k}"
        restored = durable.loads(durable.dumps(restored))
        harness.KEPT.append(restored)


def test_a_generator_dropped_in_a_cycle_during_another_step_runs_nothing() -> None:
    """G8, semantics §3.3: neither its `finally` nor its `with` or `except`, whatever collects it."""
    source = """
LOG = []
class Manager:
    def __enter__(self): return self
    def __exit__(self, *error): LOG.append("exit")
def held(me):
    try:
        with Manager():
            try:
                me.append((yield "first"))
                yield "second"
            except BaseException:
                LOG.append("except")
                raise
    finally:
        LOG.append("finally")
def other():
    import gc
    gc.collect()
    yield "other"
    gc.collect()
"""
    module: Any = durable.load_source("dropped_in_cycles", source, "dropped_in_cycles.py")
    before = set_abandoning(True, everywhere=True)
    try:
        for way in ("live", "restored"):
            me: list[Any] = []
            gen = module.held(me)
            next(gen)
            gen.send(gen)  # the generator holds the list that holds it
            if way == "restored":
                gen, me = durable.loads(durable.dumps((gen, me)))
                assert me[0] is gen
            del gen, me
            list(module.other())
            gc.collect()
            assert module.LOG == [], way
    finally:
        set_abandoning(before, everywhere=True)
