"""Generators that survive a process: saved at a yield, they continue from there later, elsewhere, on another minor of Python.

A library of its own: nothing here knows workflows or Kafka.  Reading order, in which each file uses only those before it:

    lower/          source to two code objects; it has an order of its own, and uses fingerprint.py and registry.py
    awaiting.py     what async code awaits, as plain data; protocols.py finds it, refusals.py says what cannot be awaited or entered
    runtime.py      what lowered code calls; tracebacks.py for errors, driving.py for who runs it, stacks.py for async exit stacks
    frames.py       a waiting generator as data, and back
    names.py        what a snapshot may name
    rebuild.py      how objects are made again from what it names; iters.py, pools.py and mixins.py for iterators, exceptions.py
    reducers.py     how each kind of value is saved; positions.py for iterators, local_classes.py for classes, resources.py for connections
    body.py         the format of an object graph as bytes
    saving.py       the graph to those bytes; culprit.py finds what could not be saved
    loading.py      those bytes to the graph; moves.py says what names mean if it is moved onto edited code
    codec.py        both as two calls
    stubs.py        those bytes without their classes; peek.py shows them, canonical.py compares them
    loader.py       how a source becomes durable; cache.py keeps what lowering has made of it
    hook.py         which modules `import` makes durable
    versions.py     old code beside new
"""

from kwflow.durable.canonical import canonical, canonical_bytes
from kwflow.durable.codec import dumps, loads
from kwflow.durable.driving import abandoning, set_abandoning
from kwflow.durable.frames import Frame, State, capture, describe, discard, is_durable, restore
from kwflow.durable.hook import find_source, install, installed, rewrite_first, uninstall
from kwflow.durable.loader import durable, load_source, native
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
