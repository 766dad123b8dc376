"""The command line as its user sees it: help, inspection, dead letters, signals in the middle of a step, errors in one line."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
import typer
from confluent_kafka import KafkaError, KafkaException
from typer.testing import CliRunner

import kwflow
from kwflow import durable
from kwflow.cli import app
from kwflow.cli.shared import error_text, exit_code, json_option
from kwflow.config import Config
from kwflow.core import wire
from kwflow.core.contract import Workflows
from kwflow.core.wire import Output
from kwflow.errors import FencedError, TransportError, UsageError
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import submit
from kwflow.runners.groups import Group
from kwflow.runners.loop import WorkflowProcessor
from tests.embedded.shell import ROOT, TRIP, Shell

SLOW = """
import time
import kwflow as kw
kw.declare_topics("slow-out")

def main(opts):
    try:
        yield kw.suspend("go")
        kw.log("step begins")
        begun = time.monotonic()
        while time.monotonic() - begun < 2:
            sum(range(1000))
        kw.output("done", "slow-out")
    except BaseException:
        kw.output("compensated", "slow-out")
        raise
    yield kw.suspend("end")
"""

SHOWN = """
import kwflow as kw

class Order:
    def __init__(self):
        self.items = ["teapot"]

def main(opts):
    order, count, timer = Order(), 3, kw.sleep(60)
    yield kw.suspend("r")
    return count
"""


def commands() -> list[list[str]]:
    found: list[list[str]] = []

    def walk(group: object, path: list[str]) -> None:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                walk(command, [*path, name])
            else:
                found.append([*path, name])

    walk(typer.main.get_command(app), [])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    """ARCHITECTURE §2: `kwflow …`."""
    said = CliRunner().invoke(app, [*command, "--help"])
    assert said.exit_code == 0
    assert f"Example: kwflow {' '.join(command)}" in said.output


def test_the_version_is_that_of_the_package() -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert (said.exit_code, said.output) == (0, f"kwflow {kwflow.__version__}\n")
    assert CliRunner().invoke(app, ["list", "--embedded", "/nowhere"], auto_envvar_prefix="KWFLOW", env={"KWFLOW_VERSION": "1"}).exit_code != 0, "a deployment may well have a variable of that name"


@pytest.mark.slow
def test_the_answer_that_run_proposes_is_one_that_it_takes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "asking.py").write_text("import kwflow as kw\ndef main(opts):\n    return (yield kw.suspend('go'))\n")
    command = [sys.executable, "-m", "kwflow", "run", "asking.py", "--embedded", "where it is"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        proposed = running.stderr.readline().rpartition("answer with: kwflow ")[2].replace("JSON", "42").strip()
        done = subprocess.run([sys.executable, "-m", "kwflow", *shlex.split(proposed)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert running.stdout.read() == "42\n"


@pytest.mark.slow
def test_run_says_that_it_goes_on_why_it_cannot_what_it_waits_for_and_where_it_failed(tmp_path: pathlib.Path) -> None:
    """It did not say that a run that is already there keeps its first input, and was silent about a parked workflow and about signals."""
    text = "import kwflow as kw\ndef main(opts):\n    held = HELD\n    yield kw.wait_signal('go')\n    raise ValueError(opts)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "kwflow", *arguments]

    def answer(proposed: str) -> None:
        done = subprocess.run(command(*shlex.split(proposed)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def until(running: subprocess.Popen[str], said: str) -> str:
        assert running.stderr is not None
        return next(line.rstrip() for line in running.stderr if said in line)

    (tmp_path / "asking.py").write_text(text.replace("HELD", "open('asking.py')"))
    with subprocess.Popen(command("run", "asking.py", "--input", "1"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert until(running, "once that is fixed") == "once that is fixed: kwflow dead-letters retry run --embedded kwflow-run"
        running.terminate()
    (tmp_path / "asking.py").write_text(text.replace("HELD", "1"))
    with subprocess.Popen(command("run", "asking.py", "--input", "2"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
        begun = until(running, "run has already started and continues where it was, parked: UnsavableError: variable 'held' of main (asking.py:4)")
        assert begun.endswith("; it keeps its first input: use another --id to start another")
        answer(until(running, "once that is fixed").partition(": kwflow ")[2])
        said, _, proposed = until(running, "waits for").partition("; answer with: kwflow ")
        assert said == "waits for signal go in main (asking.py:4)"
        answer(proposed.replace("JSON", "42"))
        said = "run: ended with ValueError in main (asking.py:5); kwflow show has the details"
        assert running.stderr is not None and running.stderr.read().splitlines() == [said, '"ValueError: 1"', "  asking:5 main"]
    assert running.returncode == 1


MANY = """
import kwflow as kw

