"""Each requirement of the reference systems has a test that cites it, or a line in docs/DEVIATIONS.md that says what kwflow has instead."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
NUMBERED = {  # reference-systems.md: kafka-workflow, its scheduler, zeebe-affinity-service, batch workers, external tasks and their clients, orchestration, REST tasks, all
    "KW": range(1, 41), "SC": range(1, 10), "AF": (*range(1, 12), *range(20, 24), *range(30, 33)), "BW": range(1, 17), "ET": range(1, 25), "EC": range(1, 9),
    "EJ": range(1, 6), "DO": range(1, 11), "LR": range(1, 23), "X": range(1, 6),
}  # fmt: skip


def cited(text: str) -> set[str]:
    """The ids that a text cites as `AF-1`, `AF-1..AF-5`, `AF-1..5`, `LR-1 to LR-22` or `KW-7, 10`."""
    found = set()
    for kind, first, last in re.findall(r"\b([A-Z]{1,2})-(\d+)(?:(?:\.\.| to )(?:[A-Z]{1,2}-)?(\d+))?", text):
        found |= {f"{kind}-{number}" for number in range(int(first), int(last or first) + 1)}
    for kind, more in re.findall(r"\b([A-Z]{2})-\d+((?:, \d+\b)+)", text):
        found |= {f"{kind}-{number}" for number in re.findall(r"\d+", more)}
    return found


def test_no_requirement_is_forgotten() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != pathlib.Path(__file__).name]
    known = cited("".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "docs/DEVIATIONS.md"]))
    assert not [f"{kind}-{number}" for kind, numbers in NUMBERED.items() for number in numbers if f"{kind}-{number}" not in known]
