"""Which partition an entry of the state belongs to when an application gets more partitions (K6): the one to which the records about it go."""

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.dispatch import Dispatch
from kwflow.core.wire import Record
from kwflow.runners import parked
from kwflow.runners.activities.dispatch import keep
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import FORGOTTEN, EndedTable
from kwflow.runners.kafka.state import POSITION
from kwflow.runners.kafka.upkeep import _home
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore


def test_what_is_kept_of_an_instance_or_a_timer_moves_with_its_key() -> None:
    """Its hold, its activities, and the entry that says when it may be forgotten, each as the engine writes it."""
    config, state = Config(), Overlay(MemoryStore())
    behind = Record(config.resume_topic, 0, 41, 0, b"order-7", b"{}")
    parked.park(config, state, "order-7", None, behind, ValueError("no"), 0)
    keep(state, [Dispatch("order-7", "3:1", "work", 1, "3:1", b"{}")])
    EndedTable(config).keep(state, b"order-7", {"id": "order-7", "workflow": "main", "start_id": "s", "ended": 5})
    assert len(state.changes) == 4 and {_home(key) for key in state.changes} == {b"order-7"}
    key = b'order-7|{"ref":"3:2"}'
    changes = timers.cancel_or_set(Record(config.scheduler_topic, 0, 41, 0, key, b"1000"), None)
    assert len(changes) == 2 and {_home(entry) for entry in changes} == {key}


def test_what_each_partition_has_of_its_own_stays() -> None:
    assert [_home(key) for key in (POSITION, FORGOTTEN, timers.COUNT, WRITTEN + b"orders@ab12")] == [None] * 4
