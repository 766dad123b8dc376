"""Values as they are stored on a broker (decision 0060): how they are encrypted and decrypted, and what is reported of values that cannot be decrypted."""

import hashlib
import hmac
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kwflow import activities
from kwflow.config import Config, load_config
from kwflow.core import queues, wire
from kwflow.core.encrypted import missing_key
from kwflow.core.wire import Record
from kwflow.errors import ProtocolError, TransportError, UsageError
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.kafka import encryption
from kwflow.runners.kafka.encryption import Encryption, Unread

ONE, TWO = "1" * 64, "2" * 64
RESUME, CHANGELOG, RESULT = "workflow-resume", "workflow-engine-state-changelog", "workflow-result"


def made(*keys: str, **more: Any) -> Encryption:
    return Encryption(Config(encryption_keys=list(keys), **more))


def encrypted_by(encryption: Encryption, topic: str, value: bytes) -> bytes:
    encrypted, headers = encryption.encrypt(topic, value)
    assert encrypted is not None and headers == []
    return encrypted


@pytest.fixture
def queue() -> Iterator[str]:
    before = dict(activities._activities)
    activities.activity(name="charge in secret", queue="secret-jobs")(charge)
    yield "secret-jobs"
    activities._activities.clear()
    activities._activities.update(before)
    activities._queues.discard("secret-jobs")


def charge(order: str) -> None:
    raise NotImplementedError


@given(st.binary(max_size=2000))
def test_what_was_encrypted_is_opened_by_whoever_has_the_key(value: bytes) -> None:
    encrypted = encrypted_by(made(ONE), RESUME, value)
    assert encrypted.startswith(b"\0KWE\1") and (len(value) < 8 or value not in encrypted)
    assert made(TWO, ONE).decrypt(encrypted) == value


def test_the_bytes_are_those_that_wire_md_says() -> None:
    """Decrypted here only by what the document says, as a reader in another language would do it."""
    encrypted = encrypted_by(made(ONE), RESUME, b'{"ref":"r"}')
    magic, id, salt, nonce, text = encrypted[:5], encrypted[5:9], encrypted[9:25], encrypted[25:37], encrypted[37:]
    assert (magic, id) == (b"\0KWE\x01", hashlib.sha256(b"kwflow encryption key\0" + ONE.encode()).digest()[:4])
    key = hmac.digest(ONE.encode(), b"kwflow encrypted value\0" + salt, "sha256")
    assert AESGCM(key).decrypt(nonce, text, None) == b'{"ref":"r"}'
    theirs = magic + id + b"s" * 16 + b"n" * 12 + AESGCM(hmac.digest(ONE.encode(), b"kwflow encrypted value\0" + b"s" * 16, "sha256")).encrypt(b"n" * 12, b"1", None)
    assert made(ONE).decrypt(theirs) == b"1"


def test_nothing_is_encrypted_without_a_key_and_plain_values_are_read_with_one() -> None:
    """Programs without the key may start workflows, and values from before there were keys remain readable."""
    assert made().encrypt(CHANGELOG, b"x", (("a", b"b"),)) == (b"x", [("a", b"b")])
    assert made(ONE).decrypt(b"KWF1...") == b"KWF1..."
    assert made(ONE).decrypt(None) is None and made(ONE).encrypt(RESUME, None) == (None, [])


def test_topics_of_authors_are_left_and_what_is_encrypted_is_not_encrypted_again(queue: str) -> None:
    encryption = made(ONE, encryption_plain_topics=[RESULT], encryption_topics=["theirs-resume"])
    for topic in ("shop-orders", RESULT):
        assert encrypted_by(encryption, topic, b"x") == b"x"
    own = ["workflow-reply", "workflow-error", "workflow-scheduler", "workflow-engine-dead-letter", "workflow-engine-code", "workflow-engine-timers-changelog"]
    for topic in (RESUME, CHANGELOG, queue, "theirs-resume", *own):
        encrypted = encrypted_by(encryption, topic, b"x")
        assert encrypted != b"x" and encrypted_by(encryption, topic, encrypted) == encrypted
    assert encrypted_by(made(ONE, encryption_plain_topics=[queue]), queue, b"x") == b"x"


def test_of_headers_only_the_reason_of_a_dead_letter_may_quote_a_value() -> None:
    given = (("kwflow-error-reason", b"bad-json"), ("kwflow-error-message", b"not an order: 4711"), ("customer", b"Ada"))
    _, sent = made(ONE).encrypt("workflow-engine-dead-letter", b"4711", given)
    assert sent[::2] == [given[0], given[2]] and b"4711" not in (sent[1][1] or b"")
    assert made(ONE).decrypt_headers(tuple(sent)) == given


def test_each_value_has_its_own_nonce_and_a_salt_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """GCM's limit: 2^32 values under one key with random nonces (NIST SP 800-38D §8.3)."""
    monkeypatch.setattr(encryption, "_VALUES_MAX", 10)
    one = made(ONE)
    values = [encrypted_by(one, RESUME, b"same") for _ in range(25)]
    assert len(set(values)) == len({value[25:37] for value in values}) == 25
    assert [len({value[9:25] for value in values[begin : begin + 10]}) for begin in (0, 10, 20)] == [1, 1, 1]
    assert len({value[9:25] for value in values}) == 3


