"""What a command does in a step, and the calls by which author code reads and sends messages (M2, M3).

Each op is a function of the running step and the command.  Ops that run no author code (query, terminate, pause) need
only the header and are in `ops.py`.  How an update is answered is in `updates.py`.  One entry of the header belongs to this
module: `mailbox`, how much is unread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kwflow.core import children, migration, typed, wire
from kwflow.core.calls import Calls, is_plain
from kwflow.core.contract import Keep, Limits, Transition
from kwflow.core.current import slot
from kwflow.core.instance import CLOSING, Instance
from kwflow.core.mail import Mailbox, SignalWait
from kwflow.core.mailbox import Inbox, checked_name
from kwflow.core.outcomes import describe_error
from kwflow.core.tasks import ABORTS
from kwflow.core.updates import PENDING, Update, remember
from kwflow.core.values import json_dumps
from kwflow.core.wire import Address, Command, Record, Reply
from kwflow.errors import KwflowBug, ProtocolError, UsageError

__all__ = [
    "ENDED", "OPS", "absent", "after_end", "applied_before", "describe", "ignored", "mailbox_of", "no_migration", "no_room", "on_update",
    "send_signal", "set_status", "signal_text", "signals", "wait_signal",
]  # fmt: skip

_STATUS_BYTES_MAX = 16_384  # it is stored in the header, which every listing reads
_ADDRESSES_MAX = 8  # how many senders may wait for one update that all of them sent with the same kwflow-id
ENDED = "it has ended"


# -- replies ---------------------------------------------------------------------------------------------------------
def ignored(outcome: str, address: Address | None, said: str = "") -> Transition:
    """The Transition of a record that changes nothing, by a stated rule (G3)."""
    status = {"unknown-id": "not_found", "unknown-ref": "unknown_ref"}[outcome]
    return Transition(Keep(), replies=(Reply(address, status, said),) if address is not None else (), outcome=outcome)


def absent(command: Command, address: Address | None, said: str = "") -> Transition:
    """The Transition of a command for an id, or a run of it, that does not exist.

    Raises ProtocolError for a signal or update whose sender waits for no reply: it would be lost silently otherwise (G3).
    """
    if address is None and command.op in ("signal", "update"):
        raise ProtocolError(f"{command.op} {command.arguments.name!r} is for a run that does not exist, and its sender does not wait for a reply", "not-found")
    return ignored("unknown-id", address, said)


def after_end(header: dict[str, Any], command: Command, address: Address | None) -> Transition:
    """The Transition of a command that arrives after the end: a repeated one gets its earlier reply, any other one is told that the workflow has ended."""
    known = header.get("ids", {}).get(command.id) if command.id is not None else None
    if known is not None:
        return Transition(Keep(), replies=(Reply(address, *known),) if address is not None else (), outcome="repeated")
    if command.op == "update" and address is not None:
        return Transition(Keep(), replies=(Reply(address, "ended"),), outcome="unknown-id")
    return absent(command, address, ENDED if command.start_id in (None, header["start_id"]) else "")


def applied_before(calls: Calls, command: Command) -> Transition | None:
    """M1.4: a command with a known `kwflow-id` changes nothing and gets the same reply as before, even if that is still to come.  None for a new command."""
    extra = calls.instance.extra
    known = extra.get("ids", {}).get(command.id) if command.id is not None else None
    if known is None:
        return None
    address = wire.reply_address(calls.record)
    if known[0] == PENDING:
        for waiting in extra.get("updates", {}).values():
            if waiting["id"] == command.id and address is not None and len(waiting["to"]) < _ADDRESSES_MAX:
                waiting["to"].append(msgspec.to_builtins(address))
        calls.changed = False
        return calls.run(lambda: None, "repeated")
    return Transition(Keep(), replies=(Reply(address, *known),) if address is not None else (), outcome="repeated")


def _answer(calls: Calls, command: Command, status: str, message: str = "", value: object = None) -> None:
    """Reply to the command of this step, and remember the reply under its `kwflow-id`."""
    if command.id is not None:
        remember(calls.instance.extra.setdefault("ids", {}), command.id, status, message, value)
    calls.answer(status, message, value)


# -- ops -------------------------------------------------------------------------------------------------------------
def _cancel(calls: Calls, command: Command) -> None:
    """Raise Cancelled at main's innermost waits; in a closing instance, at those of the tasks that still clean up."""
    instance = calls.instance
    instance.extra["cancel"] = {"reason": command.arguments.reason, "at": calls.record.timestamp_ms}
    tasks = list(instance.tasks.values()) if instance.status == CLOSING else [instance.main]
    calls.machine.cancel_all([task for task in tasks if task is not None])
    _answer(calls, command, "ok")


