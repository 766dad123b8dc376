"""`@kw.workflow(park_on_error=True)`: an exception that nobody catches is a bug to be fixed, not the end of the workflow."""

import pytest

import kwflow as kw
from kwflow import declarations, durable
from kwflow.testing import WorkflowTester

TEXT = """
import kwflow as kw
kw.declare_topics("out")
class Refused(kw.BusinessError):
    pass
def fails(inside):
    raise ExceptionGroup("g", eval("[" + inside + "]"))
@kw.workflow({0})
def parks(opts):
    kw.output("begun", "out")
    paid = yield kw.suspend("paid")
    kw.output("paid", "out")
    if paid == "refuse":
        raise Refused("declined")
    return {1}
"""


@pytest.fixture
def forgets() -> object:
    yield
    declarations._workflows.pop("parks", None)


def begun(option: str, result: str = "paid['amount']") -> WorkflowTester:
    tester = WorkflowTester(durable.load_source("parking_orders", TEXT.format(option, result), "parking_orders.py").parks)
    tester.start("w")
    return tester


pytestmark = pytest.mark.usefixtures("forgets")


def test_the_step_is_undone_and_the_instance_parked_with_the_exception_and_its_line() -> None:
    """Semantics §7."""
    tester = begun("park_on_error=True")
    tester.resume("w", "paid", {})
    mark = tester.header("w")["parked"]
    assert (mark["reason"], mark["message"]) == ("UncaughtError", "KeyError: 'amount' in parks (parking_orders.py:15)")
    assert tester.outputs_to("out") == ["begun"]
    assert tester.outputs_to("workflow-error") == []
    assert tester.logs[-1] == "w is parked: UncaughtError: KeyError in parks (parking_orders.py:15); kwflow show has the details", "the exception may say what not everybody should read"


def test_the_fix_is_moved_under_it_and_the_record_is_applied_again() -> None:
    """Decision 0061."""
    tester = begun("park_on_error=True")
    tester.resume("w", "paid", {})
    tester.deploy(durable.load_source("parking_orders", TEXT.format("park_on_error=True", "paid.get('amount', 0)"), "parking_orders.py").parks)
    assert tester.command("w", "migrate", {"in_place": True})["status"] == "ok"
    assert tester.result("w") == 0
    assert tester.outputs_to("out") == ["begun", "paid"]


def test_a_result_without_a_json_form_is_such_a_bug_too() -> None:
    tester = begun("park_on_error=True", "object()")
    tester.resume("w", "paid", {})
    assert tester.header("w")["parked"]["message"].startswith("TypeError: an object of class object has no JSON form")


def test_a_refusal_that_is_meant_and_a_cancellation_end_it() -> None:
    """What a BusinessError says is an outcome."""
    tester = begun("park_on_error=True")
    tester.resume("w", "paid", "refuse")
    assert tester.values("workflow-error") == ["Refused: declined"]
    tester.start("other")
    tester.command("other", "cancel")
    assert tester.header("other") is None and len(tester.values("workflow-error")) == 2


def test_a_group_is_an_outcome_if_all_in_it_are() -> None:
    for inside, ends in (("Refused('a'), TimeoutError()", True), ("Refused('a'), ExceptionGroup('g', [TimeoutError(), KeyError()])", False)):
        tester = begun("park_on_error=True", "fails(paid)")
        tester.resume("w", "paid", inside)
        assert (tester.header("w") is None) is ends, inside


def test_without_it_every_exception_ends_the_workflow() -> None:
    """KW-25."""
    tester = begun("")
    tester.resume("w", "paid", {})
    assert tester.values("workflow-error") == ["KeyError: 'amount'"]
    assert tester.header("w") is None


def test_an_error_while_it_starts_parks_the_start() -> None:
    source = "import kwflow as kw\n@kw.workflow(park_on_error=True)\ndef parks(opts):\n    return opts['amount']\n"
    tester = WorkflowTester(durable.load_source("parking_starts", source, "parking_starts.py").parks)
    tester.start("w", {})
    assert tester.header("w")["parked"]["reason"] == "UncaughtError"
    tester.deploy(durable.load_source("parking_starts", source.replace("['amount']", ".get('amount')"), "parking_starts.py").parks)
    tester.command("w", "retry")
    assert tester.result("w") is None


def test_the_option_is_one_of_the_decorator() -> None:
    assert kw.workflow(park_on_error=True)(lambda opts: opts).kwflow_park_on_error  # type: ignore[attr-defined]
    declarations._workflows.pop("<lambda>")
