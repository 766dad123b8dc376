"""The TLS certificate of our servers: problems with its files are reported here, before anything listens or connects.

uvicorn does the rest.  The console and the gateway each have settings of their own for it.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from kwflow.config import Config
from kwflow.errors import UsageError

__all__ = ["Certificate", "certificate_of"]


class Certificate(NamedTuple):
    """Two PEM files.  `cert` has the server's own certificate first, followed by those of the CAs between it and a root."""

    cert: Path
    key: Path


def certificate_of(config: Config, kind: Literal["console", "gateway"]) -> Certificate | None:
    """The certificate of `gateway_tls_cert` and `gateway_tls_key`, or of the console's settings; None if not set.  Raises UsageError if no server could use it."""
    cert, key = getattr(config, f"{kind}_tls_cert"), getattr(config, f"{kind}_tls_key")
    if cert is None or key is None:  # neither is set: Config does not allow one alone
        return None
    _check_pem(f"{kind}_tls_cert", cert, b"CERTIFICATE-----", "certificate in PEM")
    _check_pem(f"{kind}_tls_key", key, b"PRIVATE KEY-----", "private key in PEM")

    def passphrase() -> NoReturn:
        raise UsageError(f"{kind}_tls_key: {key} has a passphrase, which nobody could enter after a restart; store it without one (openssl pkey -in {key} -out FILE)")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, passphrase)
    except ssl.SSLError as error:
        why = f"{key} is not the key of the first certificate in {cert}" if error.reason == "KEY_VALUES_MISMATCH" else f"OpenSSL does not accept {cert} with {key}: {error.reason or error}"
        raise UsageError(f"{kind}_tls_cert, {kind}_tls_key: {why}") from None
    return Certificate(cert, key)


def _check_pem(setting: str, path: Path, holds: bytes, what: str) -> None:
    """Check that a file has PEM of the right kind, as OpenSSL's own errors name no file.  Raises UsageError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{setting}: {path}: {error.strerror or error}") from None
    if holds not in data:
        raise UsageError(f"{setting}: {path} holds no {what}")
