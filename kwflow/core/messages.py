"""What a command does in a step (M2): each op is a function of the running step and the command.

Ops in which author code has no part (query, terminate, pause) are done on the header alone, in `ops.py`.  It must not
know how tasks are moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kwflow.core.calls import Calls
from kwflow.core.contract import Keep, Transition
from kwflow.core.instance import CLOSING, Instance
from kwflow.core.wire import Address, Command, Reply

__all__ = ["IDS_MAX", "OPS", "absent", "after_end", "applied_before", "ignored", "remember"]

IDS_MAX = 256  # M1.4: so many commands of an instance are known again


def ignored(outcome: str, address: Address | None) -> Transition:
    """Nothing changes, by a stated rule (G3)."""
    status = {"unknown-id": "not_found", "unknown-ref": "unknown_ref"}[outcome]
    return Transition(Keep(), replies=(Reply(address, status),) if address is not None else (), outcome=outcome)


def absent(command: Command, address: Address | None) -> Transition:
    """A command for an id, or a run of it, that is not there."""
    return Transition(Keep(), replies=(Reply(address, "not_found"),) if address is not None else (), outcome="unknown-id")


def after_end(header: dict[str, Any], command: Command) -> list[Any]:
    """Status, message and value for a command that comes after the end: what it was answered before, else that nobody is there."""
    known: list[Any] | None = header.get("ids", {}).get(command.id) if command.id is not None else None
    return known if known is not None else ["ended" if command.op == "update" else "not_found"]


def applied_before(instance: Instance, command: Command, address: Address | None) -> Transition | None:
    """M1.4: the same `kwflow-id` changes nothing a second time and gets the same reply."""
    known = instance.extra.get("ids", {}).get(command.id) if command.id is not None else None
    if known is None:
        return None
    status, message, value = known
    return Transition(Keep(), replies=(Reply(address, status, message, value),) if address is not None else (), outcome="repeated")


def remember(ids: dict[str, list[object]], id: str, status: str, message: str = "", value: object = None) -> None:
    """Keep what a command was answered, the last 256 of them."""
    ids[id] = [status, message, value]
    while len(ids) > IDS_MAX:
        del ids[next(iter(ids))]


def answer(calls: Calls, command: Command, status: str, message: str = "", value: object = None) -> None:
    """Reply to the command of this step, and remember the reply under its `kwflow-id`."""
    if command.id is not None:
        remember(calls.instance.extra.setdefault("ids", {}), command.id, status, message, value)
    calls.answer(status, message, value)


def _cancel(calls: Calls, command: Command) -> None:
    """Raise Cancelled at main's innermost waits; in a closing instance at those of what still cleans up."""
    instance = calls.instance
    instance.extra["cancel"] = {"reason": command.arguments.reason, "at": calls.record.timestamp_ms}
    tasks = list(instance.tasks.values()) if instance.status == CLOSING else [instance.main]
    calls.machine.cancel_all([task for task in tasks if task is not None])
    answer(calls, command, "ok")


OPS: dict[str, Callable[[Calls, Command], None]] = {"cancel": _cancel}
