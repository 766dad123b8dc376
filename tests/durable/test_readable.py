"""Tracebacks, debuggers, coverage and inspect show the author's own lines, also for generators that were restored."""

import bdb
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

import corpus_harness as harness
import pytest

from kwflow import durable

SOURCE = '''"""Module."""


def innermost(depth):
    """Doc."""
    got = yield depth
    return 1 / got


def middle(depth):
    with Guard() as guard:
        for n in range(depth):
            try:
                result = [n, (yield from innermost(n)), guard]
            except ValueError:
                raise
    return result


class Guard:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def outermost():
    found = yield from middle(2)
    return found


async def spoken():
    values = [await innermost(n) for n in range(2)]
    return values
'''


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    file = tmp_path_factory.mktemp("readable") / "readable.py"
    file.write_text(SOURCE)
    native: dict[str, Any] = {"__name__": "readable_native"}
    exec(compile(SOURCE, str(file), "exec"), native)
    return native, vars(durable.load_source("readable", SOURCE, str(file))), str(file)


def lines_of_error(gen: Any, filename: str, trip: Callable[[Any], Any] | None = None) -> list[tuple[str, int | None, str]]:
    try:
        gen.send(None)
        if trip is not None:
            gen = trip(gen)
        gen.send(1)
        if trip is not None:
            gen = trip(gen)
        gen.send(0)
    except ZeroDivisionError as error:
        durable_frames = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename == filename]
        return [(entry.name, entry.lineno, entry.line or "") for entry in durable_frames]
    raise AssertionError("no error")


@pytest.mark.parametrize("trip", ["lowered", "pickled"])
def test_a_traceback_shows_the_lines_the_author_wrote(modules: Any, trip: str) -> None:
    native, lowered, filename = modules
    expected = lines_of_error(native["outermost"](), filename)
    assert [name for name, _, _ in expected] == ["outermost", "middle", "innermost"]
    assert lines_of_error(lowered["outermost"](), filename, harness.TRIPS[trip]) == expected


@pytest.mark.parametrize("trip", ["lowered", "pickled"])
def test_a_traceback_of_async_code_shows_the_lines_the_author_wrote(modules: Any, trip: str) -> None:
    _, lowered, filename = modules
    told = lines_of_error(lowered["spoken"](), filename, harness.TRIPS[trip])
    assert [(name, line) for name, _, line in told][0] == ("spoken", "values = [await innermost(n) for n in range(2)]")
    assert told[-1] == ("innermost", 7, "return 1 / got")


def test_getsource_signature_and_docstring_are_the_authors(modules: Any) -> None:
    native, lowered, _ = modules
    for name in ("innermost", "middle", "outermost", "spoken"):
        function = lowered[name]
        assert inspect.getsource(function) == inspect.getsource(native[name])
        assert inspect.signature(function) == inspect.signature(native[name])
        assert function.__doc__ == native[name].__doc__
        assert function.__code__.co_firstlineno == native[name].__code__.co_firstlineno


class Debugger(bdb.Bdb):
    """The base of pdb. Stops at its breakpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[tuple[str, int, Any]] = []

    def user_line(self, frame: types.FrameType) -> None:
        if self.break_here(frame):
            self.stops.append((frame.f_code.co_name, frame.f_lineno, frame.f_locals.get("n")))
        self.set_continue()


def test_a_breakpoint_on_a_line_of_a_durable_generator_stops_there(modules: Any) -> None:
    _, lowered, filename = modules
    debugger = Debugger()
    debugger.set_break(filename, 14)
    debugger.set_break(filename, 7)
    tracing = sys.gettrace()
    try:
        debugger.runcall(lambda: list(harness.apply(gen, ("send", value)) for gen in [lowered["outermost"]()] for value in (None, 1, 2)))
    finally:
        sys.settrace(tracing)
    assert debugger.stops == [("middle", 14, 0), ("innermost", 7, None), ("middle", 14, 1), ("innermost", 7, None)]


def traced(run: Callable[[], object], filename: str) -> list[int]:
    """The lines that run meanwhile, without immediate repetitions."""
    seen: list[int] = []

    def tracer(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != filename:
            return None
        if event == "line" and seen[-1:] != [frame.f_lineno]:
            seen.append(frame.f_lineno)
        return tracer

    tracing = sys.gettrace()
    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(tracing)
    return seen


def executed(start: Callable[[], Any], filename: str) -> list[int]:
    """The lines of one run."""
    generator = start()
    harness.KEPT.append(generator)
    return traced(lambda: all(harness.apply(generator, op)[0] == "yield" for op in harness.stream("ints")), filename)


@pytest.mark.slow
@pytest.mark.parametrize("module", harness.module_names())
def test_no_line_that_runs_is_missed_by_line_coverage(module: str) -> None:
    """Semantics §5.5. Lines that have no code natively may count as run: a declaration, the head of a def, a `with` that fails."""
    filename = str(harness.CORPUS / f"{module}.py")
    assert set(traced(lambda: harness.load_lowered(module), filename)) == set(traced(lambda: harness.load_native(module), filename))  # the last line of each def counts as run
    native, lowered = harness.load_native(module), harness.load_lowered(module)
    for name in harness.generators_of(native):
        assert set(executed(native[name], filename)) - set(executed(lowered[name], filename)) == set(), name


STEPPED = {
    "loops": "g_straight g_if_elif_else g_if_nested g_while_else g_while_break g_for_continue g_for_target_unpacks g_loop_var_rebound g_return_in_loops",
    "trys": "g_body g_else g_handler_raises_with_context g_several_handlers g_return_value_before_finally g_while_break_through_finally g_retry g_catches_everything",
    "matches": "g_match_body g_match_guard",
    "delegation": "g_from_generator g_from_list g_from_catching g_from_in_expression g_from_in_loop g_from_in_with_and_handler g_from_in_finally g_from_full_class",
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in STEPPED.items() for name in names.split()])
def test_stepping_goes_from_line_to_line_as_in_the_native_code(module: str, name: str) -> None:
    native, lowered = harness.load_native(module), harness.load_lowered(module)
    filename = str(harness.CORPUS / f"{module}.py")
    assert executed(lowered[name], filename) == executed(native[name], filename)