def main(count):
    for number in range(0, count, 100):
        yield kw.all([kw.start_child(child, n) for n in range(number, number + 100)])
    return count

@kw.workflow
def child(number):
    return number
    yield
"""


@pytest.mark.slow
def test_run_finds_its_outcome_behind_those_of_a_thousand_children(tmp_path: pathlib.Path) -> None:
    (tmp_path / "many.py").write_text(MANY)
    command = [sys.executable, "-m", "kwflow", "run", str(tmp_path / "many.py"), "--input", "1100", "--embedded", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1100\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(42, 0), (-1, 1)])
def test_run_tells_the_outcome_from_what_the_author_writes_there_and_by_its_kind(tmp_path: pathlib.Path, number: int, code: int) -> None:
    """KW-12, with one topic for results and errors."""
    (tmp_path / "writes.py").write_text("""
import kwflow as kw
def main(number):
    kw.output_json("on its way", "workflow-result")
    yield kw.sleep(0.01)
    if number < 0:
        raise ValueError(number)
    return number
""")
    command = [sys.executable, "-m", "kwflow", "run", str(tmp_path / "writes.py"), "--input", str(number), "--embedded", str(tmp_path / "state")]
    environment = {**os.environ, "KWFLOW_ERROR_TOPIC": "workflow-result"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("42\n" if code == 0 else "", code), done.stderr


@pytest.mark.slow
def test_run_ends_when_its_start_is_refused(tmp_path: pathlib.Path) -> None:
    """It waited for the outcome of a run that had never begun."""
    (tmp_path / "counting.py").write_text("def main(number: int):\n    return number\n    yield\n")
    for given, code, said in (('"two"', 1, "does not accept this input: Expected `int`, got `str`"), ("2", 0, "")):
        command = [sys.executable, "-m", "kwflow", "run", str(tmp_path / "counting.py"), "--input", given, "--embedded", str(tmp_path / "state")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, said in done.stderr.splitlines()[-1] if said else True) == (code, "" if code else "2\n", True), done.stderr


def test_run_is_refused_where_no_outcome_is_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KW-12."""
    monkeypatch.setenv("KWFLOW_ERROR_TOPIC", "")
    (tmp_path / "adding.py").write_text("def main(opts):\n    return sum(opts)\n    yield\n")
    done = CliRunner().invoke(app, ["run", str(tmp_path / "adding.py"), "--embedded", str(tmp_path / "state")])
    assert isinstance(done.exception, UsageError) and "set result_topic and error_topic in the configuration" in str(done.exception)


