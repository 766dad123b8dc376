"""What is known of a value that is encrypted to who cannot decrypt it: where keys are is runners/kafka/encryption.py."""

from __future__ import annotations

from kwflow.errors import ProtocolError, TransportError

__all__ = ["ENCRYPTED", "check_decrypted", "is_encrypted", "missing_key"]

ENCRYPTED = b"\0KWE\1"  # begins a value that is encrypted, and nothing else that is a message


def is_encrypted(value: bytes | None) -> bool:
    """Whether it is encrypted still: who read it could not decrypt it."""
    return value is not None and value.startswith(ENCRYPTED)


def check_decrypted(value: bytes | None) -> None:
    """Raises ProtocolError for a value that nobody could decrypt: its dead letter is as it was, and means what it meant once the key is there."""
    if is_encrypted(value):
        raise ProtocolError(f"{_wrong_with(value)}; configure it, then retry the dead letter", "encrypted")


def missing_key(topic: str, value: bytes | None) -> TransportError:
    """What to raise where a value counts that nobody could decrypt."""
    return TransportError(f"topic {topic}: {_wrong_with(value)}", retryable=False)


def _wrong_with(value: bytes | None) -> str:
    """What is wrong with a value that nobody could open."""
    id = (value or b"")[len(ENCRYPTED) : len(ENCRYPTED) + 4].hex() or "of no name"
    return f"the value is encrypted with key {id}, which is not in encryption_keys, or it is damaged"
