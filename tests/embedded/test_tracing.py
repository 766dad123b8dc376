"""OpenTelemetry: one span for each committed step, and a trace that goes through outputs, timers and answers."""

import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kwflow import durable
from kwflow.client import Client
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.ports import Decision
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.timers import TimerProcessor
from kwflow.runners.tracing import Tracing
from tests.embedded.shell import ROOT

SOURCE = """
import kwflow as kw
from opentelemetry import trace
kw.declare_topics("asked")
BROKEN = [True]
SEEN = []

def seen(what):
    SEEN.append((what, trace.get_current_span().get_span_context().span_id))
    return what

@kw.activity(name="traced-plain", retry=kw.Retry(max_attempts=2, first=0.001))
def plain(fails=0):
    if kw.activity_info().attempt <= fails:
        raise RuntimeError("not yet")
    return seen("plain")

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

@kw.activity(name="traced-mute", retry=kw.Retry(max_attempts=1))
def mute():
    raise Mute

@kw.activity(name="traced-async-mute", retry=kw.Retry(max_attempts=1))
async def mute_async():
    raise Mute

@kw.workflow
def mutes(opts):
    failed = []
    for activity in (mute, mute_async):
        try:
            yield activity()
        except kw.ActivityError as error:
            failed.append(error.type)
    return failed

@kw.activity(name="traced-async")
async def asynchronous():
    return seen("async")

@kw.activity(name="traced-batch")
def together(n: int) -> int: ...

@kw.batch_of(together, size=2, within=20)
def batch(calls):
    seen("batch")
    return [call.arguments["n"] for call in calls]

@kw.workflow
def calls(opts):
    one = yield plain(opts)
    two = yield asynchronous()
    three = yield kw.all([together(1), together(2)])
    kw.output("?", "asked")
    return [one, two, three]

def main(opts):
    yield kw.sleep(0.001)
    kw.output("?", "asked")
    first = yield kw.suspend("first")
    held = open(__file__) if first == "unsavable" else None
    second = yield kw.suspend("second")
    return [first, second]
"""
CLIENT = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
OTHER = ("traceparent", b"00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-01")


class Traced:
    def __init__(self, directory: pathlib.Path) -> None:
        file = directory / "traced.py"
        file.write_text(SOURCE)
        module = durable.load_source("traced", SOURCE, str(file))
        self.config = Config(tracing=True)
        self.held = Embedded(directory / "state", self.config, sync=False)
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.module = module
        workflows = WorkflowProcessor(self.config, Workflows({"main": module.main, "calls": module.calls, "mutes": module.mutes}, "main"), frozenset({"asked"}), self.held.incarnation)
        workflows.tracing = Tracing(provider)
        self.provider = provider
        self.processors = [workflows, TimerProcessor(self.config)]

    def send(self, id: str, value: str, *headers: tuple[str, bytes | None]) -> None:
        self.held.append(self.config.resume_topic, id.encode(), value.encode(), headers)

    def run(self, outcome: str, times: int = 1) -> list[ReadableSpan]:
        """Until this many records had this outcome. Returns all spans there are then, in the order of their ends."""
        self.held.run(self.processors, lambda: self.held.counts[outcome] >= times)
        return list(self.exporter.get_finished_spans())

    def result(self) -> bytes | None:
        deadline = time.monotonic() + 10
        self.held.run(self.processors, lambda: bool(list(self.held.read(self.config.result_topic))) or time.monotonic() > deadline)
        return [record.value for record in self.held.read(self.config.result_topic)][0]

    def asked(self, topic: str = "asked") -> list[str]:
        return [dict(record.headers)["traceparent"] or b"" for record in self.held.read(topic)][-1].decode().split("-")  # type: ignore[return-value]


@pytest.fixture
def traced(tmp_path: pathlib.Path) -> Iterator[Traced]:
    traced = Traced(tmp_path)
    yield traced
    traced.held.close()


def test_a_trace_goes_from_the_client_through_start_timer_output_and_answer(traced: Traced) -> None:
    """W3C traceparent in record headers: each step's span is the parent of what answers it."""
    traced.send("a", "new:1", CLIENT)
    start, timer = traced.run("resumed")
    assert f"{start.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c" and start.parent is not None and f"{start.parent.span_id:016x}" == "b7ad6b7169203331"
    assert timer.parent is not None and timer.parent.span_id == start.context.span_id, "the timer carried it"
    _, trace, span, _ = traced.asked()
    assert (trace, span) == (f"{timer.context.trace_id:032x}", f"{timer.context.span_id:016x}")
    traced.send("a", '{"ref": "first", "value": 1}', ("traceparent", "-".join(["00", trace, span, "01"]).encode()))
    answered = traced.run("resumed", 2)[-1]
    assert answered.parent is not None and answered.parent.span_id == timer.context.span_id
    assert dict(answered.attributes or {}) == {
        "kwflow.workflow_id": "a", "kwflow.workflow": "main", "kwflow.outcome": "resumed", "messaging.system": "kafka",
        "messaging.destination.name": "workflow-resume", "messaging.destination.partition.id": "0", "messaging.kafka.offset": 2,
    }  # fmt: skip


