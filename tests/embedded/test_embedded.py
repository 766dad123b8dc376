"""The embedded engine as its user sees it: a process that is killed and started again (G1, G6)."""

import contextlib
import os
import pathlib
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from kwflow.errors import TransportError
from kwflow.runners.embedded import socket as engine_socket
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import Follower, _follow, serve
from tests.embedded.shell import ROOT, TRIP, Shell


@pytest.mark.slow
def test_a_saga_goes_on_after_kill_9_and_answers_given_meanwhile_are_applied_once(shell: Shell) -> None:
    """G1, G6."""
    engine = shell.engine(TRIP)
    shell("start", "trip", "--input", '{"timeout": 600000}')
    shell.until(lambda: len(shell.records("saga-reserve-flight")) == 1)
    shell("resume", "trip", "0:1", "--value", '"ok"')
    shell.until(lambda: "suspension 0:1 " not in shell("show", "trip"))  # not "0:1" alone, which may also be part of the time of day
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    shell("resume", "trip", "0:2", "--value", '"ok"')
    shell.engine(TRIP)
    shell("resume", "trip", "0:3", "--value", '"ok"')
    shell("resume", "trip", "0:3", "--value", '"again"')
    shell.until(lambda: shell.records("workflow-result"))
    assert shell.records("workflow-result") == ['0 trip {"car":{"id":"0:1"},"hotel":{"id":"0:2"},"flight":{"id":"0:3"}}']
    assert len(shell.records("saga-reserve-car")) == 1


@pytest.mark.slow
def test_sigterm_ends_the_engine_with_0_and_a_timer_fires_in_the_next_one(shell: Shell) -> None:
    """SC-1, semantics §2.5."""
    engine = shell.engine(TRIP)
    shell("start", "trip", "--input", '{"timeout": 8000}')
    shell.until(lambda: shell.stored("trip"))  # looked up in this process, because a command may take as long as the timer on a busy machine
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(20) == 0
    assert engine.stderr is not None
    assert "records: 1 started" in engine.stderr.read()
    shell.engine(TRIP)
    shell.until(lambda: shell.records("workflow-error"))
    assert shell.records("workflow-error") == ['0 trip "timeout"']


@pytest.mark.slow
def test_show_names_function_file_and_line_of_each_wait(shell: Shell) -> None:
    shell.engine(TRIP)
    shell("start", "trip", "--input", '{"timeout": 600000}')
    shell.until(lambda: shell.records("saga-reserve-flight"))
    line = next(number for number, text in enumerate(pathlib.Path(TRIP).read_text().splitlines(), 1) if "yield resume" in text)
    assert f"suspension 0:1  reserve  trip_booking.py:{line}" in shell("show", "trip")
    assert "trip" in shell("list")


def test_a_second_holder_of_the_directory_is_told_who_has_it(tmp_path: pathlib.Path) -> None:
    held = Embedded(tmp_path)
    try:
        with pytest.raises(TransportError, match=f"pid {os.getpid()}"):
            Embedded(tmp_path)
    finally:
        held.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_an_engine_whose_directory_is_moved_or_replaced_ends_and_leaves_what_is_there_now_alone(shell: Shell, tmp_path: pathlib.Path, how: str) -> None:
    """G3: it went on in its open files and took records that nobody would find there. When it ended, it removed the socket of the next engine."""
    engine = shell.engine(TRIP)
    assert engine.stderr is not None
    shell("start", "trip", "--input", '{"timeout": 600000}')
    shell.until(lambda: shell.records("saga-reserve-flight"))
    moved = shell.directory.rename(tmp_path / "moved")
    if how == "replaced":
        with contextlib.closing(Embedded(shell.directory)) as other, serve(other):
            assert engine.wait(60) == 1
            assert (shell.directory / "engine.sock").exists() and (shell.directory / "engine.pid").exists()
    else:
        assert engine.wait(60) == 1 and not shell.directory.exists()
    assert "was removed, moved or replaced while the engine ran in it" in engine.stderr.read()
    shell.directory = moved
    shell.engine(TRIP)
    assert "waiting" in shell("show", "trip")
    assert len(shell.records("saga-reserve-flight")) == 1


