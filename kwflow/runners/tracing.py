"""OpenTelemetry spans, one for each committed step and one for each run of an activity (`kwflow[otel]`, option `tracing`).

The context arrives in a record's `traceparent`.  Everything that the step writes, timers included, carries the step's own
context, and whoever answers sends it back.  The step of a record without a context joins the trace that the instance was
started in; the step of a record from another trace links to that one.  A step's span is ended only after its commit, so a
batch that is repeated shows no step twice.  An activity's span is current while the author's function runs, so that what the
function calls appears below it.

The engine never depends on tracing: whatever a provider, a sampler or a processor raises costs a span, and a line in the log.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import msgspec

from kwflow.core.dispatch import Dispatch
from kwflow.core.instance import Instance
from kwflow.core.outcomes import describe_error
from kwflow.core.wire import Headers, Record, header, header_bytes
from kwflow.errors import ProtocolError, UsageError
from kwflow.runners.logs import authors_traceback

__all__ = ["CallSpan", "Tracing", "configure", "end_all", "fail_all"]

_CARRIED = ("traceparent", "tracestate")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _guarded(call: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """Wrap a call so that it returns None if OpenTelemetry or a plugin raises.  The error would otherwise end the engine, or leave an activity unanswered."""

    @functools.wraps(call)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            _log_once(describe_error(error))
            return None

    return guarded


@functools.lru_cache(maxsize=100)
def _log_once(why: str) -> None:
    """Log a reason once, as it would otherwise be logged for every step."""
    logging.getLogger(__name__).warning("tracing is losing spans: %s", why)


class Span:
    """The span of one step.  `record` is the step's record, with the step's own context in its headers."""

    __slots__ = ("_ended_ns", "_span", "context", "record")

    def __init__(self, span: Any, record: Record, context: dict[str, str]) -> None:
        self._span = span
        self._ended_ns = 0
        self.context = context
        self.record = record

    @_guarded
    def done(self, outcome: str, wrong: str | None) -> None:
        """The step was made; `wrong` says what went wrong, if anything did."""
        self._span.set_attribute("kwflow.outcome", outcome)
        if wrong is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, wrong)
        self._ended_ns = time.time_ns()

    @_guarded
    def end(self) -> None:
        """The step was committed."""
        self._span.end(self._ended_ns)


class CallSpan:
    """The span of one run of an activity's function, used in a `with`.  This class is the null span, for engines that do not trace."""

    def __enter__(self) -> CallSpan:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def headers(self, call: Dispatch) -> Headers:
        """The headers of the answer to this call."""
        return call.headers

    def failed(self, error: BaseException) -> None:
        """Note that this attempt has failed."""


