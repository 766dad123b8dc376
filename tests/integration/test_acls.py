"""A broker that allows each user what docs/OPERATIONS.md says it needs, and nothing else (StandardAuthorizer, SASL over TLS)."""

import argparse
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, AdminClient, ResourcePatternType, ResourceType  # type: ignore[attr-defined]

from kwflow.client import Client
from kwflow.config import Config
from kwflow.errors import TransportError
from kwflow.runners.kafka import link as kafka_link
from tests.integration.broker import Secured, can_start
from tests.integration.site import ROOT, TRIP
from tests.waiting import until

pytestmark = [pytest.mark.broker, pytest.mark.slow]
USERS = ("engine", "worker", "feed", "client", "operator", "reader")
KINDS = {"topic": ResourceType.TOPIC, "group": ResourceType.GROUP, "transactional_id": ResourceType.TRANSACTIONAL_ID}

PAY = """
import kwflow as kw

@kw.activity(queue="payments", heartbeat=60)
def charge(cents: int) -> str:
    info = kw.activity_info()
    assert info.heartbeat_details is None
    info.heartbeat({"asked": cents})
    return f"paid {cents}"

@kw.workflow
def pay(cents):
    return (yield charge(cents))

@kw.feed("orders")
def orders(cents: int):
    return kw.Start(f"fed-{cents}", cents, workflow=pay)
"""