def test_what_the_sender_put_into_tracestate_travels_and_each_header_is_there_once(traced: Traced) -> None:
    traced.send("a", "new:1", CLIENT, ("tracestate", b"vendor=1"), ("mine", b"too"))
    traced.run("resumed")
    for topic in ("asked", traced.config.scheduler_topic):
        names = [name for name, _ in traced.held.read(topic)[0].headers]
        assert sorted(name for name in names if not name.startswith("kwflow-")) == ["mine", "traceparent", "tracestate"]
        assert dict(traced.held.read(topic)[0].headers)["tracestate"] == b"vendor=1"


def test_a_span_ends_with_its_step_not_with_the_commit_and_has_no_link_within_its_trace(traced: Traced) -> None:
    processor, decided_ns = traced.processors[0], list[int]()
    decide = processor.decide

    def timed(*arguments: Any) -> list[Decision]:
        made = decide(*arguments)
        decided_ns.append(time.time_ns())
        return made

    processor.decide = timed  # type: ignore[method-assign]
    traced.send("a", "new:1", CLIENT)
    spans = traced.run("resumed")
    assert len(spans) == len(decided_ns) == 2
    for span, at_ns in zip(spans, decided_ns, strict=True):
        assert (span.end_time or 0) <= at_ns and not span.links


def test_a_record_without_context_joins_the_trace_of_the_start_and_one_of_another_trace_links_to_it(traced: Traced) -> None:
    traced.send("a", "new:1", CLIENT)
    start = traced.run("resumed")[0]
    traced.send("a", '{"ref": "first", "value": 1}')
    joined = traced.run("resumed", 2)[-1]
    assert joined.parent is not None and (joined.context.trace_id, joined.parent.span_id) == (start.context.trace_id, start.context.span_id)
    traced.send("a", '{"ref": "second", "value": 2}', OTHER)
    linked = traced.run("resumed", 3)[-1]
    assert f"{linked.context.trace_id:032x}" == "a" * 32
    assert [link.context.span_id for link in linked.links] == [start.context.span_id]
    assert traced.asked("workflow-result")[1] == "a" * 32


def test_a_step_that_is_made_again_in_its_batch_has_one_span_and_one_that_fails_says_why(traced: Traced) -> None:
    """K15: the save fails at the end of the batch, and the records are done again one by one."""
    traced.send("b", "new:1")
    traced.run("resumed")
    traced.exporter.clear()
    traced.send("b", '{"ref": "nobody"}')
    traced.send("b", '{"ref": "first", "value": "unsavable"}')
    traced.send("b", '{"ref": "nobody"}')
    spans = traced.run("held")
    assert [(span.attributes or {})["kwflow.outcome"] for span in spans] == ["unknown-ref", "parked"], "what is only held ran no step"
    assert "unsavable" not in str(spans[1].attributes) and "held" in str(spans[1].status.description)


def test_a_client_that_traces_sends_where_its_caller_is_unless_it_is_told_otherwise(traced: Traced) -> None:
    """W3C traceparent: a web handler's span is the parent of the step that it starts."""
    stopped: list[bool] = []
    engine = threading.Thread(target=lambda: traced.held.run(traced.processors, lambda: bool(stopped)))
    engine.start()
    try:
        with Client.embedded(traced.held, traced.config) as client:
            with traced.provider.get_tracer("web").start_as_current_span("POST /orders") as caller:
                client.start("a", 1).result(10)
                client.start("b", 1, headers=dict([CLIENT])).result(10)
            client.start("c", 1).result(10)
    finally:
        stopped.append(True)
        traced.held.wake()
        engine.join()
    spans = {str((span.attributes or {})["kwflow.workflow_id"]): span for span in traced.exporter.get_finished_spans() if span.name == "kwflow.step" and span.attributes["kwflow.outcome"] == "started"}  # type: ignore[index]
    assert spans["a"].parent is not None and spans["a"].parent.span_id == caller.get_span_context().span_id
    assert f"{spans['b'].context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert spans["c"].parent is None


def test_without_the_option_nothing_is_traced_and_headers_travel_as_they_came(traced: Traced) -> None:
    processor = traced.processors[0]
    assert isinstance(processor, WorkflowProcessor)
    processor.tracing = None
    traced.send("a", "new:1", CLIENT)
    assert traced.run("resumed") == []
    assert traced.asked()[2] == "b7ad6b7169203331"