@pytest.mark.slow
def test_what_records_hold_is_printed_as_it_is_and_no_terminal_obeys_it(tmp_path: pathlib.Path) -> None:
    """A problem of every program that prints what it was sent: markup, emoji codes, escape sequences."""
    (tmp_path / "echo.py").write_text("import kwflow as kw\ndef main(opts):\n    yield kw.sleep(0)\n    return opts\n")
    state = ["--embedded", str(tmp_path / "state")]
    id, value = "[red]urn:key:7", '{"at":"urn:key:7 :smile: [bold]x"}'
    done = subprocess.run([sys.executable, "-m", "kwflow", "run", str(tmp_path / "echo.py"), "--id", id, "--input", value, *state], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == value + "\n"
    submit(tmp_path / "state", "workflow-resume", b"waits \x1b[31m", b"new:1")
    submit(tmp_path / "state", "workflow-resume", b"\x1b]0;title\x07|", b"\x1b[2J\xff")
    with subprocess.Popen([sys.executable, "-m", "kwflow", "engine", str(tmp_path / "echo.py"), *state], stderr=subprocess.PIPE, text=True) as engine:
        assert engine.stderr is not None
        engine.stderr.readline()
        said = engine.stderr.readline()
        engine.terminate()
        said += engine.stderr.read()
    shown = "".join(CliRunner().invoke(app, [*command, *state]).output for command in (["tail", "workflow-result"], ["dead-letters", "list"], ["dead-letters", "show", "0:0"], ["list"]))
    assert f"{id} {value}\n" in shown and r"value  \x1b[2J\xff" in shown
    assert "\x1b" not in said + shown


@pytest.mark.parametrize("command", ["start", "resume", "run", "code"])
@pytest.mark.parametrize("id", ["", "a|b", "x" * 513])
def test_a_wrong_id_is_refused_before_anything_is_written(tmp_path: pathlib.Path, command: str, id: str) -> None:
    """wire.md: the engine would dead-letter it, and `run` would wait for it for ever."""
    (tmp_path / "adding.py").write_text("def main(opts):\n    return sum(opts)\n    yield\n")
    arguments = {"start": [id], "resume": [id, "r"], "run": [str(tmp_path / "adding.py"), "--id", id], "code": ["migrate", id]}[command]
    done = CliRunner().invoke(app, [command, *arguments, "--embedded", str(tmp_path / "state")])
    assert isinstance(done.exception, UsageError) and str(done.exception).startswith(repr(id))
    assert not (tmp_path / "state").exists()


def test_text_that_is_no_json_is_answered_with_how_it_is_written() -> None:
    for text, proposed in (("booked", """--value '"booked"'"""), ("2026-01-31", """--value '"2026-01-31"'""")):
        with pytest.raises(UsageError, match=f"{proposed}$"):
            json_option(text, "--value")
    for text, why in (('{"a', "truncated$"), ('"\udcff"', "surrogates")):
        with pytest.raises(UsageError, match=why):
            json_option(text, "--value")


def test_an_empty_answer_is_none(tmp_path: pathlib.Path) -> None:
    """An unset shell variable would have answered with null."""
    done = CliRunner().invoke(app, ["resume", "w", "r", "--value", "", "--embedded", str(tmp_path / "state")])
    assert isinstance(done.exception, UsageError) and str(done.exception).startswith("--value is not JSON")
    assert not (tmp_path / "state").exists()


def test_a_timestamp_that_is_no_time_hides_no_instance(tmp_path: pathlib.Path) -> None:
    """Kafka before 4.0 accepts any timestamp, such as one in microseconds."""
    config, held = Config(), Embedded(tmp_path / "state", sync=False)
    module = durable.load_source("timed", "import kwflow as kw\ndef main(opts):\n    yield kw.suspend('r')\n", "timed.py")
    held.append_all([Group((Output(config.resume_topic, b"w", b"new:null", (), 1_700_000_000_000_000),))])
    held.step([WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation)])
    held.close()
    for command in (["list"], ["show", "w"]):
        shown = CliRunner().invoke(app, [*command, "--embedded", str(tmp_path / "state")])
        assert "1700000000000000 ms" in shown.output.replace("\n", ""), shown.exception


def test_show_says_where_a_workflow_failed(tmp_path: pathlib.Path) -> None:
    """K20: the traceback is only in the error record, which show does not read."""
    config, held = Config(), Embedded(tmp_path / "state", sync=False)
    module = durable.load_source("failing", "def main(opts):\n    return opts['missing']\n    yield\n", "shop/failing.py")
    held.append_all([Group((Output(config.resume_topic, b"w", b"new:{}", (("kwflow-start-id", b"s"),)),))])
    held.step([WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation)])
    held.close()
    shown = CliRunner().invoke(app, ["show", "w", "--embedded", str(tmp_path / "state")]).output
    assert shown.splitlines()[0] == "w  main  ended"  # nothing about a signature where there are no keys
    assert shown.splitlines()[-2:] == ["""outcome error: "KeyError: 'missing'\"""", "  in main  failing.py:2"]


