"""Run by another interpreter: `minor.py corpus` compares the corpus, `minor.py resume FILE` goes on from snapshots written elsewhere.

Needs nothing but the standard library and kwflow.durable.
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/durable")]

import corpus_harness as harness  # noqa: E402

from kwflow import durable  # noqa: E402
from kwflow.errors import SnapshotError  # noqa: E402

REFUSED = "UnsavableError"


def corpus() -> list[str]:
    """What differs between native and pickled at every yield."""
    found = []
    for module in harness.module_names():
        native, lowered = harness.load_native(module), harness.load_lowered(module)
        for name in harness.generators_of(native):
            text = harness.difference(native[name], native["LOG"], lowered[name], lowered["LOG"], harness.TRIPS["pickled"])
            if text is not None and REFUSED not in text:
                found.append(f"{module}.{name}: {text}")
    return found


def rest(generator: object) -> list[str]:
    """What it does when it is only sent None."""
    return [repr(harness.apply(generator, ("send", None))) for _ in range(5)]


def snapshots() -> dict[str, list[object]]:
    """Each generator of the corpus saved at its first yield, and what it does from there."""
    made: dict[str, list[object]] = {}
    for module in harness.module_names():
        space = harness.load_lowered(module)
        for name in harness.generators_of(space):
            gen = space[name]()
            if harness.apply(gen, ("send", None))[0] == "yield":
                try:
                    data = durable.dumps(gen)
                except SnapshotError:
                    continue
                made[f"{module}.{name}"] = [data.hex(), rest(durable.loads(data))]
    return made


def resume(path: str) -> list[str]:
    """Which of another minor's snapshots do something else here; a refusal by name is allowed (G7)."""
    written = json.loads(pathlib.Path(path).read_text())
    for module in harness.module_names():
        harness.load_lowered(module)
    found = []
    for name, (data, expected) in written.items():
        try:
            gen = durable.loads(bytes.fromhex(data))
        except SnapshotError as error:
            found.append(f"refused {name}: {error}")
            continue
        got = rest(gen)
        if got != expected and "OrderedDict(" not in "".join(got):  # its repr changed in 3.12
            found.append(f"{name}: {expected} there, {got} here")
    return found


if __name__ == "__main__":
    durable.set_abandoning(False)
    print(json.dumps(corpus() if sys.argv[1] == "corpus" else resume(sys.argv[2])))
