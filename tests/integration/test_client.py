"""The client on a real broker, with engines as processes that are killed (M1, M4, M5, A1-A12)."""

import asyncio
import base64
import json
import os
import pathlib
import queue
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import NewPartitions

from kwflow.client import Client, Outcome
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.murmur2 import partition_of
from kwflow.errors import CommandError, OutcomeError, OutcomeUnknown, TransportError
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.link import read, send
from tests import commands
from tests.commands import Started
from tests.waiting import until

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.broker, pytest.mark.slow]
SOURCE = """
import pathlib
import time

import kwflow as kw

@kw.workflow
def greet(o):
    yield kw.sleep(0.01)
    return {**o, "message": f"Hello {o['name']}!"}

@kw.workflow
def ask(o):
    return (yield kw.suspend("answer"))

@kw.activity
def look(o):
    pathlib.Path(o["gate"] + ".asked").open("a").write(kw.activity_info().workflow_id + "\\n")
    while not pathlib.Path(o["gate"]).exists():
        time.sleep(0.02)
    return kw.activity_info().workflow_id

@kw.workflow
def look_and_sleep(o):
    found, _ = yield kw.all([look(o), kw.sleep(3)])
    return [found, (yield kw.suspend("answer"))]

@kw.workflow
def fail(o):
    raise ValueError("bad")
    yield

@kw.workflow
def prices(o):
    updates, stop = kw.on_update("price", check), kw.signals("stop")
    while True:
        found = yield kw.race({"update": updates, "stop": stop})
        if found[0] == "stop":
            return found[1]
        kw.reply(found[1], {"was": found[1].value})

def check(value):
    if value < 0:
        raise ValueError("negative")

@kw.workflow
def parent(n):
    return sum((yield kw.all([kw.start_child(child, number) for number in range(n)])))

@kw.workflow
def child(number):
    yield kw.sleep(0.2 + number / 20)
    return number
"""


class Application:
    """One application on the broker: its topics, engines and clients."""

    def __init__(self, broker: str, name: str, directory: pathlib.Path) -> None:
        self.directory = directory
        names = {f"{topic}_topic": f"{name}-{topic}" for topic in ("resume", "result", "error", "scheduler", "reply")}
        self.config = Config(bootstrap_servers=broker, application_id=name, **names)
        self.environment = {**os.environ, "KWFLOW_BOOTSTRAP_SERVERS": broker, "KWFLOW_APPLICATION_ID": name, **{f"KWFLOW_{key.upper()}": topic for key, topic in names.items()}}
        self.module = directory / "client_cases.py"
        self.module.write_text(SOURCE)
        self.processes: list[Started] = []
        self.clients: list[Client] = []
        self.run("topics", "create", "--partitions", "4")

    def run(self, *arguments: str, code: int = 0) -> str:
        done = commands.run(*arguments, environment=self.environment)
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + done.stderr

    def engine(self, name: str = "one") -> Started:
        arguments = ("engine", str(self.module), "--state-dir", str(self.directory / name), "--with-scheduler")
        self.processes.append(commands.start(*arguments, log=self.directory / f"{name}.log", environment=self.environment))
        return self.processes[-1]

    def client(self) -> Client:
        self.clients.append(Client.kafka(self.config))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def app(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Application]:
    app = Application(broker, application, tmp_path)
    yield app
    app.close()


def waits(client: Client, id: str) -> None:
    until(lambda: client.query(id).result(60)["waits"])


def test_callers_get_their_own_outcomes_from_several_clients(app: Application) -> None:
    """A1, A2, A6: fifty callers, three clients, threads and coroutines."""
    app.engine()
    clients = [app.client() for _ in range(3)]
    futures = [clients[n % 3].start_and_wait(f"john-{n}", {"name": f"John{n}"}, workflow="greet") for n in range(50)]
    assert [future.result(60)["message"] for future in futures] == [f"Hello John{n}!" for n in range(50)]

    async def gather() -> list[Any]:
        return await asyncio.gather(*(clients[n % 3].start_and_wait(None, {"name": n}, workflow="greet") for n in range(20)))

    assert [outcome["name"] for outcome in asyncio.run(gather())] == list(range(20))


