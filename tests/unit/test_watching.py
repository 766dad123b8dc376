"""What an engine reports of itself: log lines for machines, a progress bar while it restores, and numbers that add up."""

import io
import json
import socket
import struct
import time
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY, Counter, generate_latest
from rich.console import Console

from kwflow.cli.watching import RestoreBar, log_of, watched
from kwflow.config import Config
from kwflow.core.wire import Record
from kwflow.ports import Decision, RunEvent
from kwflow.runners.instances import instant, since_ms
from kwflow.runners.logs import as_json, lines_of
from kwflow.runners.parked import HOLD, holding
from kwflow.runners.stats import SECONDS, Histogram, Seen, Stats
from kwflow.runners.watch import advertised, health, metrics_registry, serve_http
from tests.embedded.test_watch import get

RECORD = Record("workflow-resume", 3, 41, 0, b"order-7", b"{}")
NEVER = 10.0**9


def test_a_log_line_about_a_record_has_its_workflow_id_topic_partition_and_offset() -> None:
    (line,) = lines_of(Decision(logs=("order-7: hello",), counts=("resumed",)), RECORD)
    assert line == "order-7: hello"  # as text, a line is only its text
    assert json.loads(as_json(line, 0)) == {
        "time": "1970-01-01T00:00:00.000+00:00", "level": "info", "message": "order-7: hello",
        "workflow": "order-7", "topic": "workflow-resume", "partition": 3, "offset": 41,
    }  # fmt: skip


def test_a_log_line_with_half_a_surrogate_pair_is_json_too() -> None:
    assert json.loads(as_json("half \ud800"))["message"] == "half \\ud800"


def test_what_was_parked_or_dead_lettered_is_a_warning() -> None:
    for count in ("parked", "dead-letter"):
        (line,) = lines_of(Decision(logs=("trouble",), counts=(count,)), RECORD)
        assert json.loads(as_json(line))["level"] == "warning"


def test_what_only_waits_or_goes_on_is_no_warning_and_a_timer_is_of_its_workflow() -> None:
    for count in ("held", "resumed"):
        (line,) = lines_of(Decision(logs=("fine",), counts=(count,)), msgspec.structs.replace(RECORD, key=b'order-7|{"ref":"1:2"}'))
        said = json.loads(as_json(line, process=3))
        assert (said["level"], said["workflow"], said["process"]) == ("info", "order-7", 3)


def test_a_line_of_one_of_several_processes_has_its_number(capfd: pytest.CaptureFixture[str]) -> None:
    for format, number in (("json", None), ("json", 2), ("text", None), ("text", 2)):
        log_of(Config(log_format=format, process=number or 0, supervisor_pid=number and 1))("hello")
    bare, numbered, *text = capfd.readouterr().err.splitlines()
    assert (json.loads(bare).get("process"), json.loads(numbered)["process"], text) == (None, 2, ["hello", "process 2: hello"])


def test_other_lines_are_json_too_and_bytes_that_are_no_text_do_no_harm() -> None:
    assert json.loads(as_json("plain", 0)) == {"time": "1970-01-01T00:00:00.000+00:00", "level": "info", "message": "plain"}
    (line,) = lines_of(Decision(logs=("x",)), Record("t", 0, 0, 0, b"\xff\x00", None))
    assert json.loads(as_json(line))["workflow"] == "\\xff\x00"


def test_an_instant_is_shown_in_one_form_which_since_takes_and_what_is_none_as_it_is() -> None:
    """In commands and in the console. A timestamp may be anything that its producer took for one."""
    assert instant(1_700_000_000_999) == "2023-11-14 22:13:20+00:00"
    assert since_ms(instant(1_700_000_000_999)) == 1_700_000_000_000
    assert instant(10.0**18) == "1e+18 ms"


def test_a_histogram_counts_up_to_each_bound_and_beyond() -> None:
    histogram = Histogram(SECONDS)
    for value in (0.0005, 0.001, 0.0011, 10.0, 11.0):
        histogram.observe(value)
    buckets = dict(histogram.buckets())
    assert (buckets["0.001"], buckets["0.002"], buckets["10.0"], buckets["+Inf"]) == (2, 3, 4, 5)
    assert round(histogram.total, 4) == 21.0026


