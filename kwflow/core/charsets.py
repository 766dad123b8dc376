"""Decoding text from programs that name their charset.  One rule: only charsets are accepted, not every codec that Python has."""

from __future__ import annotations

import encodings
from encodings.aliases import aliases

__all__ = ["text_in"]

_UNALIASED = (  # charsets that have one name only; so have idna, punycode and the escapes of source code, which are none: the first two take minutes per megabyte
    "cp1006", "cp720", "cp737", "cp856", "cp874", "cp875", "koi8_t", "koi8_u", "mac_arabic", "mac_croatian", "mac_farsi", "mac_romanian", "palmos", "utf_8_sig",
)  # fmt: skip
_NAMES = frozenset(name.replace(".", "_") for name in (*aliases, *aliases.values(), *_UNALIASED))


def text_in(data: bytes, charset: str) -> str:
    """Decode the bytes.  Raises LookupError for an unknown charset, ValueError for bytes that are not valid in it or mean text that no record can hold.

    Python looks up known names only, in one spelling: it keeps each name that it has ever looked up, and these come from anybody.
    """
    name = encodings.normalize_encoding(charset).lower()
    if not charset.isascii() or name.replace(".", "_") not in _NAMES:
        raise LookupError(f"unknown encoding: {charset[:100]}")
    text = data.decode(name)
    text.encode("utf-8")  # UTF-7 may contain surrogates
    return text
