"""Feeds: plain functions that turn the records of somebody else's topic into messages for workflows (decision 0058).

A feed decides from its record alone: it does not wait, and calls no services.  Its runner (`runners/feeds.py`) decides which
records are read, and that each counts once.  This module must not know logs or processes.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from kwflow.core import children, messages, typed, wire
from kwflow.core.contract import Limits
from kwflow.core.values import check_levels, json_dumps
from kwflow.core.wire import Headers, Output, Record
from kwflow.declarations import registered_workflows
from kwflow.durable import registry
from kwflow.errors import ProtocolError, UsageError

__all__ = ["Cancel", "Feed", "Message", "Resume", "Signal", "Start", "feed", "registered_feeds"]

_F = TypeVar("_F", bound=Callable[..., Any])
Workflow: TypeAlias = str | Callable[..., Any] | None


class Start(msgspec.Struct, frozen=True):
    """Start a workflow under this id; if the id is running, nothing changes (G5).

    `workflow` is a name or a function under `@kw.workflow`; None means the engine's default.  A `start_id` is run once, even after its end: use it for
    producers that may write the same record twice.
    """

    id: str
    input: object = None
    workflow: Workflow = None
    start_id: str | None = None


class Signal(msgspec.Struct, frozen=True):
    """Put a signal into this workflow's mailbox; if the id is not running, `start` is the workflow to start, with `input`.

    With a `command_id` it takes effect once: use it for producers that may write the same record twice.
    """

    id: str
    name: str
    value: object = None
    start: Workflow = None
    input: object = None
    command_id: str | None = None


class Resume(msgspec.Struct, frozen=True):
    """Answer `ref = kw.suspend()` of this workflow with a value, or with `error=payload`, which raises kw.WorkflowError there."""

    id: str
    ref: str
    value: object = None
    error: object = msgspec.UNSET


class Cancel(msgspec.Struct, frozen=True):
    """Raise Cancelled at this workflow's innermost waits; with a `command_id` it takes effect once."""

    id: str
    reason: str = ""
    command_id: str | None = None


Message: TypeAlias = Start | Signal | Resume | Cancel


