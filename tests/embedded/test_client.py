"""The client on an embedded engine, in the engine's process and through its socket, with the same tests for both (M1, M4, A1-A12)."""

import asyncio
import math
import os
import pathlib
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pydantic
import pytest

from kwflow import durable
from kwflow.client import Client, Outcome
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.errors import CommandError, OutcomeError, OutcomeUnknown, TransportError, UsageError
from kwflow.runners.embedded import link as embedded_link
from kwflow.runners.hosted import Hosted

SOURCE = """
import kwflow as kw
import pydantic

def greet(o):
    yield kw.sleep(0.01)
    return {**o, "message": f"Hello {o['name']}!"}

def ask(o):
    kw.set_status({"asked": o})
    return (yield kw.suspend("answer"))

@kw.activity
def heard():
    return kw.activity_info().headers

def hears(o):
    found = [kw.headers(), (yield heard())]
    yield kw.suspend("last")
    return [*found, kw.headers()]

def called(o):
    return (yield kw.suspend("callback-/x"))

def parks(o):
    yield kw.suspend("callback-1")
    held = open("/dev/null")
    yield kw.suspend("callback-2")

def fail(o):
    raise ValueError("bad")

class Line(pydantic.BaseModel):
    sku: str
    key: bytes = b""

def typed(line: Line):
    answer = yield kw.suspend("answer")
    return [type(line).__name__, line.sku, len(line.key), answer]

def big(o):
    yield
    return "x" * o

def prices(o):
    updates = kw.on_update("price", check)
    stop = kw.signals("stop")
    while True:
        found = yield kw.race({"update": updates, "stop": stop})
        if found[0] == "stop":
            return found[1]
        kw.reply(found[1], {"was": found[1].value})

def check(value):
    if value < 0:
        raise ValueError("negative")
"""
NAMES = ("greet", "ask", "called", "hears", "parks", "fail", "big", "prices", "typed")
pytestmark = pytest.mark.slow


def workflows() -> Workflows:
    module = durable.load_source("client_case", SOURCE, "client_case.py")
    return Workflows({name: getattr(module, name) for name in NAMES}, "ask")


Make = Callable[..., Client]


@pytest.fixture
def hosted(tmp_path: pathlib.Path) -> Iterator[Hosted]:
    with Hosted(tmp_path / "state", workflows(), Config(command_timeout_s=10), on_log=lambda _: None) as hosted:
        yield hosted


@pytest.fixture(params=["in process", "through the socket"])
def make(request: pytest.FixtureRequest, hosted: Hosted) -> Iterator[Make]:
    """Makes clients of one kind."""
    made: list[Client] = []

    def make() -> Client:
        made.append(Client.embedded(hosted.engine if request.param == "in process" else hosted.engine.directory, hosted.config))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(make: Make) -> Client:
    return make()


def waits(client: Client, id: str, ref: str = "answer") -> None:
    deadline = time.monotonic() + 20
    while ref not in [wait["ref"] for wait in client.query(id).result(20)["waits"]]:
        assert time.monotonic() < deadline


def test_each_of_50_callers_gets_its_own_outcome(client: Client) -> None:
    """A1."""
    futures = [client.start_and_wait(f"john-{n}", {"name": f"John{n}"}, workflow="greet") for n in range(50)]
    assert [future.result(30)["message"] for future in futures] == [f"Hello John{n}!" for n in range(50)]


def test_what_a_client_sends_at_once_comes_in_its_order_and_each_is_answered(client: Client) -> None:
    """M1.4, G2: through the socket, many commands are one request."""
    client.start("p", workflow="prices").result(20)
    updates = [client.update("p", "price", n if n % 50 else -1) for n in range(500)]
    said = [update.exception(30) or update.result() for update in updates]
    assert [n for n, answer in enumerate(said) if isinstance(answer, CommandError)] == list(range(0, 500, 50))
    assert [answer for answer in said if not isinstance(answer, CommandError)] == [{"was": n} for n in range(500) if n % 50]
    client.signal("p", "stop", "end").result(20)
    assert client.result("p").result(20) == "end"


