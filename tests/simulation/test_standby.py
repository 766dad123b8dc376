"""A copy that follows another engine's partition, and the end of a copy that nobody needs (kafka.md §4, K5, K8)."""

import pathlib

import pytest

from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.runners.kafka.standby import Cleanup, Standby
from kwflow.runners.kafka.state import PartitionStore
from tests.simulation.test_found import Lab, turn

CHANGELOG = "found-state-changelog"
DAY_MS = 86_400_000


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


def standby(runner: KafkaRunner) -> Standby:
    found = runner.takeover.copies.standby
    assert found is not None
    return found


def content(store: PartitionStore) -> list[tuple[bytes, bytes]]:
    return list(store.scan(b""))


def test_a_copy_follows_is_promoted_and_goes_on_as_a_copy_once_its_partition_has_left_again(lab: Lab) -> None:
    """K5: a takeover reads only what came after the copy's last turn."""
    owner, other = lab.engine("owner"), lab.engine("other", standby=True)
    turn(owner, lambda: owner.owned)
    turn(other, lambda: owner.turn() or standby(other).stores)
    for number in range(5):
        lab.send("workflow-resume", f"w{number}", "new:{}")
    turn(owner, lambda: owner.owned[0].position == 5)
    turn(other, lambda: owner.turn() or standby(other).stores[0].get(b"w4"))
    assert content(standby(other).stores[0]) == content(owner.owned[0].store)
    copied = standby(other).stores[0].offset
    assert copied == owner.owned[0].store.offset
    lab.send("workflow-resume", "w4", '{"ref": "r", "value": 1}')
    turn(owner, lambda: owner.owned[0].position == 6)
    expected = content(owner.owned[0].store)
    lab.kill(owner, "owner")
    begun: list[int] = []
    lab.hosts["other"].before["database-wipe"] = lambda: pytest.fail("it was open twice, which is taken for damage")
    turn(other, lambda: begun.extend(restore.reached for restore, _ in other.takeover.restoring.values()) or other.owned, 3000)
    assert content(other.owned[0].store) == expected
    assert standby(other).stores == {} and all(reached >= copied for reached in begun), "nothing was restored again"
    other.takeover._on_lost(other._consumer, other._consumer.assignment())  # as a rebalance does
    other.turn()
    assert list(standby(other).stores) == [0]
    other.run(lambda: True)
    assert not any(database.held for database in lab.disks["other"].databases.values())


def test_a_copy_that_cannot_follow_from_where_it_is_begins_again_from_nothing(lab: Lab) -> None:
    """K8: its changelog has lost its end, through an election or a backup."""
    owner, other = lab.engine("owner"), lab.engine("other", standby=True)
    lab.send("workflow-resume", "w", "new:{}")
    turn(owner, lambda: owner.owned and owner.owned[0].position == 1)
    stale = other.takeover._store(0)
    stale.settle({b"stale": b"1"}, 1_000)
    stale.close()
    turn(other, lambda: owner.turn() or (0 in standby(other).stores and standby(other).stores[0].get(b"w")))
    assert content(standby(other).stores[0]) == content(owner.owned[0].store)


def test_a_copy_begins_where_its_changelog_does(lab: Lab) -> None:
    lab.broker.append((CHANGELOG, 0), [(0, b"w%d" % number, b"1", []) for number in range(4)], None)
    lab.broker.partition((CHANGELOG, 0)).delete_before(2)
    other = lab.engine("other", standby=True)
    copies = standby(other)
    copies.follow({0})
    assert copies._consumer is not None
    copies.turn()
    assert [key for key, _ in content(copies.stores[0])] == [b"w2", b"w3"]


def test_a_copy_that_lacks_what_its_changelog_has_lost_begins_again_from_nothing(lab: Lab) -> None:
    """K5: one of the records that it has not seen said that the instance had ended."""
    copies = standby(lab.engine("other", standby=True))
    lab.broker.append((CHANGELOG, 0), [(0, b"ended", b"1", [])], None)
    copies.follow({0})
    copies.turn()
    copies.give(0)
    lab.broker.append((CHANGELOG, 0), [(0, b"ended", None, []), (0, b"w", b"1", [])], None)
    lab.broker.partition((CHANGELOG, 0)).delete_before(2)
    copies.follow({0})
    copies.turn()
    assert content(copies.stores[0]) == [(b"w", b"1")]


