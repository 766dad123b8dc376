"""Which calls of a queue may begin, after a worker has died (K19)."""

from kwflow.core.dispatch import Dispatch
from kwflow.runners.kafka.ledger import Ledger
from kwflow.runners.kafka.open_calls import AHEAD_MAX, OpenCalls


def call(n: int) -> Dispatch:
    return Dispatch(f"w{n}", f"{n}:1", "a", 1, f"{n}:1", b"{}")


def calls(position: int, note: str, numbers: range) -> OpenCalls:
    made = OpenCalls("q", 0, position, note, numbers.stop)
    for n in numbers:
        if made.ledger.take(n):
            made.open(call(n), n)
    return made


def begin(made: OpenCalls) -> list[Dispatch]:
    some = made.next()
    made.begin(some)
    return some


def names(begun: list[Dispatch]) -> list[str]:
    return [one.workflow_id for one in begun]


def test_all_begin_at_once_where_nobody_has_died() -> None:
    fresh = calls(0, "", range(100))
    assert not fresh.careful and len(begin(fresh)) == 100 and begin(fresh) == []
    assert "!" not in fresh.ledger.note()


def test_after_a_death_a_few_begin_at_a_time_and_each_is_marked_before() -> None:
    careful = calls(0, calls(0, "", range(40)).ledger.note(), range(40))
    first = names(begin(careful))
    assert careful.careful and first == [f"w{n}" for n in range(16)] and begin(careful) == []
    assert careful.ledger.note().count("!") == 16
    careful.close("w3", "3:1")
    assert names(begin(careful)) == ["w16"]
    for n in range(17):
        careful.close(f"w{n}", f"{n}:1")
    assert len(begin(careful)) == 16
    for n in range(17, 40):
        careful.close(f"w{n}", f"{n}:1")
    assert not careful.careful, "nothing that it may have been is left"
    for n in range(40, 100):
        careful.ledger.take(n)
        careful.open(call(n), n)
    assert len(begin(careful)) == 60


def test_what_ran_at_a_second_death_does_not_begin_and_all_else_does() -> None:
    first = calls(0, "", range(20))
    begin(first)
    second = calls(0, first.ledger.note(), range(20))
    begin(second)
    third = OpenCalls("q", 0, 0, second.ledger.note(), 20)
    assert [n for n in range(20) if third.ledger.take(n) and not third.open(call(n), n)] == list(range(16))
    assert names(begin(third)) == ["w16", "w17", "w18", "w19"]
    assert third.close("w3", "3:1") and not third.close("w3", "3:1")


def test_care_ends_behind_all_that_the_dead_worker_may_have_read() -> None:
    careful = calls(0, "kwflow1 1 0 +", range(AHEAD_MAX + 1))
    for n in range(AHEAD_MAX):
        begin(careful)
        careful.close(f"w{n}", f"{n}:1")
        assert careful.careful == (n + 1 < AHEAD_MAX)


def test_care_does_not_end_before_all_was_read_that_the_dead_worker_may_have_run() -> None:
    """K19: the first ones were taken back, or failed, and the one that kills was read after that. It used to kill a worker each time, forever."""
    careful = OpenCalls("q", 0, 0, "kwflow1 2 0!,1! +", 4)
    for n in range(2):
        assert careful.ledger.take(n) and not careful.open(call(n), n)
        assert careful.close(f"w{n}", f"{n}:1")
    for n in range(2, 4):
        assert careful.ledger.take(n) and careful.open(call(n), n)
    assert careful.careful and names(careful.next()) == ["w2", "w3"]
    assert careful.ledger.note().count("!") == 2 and not careful.begun.entries, "marked before"
    assert names(begin(careful)) == ["w2", "w3"] and len(careful.begun.entries) == 2


def test_a_call_that_came_after_a_death_is_not_blamed_for_it() -> None:
    """K19: it ran when one worker died, not when two did."""
    first = calls(0, "", range(3))
    begin(first)
    second = OpenCalls("q", 0, 0, first.ledger.note(), 3)
    for n in range(5):
        assert second.ledger.take(n) and second.open(call(n), n)
    assert len(begin(second)) == 5
    third = OpenCalls("q", 0, 0, second.ledger.note(), 5)
    assert [n for n in range(5) if third.ledger.take(n) and not third.open(call(n), n)] == [0, 1, 2]
    assert names(begin(third)) == ["w3", "w4"] and third.careful
    fourth = OpenCalls("q", 0, 0, third.ledger.note(), 5)
    assert [n for n in range(5) if fourth.ledger.take(n) and not fourth.open(call(n), n)] == [0, 1, 2, 3, 4], "they have seen two die by now"


def test_calls_of_activities_that_are_not_known_here_keep_no_other_waiting() -> None:
    """G3: not even after a death, when only a few begin at a time. The next owner of the partition may know them."""
    careful = OpenCalls("q", 0, 0, Ledger(0).note(), 40)
    for n in range(40):
        assert careful.ledger.take(n) and careful.open(call(n), n, known=n >= 20)
    assert names(begin(careful)) == [f"w{n}" for n in range(20, 36)] and careful.held_back
    assert len(careful.aside) == 20 and careful.ledger.position == 0
    assert careful.close("w3", "3:1") and len(careful.aside) == 19


def test_a_call_that_was_handed_out_twice_begins_once_and_both_records_are_done_with_its_answer() -> None:
    """An at-least-once engine (Faust) writes the call again after a crash."""
    twice = OpenCalls("q", 0, 5, "", 7)
    for offset in (5, 6):
        assert twice.ledger.take(offset) and twice.open(call(1), offset)
    assert names(begin(twice)) == ["w1"] and twice.bytes > 0
    assert twice.close("w1", "1:1") and twice.ledger.position == 7 and twice.bytes == 0


def test_an_answer_closes_what_was_read_before_it_and_what_is_made_again_may_begin() -> None:
    """A rewind makes a call again, under the same ref; it may be read before the worker learns that the log has its old answer."""
    made = calls(0, "", range(1))
    begin(made)
    for offset in (1, 2):
        made.ledger.take(offset)
        made.open(call(0), offset)
    assert begin(made) == [] and not made.close("w0", "0:1", 0), "the first one still runs"
    assert made.close("w0", "0:1", 1)
    assert names(begin(made)) == ["w0"] and made.ledger.position == 1
    assert not made.close("w0", "0:1", 1)
    assert made.close("w0", "0:1", 3)
    assert begin(made) == [] and made.ledger.position == 3 and not made.offsets


def test_a_call_of_an_unknown_activity_that_is_made_again_stays_aside() -> None:
    made = OpenCalls("q", 0, 0, "", 2)
    for offset in (0, 1):
        made.ledger.take(offset)
        made.open(call(0), offset, known=False)
    made.close("w0", "0:1", 1)
    assert begin(made) == [] and made.aside == {("w0", "0:1")} and made.ledger.position == 1
