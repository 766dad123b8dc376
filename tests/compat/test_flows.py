"""kwflow's own durable code never changes, because instances of every release wait in it."""

import ast
import pathlib

import pytest

import kwflow.flows
from kwflow.durable import registry

# file of kwflow/flows -> the hashes of its units. A line is added with a new file, and is never edited once that file was released.
FROZEN = {
    "attempts1": {"attempts": "405a87171c748a28"},
    "attempts2": {"attempts": "0eefe68374377e24"},
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


@pytest.mark.parametrize("name", sorted(FROZEN.keys() - {"attempts1", "rest1", "schedule1"}))
def test_a_later_durable_file_of_ours_imports_by_name_what_an_older_kwflow_does_not_have(name: str) -> None:
    """G7: there its import fails, so that the instance is parked.  An attribute that is missing would be met by the step, and end the workflow.

    The names that the first files use are in every kwflow that has such files.
    """
    here = pathlib.Path(kwflow.flows.__file__).parent

    def used(file: str) -> set[str]:
        return {node.attr for node in ast.walk(ast.parse((here / f"{file}.py").read_text())) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "support"}

    assert used(name) <= used("attempts1") | used("rest1") | used("schedule1")
