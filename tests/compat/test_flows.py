"""kwflow's own durable code never changes, because instances of every release wait in it."""

import pathlib

import kwflow.flows
from kwflow.durable import registry

# file of kwflow/flows -> the hashes of its units. A line is added with a new file, and is never edited once that file was released.
FROZEN = {
    "attempts1": {"attempts": "405a87171c748a28"},
    "attempts2": {"attempts": "aa3c7d1762a557db"},
    "rest1": {"call": "f8f119fddf42151d"},
    "schedule1": {"follow": "50c2194322f049ad", "schedule": "9a547c6220f4c6c9"},
}


def test_a_released_durable_file_of_ours_is_never_edited() -> None:
    """Semantics §8: a changed unit would pin, or park, every instance that waits in it. Write `<name><n+1>.py` instead."""
    here = pathlib.Path(kwflow.flows.__file__).parent
    kwflow.flows.workflows()
    numbered = {path.stem for path in here.glob("*.py") if path.stem[-1].isdigit()}
    assert numbered == set(FROZEN)
    for name, units in FROZEN.items():
        assert dict(registry.modules()[f"kwflow.flows.{name}"].units) == units, name
