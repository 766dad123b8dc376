"""Texts of programs that name their own charset.  One rule: what is no charset is none here, though Python has a codec of that name."""

from __future__ import annotations

import codecs

__all__ = ["text_in"]

_NONE = frozenset({"idna", "punycode", "raw-unicode-escape", "unicode-escape"})  # spellings of names and of source; of the first two a megabyte takes minutes, in which nobody else is served


def text_in(data: bytes, charset: str) -> str:
    """Raises LookupError for an unknown charset, ValueError for bytes that are not of it."""
    if codecs.lookup(charset).name.replace("_", "-") in _NONE:
        raise LookupError(f"unknown encoding: {charset}")
    return data.decode(charset)
