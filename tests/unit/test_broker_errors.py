"""What is reported about a broker that is away: each reason once a minute, by kwflow and not by librdkafka's own log."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from confluent_kafka import KafkaError

from kwflow.config import Config, load_config
from kwflow.errors import TransportError, UsageError
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.broker_errors import BrokerErrors
from kwflow.runners.logs import as_json

ROOT = pathlib.Path(__file__).parents[2]
NOBODY = "127.0.0.1:1"
REFUSED = "Connect to ipv4#127.0.0.1:1 failed: Connection refused"


def away(ms: int, more: str = "") -> KafkaError:
    return KafkaError(KafkaError._TRANSPORT, f"{NOBODY}/bootstrap: {REFUSED} (after {ms}ms in state CONNECT{more})")


def test_the_same_reason_is_told_once_a_minute_and_another_one_at_once() -> None:
    """Measured before: 200 lines per second while a broker was away."""
    told: list[str] = []
    now = [0.0]
    errors = BrokerErrors(told.append, lambda: now[0])
    for ms in range(1000):
        errors(away(ms, ", 7 identical error(s) suppressed" if ms % 2 else ""))
    for name in (f"{NOBODY}/1", f"GroupCoordinator: {NOBODY}/1", f"TxnCoordinator: {NOBODY}"):
        errors(KafkaError(KafkaError._TRANSPORT, f"{name}: {REFUSED} (after 0ms in state CONNECT)"))
    errors(KafkaError(KafkaError._TRANSPORT, f"GroupCoordinator: {REFUSED} (after 0ms in state CONNECT)"))
    errors(KafkaError(KafkaError._ALL_BROKERS_DOWN, "1/1 brokers are down"))
    assert told == [f"Kafka: {NOBODY}: {REFUSED}; retrying"]
    errors(KafkaError(KafkaError._AUTHENTICATION, "broker-2: SASL authentication error: no such user"))
    assert told[1:] == ["Kafka: broker-2: SASL authentication error: no such user; retrying"]
    now[0] = 60.0
    errors(away(3))
    assert len(told) == 3
    assert json.loads(as_json(told[2], 0)) == {"time": "1970-01-01T00:00:00.000+00:00", "level": "warning", "message": told[0]}


@pytest.mark.parametrize("more", ["", ": broker certificate could not be verified, verify that ssl.ca.location is correctly configured or root CA certificates are installed"])
def test_a_certificate_that_is_not_trusted_is_told_with_its_remedy(more: str) -> None:
    """librdkafka leaves its remedy out if the broker's answer is there before the client looks, as on a busy machine."""
    told: list[str] = []
    BrokerErrors(told.append)(KafkaError(KafkaError._SSL, f"sasl_ssl://b:1: error:0A000086:SSL routines::certificate verify failed{more} (after 3ms in state CONNECT)"))
    assert "signed by a CA that [kafka] ssl.ca.location does not have" in told[0] and "openssl s_client" in told[0]


@pytest.mark.parametrize("code", [KafkaError._AUTHENTICATION, KafkaError._SSL])
def test_what_runs_outlasts_a_broker_that_does_not_accept_its_credentials_for_a_while(code: int) -> None:
    """Measured before, with tokens that expired: `app-workers: FindCoordinator response error: Local: Authentication failure` ended a worker."""
    assert topics.transient(KafkaError(code))


@pytest.mark.slow
def test_what_asks_for_a_broker_is_told_why_there_is_none() -> None:
    config = Config(bootstrap_servers=NOBODY, client_connect_s=0.5)
    with pytest.raises(TransportError, match=f"^no broker at {NOBODY}: .*{REFUSED}"):
        topics.partitions_of(topics.admin(config), config)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["list"], ["signal", "x", "y"], ["code", "list"], ["reset"]], ids=" ".join)
def test_a_command_without_a_broker_says_why_in_one_line_and_ends_with_3(command: list[str], tmp_path: pathlib.Path) -> None:
    done = run(tmp_path, "[app]\nclient_connect_s = 1.5\n", *command)  # a busy machine takes a while to be refused a connection
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"no broker at {NOBODY}" in done.stderr and REFUSED in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["list"], ["start", "x"], ["dead-letters", "retry", "--all"]], ids=" ".join)
def test_a_setting_that_librdkafka_does_not_know_is_wrong_usage(command: list[str], tmp_path: pathlib.Path) -> None:
    """With exit code 3, a supervisor would start it again forever."""
    done = run(tmp_path, '[kafka]\n"no.such.setting" = 1\n', *command)
    assert (done.returncode, done.stderr) == (2, 'kwflow: config [kafka]: No such configuration property: "no.such.setting"\n')


