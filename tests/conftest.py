"""The time of each suite at the end of every run (the budget of `make test` is per suite)."""

import collections

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: dict[str, float] = collections.defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("/")[1]] += report.duration
    terminalreporter.write_line("suites: " + ", ".join(f"{name} {time:.0f} s" for name, time in sorted(seconds.items())))
