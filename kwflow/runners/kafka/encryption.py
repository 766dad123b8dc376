"""Encryption of what kwflow writes to a broker: values, but not keys and headers (decision 0060).

An encrypted value is `\\0KWE` and the version 1, the key's id (4 bytes), a salt (16), a nonce (12), then ciphertext and tag (16) of AES-256-GCM
under HMAC-SHA-256(key, "kwflow encrypted value" NUL salt).  Nonces are random, and a salt is used for at most 2^24 values: one key alone would be
used up after 2^32 values, a few days of a busy application.  A value that begins otherwise is not encrypted, and is read as it is.
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
_BYTES_MIN = _TEXT_AT + _TAG_BYTES  # the size of an encrypted empty value
_VALUES_MAX = 1 << 24  # with one salt
_SALTS_MAX = 1024  # ciphers that are cached: a process uses few salts, and values with the same salt come together
_QUOTING = frozenset({"kwflow-error-message"})  # headers that may quote a value


class Encryption:
    """The encryption of one application, with `encryption_keys`: the first key encrypts, all of them decrypt.  Without keys nothing is encrypted."""

    def __init__(self, config: Config) -> None:
        """Raises UsageError if there are keys, but the library is not installed."""
        self._keys = {key_id(key): key for key in config.cipher_keys}
        self._begin = b""  # how every value with the present salt begins: everything before the nonce
        self._left = 0
        self._ciphers = functools.lru_cache(maxsize=_SALTS_MAX)(self._cipher)
        self._topics = {config.resume_topic, config.scheduler_topic, config.result_topic, config.error_topic, config.reply_topic, config.history_topic, config.dead_letter_topic}
        self._topics |= {config.changelog_topic, config.timers_changelog_topic, config.code_topic, *config.encryption_topics}
        self._plain = set(config.encryption_plain_topics)
        if self._keys:
            _library()

    def encrypt(self, topic: str, value: bytes | None, headers: Headers = (), own: bool = False) -> tuple[bytes | None, list[tuple[str, str | bytes | None]]]:
        """Return the value and headers to write to a topic.

        They are encrypted if the topic is kwflow's own or a queue, or if the config or `own` says so, but not in `encryption_plain_topics`.
        A value that is encrypted already stays as it is.
        """
        if not self._keys or topic in self._plain or not (own or topic in self._topics or is_queue(topic)):
            return value, list(headers)
        return self._encrypted(value), [(name, self._encrypted(text) if name in _QUOTING else text) for name, text in headers]

    def _encrypted(self, value: bytes | None) -> bytes | None:
        if value is None or value.startswith(ENCRYPTED):
            return value
        if self._left <= 0:  # less than 0 if two threads have taken the last one
            self._begin, self._left = ENCRYPTED + next(iter(self._keys)) + os.urandom(_SALT_BYTES), _VALUES_MAX
        self._left -= 1
        begin, nonce = self._begin, os.urandom(_NONCE_BYTES)  # read once: other threads encrypt as well
        return begin + nonce + self._ciphers(begin[_ID_AT:]).encrypt(nonce, value, None)

    def decrypt(self, value: bytes | None) -> bytes | None:
        """Decrypt a value that was read.  One that cannot be decrypted, because we lack its key (`lacks_key`) or it is damaged, is returned unchanged."""
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
        """Whether a value is encrypted with a key that is not among ours; one that is too short to be encrypted is damaged instead."""
        return value is not None and value.startswith(ENCRYPTED) and len(value) >= _BYTES_MIN and value[_ID_AT:_SALT_AT] not in self._keys

    def _cipher(self, id_and_salt: bytes) -> AESGCM:
        key = self._keys[id_and_salt[:_ID_BYTES]]
        return _library()(hmac.digest(key, b"kwflow encrypted value\0" + id_and_salt[_ID_BYTES:], "sha256"))


class Unread:
    """The entries whose last value we have no key for, in a topic that is read as a map.

    Until a log is compacted it has values that were encrypted with a former key; in most cases a later value follows that we can read.
    """

    def __init__(self, encryption: Encryption) -> None:
        self._encryption = encryption
        self._names: dict[object, bytes] = {}  # entry -> the beginning of its value, with the key's id; not more, as a log that was encrypted again has every entry twice

    def passes(self, entry: object, value: bytes | None) -> bool:
        """Whether to skip this value of an entry, which is decrypted if we have its key.  A readable value makes up for earlier ones that were skipped."""
        if self._encryption.lacks_key(value):
            self._names[entry] = (value or b"")[:_SALT_AT]
            return True
        if self._names:
            self._names.pop(entry, None)
        return False

    def __bool__(self) -> bool:
        return bool(self._names)

    def clear(self) -> None:
        """Forget everything, as the topic is read again."""
        self._names.clear()

    def check(self, topic: str) -> None:
        """Check for unread entries at the end of the topic.  Raises TransportError if there are any."""
        for name in self._names.values():
            raise missing_key(topic, name)


def key_id(key: bytes) -> bytes:
    """The public name of a key: 4 bytes that do not reveal it."""
    return hashlib.sha256(b"kwflow encryption key\0" + key).digest()[:_ID_BYTES]


def _library() -> type[AESGCM]:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise UsageError("encryption_keys need the package cryptography: pip install 'kwflow[encryption]'") from None
    return AESGCM