def test_show_names_no_place_of_a_wait_that_nobody_awaits_now(tmp_path: pathlib.Path) -> None:
    config, held = Config(), Embedded(tmp_path / "state", sync=False)
    source = "import kwflow as kw\ndef main(opts):\n    late = kw.sleep(60)\n    yield kw.race([late, 5], cancel_rest=False)\n    yield kw.suspend('r')\n"
    module = durable.load_source("deadlines", source, "deadlines.py")
    held.append_all([Group((Output(config.resume_topic, b"w", b"new:{}"),))])
    held.step([WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation)])
    held.close()
    timer, answer = CliRunner().invoke(app, ["show", "w", "--embedded", str(tmp_path / "state")]).output.splitlines()[-2:]
    assert timer.startswith("  timer 0:1  since ") and answer.startswith("  suspension r  main  deadlines.py:5  since ")


def test_code_migrate_asks_for_none_if_one_of_them_is_not_there_or_has_ended(tmp_path: pathlib.Path) -> None:
    config, held = Config(), Embedded(tmp_path / "state", sync=False)
    module = durable.load_source("migrating", "import kwflow as kw\ndef main(opts):\n    if opts:\n        yield kw.suspend('r')\n", "migrating.py")
    held.append_all([Group((Output(config.resume_topic, id, b"new:" + value, (("kwflow-start-id", b"s"),)),)) for id, value in ((b"waits", b"1"), (b"over", b"0"))])
    held.step([WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation)])
    held.close()

    def migrate(*ids: str) -> str:
        done = CliRunner().invoke(app, ["code", "migrate", *ids, "--embedded", str(tmp_path / "state"), "--command-timeout", "0.1"])
        return str(done.exception)

    assert (migrate("waits", "nobody"), migrate("waits", "over")) == ("no instance 'nobody'", "'over' has ended")
    assert "no reply within 0.1 s; perhaps no engine is running" in migrate("waits")
    held = Embedded(tmp_path / "state", sync=False)
    asked = [(record.key, wire.header(record, "kwflow-op")) for record in held.read(config.resume_topic)[2:]]
    assert asked == [(b"waits", "migrate"), (b"waits", "query")], "and whether it is paused, as there was no reply"
    held.close()


@pytest.mark.slow
def test_a_table_has_its_limit_and_says_so_json_has_all(tmp_path: pathlib.Path) -> None:
    config = Config()
    held = Embedded(tmp_path / "state", config, sync=False)
    module = durable.load_source("listed", "import kwflow as kw\ndef main(opts):\n    yield kw.suspend('r')\n", "listed.py")
    for number in range(1002):
        held.append(config.resume_topic, b"w%05d" % number, b"new:null")
    held.run([WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation)], lambda: held.counts["started"] == 1002)
    held.close()
    shown = CliRunner().invoke(app, ["list", "--embedded", str(tmp_path / "state")]).output
    assert "w01001" in shown and "w00001" not in shown and "and 2 more that changed earlier: filter with" in shown
    everything = CliRunner().invoke(app, ["list", "--json", "--embedded", str(tmp_path / "state")]).output
    assert [row["id"] for row in json.loads(everything)] == [f"w{number:05}" for number in range(1002)]