def test_three_clients_each_receive_their_own(make: Make) -> None:
    """A2, A6."""
    clients = [make() for _ in range(3)]
    futures = [client.start_and_wait(None, {"name": str(n)}, workflow="greet") for n, client in enumerate(clients)]
    assert [future.result(30)["name"] for future in futures] == ["0", "1", "2"]


def test_an_outcome_from_before_anybody_listened_is_given(client: Client, make: Make) -> None:
    """A3, A5: to a new client, too."""
    run = client.start("w", 7, workflow="ask").result(20)
    waits(client, "w")
    client.resume("w", "answer", {"x": 1}).result(20)
    assert client.result("w", timeout=20).result(30) == {"x": 1}
    assert make().result("w", start_id=run.start_id, timeout=20).result(30) == {"x": 1}


def test_a_client_that_comes_while_it_runs_gets_the_outcome(client: Client, make: Make) -> None:
    """A5."""
    client.start("w", workflow="ask").result(20)
    late = make().result("w", timeout=20)
    waits(client, "w")
    client.resume("w", "answer", 3).result(20)
    assert late.result(30) == 3


def test_two_runs_of_one_id_are_told_apart(client: Client) -> None:
    """M4: by the start id. The outcome of the earlier run is found in the topic after the later one has begun."""
    first = client.start_and_wait("w", workflow="ask", start_id="one")
    waits(client, "w")
    with pytest.raises(CommandError) as refused:
        client.start_and_wait("w", workflow="ask", start_id="two").result(20)
    assert refused.value.status == "exists"
    client.resume("w", "answer", 1).result(20)
    assert first.result(20) == 1
    second = client.start_and_wait("w", workflow="ask", start_id="two")
    waits(client, "w")
    client.resume("w", "answer", 2).result(20)
    assert second.result(20) == 2
    assert client.result("w", start_id="one", timeout=20).result(20) == 1
    assert client.result("w", timeout=20).result(20) == 2


def test_a_start_that_is_repeated_is_one_run_and_gives_its_outcome(client: Client) -> None:
    """K20, M1.4."""
    first = client.start("w", workflow="ask", start_id="s").result(20)
    again = client.start("w", workflow="ask", start_id="s").result(20)
    assert (first.new, again.new) == (True, False)
    waiting = client.start_and_wait("w", workflow="ask", start_id="s")
    waits(client, "w")
    client.resume("w", "answer", 5).result(20)
    assert waiting.result(20) == 5
    assert client.start_and_wait("w", workflow="ask", start_id="s").result(20) == 5


def test_a_time_out_leaves_it_running_and_a_later_question_gets_the_outcome(client: Client) -> None:
    """A9."""
    with pytest.raises(TimeoutError, match="it is still running"):
        client.start_and_wait("w", workflow="ask", timeout=0.3).result(20)
    waits(client, "w")
    client.resume("w", "answer", 1).result(20)
    assert client.result("w").result(20) == 1


def test_errors_cancels_and_terminations_reach_the_caller(client: Client) -> None:
    """A10, AF defect 9."""
    with pytest.raises(OutcomeError) as failed:
        client.start_and_wait(workflow="fail").result(20)
    assert (failed.value.kind, failed.value.value) == ("error", "ValueError: bad")
    for op, kind, value in (("cancel", "cancelled", "CancelToken"), ("terminate", "terminated", "Terminated: why")):
        future = client.start_and_wait(op, workflow="ask")
        waits(client, op)
        getattr(client, op)(op, "why").result(20)
        with pytest.raises(OutcomeError) as ended:
            future.result(20)
        assert (ended.value.kind, ended.value.value) == (kind, value)


