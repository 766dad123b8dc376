"""Calls that are lent to workers which fetch them (spec ET-3..ET-21), on a clock of the test's own."""

import pytest

from kwflow.core.dispatch import Dispatch, Withdraw
from kwflow.runners.activities.lent import Lent
from kwflow.testing import MemoryStore

LOCK_S = 10.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Case:
    def __init__(self) -> None:
        self.clock = Clock()
        self.lent = Lent(self.clock)
        self.lent.own(0, MemoryStore())

    def add(self, *names: str, partition: int = 0) -> None:
        self.lent.committed(partition, [Dispatch(name, "1:1", "a", 1, "1:1", b"{}") for name in names])

    def fetch(self, most: int = 10, worker: str = "aWorkerId") -> list[str]:
        return [call.workflow_id for call in self.lent.fetch(most, worker, LOCK_S)]

    def pass_s(self, seconds: float) -> None:
        self.clock.now += seconds
        self.lent.turn()


@pytest.fixture
def case() -> Case:
    return Case()


def test_calls_are_fetched_oldest_first_and_each_by_one_worker(case: Case) -> None:
    """ET-3, ET-4, ET-6, ET-7: nor does the same worker get it again."""
    case.add("a", "b", "c")
    assert case.fetch(2) == ["a", "b"]
    assert case.fetch(worker="another") == ["c"]
    assert case.fetch() == [] and case.lent.counts() == {"free": 0, "locked": 3}


def test_the_headers_of_a_call_are_known_until_it_is_done(case: Case) -> None:
    """Semantics §9.3: the answer carries them on."""
    case.lent.committed(0, [Dispatch("a", "1:1", "a", 1, "1:1", b"{}", (("tenant", b"north"),))])
    assert case.lent.headers("a", "1:1") == (("tenant", b"north"),) and case.lent.headers("b", "1:1") == ()
    case.lent.closing("a", "1:1")()
    assert case.lent.headers("a", "1:1") == ()


def test_a_lock_that_is_over_is_somebody_elses_to_take_and_its_worker_may_answer_until_then(case: Case) -> None:
    """ET-6, ET-10, ET-11, ET-17."""
    case.add("a")
    case.fetch()
    case.pass_s(LOCK_S - 0.1)
    assert case.fetch(worker="another") == []
    case.pass_s(0.1)
    assert case.lent.holder("a", "1:1") == "aWorkerId"
    assert case.fetch(worker="another") == ["a"]
    assert case.lent.holder("a", "1:1") == "another"


def test_a_lock_is_extended_from_now_on_by_who_has_it_and_not_when_it_is_over(case: Case) -> None:
    """ET-18: the extension is not added to the time that is left."""
    case.add("a")
    case.fetch()
    case.pass_s(9)
    assert not case.lent.extend("a", "1:1", "another", LOCK_S)
    assert case.lent.extend("a", "1:1", "aWorkerId", LOCK_S)
    case.pass_s(9)
    assert case.fetch() == []
    case.pass_s(1)
    assert not case.lent.extend("a", "1:1", "aWorkerId", LOCK_S)
    assert not case.lent.extend("b", "1:1", "aWorkerId", LOCK_S), "nothing is known of it"
    assert case.fetch() == ["a"]


def test_a_lock_is_kept_for_an_answer_that_is_on_its_way_and_never_made_shorter(case: Case) -> None:
    """ET-17."""
    case.add("a")
    case.fetch()
    assert case.lent.keep("a", "1:1", "aWorkerId", 5) and case.lent.keep("a", "1:1", "aWorkerId", 15)
    assert not case.lent.keep("a", "1:1", "another", 60) and not case.lent.keep("b", "1:1", "aWorkerId", 60)
    case.pass_s(14.9)
    assert case.fetch(worker="another") == []
    case.pass_s(0.1)
    assert case.lent.keep("a", "1:1", "aWorkerId", 5), "nobody has it yet"
    assert case.fetch(worker="another") == []
    case.pass_s(5)
    assert case.fetch(worker="another") == ["a"]
    assert not case.lent.keep("a", "1:1", "aWorkerId", 60)


def test_what_is_released_is_free_at_once(case: Case) -> None:
    """ET-19."""
    case.add("a")
    case.fetch()
    case.lent.release("a", "1:1")
    case.lent.release("b", "1:1")
    assert case.lent.holder("a", "1:1") is None and case.fetch(worker="another") == ["a"]


def test_what_was_answered_or_taken_back_is_gone(case: Case) -> None:
    """ET-21."""
    case.add("a", "b", "c")
    case.fetch(1)
    case.lent.closing("a", "1:1")()
    case.lent.committed(0, [Withdraw("b", "1:1")])
    case.pass_s(LOCK_S + 1)
    assert case.fetch() == ["c"] and case.lent.holder("a", "1:1") is None


def test_an_answer_to_a_call_does_not_remove_the_one_that_is_made_again_meanwhile(case: Case) -> None:
    """A rewind makes a call again under the same ref."""
    case.add("a")
    case.fetch()
    closes = [case.lent.closing("a", "1:1") for _ in range(2)]
    closes[0]()
    case.add("a")
    closes[1]()
    assert case.fetch() == ["a"]


def test_a_partition_that_leaves_takes_its_calls_along_and_what_comes_late_of_it_is_not_taken(case: Case) -> None:
    case.lent.own(1, MemoryStore())
    case.add("a")
    case.add("b", partition=1)
    assert case.lent.owns(1)
    case.lent.disown(1)
    case.add("c", partition=1)
    assert case.fetch() == ["a"]
    case.lent.close()
    assert case.lent.counts() == {"free": 0, "locked": 0} and not case.lent.owns(0)


def test_who_waits_is_told_when_there_is_something(case: Case) -> None:
    """ET-23: when a call is created or released, and when a lock expires."""
    first = case.lent.arrival()
    assert not first.done()
    case.add("a")
    assert first.done() and case.lent.arrival().done(), "it is there already"
    case.fetch()
    second, cancelled = case.lent.arrival(), case.lent.arrival()
    cancelled.cancel()
    case.lent.release("a", "1:1")
    assert second.done()
    case.fetch()
    third = case.lent.arrival()
    case.pass_s(LOCK_S)
    assert third.done()
