"""The local copy of a partition, and where its input goes on: what is kept, what is rebuilt, and what ends the engine (K5, K8, K16)."""

import json
import pathlib
import types
from collections.abc import Sequence

import pytest
from confluent_kafka import OFFSET_INVALID, KafkaError

from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.errors import TransportError
from kwflow.runners.kafka.encryption import Encryption
from kwflow.runners.kafka.state import MOVED, PartitionStore, Position, Restore, agreed, position_of
from kwflow.runners.moved import moves_in
from kwflow.testing.kafka import Disk, Refused, SimulatedEnvironment
from kwflow.testing.kafka.log import Partition, Place
from tests.simulation.test_found import Lab, turn

CHANGELOG = "found-state-changelog"
AGE_MS = 1_000
DAY_MS = 86_400_000


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


def opened(lab: Lab, incarnation: str = "topic") -> PartitionStore:
    environment = SimulatedEnvironment(lab.broker, disk=lab.disks.setdefault("store", Disk()))
    return PartitionStore(environment, lab.directory / "0", incarnation, environment.host, AGE_MS)


def held(store: PartitionStore) -> tuple[bytes | None, int]:
    """Return the value of one key and the offset up to which the store was written, and close it."""
    found = store.get(b"w"), store.offset
    store.close()
    return found


def test_a_copy_is_made_anew_once_its_tombstones_may_be_compacted_away_or_its_topic_is_another(lab: Lab) -> None:
    """K8."""
    store = opened(lab)
    store.settle({b"w": b"1"}, 5)
    store.close()
    lab.broker.time.advance(lab.broker.time.now + AGE_MS - 1)
    store = opened(lab)
    store.settle({}, None)
    assert held(store) == (b"1", 5), "what is written on is as old as its last write"
    lab.broker.time.advance(lab.broker.time.now + AGE_MS - 1)
    assert held(opened(lab)) == (b"1", 5)
    lab.broker.time.advance(lab.broker.time.now + 2)
    assert held(opened(lab)) == (None, 0)
    store = opened(lab)
    store.settle({b"w": b"2"}, 7)
    store.close()
    assert held(opened(lab)) == (b"2", 7)
    assert held(opened(lab, "another")) == (None, 0)


def test_a_copy_of_a_clock_that_was_far_ahead_is_made_anew(lab: Lab) -> None:
    """K8: nobody knows how old it is. It would have passed for a new one for as long as that clock was ahead."""
    store = opened(lab)
    store.settle({b"w": b"1"}, 5)
    store.close()
    written_ms = store.clock.now_ms()
    for ahead_ms, found in ((AGE_MS, (b"1", 5)), (AGE_MS + 1, (None, 0))):
        clock = types.SimpleNamespace(now_ms=lambda now_ms=written_ms - ahead_ms: now_ms)
        environment = SimulatedEnvironment(lab.broker, disk=lab.disks["store"])
        assert held(PartitionStore(environment, lab.directory / "0", "topic", clock, AGE_MS)) == found


def test_who_reads_from_another_thread_is_told_nothing_once_the_copy_is_closed(lab: Lab) -> None:
    store = opened(lab)
    store.settle({b"a": b"1", b"b": b"2"}, 2)
    assert store.page(b"", 1) == [(b"a", b"1")] and store.page(b"b", 9) == [(b"b", b"2")]
    store.close()
    assert store.page(b"", 1) is None


def test_a_copy_that_was_away_for_half_the_tombstones_retention_brings_nothing_back(lab: Lab) -> None:
    """K8: by the retention that the engine reads from the changelog's settings."""
    lab.broker.topics[CHANGELOG].config["delete.retention.ms"] = str(2 * DAY_MS)
    lab.send("workflow-resume", "w", "new:{}")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    assert first.owned[0].store.get(b"w")
    lab.kill(first, "one")
    second = lab.engine("two")
    lab.send("workflow-resume", "w", "null", **{"kwflow-op": "terminate"})
    turn(second, lambda: second.owned and second.owned[0].position == 2, 2000)
    second.run(lambda: True)
    changelog = lab.broker.partition((CHANGELOG, 0))
    changelog.entries = [entry for entry in changelog.entries if entry.control or entry.value is not None and entry.key != b"w"]
    lab.broker.time.advance(lab.broker.time.now + DAY_MS * 1.5)
    first = lab.engine("one")
    turn(first, lambda: first.owned)
    assert first.owned[0].store.get(b"w") is None