def test_options_are_environment_variables_too(tmp_path: pathlib.Path) -> None:
    """ARCHITECTURE §2: `kwflow …`."""
    environment = {**os.environ, "KWFLOW_EMBEDDED": str(tmp_path / "s"), "KWFLOW_RUN_INPUT": "[20, 22]"}
    (tmp_path / "adding.py").write_text("def main(opts):\n    return sum(opts)\n    yield\n")
    done = subprocess.run([sys.executable, "-m", "kwflow", "run", str(tmp_path / "adding.py")], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "42\n", done.stderr


@pytest.mark.slow
def test_show_with_locals_shows_variables_without_the_authors_code(shell: Shell, tmp_path: pathlib.Path) -> None:
    """Semantics §4.4."""
    module = tmp_path / "shown.py"
    module.write_text(SHOWN)
    engine = shell.engine(str(module))
    shell("start", "x")
    shell.until(lambda: "suspension r" in shell("list") or "r" in shell("show", "x", code=0))
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(20) == 0
    module.unlink()
    said = shell("show", "x", "--locals")
    assert "count = 3" in said
    assert "order = shown.Order(items=['teapot'])" in said
    assert "shown.py:10" in said
    assert "timer = <timer 0:1 pending>" in said, "not the class and the number that stand for it in a snapshot"


def test_a_fenced_engine_is_to_be_started_again_and_one_that_would_only_fail_again_is_not() -> None:
    """K4, wire.md §4: exit codes (found by kill -9 of the broker: a transaction that came too late had fenced its own engine)."""
    assert [exit_code(error) for error in (FencedError("old epoch"), TransportError("no broker"), TransportError("held", retryable=False))] == [3, 3, 1]


@pytest.mark.slow
def test_dead_letters_are_listed_shown_retried_and_discarded(shell: Shell) -> None:
    """Wire.md §4."""
    shell.engine(TRIP)
    submit(shell.directory, "workflow-resume", b"bad", b"{not json")
    submit(shell.directory, "workflow-resume", b"worse", b"[]")
    shell.until(lambda: "bad-message" in shell("dead-letters", "list"))
    assert "{not json" in shell("dead-letters", "show", "0:0")
    shell("dead-letters", "discard", "0:1")
    shell("dead-letters", "retry", "0:0")  # still no JSON: it becomes a new letter, before or after the record that closes the old one
    new: list[str] = []
    shell.until(lambda: new.extend(letter for letter in ("0:3", "0:4") if letter in shell("dead-letters", "list")) or new)
    said = shell("dead-letters", "list")
    assert "bad-message" not in said
    assert "0:0" not in said
    assert "kwflow-original-timestamp" in shell("dead-letters", "show", new[0])
    assert "neither a parked instance nor an open dead letter" in shell("dead-letters", "show", "0:0", code=2)
    assert "--all" in shell("dead-letters", "discard", code=2)
    assert "no instance is parked and no dead letter is open with reason bad-message" in shell("dead-letters", "discard", "--all", "--reason", "bad-message", code=2)
    assert f"{new[0]}: closed" in shell("dead-letters", "discard", "--all", "--reason", "bad-json")


COUNTING = """
import os
import kwflow as kw

kw.declare_topics("counted")

def main(opts):
    while True:
        value = yield kw.suspend("next")
        if value == 0 and not os.path.exists(opts["mended"]):
            held = open(__file__)
        kw.output(str(value), "counted")
        held = None
        if value == 1199:
            return "done"
"""


@pytest.mark.slow
def test_a_parked_instance_is_shown_with_its_hold_and_a_retry_that_is_killed_in_the_middle_applies_each_record_once(shell: Shell, tmp_path: pathlib.Path) -> None:
    """Semantics §7, K17: 1,200 records are three transactions. The engine is killed between them, and goes on."""
    module, mended = tmp_path / "counting.py", tmp_path / "mended"
    module.write_text(COUNTING.replace("held = open(__file__)", "held = open(__file__)\n            yield kw.suspend('never')"))
    engine = shell.engine(str(module))
    shell("start", "w", "--input", json.dumps({"mended": str(mended)}))
    for value in range(1200):
        submit(shell.directory, "workflow-resume", b"w", b'{"ref":"next","value":%d}' % value)
    shell.until(lambda: "1200" in shell("dead-letters", "list"))
    said = shell("dead-letters", "show", "w")
    assert "UnsavableError" in said and "variable 'held'" in said and "waits for suspension next" in said
    assert "1199 records wait behind it" in said and "and 1189 more" in said
    mended.touch()
    shell("dead-letters", "retry", "--all")
    shell.until(lambda: shell.records("counted"))
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    shell.engine(str(module))
    shell.until(lambda: shell.records("workflow-result"))
    assert [line.split()[2] for line in shell.records("counted")] == [str(value) for value in range(1200)]
    assert "w" not in shell("dead-letters", "list").split()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_finishes_the_batch_and_author_code_never_sees_it(shell: Shell, tmp_path: pathlib.Path, number: signal.Signals) -> None:
    """Semantics §2.5: a signal causes no compensation."""
    module = tmp_path / "slow.py"
    module.write_text(SLOW.replace('kw.log("step begins")', f'open({str(tmp_path / "begun")!r}, "w").close()'))
    engine = shell.engine(str(module))
    shell("start", "x")
    shell("resume", "x", "go")
    shell.until(lambda: (tmp_path / "begun").exists())
    engine.send_signal(number)
    assert engine.wait(20) == 0
    assert shell.records("slow-out") == ["0 x done"]
    assert "suspension end" in shell("show", "x")


@pytest.mark.slow
def test_a_second_signal_ends_the_engine_at_once_and_nothing_of_the_step_is_kept(shell: Shell, tmp_path: pathlib.Path) -> None:
    """G1."""
    module = tmp_path / "slow.py"
    module.write_text(SLOW.replace("< 2", "< 60").replace('kw.log("step begins")', f'open({str(tmp_path / "begun")!r}, "w").close()'))
    engine = shell.engine(str(module))
    shell("start", "x")
    shell("resume", "x", "go")
    shell.until(lambda: (tmp_path / "begun").exists())
    engine.send_signal(signal.SIGTERM)
    engine.send_signal(signal.SIGINT)  # another one, as Python may handle two of the same signal once
    assert engine.wait(20) in (128 + signal.SIGTERM, 128 + signal.SIGINT), "whichever it handled second"
    assert shell.records("slow-out") == []
    assert "suspension go" in shell("show", "x")


def test_what_the_broker_says_where_nobody_expects_it_is_no_bug_of_ours() -> None:
    assert error_text(KafkaException(KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED, "not you"))) == "kwflow: Kafka: not you"