def test_outcomes_of_runs_that_ended_before_and_of_two_runs_of_one_id(app: Application) -> None:
    """A3, A5, A9, A10, M4."""
    app.engine()
    client = app.client()
    with pytest.raises(TimeoutError, match="it is still running"):
        client.start_and_wait("w", workflow="ask", start_id="one", timeout=2).result(60)
    waits(client, "w")
    client.resume("w", "answer", 1).result(60)
    assert client.result("w").result(60) == 1
    second = client.start_and_wait("w", workflow="ask", start_id="two")
    waits(client, "w")
    client.resume("w", "answer", 2).result(60)
    assert second.result(60) == 2
    late = app.client()
    assert [late.result("w", start_id=run).result(60) for run in ("one", "two")] == [1, 2]
    assert client.start("w", workflow="ask", start_id="two").result(60).new is False
    with pytest.raises(OutcomeError, match="ValueError: bad"):
        client.start_and_wait(workflow="fail").result(60)


def test_a_caller_whose_engine_is_killed_in_between_gets_its_outcome(app: Application) -> None:
    """A4, A5, G1, G6: killed after the start, and started again only after the answer was sent."""
    engine = app.engine()
    client = app.client()
    futures = {n: client.start_and_wait(f"w{n}", workflow="ask") for n in range(8)}
    for n in futures:
        waits(client, f"w{n}")
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    answers = [client.resume(f"w{n}", "answer", n) for n in futures]
    asked = [client.query(f"w{n}") for n in futures]
    app.engine()
    assert [future.result(60) for future in futures.values()] == list(range(8))
    assert [answer.result(60) for answer in answers] == [None] * 8
    assert {shown.result(60)["status"] for shown in asked} == {"ended"}
    results = [record.key for record in read(app.config, app.config.result_topic)]
    assert sorted(results) == sorted(f"w{n}".encode() for n in futures)


def test_a_fork_is_committed_with_its_timers_and_calls_and_outlives_its_engine(app: Application) -> None:
    """Decision 0048, G1: the engine is killed as soon as the fork is answered."""
    engine, client, gate = app.engine(), app.client(), app.directory / "gate"
    asked = app.directory / "gate.asked"
    client.start("w", {"gate": str(gate)}, workflow="look_and_sleep").result(60)
    until(asked.exists)
    forks = [client.fork("w") for _ in range(20)]
    ids = [fork.result(60).id for fork in forks]
    engine.kill()
    engine.wait()
    elsewhere = next(f"e{n}" for n in range(100) if partition_of(f"e{n}".encode(), 4) != partition_of(b"w", 4))
    app.engine()
    with pytest.raises(CommandError, match=f"{elsewhere} belongs to partition"):
        client.fork("w", elsewhere).result(60)
    assert {partition_of(id.encode(), 4) for id in ids} == {partition_of(b"w", 4)} and len(set(ids)) == 20
    app.run("show", ids[0], "--save", str(app.directory / "saved.json"))
    saved = json.loads((app.directory / "saved.json").read_text())
    assert [key.partition("@")[0] for key in saved["sources"]] == ["client_cases", "kwflow.flows.attempts1"]
    assert snapshot.read_header(base64.b64decode(saved["snapshot"]))["forked"]["id"] == "w"
    gate.touch()
    for id in ("w", *ids):
        until(lambda id=id: [wait["ref"] for wait in client.query(id).result(60)["waits"]] == ["answer"])
        client.resume(id, "answer", f"for {id}").result(60)
    assert [client.result(id).result(60) for id in ("w", *ids)] == [[id, f"for {id}"] for id in ("w", *ids)]


def test_commands_are_answered_and_done_once(app: Application) -> None:
    """M1.4, M2."""
    app.engine()
    client = app.client()
    future = client.start_and_wait("w", workflow="prices")
    waits(client, "w")
    assert client.update("w", "price", 5).result(60) == {"was": 5}
    with pytest.raises(CommandError, match="negative"):
        client.update("w", "price", -1).result(60)
    client.pause("w").result(60)
    signals = [client.signal("w", "stop", "enough", command_id="once") for _ in range(2)]
    client.unpause("w").result(60)
    assert [signal.result(60) for signal in signals] == [None, None]
    assert future.result(60) == "enough"
    cancelled, terminated = client.start_and_wait("c", workflow="ask"), client.start_and_wait("t", workflow="ask")
    waits(client, "c")
    waits(client, "t")
    client.cancel("c").result(60)
    client.terminate("t", "by hand").result(60)
    with pytest.raises(OutcomeError) as ended:
        cancelled.result(60)
    assert ended.value.kind == "cancelled"
    with pytest.raises(OutcomeError, match="terminated: Terminated: by hand"):
        terminated.result(60)
    with pytest.raises(CommandError, match="not_found"):
        client.signal("w", "stop").result(60)


