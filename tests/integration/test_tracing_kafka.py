"""Tracing on a real broker: spans end with their commit, and readers of a record get its context."""


import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.tracing import Tracing
from tests.integration.lab import Lab, turn

pytestmark = [pytest.mark.broker, pytest.mark.slow]


def traced(runner: KafkaRunner) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    assert isinstance(runner.processor, WorkflowProcessor)
    runner.processor.tracing = Tracing(provider)
    return exporter


def test_a_step_whose_transaction_was_aborted_and_is_made_again_has_one_span(lab: Lab) -> None:
    """K11: the broker rejects the output of one of two instances in a batch. The other's step is made twice and committed once."""
    runner = lab.engine("one", value_bytes_max=2_000_000)
    exporter = traced(runner)
    for id in ("large", "small"):
        lab.send("resume", id, "new:1")
    turn(runner, lambda: runner.counts["started"] == 2)
    lab.send("resume", "small", '{"ref": "r", "value": "x"}')
    lab.send("resume", "large", '{"ref": "r", "value": [' + "0," * 399_999 + "0]}")  # 0.8 MB here, 1.2 MB as Python writes the list
    turn(runner, lambda: runner.counts["parked"] == 1 and runner.counts["resumed"] == 1)
    spans = exporter.get_finished_spans()
    assert sorted(str((span.attributes or {})["kwflow.workflow_id"]) for span in spans) == ["large", "small", "small"], "the step that was refused has none"
    started, resumed = [span for span in spans if (span.attributes or {})["kwflow.workflow_id"] == "small"]
    assert resumed.parent is not None and resumed.parent.span_id == started.context.span_id
    (out,) = [record for record in kafka_link.read(lab.config("any"), "trap-out") if dict(record.headers).get("traceparent", b"")[3:35] == b"%032x" % resumed.context.trace_id]
    assert (dict(out.headers)["traceparent"] or b"").startswith(b"00-%032x-%016x-" % (resumed.context.trace_id, resumed.context.span_id))