def _signal(calls: Calls, command: Command) -> None:
    arguments: wire.Signal = command.arguments
    mailbox = mailbox_of(calls.instance)
    expires_ms = calls.record.timestamp_ms + arguments.ttl_ms if arguments.ttl_ms is not None else None
    mailbox.expire(calls.instance.now_ms)
    mailbox.put("signal", arguments.name, arguments.value, len(calls.record.value or b""), expires_ms)
    _answer(calls, command, "delivered")
    calls.machine.deliver("signal", arguments.name)


def _update(calls: Calls, command: Command) -> None:
    """Put an update that its validator accepts into the mailbox; the workflow will answer it.  Answer any other one now, and change nothing."""
    arguments: wire.Update = command.arguments
    instance = calls.instance
    mailbox = instance.mailbox
    if instance.status == CLOSING:
        return _refuse(calls, "ended", "it has ended and is cleaning up")
    known = mailbox.validators if mailbox is not None else {}
    if mailbox is None or arguments.name not in known:
        return _refuse(calls, "rejected", f"no update {arguments.name!r} is accepted; there are: {', '.join(sorted(known)) or 'none'}")
    refused = _validate(known[arguments.name], arguments.value)
    if refused is not None:
        return _refuse(calls, "rejected", refused)
    number = mailbox.number_next
    address = wire.reply_address(calls.record)
    instance.extra.setdefault("updates", {})[str(number)] = {"id": command.id, "to": [msgspec.to_builtins(address)] if address is not None else []}
    if command.id is not None:
        remember(instance.extra.setdefault("ids", {}), command.id, PENDING)
    mailbox.put("update", arguments.name, Update(number, arguments.name, arguments.value), len(calls.record.value or b""), None)
    calls.machine.deliver("update", arguments.name)


def _refuse(calls: Calls, status: str, why: str) -> None:
    """Tell the sender why, if it waits for a reply; otherwise the outcome `refused` makes the record a dead letter (G3).

    The command may be sent again, since it was not applied.
    """
    calls.changed = False
    calls.answer(status, why)
    if not calls.replies:
        calls.outcome = "refused"
        calls.logs.append(why)


def _validate(validator: Callable[[Any], object] | None, value: object) -> str | None:
    """Return why the validator refuses the value, or None.  `kw.*` does not work inside a validator, so that a refusal leaves nothing behind."""
    if validator is None:
        return None
    running, slot.step = slot.step, None
    try:
        validator(value)
    except ABORTS:
        raise
    except BaseException as error:
        return describe_error(error)[:1000]
    finally:
        slot.step = running
    return None


def no_room(instance: Instance | None, record: Record, limits: Limits, command: Command) -> Transition | None:
    """The Transition of a message that the mailbox has no room for, or None.  It may be sent again.

    Raises ProtocolError if its sender does not wait for a reply.
    """
    mailbox = instance.mailbox if instance is not None else None
    if command.op not in ("signal", "update") or (mailbox is None and command.op == "update"):  # nobody takes this update: `_update` will refuse it
        return None
    count, held = mailbox.unread(max(instance.now_ms, record.timestamp_ms)) if instance is not None and mailbox is not None else (0, 0)
    size = len(record.value or b"")
    if count < limits.mailbox_max and held + size <= limits.mailbox_bytes_max:
        return None
    if size > limits.mailbox_bytes_max:
        said = f"it has {size} bytes, more than a mailbox may hold (limit mailbox_bytes_max = {limits.mailbox_bytes_max}); send a reference instead, or raise the limit"
    else:
        known = f"limits mailbox_max = {limits.mailbox_max}, mailbox_bytes_max = {limits.mailbox_bytes_max}"
        said = f"the mailbox holds {count} messages of {held} bytes ({known}); send it again once the workflow has read some, or raise the limits"
    address = wire.reply_address(record)
    if address is None:
        raise ProtocolError(said, "mailbox-full")
    return Transition(Keep(), replies=(Reply(address, "full", said),), outcome="mailbox-full")


def _migrate(calls: Calls, command: Command) -> None:
    if not migration.migrate(calls):
        raise KwflowBug("a migration that was there no longer exists")
    calls.logs.append("migrated")
    _answer(calls, command, "ok")


