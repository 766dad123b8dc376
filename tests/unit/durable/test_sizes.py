"""How small snapshots are, and how fast they are made and loaded."""

import pytest

from benchmarks import generators


def test_the_graph_of_a_saga_of_two_frames_is_under_600_bytes() -> None:
    """Including its first reservation and the undo of it in the list."""
    assert max(generators.saga_bytes()) < generators.LIMITS["body of a saga of two frames, bytes"]


@pytest.mark.nightly
def test_saving_and_restoring_stay_within_their_ratios_to_a_plain_pickle() -> None:
    found = generators.figures()
    assert {name: value for name, value in found.items() if name.startswith(("save", "restore")) and value > generators.LIMITS[name]} == {}
