"""Which records of a partition are done, in whatever order, and what a group's note remembers of that."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwflow.runners.kafka.ledger import Ledger


def test_the_position_stays_before_the_first_record_that_is_open() -> None:
    ledger = Ledger(10)
    assert ledger.position == 10
    assert all(ledger.take(offset) for offset in (10, 11, 13))  # 12 is a transaction marker
    assert ledger.position == 10
    ledger.finish(11)
    assert ledger.position == 10
    ledger.finish(10)
    assert ledger.position == 13
    ledger.finish(13)
    assert ledger.position == 14


def test_marks_of_transactions_at_the_end_are_passed_when_it_is_reached() -> None:
    """K18: retention deletes the markers, and a position before them would look as if calls had been lost."""
    ledger = Ledger(10)
    ledger.take(10)
    ledger.pass_marks(12)
    assert ledger.position == 10
    ledger.finish(10)
    assert ledger.position == 12
    ledger.pass_marks(11)
    assert ledger.position == 12
    again = Ledger(12, ledger.note())
    assert again.take(12)


def test_what_is_done_behind_the_position_is_known_to_the_next_owner() -> None:
    """While one call takes an hour, others behind it are answered. Without the note, all of those would be done again after a crash."""
    ledger = Ledger(0)
    for offset in range(100):
        ledger.take(offset)
    for offset in range(1, 100):
        if offset != 50:
            ledger.finish(offset)
    again = Ledger(ledger.position, ledger.note())
    assert [offset for offset in range(103) if again.take(offset)] == [0, 50, 100, 101, 102]


def test_a_note_is_kept_for_the_owner_after_the_next_who_has_not_read_so_far() -> None:
    ledger = Ledger(0)
    for offset in range(10):
        ledger.take(offset)
    for offset in (1, 2, 7, 8, 9):
        ledger.finish(offset)
    second = Ledger(ledger.position, ledger.note())
    assert second.take(0) and not second.take(1)
    second.finish(0)
    third = Ledger(second.position, second.note())
    assert third.position == 2
    assert [offset for offset in range(2, 11) if third.take(offset)] == [3, 4, 5, 6, 10]


@pytest.mark.parametrize("note", ["", "x", "kwflow1 z 1 ", "kwflow2 5 1 ", "kwflow1 5", "kwflow1 5 1", "kwflow1 5 1,,x ", "kwflow1 5 ! ", "a b c d", "\x00", "kwflow1   "])
def test_a_note_that_is_not_ours_says_nothing(note: str) -> None:
    """This holds for any text: an operator, or another tool, may have written the note."""
    ledger = Ledger(5, note)
    assert all(ledger.take(offset) for offset in range(5, 20))


def test_a_note_that_would_be_too_long_tells_of_the_first_records() -> None:
    """offset.metadata.max.bytes is 4,096 by default. A longer note would be refused, and the position with it."""
    ledger = Ledger(10**12)
    for n in range(20_000):
        ledger.take(10**12 + n)
        if n % 3:
            ledger.finish(10**12 + n)
    note = ledger.note()
    assert 3_900 < len(note) <= 4_096
    again = Ledger(ledger.position, note)
    todo = [n for n in range(20_000) if again.take(10**12 + n)]
    assert set(range(0, 20_000, 3)) <= set(todo), "what is open is never passed over"
    assert len(todo) < 19_000


def test_who_finds_a_note_that_was_not_given_back_knows_that_its_writer_died_and_what_it_ran() -> None:
    """K19: marks are made only where it matters, so without a mark nothing is suspected."""
    first = Ledger(0)
    assert not first.died
    for offset in (0, 1, 2):
        first.take(offset)
    second = Ledger(0, first.note())
    assert second.died and not any(second.suspected(offset) for offset in (0, 1, 2))
    for offset in (0, 1, 2):
        second.take(offset)
    second.suspect(1)
    second.suspect(7)  # ignored: it is not open
    third = Ledger(0, second.note())
    assert third.died and [offset for offset in range(9) if third.suspected(offset)] == [1]
    for offset in (0, 1, 2):
        third.take(offset)
    assert Ledger(0, third.note()).suspected(1), "it was not begun, and is not done"
    fourth = Ledger(0, third.note(held=False))
    assert not fourth.died and not fourth.suspected(1)
    assert [offset for offset in range(4) if fourth.take(offset)] == [0, 1, 2, 3]


@given(st.integers(0, 2**31))
def test_nothing_open_is_lost_and_nothing_noted_is_done_again_whatever_happens(seed: int) -> None:
    """Owners come and go at any moment, and the offsets have gaps."""
    chance = random.Random(seed)
    offsets = sorted(chance.sample(range(200), 60))
    done: set[int] = set()
    position, note = 0, ""
    for _ in range(6):
        ledger, mine = Ledger(position, note), []
        noted_before = {offset for offset in offsets if offset < position} | {offset for offset in offsets if offset >= position and offset in done and offset not in _todo(position, note, offsets)}
        for offset in [offset for offset in offsets if offset >= position][: chance.randrange(60)]:
            if ledger.take(offset):
                assert offset not in noted_before
                mine.append(offset)
            else:
                assert offset in done
        for offset in chance.sample(mine, chance.randint(0, len(mine))):
            ledger.finish(offset)
            done.add(offset)
        position, note = ledger.position, ledger.note()
        assert all(offset in done for offset in offsets if offset < position)
        assert set(_todo(position, note, offsets)) >= {offset for offset in offsets if offset not in done}


def _todo(position: int, note: str, offsets: list[int]) -> list[int]:
    ledger = Ledger(position, note)
    return [offset for offset in offsets if offset >= position and ledger.take(offset)]


def test_a_record_before_what_was_read_is_of_another_log() -> None:
    """A topic that was deleted and created again begins at 0. What is known of its former offsets would skip calls."""
    ledger = Ledger(20, "kwflow1 5 0,3 +")
    assert ledger.behind(0) and ledger.behind(19) and not ledger.behind(20)
    ledger.take(20)
    assert ledger.behind(20) and not ledger.behind(21)
