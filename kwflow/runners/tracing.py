"""OpenTelemetry spans, one for each committed step (`kwflow[otel]`, option `tracing`).

The context comes in with a record's `traceparent` and goes out with the step's own in everything it writes, timers
included: whoever answers carries it back.  A record without one joins the trace that the instance was started in; one of another
trace links to it.  A span is ended only after its commit, so a batch that is made again shows no step twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from kwflow.core.instance import Instance
from kwflow.core.wire import Record, header
from kwflow.errors import ProtocolError, UsageError

__all__ = ["Tracing", "configure", "end_all", "fail_all"]

_CARRIED = ("traceparent", "tracestate")


class Span:
    """One step's.  `record` is its record with the step's own context in the headers."""

    __slots__ = ("_ended_ns", "_span", "context", "record")

    def __init__(self, span: Any, record: Record, context: dict[str, str]) -> None:
        self._span = span
        self._ended_ns = 0
        self.context = context
        others = tuple(pair for pair in record.headers if pair[0] not in _CARRIED)
        self.record = msgspec.structs.replace(record, headers=(*others, *((name, value.encode()) for name, value in context.items())))

    def done(self, outcome: str, wrong: str | None) -> None:
        """The step is made; `wrong` says what was wrong with it, if anything was."""
        self._span.set_attribute("kwflow.outcome", outcome)
        if wrong is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, wrong)
        self._ended_ns = time.time_ns()

    def end(self) -> None:
        """It was committed."""
        self._span.end(self._ended_ns)


class Tracing:
    """Begins spans with a provider's tracer (default: the process's).  Raises UsageError without `kwflow[otel]`."""

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise UsageError("tracing needs OpenTelemetry: pip install 'kwflow[otel]'") from None
        self._trace = trace
        self._tracer = trace.get_tracer("kwflow", tracer_provider=provider)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, record: Record, instance: Instance | None) -> Span:
        first = self._context(instance.extra.get("trace") if instance is not None else None)
        mine = self._context(_carried(record)) or first
        links = [self._trace.Link(first)] if first is not None and mine is not None and first.trace_id != mine.trace_id else []
        parent = self._trace.set_span_in_context(self._trace.NonRecordingSpan(mine)) if mine is not None else None
        attributes: dict[str, str | int] = {
            "kwflow.workflow_id": name, "kwflow.workflow": instance.workflow if instance is not None else _text(record, "kwflow-workflow"),
            "messaging.system": "kafka", "messaging.destination.name": record.topic, "messaging.destination.partition.id": str(record.partition), "messaging.kafka.offset": record.offset,
        }  # fmt: skip
        span = self._tracer.start_span("kwflow.step", parent, kind=self._trace.SpanKind.CONSUMER, attributes=attributes, links=links)
        context: dict[str, str] = {}
        self._propagator.inject(context, self._trace.set_span_in_context(span))
        return Span(span, record, context)

    def remember(self, instance: Instance, span: Span) -> None:
        """The context of its start stays in the instance's header."""
        if "trace" not in instance.extra:
            instance.extra["trace"] = span.context

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


def end_all(spans: Iterable[object]) -> None:
    """Their steps are committed."""
    for span in spans:
        if isinstance(span, Span):
            span.end()


def fail_all(spans: Iterable[object], wrong: str) -> None:
    """Their instance could not be saved after all."""
    for span in spans:
        if isinstance(span, Span):
            span.done("parked", wrong)


def configure(name: str) -> None:
    """Send spans by OTLP over HTTP as the OTEL_* variables say, unless the process has a provider already.  Raises UsageError without `kwflow[otel]`."""
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
