"""Where in its source a generator waits: the function as the instance runs it, from the stored version, even if the file here has changed since.

Sources are parsed, never run.  If something stands in the way (a source is not stored, or needs another minor of Python), the page says so beside the frame.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kwflow.config import Config
from kwflow.core.picture import UNSET, Frame
from kwflow.durable import find_source, versions
from kwflow.durable.fingerprint import source_version
from kwflow.durable.lower import units_in
from kwflow.durable.lower.show import Shape, shapes_of
from kwflow.durable.peek import Shown
from kwflow.errors import UnsupportedError
from kwflow.runners.outside import code_store

__all__ = ["Code", "Line", "Placed", "Sources", "placed"]

_LINES_AROUND = 25  # of a function, before and after the line where it waits
_VARIABLES_MAX = 100  # of one generator
_CHARACTERS_MAX = 1000  # of one variable, in a picture of few generators
_CHARACTERS_MIN = 100
_FEW = 20
_LINE_MAX = 400  # characters
_UNREADABLE = (SyntaxError, UnsupportedError, RecursionError, MemoryError, ValueError, TypeError)  # MemoryError: raised by Python's parser for code that nests too deeply


class Code(msgspec.Struct, frozen=True):
    """One version of a module that an instance runs.  `file` is the author's path; `here` says how the file here compares; `changed` lists the units that differ."""

    module: str
    version: str
    file: str
    source: str | None
    here: str
    changed: tuple[str, ...]


class Line(msgspec.Struct, frozen=True):
    number: int
    text: str
    waits: bool


class Placed(msgspec.Struct, frozen=True):
    """A generator in its source."""

    function: str
    code: Code
    line: int | None
    lines: list[Line]
    cut: bool
    old: bool
    variables: list[tuple[str, str]]
    said: str


class Sources:
    """The stored versions, which are read again if one is not known; safe from any thread."""

    def __init__(self, config: Config, embedded: Path | None, directory: Path) -> None:
        self._config = config
        self._embedded = embedded
        self._directory = directory
        self._known: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def of(self, header: Mapping[str, Any]) -> dict[str, Code]:
        """Reference -> the module version that it stands for in this header."""
        named = {reference: (versions.split_reference(reference)[0], saved) for reference, saved in header.get("code", {}).items()}
        with self._lock:
            if any(versions.entry_key(name, saved["version"]) not in self._known for name, saved in named.values()):
                self._known |= code_store(self._config, self._embedded).entries
        return {reference: self._code(name, saved) for reference, (name, saved) in named.items()}

    def _code(self, name: str, saved: Mapping[str, Any]) -> Code:
        data = self._known.get(versions.entry_key(name, saved["version"]))
        stored = msgspec.json.decode(data) if data is not None else {}
        here, changed = self._compared(name, saved)
        return Code(name, saved["version"], stored.get("file", name), stored.get("source"), here, changed)

    def _compared(self, name: str, saved: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """How the file here compares with a saved version, judged as an engine does; nothing is imported."""
        try:
            current = find_source(name, str(self._directory))
            if current is None:
                return f"there is no module {name} where this console runs", ()
            if source_version(current) == saved["version"]:
                return "as the file here", ()
            units = _units(current)
        except (*_UNREADABLE, ImportError, OSError, AttributeError) as error:
            return f"the file here cannot be read: {type(error).__name__}: {error}", ()
        changed = tuple(unit for unit, digest in saved["units"].items() if units.get(unit) != digest)
        return ("the file here has changed, including what this instance runs" if changed else "the file here has changed, but not what this instance runs"), changed


def placed(frame: Frame, codes: Mapping[str, Code], shown: Shown, frames: int) -> Placed:
    """One generator with its source and its variables; with many `frames` the variables are cut shorter."""
    characters = _CHARACTERS_MAX if frames <= _FEW else _CHARACTERS_MIN
    code = codes.get(frame.module) or Code(frame.module, "", frame.module, None, "", ())
    shape, said = _shape(code, frame)
    line = shape.lines.get(frame.label or "") if shape is not None else None
    names = shape.captured if shape is not None and len(shape.captured) == len(frame.cells) else tuple(f"(shared with inner functions) {number}" for number in range(1, len(frame.cells) + 1))
    cells = {name: value for name, value in zip(names, frame.cells, strict=True) if value is not UNSET}
    values = [(name, shown.text(value, characters)) for name, value in list({**cells, **frame.variables}.items())[:_VARIABLES_MAX]]
    more = len(cells) + len(frame.variables) - len(values)
    lines = _excerpt(code.source, shape, line) if code.source is not None and shape is not None else []
    cut = shape is not None and len(lines) < shape.last - shape.first + 1
    unit = frame.path.partition(".<")[0]
    return Placed(frame.function, code, line, lines, cut, unit in code.changed, values + ([("…", f"and {more} more")] if more else []), said)


def _shape(code: Code, frame: Frame) -> tuple[Shape | None, str]:
    if code.source is None:
        return None, "the source of this version is not stored, or not signed with a key of snapshot_keys"
    try:
        return shapes_of(code.source)[frame.path], "" if frame.label is not None else "it has not started"
    except KeyError:
        return None, f"its source does not contain {frame.path}"
    except _UNREADABLE as error:
        return None, f"the Python of this console cannot read its source: {error}"


def _excerpt(source: str, shape: Shape, line: int | None) -> list[Line]:
    middle = line or shape.first
    first, last = max(shape.first, middle - _LINES_AROUND), min(shape.last, middle + _LINES_AROUND)
    return [Line(number, text if len(text) <= _LINE_MAX else f"{text[:_LINE_MAX]}…", number == line) for number, text in enumerate(_lines(source)[first - 1 : last], first)]


_units = functools.lru_cache(maxsize=16)(units_in)  # cached, as it takes seconds for a large module, whose instances all need it


@functools.lru_cache(maxsize=16)
def _lines(source: str) -> list[str]:
    """The lines of a source, split as Python counts them."""
    return re.split(r"\r\n?|\n", source)
