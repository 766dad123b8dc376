"""Nothing that a workflow is given, holds or writes is readable on the broker (decision 0060)."""

import json
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from confluent_kafka import Consumer, TopicPartition

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import TransportError, UsageError
from kwflow.runners.kafka import upkeep
from kwflow.runners.kafka.encryption import Encryption
from tests.integration.site import Site

pytestmark = [pytest.mark.broker, pytest.mark.slow]

ONE, TWO = "1" * 64, "2" * 64
SECRET = "tangerine"  # in every input, variable, signal, call, result, status and error
SOURCE = '''
import os

import kwflow as kw
from kwflow import rest

QUEUE = os.environ["QUEUE"]
FOREIGN = os.environ["FOREIGN"]


@kw.activity(queue=QUEUE)
def far(secret: str) -> str:
    return "far " + secret


@kw.activity(queue=QUEUE)
def one_of_many(secret: str) -> str: ...


@kw.batch_of(one_of_many, size=1, within=0)
def many(calls):
    return ["many " + call.arguments["secret"] for call in calls]


@kw.activity
def near(secret: str) -> str:
    return "near " + secret


@kw.workflow
def child(secret):
    return (yield rest.call("POST", os.environ["SERVICE"], body={"posted": secret}, callback=False)).response


def main(opts):
    secret = opts["secret"]
    kw.set_status({"about": secret})
    told = yield kw.wait_signal("more")
    found = yield kw.all([far(secret), one_of_many(secret), near(secret), kw.start_child("child", secret), kw.sleep(0.1)])
    answer = yield kw.suspend("answer")
    return [secret, told, found, answer]


@kw.workflow
def fails(opts):
    raise ValueError(opts["secret"])
    yield


@kw.feed(FOREIGN)
def read(order):
    return kw.Start(order["id"], order, "secret_flows")
'''


