"""Snapshots of each release, kept as files with the sources they wait in: how they are written, found and continued.

`python -m tests.compat.kept VERSION` writes the folder of a release, once, with the code of that release. A folder is
never rewritten: it is what users of that release have on disk.

    VERSION/corpus/*.py, workflows/*.py   the author's code as it was, frozen
    VERSION/generators.json.gz            {module: {generator: {script: [snapshot before each op but the first]}}}
    VERSION/instances.json.gz             {scenario: [step]}, a step as `Step`
"""

from __future__ import annotations

import base64
import gzip
import json
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import corpus_harness as harness
import msgspec

from kwflow import api, durable
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.core.wire import Output, Record
from kwflow.errors import SnapshotError
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore, WorkflowTester

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
THROWS_MAX = 4  # states after a throw repeat from there on


def releases() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/generators.json.gz"))


def read(release: str, name: str) -> Any:
    return json.loads(gzip.decompress((HERE / release / name).read_bytes()))


def source_of(release: str, kind: str, name: str) -> str:
    return (HERE / release / kind / f"{name}.py").read_text(encoding="utf-8")


def load(release: str, kind: str, name: str) -> dict[str, Any]:
    """Load a frozen module as a durable module, under the name that it had when the release's snapshots were written."""
    return vars(durable.load_source(f"kept_{release.replace('.', '_')}_{name}", source_of(release, kind, name), f"{name}.py"))


def native(release: str, name: str) -> dict[str, Any]:
    """Load the same module as plain Python, which determines what comes next."""
    space: dict[str, Any] = {"__name__": f"kept_native_{name}"}
    exec(compile(source_of(release, "corpus", name), f"{name}.py", "exec"), space)
    return space


# -- generators ----------------------------------------------------------------------------------------------------


def scripts() -> Iterator[harness.Script]:
    plain = tuple(harness.stream("ints"))
    yield harness.Script("ints", plain)
    for k in range(1, THROWS_MAX):
        yield harness.Script(f"ValueError at {k}", (*plain[:k], ("throw", harness.THROWN["ValueError"]), *plain[k:]))


