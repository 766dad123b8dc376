"""The ways in which clients prove who they are: a certificate (mTLS), SCRAM, and tokens (OAUTHBEARER) that librdkafka or a function of ours gets.

Each session ends after `Guarded.SESSION_S`, in the middle of transactions and while clients idle, unless they authenticate themselves again.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import pytest

from kwflow.client import Client
from kwflow.client.futures import Future
from kwflow.config import Config
from tests import commands
from tests.integration.broker import Guarded, can_start
from tests.integration.tokens import TokenService

pytestmark = [pytest.mark.broker, pytest.mark.slow]
METHODS = ("mtls", "scram", "oidc", "callback")
SECRET = "hunter2"
TIMES = 5

SHOP = """
import kwflow as kw

@kw.activity(queue="{application}-payments")
def charge(cents: int) -> int:
    return cents

@kw.workflow
def pay(times):
    paid = 0
    for _ in range(times):
        yield kw.sleep(1)
        paid += yield charge(100)
    return paid

@kw.workflow
def order(number):
    kw.output("1", "{application}-orders")
    return (yield kw.wait_signal("paid"))

@kw.feed("{application}-orders")
def orders(number: int):
    return kw.Signal("order", "paid", number)

kw.declare_topics("{application}-orders")
"""

TOKENS = """
import json, time, urllib.request

def token(config):
    with urllib.request.urlopen(config, data=b"grant_type=client_credentials", timeout=5) as answer:
        return json.load(answer)["access_token"], time.time() + 4, "shop", {{"logicalCluster": "one"}}
"""


class Shop:
    """An application whose processes all authenticate themselves by one method: an engine, a worker and a feed."""

    def __init__(self, directory: pathlib.Path, broker: Guarded, service: TokenService, method: str) -> None:
        self.directory = directory / method
        self.directory.mkdir()
        self.module = self.directory / f"shop_{method}.py"
        self.module.write_text(SHOP.format(application=method))
        (self.directory / f"tokens_{method}.py").write_text(TOKENS.format())
        topics = {f"{name}_topic": f"{method}-{name}" for name in ("resume", "result", "error", "scheduler", "reply")}
        bootstrap = broker.certified if method == "mtls" else broker.named
        self.config = Config(application_id=method, bootstrap_servers=bootstrap, kafka=settings(broker, service, method), **topics)  # type: ignore[arg-type]
        told = {"APPLICATION_ID": method, "BOOTSTRAP_SERVERS": bootstrap, "KAFKA": json.dumps(settings(broker, service, method)), "APP_DIR": str(self.directory), **topics}
        self.environment = {**os.environ, **{f"KWFLOW_{name.upper()}": value for name, value in told.items()}}
        self.says("topics", "create", str(self.module), "--partitions", "1")
        with_all = ("--with-scheduler", "--with-feeds", "--state-dir", str(self.directory / "state"))
        self.processes = [self.started("engine", str(self.module), *with_all), self.started("worker", str(self.module))]

    def says(self, *arguments: str) -> str:
        done = commands.run(*arguments, environment=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def started(self, *arguments: str) -> commands.Started:
        return commands.start(*arguments, log=self.directory / f"{arguments[0]}.log", environment=self.environment)

    def begin(self) -> None:
        self.client = Client.kafka(self.config)
        self.paid: Future = self.client.start_and_wait("pay", TIMES, workflow="pay", timeout=100)

    def logged(self) -> str:
        return "\n".join(path.read_text() for path in self.directory.glob("*.log"))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def settings(broker: Guarded, service: TokenService, method: str) -> dict[str, str]:
    """[kafka] of kwflow.toml."""
    tls, token = {"ssl.ca.location": str(broker.certificate)}, f"{service.url}/{method}"
    bearer = {**tls, "security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}
    return {
        "mtls": {**tls, "security.protocol": "SSL", "ssl.certificate.location": str(broker.certificate), "ssl.key.location": str(broker.key)},
        "scram": {**bearer, "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": Guarded.USER, "sasl.password": Guarded.PASSWORD},
        "oidc": {**bearer, "sasl.oauthbearer.method": "oidc", "sasl.oauthbearer.token.endpoint.url": token, "sasl.oauthbearer.client.id": "shop", "sasl.oauthbearer.client.secret": SECRET},
        "callback": {**bearer, "oauth_cb": "tokens_callback:token", "sasl.oauthbearer.config": token},
    }[method]


@pytest.fixture(scope="module")
def service() -> Iterator[TokenService]:
    service = TokenService(60)
    yield service
    service.close()


@pytest.fixture(scope="module")
def shops(service: TokenService, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Shop]]:
    """All of them at once, on one broker."""
    if not can_start() or shutil.which("openssl") is None:
        pytest.skip("NOT TESTED: no broker with certificates and tokens (java with mvn, openssl)")
    directory = tmp_path_factory.mktemp("authentication")
    broker = Guarded(directory / "kafka", f"{service.url}/keys")
    broker.start()
    request.addfinalizer(broker.kill)
    shops = {}
    for method in METHODS:
        shops[method] = Shop(directory, broker, service, method)
        request.addfinalizer(shops[method].close)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(shops["callback"].directory))
        for shop in shops.values():
            shop.begin()
        yield shops


@pytest.mark.parametrize("method", METHODS)
def test_engine_worker_feed_client_and_commands_stay_authenticated(shops: dict[str, Shop], service: TokenService, method: str) -> None:
    shop = shops[method]
    assert shop.paid.result(100) == TIMES * 100, shop.logged()
    with shop.client as client:  # which was idle for as long as that
        assert client.start_and_wait("order", 1, workflow="order", timeout=60).result() == 1, shop.logged()
    assert "order" in shop.says("list")
    assert shop.says("topics", "check", str(shop.module)) == ""
    assert [process.poll() for process in shop.processes] == [None, None], shop.logged()
    assert not re.search("authentication error|invalid_token|oauth_cb", shop.logged())
    assert method != "callback" or service.asked["/callback"] >= 3 * len(shop.processes), "each process has renewed its token"
    assert not any(secret in shop.logged() + repr(shop.config) for secret in (SECRET, Guarded.PASSWORD, *service.given))