class Feed:
    """A registered function, and the topic whose records it is called with one by one."""

    def __init__(self, topic: str, function: Callable[..., Any]) -> None:
        self.topic = topic
        self.function = function
        self._hints: list[Any] | None = None

    def __repr__(self) -> str:
        return f"<feed of {self.topic}: {self._place}>"

    @property
    def _place(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def resolved(self) -> list[Any]:
        """Return the annotation of each parameter.  A parameter annotated kw.Record receives the record, the other one its value.

        Raises UsageError for a function that cannot be called like this.
        """
        if self._hints is None:
            said = f"the feed of {self.topic}, {self._place},"
            parameters = [parameter for parameter in typed.signature_of(self.function).parameters.values() if parameter.default is parameter.empty]
            hints = [typed.hint_of(f"the parameter {parameter.name} of the feed of {self.topic} ({self._place})", self.function, parameter) for parameter in parameters]
            hints = [Record if typing.get_origin(hint) is Annotated and hint.__origin__ is Record else hint for hint in hints]
            records = [hint for hint in hints if hint is Record]
            named = any(parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters)
            if named or len(records) > 1 or not 0 < len(hints) <= 1 + len(records):
                raise UsageError(f"{said} must take the value of a record, or the whole record (annotated kw.Record), or both, and nothing else")
            if (mixed := next((hint for hint in hints if _holds_record(hint)), None)) is not None:
                raise UsageError(f"{said} is annotated with {mixed}: it always gets exactly one record, so annotate kw.Record")
            self._hints = hints
        return self._hints

    def outputs(self, record: Record, resume_topic: str, limits: Limits) -> tuple[Output, ...]:
        """Return the records for the messages of the function.  Raises ProtocolError for a value that it does not accept, UsageError, and what it raises."""
        given = [record if hint is Record else self._value(record, hint) for hint in self.resolved()]
        headers, outputs, size = wire.travelling_headers(record), [], 0
        for message in self._messages(self.function(*given)):
            output = _output(message, resume_topic, headers, limits)
            outputs.append(output)
            size += len(output.key or b"") + len(output.value or b"") + wire.header_bytes(output.headers)
            if len(outputs) > limits.outputs_max or size > limits.output_bytes_max:
                known = f"limits outputs_max = {limits.outputs_max}, output_bytes_max = {limits.output_bytes_max}"
                raise UsageError(f"one record yields {len(outputs)} messages of {size} bytes, perhaps more ({known})")
        return tuple(outputs)

    def _value(self, record: Record, hint: Any) -> Any:
        """Return the value of a record; that of a tombstone is None, as for the JSON null."""
        if record.value is None:
            value = None
        else:
            try:
                value = msgspec.json.decode(record.value)
                check_levels(record.value)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
                raise ProtocolError(f"not JSON: {error}; for other formats, let the feed take a kw.Record", "bad-json") from None
        return value if hint is Any else typed.rebuilt_input(f"the feed of {self.topic}", hint, value)

    def _messages(self, made: object) -> Iterable[Message]:
        if made is None:
            return ()
        if isinstance(made, (Start, Signal, Resume, Cancel)):
            return (made,)
        if isinstance(made, Iterable) and not isinstance(made, (str, bytes, Mapping)):
            return made
        raise UsageError(f"a feed must return None, a message or several messages (kw.Start, kw.Signal, kw.Resume, kw.Cancel), not {made!r}")


def _holds_record(hint: Any) -> bool:
    return any(part is Record or _holds_record(part) for part in typing.get_args(hint))


def _output(message: object, topic: str, headers: Headers, limits: Limits) -> Output:
    """Return the record for a message.  Raises UsageError for one that no engine would accept."""
    match message:
        case Start():
            named = _workflow_header(message.workflow)
            value, mine = b"new:" + _json(message, typed.input_json, message.input), (*named, *_id_header("kwflow-start-id", message.start_id))
        case Signal():
            value = _json(message, lambda most: _signal(message, most), limits.mailbox_bytes_max)
            mine = (("kwflow-op", b"signal"), *_id_header("kwflow-id", message.command_id))
        case Resume():
            if not isinstance(message.ref, str):
                raise UsageError(f"a ref must be a str, not {message.ref!r}")
            answer = {"value": message.value} if message.error is msgspec.UNSET else {"error": message.error}
            value, mine = _json(message, json_dumps, {"ref": message.ref, **answer}), ()
        case Cancel():
            if not isinstance(message.reason, str) or len(message.reason) > wire.REASON_CHARACTERS_MAX:
                raise UsageError(f"a reason must be a str of up to {wire.REASON_CHARACTERS_MAX} characters, not {message.reason!r}")
            value, mine = _json(message, json_dumps, {"reason": message.reason}), (("kwflow-op", b"cancel"), *_id_header("kwflow-id", message.command_id))
        case _:
            raise UsageError(f"the messages of a feed must be kw.Start, kw.Signal, kw.Resume or kw.Cancel, not {message!r}")
    if not isinstance(message.id, str):
        raise UsageError(f"a workflow id must be a str, not {message.id!r}")
    if len(value) > limits.value_bytes_max:
        raise UsageError(f"a message has {len(value)} bytes, more than {limits.value_bytes_max} (limit value_bytes_max); send a reference instead, or raise the limit")
    if (size := wire.header_bytes(headers) + wire.header_bytes(mine)) > limits.header_bytes_max:
        raise UsageError(f"a message has {size} bytes of headers, including the record's, more than {limits.header_bytes_max} (limit header_bytes_max)")
    return Output(topic, wire.key_of(message.id), value, (*headers, *mine))


def _signal(message: Signal, most: int) -> bytes:
    return messages.signal_text("kw.Signal", message.name, message.value, message.start, message.input, registered_workflows(), most)


def _json(message: Message, encode: Callable[[Any], bytes], value: Any) -> bytes:
    try:
        return encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"kw.{type(message).__name__} for {message.id!r} cannot be sent: {error}") from None


def _workflow_header(workflow: Workflow) -> Headers:
    return () if workflow is None else (("kwflow-workflow", children.name_of(workflow, registered_workflows(), "a message of a feed").encode()),)


def _id_header(name: str, id: str | None) -> Headers:
    if id is None:
        return ()
    if not isinstance(id, str) or not 1 <= len(id) <= wire.ID_CHARACTERS_MAX:
        raise UsageError(f"{'start_id' if name == 'kwflow-start-id' else 'command_id'} must be a str of 1 to {wire.ID_CHARACTERS_MAX} characters, not {id!r}")
    return ((name, id.encode()),)


# -- the registry ------------------------------------------------------------------------------------------------------
_feeds: dict[str, Feed] = {}


def feed(topic: str) -> Callable[[_F], _F]:
    """Call this function with each record of a topic.  The messages that it returns or yields are written in one transaction with the position in the topic.

    `def orders(order: Order)` receives the value, JSON that the annotation rebuilds; a parameter annotated kw.Record receives the record as it is.  An
    exception makes the record a dead letter `feed-failed`.  Raises UsageError for a function that cannot be a feed, and if the topic has another feed.
    """
    if not wire.is_topic(topic):
        raise UsageError(f"@kw.feed takes a topic name of letters, digits, '.', '_' and '-', not {topic!r}")

    def register(function: _F) -> _F:
        if registry.version(function.__module__) is not None:  # an old version that is loaded beside the new one
            return function
        if not isinstance(function, types.FunctionType) or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(f"@kw.feed must decorate an ordinary function, which does not wait, not {function!r}")
        known = _feeds.get(topic)
        made = Feed(topic, function)
        if known is not None and known._place != made._place:
            raise UsageError(f"the topic {topic} has two feeds: {known._place} and {made._place}; one function may return messages for several workflows")
        _feeds[topic] = made
        return function

    return register


def registered_feeds() -> dict[str, Feed]:
    """Return the feeds of this process by topic."""
    return dict(_feeds)
