"""A disk that has damaged its data: the damage is never taken for the end of a database, and a store is rebuilt where a log makes that possible."""

import gc
import pathlib
import resource
from collections.abc import Callable

import pytest

from kwflow.errors import TransportError
from kwflow.runners import rocks
from kwflow.runners.attempts import Attempts
from kwflow.runners.clock import SystemClock
from kwflow.runners.embedded.state import EmbeddedStore, read_only
from kwflow.runners.kafka.environment import LIVE
from kwflow.runners.kafka.state import PartitionStore
from kwflow.runners.private import private

COUNT = 3000


def store(directory: pathlib.Path) -> PartitionStore:
    return PartitionStore(LIVE, directory, "incarnation", SystemClock(), 86_400_000)


def damage(directory: pathlib.Path) -> None:
    """Damage the second half of each table, but not its index."""
    for table in directory.glob("*.sst"):
        data = bytearray(table.read_bytes())
        for position in range(len(data) // 2, len(data) * 8 // 10, 7):
            data[position] ^= 0xFF
        table.write_bytes(data)


@pytest.fixture
def damaged(tmp_path: pathlib.Path) -> PartitionStore:
    directory = tmp_path / "partition"
    filled = store(directory)
    filled.settle({b"timer-%05d" % number: bytes([number % 251]) * 300 for number in range(COUNT)}, 7)
    filled._db._db.flush()  # type: ignore[attr-defined]
    filled.close()
    damage(directory)
    return store(directory)


def told(read: Callable[[PartitionStore], object], store: PartitionStore) -> tuple[str, bool]:
    """Return the error's text alone, because its traceback would hold the database open."""
    try:
        return f"it read {read(store)!r:.80}", False
    except TransportError as error:
        return str(error), error.retryable


def last(store: PartitionStore) -> object:
    return store.get(b"timer-%05d" % (COUNT * 6 // 10))


def whole(store: PartitionStore) -> object:
    return list(store.scan(b"timer-"))


def middle(store: PartitionStore) -> object:
    return next(store.scan(b"timer-", b"timer-%05d" % (COUNT * 6 // 10)), None)


@pytest.mark.parametrize("read", [last, whole, middle])
def test_a_damaged_copy_is_told_of_and_not_taken_for_its_end_and_the_next_start_makes_it_anew(damaged: PartitionStore, read: Callable[[PartitionStore], object]) -> None:
    """K8: one damaged store is wiped alone. The error is retryable: exit code 3, "start me again"."""
    assert damaged.offset == 7
    said, retryable = told(read, damaged)
    assert "partition cannot be used: Corruption" in said and said.endswith("; it is rebuilt at the next start") and retryable
    damaged.close()
    again = store(damaged.directory)
    assert (again.offset, whole(again)) == (0, []), "all of it is restored"
    again.settle({b"a": b"b"}, 1)
    again.close()
    assert store(damaged.directory).offset == 1


@pytest.mark.parametrize(("lacking", "room", "said"), [(resource.RLIMIT_NOFILE, 3, "raise the limit (ulimit -n)"), (resource.RLIMIT_FSIZE, 0, "File too large")])
def test_a_copy_that_cannot_be_opened_for_want_of_files_or_room_is_kept(tmp_path: pathlib.Path, lacking: int, room: int, said: str) -> None:
    """K8: it is not damaged, and a full disk could not hold a restored one."""
    filled = store(tmp_path / "partition")
    filled.settle({b"a": b"b"}, 7)
    filled.close()
    soft, hard = resource.getrlimit(lacking)
    resource.setrlimit(lacking, (room, hard))
    try:
        with pytest.raises(OSError) as refused:
            store(tmp_path / "partition")
    finally:
        resource.setrlimit(lacking, (soft, hard))
    assert said in str(refused.value)
    assert store(tmp_path / "partition").offset == 7


def test_what_is_whole_is_read_to_its_end(tmp_path: pathlib.Path) -> None:
    filled = store(tmp_path / "partition")
    assert whole(filled) == []
    filled.settle({b"timer-%05d" % number: b"x" for number in range(10)}, 7)
    assert [key for key, _ in filled.scan(b"timer-", b"timer-00008")] == [b"timer-00008", b"timer-00009"]
    assert list(filled.scan(b"timer-", b"timer-1")) == []


def test_an_embedded_database_that_is_damaged_is_told_of_too(tmp_path: pathlib.Path) -> None:
    """It is the only copy, so it is not rebuilt."""
    db = rocks.opened(tmp_path / "state", 1 << 24)
    for number in range(COUNT):
        db[b"Slog\0%05d" % number] = bytes([number % 251]) * 300
    db.flush()
    db.close()
    damage(tmp_path / "state")
    with pytest.raises(Exception, match="Corruption"):
        list(EmbeddedStore(read_only(tmp_path / "state"), "log").scan(b""))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_copy_that_was_moved_or_replaced_is_not_written_any_more_and_nothing_is_put_where_it_was(tmp_path: pathlib.Path, replaced: bool) -> None:
    """K8, K19: RocksDB creates files by name, also when it is closed. They would land among those of a successor that has begun there. Its counts of deaths are left alone, too."""
    directory, other = tmp_path / "engine" / "partition", tmp_path / "other" / "partition"
    another, _ = store(private(other.parent) / other.name), Attempts(other.parent)
    another.settle({b"a": b"another"}, 1)
    another.close()
    attempts, mine = Attempts(private(directory.parent)), store(directory)
    mine.settle({b"a": b"mine"}, 1)
    directory.parent.rename(tmp_path / "moved")
    if replaced:
        other.parent.rename(directory.parent)
    before = {path: path.stat().st_mtime_ns for path in directory.parent.rglob("*")}
    said, retryable = "", False
    try:
        mine.settle({b"b": b"lost"}, 2)
    except TransportError as error:
        said, retryable = str(error), error.retryable
    assert said == f"the copy in {directory} was removed, moved or replaced while this engine was running; the next start restores it from the changelog" and retryable
    mine.close()
    attempts.finished()
    del mine
    gc.collect()
    assert {path: path.stat().st_mtime_ns for path in directory.parent.rglob("*")} == before
    assert not replaced or Attempts(directory.parent).unclean
    assert store(tmp_path / "moved" / "partition").get(b"a") == b"mine"
