"""Warm copies of partitions that other engines own, and the end of copies that nobody needs (kafka.md §4, K8). The stores are real; the clock and the broker are the test's."""

import pathlib
from collections.abc import Iterable
from typing import Any

import pytest
from confluent_kafka import KafkaError, TopicPartition

from kwflow.config import Config
from kwflow.runners.clock import SystemClock
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.standby import Cleanup, Copies, Standby
from kwflow.runners.kafka.state import PartitionStore
from tests.spec.test_edges import Later


class Message:
    """A message of the changelog, or an error of its reader."""

    def __init__(self, partition: int, offset: int, key: bytes = b"", value: bytes | None = None, error: int | None = None) -> None:
        self.partition, self.offset, self.key, self.value = lambda: partition, lambda: offset, lambda: key, lambda: value
        self.error = lambda: None if error is None else KafkaError(error)


class Reader:
    """A consumer that returns the messages it was given."""

    def __init__(self) -> None:
        self.assigned: dict[int, int] = {}
        self.messages: list[Message] = []

    def incremental_assign(self, places: list[TopicPartition]) -> None:
        self.assigned |= {place.partition: place.offset for place in places}

    def incremental_unassign(self, places: list[TopicPartition]) -> None:
        for place in places:
            del self.assigned[place.partition]

    def consume(self, _most: int, _seconds: float) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages


class Office:
    def __init__(self, directory: pathlib.Path, delay_s: float = 600, partitions: int = 3) -> None:
        self.environment, self.directory, self.reader, self.said = Later(1 << 20), directory, Reader(), list[str]()
        self.asked: list[list[int]] = []
        self.standby = Standby("changelog", lambda: self.reader, self.store, self.starts, Encryption(Config()))  # type: ignore[arg-type,return-value]
        self.cleanup = Cleanup(self.environment, directory, delay_s)
        self.copies = Copies(self.standby, partitions, self.cleanup, self.said.append)

    def store(self, number: int) -> Any:
        return PartitionStore(self.environment, self.directory / str(number), "topic", SystemClock(), 10**9)

    def starts(self, numbers: Iterable[int]) -> dict[int, int]:
        self.asked.append([*numbers])
        return dict.fromkeys(self.asked[-1], 5)

    def turn(self, mine: set[int], *messages: Message) -> None:
        self.environment.now += 2
        self.reader.messages = list(messages)
        self.copies.turn(mine)


def test_copies_are_given_without_a_question_about_the_others_and_taken_a_few_at_a_time(tmp_path: pathlib.Path) -> None:
    """K5: of a hundred copies, each one given away used to cost a query about each one that was left, and all of them used to be opened in one turn."""
    office, ends = Office(tmp_path, partitions=10), Message(9, 7, b"w", b"1")
    for followed in (3, 6, 9, 10, 10):
        office.turn(set())
        assert set(office.reader.assigned) == set(office.standby.stores) == set(range(followed))
    assert office.asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    office.turn(set(), ends)
    for number in range(8):
        office.copies.give(number)
    office.turn(set(range(8)))
    assert set(office.reader.assigned) == set(office.standby.stores) == {8, 9} and len(office.asked) == 4
    office.turn(set(range(7)))
    assert office.reader.assigned == {7: 5, 8: 5, 9: 5} and office.standby.stores[9].offset == 8, "what is followed goes on where it was"
    assert office.asked[4:] == [[7]]


@pytest.fixture
def office(tmp_path: pathlib.Path) -> Office:
    return Office(tmp_path)


def test_a_copy_whose_place_in_the_log_is_gone_begins_anew(office: Office) -> None:
    """What was read for it before, in the same turn, is of no use either."""
    office.turn({0, 2}, Message(1, 8, b"w", b"old"))
    office.turn({0, 2}, Message(1, 9, b"v", b"older"), Message(1, 9, error=KafkaError._AUTO_OFFSET_RESET))
    assert 1 not in office.standby.stores
    office.turn({0, 2})
    assert office.reader.assigned == {1: 5}
    assert (office.standby.stores[1].get(b"w"), office.standby.stores[1].get(b"v"), office.standby.stores[1].offset) == (None, None, 0)


def test_a_warm_copy_has_not_come_past_what_it_has_no_key_for(office: Office) -> None:
    """0060: an engine that takes it over reads on from there, and has a key or ends with an error. A later value that can be decrypted is just as good."""
    lacking = b"\0KWE\1" + b"key " + bytes(44)
    office.turn({0, 2}, Message(1, 8, b"v", b"1"))
    office.turn({0, 2}, Message(1, 9, b"w", lacking), Message(1, 10, b"x", b"1"))
    copy = office.standby.stores[1]
    assert (copy.offset, copy.get(b"v"), copy.get(b"w"), copy.get(b"x")) == (9, b"1", None, b"1")
    office.turn({0, 2}, Message(1, 11, b"y", b"1"))
    assert copy.offset == 9
    office.turn({0, 2}, Message(1, 12, b"w", b"2"))
    assert (copy.offset, copy.get(b"w")) == (13, b"2")


def test_copies_that_will_be_followed_are_not_deleted_before_they_are_opened(tmp_path: pathlib.Path) -> None:
    """A few are opened in each turn. `state_cleanup_s = 0` used to delete all others, so that an engine that was started again had none of its warm copies."""
    office = Office(tmp_path, delay_s=0, partitions=10)
    for number in range(11):
        (tmp_path / str(number)).mkdir()
    office.turn({0})
    assert {int(path.name) for path in tmp_path.iterdir()} == set(range(10)), "the last one is of a partition that is no more"


def test_only_a_copy_that_nobody_has_needed_for_all_the_time_is_deleted(tmp_path: pathlib.Path) -> None:
    """A copy is kept if its partition runs here, if it is warm, or if it was needed again in between."""
    office = Office(tmp_path, delay_s=600)
    office.turn({0})
    (tmp_path / "7").mkdir()  # of a partition that no longer exists
    (tmp_path / "attempts").touch()
    for number in (0, 7):
        (tmp_path / str(number)).mkdir(exist_ok=True)
    now = office.environment.now
    assert office.cleanup.look({0, 1, 2}) == []
    for seconds, used, gone in ((500, {0, 1, 2}, []), (550, {0, 1, 2, 7}, []), (1000, {0, 1, 2}, []), (1599, {0, 1, 2}, []), (1601, {0, 1, 2}, ["7"])):
        office.environment.now = now + seconds
        assert [path.name for path in office.cleanup.look(used)] == gone, seconds
    for _ in range(2):
        office.environment.now += 10_000
        office.turn({0})
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "attempts"} and office.said == []
    office.copies.standby = None
    office.standby.stores.clear()
    office.turn({0})
    office.environment.now += 600
    office.turn({0})
    assert sorted(office.said) == [f"deleted {tmp_path / str(number)}, a copy not needed for 600 s" for number in (1, 2)]