def saved(start: Any, log: list[str], script: harness.Script) -> list[str]:
    """The generator's snapshots before each op but the first, until it ends. An empty text means that it could not be saved."""
    gen, found = start(), []
    for op in script.ops:
        log.clear()  # some generators read it
        if harness.apply(gen, op)[0] != "yield":
            break
        try:
            found.append(text(durable.dumps(gen)))
        except SnapshotError:
            found.append("")
    return found


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def generators(release: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for module in harness.module_names():
        space = load(release, "corpus", module)
        made[module] = {name: {script.name: saved(space[name], space["LOG"], script) for script in scripts()} for name in harness.generators_of(space)}
    return made


def going_on(gen: Any, log: list[str], ops: tuple[harness.Op, ...]) -> list[tuple[Any, ...]]:
    """What the generator does with the rest of a script, up to its end."""
    trace: list[tuple[Any, ...]] = []
    for op in ops:
        log.clear()
        trace.append((*harness.apply(gen, op), tuple(log)))
        if trace[-1][0] != "yield":
            break
    return trace


# -- instances -------------------------------------------------------------------------------------------------------


class Step(msgspec.Struct):
    """One record, what it wrote, and everything that was stored after it. `due` is what the timers fire if time passes."""

    key: str | None
    value: str
    headers: dict[str, str]
    timestamp_ms: int
    wrote: list[tuple[str, str | None, str | None]]
    state: dict[str, str]
    timers: dict[str, str]
    due: list[tuple[str, str | None, str | None]]


def store(entries: dict[str, str]) -> MemoryStore:
    made = MemoryStore()
    made.entries = {base64.b64decode(key): base64.b64decode(value) for key, value in entries.items()}
    return made


def entries(of: MemoryStore) -> dict[str, str]:
    return {text(key): text(value) for key, value in sorted(of.entries.items())}


def written(outputs: tuple[Output, ...]) -> list[tuple[str, str | None, str | None]]:
    return [(output.topic, None if output.key is None else output.key.decode(), None if output.value is None else output.value.decode()) for output in outputs]


class Engine:
    """The workflows of one scenario over stores in memory. Each step starts from bytes."""

    def __init__(self, main: Any, state: MemoryStore, timers: MemoryStore) -> None:
        self.config = Config(instances_cached_max=0)
        self.workflows = WorkflowProcessor(self.config, Workflows({"main": main}, "main"), api.declared_topics())
        self.scheduler = TimerProcessor(self.config)
        self.state, self.timers = state, timers

    def step(self, offset: int, record: Step) -> list[tuple[str, str | None, str | None]]:
        headers = tuple((name, value.encode()) for name, value in record.headers.items())
        key = None if record.key is None else record.key.encode()
        overlay = Overlay(self.state)
        [made] = self.workflows.decide(overlay, [Record(self.config.resume_topic, 0, offset, record.timestamp_ms, key, record.value.encode(), headers)], record.timestamp_ms)
        self.state.apply(overlay.changes)
        scheduled = [output for output in made.outputs if output.topic == self.config.scheduler_topic]
        overlay = Overlay(self.timers)
        at = 100 * offset
        self.scheduler.decide(overlay, [Record(o.topic, 0, at + n, record.timestamp_ms, o.key, o.value, o.headers) for n, o in enumerate(scheduled)], record.timestamp_ms)
        self.timers.apply(overlay.changes)
        return written(made.outputs)

    def due(self) -> list[tuple[str, str | None, str | None]]:
        """What fires if all time passes. This changes nothing."""
        made = self.scheduler.due(Overlay(self.timers), 2**50, 1000)
        return written(made.outputs) if made is not None else []


SAGA = {
    "all booked": ({}, [("0:3", None), ("0:2", None), ("0:1", None)]),
    "no hotel": ({}, [("0:3", None), ("0:1", None), ("0:2", "hotel is not available")]),
    "error after hotel": ({"throwAfterHotel": True}, [("0:1", None), ("0:2", None)]),
    "too late": ({}, [("0:3", None), ("0:4", None), ("0:1", None)]),
}
CART: list[dict[str, Any] | None] = [
    {"type": "updateEmail", "email": "someone@example.com"}, {"type": "addToCart", "quantity": 10, "productId": "teapot"}, {"type": "checkout"},
    {"type": "addToCart", "quantity": 2, "productId": "sugar"}, {"type": "removeFromCart", "quantity": 11, "productId": "teapot"}, None, None,
]  # fmt: skip


def records() -> Iterator[tuple[str, str, list[Record]]]:
    """(scenario, frozen module, the records on its resume topic). None in a cart is one second that passes."""
    api.declare_topics("o", "T")
    for name, (options, answers) in SAGA.items():
        tester = tester_of("trip_booking")
        tester.start("t", options)
        for ref, error in answers:
            tester.resume("t", ref, "ok", **({"error": error} if error else {}))
        yield f"trip_booking: {name}", "trip_booking", landed(tester)
    for name, messages in (("abandoned", CART), ("checked out", [*CART[:2], CART[2]]), ("empty", [CART[0], CART[2], None, None])):
        tester = tester_of("ecommerce")
        tester.start("c", {"abandonedCartTimeoutMS": 1000})
        for message in messages:
            if message is None:
                tester.advance(1)
            else:
                tester.resume("c", "main", message)
        yield f"ecommerce: {name}", "ecommerce", landed(tester)


def tester_of(name: str) -> WorkflowTester:
    return WorkflowTester(vars(durable.load_source(name, (ROOT / "workflows" / f"{name}.py").read_text(encoding="utf-8")))["main"])


def landed(tester: WorkflowTester) -> list[Record]:
    found = [output for output in tester.outputs if output.topic == tester.config.resume_topic]
    return [Record(o.topic, 0, n, o.timestamp_ms or tester.now_ms, o.key, o.value, o.headers) for n, o in enumerate(found)]


def vectors() -> Iterator[tuple[str, str, list[Record]]]:
    """The combinator vectors of the reference, each as a module of its own."""
    from tests.spec.test_vectors import value_of
    from tests.spec.vectors import VECTORS

    for vector in VECTORS:
        values = [b"new:{}", *(value_of(event) for event, _ in vector.events)]
        yield f"vector {vector.id}", f"vector_{vector.id}", [Record("workflow-resume", 0, n, 1000, b"w", value) for n, value in enumerate(values)]


def instances(release: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, module, sent in (*records(), *vectors()):
        engine = Engine(load(release, "workflows", module)["main"], MemoryStore(), MemoryStore())
        steps = []
        for offset, record in enumerate(sent):
            headers = {header: value.decode() for header, value in record.headers if isinstance(value, bytes)}
            step = Step(None if record.key is None else record.key.decode(), (record.value or b"").decode(), headers, record.timestamp_ms, [], {}, {}, [])
            step.wrote = engine.step(offset, step)
            step.state, step.timers, step.due = entries(engine.state), entries(engine.timers), engine.due()
            steps.append(step)
        made[name] = {"module": module, "steps": msgspec.to_builtins(steps)}
    return made


def write(release: str) -> None:
    """Write the folder of a release. Raises FileExistsError if it exists."""
    from tests.spec.vectors import HELPERS, VECTORS

    folder = HERE / release
    folder.mkdir()
    shutil.copytree(harness.CORPUS, folder / "corpus", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "workflows").mkdir()
    for name in ("trip_booking", "ecommerce"):
        shutil.copy(ROOT / "workflows" / f"{name}.py", folder / "workflows")
    for vector in VECTORS:
        source = HELPERS + "\ndef main(opts):\n" + textwrap.indent(vector.body, "    ") + "\n"
        (folder / "workflows" / f"vector_{vector.id}.py").write_text(source, encoding="utf-8")
    for name, content in (("generators", generators(release)), ("instances", instances(release))):
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


if __name__ == "__main__":
    durable.set_abandoning(False)
    write(sys.argv[1])
