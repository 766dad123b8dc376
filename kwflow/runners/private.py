"""State directories belong to their user alone: what they hold is what workflows know."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["private", "replace"]


def private(directory: Path) -> Path:
    """Make it and every missing one above it with mode 0700; one that is there loses the rights of others, if it is ours."""
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
    """Write it as a whole, durable when this returns: whoever reads finds the old content or the new."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
