"""Offsets that begin anew: a topic was created again, or the state was moved to another log (decision 0064)."""

from typing import Any

import msgspec
import pytest

import kwflow as kw
from kwflow.runners.moved import MOVES
from tests.spec.test_checkpoints_attacked import Partition

CALLS = """
import kwflow as kw
from tests.spec.test_offsets_anew import anew_pay

def main(o):
    while (yield kw.wait_signal("pay")):
        yield anew_pay(1)
"""
PAY, END = {"name": "pay", "value": 1}, {"name": "pay", "value": 0}


@kw.activity
def anew_pay(cents: int) -> None:
    """An activity that no test runs."""


def moved(site: Partition, sent: int = 0, incarnation: str = "another") -> None:
    site.sent, site.processor.incarnation = sent, incarnation


def refs(site: Partition, id: str = "w") -> list[str]:
    return [wait["ref"] for wait in site.headers()[id.encode()]["waits"]]


def keys_called(made: Any) -> list[str]:
    return [call.key for call in made.dispatch if hasattr(call, "key")]


def test_no_call_has_the_idempotency_key_of_an_earlier_one() -> None:
    """M6: a payment service would take the second call for a repetition of the first, and pay once."""
    site = Partition(CALLS)
    site.send("start")
    called = keys_called(site.send("signal", PAY))
    assert called == ["2:1"]
    site.send("answer", {"ref": "2:1", "value": None})
    for incarnation in ("second", "third"):
        moved(site, 1, incarnation)
        called += keys_called(site.send("signal", PAY))
        site.send("answer", {"ref": called[-1], "value": None})
    assert called == ["2:1", "2:1000001", "2:2000001"]


def test_a_late_answer_to_a_call_of_before_reaches_no_later_one() -> None:
    """S2: the ref is that of the earlier call."""
    site = Partition(CALLS)
    site.send("start")
    site.send("signal", PAY)
    site.send("answer", {"ref": "2:1", "value": None})
    moved(site, 1)
    site.send("signal", PAY)
    assert site.send("answer", {"ref": "2:1", "value": None}).counts == ("unknown-ref",)
    assert refs(site) == ["2:1000001"]


def test_a_run_that_starts_after_a_move_calls_under_other_keys_than_an_earlier_one_of_its_id() -> None:
    site = Partition(CALLS)
    site.send("start")
    before = keys_called(site.send("signal", PAY))
    site.send("terminate", {"reason": ""})
    moved(site)
    site.store.entries[MOVES] = b"1"
    site.send("start")
    assert (before, keys_called(site.send("signal", PAY))) == (["2:1"], ["2:1000001"])


@pytest.mark.parametrize("stored", [b"", b"many", b"-1", b"9" * 40, "\u0665".encode()])
def test_a_number_of_moves_that_nobody_can_read_is_none(stored: bytes) -> None:
    site = Partition(CALLS)
    site.store.entries[MOVES] = stored
    site.send("start")
    assert keys_called(site.send("signal", PAY)) == ["2:1"]


def test_what_a_parked_instance_holds_does_not_pass_for_what_comes_after_it() -> None:
    """G3: offsets of the hold are larger than those that follow, which would be ignored as repeated."""
    site = Partition(CALLS)
    site.send("start")
    site.send("pause", {"reason": "x"})
    site.sent = 5000
    site.send("signal", PAY)
    moved(site)
    made = site.send("unpause")
    assert keys_called(made) == ["5001:1000001"]
    assert site.send("answer", {"ref": "5001:1000001", "value": None}).counts == ("resumed",)
    assert keys_called(site.send("signal", PAY)) == ["3:2000001"]


@pytest.mark.parametrize("partition", [0, 3])
def test_what_it_holds_of_several_logs_is_applied_in_the_order_in_which_it_came(partition: int) -> None:
    """G3: two records with the same offset are no repetition if they are of two logs, wherever the instance is by now."""
    site = Partition(CALLS.replace("yield anew_pay(1)", "pass"))
    site.send("start")
    site.send("pause", {"reason": "x"})
    for incarnation, sent in (("second", 7), ("third", 0), ("fourth", 0), ("fifth", 3)):
        moved(site, sent, incarnation)
        site.send("signal", PAY)
    [made] = site.batch(msgspec.structs.replace(site.record("unpause"), partition=partition))
    assert site.headers()[b"w"]["status"] == "waiting" and made.counts.count("signal") == 4, made.counts
    [made] = site.batch(msgspec.structs.replace(site.record("signal", END), partition=partition))
    assert made.counts == ("signal",) and [output.value for output in made.outputs] == [b"null"], "it has ended"