def bindings(line: str) -> Iterator[AclBinding]:
    """The ACLs that a line of `kafka-acls` adds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--add", action="store_true", required=True)
    parser.add_argument("--allow-principal", required=True)
    parser.add_argument("--resource-pattern-type", default="literal")
    for name in ("--topic", "--group", "--transactional-id", "--operation"):
        parser.add_argument(name, action="append", default=[])
    said = parser.parse_args(shlex.split(line, comments=True)[1:])
    for kind, restype in KINDS.items():
        for name in getattr(said, kind):
            for operation in said.operation:
                known = AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()]
                yield AclBinding(restype, name, ResourcePatternType[said.resource_pattern_type.upper()], said.allow_principal, "*", known, AclPermissionType.ALLOW)


class Estate:
    """The broker, and the application `shop` on it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.broker = Secured(directory / "kafka", USERS)
        self.broker.start()
        self.admin = AdminClient({"bootstrap.servers": self.broker.bootstrap, "log_level": 0})
        self.processes: list[subprocess.Popen[str]] = []
        self.pay = str(directory / "pay.py")
        pathlib.Path(self.pay).write_text(PAY)
        subprocess.run(self.command("topics", "create", TRIP, self.pay, "--partitions", "4"), env=self.environment(None), cwd=ROOT, check=True, capture_output=True, timeout=60)

    def allow(self, lines: list[str]) -> None:
        for future in self.admin.create_acls([binding for line in lines for binding in bindings(line)], request_timeout=10).values():
            future.result(20)
        for user in {re.search(r"User:(\w+)", line)[1] for line in lines}:  # type: ignore[index] # each line has one
            admin = AdminClient({"bootstrap.servers": self.broker.secured, "log_level": 0, **self.settings(user)})
            until(lambda admin=admin: admin.list_topics(timeout=10).topics)  # type: ignore[misc]  # an ACL does not reach all brokers at once

    def settings(self, user: str) -> dict[str, str]:
        return {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": user, "sasl.password": Secured.PASSWORD, "ssl.ca.location": str(self.broker.certificate)}

    def environment(self, user: str | None) -> dict[str, str]:
        about = {"KWFLOW_BOOTSTRAP_SERVERS": self.broker.bootstrap if user is None else self.broker.secured, "KWFLOW_APPLICATION_ID": "shop"}
        return {**os.environ, **about, **({} if user is None else {"KWFLOW_KAFKA": json.dumps(self.settings(user))})}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "kwflow", *arguments]

    def says(self, user: str, code: int, *arguments: str) -> str:
        done = subprocess.run(self.command(*arguments), env=self.environment(user), cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def engine(self, name: str) -> "subprocess.Popen[str]":
        command = self.command("engine", TRIP, self.pay, "--with-scheduler", "--state-dir", str(self.directory / name), "--wait-for-broker", "10")
        return self.began(name, "engine", command)

    def worker(self) -> "subprocess.Popen[str]":
        return self.began("worker", "worker", self.command("worker", self.pay, "--wait-for-broker", "10"))

    def feed(self) -> "subprocess.Popen[str]":
        return self.began("feed", "feed", self.command("feed", self.pay, "--state-dir", str(self.directory / "feed"), "--wait-for-broker", "10"))

    def began(self, name: str, user: str, command: list[str]) -> "subprocess.Popen[str]":
        with open(self.directory / f"{name}.log", "w") as log:
            self.processes.append(subprocess.Popen(command, env=self.environment(user), cwd=ROOT, stderr=log, text=True))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.broker.kill()


@pytest.fixture
def estate(tmp_path: pathlib.Path) -> Iterator[Estate]:
    if not can_start():
        pytest.skip("NOT TESTED: no broker with users (java with mvn)")
    estate = Estate(tmp_path)
    yield estate
    estate.close()


def documented() -> list[str]:
    lines = [line for line in (ROOT / "docs/OPERATIONS.md").read_text().splitlines() if line.startswith("kafka-acls ")]
    assert len(lines) >= 6
    return lines


def test_engine_worker_feed_client_and_operator_need_no_more_than_is_documented_and_a_user_that_lacks_it_is_told(estate: Estate) -> None:
    """K1, K19, AF-6: a takeover from an engine that was killed, its fencing included. None of it needs rights on the cluster."""
    estate.allow(documented())
    config = Config(application_id="shop", bootstrap_servers=estate.broker.secured, kafka=estate.settings("client"))
    first, worker, feed = estate.engine("one"), estate.worker(), estate.feed()
    others = Producer({"bootstrap.servers": estate.broker.bootstrap, "log_level": 0})
    others.produce("orders", "77")
    assert others.flush(20) == 0
    with Client.kafka(config) as client:
        outcome = client.start_and_wait("trip", {"timeout": 60_000}, timeout=120)
        assert client.start_and_wait("pay", 300, workflow="pay", timeout=120).result() == "paid 300"
        asked: list[str] = []
        until(lambda: len(refs(client, asked)) == 3)
        client.resume("trip", asked[0], "booked").result(60)
        first.send_signal(signal.SIGKILL)
        first.wait()
        second = estate.engine("two")
        for ref in asked[1:]:
            client.resume("trip", ref, "booked").result(60)
        outcome.result(120)
    everything = config.model_copy(update={"bootstrap_servers": estate.broker.bootstrap, "kafka": {}})
    until(lambda: any(record.key == b"fed-77" and record.value == b'"paid 77"' for record in kafka_link.read(everything, "workflow-result")))
    assert second.poll() is None and worker.poll() is None and feed.poll() is None
    for name in ("two", "worker", "feed"):
        log = (estate.directory / f"{name}.log").read_text()
        assert "uthori" not in log, log
    estate.says("operator", 0, "topics", "check", TRIP)
    assert "trip_booking" in estate.says("operator", 0, "code", "list")
    estate.says("operator", 0, "code", "gc")
    estate.says("operator", 0, "dead-letters", "list")
    estate.says("operator", 0, "list")

    right = estate.settings("client")
    for settings, why in (
        ({}, "if the broker expects TLS or a user, set security.protocol in [kafka]"),
        ({name: value for name, value in right.items() if name != "ssl.ca.location"}, "signed by a CA that [kafka] ssl.ca.location does not have"),
        (right | {"sasl.password": "hunter2"}, "Invalid username or password"),
    ):
        with pytest.raises(TransportError) as caught:
            Client.kafka(Config(application_id="shop", bootstrap_servers=estate.broker.secured, kafka=settings, client_connect_s=0.5))
        assert why in str(caught.value) and estate.broker.secured in str(caught.value) and "hunter2" not in str(caught.value)

    estate.allow(["kafka-acls --add --allow-principal User:reader --resource-pattern-type prefixed --topic shop- --group shop --operation Read --operation DescribeConfigs"])
    said = estate.says("reader", 1, "topics", "check")
    assert "no ACL for WRITE on topic shop-dead-letter, shop-code" in said
    assert re.search(r"no ACL for anything, not even seeing whether it exists, on topic workflow-resume.*workflow-reply", said)
    assert "no ACL for WRITE" in estate.says("reader", 1, "engine", TRIP, "--state-dir", str(estate.directory / "three"))
    assert "no ACL for WRITE on topic shop-dead-letter\n" in estate.says("reader", 1, "worker", estate.pay)
    refused = estate.says("reader", 3, "code", "gc")
    assert "Transactional Id authorization failed" in refused and "bug" not in refused


def refs(client: Client, found: list[str]) -> list[str]:
    """What the saga has asked for so far."""
    found[:] = [wait["ref"] for wait in client.query("trip").result(60)["waits"] if wait["kind"] == "suspension"]
    return found