def test_records_that_are_not_ours_are_counted_and_harm_nobody(client: Client, hosted: Hosted) -> None:
    """A7, A8."""
    future = client.start_and_wait("w", workflow="ask")
    waits(client, "w")
    config = hosted.config
    process = client._link.process.encode()
    for topic, key, value in (
        (config.reply_topic, process, b"\xff garbage"),
        (config.reply_topic, process, b'{"request":"unknown","status":"ok"}'),
        (config.reply_topic, b"another", b"{}"),
        (config.result_topic, b"w", b"no json"),
        (config.result_topic, b"w", None),
        (config.result_topic, None, b"1"),
        (config.error_topic, b"w", b'"somebody else wrote this"'),
    ):
        hosted.engine.append(topic, key, value, (("kwflow-outcome", b"result"), ("kwflow-start-id", b"foreign")))
    client.resume("w", "answer", "mine").result(20)
    assert future.result(20) == "mine"
    assert client.counts["unreadable"] == 4
    assert client.counts["foreign"] in (2, 3)  # the foreign error has an id that is waited for, unless the result was read first: there is no order between topics


def test_a_reply_address_that_is_gone_does_not_stop_the_command(client: Client, hosted: Hosted) -> None:
    """M1.2: the reply is left out and counted."""
    future = client.start_and_wait("w", workflow="ask")
    waits(client, "w")
    asked = (("kwflow-op", b"cancel"), ("kwflow-request", b"r"), ("kwflow-reply-to", b"7/gone"))
    hosted.engine.append(hosted.config.resume_topic, b"w", b"null", asked)
    with pytest.raises(OutcomeError, match="cancelled"):
        future.result(20)
    assert hosted.engine.counts["reply-gone"] == 1


def test_signals_updates_and_queries(client: Client) -> None:
    """M2."""
    future = client.start_and_wait("w", workflow="prices")
    waits(client, "w", "0:1")
    assert client.update("w", "price", 5).result(20) == {"was": 5}
    with pytest.raises(CommandError) as refused:
        client.update("w", "price", -1).result(20)
    assert (refused.value.status, refused.value.message) == ("rejected", "ValueError: negative")
    assert client.query("w").result(20)["status"] == "waiting"
    assert client.signal("w", "stop", "enough", ttl=60).result(20) is None
    assert future.result(20) == "enough"
    for call in (lambda: client.signal("w", "stop"), lambda: client.query("nobody"), lambda: client.cancel("w"), lambda: client.resume("w", "r")):
        with pytest.raises(CommandError, match="(w: not_found: it has ended|nobody: not_found: there is no such run; kwflow list shows those that are known)"):
            call().result(20)


def test_a_command_that_is_repeated_under_its_id_is_done_once(client: Client) -> None:
    """M1.4."""
    client.start("w", workflow="ask").result(20)
    for _ in range(2):
        client.signal("w", "s", 1, command_id="once").result(20)
    assert client.query("w").result(20)["mailbox"] == {"signal": {"s": 1}}


def test_signal_with_start_and_status(client: Client) -> None:
    client.signal_with_start("w", "s", 1, workflow="ask", input="why").result(20)
    shown = client.query("w").result(20)
    assert (shown["status_value"], shown["mailbox"]) == ({"asked": "why"}, {"signal": {"s": 1}})


def test_headers_of_a_call_are_read_by_the_workflow_and_its_activities(client: Client) -> None:
    """semantics §9.3: through kw.headers and kw.activity_info. The headers of an answer are passed on from there."""
    outcome = client.start_and_wait("h", workflow="hears", headers={"tenant": "north", "raw": b"\xff", "none": None})
    while [wait["ref"] for wait in client.query("h").result(10)["waits"]] != ["last"]:
        """Its activity has not been answered."""
    client.resume("h", "last", headers=[("by", "ada")]).result(10)
    first = {"tenant": "north", "raw": "\\xff", "none": None}
    assert outcome.result(10) == [first, first, {"by": "ada"}]
    for wrong, error in (({"kwflow-op": "new"}, UsageError), ({"a\0": "b"}, UsageError), (5, TypeError), ({"a": 5}, TypeError)):
        with pytest.raises(error):
            client.start(workflow="greet", headers=wrong)  # type: ignore[arg-type]