def test_a_copy_whose_engine_stood_still_in_a_commit_is_as_old_as_that_commit(lab: Lab) -> None:
    """K8: another engine has its partition by then, and what that engine has removed is no longer in the changelog."""
    lab.broker.topics[CHANGELOG].config["delete.retention.ms"] = str(2 * DAY_MS)
    engine, host = lab.engine("one"), lab.hosts["one"]
    turn(engine, lambda: engine.owned)
    stores = []

    def asked_again() -> None:
        stores.append(engine.owned[0].store)
        lab.broker.time.advance(lab.broker.time.now + 1.5 * DAY_MS)

    host.losing["commit"] = 1
    host.before["commit"] = lambda: host.before.update(commit=asked_again)
    lab.send("workflow-resume", "w", "new:{}")
    turn(engine, lambda: stores)
    assert stores[0].get(b"w"), "the commit had succeeded"
    stores[0].close()
    assert engine.takeover._store(0).get(b"w") is None


def restored(lab: Lab, store: PartitionStore, gone: int = 0, slices: int = 100, keys: Sequence[str] = ()) -> int:
    """Restore up to the present end of the log, whose first records are `gone` after the first slice. Return how many slices that took."""
    partition = lab.broker.partition((CHANGELOG, 0))
    settings = {"group.id": "r", "isolation.level": "read_committed", "auto.offset.reset": "error", "enable.partition.eof": True}
    restore = Restore(store, lambda: store.environment.consumer(settings), CHANGELOG, 0, partition.start, partition.end, Encryption(Config(encryption_keys=list(keys))))
    for number in range(1, slices):
        if restore.slice(0.05):
            return number
        partition.delete_before(gone)
    raise AssertionError(f"it stands at {restore.reached} of {restore.end}")


def test_a_copy_notes_how_far_it_is_with_each_commit(lab: Lab) -> None:
    """K8: the next owner of this directory reads on from there, where there is only the marker of the last transaction."""
    changelog = lab.broker.partition((CHANGELOG, 0))
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned)
    for number in range(3):
        lab.send("workflow-resume", f"w{number}", "new:{}")
        turn(engine, lambda number=number: engine.owned[0].position == number + 1)  # type: ignore[misc]
        lab.broker.time.advance(lab.broker.time.now + 100)
        assert engine.owned[0].store.offset == changelog.end - 1


def written(lab: Lab, count: int) -> None:
    lab.broker.append((CHANGELOG, 0), [(0, b"w%03d" % number, b"1", []) for number in range(count)], None)


def test_a_copy_ahead_of_its_changelog_is_made_anew_and_one_at_its_end_is_not_read_for(lab: Lab) -> None:
    """K8: a changelog that has lost its end, through an election or a backup, is the truth nevertheless."""
    written(lab, 3)
    store = opened(lab)
    store.settle({b"stale": b"1"}, 4)
    restored(lab, store)
    assert [key for key, _ in store.scan(b"")] == [b"w000", b"w001", b"w002"] and store.offset == 3
    store.settle({b"mine": b"1"}, 3)
    restored(lab, store)
    assert store.get(b"mine") == b"1"


def test_a_restore_whose_next_record_has_gone_begins_again_from_nothing(lab: Lab) -> None:
    """K5, K8."""
    written(lab, 300)
    store = opened(lab)
    assert restored(lab, store, gone=250) > 1
    assert [key for key, _ in store.scan(b"")] == [b"w%03d" % number for number in range(250, 300)] and store.offset == 300


def test_a_copy_that_lacks_what_its_changelog_has_lost_is_made_anew(lab: Lab) -> None:
    """K5: one of the records that it has not seen may have said that an instance had ended."""
    store = opened(lab)
    store.settle({b"ended": b"1"}, 1)
    written(lab, 4)
    lab.broker.partition((CHANGELOG, 0)).delete_before(1)
    restored(lab, store)
    assert store.get(b"ended") == b"1", "it lacks nothing"
    store.settle({}, 1)
    lab.broker.partition((CHANGELOG, 0)).delete_before(2)
    restored(lab, store)
    assert [key for key, _ in store.scan(b"")] == [b"w002", b"w003"]


ONE, TWO = "1" * 64, "2" * 64


def encrypted(lab: Lab, key: str, *entries: tuple[bytes, bytes | None]) -> None:
    """Write entries to the changelog as an engine does whose first key is this one."""
    encryption = Encryption(Config(encryption_keys=[key]))
    lab.broker.append((CHANGELOG, 0), [(0, name, encryption.encrypt("workflow-engine-state-changelog", value)[0], []) for name, value in entries], None)