class Echo(BaseHTTPRequestHandler):
    """A service that answers with what it was sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path, service: str) -> Iterator[Site]:
    (tmp_path / "secret_flows.py").write_text(SOURCE)
    environment = {
        "KWFLOW_ENCRYPTION_KEYS": json.dumps([ONE]),
        "KWFLOW_REPLY_TOPIC": f"{application}-reply",
        "KWFLOW_HISTORY_TOPIC": f"{application}-history",
        "QUEUE": f"{application}-queue",
        "FOREIGN": f"{application}-foreign",
        "SERVICE": service,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "KWFLOW_KAFKA": '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "log_level": 0}',
    }
    site = Site(broker, application, tmp_path, partitions=2, modules=("secret_flows",), environment=environment)
    yield site
    site.end()


def raw(site: Site) -> dict[str, list[bytes]]:
    """Topic -> value and headers of each of its records, as stored, those of aborted transactions included."""
    consumer = Consumer({"bootstrap.servers": site.broker, "group.id": "raw", "log_level": 0, "enable.partition.eof": True, "isolation.level": "read_uncommitted", "enable.auto.commit": False})
    there = {name: topic for name, topic in consumer.list_topics(timeout=10).topics.items() if name.startswith(site.application)}
    found: dict[str, list[bytes]] = {name: [] for name in there}
    left = {(name, number) for name, topic in there.items() for number in topic.partitions}
    consumer.assign([TopicPartition(name, number, 0) for name, number in left])
    while left:
        for message in consumer.consume(500, 0.2):
            if message.error() is None:
                found[message.topic() or ""].append((message.value() or b"") + b"".join(value for _, value in message.headers() or () if isinstance(value, bytes)))
            else:
                left.discard((message.topic() or "", message.partition() or 0))
    consumer.close()
    return found


def client(site: Site, *keys: str) -> Client:
    named = {f"{name}_topic": site.topic(name) for name in ("resume", "result", "error", "scheduler", "reply")}
    return Client.kafka(Config(bootstrap_servers=site.broker, application_id=site.application, encryption_keys=list(keys), command_timeout_s=20, **named))


def serve(site: Site, directory: str = "one") -> None:
    site.started("one.log", "engine", "secret_flows", "--state-dir", str(site.directory / directory), "--with-scheduler", "--with-feeds")
    site.started("worker.log", "worker", "secret_flows", "--queue", f"{site.application}-queue")


def stop(site: Site) -> None:
    for process in site.processes:
        process.terminate()
        assert process.wait(30) == 0
    site.processes.clear()


def through(site: Site, id: str, starts: bool = True) -> None:
    """A workflow from its start to its end."""
    with client(site, ONE) as caller:
        if starts:
            caller.start(id, {"secret": SECRET}, workflow="secret_flows").result(60)
        caller.signal(id, "more", SECRET).result(60)
        site.until(lambda: "answer" in site.run("show", id))
        assert f"secret = '{SECRET}'" in site.run("show", id, "--locals")
        assert caller.query(id).result(60)["status_value"] == {"about": SECRET}
        caller.resume(id, "answer", SECRET).result(60)
        assert caller.result(id).result(60) == [SECRET, SECRET, [f"far {SECRET}", f"many {SECRET}", f"near {SECRET}", {"posted": SECRET}, None], SECRET]


def test_nothing_that_a_workflow_holds_lies_readable_on_the_broker_and_everybody_with_the_key_reads_it(site: Site) -> None:
    """Client, engine, scheduler, worker, feed, history and commands, with engines killed in between."""
    serve(site)
    through(site, "first")
    site.processes[0].send_signal(signal.SIGKILL)
    site.processes[0].wait()
    with client(site, ONE) as caller:
        handle = caller.start("second", {"secret": SECRET}, workflow="secret_flows")
        site.processes[0] = site.started("again.log", "engine", "secret_flows", "--state-dir", str(site.directory / "other"), "--with-scheduler", "--with-feeds")
        handle.result(60)
        with pytest.raises(Exception, match=SECRET):
            caller.start_and_wait("third", {"secret": SECRET}, workflow="fails").result(60)
    through(site, "second", starts=False)
    site.producer.produce(f"{site.application}-foreign", json.dumps({"id": "fourth", "secret": SECRET}), b"x")
    site.send("fifth", json.dumps({"ref": "nobody"}) + SECRET)  # from a program without the key; it becomes a dead letter
    site.until(lambda: "fourth" in site.run("list"), 10)
    through(site, "fourth", starts=False)
    site.until(lambda: "fifth" in site.run("dead-letters", "list"))
    [letter] = [row["letter"] for row in json.loads(site.run("dead-letters", "list", "--json")) if row["id"] == "fifth"]
    assert SECRET in site.run("dead-letters", "show", letter)
    assert "ended: result" in site.run("history", "fourth")
    lying = raw(site)
    of_others = {f"{site.application}-foreign": 1, site.topic("resume"): 1}
    assert {topic: count for topic, values in lying.items() if (count := sum(SECRET.encode() in value for value in values))} == of_others
    for topic in ("resume", "result", "error", "reply", "scheduler", "queue", "history", "code", "state-changelog", "timers-changelog", "dead-letter"):
        encrypted = [value.startswith(b"\0KWE\1") for value in lying[site.topic(topic)] if value]
        assert encrypted and encrypted.count(False) == (topic == "resume"), topic


def test_who_lacks_the_key_is_told_so_and_nothing_is_lost(site: Site) -> None:
    serve(site)
    with client(site, ONE) as caller:
        caller.start("a", {"secret": SECRET}, workflow="secret_flows").result(60)
    with client(site) as without, pytest.raises(TransportError, match="encrypted with key .* not in encryption_keys"):
        without.signal("a", "more", 1).result(60)
    stop(site)
    keyed = site.environment["KWFLOW_ENCRYPTION_KEYS"]
    for keys, directory in (("[]", "one"), ("[]", "fresh"), (json.dumps([TWO]), "one")):  # with a local copy of the state, and without one
        site.environment["KWFLOW_ENCRYPTION_KEYS"] = keys
        engine = site.started("keyless.log", "engine", "secret_flows", "--state-dir", str(site.directory / directory))
        assert engine.wait(60) == 1
        assert "not in encryption_keys" in (site.directory / "keyless.log").read_text()
        assert "not in encryption_keys" in site.fails(1, "show", "a")
    site.environment["KWFLOW_ENCRYPTION_KEYS"] = json.dumps([TWO, ONE])
    serve(site)
    site.until(lambda: "answer" in site.run("show", "a"))
    site.environment["KWFLOW_ENCRYPTION_KEYS"] = keyed
    with client(site, TWO, ONE) as caller:
        caller.resume("a", "answer", SECRET).result(60)
        assert caller.result("a").result(60)[0] == SECRET


def test_a_record_encrypted_with_a_key_that_an_engine_lacks_is_a_dead_letter_until_it_has_it(site: Site) -> None:
    serve(site)
    with client(site, TWO) as other:
        other.start("a", {"secret": SECRET}, workflow="secret_flows").cancel()
        site.until(lambda: "encrypted" in site.run("dead-letters", "list"))
    stop(site)
    site.environment["KWFLOW_ENCRYPTION_KEYS"] = json.dumps([ONE, TWO])
    serve(site)
    site.run("dead-letters", "retry", "--all")
    site.until(lambda: '"a"' in site.run("list", "--json"))
    with client(site, ONE, TWO) as caller:
        caller.signal("a", "more", 1).result(60)


def test_after_reencrypt_nothing_of_the_state_and_the_code_needs_the_old_key(site: Site) -> None:
    """From plain to a key, and from that key to the next one, while a workflow sleeps."""
    site.environment["KWFLOW_ENCRYPTION_KEYS"] = "[]"
    serve(site)
    with client(site) as caller:
        caller.start("a", {"secret": SECRET}, workflow="secret_flows").result(60)
    stop(site)
    assert "there is no key to encrypt with" in site.refused("topics", "reencrypt")
    site.environment["KWFLOW_ENCRYPTION_TOPICS"] = json.dumps([site.topic("foreign"), site.topic("foregin")])
    assert site.fails(1, "topics", "check", "secret_flows") == f"topic {site.topic('foregin')}, which encryption_topics names, is missing\n"
    del site.environment["KWFLOW_ENCRYPTION_TOPICS"]
    for keys in ([ONE], [TWO, ONE]):
        site.environment["KWFLOW_ENCRYPTION_KEYS"] = json.dumps(keys)
        assert "entries rewritten" in site.run("topics", "reencrypt")
    site.environment["KWFLOW_ENCRYPTION_KEYS"] = json.dumps([TWO])
    for name in ("state-changelog", "code"):
        last = raw(site)[site.topic(name)][-1]
        assert last.startswith(b"\0KWE\1"), name
    serve(site, "fresh")
    with client(site, TWO) as caller:
        caller.signal("a", "more", SECRET).result(60)
        site.until(lambda: "answer" in site.run("show", "a"))


def test_a_call_that_is_sent_again_from_the_dead_letters_is_encrypted_as_it_was(site: Site) -> None:
    """The command loads no module, so no activity tells it which topic is a queue."""
    serve(site)
    call = {"resume_topic": site.topic("resume"), "workflow_id": "a", "ref": "none", "activity": "far", "attempt": 1, "idempotency_key": "a|1:1", "arguments": {"secret": SECRET}}
    value, _ = Encryption(Config(encryption_keys=[ONE])).encrypt("workflow-resume", json.dumps(call).encode())
    theirs, _ = Encryption(Config(encryption_keys=[TWO])).encrypt("workflow-resume", b"{}")
    for broken in (value, b"\0KWE\1", (value or b"")[:-1], theirs):  # none of them is a call, and none ends a worker
        site.producer.produce(site.topic("queue"), broken, b"a|1:1")
    site.producer.flush(20)
    site.until(lambda: len(json.loads(site.run("dead-letters", "list", "--json"))) == 4)
    assert sorted(row["reason"] for row in json.loads(site.run("dead-letters", "list", "--json"))) == ["bad-job", *["encrypted"] * 3]
    assert site.run("dead-letters", "retry", "--all", "--reason", "bad-job").count("sent again") == 1
    assert not [topic for topic, values in raw(site).items() if any(SECRET.encode() in value for value in values)]
    assert site.processes[1].poll() is None


def test_reencrypt_goes_on_no_further_once_an_engine_has_started(site: Site) -> None:
    """It would write what it has read behind that engine's steps, which would be undone at the next takeover."""
    serve(site)
    with client(site, ONE) as caller:
        caller.start("a", {"secret": SECRET}, workflow="secret_flows").result(60)
    stop(site)
    site.environment["KWFLOW_ENCRYPTION_KEYS"] = json.dumps([TWO, ONE])
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 1:
            site.started("new.log", "engine", "secret_flows", "--state-dir", str(site.directory / "one"))
            site.until(lambda: (site.directory / "new.log").read_text().count("owns") == 2)

    named = {f"{name}_topic": site.topic(name) for name in ("resume", "scheduler")}
    config = Config(bootstrap_servers=site.broker, application_id=site.application, encryption_keys=[TWO, ONE], **named)
    with pytest.raises(UsageError, match=f"{site.application}.* was started meanwhile; stop every engine"):
        upkeep.reencrypt(config, say)
    with client(site, TWO, ONE) as caller:
        caller.signal("a", "more", SECRET).result(60)