def test_pause_holds_and_unpause_goes_on(client: Client) -> None:
    future = client.start_and_wait("w", workflow="ask")
    client.pause("w", "audit").result(20)
    held = client.resume("w", "answer", 1)
    assert client.query("w").result(20)["parked"]["reason"] == "paused"
    client.unpause("w").result(20)
    assert (held.result(20), future.result(20)) == (None, 1)


def test_a_fork_is_a_run_of_its_own(client: Client) -> None:
    """Decision 0048."""
    first = client.start_and_wait("w", "why", workflow="ask")
    run = client.fork("w", "copy").result(20)
    assert (run.id, client.query("copy").result(20)["status_value"]) == ("copy", {"asked": "why"})
    client.resume("copy", "answer", 1).result(20)
    assert client.result("copy", start_id=run.start_id).result(20) == 1
    another = client.fork("w", command_id="once").result(20)
    assert client.fork("w", command_id="once").result(20) == another
    client.resume("w", "answer", 2).result(20)
    assert first.result(20) == 2
    with pytest.raises(CommandError, match="not_found"):
        client.fork("w").result(20)


def test_an_outcome_too_large_to_be_kept_is_found_in_its_topic(client: Client, make: Make) -> None:
    """M4: over 64 KiB."""
    assert len(client.start_and_wait("w", 70_000, workflow="big", start_id="s").result(20)) == 70_000
    assert len(make().result("w", start_id="s", timeout=20).result(30)) == 70_000


def test_a_workflow_that_a_plain_record_started_can_be_waited_for(client: Client, hosted: Hosted) -> None:
    """Without a start id nothing is kept after the end, but its outcome is still in the topic."""
    hosted.engine.append(hosted.config.resume_topic, b"w", b"new:null")
    waits(client, "w")
    waiting = client.result("w", timeout=20)
    client.resume("w", "answer", 4).result(20)
    assert waiting.result(20) == 4
    assert client.result("w", timeout=20).result(20) == 4
    with pytest.raises(CommandError, match="not_found"):
        client.result("never").result(20)


def test_a_subscriber_is_called_for_each_outcome_until_it_leaves(client: Client) -> None:
    """A11."""
    seen: list[Outcome] = []
    leave = client.subscribe("w", seen.append)
    for value in (1, 2):
        client.start_and_wait("w", value, workflow="big").result(20)
    leave()
    client.start_and_wait("w", 3, workflow="big").result(20)
    assert [(outcome.kind, outcome.value) for outcome in seen] == [("result", "x"), ("result", "xx")]


def test_coroutines_wait_for_the_same_futures(client: Client) -> None:
    """There is one implementation, not one for threads and one for asyncio."""

    async def one(n: int) -> Any:
        return (await client.start_and_wait(None, {"name": n}, workflow="greet"))["name"]

    async def all_of_them() -> list[Any]:
        with pytest.raises(OutcomeError):
            await client.start_and_wait(workflow="fail")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.start_and_wait(workflow="ask")
        return await asyncio.gather(*(one(n) for n in range(20)))

    assert asyncio.run(all_of_them()) == list(range(20))
    assert not client._outcomes._waiters


def test_many_threads_use_one_client(client: Client) -> None:
    got: list[Any] = []

    def work(n: int) -> None:
        for m in range(5):
            got.append(client.start_and_wait(None, {"name": (n, m)}, workflow="greet").result(30)["name"] == [n, m])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] * 40


def test_nothing_is_left_behind_when_callers_stop_waiting(client: Client) -> None:
    """AF defect 6."""
    futures = [client.start_and_wait(f"w{n}", workflow="ask") for n in range(5)]
    for n in range(5):
        waits(client, f"w{n}")
    for future in futures:
        future.cancel()
    assert (client._outcomes._waiters, client._futures._requests, client._futures._open) == ({}, {}, set())


class Line(pydantic.BaseModel):
    sku: str
    key: bytes = b""


