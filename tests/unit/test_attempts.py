"""K19: which records are stepped together and which alone after deaths, and which record is refused."""

import pathlib
import random
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwflow.core.wire import Record
from kwflow.runners.attempts import Attempts, Suspects


def record(offset: int) -> Record:
    return Record("workflow-resume", 0, offset, 0, b"id", b"{}")


class Died(Exception):
    pass


class Log:
    """Records that kill the process that steps them, and processes that take them with care, one process after the other."""

    def __init__(self, directory: pathlib.Path, count: int, deadly: set[int]) -> None:
        self.directory = directory
        self.count = count
        self.deadly = deadly
        self.position = 0
        self.refused: list[int] = []
        self.stepped = 0  # the number of transactions
        self.alone: list[int] = []  # the record, for each process that died with one record alone
        self.noted: Suspects | None = None  # where other processes find it

    def process(self, dies_at: int | None = None) -> None:
        """Run one process to its end or its death. At the offset `dies_at`, it dies of something else."""
        attempts = Attempts(self.directory, lambda _, suspects: setattr(self, "noted", suspects))
        if self.noted is not None:
            attempts.learn(0, self.noted)
        while self.position < self.count:
            some, refused = attempts.another(0, [record(offset) for offset in range(self.position, self.count)])
            offsets = {one.offset for one in some}
            if offsets & ((self.deadly if refused is None else set()) | {dies_at}):
                self.alone += offsets if len(offsets) == 1 else ()
                raise Died
            self.refused += [self.position] if refused else []
            self.position += len(some)
            self.stepped += 1

    def processes(self, chance: random.Random | None = None, another_disk: bool = False) -> int:
        """Return how many processes died until all records were done."""
        deaths = 0
        while True:
            if another_disk:
                self.directory = pathlib.Path(tempfile.mkdtemp(dir=self.directory.parent))
            try:
                self.process(chance.choice([None, chance.randrange(self.count)]) if chance else None)
                return deaths
            except Died:
                deaths += 1


@pytest.mark.parametrize("another_disk", [False, True], ids=["same disk", "other disks"])
@pytest.mark.parametrize("deadly", [0, 63, 64, 149])
def test_a_record_that_kills_does_so_four_times_after_the_first(tmp_path: pathlib.Path, deadly: int, another_disk: bool) -> None:
    """Once together with others and three times alone. Every other record is stepped."""
    log = Log(tmp_path / "first", 150, {deadly})
    log.directory.mkdir()
    assert log.processes(another_disk=another_disk) == 4
    assert log.refused == [deadly]


def test_a_record_that_is_there_alone_kills_three_times_after_the_first(tmp_path: pathlib.Path) -> None:
    assert Log(tmp_path, 1, {0}).processes() == 3


@pytest.mark.parametrize(("count", "notes"), [(64, 1), (65, 2), (1000, 16)])
def test_a_healthy_takeover_notes_64_records_at_a_time(tmp_path: pathlib.Path, count: int, notes: int) -> None:
    """Each note is waited for, on the disk and at the broker."""
    log = Log(tmp_path, count, set())
    log.process()
    assert log.stepped == notes


@settings(max_examples=10)
@given(seed=st.integers(), deadly=st.sets(st.integers(0, 139), max_size=3), another_disk=st.booleans())
@pytest.mark.slow
def test_only_records_that_three_processes_died_of_alone_are_refused(seed: int, deadly: set[int], another_disk: bool) -> None:
    """Whatever else processes die of in between. And every record that does kill is refused."""
    with tempfile.TemporaryDirectory() as directory:
        log = Log(pathlib.Path(directory, "first"), 140, deadly)
        log.directory.mkdir()
        log.processes(random.Random(seed), another_disk)
        assert set(log.refused) >= deadly
        assert all(log.alone.count(offset) >= 3 for offset in log.refused)


def test_a_batch_that_is_made_again_is_no_second_attempt(tmp_path: pathlib.Path) -> None:
    """Deaths of processes are counted, not aborted transactions: four rebalances used to park an innocent record."""
    noted: list[Suspects | None] = []
    Attempts(tmp_path)
    attempts = Attempts(tmp_path, lambda _, suspects: noted.append(suspects))
    assert attempts.unclean
    for _ in range(10):
        assert attempts.another(0, [record(5)]) == ([record(5)], None)
        attempts.survived(0)
    assert noted == [Suspects(5, 1, 6), None] * 10
    for _ in range(3):
        assert Attempts(tmp_path).another(0, [record(5)])[1] is None
    assert Attempts(tmp_path).another(0, [record(5)])[1] == "the engine died three times with this record"


def test_what_a_survivor_takes_back_is_only_its_own(tmp_path: pathlib.Path) -> None:
    noted: list[Suspects | None] = []
    attempts = Attempts(tmp_path, lambda _, suspects: noted.append(suspects))
    attempts.learn(0, Suspects(5, 2, 9))
    for offset in (5, 6):
        assert attempts.another(0, [record(offset), record(offset + 1)])[0] == [record(offset)]
        attempts.survived(0)
    assert noted == [Suspects(5, 3, 9), Suspects(5, 2, 9), Suspects(6, 1, 9), Suspects(6, 0, 9)]
    assert attempts.suspected_until(0) == 9
    assert attempts.suspected_until(1) == -1


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_of_what_the_disk_knows_and_what_others_have_noted_the_worse_counts(tmp_path: pathlib.Path, counts: tuple[int, int]) -> None:
    noted: list[Suspects | None] = []
    attempts = Attempts(tmp_path, lambda _, suspects: noted.append(suspects))
    for count in counts:
        attempts.learn(0, Suspects(5, count, 9))
    attempts.another(0, [record(5)])
    assert noted == [Suspects(5, 3, 9)]


@pytest.mark.parametrize("content", [b"", b'{"0":[5,2]}', b"[]"])
def test_a_count_that_cannot_be_read_counts_nothing(tmp_path: pathlib.Path, content: bytes) -> None:
    Attempts(tmp_path)
    (tmp_path / "attempts").write_bytes(content)
    assert Attempts(tmp_path).suspected_until(0) == -1


def test_a_clean_stop_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    noted: list[Suspects | None] = []
    attempts = Attempts(tmp_path, lambda _, suspects: noted.append(suspects))
    attempts.another(0, [record(5)])
    attempts.interrupted()
    assert noted == [Suspects(5, 1, 6), None], "nor where others look"
    again = Attempts(tmp_path)
    assert not again.unclean
    assert not again.fresh
    assert again.another(0, [record(5)])[1] is None


def test_a_call_that_returns_while_its_process_is_ended_for_it_changes_nothing(tmp_path: pathlib.Path) -> None:
    """K19: the loop's thread survives its step while another thread takes the notes back; the process used to end with an error, which no supervisor restarts."""
    noted: list[int] = []

    def note(partition: int, suspects: object) -> None:
        if suspects is None and partition == 0 and 1 not in noted:
            attempts.survived(1)
        if suspects is None:
            noted.append(partition)

    attempts = Attempts(tmp_path, note)
    for partition in (0, 1, 2):
        attempts.another(partition, [record(5)])
    attempts.interrupted()
    assert set(noted) == {0, 1, 2}
