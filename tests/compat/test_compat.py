"""What earlier releases stored goes on under this one: it is loaded and runs to its end, or is refused by name."""

import base64
import subprocess
import sys
from typing import Any

import corpus_harness as harness
import pytest

from kwflow import durable
from kwflow.core import mailbox, snapshot
from kwflow.core.picture import picture_of
from kwflow.durable.lower.show import shapes_of
from kwflow.errors import SnapshotError
from tests.compat import kept

# what this version may refuse of an earlier release: (release, generator or scenario) -> what the error has to say
REFUSED: dict[tuple[str, str], str] = {}

CORPUS = [(release, module) for release in kept.releases() for module in kept.read(release, "generators.json.gz") if module in harness.module_names()]
INSTANCES = [(release, name) for release in kept.releases() for name in kept.read(release, "instances.json.gz")]


def test_every_release_is_kept() -> None:
    """G7: 0.1.0 is the first format that was released."""
    assert "0.1.0" in kept.releases()
    assert sum(len(snapshots) for module in kept.read("0.1.0", "generators.json.gz").values() for scripts in module.values() for snapshots in scripts.values()) > 1500
    assert len({name.split(":")[0] for release, name in INSTANCES if release == "0.1.0"}) > 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # endless generators are dropped, and one of them ignores GeneratorExit
@pytest.mark.parametrize(("release", "module"), CORPUS, ids=[f"{r}-{m}" for r, m in CORPUS])
def test_a_generator_saved_by_an_earlier_release_ends_as_it_does_natively(release: str, module: str) -> None:
    """G7, G8."""
    plain, lowered = kept.native(release, module), kept.load(release, "corpus", module)
    for name, by_script in kept.read(release, "generators.json.gz")[module].items():
        for script in kept.scripts():
            for n, data in enumerate(by_script[script.name], 1):
                if not data:
                    continue  # that release could not save it
                expected = native_rest(plain, name, script, n)
                refusal = REFUSED.get((release, f"{module}.{name}"))
                try:
                    gen = durable.loads(base64.b64decode(data))
                except SnapshotError as error:
                    assert refusal is not None and refusal in str(error), f"{module}.{name}, {script.name}, op {n}: {error}"
                    continue
                got = kept.going_on(gen, lowered["LOG"], script.ops[n:])
                told = harness.on_every_minor if sys.version_info >= (3, 14) else str  # 3.11 wrote them
                assert told(repr(got)) == told(repr(expected)), f"{module}.{name}, {script.name}, op {n}"


def native_rest(space: dict[str, Any], name: str, script: harness.Script, n: int) -> list[tuple[Any, ...]]:
    gen = space[name]()
    for op in script.ops[:n]:
        space["LOG"].clear()
        harness.apply(gen, op)
    return kept.going_on(gen, space["LOG"], script.ops[n:])


@pytest.mark.parametrize(("release", "name"), INSTANCES, ids=[f"{r}-{n}" for r, n in INSTANCES])
def test_an_instance_stored_by_an_earlier_release_writes_what_it_would_have_written(release: str, name: str) -> None:
    """G5, G7: after each step of the old engine, the new one takes over and does the rest."""
    scenario = kept.read(release, "instances.json.gz")[name]
    main = kept.load(release, "workflows", scenario["module"])["main"]
    steps = [kept.msgspec.convert(step, kept.Step) for step in scenario["steps"]]
    refusal = REFUSED.get((release, name))
    for taken, step in enumerate(steps):
        engine = kept.Engine(main, kept.store(step.state), kept.store(step.timers))
        assert engine.due() == step.due
        for key, stored in engine.state.entries.items():
            if refusal is not None and not key.startswith(b"\0"):
                with pytest.raises(SnapshotError, match=refusal):
                    snapshot.load(stored)
        if refusal is None:
            for offset, later in enumerate(steps[taken + 1 :], taken + 1):
                assert engine.step(offset, later) == later.wrote, f"taken over after step {taken}, at step {offset}"
                assert engine.due() == later.due


def test_a_format_of_the_future_is_refused_by_name() -> None:
    """The other direction: an old engine names the format that it does not know."""
    with pytest.raises(SnapshotError, match="KWF9"):
        snapshot.load(b"KWF9" + bytes(60))


@pytest.mark.parametrize("release", kept.releases())
def test_instances_of_an_earlier_release_are_shown_with_the_lines_where_they_wait(release: str) -> None:
    """The console reads what engines of that release saved, and loads nothing for it."""
    counted = 0
    for scenario in kept.read(release, "instances.json.gz").values():
        shapes = shapes_of(kept.source_of(release, "workflows", scenario["module"]))
        stored = [data for step in scenario["steps"] for data in kept.store(step["state"]).entries.values() if data.startswith(b"KWF1")]
        for body in [body for data in stored if (body := snapshot.split(data)[1])]:
            frames = [node.frame for node in picture_of(body).nodes if node.frame is not None and node.frame.label is not None]
            assert all(shapes[frame.path].lines[frame.label or ""] for frame in frames)
            counted += len(frames)
    assert counted > 100


@pytest.mark.parametrize("name", ["Inbox", "Mail", "Mailbox", "Update"])
def test_snapshots_name_what_belongs_to_the_mailbox_by_one_module(name: str) -> None:
    """G7: wherever it is defined, so that an older kwflow finds it, too."""
    saved = getattr(mailbox, name)
    assert saved in snapshot.NAMED
    assert (saved.__module__, saved.__qualname__) == ("kwflow.core.mailbox", name)


def test_a_program_that_only_loads_snapshots_knows_what_they_name() -> None:
    """A snapshot with mail was refused there: its names are looked up in modules that are loaded."""
    code = "import sys; from kwflow.core import snapshot; sys.exit('kwflow.core.mailbox' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
