"""Activity calls that workers outside the engines run: the record that hands a call out, and the record that withdraws it (M6.6).

A call is a record in the topic of its queue, written by the step that makes the call.  Its key is `<workflow id>|<ref>`, so
that the calls of one workflow spread over the partitions, and the record that withdraws a call (one without a value)
follows it in the same partition.  All functions are total: bytes from outside become a value or a ProtocolError.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kwflow.core import wire
from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.core.encrypted import check_decrypted
from kwflow.core.wire import Record
from kwflow.errors import ProtocolError, UsageError

__all__ = ["Job", "handed_out", "job_of", "key_of", "read"]


class Job(msgspec.Struct, frozen=True):
    """The value of a call's record, JSON for workers in any language.  The answer goes to `resume_topic`, with `workflow_id` as its key."""

    resume_topic: str
    workflow_id: str
    ref: str
    activity: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    attempt: Annotated[int, msgspec.Meta(ge=1)]
    idempotency_key: str
    arguments: msgspec.Raw


_decoder = msgspec.json.Decoder(Job)


def key_of(workflow_id: str, ref: str) -> bytes:
    return f"{workflow_id}|{ref}".encode()


def job_of(call: Dispatch, resume_topic: str) -> Job:
    return Job(resume_topic, call.workflow_id, call.ref, call.name, call.attempt, f"{call.workflow_id}|{call.key}", msgspec.Raw(call.arguments))


def handed_out(call: Dispatch, resume_topic: str) -> bytes:
    """The value of the record that hands this call out."""
    return msgspec.json.encode(job_of(call, resume_topic))


def read(record: Record, resume_topic: str) -> Dispatch | Withdraw | None:
    """Return what a record of a queue asks for; None if it belongs to another application, whose answers go elsewhere.  Raises ProtocolError."""
    if record.value is None:
        id, _, ref = (record.key or b"").decode("utf-8", "replace").rpartition("|")
        return Withdraw(id, ref)
    check_decrypted(record.value)
    try:
        job = _decoder.decode(record.value)
        if job.resume_topic != resume_topic:
            return None
        wire.key_of(job.workflow_id)
        arguments = msgspec.json.decode(job.arguments)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, UsageError) as error:
        raise ProtocolError(f"no call of an activity: {error}", "bad-job") from None
    id, _, key = job.idempotency_key.rpartition("|")
    if not wire.is_engine_id(job.ref) or id != job.workflow_id or not isinstance(arguments, dict):
        raise ProtocolError("no call of an activity: ref is <offset>:<n>, idempotency_key <workflow id>|<ref>, arguments an object", "bad-job")
    return Dispatch(job.workflow_id, job.ref, job.activity, job.attempt, key, bytes(job.arguments), wire.travelling_headers(record), record.timestamp_ms)
