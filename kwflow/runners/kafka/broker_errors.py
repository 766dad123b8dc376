"""Connection errors of librdkafka: we log why there is no broker once a minute, where it would log twenty times a second.

librdkafka's own log bypasses ours, even into the middle of JSON lines, and is off (`log_level` in topics.client_config, and
NO_LOG for fatal errors, which have no lower level; `[kafka]` may turn it on).  The same texts arrive in a client's `error_cb`,
inside whatever call serves that client.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from confluent_kafka import KafkaError

from kwflow.errors import TransportError
from kwflow.runners.logs import Line

__all__ = ["NO_LOG", "TIMED", "BrokerErrors", "ending", "explained"]

NO_LOG = logging.Logger("librdkafka")
NO_LOG.disabled = True
_EVERY_S = 60.0
_VARYING = re.compile(r"^(Group|Txn)Coordinator: |/(bootstrap|\d+)(?=:)| \(after \d+ms in state \w+(, \d+ identical error\(s\) suppressed)?\)")
_AWAY = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._MSG_TIMED_OUT)
_NO_REASON = "connections are closed or not answered without a reason: if the broker expects TLS or a user, set security.protocol in [kafka]; with OIDC, perhaps the token endpoint fails"
_TOKEN = "OAuth callback raised exception"  # confluent-kafka's words, after the reason was reported (environment.made)
_REMEDIES = {  # part of an OpenSSL message -> what to change; librdkafka adds a remedy of its own only if the broker takes a moment to answer
    "certificate verify failed": "; the broker's certificate is signed by a CA that [kafka] ssl.ca.location does not have, has expired, or is for another host: "
    "openssl s_client -connect HOST:PORT -CAfile FILE -verify_hostname HOST shows which",
    "ssl/tls alert": "; the broker rejects the certificate of this client: [kafka] ssl.certificate.location is missing, has expired, or is signed by a CA that it does not know",
}
_SETTINGS = {  # a setting of ours that the broker refuses -> where to change it; a restart does not help
    KafkaError.INVALID_SESSION_TIMEOUT: '[kafka] "session.timeout.ms" must be from the broker\'s group.min.session.timeout.ms to its group.max.session.timeout.ms',
    KafkaError.OFFSET_METADATA_TOO_LARGE: "workers store there which calls are done: the broker's offset.metadata.max.bytes must be at least 4096",
    KafkaError.INVALID_TRANSACTION_TIMEOUT: 'raise the broker\'s transaction.max.timeout.ms, or lower [kafka] "transaction.timeout.ms"',
}
TIMED = (KafkaError.INVALID_TIMESTAMP, KafkaError.INVALID_RECORD)  # for a record with this machine's time: its clock is wrong; the latter, if several in one request are refused for that
_OTHERS = {
    KafkaError.INVALID_TIMESTAMP: "the topic's message.timestamp.before.max.ms or after.max.ms does not allow its time: if that is this machine's, set the clock; "
    "if it is that of the record that led to it, raise the limit, and retry",
    KafkaError.INVALID_RECORD: "if this machine's clock is ahead of the broker's by more than message.timestamp.after.max.ms (an hour), set it",
    KafkaError.INCONSISTENT_GROUP_PROTOCOL: "a program that is not an engine is in this consumer group, or has changed its type: stop it and delete the group, or choose another application_id",
}


def explained(error: KafkaError) -> str:
    """The broker's message, with the remedy if one is known."""
    remedy = (_SETTINGS | _OTHERS).get(error.code())
    return f"{error.str()}; {remedy}" if remedy else error.str()


def ending(where: str, error: KafkaError) -> TransportError:
    """The error that ends this process; retryable unless it is about a setting."""
    return TransportError(f"{where}: {explained(error)}", retryable=error.code() not in _SETTINGS)


class BrokerErrors:
    """An `error_cb` that any number of clients may share.  Fatal errors are left to the call that fails with them."""

    def __init__(self, on_log: Callable[[str], None] | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._on_log = on_log
        self._now_s = now_s
        self._again_s: dict[str, float] = {}  # logged text -> when it may be logged again
        self.last = ""

    def __call__(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._ALL_BROKERS_DOWN:  # it comes in addition to the reason for each broker
            return
        text = _VARYING.sub("", error.str())
        if not text.endswith(_TOKEN):
            self.report(text + next((remedy for said, remedy in _REMEDIES.items() if said in text), ""))

    def report(self, text: str) -> None:
        """Keep this as the reason and, unless it was logged a short while ago, log it."""
        self.last = text
        now = self._now_s()
        self._again_s = {told: at for told, at in self._again_s.items() if at > now}
        if self._on_log is not None and not any(told.endswith(text) or text.endswith(told) for told in self._again_s):  # a coordinator's address is missing at times
            self._again_s[text] = now + _EVERY_S
            self._on_log(Line.of(f"Kafka: {text}; retrying", "warning"))

    def with_cause(self, error: KafkaError) -> str:
        """The error's text, and why there is no broker if that may be the cause."""
        why = self.last or (_NO_REASON if error.code() in _AWAY else "")
        return f"{explained(error)} ({why})" if why else explained(error)
