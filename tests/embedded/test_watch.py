"""GET /health and /metrics of an engine without a broker: what they report is what happened."""

import http.client
import json
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import msgspec
import pytest

from kwflow import durable
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.murmur2 import partition_of
from kwflow.errors import UsageError
from kwflow.runners import instances
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.instances import ALL, Filter, Found, Instances, Page, found_in
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor
from kwflow.runners.watch import serve_http
from tests.embedded.shell import ROOT

SOURCE = """
import kwflow as kw

def main(opts):
    timer = kw.sleep(opts)
    kw.log("it sleeps")
    first = yield kw.race([timer, kw.suspend("first")])
    held = None if first != "unsavable" else open(__file__)
    return (yield kw.suspend("last"))
"""


class Place:
    def __init__(self, directory: pathlib.Path) -> None:
        (directory / "watched.py").write_text(SOURCE)
        module = durable.load_source("watched", SOURCE, str(directory / "watched.py"))
        self.config = Config()
        self.held = Embedded(directory / "state", self.config, sync=False)
        self.processors = [WorkflowProcessor(self.config, Workflows({"main": module.main}, "main"), frozenset(), self.held.incarnation), TimerProcessor(self.config)]

    def send(self, id: str, value: str) -> None:
        self.held.append(self.config.resume_topic, id.encode(), value.encode())

    def run(self) -> None:
        """Until everything is applied."""
        self.held.run(self.processors, lambda: all(not seen.lag[0] for seen in self.held.seen()))


@pytest.fixture
def place(tmp_path: pathlib.Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.held.close()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"{name} is not in\n{text}"
    return float(found[1])


def test_metrics_say_what_became_of_records_timers_snapshots_and_the_cache(place: Place) -> None:
    for id in ("a", "b", "c"):
        place.send(id, "new:1000")
    place.send("bad", "no json")
    with serve_http("127.0.0.1:0", [place.held], place.config) as port:
        assert get(port, "/health")[0] == 503, "nothing runs yet"
        place.run()
        place.send("a", '{"ref": "first", "value": "unsavable"}')
        place.send("b", '{"ref": "first", "value": 1}')
        place.send("c", '{"ref": "nobody"}')
        place.run()
        text = get(port, "/metrics")[1]
        assert value(text, 'kwflow_records_total{outcome="started"}') == 3
        assert value(text, 'kwflow_records_total{outcome="unknown-ref"}') == 1
        assert value(text, 'kwflow_steps_total{outcome="resumed"}') == 1
        assert value(text, 'kwflow_steps_total{outcome="parked"}') == 1
        assert value(text, "kwflow_dead_letters_total") == 2  # the record that was no JSON, and the one about the parked instance
        assert value(text, "kwflow_instances_holding") == 1  # a
        assert value(text, "kwflow_timers_waiting") == 2  # b's was cancelled by its race; the parked a keeps its own
        assert value(text, 'kwflow_instance_cache_total{result="hit"}') == 3
        assert value(text, "kwflow_instances_live") == 2  # b and c; the parked one is not kept live
        assert value(text, "kwflow_snapshot_bytes_count") == 4  # three starts and one resume; the parked one was not saved
        assert 4 * 256 < value(text, "kwflow_snapshot_bytes_sum") < 4 * 4096
        assert {state: value(text, f'kwflow_activities{{state="{state}"}}') for state in ("running", "ready", "left-behind")} == {"running": 0, "ready": 0, "left-behind": 0}
        assert value(text, 'kwflow_lag_records{partition="0",topic="workflow-resume"}') == 0
        assert value(text, 'kwflow_commit_seconds_bucket{le="+Inf"}') >= 2
        assert value(text, "kwflow_commit_seconds_sum") > 0
        assert value(text, 'kwflow_instance_cache_total{result="miss"}') == 0
        assert value(text, "kwflow_rocksdb_bytes") > 0
        assert value(text, "process_resident_memory_bytes") > 1e6
        place.processors[0].live.forget()
        place.send("c", '{"ref": "nobody"}')
        assert value(get(port, "/metrics")[1], 'kwflow_lag_records{partition="0",topic="workflow-resume"}') == 1
        place.run()
        text = get(port, "/metrics")[1]
        assert [value(text, f'kwflow_instance_cache_total{{result="{result}"}}') for result in ("hit", "miss")] == [3, 1]
    with pytest.raises((OSError, http.client.HTTPException)):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)


