"""Generators that survive a process: saved at a yield, they continue from there later, elsewhere, on another minor of Python.

A library of its own: nothing here knows workflows or Kafka.  Reading order: lower/__init__.py (source to two code objects),
runtime.py (what lowered code calls; awaiting.py is its async part, with stacks.py for exit stacks, refusals.py for what cannot be
awaited or entered, driving.py for who runs generators on a thread, tracebacks.py for what an author sees of an error), frames.py (a
frame as data), codec.py (an object graph as bytes; names.py says what may be named, reducers.py how each kind of value is saved,
rebuild.py how it is built again), loader.py (imports), versions.py (old code beside new), moves.py (from old code onto new).
"""

from kwflow.durable.canonical import canonical, canonical_bytes
from kwflow.durable.codec import dumps, loads
from kwflow.durable.driving import abandoning, set_abandoning
from kwflow.durable.frames import Frame, State, capture, describe, discard, is_durable, restore
from kwflow.durable.loader import durable, find_source, install, installed, load_source, native, rewrite_first, uninstall
from kwflow.durable.names import allow_classes_by_value, allow_modules
from kwflow.durable.peek import peek
from kwflow.durable.reducers import register_reducer
from kwflow.durable.resources import reacquire

__all__ = [
    "Frame",
    "State",
    "abandoning",
    "allow_classes_by_value",
    "allow_modules",
    "canonical",
    "canonical_bytes",
    "capture",
    "describe",
    "discard",
    "dumps",
    "durable",
    "find_source",
    "install",
    "installed",
    "is_durable",
    "load_source",
    "loads",
    "native",
    "peek",
    "reacquire",
    "register_reducer",
    "restore",
    "rewrite_first",
    "set_abandoning",
    "uninstall",
]
