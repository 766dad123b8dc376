"""A dead letter that is retried is sent again and marked as done in one batch: killed at any moment, or done twice, it is sent once."""

import pathlib

import pytest

from kwflow.config import Config
from kwflow.core.wire import Output
from kwflow.runners.embedded import Embedded
from kwflow.runners.embedded_state import Mark
from kwflow.runners.socket import serve, submit_all
from tests.simulation.faults import Crashed
from tests.simulation.test_embedded import Dying

DONE = Mark("letters", 0, "done", b"0:0")
RECORDS = [Output("resume", b"w", b"again"), Output("letters", b"w", None, ((DONE.name, DONE.value),))]


def written(directory: pathlib.Path) -> tuple[int, int]:
    held = Embedded(directory, sync=False)
    try:
        return len(held.read("resume")), len(held.read("letters"))
    finally:
        held.close()


@pytest.mark.parametrize(("fate", "found"), [("before", (0, 0)), ("after", (1, 1))])
def test_a_process_that_dies_at_the_write_leaves_both_or_neither(tmp_path: pathlib.Path, fate: str, found: tuple[int, int]) -> None:
    held = Embedded(tmp_path, Config(), sync=False)
    held.db = Dying(held.db, lambda: fate)  # type: ignore[assignment]
    with pytest.raises(Crashed):
        held.append_all(RECORDS, DONE)
    held.close()
    assert written(tmp_path) == found
    assert len(submit_all(tmp_path, RECORDS, DONE)) == (2 if fate == "before" else 0)
    assert written(tmp_path) == (1, 1)


@pytest.mark.parametrize("engine_runs", [True, False])
def test_two_operators_who_retry_the_same_letter_send_it_once(tmp_path: pathlib.Path, engine_runs: bool) -> None:
    if engine_runs:
        held = Embedded(tmp_path, Config(), sync=False)
        with serve(held):
            answers = [submit_all(tmp_path, RECORDS, DONE) for _ in range(2)]
        held.close()
    else:
        answers = [submit_all(tmp_path, RECORDS, DONE) for _ in range(2)]
    assert answers == [[0, 0], []]
    assert written(tmp_path) == (1, 1)


def test_a_mark_counts_only_from_its_offset_on(tmp_path: pathlib.Path) -> None:
    """Another letter had this place before the topic was trimmed."""
    held = Embedded(tmp_path, Config(), sync=False)
    held.append_all(RECORDS, DONE)
    assert held.append_all(RECORDS, Mark("letters", 1, DONE.name, DONE.value)) == [1, 1]
    held.close()
