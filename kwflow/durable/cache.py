"""A cache of lowered modules beside Python's own cache: `__pycache__/<name>.<tag>.kwflow` (semantics §5.2).

The key is the hash of the source, the interpreter, the name of the file and the lowering itself, including the times of its
files, so that nothing stale is ever used.  A file that cannot be read, or that another kwflow wrote, counts as missing; a
failed write is ignored.  In `durable`, only this module and hook.py open files.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import marshal
import os
import pathlib
import sys

from kwflow.durable import lower
from kwflow.durable.fingerprint import source_version
from kwflow.durable.lower import LOWERING_VERSION, lower_module, lowered, module_of
from kwflow.durable.registry import Module

__all__ = ["load"]


def load(name: str, source: str, filename: str) -> Module:
    """Return the lowered module, from the cache if it is there.  It keeps no tree, as those of a large library take hundreds of megabytes.  Raises what `lower_module` raises."""
    path = _path(filename)
    if path is None:
        return lower_module(name, source, filename)
    version = source_version(source)
    key = (version, filename, LOWERING_VERSION, sys.version, _lowering())
    try:
        with open(path, "rb") as file:
            saved, code, facts, warnings = marshal.loads(file.read())
        if saved == key:
            return module_of(name, source, version, filename, code, functools.partial(marshal.loads, facts), warnings)
    except (OSError, ValueError, EOFError, TypeError):
        pass
    code, facts, warnings = lowered(source, filename)
    if not sys.dont_write_bytecode:
        _write(pathlib.Path(path), marshal.dumps((key, code, marshal.dumps(facts), warnings)))
    return module_of(name, source, version, filename, code, lambda: facts, warnings)


def _path(filename: str) -> str | None:
    """Return the path of the cached file; None if the source is not a file, or if the interpreter caches nothing."""
    if not filename.endswith(".py") or not os.path.isfile(filename):
        return None
    try:
        return importlib.util.cache_from_source(filename, optimization="").removesuffix(".pyc") + ".kwflow"
    except NotImplementedError:
        return None


@functools.cache
def _lowering() -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of each file of the lowering; empty if they are not files (in a zip)."""
    directory = pathlib.Path(lower.__file__).parent
    try:
        stats = [(file.name, file.stat()) for file in sorted(directory.glob("*.py"))]
    except OSError:
        return ()
    return tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats)


def _write(path: pathlib.Path, data: bytes) -> None:
    """Write the file as a whole or not at all, whoever else writes it at the same time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True, parents=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