WAYS = """
import kwflow as kw

@kw.activity(retry=kw.Retry(max_attempts=2, first=0.001), timeout=60)
def attempted(how):
    if how == "refused":
        raise kw.BusinessError("E", "no")
    if how == "broken":
        raise ValueError("broken")
    return how

def worked(how):
    try:
        return (yield attempted(how))
    except (kw.BusinessError, kw.ActivityError):
        yield kw.sleep(0.001)
        return "compensated"

def waits(o):
    if o == "at once":
        return 1
    if o == "fails":
        raise ValueError("wrong")
    yield kw.wait_signal("go")
    held = open(kw.__file__)
    yield kw.suspend("unsavable")

waits.kwflow_restart = True
"""


def test_runs_are_counted_by_workflow_and_outcome_and_attempts_by_activity(place: Place, tmp_path: pathlib.Path) -> None:
    """Each way in which a run begins and ends is counted once: also of one that ends in its first step, makes way for another, is forked, or is started by a signal."""
    module = durable.load_source("ways", WAYS, str(tmp_path / "ways.py"))
    place.processors[0] = WorkflowProcessor(place.config, Workflows({"worked": module.worked, "waits": module.waits}, "waits"), frozenset(), place.held.incarnation)

    def send(id: str, value: str, **headers: str) -> None:
        place.held.append(place.config.resume_topic, id.encode(), value.encode(), tuple((f"kwflow-{name}", text.encode()) for name, text in headers.items()))

    for how in ("fine", "refused", "broken"):
        send(how, json.dumps(how).join(("new:", "")), workflow="worked")
    for id in ("answered", "cancelled", "terminated", "replaced", "parked"):
        send(id, "new:null")
    for id in ("at once", "fails"):
        send(id, f'new:"{id}"')
    send("cancelled", "null", op="cancel")
    send("terminated", "null", op="terminate")
    send("replaced", "new:null")
    send("replaced", 'new:"at once"')
    send("answered", '{"id": "copy"}', op="fork")
    send("signalled", '{"name": "later", "value": 1, "start": {"workflow": "waits"}}', op="signal")
    send("parked", '{"name": "go"}', op="signal")
    send("parked", "null", op="retry")
    send("parked", "null", op="terminate")
    ends = {"result": 2, "error": 1, "cancelled": 1, "terminated": 4}  # in state "terminated": the parked one, and two that made way
    with serve_http("127.0.0.1:0", [place.held], place.config) as port:
        place.held.run(place.processors, lambda: 'outcome="result",workflow="worked"} 3.0' in get(port, "/metrics")[1])
        text = get(port, "/metrics")[1]
    assert value(text, 'kwflow_workflows_started_total{workflow="worked"}') == 3
    assert value(text, 'kwflow_workflows_started_total{workflow="waits"}') == 11  # with two that made way, one fork, and one that a signal started
    assert value(text, 'kwflow_workflows_parked_total{workflow="waits"}') == 2
    for outcome, count in ends.items():
        assert value(text, f'kwflow_workflow_seconds_count{{outcome="{outcome}",workflow="waits"}}') == count, outcome
    assert value(text, 'kwflow_workflow_seconds_bucket{le="+Inf",outcome="result",workflow="worked"}') == 3
    assert value(text, 'kwflow_workflow_seconds_sum{outcome="result",workflow="worked"}') > 0
    for outcome, count in {"result": 1, "business-error": 1, "error": 2}.items():
        assert value(text, f'kwflow_activity_seconds_count{{activity="attempted",outcome="{outcome}"}}') == count, outcome
    assert value(text, 'kwflow_activity_wait_seconds_count{activity="attempted"}') == 4
    assert value(text, 'kwflow_activity_wait_seconds_bucket{activity="attempted",le="60.0"}') == 4
    assert value(text, "kwflow_timer_late_seconds_count") == 3  # a pause before the second attempt, and two of the workflows
    assert value(text, 'kwflow_timer_late_seconds_bucket{le="60.0"}') == 3