def test_no_broker_is_one_line_and_exit_code_3() -> None:
    """3 means: start me again."""
    done = subprocess.run(
        [sys.executable, "-m", "kwflow", "engine", TRIP, "--bootstrap-servers", "127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1 and "no broker at 127.0.0.1:1" in done.stderr, done.stderr


@pytest.mark.slow
def test_an_engine_whose_streams_are_closed_runs_and_what_an_output_cannot_show_is_escaped(shell: Shell) -> None:
    """Found by running it in unusual ways: its database got the file descriptor of the standard error, and JSON logs ended it."""
    started = subprocess.Popen(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *shell.command("engine", TRIP, "--log-format", "json")], cwd=ROOT)
    shell.until(lambda: started.poll() is not None or (shell.directory / "engine.sock").exists())
    try:
        assert [os.readlink(f"/proc/{started.pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
        submit(shell.directory, Config().resume_topic, "größe".encode(), b'new:{"timeout": 60000}')
        ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
        asked = [subprocess.run(shell.command("list", *more), cwd=ROOT, capture_output=True, env=ascii_only, timeout=60, check=True).stdout.decode() for more in ([], ["--json"])]
    finally:
        started.terminate()
    assert started.wait(60) == 0
    assert "gr\\xf6\\xdfe" in asked[0]
    assert [one["id"] for one in json.loads(asked[1])] == ["größe"]
    no_text = subprocess.run(shell.command("signal", "größe", os.fsdecode(b"\xff")), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (no_text.returncode, no_text.stderr) == (2, "kwflow: '\\udcff' is not valid UTF-8\n")
