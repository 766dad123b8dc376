"""V1-V39, each in three ways: saved and loaded at every step, kept live, and all events in one batch."""

import textwrap
from typing import Any

import msgspec
import pytest

from kwflow import api, durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.core.wire import Output, Record
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore
from tests.spec.vectors import HELPERS, VECTORS, Vector


def program(vector: Vector) -> Any:
    source = HELPERS + "\ndef main(opts):\n" + textwrap.indent(vector.body, "    ")
    return durable.load_source(f"vector_{vector.id}", source, f"{vector.id}.py").main


def value_of(event: str) -> bytes:
    split = min(event.find(mark) for mark in "=!" if mark in event)
    content: Any = event[split + 1 :]
    return msgspec.json.encode({"ref": event[:split], ("value" if event[split] == "=" else "error"): int(content) if content.isdigit() else content})


def lines(outputs: list[Output]) -> list[str]:
    """The format of a vector's expectations."""
    names = {"o": "", "workflow-result": "result ", "workflow-error": "error "}
    return [names[output.topic] + (output.value or b"").decode() for output in outputs if output.topic in names]


class Engine:
    """One processor over a store in memory. `batch` decides everything it is given at once."""

    def __init__(self, main: Any, cached: int) -> None:
        self.store = MemoryStore()
        self.processor = WorkflowProcessor(Config(instances_cached_max=cached), Workflows({"main": main}, "main"), api.declared_topics())
        self.offset = 0

    def batch(self, values: list[bytes]) -> list[list[str]]:
        records = [Record("workflow-resume", 0, self.offset + n, 1000, b"w", value) for n, value in enumerate(values)]
        self.offset += len(records)
        overlay = Overlay(self.store)
        made = self.processor.decide(overlay, records, 1000)
        self.store.apply(overlay.changes)
        return [lines(list(one.outputs)) for one in made]


@pytest.mark.parametrize("mode", ["restored", "cached", "batched"])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_a_vector_of_the_reference_writes_what_it_should(vector: Vector, mode: str) -> None:
    """Spec 1.3."""
    engine = Engine(program(vector), 0 if mode == "restored" else 100)
    values = [b"new:{}", *(value_of(event) for event, _ in vector.events)]
    made = engine.batch(values) if mode == "batched" else [engine.batch([value])[0] for value in values]
    expected = [vector.started, *([line for line in written if line != "gone"] for _, written in vector.events)]
    assert made == expected
    ended = "gone" in vector.events[-1][1]
    assert (engine.store.entries == {}) == ended


def test_outputs_ids_keys_and_tombstones_of_two_steps() -> None:
    """V39."""
    body = 'kw.output("v", "o", key="k1")\nkw.output_json({"a": 1}, "T")\nkw.output(None, "o", key="k2")\none, two = kw.suspend(), kw.suspend()\nout(f"{one.id} {two.id}")\n'
    body += 'yield one\nout(kw.step_id())\nout(f"{kw.suspend().id} {kw.suspend().id}")\nyield two'
    engine = Engine(program(Vector("V39", body, [])), 0)
    overlay = Overlay(engine.store)
    [made] = engine.processor.decide(overlay, [Record("workflow-resume", 0, 0, 5, b"T", b"new:{}")], 5)
    assert [(output.key, output.value, output.topic) for output in made.outputs] == [(b"k1", b"v", "o"), (b"T", b'{"a":1}', "T"), (b"k2", None, "o"), (b"T", b"0:1 0:2", "o")]
    [made] = engine.processor.decide(overlay, [Record("workflow-resume", 0, 1, 6, b"T", b'{"ref":"0:1"}')], 6)
    assert lines(list(made.outputs)) == ["1", "1:1 1:2"]
    assert {output.timestamp_ms for output in made.outputs} == {6}


class Site(Engine):
    """Several instances. What is sent is decided at once, and may be decided again as one batch."""

    def __init__(self, main: Any, cached: int) -> None:
        super().__init__(main, cached)
        self.sent: list[Record] = []

    def send(self, id: str, value: bytes, *headers: tuple[str, bytes]) -> list[str]:
        self.sent.append(Record("workflow-resume", 0, len(self.sent), 1000, id.encode(), value, headers))
        return self.decide(self.sent[-1:])[0]

    def decide(self, records: list[Record]) -> list[list[str]]:
        overlay = Overlay(self.store)
        made = self.processor.decide(overlay, records, 1000)
        self.store.apply(overlay.changes)
        return [lines(list(one.outputs)) for one in made]


@pytest.mark.parametrize("cached", [0, 100])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_a_fork_at_any_wait_of_a_vector_writes_what_is_left_of_it_and_so_does_the_first(vector: Vector, cached: int) -> None:
    """Decision 0048, forks of forks included. K15: all of it in one batch writes the same."""
    main = program(vector)
    site, running, closing = Site(main, cached), ["w"], False
    made = [site.send("w", b"new:{}")]
    for event, written in vector.events:
        copy = f"copy{len(running)}"
        made.append(site.send(running[-1], msgspec.json.encode({"id": copy}), ("kwflow-op", b"fork")))
        assert (copy.encode() in site.store.entries) is not closing  # an instance that is only cleaning up cannot be copied
        running += [] if closing else [copy]
        made += [site.send(id, value_of(event)) for id in running]
        assert made[-len(running) :] == [[line for line in written if line != "gone"]] * len(running), event
        closing = closing or any(line.startswith(("result ", "error ")) for line in written)
    batch = Site(main, cached)
    assert batch.decide(site.sent) == made
    assert batch.store.entries.keys() == site.store.entries.keys()