def test_what_was_encrypted_with_a_former_key_is_passed_where_a_later_value_can_be_opened(lab: Lab) -> None:
    """0060: after `kwflow topics reencrypt`, the log holds the old values until it is compacted. A copy only needs the last value of each key."""
    encrypted(lab, ONE, (b"a", b"1"), (b"b", b"1"), (b"gone", b"1"))
    encrypted(lab, TWO, *((b"%03d" % number, b"x") for number in range(200)), (b"a", b"2"), (b"b", b"2"), (b"gone", None))
    store = opened(lab)
    assert restored(lab, store, keys=[TWO]) > 1
    assert (store.get(b"a"), store.get(b"b"), store.get(b"gone"), store.get(b"199"), store.offset) == (b"2", b"2", None, b"x", 206)


def test_a_copy_whose_key_is_missing_is_no_copy_until_it_is_there(lab: Lab) -> None:
    """0060: it must not count as read to the end without the values that could not be decrypted, because the key may come later."""
    encrypted(lab, TWO, (b"first", b"1"))
    encrypted(lab, ONE, (b"a", b"1"))
    encrypted(lab, TWO, *((b"%03d" % number, b"x") for number in range(200)))
    store = opened(lab)
    for _ in range(2):
        with pytest.raises(TransportError, match="which is not in encryption_keys"):
            restored(lab, store, keys=[TWO])
        assert store.offset == 0 and store.get(b"a") is None
        store.close()
        store = opened(lab)
    restored(lab, store, keys=[TWO, ONE])
    assert store.get(b"a") == b"1" and store.get(b"first") == b"1" and store.offset == 202


def test_a_damaged_entry_is_one_entry(lab: Lab) -> None:
    """The key is there, so there is nothing to wait for. Whoever needs the entry finds it damaged."""
    encrypted(lab, ONE, (b"a", b"1"), (b"b", b"1"))
    changelog = lab.broker.partition((CHANGELOG, 0))
    changelog.entries[0].value = (changelog.entries[0].value or b"")[:-1]
    store = opened(lab)
    restored(lab, store, keys=[ONE])
    assert (store.get(b"a") or b"").startswith(b"\0KWE") and store.get(b"b") == b"1" and store.offset == 2


@pytest.mark.parametrize("still_ms", [AGE_MS - 100, AGE_MS + 1])
def test_a_restore_in_which_the_engine_stood_still_for_too_long_begins_again_from_nothing(lab: Lab, still_ms: int) -> None:
    """K8: compaction may have removed meanwhile the record that an instance had ended. The copy used to pass for one that was just written."""
    written(lab, 300)
    changelog, store = lab.broker.partition((CHANGELOG, 0)), opened(lab)
    settings = {"group.id": "r", "isolation.level": "read_committed", "auto.offset.reset": "error", "enable.partition.eof": True}
    restore = Restore(store, lambda: store.environment.consumer(settings), CHANGELOG, 0, 0, changelog.end, Encryption(Config()))
    assert not restore.slice(0) and store.get(b"w000") == b"1"
    lab.broker.append((CHANGELOG, 0), [(0, b"w000", None, [])], None)
    changelog.entries = [entry for entry in changelog.entries if entry.key != b"w000"]
    lab.broker.time.advance(lab.broker.time.now + still_ms)
    while not restore.slice(0):
        pass
    assert store.get(b"w000") == (None if still_ms > AGE_MS else b"1") and store.get(b"w299") == b"1"


@pytest.mark.parametrize(("code", "passes"), [(KafkaError.NOT_LEADER_FOR_PARTITION, True), (KafkaError.TOPIC_AUTHORIZATION_FAILED, False)])
def test_a_restore_goes_on_after_trouble_that_passes_and_ends_the_engine_after_other(lab: Lab, code: int, passes: bool) -> None:
    """K4, K5."""
    written(lab, 3)
    store, place, refusals = opened(lab), lab.broker.partition, [code]

    def partition(where: Place) -> Partition:
        if refusals and where[0] == CHANGELOG and store.offset == 0 and lab.broker.time.now > begun_ms:
            raise Refused(refusals.pop(), "not now")
        return place(where)

    begun_ms = lab.broker.time.now
    lab.broker.partition = partition  # type: ignore[method-assign]
    if passes:
        restored(lab, store)
        assert len(list(store.scan(b""))) == 3
    else:
        with pytest.raises(TransportError, match="restore of found-state-changelog"):
            restored(lab, store)
    assert refusals == []


@pytest.mark.parametrize(
    ("saved", "committed", "found"),
    [(None, OFFSET_INVALID, None), (None, 7, 7), (7, OFFSET_INVALID, 7), (7, 7, 7), (7, 6, MOVED), (7, 8, MOVED)],
)
def test_group_and_state_have_to_agree_on_the_offset(saved: int | None, committed: int, found: int | None) -> None:
    """K16: group offsets expire after seven days, so the state has an offset of its own."""
    state = None if saved is None else json.dumps({"topic": "t", "next": saved, "partitions": 2}).encode()
    assert agreed(position_of(state, "in[0]"), committed, "t", 2, "in[0]") == found