@pytest.mark.slow
def test_a_file_of_tls_that_is_missing_is_named_with_its_setting_and_what_it_lacks(tmp_path: pathlib.Path) -> None:
    """OpenSSL only says: system lib."""
    done = run(tmp_path, f"""[kafka]\n"security.protocol" = "SSL"\n"ssl.certificate.location" = "{tmp_path}/gone.pem"\n""", "list")
    assert done.returncode == 2 and "ssl.certificate.location" in done.stderr and f"({tmp_path}/gone.pem: No such file or directory)" in done.stderr, done.stderr


def test_names_in_kafka_that_are_kwflows_own_or_not_quoted_are_refused_and_no_value_is_shown(tmp_path: pathlib.Path) -> None:
    """K1, K2, K5, K6, K16: with isolation.level = read_uncommitted, results of aborted transactions would be taken as real."""
    for name in ("isolation.level", "enable.auto.commit", "partitioner", "transactional.id"):
        with pytest.raises(UsageError, match=f"{re.escape(name)} is set by kwflow itself"):
            settings_in(tmp_path, f'[kafka]\n"{name}" = "x"\n')
    with pytest.raises(UsageError, match=r"bootstrap.servers is set by kwflow itself; set bootstrap_servers in \[app\]"):
        settings_in(tmp_path, '[kafka]\n"bootstrap.servers" = "x:1"\n')
    with pytest.raises(UsageError, match=r"config kafka: .*group.protocol is set by kwflow itself; leave it out: engines use the classic protocol, "):
        settings_in(tmp_path, '[kafka]\n"group.protocol" = "consumer"\n')
    with pytest.raises(UsageError, match=r'quoted: "sasl.password" = …$'):
        settings_in(tmp_path, '[kafka]\nsasl.password = "hunter2"\n')
    with pytest.raises(UsageError, match=r"sasl.password is neither a string nor a number$"):
        settings_in(tmp_path, '[kafka]\n"sasl.password" = ["hunter2"]\n')


def test_a_password_comes_by_the_environment_beside_what_the_file_says_and_is_not_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to replace everything that the file set, including security.protocol. The client then spoke plain text to a TLS port, which reports nothing."""
    monkeypatch.setenv("KWFLOW_KAFKA", '{"sasl.password": "hunter2"}')
    config = settings_in(tmp_path, '[kafka]\n"security.protocol" = "SASL_SSL"\n"sasl.password" = "old"\n')
    assert config.kafka == {"security.protocol": "SASL_SSL", "sasl.password": "hunter2"}
    assert "hunter2" not in f"{config!r} {config}"


def settings_in(directory: pathlib.Path, text: str) -> Config:
    (directory / "kwflow.toml").write_text(text)
    return load_config(directory / "kwflow.toml")


@pytest.mark.slow
def test_every_line_of_an_engine_that_logs_json_is_json_the_last_one_too(tmp_path: pathlib.Path) -> None:
    (tmp_path / "plain.py").write_text("def main(opts):\n    return 1\n    yield\n")
    done = run(tmp_path, "[app]\nclient_connect_s = 0.2\nlog_format = 'json'\nwait_for_broker_s = 0.5\n", "engine", "plain")
    assert done.returncode == 3
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["message"].partition(":")[0]) for line in lines] == [("warning", "waiting"), ("error", "kwflow")]
    assert all(f"no broker at {NOBODY}" in line["message"] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["engine", "plain"], ["scheduler"]], ids=" ".join)
def test_who_waits_for_its_broker_ends_when_it_is_asked_to(command: list[str], tmp_path: pathlib.Path) -> None:
    """It used to go on waiting for the whole time and then end with 3, "start me again"."""
    (tmp_path / "plain.py").write_text("def main(opts):\n    return 1\n    yield\n")
    (tmp_path / "kwflow.toml").write_text("[app]\nclient_connect_s = 0.2\nwait_for_broker_s = 3600\n")
    words = [sys.executable, "-m", "kwflow", *command, "--bootstrap-servers", NOBODY]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith("waiting: no broker")
            process.terminate()
            assert process.wait(30) == 0 and process.stderr.read() == ""
        finally:
            process.kill()


def run(directory: pathlib.Path, settings: str, *command: str) -> "subprocess.CompletedProcess[str]":
    (directory / "kwflow.toml").write_text(settings)
    words = [sys.executable, "-m", "kwflow", *command, "--bootstrap-servers", NOBODY]
    return subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