def test_health_is_live_and_ready_once_the_loop_runs_and_no_longer_live_when_it_is_stuck(place: Place) -> None:
    with serve_http("127.0.0.1:0", [place.held], place.config) as port:
        place.send("a", "new:1000")
        place.run()
        status, said = get(port, "/health")
        assert (status, json.loads(said)["live"], json.loads(said)["ready"]) == (200, True, True)
        assert [runner["owned"] for runner in json.loads(said)["runners"]] == [[0], [0]]
        place.held.stats.turned_s = time.monotonic() - place.config.step_abort_ms / 1000 - 61
        assert (get(port, "/health")[0], get(port, "/health/live")[0], get(port, "/health/ready")[0]) == (503, 503, 200)
        assert get(port, "/elsewhere")[0] == 404


def test_instances_are_told_as_the_command_line_tells_them(place: Place) -> None:
    for number in range(3):
        place.send(f"order {number}/ä", "new:1000")
    with serve_http("127.0.0.1:0", [place.held], place.config) as port:
        place.run()
        status, said = get(port, "/instances")
        rows = json.loads(said)
        assert (status, [row["id"] for row in rows]) == (200, [f"order {number}/ä" for number in range(3)])
        assert [wait["ref"] for wait in rows[0]["waits"]] == ["0:1", "first"]
        status, said = get(port, f"/instances/{quote('order 1/ä', safe='')}")
        assert (status, json.loads(said)["workflow"], json.loads(said)["seal"]) == (200, "main", "unsigned")
        assert "code" not in json.loads(said)
        assert get(port, "/instances/nobody")[0] == 404
        assert get(port, "/instances/%00hold")[0] == 404, "an engine's own entries are nobody's"


def test_an_engine_gives_the_newest_of_those_that_are_asked_for_and_counts_all_of_them(place: Place) -> None:
    """So a page of them does not move a million rows."""
    for number in range(5):
        place.send(f"order-{number}", "new:1000")
    place.send("other", "new:1000")
    place.run()
    with serve_http("127.0.0.1:0", [place.held], place.config) as port:
        status, body = get(port, "/instances?id=order-&status=waiting&limit=2")
        assert status == 200 and body.startswith(" "), "who waits is told that it is on its way"
        assert ([row["id"] for row in json.loads(body)["rows"]], json.loads(body)["counts"]) == (["order-4", "order-3"], {"waiting": 5})
        assert [row["id"] for row in json.loads(get(port, "/instances?id=*ther")[1])] == ["other"]
        wrong = {
            "limit=0": "1 to 10000", "limit=10001": "without a limit, all are returned", "limit=x": "there are: status, workflow, id, since, where, limit", "color=red": "color",
            "status=dead": "a status must be one of", "id=a&id=b": "given twice",
        }  # fmt: skip
        for query, said in wrong.items():
            status, body = get(port, f"/instances?{query}")
            assert status == 400 and said in json.loads(body)["error"], query


def test_the_newest_are_the_same_however_few_are_kept_while_all_are_looked_through() -> None:
    """It takes as long as the list without a limit. To sort the rows that are kept again for each page held up an engine of 60,000 instances for 44 s."""
    stored = {b"%05d" % number: snapshot.save_ended({"id": "", "workflow": "w", "start_id": "", "ended": number * 7919 % 5003}) for number in range(5003)}
    served = Instances("engine", 1, {0: pages(*stored.items())})
    all_of_them = json.loads(b"".join(instances.newest(served, ALL, 10_000)))["rows"]
    assert [row["changed"] for row in all_of_them] == list(reversed(range(5003)))
    for limit in (1, 100, 5003):
        assert json.loads(b"".join(instances.newest(served, ALL, limit))) == {"rows": all_of_them[:limit], "counts": {"ended": 5003}}


