"""Directories and files of state.  A state directory is accessible to its user alone, as it holds everything that workflows know."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["lasting", "private", "replace"]


def private(directory: Path) -> Path:
    """Create a directory and its missing parents with mode 0700.  If the directory exists and is ours, revoke the rights of other users."""
    missing = [directory, *directory.parents]
    for path in reversed(missing):
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
    found = directory.stat()
    if found.st_mode & 0o077 and found.st_uid == os.geteuid():
        directory.chmod(0o700)
    return directory


def replace(path: Path, content: bytes) -> None:
    """Replace a file's content atomically, durable when this returns: a reader finds either the old content or the new."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    lasting(path.parent)


def lasting(directory: Path) -> None:
    """Make the names in a directory durable."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