def test_a_typed_object_is_given_and_the_workflow_is_given_one_and_what_does_not_fit_is_refused(client: Client) -> None:
    """Decision 0050: the client may have a class of its own, because what is sent is JSON."""
    given = Line(sku="a", key=b"two")
    outcome = client.start_and_wait("w", given, workflow="typed")
    client.signal_with_start("v", "s", workflow="typed", input=given).result(20)
    for id in ("w", "v"):
        waits(client, id)
        client.resume(id, "answer", 1).result(20)
    assert outcome.result(20) == client.result("v").result(20) == ["Line", "a", 3, 1]
    for refused in (client.start("x", {"sku": 7}, workflow="typed"), client.start_and_wait("x", None, workflow="typed"), client.signal_with_start("x", "s", workflow="typed", input={})):
        with pytest.raises(CommandError, match="workflow 'typed' does not accept this input") as error:
            refused.result(20)
        assert error.value.status == "bad_input"
    with pytest.raises(CommandError, match="not_found"):
        client.query("x").result(20)


def test_wrong_calls_are_named_at_once(client: Client) -> None:
    for call, error in (
        (lambda: client.start("a|b"), UsageError),
        (lambda: client.start("x" * 513), UsageError),
        (lambda: client.resume("w", "r", eror=1), UsageError),
        (lambda: client.signal("w", "s", object()), TypeError),
        (lambda: client.signal("w", "s", ttl=math.nan), UsageError),
        (lambda: client.signal("w", "s", ttl=timedelta(days=-1)), UsageError),
        (lambda: client.result("w", timeout=math.inf), UsageError),
        (lambda: client.start_and_wait("w", timeout=math.nan), UsageError),
    ):
        with pytest.raises(error):
            call().result(20)
    with pytest.raises(CommandError) as refused:
        client.signal("w", "").result(20)
    assert refused.value.status == "bad_arguments"
    with pytest.raises(CommandError) as unknown:
        client.start(workflow="nothing").result(20)
    assert unknown.value.status == "unknown_workflow"


def test_nobody_waits_for_an_outcome_that_is_not_written(tmp_path: pathlib.Path) -> None:
    """KW-12: an empty topic turns its records off."""
    for off in ("result_topic", "error_topic"):
        with Client.embedded(tmp_path / off, Config(**{off: ""})) as client:
            for call in (lambda client: client.start_and_wait("w"), lambda client: client.result("w"), lambda client: client.subscribe("w", print)):
                with pytest.raises(UsageError, match="set result_topic and error_topic"):
                    call(client)
            assert not client._futures._open
    with Client.embedded(tmp_path / "state") as client:
        for wrong in (lambda: client.result("a|b"), lambda: client.result("w", timeout=-1), lambda: client.start_and_wait("w", timeout=math.nan)):
            with pytest.raises(UsageError):
                wrong()
        assert not client._futures._open and not client._outcomes._waiters


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: no fork here")
def test_a_client_that_a_fork_has_copied_says_so(client: Client) -> None:
    """For servers that fork their workers: the client's thread stays behind in the parent, and futures would wait for ever."""
    pid = os.fork()
    if pid == 0:
        try:
            client.query("w")
        except UsageError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with pytest.raises(CommandError, match="not_found"):
        client.query("w").result(20)


