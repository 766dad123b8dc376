"""Durable code of kwflow's own, loaded through our own lowering.

A file here is part of the snapshot format: instances wait in it for months, so a released one is never edited.  A
change is a new file with the next number; calls made from then on use it, and the old one stays for those that wait.
That is why no upgrade of kwflow ever meets a changed frame of its own, and no author's code is pinned by one
(`tests/compat` holds the hashes).  What these files call is in `support.py`, whose names are kept as well.  What a new
file needs beyond the first ones it imports by name: an older kwflow that meets it cannot load it, and parks the instance.

This module does not import them, but loads each when it is first needed: they use `kwflow.activities`, which calls them.
"""

from __future__ import annotations

import functools
import types
from importlib.resources import files
from typing import Any

from kwflow.durable import load_source

__all__ = ["attempts", "load", "rest", "workflows"]


def load(name: str) -> types.ModuleType:
    """The module `kwflow.flows.<name>`, durable."""
    file = files(__name__) / f"{name}.py"
    return load_source(f"{__name__}.{name}", file.read_text(encoding="utf-8"), str(file))


@functools.cache
def attempts(heartbeats: bool) -> Any:
    """The function that a call of an activity runs."""
    return load("attempts2" if heartbeats else "attempts1").attempts


@functools.cache
def rest() -> Any:
    """The module whose `call` waits for a service; an instance may wait in it without its author's module having said `import kwflow.rest` in this process yet."""
    return load("rest1")


@functools.cache
def workflows() -> dict[str, Any]:
    """The workflows of kwflow's own that every engine can run, by name; an engine calls this before it restores anything."""
    from kwflow.schedules import WORKFLOW

    attempts(False), attempts(True), rest()
    return {WORKFLOW: load("schedule1").schedule}
