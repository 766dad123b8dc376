"""Reading what an older lowering wrote (semantics §4.2, §8.6).

A snapshot names waits by their path in the source and slots by their role and path, so most of what a newer lowering
does differently does not show.  What does is here, by the version that wrote it; a slot that means nothing any more is
refused by name before anything runs, never dropped.  Whoever raises LOWERING_VERSION says here how the one before is
read, and keeps snapshots of it in tests/compat.
"""

from __future__ import annotations

from typing import Any

from kwflow.durable.registry import Function
from kwflow.errors import CodeChangedError

__all__ = ["RENAMED", "upgraded"]

RENAMED: dict[int, dict[str, str]] = {}  # lowering version -> role as it calls it -> as the next version does


def upgraded(function: Function, saved: dict[str, Any], lowering: int, now: int) -> dict[str, Any]:
    """The slots of a waiting generator as lowering `now` names them.  Raises CodeChangedError."""
    slots = dict(saved)
    for version in range(lowering, now):
        roles = RENAMED.get(version, {})
        slots = {_renamed(name, roles): value for name, value in slots.items()}
    label = function.label_numbers.get(slots.get("@l", ""))
    known = function.labels[label - 1].live if label is not None else ()
    unknown = sorted(name for name in slots if name[0] == "@" and name != "@l" and name not in known)
    if unknown:
        raise CodeChangedError(f"{function.module}.{function.path} was saved by lowering version {lowering}, and lowering version {now} does not know its {', '.join(unknown)}")
    return slots


def _renamed(name: str, roles: dict[str, str]) -> str:
    if name[0] != "@" or not roles:
        return name
    role, space, path = name[1:].partition(" ")
    return f"@{roles.get(role, role)}{space}{path}"