def test_a_salt_ends_too_where_two_threads_take_the_last_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads have seen that one value is left, and take it. Even then, no salt may be used without end."""
    monkeypatch.setattr(encryption, "_VALUES_MAX", 10)
    one = made(ONE)
    first = encrypted_by(one, RESUME, b"same")
    one._left = -1
    assert encrypted_by(one, RESUME, b"same")[9:25] != first[9:25]


def test_a_value_whose_key_is_missing_is_told_from_one_that_is_damaged() -> None:
    """A missing key needs an operator, and ends the process that reads the value as state. A damaged value parks one instance."""
    encrypted = encrypted_by(made(ONE), CHANGELOG, b"x")
    for reader in (made(), made(TWO)):
        assert reader.decrypt(encrypted) == encrypted and reader.lacks_key(encrypted)
    damaged = encrypted[:-1] + bytes([encrypted[-1] ^ 1])
    assert made(ONE).decrypt(damaged) == damaged and not made(ONE).lacks_key(damaged)
    empty = encrypted_by(made(ONE), CHANGELOG, b"")
    assert made(TWO).lacks_key(empty) and made(ONE).decrypt(empty) == b""
    for short in (b"\0KWE\1", empty[:-1]):  # nobody has encrypted these, so no worker ends because of them
        assert made(TWO).decrypt(short) == short and not made(TWO).lacks_key(short)
    name = encryption.key_id(ONE.encode()).hex()
    assert f"topic {CHANGELOG}: the value is encrypted with key {name}, which is not in encryption_keys" in str(missing_key(CHANGELOG, encrypted))


def test_of_an_entry_whose_key_is_missing_no_more_is_kept_than_tells_which() -> None:
    """A changelog that was re-encrypted has each of its entries twice, and at first all of the first ones are unread at once."""
    value, unread = encrypted_by(made(ONE), CHANGELOG, bytes(10_000)), Unread(made(TWO))
    assert unread.passes(b"w", value) and unread and list(unread._names.values()) == [value[:9]]
    with pytest.raises(TransportError, match=rf"topic {CHANGELOG}: the value is encrypted with key {value[5:9].hex()}"):
        unread.check(CHANGELOG)
    assert not unread.passes(b"w", b"plain") and not unread
    unread.check(CHANGELOG)


def test_a_record_that_cannot_be_opened_is_a_dead_letter_that_can_be_retried() -> None:
    """Nobody can end an engine with five bytes. Once the key is there, the letter, unchanged, means what it meant."""
    other = made(ONE)
    mine = b"\0KWE\1" + encryption.key_id(TWO.encode())
    for theirs in (encrypted_by(other, RESUME, b"new:1"), encrypted_by(other, RESUME, b"null"), b"\0KWE\1", mine, mine + bytes(44)):
        read = made(TWO).decrypt(theirs)
        assert read == theirs
        for headers in ((), (("kwflow-op", b"query"),)):
            record = Record(RESUME, 0, 0, 0, b"a", read, headers)
            for refuses in (lambda record=record: wire.check_size(record, 1_000_000, 1_000), lambda record=record: queues.read(record, RESUME)):
                with pytest.raises(ProtocolError, match="encrypted with key .*retry the dead letter") as caught:
                    refuses()
                assert caught.value.reason == "encrypted"
        assert encrypted_by(made(TWO), "workflow-engine-dead-letter", theirs) == theirs


@given(st.integers(min_value=5, max_value=60), st.integers(min_value=0, max_value=7))
def test_a_value_of_which_a_bit_was_changed_is_not_opened(place: int, bit: int) -> None:
    encrypted = bytearray(encrypted_by(made(ONE), RESUME, b"a value, more or less"))
    encrypted[place % len(encrypted)] ^= 1 << bit
    assert made(ONE).decrypt(bytes(encrypted)) == bytes(encrypted)


def test_keys_are_long_enough_and_never_shown(tmp_path: Any) -> None:
    with pytest.raises(ValidationError, match="a key must have at least 32"):
        Config(encryption_keys=["1" * 31])
    assert ONE not in repr(Config(encryption_keys=[ONE]))
    with pytest.raises(ValidationError, match="jobs is both in encryption_topics and in encryption_plain_topics"):
        Config(encryption_topics=["jobs"], encryption_plain_topics=["orders", "jobs"])
    file = tmp_path / "kwflow.toml"
    file.write_text(f'[encryption]\nkeys = ["{ONE}"]\ntopics = ["a"]\nplain_topics = ["b"]\n')
    config = load_config(file)
    assert (config.cipher_keys, config.encryption_topics, config.encryption_plain_topics) == ((ONE.encode(),), ["a"], ["b"])


def test_an_embedded_engine_refuses_keys_that_would_do_nothing(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="encrypt that disk"):
        Embedded(tmp_path / "state", Config(encryption_keys=[ONE]))


def test_without_the_library_it_says_what_to_install() -> None:
    made = f"from kwflow.config import Config\nfrom kwflow.runners.kafka.encryption import Encryption\nEncryption(Config())\nEncryption(Config(encryption_keys=['{ONE}']))"
    code = "import sys; sys.modules['cryptography'] = None\n" + made
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "pip install 'kwflow[encryption]'" in done.stderr and done.returncode == 1
