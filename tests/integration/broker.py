"""A Kafka of our own from Maven's jars, with one node or three: started, killed with SIGKILL, and started again on the same log."""

import contextlib
import fcntl
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

__all__ = ["Broker", "Cluster", "Guarded", "Secured", "can_start", "free_port"]

ROOT = pathlib.Path(__file__).parents[2]
VERSION = os.environ.get("KWFLOW_TEST_KAFKA")  # a version other than pom.xml's, such as 3.7.2
LIB = ROOT / ".kafka" / (VERSION or "lib")


def can_start() -> bool:
    return bool(shutil.which("java") and shutil.which("mvn"))


def free_port(count: int = 1) -> int:
    """Return the first of `count` consecutive free ports.

    They are below those that the kernel gives to outgoing connections, so nobody takes them while their server is down.
    """
    while True:
        first = random.SystemRandom().randrange(12_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def jars() -> pathlib.Path:
    """The directory of Kafka's jars, which are fetched once; test processes that start together wait for each other."""
    LIB.mkdir(parents=True, exist_ok=True)
    with open(LIB.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(LIB.glob("kafka_2.13-*.jar")):
            pom = pathlib.Path(__file__).parent / "pom.xml"
            command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={LIB}", *([f"-Dkafka.version={VERSION}"] if VERSION else [])]
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


class Broker:
    """A broker of one node; `bootstrap` stays the same over restarts."""

    jvm = ("-XX:TieredStopAtLevel=1",)  # without the optimising compiler, which halves the processor time of a start

    def __init__(self, directory: pathlib.Path, port: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        port = port or free_port(2)
        self.bootstrap = f"127.0.0.1:{port}"
        self._server = directory / "server.properties"
        self._server.write_text(self.properties(port))
        logging = directory / "log4j2.properties"
        logging.write_text("rootLogger.level=warn\nrootLogger.appenderRef.a.ref=A\nappender.a.type=Console\nappender.a.name=A\n")
        self._java = ["java", *self.jvm, "-cp", f"{jars()}/*", f"-Dlog4j2.configurationFile={logging}"]
        self._log = open(directory / "broker.log", "w")
        format = [*self._java, "-Xmx256m", "kafka.tools.StorageTool", "format", "-t", "kwflowTestClusterAAAAA", "-c", str(self._server)]
        subprocess.run(format, check=True, stdout=self._log, stderr=self._log, timeout=60)

    def properties(self, port: int) -> str:
        return properties(self.directory, port, port + 1)

    def launch(self) -> None:
        self._process = subprocess.Popen([*self._java, "-Xms256m", "-Xmx512m", "kafka.Kafka", str(self._server)], stdout=self._log, stderr=self._log)

    def start(self) -> None:
        """Start the broker; it answers when this returns."""
        self.launch()
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        deadline = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, (self.directory / "broker.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the broker did not come up within 60 s"
            try:
                if admin.list_topics(timeout=1).brokers:
                    return
            except Exception:
                continue

    def stop(self) -> None:
        """Stop it as an operator does: its leaderships move to other nodes first, if there are any."""
        self._process.terminate()
        self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """What is sent to it lies in its sockets until it thaws."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)


class Secured(Broker):
    """A broker with a second listener, for TLS, whose users may do what ACLs allow; users of the first one may do everything."""

    PASSWORD = "secret"

    def __init__(self, directory: pathlib.Path, users: Iterable[str]) -> None:
        self.users = users
        self.secured = f"127.0.0.1:{free_port()}"
        self.certificate = directory / "ca.pem"
        directory.mkdir(parents=True, exist_ok=True)
        store = ["-alias", "broker", "-keystore", str(directory / "keys.p12"), "-storepass", self.PASSWORD]
        subprocess.run(["keytool", "-genkeypair", "-keyalg", "EC", "-dname", "CN=broker", "-ext", "san=ip:127.0.0.1", *store], check=True, capture_output=True, timeout=60)
        subprocess.run(["keytool", "-exportcert", "-rfc", "-file", str(self.certificate), *store], check=True, capture_output=True, timeout=60)
        super().__init__(directory)

    def properties(self, port: int) -> str:
        users = " ".join(f'user_{user}="{self.PASSWORD}"' for user in self.users)
        plain = super().properties(port).replace(f"listeners=PLAINTEXT://127.0.0.1:{port}", f"listeners=PLAINTEXT://127.0.0.1:{port},SASL_SSL://{self.secured}")
        return (
            plain.replace("protocol.map=", "protocol.map=SASL_SSL:SASL_SSL,")
            + f"""authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required {users};
ssl.keystore.location={self.directory}/keys.p12
ssl.keystore.password={self.PASSWORD}
"""
        )


class Guarded(Broker):
    """A broker with two more listeners: `certified`, for clients with a certificate, and `named`, for users of SCRAM and bearers of tokens.

    One certificate is everybody's, and its own CA.  Sessions end after `SESSION_S` unless the client authenticates itself again.
    """

    USER, PASSWORD = "shop", "secret"
    SESSION_S = 5
    AUDIENCE, ISSUER = "kafka", "https://tokens.example"

    def __init__(self, directory: pathlib.Path, keys: str) -> None:
        """`keys` is the URL of the public keys that tokens are signed with."""
        directory.mkdir(parents=True, exist_ok=True)
        self.certificate, self.key = directory / "shop.pem", directory / "shop.key"
        request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=shop", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*request, "-keyout", str(self.key), "-out", str(self.certificate)], check=True, capture_output=True, timeout=30)
        (directory / "both.pem").write_bytes(self.key.read_bytes() + self.certificate.read_bytes())
        self.certified, self.named, self.keys = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", keys
        self.jvm = (*Broker.jvm, f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={keys}")
        super().__init__(directory)

    def start(self) -> None:
        super().start()
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        scram = UserScramCredentialUpsertion(self.USER, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), self.PASSWORD.encode())
        for future in admin.alter_user_scram_credentials([scram]).values():
            future.result(20)

    def properties(self, port: int) -> str:
        first, oauth = f"listeners=PLAINTEXT://127.0.0.1:{port}", "org.apache.kafka.common.security.oauthbearer"
        plain = super().properties(port).replace(first, f"{first},SSL://{self.certified},SASL_SSL://{self.named}")
        return (
            plain.replace("protocol.map=", "protocol.map=SSL:SSL,SASL_SSL:SASL_SSL,")
            + f"""ssl.keystore.type=PEM
ssl.keystore.location={self.directory}/both.pem
ssl.truststore.type=PEM
ssl.truststore.location={self.certificate}
listener.name.ssl.ssl.client.auth=required
sasl.enabled.mechanisms=SCRAM-SHA-512,OAUTHBEARER
connections.max.reauth.ms={self.SESSION_S * 1000}
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.oauthbearer.sasl.jaas.config={oauth}.OAuthBearerLoginModule required;
listener.name.sasl_ssl.oauthbearer.sasl.server.callback.handler.class={oauth}.OAuthBearerValidatorCallbackHandler
sasl.oauthbearer.jwt.validator.class={oauth}.BrokerJwtValidator
sasl.oauthbearer.jwks.endpoint.url={self.keys}
sasl.oauthbearer.expected.audience={self.AUDIENCE}
sasl.oauthbearer.expected.issuer={self.ISSUER}
"""
        )


class Node(Broker):
    """One node of several."""

    def __init__(self, directory: pathlib.Path, number: int, ports: list[int]) -> None:
        self.number = number
        self.ports = ports
        super().__init__(directory, ports[number])

    def properties(self, port: int) -> str:
        voters = ",".join(f"{number + 1}@127.0.0.1:{of + 1}" for number, of in enumerate(self.ports))
        alone = super().properties(port).replace("node.id=1", f"node.id={self.number + 1}").replace(f"=1@127.0.0.1:{port + 1}", f"={voters}")
        alone = alone.replace("replication.factor=1", "replication.factor=3").replace("min.isr=1", "min.isr=2")
        return alone + "min.insync.replicas=2\nbroker.session.timeout.ms=3000\nbroker.heartbeat.interval.ms=500\n"


class Cluster:
    """Three nodes; a record is on at least two of them before it is acknowledged."""

    def __init__(self, directory: pathlib.Path) -> None:
        ports = [free_port(2) for _ in range(3)]
        self.nodes = [Node(directory / str(number), number, ports) for number in range(3)]
        self.bootstrap = ",".join(node.bootstrap for node in self.nodes)
        self.admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def start(self) -> None:
        for node in self.nodes:
            node.launch()
        self.settle()

    def settle(self) -> None:
        """Wait until every partition is in sync on all nodes again."""
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline, "the nodes did not come together within 120 s"
            with contextlib.suppress(KafkaException):
                found = self.admin.list_topics(timeout=2)
                if len(found.brokers) == 3 and all(len(partition.isrs) == 3 for topic in found.topics.values() for partition in topic.partitions.values()):
                    return

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()
