"""What code without keys knows of an encrypted value.  The keys are in runners/kafka/encryption.py."""

from __future__ import annotations

from kwflow.errors import ProtocolError, TransportError

__all__ = ["ENCRYPTED", "check_decrypted", "is_encrypted", "missing_key", "wrong_with"]

ENCRYPTED = b"\0KWE\1"  # every encrypted value begins like this, and no other message does


def is_encrypted(value: bytes | None) -> bool:
    """Whether the value is still encrypted, because its reader could not decrypt it."""
    return value is not None and value.startswith(ENCRYPTED)


def check_decrypted(value: bytes | None) -> None:
    """Raises ProtocolError for a value that could not be decrypted.  Its dead letter holds it unchanged, and can be retried once the key is configured."""
    if is_encrypted(value):
        raise ProtocolError(f"{wrong_with(value)}; configure it, then retry the dead letter", "encrypted")


def missing_key(topic: str, value: bytes | None) -> TransportError:
    """Return the error to raise where a value is needed that could not be decrypted."""
    return TransportError(f"topic {topic}: {wrong_with(value)}", retryable=False)


def wrong_with(value: bytes | None) -> str:
    """Describe what is wrong with a value that could not be decrypted."""
    id = (value or b"")[len(ENCRYPTED) : len(ENCRYPTED) + 4].hex() or "of no name"
    return f"the value is encrypted with key {id}, which is not in encryption_keys, or it is damaged"
