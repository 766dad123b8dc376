"""G8 and the durable promise: lowered code, restored at every yield, does what the same source does natively."""

import functools
import gc
import json
import os
import pathlib
import subprocess
import sys

import corpus_harness as harness
import pytest

from kwflow import durable
from tests.nightly import minor
from tests.nightly.test_minors import SUPPORTED, interpreter

pytestmark = [
    # the corpus does this on purpose when a generator is dropped: it ignores GeneratorExit, or its delegate's `close` raises
    pytest.mark.filterwarnings("ignore:(?s)Exception ignored (in|while).*(ignored GeneratorExit|ZeroDivisionError):pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*with a literal:SyntaxWarning"),  # random programs compare literals
]
CASES = [(m, g) for m in harness.module_names() for g in harness.generators_of(harness.load_native(m))]


SHARED = ("g_from_generator_kept_in_local", "g_async_generator", "g_aclosing")


each_case = pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{m}.{g}" for m, g in CASES])
native = functools.cache(harness.load_native)
lowered = functools.cache(harness.load_lowered)


@each_case
def test_the_corpus_itself_is_repeatable(module: str, name: str) -> None:
    """An oracle that differs between two runs (addresses in a repr, state left in a global) would blame the lowering."""
    space, again = native(module), harness.load_native(module)
    for script in harness.scripts_for(space[name], space["LOG"]):
        first = harness.run(space[name], script, space["LOG"])
        assert first == harness.run(again[name], script, again["LOG"]), script.name
        assert " at 0x" not in repr(first), script.name


@pytest.mark.parametrize("mode", harness.TRIPS)
@each_case
def test_a_generator_restored_at_every_yield_does_what_it_does_natively(module: str, name: str, mode: str) -> None:
    if mode == "restored" and name.startswith(SHARED):
        pytest.skip("the copy shares its inner generator with the original, which this harness keeps, so it is not dropped when it would be natively")
    plain, other = native(module), lowered(module)
    found = harness.difference(plain[name], plain["LOG"], other[name], other["LOG"], harness.TRIPS[mode])
    assert found is None, found


@pytest.mark.parametrize("way", ["discarded", "dropped"])
@each_case
def test_forgetting_a_generator_never_runs_its_cleanup(module: str, name: str, way: str) -> None:
    """G8."""
    before = durable.set_abandoning(True)
    harness.KEPT.clear()  # otherwise gc.collect() below would visit them all
    durable.set_abandoning(before)
    gc.collect()
    gc.freeze()  # each collection below then visits only what this test made
    space = lowered(module)
    script = harness.Script("ints", tuple(harness.stream("ints")))
    for k in range(harness.OPS_MAX):
        generator = space[name]()
        outcomes = [harness.apply(generator, op)[0] for op in script.ops[:k]]
        if outcomes and outcomes[-1] != "yield":
            return
        space["LOG"].clear()
        before = durable.set_abandoning(way == "dropped")
        if way == "discarded":
            durable.discard(generator)
        del generator
        gc.collect()
        durable.set_abandoning(before)
        assert [entry for entry in space["LOG"] if "gone" not in entry] == [], f"{way} at yield {k}"  # in lifetimes, objects log their own ends


def test_every_saved_generator_goes_on_in_another_process(tmp_path: pathlib.Path) -> None:
    """Saved at every yield, and compared from there on. Across minors: make nightly."""
    minor.write(str(tmp_path / "snapshots.json"))
    script = [sys.executable, minor.__file__, "resume", str(tmp_path / "snapshots.json")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=100, env={**os.environ, "PYTHONHASHSEED": "11"})
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr


@pytest.mark.parametrize("version", SUPPORTED)
def test_a_restored_generator_keeps_its_variables_apart_from_those_of_comprehensions_on_every_minor(version: str) -> None:
    """CPython 3.12 and 3.13 take a cell of an inlined comprehension for a free variable of the same name.

    Natively, no variable of a workflow is a free variable. Restored, each captured one is.
    """
    script = f"import sys; sys.path[:0] = {[str(minor.ROOT), str(minor.ROOT / 'tests/durable')]}; import corpus_harness as harness\n"
    script += "native, lowered = harness.load_native('scopes'), harness.load_lowered('scopes')\n"
    script += "name = 'g_comprehensions_that_capture_a_captured_name'; print(harness.difference(native[name], native['LOG'], lowered[name], lowered['LOG'], harness.TRIPS['pickled']))"
    done = subprocess.run([interpreter(version), "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