@pytest.mark.parametrize(("incarnation", "partitions"), [("other", 2), ("t", 3)])
def test_a_state_of_another_topic_or_another_number_of_partitions_is_refused(incarnation: str, partitions: int) -> None:
    """K16."""
    with pytest.raises(TransportError, match="was recreated or its partitions changed") as refused:
        agreed(Position("t", 7, 2), 7, incarnation, partitions, "in[0]")
    assert not refused.value.retryable


@pytest.mark.parametrize("saved", [b"", b"rubbish", b"7", b"{}", b'{"topic": "t", "next": "7", "partitions": 2}'])
def test_a_position_that_nobody_can_read_is_refused_and_not_guessed(saved: bytes) -> None:
    """K16: it was damaged, or forged."""
    with pytest.raises(TransportError, match=r"in\[0\]: the position in its changelog cannot be read .* --accept-offset-reset") as refused:
        position_of(saved, "in[0]")
    assert not refused.value.retryable


def test_an_engine_whose_group_has_forgotten_its_offset_goes_on_where_its_state_does(lab: Lab) -> None:
    """K16: from the beginning of the log, it would do everything twice."""
    lab.send("workflow-resume", "w", "new:{}")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    first.run(lambda: True)
    lab.broker.group("found").offsets.clear()
    second = lab.engine("two")
    turn(second, lambda: second.owned)
    assert second.owned[0].position == 1
    second.run(lambda: True)
    lab.broker.group("found").offsets[("workflow-resume", 0)] = 0
    third = lab.engine("three")
    with pytest.raises(TransportError, match="somebody reset one of them. Delete the offsets of the group found to continue where the state is"):
        turn(third, lambda: third.owned)
    lab.kill(third, "three")
    fourth = lab.engine("four", accept_offset_reset=True)
    turn(fourth, lambda: fourth.owned, 2000)
    assert fourth.owned[0].position == 0


def test_a_changelog_that_was_created_again_is_not_taken_for_that_of_a_group_that_had_no_instances(lab: Lab) -> None:
    """G6: otherwise whatever waited would be gone, and nobody would be told."""
    lab.send("workflow-resume", "w", "new:{}")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    first.run(lambda: True)
    made_again(lab)
    second = lab.engine("two")
    with pytest.raises(TransportError, match="found-state-changelog was deleted and created again: the instances") as refused:
        turn(second, lambda: second.owned)
    assert not refused.value.retryable
    lab.kill(second, "two")
    third = lab.engine("three", accept_offset_reset=True)
    turn(third, lambda: third.owned)
    assert third.owned[0].position == 1


def test_a_changelog_that_is_created_again_under_a_running_engine_ends_it_before_it_writes_there(lab: Lab) -> None:
    """G6: otherwise the next owner would restore what has changed since, and nothing of what slept."""
    lab.send("workflow-resume", "w", "new:{}")
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 1)
    lab.broker.delete("found-state-changelog")
    lab.send("workflow-resume", "v", "new:{}")
    turn(engine, lambda: engine.transactions.aborts)
    made_again(lab)
    with pytest.raises(TransportError, match="found-state-changelog was deleted and created again"):
        turn(engine, lambda: engine.owned[0].position == 2)
    assert lab.broker.partition(("found-state-changelog", 0)).end == 0


def made_again(lab: Lab) -> None:
    if "found-state-changelog" in lab.broker.topics:
        lab.broker.delete("found-state-changelog")
    lab.broker.create("found-state-changelog", 1, {"cleanup.policy": "compact"})