def test_forged_names_of_workflows_do_not_fill_the_metrics() -> None:
    """The header of a snapshot that nobody has signed may name anything, also as its outcome. A name that is known goes on being counted."""
    stats = Stats()
    for name in ("order", "x" * 10_000, *map(str, range(2_000)), "order"):
        stats.count((), (RunEvent(name, "started"), RunEvent.ended(name, "result", 5, 3), RunEvent.ended("order", name, 5, 3)))
    assert stats.started["order"] == 2 and stats.started["(others)"] == 1_003
    assert len(stats.started) == 1_000 and len(stats.ended) == 2_000


class Restoring:
    """A runner in the middle of a restore, with as much of it as is watched."""

    def __init__(self, joined: bool = True, owned: list[int] = [0], waiting: list[int] = [3], restoring: dict[int, tuple[int, int]] = {2: (250, 1000)}, turned_s_ago: float = 0) -> None:
        self.stats = Stats()
        self.stats.turned_s = time.monotonic() - turned_s_ago if turned_s_ago < NEVER else 0.0
        self.watched_processors: tuple[object, ...] = ()
        self.joined, self.owned, self.waiting, self.restoring = joined, owned, waiting, restoring

    def seen(self) -> list[Seen]:
        return [Seen("app", "app-resume", self.joined, self.owned, self.waiting, self.restoring, {0: 7})]

    def instances(self) -> None:
        return None


def test_health_is_not_ready_and_says_how_far_it_is_while_a_partition_is_restored() -> None:
    """G6: `GET /health` (live; ready: restored and owning), and metrics of restore progress and partitions."""
    runner = Restoring()
    with serve_http("127.0.0.1:0", [runner], Config()) as port:
        status, said = get(port, "/health")
        assert (status, json.loads(said)["live"], json.loads(said)["ready"]) == (503, True, False)
        assert json.loads(said)["runners"] == [{"name": "app", "input": "app-resume", "owned": [0], "restoring": {"2": [250, 1000]}, "waiting": [3], "lag": 7}]
        text = get(port, "/metrics")[1]
        for line in ('kwflow_restore_ratio{partition="2",topic="app-resume"} 0.25', 'kwflow_restore_ratio{partition="0",topic="app-resume"} 1.0', *(
            f'kwflow_partitions{{state="{state}",topic="app-resume"}} 1.0' for state in ("owned", "restoring", "waiting")
        )):  # fmt: skip
            assert line in text.splitlines()
        runner.restoring = {}
        assert 'kwflow_partitions{state="restoring",topic="app-resume"} 0.0' in get(port, "/metrics")[1].splitlines()


@pytest.mark.parametrize(
    ("runners", "live", "ready"),
    [
        ([{}], True, True),
        ([{"owned": []}], True, True),
        ([{"turned_s_ago": NEVER}], True, False),
        ([{"joined": False, "owned": []}], True, False),
        ([{"waiting": [3]}], True, False),
        ([{"restoring": {2: (999, 1000)}}], True, False),
        ([{}, {"waiting": [3]}], True, False),
        ([{"turned_s_ago": 10 + 40}], True, True),
        ([{"turned_s_ago": 10 + 61}], False, True),
        ([{}, {"turned_s_ago": 10 + 61}], False, True),
    ],
    ids=["owns and restored", "nothing is left for it", "not begun", "not in the group", "waits for a restore", "restores", "one of two waits", "in a long step", "stuck", "one of two stuck"],
)
def test_live_is_a_loop_that_comes_round_and_ready_one_that_has_joined_and_restored_its_share(runners: list[dict[str, Any]], live: bool, ready: bool) -> None:
    found = health([Restoring(**{"waiting": [], "restoring": {}, **runner}) for runner in runners], Config(step_abort_ms=10_000))
    assert (*found[:2], found[2]["live"], found[2]["ready"]) == (live, ready, live, ready)


