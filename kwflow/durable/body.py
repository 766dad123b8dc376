"""The body of a snapshot: what both directions of the format, and whoever reads it without loading, have to agree on.

A body is one pickle of one list: the root, whether there are fillers, then (kind, shell, state) for each object that was pickled
as an empty shell.  The list grows while it is pickled, so identity and cycles survive, and a chain of 20,000 generators does not
recurse.  CPython refuses this for a plain list (gh-149816: 3.14 and 3.15 since summer 2026) but allows it for the items of an
iterator, which costs a microsecond more.  Both sides begin with the same table of names (`SEEDS`) in their memo, which keeps
small snapshots small.  Everything here is part of the format, so a change of it is a new format (docs/WIRE.md).
"""

from __future__ import annotations

import builtins
import io
import itertools
import pickle
import sys
from collections.abc import Iterator
from typing import Any

from kwflow.durable import frames, rebuild

__all__ = [
    "CELL", "CREATED", "EXCEPTION", "FINISHED", "FORMAT", "FUNCTION", "GENERATOR", "KINDS", "OBJECT", "REENTER", "SEEDS", "STATES", "TOGETHER", "Growing", "of_format_1", "padded", "seeded",
    "unfilled",
]  # fmt: skip

FORMAT = b"\2"
GENERATOR, CELL, FUNCTION, EXCEPTION, OBJECT, CREATED, FINISHED, REENTER = range(8)  # kinds of states; GENERATOR is one that waits
KINDS = {frames.SUSPENDED: GENERATOR, frames.CREATED: CREATED, frames.FINISHED: FINISHED}
STATES = 255  # the number of the list itself among the classes of `register_class`
TOGETHER = 1000  # items that every pickler writes as one batch; each further batch of a body begins with a filler
rebuild.register(STATES, list)

# What both memos hold from the start.  Only a new format may have another list.
SEEDS: tuple[Any, ...] = (
    *(rebuild.CONSTRUCTORS[name] for name in "generator cell function exception instance bound method global_of iterator_at custom".split()),
    *(getattr(builtins, name) for name in "iter range enumerate zip reversed map filter".split()),
    *map(sys.intern, ("main", "tasks", "waits", "joins", "finished", "steps", "task_next", "now_ms", "pending", "ok", "failed", "@l", "self", "opts")),
)
_PADDING = b"N" + b"\x94" * len(SEEDS) + b"."  # makes an unpickler count as many memo entries as there are seeds


def padded(data: bytes) -> io.BytesIO:
    """Return what an unpickler reads: first the padding, with a `load` of its own, then what follows the number of the format."""
    return io.BytesIO(_PADDING + data[1:])


def seeded(seeds: tuple[Any, ...]) -> Any:
    """Return the memo of an unpickler that holds these seeds, to be assigned to other unpicklers."""

    class Template(pickle.Unpickler):
        def persistent_load(self, number: str) -> Any:
            return seeds[int(number)]

    template = Template(io.BytesIO(b"\x80\x05" + b"".join(b"P%d\n\x94" % n for n in range(len(seeds))) + b"."))
    template.load()
    return template.memo


class Growing(list[Any]):
    """The list of a body, which grows while it is pickled: see the docstring of the module."""

    def later(self) -> Iterator[Any]:
        """Yield the items after the first thousand.

        Pickle writes a thousand items as one batch, and asks for the second item of a batch before it writes the first.  So the first one is a filler,
        which adds nothing to the list.
        """
        for place in itertools.count(TOGETHER):
            if place >= len(self):
                return
            if (place - TOGETHER) % (TOGETHER - 1) == 0:
                yield None
            yield self[place]


def unfilled(made: list[Any]) -> tuple[Any, list[Any]]:
    """Return the root of an unpickled list, and the rest of it without fillers; a list written by an earlier release has none."""
    if made[1] is not None:
        del made[TOGETHER::TOGETHER]
    return made[0], made[2:]


def of_format_1(unpickler: Any) -> tuple[Any, list[Any]]:
    """Read what 0.1.0 wrote: the root, then lists of (kind, shell, state) until None, as separate pickles that share one memo."""
    root = unpickler.load()
    states: list[Any] = []
    for found in iter(unpickler.load, None):
        for kind, made, state in found:
            states += (KINDS[state[0]], made, state[1]) if kind == GENERATOR else (kind, made, state)
    return root, states