def test_a_callback_that_waits_is_told_that_it_must_not(client: Client) -> None:
    """It runs on the thread that would deliver the answer: it would wait for ever, and everybody else with it."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def waits(done: Any) -> None:
        for wait in (client.query("w").result, client.query("w").exception):
            try:
                wait()
            except UsageError as error:
                said.put(str(error))
        said.put(done.result())

    client.start_and_wait("w", workflow="greet", input={"name": "John"}).add_done_callback(waits)
    first, second, outcome = (said.get(timeout=20) for _ in range(3))
    assert "a callback must not wait" in first and first == second
    assert outcome["message"] == "Hello John!"  # type: ignore[index]
    assert client.query("w").result(20)["status"] == "ended"


def test_a_client_outlives_the_state_that_it_was_made_for(tmp_path: pathlib.Path) -> None:
    """Somebody deletes the directory and starts the engine again. A caller that waits is told that its run is gone; the others go on."""
    config = Config(command_timeout_s=10)
    with Client.embedded(tmp_path / "state", config) as client:
        with Hosted(tmp_path / "state", workflows(), config, on_log=lambda _: None):
            for n in range(20):
                client.start_and_wait(f"w{n}", workflow="greet", input={"name": n}).result(20)
            gone = client.start_and_wait("gone", workflow="ask")
            waits(client, "gone")
        shutil.rmtree(tmp_path / "state")
        with Hosted(tmp_path / "state", workflows(), config, on_log=lambda _: None):
            assert client.start_and_wait("w", workflow="greet", input={"name": "John"}).result(20)["message"] == "Hello John!"
            with pytest.raises(CommandError, match="not_found"):
                gone.result(20)


def test_a_closed_client_says_so(make: Make) -> None:
    client = make()
    future = client.result("never-ends-because-unknown")
    waiting = client.start_and_wait("w", workflow="ask")
    client.close()
    for gone in (waiting, future):
        with pytest.raises((TransportError, CommandError)):
            gone.result(20)
    with pytest.raises(TransportError, match="closed"):
        client.query("w")


def test_without_an_engine_a_command_has_an_unknown_outcome_and_is_done_once_when_repeated(tmp_path: pathlib.Path) -> None:
    """M1.4, A4."""
    config = Config(command_timeout_s=0.5)
    with Client.embedded(tmp_path / "state", config) as client:
        with pytest.raises(OutcomeUnknown, match="repeat it") as unknown:
            client.start("w", workflow="ask").result(20)
        waiting = client.result("w", start_id=unknown.value.command_id)
        with pytest.raises(OutcomeUnknown):
            waiting.result(20)
        with Hosted(tmp_path / "state", workflows(), config, on_log=lambda _: None):
            assert client.start("w", workflow="ask", start_id=unknown.value.command_id).result(20).new is False
            client.resume("w", "answer", 9).result(20)
            assert client.result("w").result(20) == 9


def test_a_directory_that_cannot_be_made_is_named_to_every_caller(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AF-6: the sending thread must survive what it could not send."""
    monkeypatch.setattr(embedded_link, "_APPEND_S", 0.1)
    (tmp_path / "loop").symlink_to("loop")
    with Client.embedded(tmp_path / "loop" / "state") as client:
        for _ in range(2):
            with pytest.raises(TransportError, match="loop/state cannot be used"):
                client.start("w", workflow="ask").result(20)


def test_an_engine_that_could_not_be_hosted_leaves_its_directory_free_and_may_be_closed_twice(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: the mistake is corrected, and the cell is run again."""
    with monkeypatch.context() as without, pytest.raises(UsageError, match="otel"):
        without.setitem(sys.modules, "opentelemetry", None)
        Hosted(tmp_path / "state", workflows(), Config(tracing=True), on_log=lambda _: None)
    with Hosted(tmp_path / "state", workflows(), Config(), on_log=lambda _: None) as hosted:
        hosted.close()


def test_a_program_that_hosted_an_engine_closes_its_own_generators_as_before(tmp_path: pathlib.Path) -> None:
    """Semantics §3.3: generators are forgotten only as long as the engine runs."""
    cleaned: list[str] = []
    module = durable.load_source("closing_case", "def gen(cleaned):\n    try:\n        yield 1\n    finally:\n        cleaned.append('cleaned')\n", "closing_case.py")
    with Hosted(tmp_path / "state", workflows(), on_log=lambda _: None) as hosted, Client.embedded(hosted.engine) as client:
        client.start("w", workflow="ask").result(20)
        next(closed := module.gen(cleaned))
        closed.close()
        assert cleaned == []
    next(closed := module.gen(cleaned))
    closed.close()
    assert cleaned == ["cleaned"]