@pytest.mark.parametrize("ahead_ms", [DAY_MS - 1, DAY_MS + 1])
def test_a_copy_whose_engine_stood_still_for_half_the_tombstones_retention_begins_again_from_nothing(lab: Lab, ahead_ms: int) -> None:
    """K8: compaction may have removed meanwhile the record that an instance had ended. A copy that has nothing to read for as long is kept."""
    lab.broker.topics[CHANGELOG].config["delete.retention.ms"] = str(2 * DAY_MS)
    copies = standby(lab.engine("other", standby=True))
    lab.broker.append((CHANGELOG, 0), [(0, b"ended", b"1", [])], None)
    for _ in range(4):
        copies.follow({0})
        copies.turn()
        lab.broker.time.advance(lab.broker.time.now + DAY_MS / 2)
    assert content(copies.stores[0]) == [(b"ended", b"1")]
    lab.broker.append((CHANGELOG, 0), [(0, b"ended", None, []), (0, b"w", b"1", [])], None)
    changelog = lab.broker.partition((CHANGELOG, 0))
    changelog.entries = [entry for entry in changelog.entries if entry.key != b"ended"]
    lab.broker.time.advance(lab.broker.time.now + ahead_ms - DAY_MS / 2)
    copies.turn()
    copies.follow({0})
    copies.turn()
    assert (copies.stores[0].get(b"ended"), copies.stores[0].get(b"w")) == (None if ahead_ms > DAY_MS else b"1", b"1")


def test_a_copy_is_deleted_once_nobody_has_needed_it_for_long_enough(lab: Lab, tmp_path: pathlib.Path) -> None:
    place = tmp_path / "copies"
    for name in ("0", "1", "2", "instance-id"):
        (place / name).mkdir(parents=True)
    lab.broker.time.advance(60_000)
    cleanup = Cleanup(lab.client, place, 10)

    def after(seconds: float, *used: int) -> list[str]:
        lab.broker.time.advance(lab.broker.time.now + 1000 * seconds)
        return [path.name for path in cleanup.look(set(used))]

    assert after(0, 0, 1) == []
    assert after(8.9, 0, 1) == []
    assert after(1, 0) == []
    assert after(0.2, 0) == [], "looked at once a second"
    assert after(0.9, 0) == ["2"]
    (place / "2").rmdir()
    assert after(5, 0, 1) == [], "it came back"
    assert after(9, 0) == []
    assert after(9, 0) == []
    assert after(1, 0) == ["1"]


def test_copies_of_other_engines_partitions_are_needed(lab: Lab) -> None:
    """A standby's store is open. If it were deleted meanwhile, a takeover would find nothing."""
    owner, other = lab.engine("owner"), lab.engine("other", standby=True, state_cleanup_s=1)
    turn(owner, lambda: owner.owned)
    turn(other, lambda: owner.turn() or standby(other).stores)
    (other.directory / "0").mkdir()
    until = lab.broker.time.now + 5_000
    turn(other, lambda: owner.turn() or lab.broker.time.now > until)
    assert not any("deleted" in line for line in lab.said)


@pytest.mark.parametrize("follows", [False, True])
def test_what_is_about_to_be_owned_is_neither_followed_nor_deleted(lab: Lab, follows: bool) -> None:
    """K5, K8: from before the group has assigned the partitions until the partition is owned."""
    lab.broker.append((CHANGELOG, 0), [(0, b"w%d" % number, b"1", []) for number in range(2_000)], None)
    engine = lab.engine("one", standby=follows, state_cleanup_s=0)
    (engine.directory / "0").mkdir()
    lab.hosts["one"].losing["committed"] = 3
    followed: list[int] = []
    turn(engine, lambda: followed.extend(standby(engine).stores if follows else []) or engine.owned)
    assert followed == [] and not any("deleted" in line for line in lab.said)
