"""Decoding text from programs that name their charset.  One rule: only charsets are accepted, not every codec that Python has."""

from __future__ import annotations

import codecs

__all__ = ["text_in"]

_NONE = frozenset({"idna", "punycode", "raw-unicode-escape", "unicode-escape"})  # encodings of host names and source code; the first two take minutes per megabyte, and block all others


def text_in(data: bytes, charset: str) -> str:
    """Decode the bytes.  Raises LookupError for an unknown charset, ValueError for bytes that are not valid in it."""
    if codecs.lookup(charset).name.replace("_", "-") in _NONE:
        raise LookupError(f"unknown encoding: {charset}")
    return data.decode(charset)