def test_metrics_of_several_runners_are_added_and_a_restore_is_at_most_whole() -> None:
    one, two = runners = Restoring(restoring={2: (0, 0), 4: (11, 10)}), Restoring()
    for runner, seconds in ((one, 0.5), (two, 0.25), (two, 100.0)):
        runner.stats.commits.observe(seconds)
        runner.stats.counts["resumed"] += 1
    text = generate_latest(metrics_registry(runners, Config())).decode().splitlines()
    for line in (
        'kwflow_steps_total{outcome="resumed"} 3.0', "kwflow_commit_seconds_count 3.0", "kwflow_commit_seconds_sum 100.75", 'kwflow_commit_seconds_bucket{le="0.5"} 2.0',
        'kwflow_restore_ratio{partition="2",topic="app-resume"} 1.0', 'kwflow_restore_ratio{partition="4",topic="app-resume"} 1.0',
    ):  # fmt: skip
        assert line in text


def test_metrics_of_the_process_and_those_that_its_activities_keep_are_there_too() -> None:
    """They are in the registry that prometheus_client has for everybody."""
    charged = Counter("shop_charged_cents", "Cents that the activity `charge` has charged.", ["currency"])
    charged.labels("EUR").inc(250)
    try:
        with serve_http("127.0.0.1:0", [Restoring()], Config()) as port:
            status, said = get(port, "/metrics")
    finally:
        REGISTRY.unregister(charged)
    lines = said.splitlines()
    assert status == 200 and 'shop_charged_cents_total{currency="EUR"} 250.0' in lines
    assert sum(line.startswith("process_cpu_seconds_total ") for line in lines) == 1


def test_an_engine_is_told_of_at_the_address_where_others_reach_it() -> None:
    """It is the address that was bound or configured. Each of several processes has its own port, and the wildcard address becomes the name of the machine."""
    for http, told, process, address in (
        ("10.0.0.7:9100", None, 0, "10.0.0.7:9101"), ("0.0.0.0:9100", None, 0, f"{socket.gethostname()}:9101"), (":9100", None, 0, f"{socket.gethostname()}:9101"),
        ("[::]:0", None, 0, f"{socket.gethostname()}:9101"), ("0.0.0.0:9100", "pod", 2, "pod:9101"), ("0.0.0.0:9100", "pod:80", 2, "pod:82"),
        ("[::]:9100", "fd00::12", 0, "[fd00::12]:9101"), ("[::]:9100", "[fd00::12]:80", 1, "[fd00::12]:81"),
    ):  # fmt: skip
        assert advertised(Config(http=http, http_advertised=told, process=process), 9101) == address


def test_each_of_several_processes_listens_on_a_port_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with watched(Config(http=f"127.0.0.1:{port - 2}", process=2, supervisor_pid=1), [Restoring()], print) as address:
        assert address == f"127.0.0.1:{port}" and get(port, "/health/live")[0] == 200


def test_what_fails_while_it_answers_is_told_to_who_asked_and_not_printed_into_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    runner = Restoring()
    runner.restoring = None  # type: ignore[assignment]
    with serve_http("127.0.0.1:0", [runner], Config()) as port:
        status, said = get(port, "/metrics")
        assert (status, said.partition(":")[0]) == (500, "TypeError")
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert get(port, "/health/live")[0] == 200
    assert capfd.readouterr().err == ""


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


def test_an_instance_that_holds_records_is_counted_once_whatever_its_id_looks_like() -> None:
    held = {HOLD + id + b"\0%020d" % offset: b"" for id in (b"a", b"a\1", b"a\1b", b"ab", b"b", "\u00fc".encode(), b"\x7f") for offset in (3, 20, 100)}
    entries = sorted({**held, b"a": b"", b"\0ended\0a": b"", b"\0timer": b"", b"zz": b""}.items())
    looks = []

    def page(start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        looks.append(start)
        return [entry for entry in entries if entry[0] >= start][:limit]

    assert (holding(page), len(looks)) == (7, 8)
    assert holding(lambda start, limit: None) == 0, "the partition has gone to another engine"