def test_a_record_is_not_taken_into_a_directory_that_is_gone(tmp_path: pathlib.Path) -> None:
    """It would not be found after a restart."""
    held = Embedded(tmp_path / "here")
    try:
        held.append("t", b"k", b"v")
        (tmp_path / "here").rename(tmp_path / "there")
        with pytest.raises(TransportError, match="was removed, moved or replaced"):
            held.append("t", b"k", b"v")
    finally:
        held.close()


def test_offsets_count_on_after_the_directory_is_opened_again(tmp_path: pathlib.Path) -> None:
    for expected in range(3):
        held = Embedded(tmp_path)
        assert held.append("t", b"k", b"v") == expected
        held.close()


@pytest.mark.slow
def test_bad_arguments_get_one_line_and_exit_code_2(shell: Shell, tmp_path: pathlib.Path) -> None:
    assert "not JSON" in shell("start", "x", "--input", "{", code=2)
    broken = tmp_path / "broken.py"
    broken.write_text("def main(opts):\n    try:\n        yield\n    except* ValueError:\n        yield\n")
    said = shell("engine", str(broken), code=2)
    assert "broken.py:2" in said
    assert "except*" in said
    assert "Traceback" not in said
    broken.write_text("import json\n\nLIMIT = json.loads('{')\n")
    said = shell("engine", str(broken), code=2)
    assert "JSONDecodeError" in said
    assert "Traceback" not in said
    said = shell("engine", "nothing_there.at_all", code=2)
    assert "cannot import nothing_there" in said and f"looked in {pathlib.Path.cwd()} (--app-dir)" in said and "frozen" not in said
    broken.write_text("import json\n\nimport nothing_there\n")
    said = shell("engine", str(broken), code=2)
    assert "No module named 'nothing_there'" in said and "broken.py:3" in said, "the place is the author's, not the machinery of imports"


def test_an_engine_that_had_no_file_descriptors_for_a_while_takes_records_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: others reach it through its socket, and each connection needs a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(contextlib.closing(Embedded(tmp_path)))
        others = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        stack.enter_context(serve(engine))
        monkeypatch.chdir(tmp_path)
        with contextlib.ExitStack() as limited:
            limited.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            for other in others:  # the system may have reserved one for the first already
                other.connect("engine.sock")
                other.sendall(b'{"groups":[{"records":[{"topic":"t","key":null,"value":null,"headers":[]}]}]}\n')
            others[1].settimeout(0.2)
            with pytest.raises(TimeoutError):
                others[1].recv(100)
        for other in others:
            other.settimeout(20)
        assert sorted(other.recv(100) for other in others) == [b'{"offsets":[[0]]}\n', b'{"offsets":[[1]]}\n']


@pytest.mark.slow
def test_an_engine_takes_as_many_open_files_as_it_may(shell: Shell) -> None:
    """The soft limit of most systems, 1,024, is less than 150 partitions need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        engine = shell.engine(TRIP)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(engine.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_an_engine_that_is_busy_with_other_topics_is_heard_and_hears_that_a_follower_has_gone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M1: otherwise clients reconnect every 5 s, and each that has left still holds a thread and a file."""
    monkeypatch.setattr(engine_socket, "_SIGN_S", 0.05)
    monkeypatch.setattr(engine_socket, "_GONE_S", 0.5)
    with contextlib.closing(Embedded(tmp_path, sync=False)) as engine, serve(engine):

        def write(until: Callable[[], object]) -> None:
            deadline = time.monotonic() + 60
            while not until():
                assert time.monotonic() < deadline, "it did not happen within 60 s"
                engine.append("loud", b"k", b"v")

        threads = threading.active_count()
        follower = Follower(tmp_path, {"quiet": 0})
        begun = time.monotonic()
        write(lambda: list(follower.read(0.01)) or time.monotonic() - begun > 1)
        assert threading.active_count() == threads + 1
        follower.close()
        write(lambda: threading.active_count() == threads)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("where", ["a pipe that nobody reads", "/dev/full"])