def test_however_many_look_through_all_instances_one_looks_at_a_time() -> None:
    """The engine's own thread gets its turn after each page. Of four requests at once, each took as much of the processor as the engine had."""
    looking, most = 0, []

    def page(start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        nonlocal looking
        looking += 1
        most.append(looking)
        time.sleep(0.001)
        looking -= 1
        return [(b"%s%d" % (start, number), b"KWF?") for number in range(limit)] if len(start) < 10 else []

    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(b"".join(instances.array(Instances("engine", 1, {0: page}))))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1 and len(answers) == 8 and len(json.loads(answers[0])) > 500 and max(most) == 1


def test_what_an_engine_answers_is_a_list_of_instances_or_counts_for_nothing() -> None:
    """An older engine ignores the parameters. One of those takes a damaged header for a waiting one, and the rest is read from the changelog."""
    row = {"id": "a", "workflow": "w", "status": "waiting", "changed": 1, "waits": [], "status_value": {"n": 1}, "outcome": None, "start_id": ""}
    assert found_in([row, {**row, "id": "b"}], Filter(id="a"), 5) == found_in({"rows": [row], "counts": {"waiting": 1}}, Filter(id="a"), 5) == Found([row], {"waiting": 1})
    for answer in ([{"id": "a"}], [3], 3, None, {"rows": 3}, {"error": "no"}, [{**row, "changed": "now"}], [{**row, "waits": [1]}], {"rows": [row], "counts": 1}):
        with pytest.raises(msgspec.ValidationError):
            found_in(answer, ALL, 5)


def pages(*kept: tuple[bytes, bytes]) -> Page:
    """The pages of a partition that has these instances."""
    return lambda start, limit: [entry for entry in sorted(kept) if entry[0] >= start][:limit]


def test_an_instance_of_a_partition_that_is_elsewhere_is_not_called_unknown(place: Place) -> None:
    """421: the asking side then reads the changelog. 404 would tell a user that there is no such instance."""
    place.send("w", "new:1000")
    place.held.append(place.config.resume_topic, b"w", b'{"name":"s"}', (("kwflow-op", b"signal"), ("kwflow-id", b"once")))
    place.run()
    stored = EmbeddedStore(place.held.db, place.config.changelog_topic).get(b"w") or b""
    home = partition_of(b"w", 4)
    for served, status in (({home: pages((b"w", stored))}, 200), ({home: pages()}, 404), ({}, 421), ({home + 1: pages()}, 421), ({home: lambda *_: None}, 421), ({home: pages((b"w", b"KWF?"))}, 500)):
        assert instances.one(Instances("engine", 4, served), b"w", ())[0] == status, served
    shown = json.loads(instances.one(Instances("engine", 4, {home: pages((b"w", stored))}), b"w", ())[1])
    assert shown["status"] == "waiting" and {"v", "code", "lowering", "key", "ids"}.isdisjoint(shown)


def test_all_instances_of_all_pages_are_told_a_damaged_one_too_and_what_is_cut_off_is_no_json(place: Place) -> None:
    """If a partition is given away in the middle, the list is left without its end."""
    place.send("w", "new:1000")
    place.run()
    stored = EmbeddedStore(place.held.db, place.config.changelog_topic).get(b"w") or b""
    entries = [(b"%04d" % number, stored if number else b"KWF?") for number in range(1001)]
    rows = json.loads(b"".join(instances.array(Instances("engine", 3, {0: pages(*entries[:500]), 1: pages(*entries[500:], (b"\0own", b"x")), 2: pages()}))))
    assert [row["id"] for row in rows] == [key.decode() for key, _ in entries]
    assert [row["status"] for row in rows[:2]] == ["damaged", "waiting"]
    assert b"".join(instances.array(Instances("engine", 1, {0: pages()}))).strip() == b"[]"
    few = list(instances.array(Instances("engine", 2, {0: pages(*entries[:501]), 1: pages(*entries[501:])}), Filter(id="*0500")))
    assert few[0] == b" " and [row["id"] for row in json.loads(b"".join(few))] == ["0500"], "five seconds without a byte, and whoever asked reads the changelog"
    with pytest.raises(json.JSONDecodeError):
        json.loads(b"".join(instances.array(Instances("engine", 2, {0: pages(*entries[:2]), 1: lambda *_: None}))))
    some = {0: pages(*entries[:500]), 1: pages(*entries[500:])}
    found = json.loads(b"".join(instances.newest(Instances("engine", 2, some), Filter(id="00"), 3)))
    assert (len(found["rows"]), found["counts"]) == (3, {"waiting": 99, "damaged": 1})
    assert b"".join(instances.newest(Instances("engine", 2, {**some, 2: lambda *_: None}), ALL, 3)).strip() == b""


def test_the_number_of_waiting_timers_is_right_after_replacing_cancelling_firing_and_for_tables_that_had_no_count(place: Place) -> None:
    timers = place.processors[1]
    assert isinstance(timers, TimerProcessor)

    def waiting() -> int:
        place.run()
        return next(seen.timers for seen in place.held.seen() if seen.timers is not None)

    def set_timer(key: str, delay: str | None) -> None:
        place.held.append(place.config.scheduler_topic, key.encode(), delay.encode() if delay is not None else None)

    for key, delay, count in (("a|1", "100000", 1), ("a|2", "100000", 2), ("a|1", "200000", 2), ("a|1", "0", 1), ("a|1", "0", 1), ("a|2", None, 0), ("a|3", "bad", 0)):
        set_timer(key, delay)
        assert waiting() == count, (key, delay)
    set_timer("a|4", "100000")
    set_timer("a|5", "1")
    place.held.run(place.processors, lambda: place.held.counts["fired"] == 1)
    assert waiting() == 1
    place.held.db.delete(b"S" + place.config.timers_changelog_topic.encode() + b"\0\0timers")
    assert waiting() == 1
    set_timer("a|6", "100000")
    assert waiting() == 2


def test_an_address_that_is_none_or_taken_is_one_clear_line(place: Place) -> None:
    for where in ("nonsense", "localhost:", "localhost:99999"):
        with pytest.raises(UsageError, match="HOST:PORT"), serve_http(where, [place.held], place.config):
            pass
    if socket.has_ipv6:
        with serve_http("[::1]:0", [place.held], place.config) as port, urllib.request.urlopen(f"http://[::1]:{port}/health/live", timeout=10) as answer:
            assert answer.status == 200
    with serve_http("127.0.0.1:0", [place.held], place.config) as port, pytest.raises(UsageError, match="in use"), serve_http(f"127.0.0.1:{port}", [place.held], place.config):
        pass


WARNS = """
import logging
import kwflow as kw

logging.getLogger("warns").setLevel(logging.INFO)

def noted():
    yield kw.suspend("r")

def main(opts):
    noted()
    logging.getLogger("some.library").info("nobody asked for this")
    logging.getLogger("some.library").warning("disk %s is full", opts)
    logging.getLogger("warns").info("asked for %s", opts)
    kw.log("in the step")
    return 1
    yield
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_what_libraries_and_authors_log_and_warnings_of_the_loader_are_lines_of_the_log_unless_the_module_has_a_log_of_its_own(own: bool, tmp_path: pathlib.Path) -> None:
    (tmp_path / "warns.py").write_text(WARNS + ("logging.basicConfig(format='mine: %(message)s')\n" if own else ""))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kwflow"]
    subprocess.run([*command, "start", "w", "--input", "7", "--embedded", "state"], cwd=tmp_path, env=environment, check=True, timeout=60)
    with subprocess.Popen([*command, "engine", "warns.py", "--embedded", "state", "--log-format", "json"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as engine:
        assert engine.stderr is not None
        lines = []
        for line in engine.stderr:
            lines.append(line)
            if "in the step" in line:
                engine.terminate()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line for line in lines if not line.startswith("{")] == (["mine: disk 7 is full\n", "mine: asked for 7\n"] if own else [])
    assert ("warns: asked for 7" in [line["message"] for line in said if line["level"] == "info"]) is not own
    warned = [line["message"] for line in said if line["level"] == "warning"]
    assert "warns.py:11: LostCallWarning: " in warned[0]
    assert warned[1:] == ([] if own else ["some.library: disk 7 is full"])


@pytest.mark.slow
def test_the_engine_answers_and_logs_json_by_option(tmp_path: pathlib.Path) -> None:
    (tmp_path / "watched.py").write_text(SOURCE)
    command = [sys.executable, "-m", "kwflow", "engine", "watched.py", "--embedded", "state", "--http", "127.0.0.1:0", "--log-format", "json"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    engine = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert engine.stderr is not None
    try:
        lines: list[dict[str, object]] = []

        def until(words: str) -> dict[str, object]:
            while not lines or words not in str(lines[-1]["message"]):
                line = engine.stderr.readline() if engine.stderr is not None else ""
                assert line, lines
                lines.append(json.loads(line))
            return lines[-1]

        port = int(str(until("answered on port")["message"]).rsplit(" ", 1)[1])
        subprocess.run([*command[:3], "start", "order-7", "--input", "1000", "--embedded", "state"], cwd=tmp_path, env=environment, check=True, timeout=60)
        said = until("it sleeps")
        assert {name: said[name] for name in ("workflow", "topic", "partition", "offset", "level")} == {"workflow": "order-7", "topic": "workflow-resume", "partition": 0, "offset": 0, "level": "info"}
        assert value(get(port, "/metrics")[1], 'kwflow_records_total{outcome="started"}') == 1
        engine.terminate()
        until("records: ")
        assert engine.wait(30) == 0
    finally:
        engine.kill()
        engine.wait()
        engine.stderr.close()
