"""`oauth_cb` in [kafka]: what a function may return, how often it is called, and what is said if there is no token."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Producer

from kwflow import tokens
from kwflow.config import Config, load_config
from kwflow.errors import TransportError, UsageError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.environment import live, made
from kwflow.tokens import Tokens
from tests import commands
from tests.waiting import until

TOKEN = "eyJ0b2tlbg"
SASL = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "OAUTHBEARER"}


OIDC = {"sasl.oauthbearer.client.id": "shop", "sasl.oauthbearer.client.secret": "x", "sasl.oauthbearer.token.endpoint.url": "http://127.0.0.1:1"}


def given(*more: Any) -> Callable[[Any], tuple[Any, ...]]:
    return lambda _config: (TOKEN, time.time() + 60, *more)


def config_of(function: object, **more: str) -> Config:
    return Config(bootstrap_servers="127.0.0.1:1", client_connect_s=0.2, kafka={**SASL, **more, "oauth_cb": function})


def test_a_function_returns_a_token_and_its_expiry_and_may_add_a_principal_and_extensions() -> None:
    assert Tokens(given())(None)[::2] == (TOKEN, "")
    assert Tokens(given("shop"))("region=eu")[2:] == ("shop", {})
    assert Tokens(given("shop", {"logicalCluster": "lkc-1"}))(None)[2:] == ("shop", {"logicalCluster": "lkc-1"})


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (None, "returned a NoneType that is not"),
        (TOKEN, "returned a str that is not"),
        ((TOKEN,), "returned a tuple that is not"),
        ((TOKEN, 2e9, "", {}, 1), "returned a tuple that is not"),
        ((TOKEN.encode(), 2e9), "returned a token of type bytes with an expiry of type float"),
        ((f"{TOKEN}\n", 2e9), "returned a token of type str with"),
        ((TOKEN, "2030-01-01"), "an expiry of type str"),
        ((TOKEN, 1.9e12), "in milliseconds, it seems: divide it by 1000"),
        ((TOKEN, 1.0), "is this machine's clock right?"),
        ((TOKEN, float("nan")), "is this machine's clock right?"),
        ((TOKEN, 4e9, None), "a principal that is not a str"),
        ((TOKEN, 4e9, "", [TOKEN]), "extensions that are not a dict"),
        ((TOKEN, 4e9, "", {"a-b": TOKEN}), "with ASCII letters only in its keys"),
        ((TOKEN, 4e9, "", {"auth": TOKEN}), "with ASCII letters only in its keys"),
    ],
)
def test_anything_else_is_refused_by_an_error_that_does_not_show_it(returned: object, why: str) -> None:
    """confluent-kafka would neither say why, nor ask this client's function again."""
    with pytest.raises(UsageError) as caught:
        topics.admin(config_of(lambda _config: returned))
    assert why in str(caught.value) and "config [kafka]: oauth_cb " in str(caught.value) and TOKEN not in str(caught.value)


def test_an_error_of_the_function_is_the_reason_why_there_is_no_client() -> None:
    def token(config: object) -> object:
        raise OSError(f"the service\nis away: {config}")

    with pytest.raises(TransportError, match=r"oauth_cb test_an_error\S+token raised OSError: the service is away: region=eu$") as caught:
        topics.admin(config_of(token, **{"sasl.oauthbearer.config": "region=eu"}))
    assert caught.value.retryable


def test_a_function_that_does_not_return_makes_nobody_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_WAIT_S", 0.05)
    begun, end = [], threading.Event()

    def token(_config: object) -> object:
        begun.append(1)
        end.wait(60)
        return given()(None)

    kept = Tokens(token)
    for _ in range(3):
        with pytest.raises(TransportError, match=r"has not returned within 0\.05 s"):
            kept(None)
    assert len(begun) == 1, "it is not called again while it runs"
    end.set()
    until(lambda: kept._known)
    assert kept(None)[0] == TOKEN and len(begun) == 1


def test_all_clients_share_a_token_until_most_of_its_life_is_over_and_the_last_one_outlives_a_service_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told, called = [1000.0], list[str](), []
    monkeypatch.setattr(tokens.time, "time", lambda: now[0])

    def token(_config: object) -> object:
        called.append(now[0])
        if len(called) > 2:
            raise ConnectionError("503")
        return f"{TOKEN}{len(called)}", now[0] + 100

    kept = Tokens(token)
    assert [kept(None, told.append)[0][-1] for now[0] in (1000, 1049)] == ["1", "1"]
    assert [kept(None, told.append)[0][-1] for now[0] in (1080, 1129)] == ["2", "2"] and told == []
    assert [kept(None, told.append)[0][-1] for now[0] in (1140, 1149, 1171)] == ["2", "2", "2"], "it is asked again after ten seconds"
    assert told == [f"config [kafka]: oauth_cb {token.__qualname__} raised ConnectionError: 503"] * 2
    now[0] = 1179
    with pytest.raises(TransportError, match="503"):
        kept(None, told.append)
    assert called == [1000, 1080, 1140, 1171, 1179]
    assert TOKEN not in repr(kept)


