"""For all tests: the time of each suite at the end of a run (the budget of `make test` is per suite), no deadline for examples, no process left an engine."""

import collections
import gc
from collections.abc import Iterator

import hypothesis
import pytest

from kwflow import durable

hypothesis.settings.register_profile("kwflow", deadline=None)  # no test measures time: other work may share the machine
hypothesis.settings.load_profile("kwflow")


@pytest.fixture(autouse=True)
def no_engine_is_left() -> Iterator[None]:
    """A runner makes its process an engine, in which dropped generators are forgotten (semantics §3.3); undo that for the next test."""
    durable.set_abandoning(False, everywhere=True)
    yield
    durable.set_abandoning(False, everywhere=True)


@pytest.fixture(autouse=True, scope="module")
def what_a_file_leaves_is_not_walked_in_the_next() -> Iterator[None]:
    yield
    _pass_over()


def pytest_collection_finish() -> None:
    _pass_over()


def _pass_over() -> None:
    """Exclude all present objects from further garbage collections.

    They are the thousands of tests that pytest holds, and what a file of tests has left.  To traverse them in each collection took half of the
    processor time of tests/spec.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: dict[str, float] = collections.defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("/")[1]] += report.duration
    terminalreporter.write_line("suites: " + ", ".join(f"{name} {time:.0f} s" for name, time in sorted(seconds.items())))