def test_an_instance_that_is_put_back_first_of_all_does_not_repeat_refs_either() -> None:
    """Decision 0062: the header of then says how often it had been moved then."""
    site = Partition(CALLS + "main.kwflow_checkpoints = 9\n")
    site.send("start")
    first = keys_called(site.send("signal", PAY))
    site.send("answer", {"ref": "2:1", "value": None})
    moved(site)
    assert site.send("rewind", {"to": 0}).counts[0] == "rewound"
    assert (first, keys_called(site.send("signal", PAY))) == (["2:1"], ["2:1000001"])


def test_without_a_move_nothing_is_noted() -> None:
    site = Partition(CALLS)
    site.send("start")
    site.send("signal", PAY)
    assert "moves" not in site.headers()[b"w"]


@pytest.mark.parametrize("at", [None, 1])
def test_a_fork_does_not_repeat_refs_either(at: int | None) -> None:
    """Decision 0064: it has called what its original had called before the move."""
    site = Partition(CALLS + "main.kwflow_checkpoints = 9\n")
    site.send("start")
    first = keys_called(site.send("signal", PAY))
    site.send("signal", PAY)
    moved(site)
    site.store.entries[MOVES] = b"1"
    site.send("fork", {"id": "copy", "at": at})
    site.send("answer", {"ref": "2:1", "value": None}, "copy")
    [ref] = refs(site, "copy")
    assert first == ["2:1"] and ref.startswith("2:100000")


def test_a_fork_whose_id_the_engine_chooses_is_never_taken_for_one_of_before() -> None:
    """G3: the reply was the earlier fork, and nothing was forked."""
    site = Partition(CALLS)
    site.send("start")
    site.send("fork", {})
    moved(site, 1)
    site.store.entries[MOVES] = b"1"
    assert site.send("fork", {}).counts == ("forked",)
    assert sorted(id for id in site.headers() if id.startswith(b"w")) == [b"w", b"w/fork-2", b"w/fork-2-1000001"]
    assert len({header["start_id"] for id, header in site.headers().items() if id.startswith(b"w")}) == 3


def test_a_fork_under_an_id_of_before_is_refused() -> None:
    site = Partition(CALLS)
    site.send("start")
    site.send("fork", {"id": "copy"})
    moved(site, 1)
    site.store.entries[MOVES] = b"1"
    assert site.send("fork", {"id": "copy"}).counts == ("not-forked",)


def test_a_run_is_not_taken_for_one_of_before_whose_offset_comes_again() -> None:
    """Decision 0062: it would be put back to a checkpoint of the earlier one."""
    site = Partition(CALLS + "main.kwflow_checkpoints = 9\n")
    site.send("start")
    site.send("signal", END)
    moved(site)
    site.store.entries[MOVES] = b"1"
    site.send("start")
    assert site.send("rewind", {"to": 0}).counts == ("not-rewound",)
    site.send("terminate", {"reason": ""})
    assert site.headers()[b"w"]["start_id"] == "0-1-1"


@pytest.mark.parametrize("ends", ["signal", "terminate", "start"])
def test_a_run_goes_on_where_the_run_before_it_was_moved_more_often_than_its_partition(ends: str) -> None:
    """What it held came from an earlier log, which counts as a move of it alone; so after the next move of the partition, a new run would have got the refs of that run."""
    site, called = Partition(CALLS + ("main.kwflow_restart = True\n" if ends == "start" else "")), list[str]()
    site.send("start")
    for incarnation, first, then in (("second", 9, 19), ("third", 4, 9), ("fourth", 9, 19), ("fifth", 4, 9)):
        site.send("pause", {"reason": "x"})
        site.sent = 50
        site.send("signal", PAY)
        moved(site, 0, incarnation)
        site.store.entries[MOVES] = b"%d" % (int(site.store.entries.get(MOVES, b"0")) + 1)
        called += keys_called(site.send("unpause"))
        site.send("answer", {"ref": called[-1], "value": None})
        site.sent = first
        called += keys_called(site.send("signal", PAY))
        site.send("answer", {"ref": called[-1], "value": None})
        if ends != "start":
            site.send(ends, END if ends == "signal" else {"reason": ""})
        site.send("start")
        site.sent = then
        called += keys_called(site.send("signal", PAY))
        site.send("answer", {"ref": called[-1], "value": None})
    assert len(set(called)) == len(called) == 12, called