class _Traced(CallSpan):
    """The span of one run, a child of the step that made the call.

    The span of a batch begins a new trace, with links to the steps that made its calls, and each answer continues the trace of its own call.
    """

    def __init__(self, tracing: Tracing, calls: Sequence[Dispatch]) -> None:
        self._tracing = tracing
        self._calls = calls
        self._span: Any = None
        self._token: Any = None
        self._context: dict[str, str] = {}

    def __enter__(self) -> CallSpan:
        self._span, self._context = self._tracing.begin_call(self._calls) or (None, {})
        self._token = self._tracing.enter(self._span) if self._span is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._span is not None:
            self._tracing.leave(self._token)
            self._end()

    @_guarded
    def _end(self) -> None:
        self._span.end()

    def headers(self, call: Dispatch) -> Headers:
        return self._tracing.with_context(call.headers, self._context) if len(self._calls) == 1 else call.headers

    @_guarded
    def failed(self, error: BaseException) -> None:
        """The error is formatted inside of this guarded method, as an author's `__str__` may raise too."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            kind, said = f"{type(error).__module__}.{type(error).__qualname__}", describe_error(error)
            self._span.add_event("exception", {"exception.type": kind.removeprefix("builtins."), "exception.message": said, "exception.stacktrace": authors_traceback(error)})
            self._span.set_status(StatusCode.ERROR, said)


class Tracing:
    """Begins spans with a provider's tracer (default: the process's provider).  Raises UsageError without `kwflow[otel]`."""

    def __init__(self, provider: Any = None, header_bytes_max: int = 65_536) -> None:
        try:
            from opentelemetry import context, trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise UsageError("tracing needs OpenTelemetry: pip install 'kwflow[otel]'") from None
        self._trace = trace
        self._current = context
        self._tracer = trace.get_tracer("kwflow", tracer_provider=provider)
        self._propagator = TraceContextTextMapPropagator()
        self._header_bytes_max = header_bytes_max

    def begin(self, name: str, record: Record, instance: Instance | None) -> Span:
        span, context = self._begin(name, record, instance) or (self._trace.INVALID_SPAN, {})
        return Span(span, msgspec.structs.replace(record, headers=self.with_context(record.headers, context)), context)

    @_guarded
    def _begin(self, name: str, record: Record, instance: Instance | None) -> tuple[Any, dict[str, str]]:
        first = self._context(instance.extra.get("trace") if instance is not None else None)
        mine = self._context(_carried(record)) or first
        links = [self._trace.Link(first)] if first is not None and mine is not None and first.trace_id != mine.trace_id else []
        attributes: dict[str, str | int] = {
            "kwflow.workflow_id": name, "kwflow.workflow": instance.workflow if instance is not None else _text(record, "kwflow-workflow"),
            "messaging.system": "kafka", "messaging.destination.name": record.topic, "messaging.destination.partition.id": str(record.partition), "messaging.kafka.offset": record.offset,
        }  # fmt: skip
        span = self._tracer.start_span("kwflow.step", self._below(mine), kind=self._trace.SpanKind.CONSUMER, attributes=attributes, links=links)
        return span, self._injected(span)

    @_guarded
    def current(self) -> dict[str, str]:
        """The context of the caller's current span, in a form to send to others; empty if there is none."""
        return self._injected(self._trace.get_current_span())

    def with_context(self, headers: Headers, context: dict[str, str]) -> Headers:
        """Replace the context in these headers.  They stay unchanged if they would become too large, as a record that is refused is no answer."""
        others = tuple(pair for pair in headers if pair[0] not in _CARRIED)
        made = (*others, *((name, value.encode()) for name, value in context.items())) if context else headers
        return made if header_bytes(made) <= self._header_bytes_max else headers

    def remember(self, instance: Instance, span: Span) -> None:
        """Keep the context of the instance's first step in its header."""
        if "trace" not in instance.extra and span.context:
            instance.extra["trace"] = span.context

    def call(self, calls: Sequence[Dispatch]) -> CallSpan:
        """Return a context manager for one run of an activity's function for these calls."""
        return _Traced(self, calls)

    @_guarded
    def begin_call(self, calls: Sequence[Dispatch]) -> tuple[Any, dict[str, str]]:
        """Start the span of a run; return it and its context in a form to send to others."""
        name = calls[0].name
        callers = [found for call in calls if (found := self._context(_context_in(call.headers))) is not None]
        one = len(calls) == 1
        attributes: dict[str, str | int] = {"kwflow.activity": name, "kwflow.calls": len(calls)}
        if one:
            attributes |= {"kwflow.workflow_id": calls[0].workflow_id, "kwflow.attempt": calls[0].attempt, "kwflow.idempotency_key": f"{calls[0].workflow_id}|{calls[0].key}"}
        parent = self._below(callers[0] if one and callers else None)
        span = self._tracer.start_span(f"kwflow.activity {name}", parent, attributes=attributes, links=[] if one else [self._trace.Link(caller) for caller in callers])
        return span, self._injected(span)

    @_guarded
    def enter(self, span: Any) -> Any:
        """Make the span current: spans that are begun from now on in this thread or task are its children."""
        return self._current.attach(self._trace.set_span_in_context(span))

    @_guarded
    def leave(self, token: Any) -> None:
        self._current.detach(token)

    def _below(self, parent: Any) -> Any:
        """The context of a new span: below `parent`, or a new trace if that is None, whatever span is current in this thread."""
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(parent)) if parent is not None else self._current.Context()

    def _injected(self, span: Any) -> dict[str, str]:
        context: dict[str, str] = {}
        self._propagator.inject(context, self._trace.set_span_in_context(span))
        return context

    def _context(self, carrier: Any) -> Any:
        if not isinstance(carrier, dict) or "traceparent" not in carrier:
            return None
        found = self._trace.get_current_span(self._propagator.extract(carrier)).get_span_context()
        return found if found.is_valid else None


def _text(record: Record, name: str) -> str:
    try:
        return header(record, name) or ""
    except ProtocolError:
        return ""


def _carried(record: Record) -> dict[str, str]:
    return {name: value for name in _CARRIED if (value := _text(record, name))} if record.headers else {}


def _context_in(headers: Headers) -> dict[str, str]:
    return {name: value.decode("ascii", "replace") for name, value in headers if name in _CARRIED and value}


def end_all(spans: Iterable[object]) -> None:
    """End spans whose steps were committed."""
    for span in spans:
        if isinstance(span, Span):
            span.end()


def fail_all(spans: Iterable[object], wrong: str) -> None:
    """Mark spans whose instance could not be saved after all."""
    for span in spans:
        if isinstance(span, Span):
            span.done("parked", wrong)


def configure(name: str) -> None:
    """Send spans by OTLP over HTTP, as the OTEL_* variables say, unless the process has a provider already.  Raises UsageError without `kwflow[otel]`."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError("tracing needs OpenTelemetry: pip install 'kwflow[otel]'") from None
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
