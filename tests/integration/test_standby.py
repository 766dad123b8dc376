"""A standby's copy is promoted by a takeover, and a copy that nobody needs is deleted (kafka.md §4, K5, K8)."""


import pytest

from tests.integration.lab import Lab, stop, turn

pytestmark = [pytest.mark.broker, pytest.mark.slow]


def test_a_takeover_begins_where_the_standbys_copy_ends(lab: Lab) -> None:
    lab.base["kafka"]["max.poll.interval.ms"] = 30_000  # these runners are turned one after the other: on a busy machine, one would lose its partition to the other
    owner = lab.engine("owner")
    for number in range(20):
        lab.send("resume", f"w{number}", "new:null")
    turn(owner, lambda: owner.owned and owner.owned[0].position == 20)
    other = lab.engine("other", standby=True)
    copy = None
    while copy is None:
        owner.turn()
        other.turn()
        copy = other.takeover.copies.standby.stores.get(0)
    stored = owner.owned[0].store.offset

    def followed() -> bool:
        owner.turn()
        return copy.offset >= stored

    turn(other, followed)
    assert copy.get(b"w19") == owner.owned[0].store.get(b"w19")
    lab.runners.remove(owner)
    stop(owner)
    lab.send("resume", "w19", '{"ref":"r","value":7}')
    begun: list[int] = []

    def taken_over() -> bool:
        begun.extend(restore.reached for restore, _ in other.takeover.restoring.values())
        return 0 in other.owned and other.owned[0].position == 21

    turn(other, taken_over)
    assert all(reached >= stored for reached in begun), "nothing was restored again"
    assert other.takeover.copies.standby.stores == {}
    assert lab.written("trap-out", "w19") == ["7"]


def test_a_copy_of_a_partition_that_has_left_is_deleted_after_a_while(lab: Lab) -> None:
    first = lab.engine("first", state_cleanup_s=0)
    lab.send("resume", "w", "new:null")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    copy = first.directory / "0"
    assert copy.exists()
    first.takeover._on_lost(first._consumer, first._consumer.assignment())  # as in a rebalance
    turn(first, lambda: not copy.exists())