def no_migration(calls: Calls, command: Command) -> Transition | None:
    """The Transition of a `migrate` that finds current code, or code that no migration is for; None if the command can be applied."""
    if command.op != "migrate" or migration.find(calls.instance, calls.context.workflows.migrations) is not None:
        return None
    address = wire.reply_address(calls.record)
    return Transition(Keep(), replies=(Reply(address, "unchanged", migration.nothing_for(calls.instance)),) if address is not None else (), outcome="not-migrated")


OPS: dict[str, Callable[[Calls, Command], None]] = {"cancel": _cancel, "migrate": _migrate, "signal": _signal, "update": _update}


# -- the calls of authors --------------------------------------------------------------------------------------------
def mailbox_of(instance: Instance) -> Mailbox:
    """Return the mailbox of the instance; it is created when it is first needed."""
    if instance.mailbox is None:
        instance.mailbox = Mailbox()
    return instance.mailbox


def wait_signal(calls: Calls, name: str) -> SignalWait:
    """Wait for one signal."""
    return signals(calls, name).wait()


def signals(calls: Calls, name: str) -> Inbox:
    """The inbox of all signals of a name, one after the other."""
    mailbox_of(calls.instance)
    return Inbox("signal", checked_name(name, "a signal"))


def on_update(calls: Calls, name: str, validator: Callable[[Any], object] | None) -> Inbox:
    """Accept updates of this name from now on, if the validator raises nothing; return their inbox."""
    if validator is not None and not is_plain(validator):
        raise UsageError(f"a validator must be a plain function of the value that raises an error if it is wrong, not {validator!r}")
    mailbox_of(calls.instance).validators[checked_name(name, "an update")] = validator
    return Inbox("update", name)


def signal_text(said: str, name: str, value: object, start: object, input: object, functions: Mapping[str, Callable[..., Any]], most: int) -> bytes:
    """Return the JSON arguments of a signal whose sender gets no reply.

    Raises UsageError for what no engine, or no mailbox of `most` bytes, would accept; TypeError or ValueError for a value that has no JSON form.
    """
    arguments: dict[str, Any] = {"name": checked_name(name, "a signal"), "value": value}
    if start is not None:
        workflow = checked_name(children.name_of(start, functions, f"{said}(start=...)"), "a workflow")
        arguments["start"] = {"workflow": workflow, "input": msgspec.Raw(typed.input_json(input))}
    elif input is not None:
        raise UsageError(f"{said}(input=...) is for the workflow that start= names")
    text = json_dumps(arguments)
    if len(text) > most:  # a client is answered `full`; this sender would not hear of it
        raise UsageError(f"a signal has {len(text)} bytes, more than a mailbox may hold (limit mailbox_bytes_max = {most}); send a reference instead, or raise the limit")
    return text


def send_signal(calls: Calls, id: object, name: str, value: object, start: object, input: object) -> None:
    """Send a signal as a client does, but without a reply address: if its receiver does not exist or has no room, it becomes a dead letter (G3)."""
    if not isinstance(id, str):
        raise UsageError(f"a workflow id must be a str, not {id!r}")
    key = wire.key_of(id)
    text = signal_text("kw.send_signal", name, value, start, input, calls.context.workflows.functions, calls.context.limits.mailbox_bytes_max)
    calls.emit(calls.context.topics.resume, key, text, (*calls.travelling, ("kwflow-op", b"signal")))


def set_status(calls: Calls, value: object) -> None:
    """Set the status that a query shows.  It is a copy: later changes of the value do not show."""
    encoded = json_dumps(value)
    if len(encoded) > _STATUS_BYTES_MAX:
        raise UsageError(f"a status can have at most {_STATUS_BYTES_MAX} bytes, not {len(encoded)}; every listing reads it")
    calls.instance.extra["status_value"] = msgspec.json.decode(encoded)


# -- at the end of a step ----------------------------------------------------------------------------------------------
def describe(calls: Calls, mailbox: Mailbox) -> None:
    """Write into the header how much is unread, and into the log how much has expired."""
    extra = calls.instance.extra
    if mailbox.lost:
        calls.logs.append(f"{mailbox.lost} signals expired before they were read (ttl_ms)")
        mailbox.lost = 0
    extra.pop("mailbox", None)
    if mailbox.boxes:
        extra["mailbox"] = mailbox.sizes()
