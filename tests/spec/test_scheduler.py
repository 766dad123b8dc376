"""The timer table: SC-1..SC-9, the order of timers, and that none is early, with a clock that is an argument."""

import random

import pytest

from kwflow.config import Config
from kwflow.core.timers import COUNT
from kwflow.core.wire import Record
from kwflow.ports import Decision
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore


class Scheduler:
    """The processor over a store in memory; offsets count up."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.processor = TimerProcessor(Config())
        self.offset = 0

    def set(self, key: bytes | None, value: bytes | None, at: int = 0, headers: tuple[tuple[str, bytes | None], ...] = ()) -> Decision:
        changes = Overlay(self.store)
        [made] = self.processor.decide(changes, [Record("workflow-scheduler", 0, self.offset, at, key, value, headers)], at)
        self.offset += 1
        self.store.apply(changes.changes)
        return made

    def fire(self, now: int, limit: int = 100) -> list[tuple[bytes | None, bytes | None, int | None]]:
        changes = Overlay(self.store)
        made = self.processor.due(changes, now, limit)
        self.store.apply(changes.changes)
        return [(output.key, output.value, output.timestamp_ms) for output in made.outputs] if made is not None else []


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def test_the_reference_test_of_the_scheduler(scheduler: Scheduler) -> None:
    """T-KW-6."""
    for key, value in ((b"t1|r1", b"1000"), (b"t1|r2", b"2000"), (b"t1|r1", b"0")):
        assert scheduler.set(key, value).outputs == ()
    assert scheduler.fire(3000) == [(b"t1", b"r2", 3000)]
    assert scheduler.store.entries == {COUNT: b"0 "}


def test_a_timer_fires_at_the_time_of_its_record_plus_the_delay_and_not_a_millisecond_before(scheduler: Scheduler) -> None:
    """SC-1, SC-4 (the reference looks once a minute)."""
    scheduler.set(b"w|v", b"1000", at=500)
    assert scheduler.processor.next_due_ms(scheduler.store) == 1500
    assert scheduler.fire(1499) == []
    assert scheduler.fire(1500) == [(b"w", b"v", 1500)]


def test_a_sleep_of_a_workflow_counts_from_when_it_was_called(scheduler: Scheduler) -> None:
    """SC-1, semantics §9.1: the header has the absolute time."""
    scheduler.set(b"w|v", b"1000", at=500, headers=(("kwflow-due-ms", b"9000"),))
    assert scheduler.processor.next_due_ms(scheduler.store) == 9000


@pytest.mark.parametrize("cancel", [b"0", b"null", None])
def test_zero_or_null_cancels_and_an_unknown_key_is_no_error(scheduler: Scheduler, cancel: bytes | None) -> None:
    """SC-2."""
    scheduler.set(b"w|v", b"10")
    scheduler.set(b"w|v", cancel)
    assert scheduler.set(b"w|other", cancel).counts == ("timer",)
    assert scheduler.fire(10_000) == []
    assert scheduler.store.entries == {COUNT: b"0 "}, "nothing of a cancelled timer is left"


def test_due_timers_fire_by_due_time_then_in_the_order_they_were_set_each_once(scheduler: Scheduler) -> None:
    """SC-3."""
    for key, delay in ((b"a|1", b"300"), (b"b|2", b"100"), (b"c|3", b"300"), (b"d|4", b"200")):
        scheduler.set(key, delay)
    assert [key for key, _, _ in scheduler.fire(300)] == [b"b", b"d", b"a", b"c"]
    assert scheduler.fire(300) == []


def test_more_timers_than_one_transaction_takes_fire_in_order_over_several(scheduler: Scheduler) -> None:
    """SC-3."""
    for n in range(5):
        scheduler.set(b"w|%d" % n, b"%d" % (n + 1))
    assert [value for _ in range(3) for _, value, _ in scheduler.fire(10, limit=2)] == [b"0", b"1", b"2", b"3", b"4"]


def test_several_keys_share_a_due_time_and_cancelling_one_leaves_the_others(scheduler: Scheduler) -> None:
    """SC-5."""
    for key in (b"w|1", b"w|2", b"w|3"):
        scheduler.set(key, b"100")
    scheduler.set(b"w|2", b"0")
    assert [value for _, value, _ in scheduler.fire(100)] == [b"1", b"3"]


def test_setting_a_key_again_replaces_its_timer(scheduler: Scheduler) -> None:
    """SC-6."""
    scheduler.set(b"w|v", b"100")
    scheduler.set(b"w|v", b"500")
    assert scheduler.fire(499) == []
    assert scheduler.fire(500) == [(b"w", b"v", 500)]
    scheduler.set(b"w|v", b"100")
    scheduler.set(b"w|v", b"500")
    scheduler.set(b"w|v", b"0")
    assert scheduler.fire(10_000) == []


def test_the_value_may_hold_the_separator_and_headers_travel(scheduler: Scheduler) -> None:
    """SC-7: the key is split at the first `|` only."""
    scheduler.set(b'w|{"ref":"a|b"}', b"1", headers=(("trace", b"7"), ("kwflow-x", b"no")))
    scheduler.set(b"x|1", b"1")
    changes = Overlay(scheduler.store)
    made = scheduler.processor.due(changes, 1, 10)
    assert made is not None
    assert [(output.key, output.value, output.headers) for output in made.outputs] == [(b"w", b'{"ref":"a|b"}', (("trace", b"7"),)), (b"x", b"1", ())]
    for key in [key for key in scheduler.store.entries if key.startswith(b"\0due\0")]:
        scheduler.store.entries[key] = b"a\x017\0b\x01" if key.endswith(b"x|1") else b""  # headers as 0.1.0 wrote them, and none
    old = scheduler.processor.due(Overlay(scheduler.store), 1, 10)
    assert old is not None and [output.headers for output in old.outputs] == [(), (("a", b"7"), ("b", b""))]
    scheduler.store.apply({key: b"\2rubbish" for key in scheduler.store.entries if key.startswith(b"\0due\0")})
    damaged = scheduler.processor.due(Overlay(scheduler.store), 1, 10)
    assert damaged is not None and [output.headers for output in damaged.outputs] == [(), ()], "a timer whose headers cannot be read fires without them"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (b"no-separator", b"1", b"bad-key"), (b"|v", b"1", b"bad-key"), (None, b"1", b"bad-key"),
        (b"w|v", b"undefined", b"bad-delay"), (b"w|v", b"1.5", b"bad-delay"), (b"w|v", b"9" * 20, b"bad-delay"), (b"w|v", b"316224000001", b"bad-delay"),
        (b"w|v", b"\0KWE\1", b"encrypted"),
    ],
)  # fmt: skip
def test_malformed_timers_are_dead_lettered_and_the_next_one_works(scheduler: Scheduler, key: bytes | None, value: bytes, reason: bytes) -> None:
    """SC-7."""
    [letter] = scheduler.set(key, value).outputs
    assert dict(letter.headers)["kwflow-error-reason"] == reason
    assert scheduler.store.entries == {}
    scheduler.set(b"w|fine", b"1")
    assert len(scheduler.fire(1)) == 1


def test_a_negative_delay_fires_at_once(scheduler: Scheduler) -> None:
    """SC-8."""
    scheduler.set(b"w|v", b"-5", at=100)
    assert scheduler.fire(100) == [(b"w", b"v", 100)]


def test_the_table_is_read_from_its_first_due_entry_only(scheduler: Scheduler) -> None:
    """SC-3, SC-4: it is ordered by due time, and a tick does not scan all timers."""
    for n in range(100):
        scheduler.set(b"w|%d" % n, b"%d" % (1000 + n))
    met: list[bytes] = []

    class Counting(MemoryStore):
        def scan(self, prefix, start=b""):  # type: ignore[no-untyped-def]
            for entry in super().scan(prefix, start):
                met.append(entry[0])
                yield entry

    counting = Counting()
    counting.entries = scheduler.store.entries
    assert scheduler.processor.due(Overlay(counting), 1001, 10) is not None
    assert len(met) == 3, "two due, one that is not"


@pytest.mark.parametrize("seed", range(20))
def test_no_timer_is_due_before_the_low_end_of_the_table_whatever_was_set_replaced_cancelled_and_fired(seed: int) -> None:
    """Compared with a plain dict. What was deleted before the low end is never passed again, and once the low end has come due, it is the first entry."""
    chance = random.Random(seed)
    processor, store, model, now, offset = TimerProcessor(Config()), MemoryStore(), dict[bytes, int](), 0, 0
    for _ in range(200):
        overlay = Overlay(store)
        if chance.random() < 0.2:
            now += chance.randrange(300)
            made = processor.due(overlay, now, 5)
            due = sorted(at for at in model.values() if at <= now)[:5]
            assert len(made.outputs if made is not None else ()) == len(due)
            for output in made.outputs if made is not None else ():
                del model[(output.key or b"") + b"|" + (output.value or b"")]
            asked = True
        else:
            asked = False
            records = []
            for _ in range(chance.randrange(1, 4)):
                key, delay = b"w|%d" % chance.randrange(12), chance.choice([0, 0, 1, 50, 100, 200])
                records.append(Record("workflow-scheduler", 0, offset, now, key, b"%d" % delay))
                offset += 1
                model.pop(key, None)
                if delay:
                    model[key] = now + delay
            processor.decide(overlay, records, now)
        store.apply(overlay.changes)
        assert processor.waiting(store) == len(model)
        first, next_ms = min(model.values(), default=None), processor.next_due_ms(store)
        assert next_ms == first or (first is not None and next_ms is not None and next_ms < first and not (asked and next_ms <= now))


def test_timeouts_that_are_set_and_cancelled_have_nobody_look_through_the_table(scheduler: Scheduler) -> None:
    """A scan from where a cancelled timer was passes all entries that the store has not yet forgotten: with timeouts of two lengths, 100,000 of them, 3 ms, at each cancel."""
    scheduler.set(b"far|v", b"100000")
    looks: list[bytes] = []

    class Looking(MemoryStore):
        def scan(self, prefix, start=b""):  # type: ignore[no-untyped-def]
            looks.append(start)
            return super().scan(prefix, start)

    looking = Looking()
    looking.entries, scheduler.store = scheduler.store.entries, looking
    for n in range(10):
        scheduler.set(b"w|%d" % n, b"500", at=n)
        scheduler.set(b"w|%d" % n, b"0", at=n)
    assert looks == [], "not while they are set and cancelled"
    assert scheduler.fire(499) == []
    assert scheduler.fire(500) == []
    assert len(looks) <= 2, "once the first of them would have been due"
    assert scheduler.processor.next_due_ms(looking) == 100_000


def test_what_is_left_of_a_table_whose_changelog_was_lost_is_counted_again() -> None:
    """An engine that had gone on with a new changelog left a count of timers there that are not in it; every scheduler ended as by a bug."""
    processor, store = TimerProcessor(Config()), MemoryStore()
    store.entries[COUNT] = b"7 "
    assert processor.next_due_ms(store) is None
