"""The canonical form of a graph: a text that is the same for equal graphs, whatever numbers pickle gave their objects and in whatever order their sets are."""

from __future__ import annotations

from typing import Any

from kwflow.durable.codec import dumps
from kwflow.durable.stubs import GENERATORS, Found, Stub, graph

__all__ = ["canonical", "canonical_bytes"]


def canonical(root: Any) -> str:
    """Return a text that is the same for equal graphs: nodes are numbered in the order of the walk, sets are sorted, strings stand by value.

    Raises UnsavableError, as `dumps` does.
    """
    return canonical_bytes(dumps(root))


def canonical_bytes(body: bytes) -> str:
    """Return `canonical` of the graph that these bytes hold.  Raises CorruptSnapshotError."""
    root, states = graph(body)
    deferred = {key: (kind, dict(sorted(state.items())) if kind in GENERATORS else state) for key, (kind, _, state) in states.items()}
    numbers: dict[int, int] = {}
    nodes: list[Any] = []

    def ref(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({' '.join(map(ref, value))})"
        if isinstance(value, (set, frozenset)):
            return f"{type(value).__name__}{{{' '.join(sorted(map(flat, value)))}}}"
        if isinstance(value, Found):
            return f"{value.name} {ref(value.made_of)}"
        if not isinstance(value, (list, dict, bytearray, Stub)):
            return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)
        if id(value) not in numbers:
            numbers[id(value)] = len(nodes)
            nodes.append(value)
        return f"#{numbers[id(value)]}"

    def flat(value: Any) -> str:  # elements of sets are hashable: every cycle through them goes through an object
        return f"{value.name}{flat(value.args)}{flat(value.state)}" if isinstance(value, Stub) else ref(value)

    lines = [ref(root)]
    met = 0
    while met < len(nodes):
        node = nodes[met]
        kind, state = deferred.get(id(node), ("", None))
        if isinstance(node, Stub):
            line = f"{node.name} {ref(node.args)} {ref(node.state)} {' '.join(map(ref, node.items))} {kind} {ref(state)}"
        elif isinstance(node, dict):
            line = "{" + " ".join(f"{ref(key)}: {ref(item)}" for key, item in node.items()) + "}"
        else:
            line = f"[{' '.join(map(ref, node))}]"
        lines.append(f"#{met} {line}")
        met += 1
    return "\n".join(lines)
