"""A real Kafka for the tests: an existing one, one by Docker, or one from Maven jars; else skipped, or failed if required."""

import os
import pathlib
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient

ROOT = pathlib.Path(__file__).parents[2]
LIB = ROOT / ".kafka/lib"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def jars() -> pathlib.Path:
    if not list(LIB.glob("kafka_2.13-*.jar")):
        LIB.mkdir(parents=True, exist_ok=True)
        pom = pathlib.Path(__file__).parent / "pom.xml"
        command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={LIB}"]
        subprocess.run(command, check=True, timeout=300)
    return LIB


def properties(directory: pathlib.Path, port: int, controller: int) -> str:
    return f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={directory}/log
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
auto.create.topics.enable=false
"""


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its bootstrap servers."""
    given = os.environ.get("KWFLOW_TEST_BOOTSTRAP")
    if given:
        yield given
    elif shutil.which("java") and shutil.which("mvn"):
        yield from from_jars(tmp_path_factory.mktemp("kafka"))
    elif shutil.which("docker"):
        from testcontainers.kafka import KafkaContainer

        with KafkaContainer("confluentinc/cp-kafka:8.0.0").with_kraft() as container:
            yield container.get_bootstrap_server()
    else:
        reason = "NOT TESTED: no Kafka (KWFLOW_TEST_BOOTSTRAP, Docker, or java with mvn)"
        if os.environ.get("KWFLOW_REQUIRE_KAFKA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def from_jars(directory: pathlib.Path) -> Iterator[str]:
    port, controller = free_port(), free_port()
    server = directory / "server.properties"
    server.write_text(properties(directory, port, controller))
    logging = directory / "log4j2.properties"
    logging.write_text("rootLogger.level=warn\nrootLogger.appenderRef.a.ref=A\nappender.a.type=Console\nappender.a.name=A\n")
    java = ["java", "-cp", f"{jars()}/*", f"-Dlog4j2.configurationFile={logging}"]
    with open(directory / "broker.log", "w") as log:
        subprocess.run([*java, "-Xmx256m", "kafka.tools.StorageTool", "format", "-t", "kwflowTestClusterAAAAA", "-c", str(server)], check=True, stdout=log, stderr=log, timeout=60)
        process = subprocess.Popen([*java, "-Xms256m", "-Xmx512m", "kafka.Kafka", str(server)], stdout=log, stderr=log)
    try:
        wait_for(f"127.0.0.1:{port}", process, directory)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(bootstrap: str, process: "subprocess.Popen[bytes]", directory: pathlib.Path) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, (directory / "broker.log").read_text()[-3000:]
        assert time.monotonic() < deadline, "the broker did not come up within 60 s"
        try:
            if admin.list_topics(timeout=1).brokers:
                return
        except Exception:
            continue


@pytest.fixture
def application() -> str:
    """A fresh application id; its topics carry it."""
    return f"app-{uuid.uuid4().hex[:8]}"