def test_a_client_is_there_at_once_and_says_why_it_gets_no_new_token() -> None:
    """confluent-kafka sleeps for a second in each of its constructors, so an engine would be busy for half a minute after it starts."""
    up, told = [True], list[str]()

    def token(_config: object) -> object:
        if not up[0]:
            raise ConnectionError("503")
        return TOKEN, time.time() + 3.5

    environment = live(1024 * 1024, told.append)
    settings = topics.client_config(config_of(token))
    begun = time.monotonic()
    clients = [environment.producer(settings), environment.consumer(settings | {"group.id": "g"}), environment.admin(settings)]
    assert time.monotonic() - begun < 2.5, "three of them"
    up[0] = False
    until(lambda: any("raised ConnectionError: 503; retrying" in line for line in told), 20)
    assert not any(TOKEN in line or "OAuth callback" in line for line in told)
    clients[1].close()  # type: ignore[union-attr]


def test_a_setting_that_librdkafka_does_not_know_is_still_named() -> None:
    with pytest.raises(UsageError, match='No such configuration property: "no.such.setting"'):
        made(Producer, topics.client_config(config_of(given(), **{"no.such.setting": "1"})))


@pytest.mark.parametrize("less", [{"sasl.mechanism": "PLAIN"}, {"security.protocol": "SSL"}])
def test_where_no_token_is_asked_for_the_function_is_refused(less: dict[str, str]) -> None:
    with pytest.raises(UsageError, match='oauth_cb needs "sasl.mechanism" = "OAUTHBEARER" and "security.protocol" = "SASL_SSL"'):
        topics.admin(config_of(given(), **less))


def test_tokens_must_come_from_somewhere() -> None:
    with pytest.raises(UsageError, match=r'OAUTHBEARER needs a source of tokens: "sasl.oauthbearer.method" = "oidc", or "oauth_cb" = "module:function"'):
        topics.admin(Config(kafka=SASL))
    for source in ({"sasl.oauthbearer.method": "oidc"}, {"enable.sasl.oauthbearer.unsecure.jwt": "true"}):
        topics.admin(Config(bootstrap_servers="127.0.0.1:1", kafka={**SASL, **source, **OIDC}))


@pytest.mark.parametrize("wrong", ["shop", "shop:", ":token", "shop.tokens.token", "shop/tokens.py:token", 7, None, ["shop:token"]])
def test_a_name_is_a_module_and_a_function(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'oauth_cb must be "module:function", such as "shop\.tokens:token"'):
        config_of(wrong)


@pytest.fixture
def shop(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "flows.py").write_text("def main(opts):\n    yield\n")
    (tmp_path / "shop" / "tokens.py").write_text("class Provider:\n    @staticmethod\n    def token(config):\n        raise OSError(f'asked for {config}')\n")
    return tmp_path


def kafka(name: str) -> dict[str, str]:
    return {**os.environ, "KWFLOW_KAFKA": json.dumps({**SASL, "oauth_cb": name})}


ASKED = "kwflow: config [kafka]: oauth_cb shop.tokens:Provider.token raised OSError: asked for None\n"


@pytest.mark.parametrize("command", [("list",), ("topics", "create", "shop.flows"), ("topics", "check"), ("engine", "shop.flows"), ("scheduler",)])
def test_a_name_is_looked_up_in_app_dir_by_every_command(shop: pathlib.Path, command: tuple[str, ...]) -> None:
    """Also if the package of the function is that of the workflows, which is to be durable."""
    done = commands.run(*command, environment=kafka("shop.tokens:Provider.token") | {"KWFLOW_APP_DIR": str(shop)})
    assert (done.returncode, done.stderr) == (3, ASKED)


def test_without_app_dir_a_name_is_looked_up_in_the_current_directory_and_the_option_wins(shop: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for where, options in ((shop, ()), (tmp_path_factory.mktemp("elsewhere"), ("--app-dir", str(shop)))):
        environment = kafka("shop.tokens:Provider.token") | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-P", "-m", "kwflow", "topics", "check", *options], cwd=where, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (3, ASKED)


@pytest.mark.parametrize(
    ("name", "why"),
    [("shop.gone:token", "No module named 'shop.gone'; modules are looked up in --app-dir"), ("shop.tokens:gone", "has no attribute 'gone'"), ("shop.tokens:Provider.__module__", "is not a function")],
)
def test_a_name_that_leads_nowhere_is_wrong_usage(shop: pathlib.Path, name: str, why: str) -> None:
    done = commands.run("list", environment=kafka(name) | {"KWFLOW_APP_DIR": str(shop)})
    assert done.returncode == 2 and why in done.stderr and f"config [kafka]: oauth_cb {name}" in done.stderr, done.stderr


def test_the_file_and_the_environment_may_each_have_a_part(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kwflow.toml").write_text('[kafka]\n"security.protocol" = "SASL_SSL"\n"oauth_cb" = "shop:token"\n')
    monkeypatch.setenv("KWFLOW_KAFKA", '{"sasl.mechanism": "OAUTHBEARER"}')
    config = load_config(tmp_path / "kwflow.toml")
    assert repr(config.kafka["oauth_cb"]) == "<tokens of shop:token>" and config.kafka["sasl.mechanism"] == "OAUTHBEARER"
    assert config.model_copy(update={"application_id": "other"}).kafka["oauth_cb"] is config.kafka["oauth_cb"], "they share the tokens"