def test_an_engine_whose_log_cannot_be_written_goes_on(shell: Shell, form: str, where: str) -> None:
    """G3: it loses log lines, not work."""
    with contextlib.ExitStack() as stack:
        read, write = os.pipe()
        log = stack.enter_context(open(where if where.startswith("/") else write, "wb", buffering=0))
        if where.startswith("/"):
            os.close(write)
        os.close(read)
        engine = stack.enter_context(subprocess.Popen(shell.command("engine", TRIP, "--log-format", form), stderr=log, cwd=ROOT))
        stack.callback(engine.kill)
        shell.until((shell.directory / "engine.sock").exists)
        for _ in range(2):
            shell("resume", "nobody", "nothing")  # this is reported
        shell("start", "trip-1", "--input", '{"timeout": 60000}')
        shell.until(lambda: shell.stored("trip-1"))
        engine.terminate()
        assert engine.wait(20) == 0


KILLS = """
import os
import time
import kwflow as kw

def main(opts):
    what = yield kw.suspend("what")
    if what == "kill":
        os._exit(9)
    if what == "hang":
        time.sleep(1000)
    return what
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "code"), [("kill", 9), ("hang", 3)])
def test_a_record_that_kills_or_hangs_the_engine_parks_its_instance_at_the_sixth_start(shell: Shell, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: str, code: int) -> None:
    """K19: a call that blocks in C cannot be interrupted, so the process ends. The records around it are applied."""
    monkeypatch.setenv("KWFLOW_STEP_TIMEOUT_MS", "200")
    monkeypatch.setenv("KWFLOW_STEP_ABORT_MS", "400")
    (tmp_path / "kills.py").write_text(KILLS)
    for id in ("before", "fatal", "after"):
        shell("start", id)
        shell("resume", id, "what", "--value", f'"{what if id == "fatal" else id}"')
    for _ in range(5):  # once in a batch, once among a few, then three times alone
        engine = shell.engine(str(tmp_path / "kills.py"))
        assert engine.wait(60) == code
    engine = shell.engine(str(tmp_path / "kills.py"))
    shell.until(lambda: len(shell.records("workflow-result")) == 2)
    said = shell("dead-letters", "show", "fatal")
    assert "RefusedError: the engine died three times" in said and "waits for suspension what" in said
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(20) == 0


GROWS = """
import kwflow as kw

def main(o):
    data = []
    while True:
        data.append((yield kw.suspend("more")))
        yield kw.sleep(0.001)
"""


@pytest.mark.slow
def test_a_full_disk_is_no_record_s_fault_and_is_told_to_everybody(shell: Shell, tmp_path: pathlib.Path) -> None:
    """K19, G3: however often the engine is started on the full disk, nothing is parked. With room again, everything goes on."""
    (tmp_path / "grows.py").write_text(GROWS)
    grows = str(tmp_path / "grows.py")
    shell("start", "w")
    shell("resume", "w", "more", "--value", f'"{"x" * 120_000}"')
    for _ in range(6):
        engine = shell.engine(grows, file_bytes_max=100_000)
        assert engine.stderr is not None
        assert engine.wait(60) == 3, engine.stderr.read()
        said = engine.stderr.read()
        assert said.startswith(f"kwflow: {shell.directory} cannot be used: IO error") and "Traceback" not in said
    engine = shell.engine(grows)
    shell.until(lambda: (stored := shell.stored("w")) is not None and len(stored) > 120_000)
    assert "w" not in shell("dead-letters", "list")
    engine.kill()
    engine.wait()
    engine = shell.engine(grows, file_bytes_max=100_000)
    said = shell("resume", "w", "more", "--value", f'"{"x" * 120_000}"', code=3)
    assert "refused the record" in said and "IO error" in said
    assert engine.stderr is not None
    engine.kill()
    assert "Traceback" not in engine.stderr.read()


def test_what_an_engine_wrote_before_it_stops_serving_is_sent_to_its_followers(tmp_path: pathlib.Path) -> None:
    """`kwflow run` ends with the step whose sender waits for a reply: it waited for 20 s, and was told that perhaps no engine runs."""
    held, stopped = Embedded(tmp_path, sync=False), threading.Event()
    held.append("replies", b"k", b"the last one")
    stopped.set()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _follow(held, ours, {"replies": 0}, stopped)
        assert b'"offset":0' in theirs.recv(10_000)
    held.close()
