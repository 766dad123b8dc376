"""TLS of gateways and consoles, with a certificate made by openssl: who is answered, how it ends, and what is wrong with the files."""

import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from typer.testing import CliRunner

from kwflow import durable
from kwflow.cli import app
from kwflow.client import Client
from kwflow.config import Config, load_config
from kwflow.console.site import Site
from kwflow.core.contract import Workflows
from kwflow.errors import UsageError
from kwflow.gateway.tls import Certificate, certificate_of
from kwflow.runners.hosted import Hosted
from tests.embedded.serving import Serving, Stream, console, verified
from tests.embedded.shell import ROOT, Shell

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")]
SOURCE = """
import kwflow as kw

def main(opts):
    return (yield kw.suspend("answer"))
"""


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


def made(directory: pathlib.Path, name: str) -> Certificate:
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost", "-addext", names)
    return Certificate(cert, key)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with two certificates and their keys, and a file that is neither."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("one", "other"):
        made(directory, name)
    openssl("pkey", "-in", str(directory / "one.key"), "-aes256", "-passout", "pass:secret", "-out", str(directory / "locked.key"))
    (directory / "both.pem").write_bytes((directory / "one.key").read_bytes() + (directory / "one.pem").read_bytes())
    (directory / "text").write_text("-----BEGIN NOTHING-----")
    (directory / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    return directory


@pytest.fixture
def hosted(tmp_path: pathlib.Path) -> Iterator[Hosted]:
    module = durable.load_source("tls_case", SOURCE, "tls_case.py")
    with Hosted(tmp_path / "state", Workflows({"main": module.main}, "main"), Config(command_timeout_s=10), on_log=lambda _: None) as hosted:
        yield hosted


def settings(files: pathlib.Path, kind: str) -> dict[str, Any]:
    return {f"{kind}_tls_cert": files / "one.pem", f"{kind}_tls_key": files / "one.key"}


def serving(hosted: Hosted, files: pathlib.Path) -> Serving:
    return Serving(hosted.config.model_copy(update=settings(files, "gateway")), lambda: Client.embedded(hosted.engine, hosted.config))


# -- who gets an answer -------------------------------------------------------------------------------------------------
def test_a_gateway_answers_those_who_know_its_certificate_and_streams_to_them(hosted: Hosted, files: pathlib.Path) -> None:
    with serving(hosted, files) as gateway:
        assert gateway.url.startswith("https://127.0.0.1:")
        assert gateway.http.post("/workflows/w").status_code == 201
        stream = Stream(gateway, "w")
        assert gateway.http.post("/workflows/w/refs/answer", json=7).status_code == 204
        while not isinstance(told := stream.next(), dict):
            pass
        assert told["value"] == 7
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(gateway.url, verify=ssl.create_default_context(cafile=files / "other.pem"), trust_env=False)
        with pytest.raises(httpx.HTTPError):
            httpx.get(gateway.url.replace("https", "http"), trust_env=False)


@pytest.mark.parametrize(("version", "taken"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)])
def test_tls_is_1_2_or_newer_with_ciphers_of_today(hosted: Hosted, files: pathlib.Path, version: ssl.TLSVersion, taken: bool) -> None:
    """uvicorn's own list has the ciphers of TLS 1.0, without authenticated encryption."""
    context = ssl.create_default_context(cafile=files / "one.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):  # the warning that 1.1 is old
        context.minimum_version = context.maximum_version = version
    with serving(hosted, files) as gateway, socket.create_connection(gateway.sock.getsockname()[:2]) as plain:
        if not taken:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(plain, server_hostname="localhost")
            return
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            cipher = secure.cipher()
            assert cipher is not None and re.search("GCM|CHACHA20", cipher[0])


def test_a_gateway_ends_at_once_although_callers_keep_their_connections(hosted: Hosted, files: pathlib.Path) -> None:
    """Both sides of TLS say goodbye, and a caller that does not read never does. It took as long as commands may, 11 s here."""
    gateway = serving(hosted, files)
    with httpx.Client(base_url=gateway.url, verify=verified(Certificate(files / "one.pem", files / "one.key")), trust_env=False) as idle:
        assert idle.get("/health").status_code == 200
        begun = time.monotonic()
        gateway.close()
        assert time.monotonic() - begun < 8


def test_forms_of_a_console_with_tls_come_from_https_only(hosted: Hosted, files: pathlib.Path) -> None:
    """An attacker on the line can answer http:// under the console's name, with a page whose form posts to the console."""
    client = Client.embedded(hosted.engine, hosted.config)
    client.start("w").result(10)
    site = Site(hosted.config.model_copy(update=settings(files, "console")), hosted.engine.directory, lambda: Client.embedded(hosted.engine, hosted.config))
    with console(site) as http:
        own = str(http.base_url).rstrip("/")
        assert own.startswith("https://") and http.get("/").status_code == 200
        assert http.post("/instances/w/signal", data={"name": "n"}, headers={"Origin": own}).status_code == 303
        assert http.post("/instances/w/signal", data={"name": "n"}, headers={"Origin": own.replace("https", "http")}).status_code == 403
    client.close()


# -- the commands --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gateway", "console"])
def test_the_command_speaks_tls_and_says_so(shell: Shell, files: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    module = tmp_path / "flows.py"
    module.write_text(SOURCE)
    shell.engine(str(module))
    given = {f"KWFLOW_{name.upper()}": str(path) for name, path in settings(files, kind).items()}
    process = subprocess.Popen(shell.command(kind, "--port", "0"), stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **given})
    shell.engines.append(process)
    assert process.stderr is not None
    found = re.search(r"listens on (https://127\.0\.0\.1:\d+)", process.stderr.readline())
    assert found is not None
    with httpx.Client(base_url=found[1], verify=ssl.create_default_context(cafile=files / "one.pem"), trust_env=False) as http:
        assert http.get("/health" if kind == "gateway" else "/").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0, "also while a connection is kept"
    assert "Cancel" not in process.stderr.read()


WRONG = [
    ("none.pem", "one.key", r"gateway_tls_cert: \S+none.pem: No such file or directory"),
    ("one.pem", "none.key", r"gateway_tls_key: \S+none.key: No such file or directory"),
    (".", "one.key", r"gateway_tls_cert: \S+: Is a directory"),
    ("text", "one.key", r"gateway_tls_cert: \S+text holds no certificate in PEM"),
    ("one.key", "one.key", r"gateway_tls_cert: \S+one.key holds no certificate in PEM"),
    ("one.pem", "one.pem", r"gateway_tls_key: \S+one.pem holds no private key in PEM"),
    ("one.pem", "other.key", r"gateway_tls_cert, gateway_tls_key: \S+other.key is not the key of the first certificate in \S+one.pem"),
    ("broken.pem", "one.key", r"gateway_tls_cert, gateway_tls_key: OpenSSL does not accept \S+broken.pem with \S+one.key: "),
    ("one.pem", "locked.key", r"gateway_tls_key: \S+locked.key has a passphrase, .*store it without one \(openssl pkey -in \S+locked.key -out FILE\)"),
]


@pytest.mark.parametrize(("cert", "key", "said"), WRONG)
def test_a_file_that_no_server_could_use_is_one_error_that_names_it(files: pathlib.Path, cert: str, key: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        certificate_of(Config(gateway_tls_cert=files / cert, gateway_tls_key=files / key), "gateway")
    assert re.fullmatch(said + ".*", str(raised.value)), raised.value


def test_key_and_certificate_may_be_in_one_file(files: pathlib.Path) -> None:
    both = files / "both.pem"
    assert certificate_of(Config(console_tls_cert=both, console_tls_key=both), "console") == Certificate(both, both)
    assert certificate_of(Config(console_tls_cert=both, console_tls_key=both), "gateway") is None


@pytest.mark.parametrize("kind", ["gateway", "console"])
@pytest.mark.parametrize("half", ["cert", "key"])
def test_half_a_certificate_is_refused(kind: Literal["gateway", "console"], half: str) -> None:
    with pytest.raises(UsageError, match=f"{kind}_tls_cert and {kind}_tls_key belong together: set both or neither"):
        load_config(**{f"{kind}_tls_{half}": "file"})


@pytest.mark.parametrize("kind", ["gateway", "console"])
def test_a_command_that_cannot_use_its_certificate_ends_with_2_before_it_connects(files: pathlib.Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage: starting it again would not help."""
    monkeypatch.setenv(f"KWFLOW_{kind.upper()}_TLS_CERT", str(files / "one.pem"))
    monkeypatch.setenv(f"KWFLOW_{kind.upper()}_TLS_KEY", str(files / "other.key"))
    ended = CliRunner().invoke(app, [kind, "--port", "0", "--bootstrap-servers", "localhost:1"])
    assert ended.exit_code == 2 and "is not the key of the first certificate" in ended.output