def test_an_outcome_is_found_wherever_its_topic_puts_it(app: Application) -> None:
    """M1.3, A1: the error topic was made by somebody else, with one partition. The result topic has four."""
    app.config = app.config.model_copy(update={"error_topic": f"{app.config.error_topic}-of-all"})
    app.environment["KWFLOW_ERROR_TOPIC"] = app.config.error_topic
    assert topics.create(topics.admin(app.config), app.config, (), partitions=1, replication=1) == [app.config.error_topic]
    app.engine()
    client = app.client()
    seen: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for n in range(8):
        client.subscribe(f"w{n}", seen.put)
        client.subscribe(f"f{n}", seen.put)
    for n in range(8):
        client.start(f"w{n}", {"name": n}, workflow="greet").result(60)
        client.start(f"f{n}", workflow="fail").result(60)
    ended = sorted((outcome.id, outcome.kind) for outcome in (seen.get(timeout=30) for _ in range(16)))
    assert ended == sorted((f"{kind[0]}{n}", kind[1]) for n in range(8) for kind in (("w", "result"), ("f", "error")))


def test_foreign_records_and_addresses_that_are_gone_harm_nobody(app: Application) -> None:
    """A7, A8, M1.2: a reply to a partition that does not exist would abort the transaction for everybody."""
    app.engine()
    client = app.client()
    future = client.start_and_wait("w", workflow="ask")
    waits(client, "w")
    producer = Producer({"bootstrap.servers": app.config.bootstrap_servers, "log_level": 0})
    partition = int(client._link.address.partition("/")[0])
    for value in (b"\xff", b"{}", b'{"request":"unknown","status":"ok"}', None):
        producer.produce(app.config.reply_topic, value, client._link.process.encode(), partition=partition)
    producer.flush(20)
    for place in ("99/gone", "0/gone", "nonsense"):
        send(app.config, app.config.resume_topic, b"w", b"null", (("kwflow-op", b"query"), ("kwflow-request", b"r"), ("kwflow-reply-to", place.encode())))
    client.resume("w", "answer", "mine").result(60)
    assert future.result(60) == "mine"
    assert client.counts["unreadable"] == 3
    [letter] = read(app.config, app.config.dead_letter_topic)
    assert dict(letter.headers)["kwflow-error-reason"] == b"bad-header"
    assert "a reply to" in (app.directory / "one.log").read_text()


