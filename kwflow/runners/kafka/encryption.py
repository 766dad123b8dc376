"""What kwflow writes to a broker, encrypted: values, and no keys and headers (decision 0060).

An encrypted value: `\\0KWE` and the version 1, the key's id (4 bytes), a salt (16), a nonce (12), then ciphertext and tag (16) of AES-256-GCM
under HMAC-SHA-256(key, "kwflow encrypted value" NUL salt).  A salt is for 2^24 values at the most, with random nonces: one key alone would be used
up after 2^32 of them, a few days of a busy application.  Whatever begins otherwise is not encrypted, and read as it is.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
from typing import TYPE_CHECKING

from kwflow.activities import is_queue
from kwflow.config import Config
from kwflow.core.encrypted import ENCRYPTED, missing_key
from kwflow.core.wire import Headers
from kwflow.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["Encryption", "Unread", "key_id"]

_ID_BYTES, _SALT_BYTES, _NONCE_BYTES, _TAG_BYTES = 4, 16, 12, 16
_ID_AT = len(ENCRYPTED)
_SALT_AT = _ID_AT + _ID_BYTES
_NONCE_AT = _SALT_AT + _SALT_BYTES
_TEXT_AT = _NONCE_AT + _NONCE_BYTES
_BYTES_MIN = _TEXT_AT + _TAG_BYTES  # of an empty value
_VALUES_MAX = 1 << 24  # of one salt
_SALTS_MAX = 1024  # a process brings a few, and values of one come together
_QUOTING = frozenset({"kwflow-error-message"})  # headers that may quote a value


class Encryption:
    """That of one application, with `encryption_keys`: the first encrypts, all decrypt.  Without keys nothing is encrypted."""

    def __init__(self, config: Config) -> None:
        """Raises UsageError where there are keys and no library."""
        self._keys = {key_id(key): key for key in config.cipher_keys}
        self._begin = b""  # of every value with the salt of now: up to the nonce
        self._left = 0
        self._ciphers = functools.lru_cache(maxsize=_SALTS_MAX)(self._cipher)
        self._topics = {config.resume_topic, config.scheduler_topic, config.result_topic, config.error_topic, config.reply_topic, config.history_topic, config.dead_letter_topic}
        self._topics |= {config.changelog_topic, config.timers_changelog_topic, config.code_topic, *config.encryption_topics}
        self._plain = set(config.encryption_plain_topics)
        if self._keys:
            _library()

    def encrypt(self, topic: str, value: bytes | None, headers: Headers = (), own: bool = False) -> tuple[bytes | None, list[tuple[str, str | bytes | None]]]:
        """What to write to this topic: encrypted, if the topic is kwflow's own or a queue, or is said to be.  What is encrypted already stays as it is."""
        if not self._keys or topic in self._plain or not (own or topic in self._topics or is_queue(topic)):
            return value, list(headers)
        return self._encrypted(value), [(name, self._encrypted(text) if name in _QUOTING else text) for name, text in headers]

    def _encrypted(self, value: bytes | None) -> bytes | None:
        if value is None or value.startswith(ENCRYPTED):
            return value
        if self._left <= 0:  # below, where two threads have taken the last one
            self._begin, self._left = ENCRYPTED + next(iter(self._keys)) + os.urandom(_SALT_BYTES), _VALUES_MAX
        self._left -= 1
        begin, nonce = self._begin, os.urandom(_NONCE_BYTES)  # read once: other threads encrypt as well
        return begin + nonce + self._ciphers(begin[_ID_AT:]).encrypt(nonce, value, None)

    def decrypt(self, value: bytes | None) -> bytes | None:
        """What was read; what cannot be decrypted stays as it is: `lacks_key`, or it is damaged."""
        if value is None or not value.startswith(ENCRYPTED) or len(value) < _BYTES_MIN or self.lacks_key(value):
            return value
        from cryptography.exceptions import InvalidTag

        try:
            return self._ciphers(value[_ID_AT:_NONCE_AT]).decrypt(value[_NONCE_AT:_TEXT_AT], value[_TEXT_AT:], None)
        except InvalidTag:
            return value

    def decrypt_headers(self, headers: Headers) -> Headers:
        return tuple([(name, self.decrypt(text) if name in _QUOTING else text) for name, text in headers]) if self._keys else headers

    def lacks_key(self, value: bytes | None) -> bool:
        """Whether it is encrypted with a key that is not among ours; what is too short to be encrypted at all is damaged."""
        return value is not None and value.startswith(ENCRYPTED) and len(value) >= _BYTES_MIN and value[_ID_AT:_SALT_AT] not in self._keys

    def _cipher(self, id_and_salt: bytes) -> AESGCM:
        key = self._keys[id_and_salt[:_ID_BYTES]]
        return _library()(hmac.digest(key, b"kwflow encrypted value\0" + id_and_salt[_ID_BYTES:], "sha256"))


class Unread:
    """The entries of a topic that is read as a map whose last value we have no key for.

    A log has what was encrypted with a former key until it is compacted, and a later value that we can read in most cases.
    """

    def __init__(self, encryption: Encryption) -> None:
        self._encryption = encryption
        self._names: dict[object, bytes] = {}  # of their keys alone: a log that was encrypted anew has all of its entries twice

    def passes(self, entry: object, value: bytes | None) -> bool:
        """Whether this value of an entry, decrypted if we could, is to be passed over; any other makes up for those that were."""
        if self._encryption.lacks_key(value):
            self._names[entry] = (value or b"")[:_SALT_AT]
            return True
        if self._names:
            self._names.pop(entry, None)
        return False

    def __bool__(self) -> bool:
        return bool(self._names)

    def clear(self) -> None:
        """What was read is read again."""
        self._names.clear()

    def check(self, topic: str) -> None:
        """At the end of the topic.  Raises TransportError if there are some."""
        for name in self._names.values():
            raise missing_key(topic, name)


def key_id(key: bytes) -> bytes:
    """A key's public name: 4 bytes that do not give it away."""
    return hashlib.sha256(b"kwflow encryption key\0" + key).digest()[:_ID_BYTES]


def _library() -> type[AESGCM]:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise UsageError("encryption_keys need the package cryptography: pip install 'kwflow[encryption]'") from None
    return AESGCM
