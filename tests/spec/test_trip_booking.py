"""T-KW-9: the trip saga, saved to bytes and loaded after every step."""

import pathlib

import pytest

from kwflow import durable
from kwflow.testing import WorkflowTester
from tests.spec.trips import TRIPS, Trip

SOURCE = pathlib.Path(__file__).parents[2] / "workflows/trip_booking.py"


@pytest.fixture
def trip() -> WorkflowTester:
    module = durable.load_source("trip_booking", SOURCE.read_text(encoding="utf-8"), str(SOURCE))
    tester = WorkflowTester(module.main)
    tester.start("t", {})
    return tester


def refs(trip: WorkflowTester) -> dict[str, str]:
    return {kind: trip.outputs_to(f"saga-reserve-{kind}")[0] for kind in ("car", "hotel", "flight")}


def test_all_reservations_are_asked_for_at_once_and_numbered_in_order(trip: WorkflowTester) -> None:
    """KW-17."""
    assert refs(trip) == {"car": "0:1", "hotel": "0:2", "flight": "0:3"}
    assert trip.waits("t") == ["0:1", "0:2", "0:3", "0:4"]


def test_the_result_holds_the_three_in_input_order_whatever_the_order_of_answers(trip: WorkflowTester) -> None:
    """T-KW-9, KW-24."""
    for kind in ("flight", "hotel", "car"):
        trip.resume("t", refs(trip)[kind], "ok")
    assert trip.result("t") == {"car": {"id": "0:1"}, "hotel": {"id": "0:2"}, "flight": {"id": "0:3"}}
    assert trip.header("t") is None
    assert trip.outputs_to("saga-cancel-car") == []


def test_a_refusal_undoes_what_was_booked_and_cancels_what_was_asked_for(trip: WorkflowTester) -> None:
    """T-KW-9, G9."""
    trip.resume("t", "0:3", "ok")
    trip.resume("t", "0:2", error="not available")
    assert trip.values("workflow-error") == ["not available"]
    assert trip.outputs_to("saga-cancel-flight") == ["0:3"]
    assert trip.outputs_to("saga-cancel-car") == ["0:1"]
    assert trip.header("t") is None


def test_a_timeout_undoes_too(trip: WorkflowTester) -> None:
    """T-KW-9."""
    trip.resume("t", "0:1", "ok")
    trip.advance(0.999)
    assert trip.values("workflow-error") == []
    trip.advance(0.001)
    assert trip.values("workflow-error") == ["timeout"]
    assert trip.outputs_to("saga-cancel-car") == ["0:1"]


def test_a_duplicate_start_and_an_unknown_ref_change_nothing(trip: WorkflowTester) -> None:
    """G5, KW-4."""
    before = dict(trip.state.entries)
    trip.start("t", {})
    trip.resume("t", "9:9", 1)
    trip.resume("nobody", "0:1", 1)
    assert trip.state.entries == before
    assert trip.counts[-3:] == ["duplicate-start", "unknown-ref", "unknown-id"]
    assert trip.logs[-3:] == [
        "t: ignored, duplicate-start, workflow-resume[0]@1", "t: ignored, unknown-ref, workflow-resume[0]@2", "nobody: ignored, unknown-id, workflow-resume[0]@3",
    ]  # fmt: skip


@pytest.mark.parametrize("case", TRIPS, ids=lambda case: case.name)
def test_a_saga_of_the_reference_ends_as_it_should(case: Trip) -> None:
    """T-KW-2..5; the order across topics may vary."""
    module = durable.load_source("trip_booking", SOURCE.read_text(encoding="utf-8"), str(SOURCE))
    saga = WorkflowTester(module.main)
    saga.start("thread1", case.options)
    for ref, failed in case.answers:
        saga.resume("thread1", ref, None, **({"error": failed} if failed else {}))
    assert saga.values("workflow-result") == ([case.result] if case.result else [])
    assert saga.values("workflow-error") == ([case.error] if case.error else [])
    for kind in ("car", "hotel", "flight"):
        assert saga.outputs_to(f"saga-cancel-{kind}") == ([case.cancelled[kind]] if kind in case.cancelled else []), kind
    timers = [(output.key, output.value) for output in saga.outputs if output.topic == "workflow-scheduler"]
    assert timers == [(b'thread1|{"ref":"0:4"}', b"1000")] + [(b'thread1|{"ref":"0:4"}', b"0")] * (case.error != "timeout")
    assert saga.ids() == []
    late = len(saga.outputs)
    saga.resume("thread1", "0:1")
    assert (saga.counts[-1], len(saga.outputs)) == ("unknown-id", late + 1)