def test_outcomes_are_heard_of_after_their_topic_was_given_more_partitions(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """M1.3, A1: a client lives for months, and then the partition of an id changes."""
    monkeypatch.setattr(kafka_link, "_COUNT_S", 0.1)
    client = app.client()
    before = [client.start_and_wait(f"b{n}", {"name": n}, workflow="greet", timeout=60) for n in range(8)]
    admin = topics.admin(app.config)
    [grown] = admin.create_partitions([NewPartitions(app.config.result_topic, 6)]).values()
    grown.result(30)
    until(lambda: client._link._partitions[app.config.result_topic] == 6)  # type: ignore[attr-defined]
    app.engine()
    after = [client.start_and_wait(f"a{n}", {"name": n}, workflow="greet", timeout=60) for n in range(8)]
    assert [future.result(60)["message"] for future in (*before, *after)] == [f"Hello {n}!" for n in range(8)] * 2


def test_a_subscriber_is_called_for_each_outcome_until_it_leaves(app: Application) -> None:
    """A11."""
    app.engine()
    client = app.client()
    seen: list[Outcome] = []
    leave = client.subscribe("w", seen.append)
    for n in range(2):
        client.start_and_wait("w", {"name": n}, workflow="greet").result(60)
    leave()
    client.start_and_wait("w", {"name": 3}, workflow="greet").result(60)
    assert [outcome.value["name"] for outcome in seen] == [0, 1]


def test_a_callback_may_wait_for_the_next_workflow(app: Application) -> None:
    """A1, M1.3: callbacks run on the client's thread. What they ask for is followed like anything else."""
    app.engine()
    client = app.client()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def begin(n: int) -> None:
        future = client.start_and_wait(f"w{n}", {"name": n}, workflow="greet")
        future.add_done_callback(lambda done: (ended.put(done.result()["message"]), begin(n + 1) if n < 7 else None))

    begin(0)
    assert [ended.get(timeout=30) for _ in range(8)] == [f"Hello {n}!" for n in range(8)]


def test_without_an_engine_the_outcome_is_unknown_and_a_repeat_is_done_once(app: Application) -> None:
    """A4, M1.4."""
    app.config = app.config.model_copy(update={"command_timeout_s": 1})
    client = app.client()
    with pytest.raises(OutcomeUnknown, match="repeat it") as unknown:
        client.start("w", workflow="ask").result(60)
    app.config = app.config.model_copy(update={"command_timeout_s": 60})
    app.engine()
    patient = app.client()
    assert patient.start("w", workflow="ask", start_id=unknown.value.command_id).result(60).new is False
    patient.resume("w", "answer", 1).result(60)
    assert [record.value for record in read(app.config, app.config.result_topic)] == [b"1"]


def test_a_client_without_broker_or_topics_is_refused_when_it_is_made(broker: str) -> None:
    """AF-6."""
    with pytest.raises(TransportError):
        Client.kafka(Config(bootstrap_servers="127.0.0.1:1", client_connect_s=0.5))
    with pytest.raises(TransportError, match="has no topic nowhere-resume.*kwflow topics create"):
        Client.kafka(Config(bootstrap_servers=broker, resume_topic="nowhere-resume"))


def test_a_client_whose_topic_was_deleted_is_told_of_that(app: Application) -> None:
    """M1.4: not that the outcome is unknown, after a timeout. librdkafka would take the topic for one that was just created."""
    client = app.client()
    admin = topics.admin(app.config)
    [deleted] = admin.delete_topics([app.config.resume_topic]).values()
    deleted.result(30)
    while app.config.resume_topic in topics.partitions_of(admin, app.config):  # until then a broker accepts records for the topic, which are lost with it
        continue
    with pytest.raises(TransportError, match=f"did not accept the record for {app.config.resume_topic}: (Broker: Unknown topic|Local: Unknown partition)"):  # known or not when it was sent
        client.start("w", workflow="greet").result(60)


def test_topics_that_were_created_are_known_at_once(broker: str, application: str) -> None:
    """K12: `kwflow topics create` and then a client, in one script."""
    for turn in range(8):
        names = {f"{topic}_topic": f"{application}-{topic}" for topic in ("resume", "result", "scheduler", "reply")}
        config = Config(bootstrap_servers=broker, application_id=application, error_topic=f"{application}-error-{turn}", **names)
        admin = topics.admin(config)
        topics.create(admin, config, (), 1, 1)
        assert config.error_topic in topics.partitions_of(admin, config)


def test_the_reply_topic_is_made_with_a_short_retention_and_checked(app: Application) -> None:
    """M1.2."""
    admin = topics.admin(app.config)
    settings = topics.settings_of(admin, [app.config.reply_topic])[app.config.reply_topic]
    assert (settings["cleanup.policy"], settings["retention.ms"]) == ("delete", "3600000")
    app.run("topics", "check")
    wrong = app.config.model_copy(update={"reply_topic": app.config.changelog_topic})
    assert any("it must be delete" in problem for problem in topics.problems(admin, wrong, (), [wrong.application_id]))


def test_a_timer_set_before_a_kill_fires_in_the_next_engine_though_nothing_else_comes(app: Application) -> None:
    """K18: the marker of the transaction that set it is the last in its partition."""
    engine = app.engine()
    client = app.client()
    future = client.start_and_wait("c", 100, workflow="child")
    waits(client, "c")
    until(lambda: list(read(app.config, app.config.timers_changelog_topic)))
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    app.engine()
    assert future.result(60) == 100


def test_twenty_children_and_their_parent_end_once_although_engines_are_killed(app: Application) -> None:
    """M5, G1: two engines, killed in turn while children start, sleep and end."""
    engines = {name: app.engine(name) for name in ("one", "two")}
    client = app.client()
    future = client.start_and_wait("p", 20, workflow="parent")
    ended = 0
    for turn in range(4):
        name = ("one", "two")[turn % 2]
        until(lambda known=ended: future.done() or len(list(read(app.config, app.config.result_topic))) > known)
        ended = len(list(read(app.config, app.config.result_topic)))
        engines[name].send_signal(signal.SIGKILL)
        engines[name].wait()
        engines[name] = app.engine(name)
    assert future.result(90) == sum(range(20))
    results = [record.key for record in read(app.config, app.config.result_topic)]
    assert len(results) == len(set(results)) == 21
    assert not list(read(app.config, app.config.dead_letter_topic))
