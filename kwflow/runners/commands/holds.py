"""pause, unpause, retry and discard: records are held, and those that are held are applied (K17), by the batch that the command is part of."""

from __future__ import annotations

from typing import Any

from kwflow.activities import failure_payload
from kwflow.config import Config
from kwflow.core import children, snapshot, wire
from kwflow.core.dispatch import Withdraw
from kwflow.core.values import json_dumps
from kwflow.core.wire import Command, Output, Record
from kwflow.errors import ActivityError, ProtocolError
from kwflow.ports import Changes, Decision
from kwflow.runners import parked
from kwflow.runners.commands.shared import Batch, done, header_of, joined, replied

__all__ = ["call_failed", "drain", "pause", "retry", "settled", "unpause"]

_DISCARDED = "Discarded"


def pause(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Pause: from here on the instance's records join the hold.  If it is parked already, it cannot be retried before it is unpaused."""
    key, reason = name.encode(), command.arguments.reason
    stored = batch.state.get(key)
    if header["status"] == "parked" and stored is not None:
        batch.state.put(key, snapshot.amend(stored, batch.config.signing_keys, parked={**header["parked"], "paused": reason}))
    else:
        batch.state.put(key, snapshot.park(stored, header, "paused", reason, record.offset, batch.config.signing_keys))
    return done(batch, name, record, command, "ok", [Decision(logs=(f"{name}: paused",))])


def unpause(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    key, stored = name.encode(), batch.state.get(name.encode())
    if not parked.is_paused(header) or stored is None:
        return done(batch, name, record, command, "ok", message="it was not paused")
    if header["parked"]["reason"] not in ("paused", "draining"):  # it had failed before: it needs retry or discard
        batch.state.put(key, snapshot.amend(stored, batch.config.signing_keys, parked={entry: value for entry, value in header["parked"].items() if entry != "paused"}))
        return done(batch, name, record, command, "ok", message="it is still parked; retry or discard it")
    return done(batch, name, record, command, "ok", drain(batch, name, record, discard=False))


def retry(batch: Batch, name: str, header: dict[str, Any], record: Record, command: Command) -> Decision:
    """Retry or discard: apply the hold in order.  Discard drops its head first, if that record has failed."""
    if header["status"] != "parked":
        return replied(batch, record, "not_found", "it is not parked", count="not-parked", log=f"{name}: {command.op} ignored: it is not parked")
    if parked.is_paused(header):
        return replied(batch, record, "paused", "unpause it first", count="not-parked", log=f"{name}: {command.op} ignored: it is paused")
    failed = header["parked"]["reason"] != "draining"  # while draining, an earlier command is still being completed, and the next record may be fine
    made = drain(batch, name, record, discard=command.op == "discard" and failed)
    status, message = settled(batch, name)
    return done(batch, name, record, command, status, made, message)


def settled(batch: Batch, name: str) -> tuple[str, str]:
    """Status and message of a command after which held records were applied: whether the instance is parked again, and that it runs old code, which may be why."""
    stored = batch.state.get(name.encode())
    after = header_of(batch.config, name, stored)
    if parked.has_failed(after):
        return "parked", f"it is parked again: {after['parked']['reason']}: {after['parked']['message']}"
    if stored is None or after["status"] == "ended":
        return "ok", ""
    return "ok", "".join(parked.old_code(batch.config, name, stored))


def _discarded(batch: Batch, name: str, head: Record, record: Record) -> Decision:
    """Tell whoever waits for the dropped head."""
    told = children.refused(head, "discarded", "its start failed and was discarded", batch.config.resume_topic)
    mine = Decision(told, replies=parked.answered(batch.config, head, "discarded"))
    return joined([mine, call_failed(batch.config, batch.state, name, head, record)])


def call_failed(config: Config, state: Changes, name: str, head: Record, record: Record) -> Decision:
    """Fail the activity call whose result was dropped, so that its workflow does not wait forever.

    If the dropped record was already that failure, withdraw the call: nobody shall work on it any more.
    """
    try:
        answer = wire.parse(head)
    except ProtocolError:  # it killed processes, and was parked unread
        return Decision()
    waits = header_of(config, name, state.get(name.encode()))["waits"]
    if not isinstance(answer, wire.Resume) or not any(wait["kind"] in ("activity", "job") and wait["ref"] == answer.ref for wait in waits):
        return Decision()
    if answer.failed and isinstance(answer.value, dict) and answer.value.get("type") == _DISCARDED:
        return Decision(dispatch=(Withdraw(name, str(answer.ref)),))
    error = failure_payload(ActivityError("its result was discarded", _DISCARDED, final=True))
    return Decision((Output(config.resume_topic, name.encode(), json_dumps({"ref": answer.ref, "error": error}), (), record.timestamp_ms),))


def drain(batch: Batch, name: str, record: Record, discard: bool) -> list[Decision]:
    released = parked.release(batch.config, batch.state, name, record)
    header = header_of(batch.config, name, batch.state.get(name.encode()))
    if header["status"] == "ended":
        batch.end(name.encode(), header)  # its retention may have expired while it was parked
    made = [_discarded(batch, name, released[0], record)] if discard and released else []
    made += batch.drain(released[1 if discard else 0 :])
    rest = parked.park_rest(batch.config, batch.state, name)
    return [*made, Decision((rest,))] if rest is not None else made
