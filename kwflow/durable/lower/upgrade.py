"""Reading what an older lowering wrote (semantics §4.2, §8.6).

A snapshot names waits by their path in the source, and slots by their role and path, so most changes of the lowering do
not affect it.  Those that do are listed here, by the version that wrote the snapshot.  A slot that has no meaning any more is
refused by name before anything runs, never dropped.  Whoever raises LOWERING_VERSION defines here how the previous one is
read, and keeps snapshots of it in tests/compat.
"""

from __future__ import annotations

from typing import Any

from kwflow.durable.registry import Function
from kwflow.errors import CodeChangedError

__all__ = ["RENAMED", "upgraded"]

RENAMED: dict[int, dict[str, str]] = {}  # by lowering version: the roles that the next version renames, from old to new name


def upgraded(function: Function, saved: dict[str, Any], lowering: int, now: int) -> dict[str, Any]:
    """Return the slots of a waiting generator under the names that lowering version `now` uses.  Raises CodeChangedError."""
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