def test_activities_are_spans_between_the_step_that_calls_and_the_step_that_goes_on(traced: Traced) -> None:
    """M6.2: spans that the author's function makes are below its own, in a thread, on the event loop and in a batch."""
    traced.send("c", "new:1", CLIENT, ("kwflow-workflow", b"calls"))
    spans = {span.context.span_id: span for span in traced.run("resumed", 6)}
    by_name = {name: [span for span in spans.values() if span.name == name] for name in ("kwflow.activity traced-plain", "kwflow.activity traced-async", "kwflow.activity traced-batch", "kwflow.step")}
    failed, plain = by_name["kwflow.activity traced-plain"]
    [asynchronous], [batch] = by_name["kwflow.activity traced-async"], by_name["kwflow.activity traced-batch"]
    assert [(what, spans[id].name) for what, id in traced.module.SEEN] == [("plain", plain.name), ("async", asynchronous.name), ("batch", batch.name)]
    assert [dict(span.attributes or {})["kwflow.attempt"] for span in (failed, plain)] == [1, 2]
    assert "not yet" in str(failed.status.description) and failed.events[0].name == "exception" and plain.status.is_ok is True
    assert dict(plain.attributes or {})["kwflow.workflow_id"] == "c" and dict(batch.attributes or {}) == {"kwflow.activity": "traced-batch", "kwflow.calls": 2}
    path, at = [], asynchronous
    while at.parent is not None and at.parent.span_id in spans:
        path.append(at.name)
        at = spans[at.parent.span_id]
    step = "kwflow.step"
    assert [*path, at.name] == [asynchronous.name, step, plain.name, step, step, plain.name, step], "the answer, its timer, the answer, the start"
    assert f"{at.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert batch.context.trace_id != at.context.trace_id and [link.context.span_id for link in batch.links] == [by_name[step][-3].context.span_id] * 2
    assert traced.asked()[1] == "0af7651916cd43dd8448eb211c80319c", "the steps behind the batch are in the trace of the workflow still"


def test_an_activity_whose_error_has_no_text_is_answered(traced: Traced) -> None:
    """OpenTelemetry asks an error for its text. The author's `__str__` raised where the answer should have been sent, and the call waited for its timeout."""
    traced.send("m", "new:null", CLIENT, ("kwflow-workflow", b"mutes"))
    assert traced.result() == b'["Mute","Mute"]'
    failed = [span for span in traced.exporter.get_finished_spans() if span.events]
    assert [dict(span.events[0].attributes or {})["exception.message"] for span in failed] == ["Mute: <no message: __str__ failed>"] * 2


class Raising(SpanProcessor):
    """Such as a program that brings its own provider might have."""

    def on_start(self, span: object, parent_context: object = None) -> None:
        if self.starts:
            raise RuntimeError("on_start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end")

    def __init__(self, starts: bool) -> None:
        self.starts = starts


@pytest.mark.parametrize("starts", [True, False])
def test_tracing_that_raises_costs_spans_and_nothing_else(traced: Traced, starts: bool) -> None:
    """An engine ended after the step that it had committed, and activity calls were never answered."""
    provider = TracerProvider()
    provider.add_span_processor(Raising(starts))
    assert isinstance(traced.processors[0], WorkflowProcessor)
    traced.processors[0].tracing = Tracing(provider)
    traced.send("c", "new:1", CLIENT, ("kwflow-workflow", b"calls"))
    assert traced.result() == b'["plain","async",[1,2]]'


def test_a_context_that_has_no_room_among_the_headers_is_left_out(traced: Traced) -> None:
    """Otherwise the answer of an activity would be a dead letter, and its workflow would wait for it."""
    traced.send("c", "new:0", ("x" * 10, b"a" * (traced.config.header_bytes_max - 10 - 23)), ("kwflow-workflow", b"calls"))
    assert traced.result() == b'["plain","async",[1,2]]'


def test_headers_go_on_over_an_activity_as_over_a_timer_with_tracing_or_without(traced: Traced) -> None:
    """Semantics §9.3."""
    processor = traced.processors[0]
    assert isinstance(processor, WorkflowProcessor)
    processor.tracing = None
    traced.send("c", "new:0", CLIENT, ("kwflow-workflow", b"calls"), ("tenant", b"a"))
    traced.run("resumed", 4)
    assert [pair for pair in traced.held.read("asked")[0].headers if not pair[0].startswith("kwflow-")] == [CLIENT, ("tenant", b"a")]


def test_an_engine_that_does_not_trace_loads_no_opentelemetry() -> None:
    code = "import sys; from kwflow.runners import loop, embedded; from kwflow.config import Config; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
