"""heartbeat: what a running activity says of its progress is kept in its workflow's header, for the next attempt and for those who look.

No author code is run for it, and the workflow is not woken.  It also reaches an instance that is parked or paused.
"""

from __future__ import annotations

from typing import Any

from kwflow.core import ops, snapshot
from kwflow.core.dispatch import DETAILS_BYTES_MAX
from kwflow.core.values import json_dumps
from kwflow.core.wire import Command, Record
from kwflow.ports import Decision
from kwflow.runners.commands.shared import Batch, replied

__all__ = ["heartbeat"]


def heartbeat(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Keep the details, unless they are too large.  These are logged and become no dead letters: one call gives thousands of them, and applied later they would replace newer ones."""
    kept, stored = ops.heartbeats(header, command.arguments, record.timestamp_ms), batch.state.get(name.encode())
    if kept is None or stored is None:
        return replied(batch, record, "unknown_ref", "nobody waits for this attempt (any more)", count="unknown-ref")
    size = len(json_dumps(command.arguments.details))
    if size > DETAILS_BYTES_MAX:
        return _too_large(batch, name, record, f"they have at most {DETAILS_BYTES_MAX} bytes, not {size}; store the data elsewhere, and give a reference to it")
    data = snapshot.amend(stored, batch.config.signing_keys, heartbeats=kept)
    if len(data) > batch.config.snapshot_bytes_max:
        return _too_large(batch, name, record, f"its snapshot would have {len(data)} bytes, more than snapshot_bytes_max = {batch.config.snapshot_bytes_max}")
    batch.put(name.encode(), data)
    return replied(batch, record, "ok", count="heartbeat")


def _too_large(batch: Batch, name: str, record: Record, why: str) -> Decision:
    said = f"heartbeat details are not kept: {why}"
    return replied(batch, record, "too_large", said, count="too-large", log=f"{name}: {said}")
