"""What an engine says of itself: log lines for machines, a bar while it restores, numbers that add up."""

import io
import json

from rich.console import Console

from kwflow.cli.watching import RestoreBar
from kwflow.core.wire import Record
from kwflow.ports import Decision
from kwflow.runners.logs import as_json, lines_of
from kwflow.runners.stats import SECONDS, Histogram

RECORD = Record("workflow-resume", 3, 41, 0, b"order-7", b"{}")


def test_a_log_line_about_a_record_has_its_workflow_id_topic_partition_and_offset() -> None:
    (line,) = lines_of(Decision(logs=("order-7: hello",), counts=("resumed",)), RECORD)
    assert line == "order-7: hello"  # as text it is only its text
    assert json.loads(as_json(line, 0)) == {
        "time": "1970-01-01T00:00:00.000+00:00", "level": "info", "message": "order-7: hello",
        "workflow": "order-7", "topic": "workflow-resume", "partition": 3, "offset": 41,
    }  # fmt: skip


def test_what_was_parked_or_dead_lettered_is_a_warning() -> None:
    for count in ("parked", "dead-letter"):
        (line,) = lines_of(Decision(logs=("trouble",), counts=(count,)), RECORD)
        assert json.loads(as_json(line))["level"] == "warning"


def test_other_lines_are_json_too_and_bytes_that_are_no_text_do_no_harm() -> None:
    assert json.loads(as_json("plain", 0)) == {"time": "1970-01-01T00:00:00.000+00:00", "level": "info", "message": "plain"}
    (line,) = lines_of(Decision(logs=("x",)), Record("t", 0, 0, 0, b"\xff\x00", None))
    assert json.loads(as_json(line))["workflow"] == "\\xff\x00"


def test_a_histogram_counts_up_to_each_bound_and_beyond() -> None:
    histogram = Histogram(SECONDS)
    for value in (0.0005, 0.001, 0.0011, 10.0, 11.0):
        histogram.observe(value)
    buckets = dict(histogram.buckets())
    assert (buckets["0.001"], buckets["0.002"], buckets["10.0"], buckets["+Inf"]) == (2, 3, 4, 5)
    assert round(histogram.total, 4) == 21.0026


def test_a_restore_has_a_bar_on_a_terminal_and_none_elsewhere() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        bar = RestoreBar(Console(file=out, force_terminal=terminal, width=120))
        bar.look({})
        assert out.getvalue() == ""
        bar.look({("app-state-changelog", 2): (0, 1000)})
        bar.look({("app-state-changelog", 2): (600, 1000), ("app-state-changelog", 3): (1, 10)})
        if bar._progress is not None:
            bar._progress.refresh()
        bar.look({("app-state-changelog", 3): (10, 10)})
        bar.look({})
        shown = out.getvalue()
        assert ("app-state-changelog[2]" in shown and "600/1000" in shown) is terminal
        assert bar._progress is None