def test_a_partition_whose_topic_was_created_again_counts_that_so_that_a_new_run_repeats_no_key_of_an_earlier_one(lab: Lab) -> None:
    """0064: what calls an activity has the offset in its idempotency key, and offsets begin anew."""
    lab.send("workflow-resume", "w", "new:{}", **{"kwflow-workflow": "late"})
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    lab.send("workflow-resume", "w", "{}", **{"kwflow-op": "terminate"})
    turn(first, lambda: first.owned[0].position == 2)
    first.run(lambda: True)
    partitions = len(lab.broker.topics["workflow-resume"].partitions)
    for again in (1, 2):
        lab.broker.delete("workflow-resume")
        lab.broker.create("workflow-resume", partitions)
        with pytest.raises(TransportError, match="its topic was recreated"):
            refused = lab.engine(f"refused{again}")
            turn(refused, lambda: refused.owned)
        lab.kill(refused, f"refused{again}")
        engine = lab.engine(f"accepts{again}", accept_offset_reset=True)
        turn(engine, lambda: engine.owned, 2000)
        assert moves_in(engine.owned[0].store) == again - 1, "nothing was committed yet"
        lab.send("workflow-resume", "w", "new:{}", **{"kwflow-workflow": "late"})
        turn(engine, lambda: engine.owned[0].position == 1)
        assert moves_in(engine.owned[0].store) == again
        assert waits_of(engine.owned[0].store, b"w") == ["never", f"0:{again}000001"]
        lab.send("workflow-resume", "w", "{}", **{"kwflow-op": "terminate"})
        turn(engine, lambda: engine.owned[0].position == 2)
        assert moves_in(engine.owned[0].store) == again
        engine.run(lambda: True)
    last = lab.engine("last", accept_offset_reset=True)
    turn(last, lambda: last.owned, 2000)
    lab.send("workflow-resume", "w", "new:{}", **{"kwflow-workflow": "late"})
    turn(last, lambda: last.owned[0].position == 3)
    assert waits_of(last.owned[0].store, b"w") == ["never", "2:2000001"], "the topic is the same as before"


def waits_of(store: PartitionStore, id: bytes) -> list[str]:
    return [wait["ref"] for wait in snapshot.split(store.get(id) or b"")[0]["waits"]]


def test_a_position_that_nobody_can_read_is_passed_over_once_that_is_accepted(lab: Lab) -> None:
    """K16: the error names the option."""
    lab.send("workflow-resume", "w", "new:{}")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    first.run(lambda: True)
    lab.send(CHANGELOG, "\0kwflow", "rubbish")
    second = lab.engine("two")
    with pytest.raises(TransportError, match=r"workflow-resume\[0\]: the position in its changelog cannot be read .* --accept-offset-reset") as refused:
        turn(second, lambda: second.owned, 2000)
    assert not refused.value.retryable
    lab.kill(second, "two")
    third = lab.engine("three", accept_offset_reset=True)
    turn(third, lambda: third.owned, 2000)
    assert third.owned[0].position == 1
    lab.send("workflow-resume", "v", "new:{}")
    turn(third, lambda: third.owned[0].position == 2)
    third.run(lambda: True)
    fourth = lab.engine("four")
    turn(fourth, lambda: fourth.owned, 2000)


def test_an_engine_without_any_offset_begins_where_the_log_does(lab: Lab) -> None:
    """K16: retention may have removed the first records."""
    for number in range(3):
        lab.send("workflow-resume", f"w{number}", "new:{}")
    lab.broker.partition(("workflow-resume", 0)).delete_before(2)
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 3)
    assert engine.counts["started"] == 1


def test_what_retention_took_before_it_was_applied_ends_the_engine_until_that_is_accepted(lab: Lab) -> None:
    """K16: it used to be started again forever, even with --accept-offset-reset."""
    lab.send("workflow-resume", "w", "new:{}")
    first = lab.engine("one")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    first.run(lambda: True)
    for number in range(3):
        lab.send("workflow-resume", f"v{number}", "new:{}")
    lab.broker.partition(("workflow-resume", 0)).delete_before(3)
    second = lab.engine("one")
    with pytest.raises(TransportError, match=r"workflow-resume\[0\]: the next offset is 1, but the log begins at 3.*--accept-offset-reset") as gone:
        turn(second, lambda: second.owned)
    assert not gone.value.retryable
    lab.kill(second, "one")
    third = lab.engine("one", accept_offset_reset=True)
    turn(third, lambda: third.owned and third.owned[0].position == 4)
    assert third.counts["started"] == 1
    third.run(lambda: True)
    lab.broker.partition(("workflow-resume", 0)).delete_before(4)
    fourth = lab.engine("one")
    turn(fourth, lambda: fourth.owned)


def test_a_gap_that_was_accepted_need_not_be_accepted_again(lab: Lab) -> None:
    """K16: even if nothing came after it."""
    lab.send("workflow-resume", "w", "new:{}")
    lab.send("workflow-resume", "v", "new:{}")
    first = lab.engine("one", batch_records_max=1)
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    first.run(lambda: True)
    lab.broker.partition(("workflow-resume", 0)).delete_before(2)
    second = lab.engine("one", accept_offset_reset=True)
    turn(second, lambda: second.owned and second.owned[0].position == 2, 1000)
    second.run(lambda: True)
    third = lab.engine("one")
    turn(third, lambda: third.owned)
