"""Run by another interpreter: `minor.py corpus` compares the corpus, `write FILE` saves it at every yield, `resume FILE` goes on from there.

It needs only the standard library and kwflow.durable.
"""

import json
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/durable")]

import corpus_harness as harness  # noqa: E402
import random_programs  # noqa: E402

from kwflow import durable  # noqa: E402
from kwflow.errors import SnapshotError  # noqa: E402

REFUSED = "UnsavableError"
PROGRAMS = 100


def corpus() -> list[str]:
    """The differences between native generators and those that are pickled at every yield."""
    found = []
    for module in harness.module_names():
        native, lowered = harness.load_native(module), harness.load_lowered(module)
        for name in harness.generators_of(native):
            text = harness.difference(native[name], native["LOG"], lowered[name], lowered["LOG"], harness.TRIPS["pickled"])
            if text is not None and REFUSED not in text:
                found.append(f"{module}.{name}: {text}")
    return found


def scripts() -> list[harness.Script]:
    plain = tuple(harness.stream("ints"))
    return [harness.Script("ints", plain), harness.Script("thrown into", (*plain[:2], ("throw", harness.THROWN["ValueError"]), *plain[2:]))]


def cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """(name, native namespace, lowered namespace, generator): the corpus, and random programs."""
    for module in harness.module_names():
        native, lowered = harness.load_native(module), harness.load_lowered(module)
        for name in harness.generators_of(native):
            yield f"{module}.{name}", native, lowered, name
    for seed in range(PROGRAMS):
        source = random_programs.Maker(seed).source().replace("    global G\n", "")  # globals are not saved
        yield f"program {seed}", random_programs.native(source), random_programs.lowered(source, f"random_program_{seed}"), "g"


def write(path: str) -> list[str]:
    """Write a file with each generator as it waited at every yield of each script: {name: {script: {op: hex}}}."""
    made: dict[str, Any] = {}
    for name, _, space, function in cases():
        for script in scripts():
            found = made.setdefault(name, {})[script.name] = {}
            gen = space[function]()
            for number, op in enumerate(script.ops, 1):
                space["LOG"].clear()
                if harness.apply(gen, op)[0] != "yield":
                    break
                try:
                    found[number] = durable.dumps(gen).hex()
                except SnapshotError:
                    continue
    pathlib.Path(path).write_text(json.dumps(made))
    return []


def resume(path: str) -> list[str]:
    """The snapshots of another minor that do something else here than the same generator does natively here."""
    written = json.loads(pathlib.Path(path).read_text())
    found: list[str] = []
    compared = 0
    for name, native, space, function in cases():
        for script in scripts():
            for number, data in written.get(name, {}).get(script.name, {}).items():
                expected = rest(native[function](), native["LOG"], script, int(number))
                try:
                    gen = durable.loads(bytes.fromhex(data))
                except SnapshotError as error:
                    found.append(f"refused {name}, {script.name}, op {number}: {error}")
                    continue
                got = rest(gen, space["LOG"], script, int(number), begun=True)
                compared += 1
                if got != expected:
                    found.append(f"{name}, {script.name}, op {number}: natively {expected[:3]}, from there {got[:3]}")
    return found if compared > 1500 else [*found, f"only {compared} snapshots"]


def rest(gen: Any, log: list[Any], script: harness.Script, number: int, begun: bool = False) -> list[str]:
    """What the generator does with the rest of a script. Ids of objects are not compared."""
    trace: list[str] = []
    for at, op in enumerate(script.ops):
        if begun and at < number:
            continue
        log.clear()
        outcome = harness.apply(gen, op)
        if at >= number:
            trace.append(harness.on_every_minor(repr((*outcome, tuple(log)))))
        if outcome[0] != "yield":
            break
    return trace


if __name__ == "__main__":
    durable.set_abandoning(False)
    warnings.simplefilter("ignore")
    print(json.dumps({"corpus": corpus, "write": write, "resume": resume}[sys.argv[1]](*sys.argv[2:])))
