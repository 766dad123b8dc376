"""Which partition an entry of the state belongs to when an application gets more partitions (K6): the one to which the records about it go."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from kwflow.config import Config
from kwflow.core import timers
from kwflow.core.dispatch import Dispatch
from kwflow.core.wire import Record
from kwflow.errors import TransportError
from kwflow.runners import parked
from kwflow.runners.activities.dispatch import keep
from kwflow.runners.code import WRITTEN
from kwflow.runners.ended import FORGOTTEN, EndedTable
from kwflow.runners.kafka.state import POSITION
from kwflow.runners.kafka.stopped import Stopped
from kwflow.runners.moved import home_of
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore
from kwflow.testing.kafka import Broker, SimulatedEnvironment


def test_what_is_kept_of_an_instance_or_a_timer_moves_with_its_key() -> None:
    """Its hold, its activities, and the entry that says when it may be forgotten, each as the engine writes it."""
    config, state = Config(), Overlay(MemoryStore())
    behind = Record(config.resume_topic, 0, 41, 0, b"order-7", b"{}")
    parked.park(config, state, "order-7", None, behind, ValueError("no"), 0)
    keep(state, [Dispatch("order-7", "3:1", "work", 1, "3:1", b"{}")])
    EndedTable(config).keep(state, b"order-7", {"id": "order-7", "workflow": "main", "start_id": "s", "ended": 5})
    assert len(state.changes) == 4 and {home_of(key) for key in state.changes} == {b"order-7"}
    key = b'order-7|{"ref":"3:2"}'
    changes = timers.cancel_or_set(Record(config.scheduler_topic, 0, 41, 0, key, b"1000"), None)
    assert len(changes) == 2 and {home_of(entry) for entry in changes} == {key}


def test_what_each_partition_has_of_its_own_stays() -> None:
    assert [home_of(key) for key in (POSITION, FORGOTTEN, timers.COUNT, WRITTEN + b"orders@ab12")] == [None] * 4


def test_a_question_about_groups_is_asked_again_while_the_coordinator_loads_or_a_transaction_ends_and_no_other_error_is_hidden() -> None:
    """Found in a rolling restart: the answer may say so as a whole, or for one partition."""
    loading, ending, denied = KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS), KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT), KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED, "not you")

    def places(error: KafkaError | None) -> SimpleNamespace:
        return SimpleNamespace(topic_partitions=[SimpleNamespace(topic="t", partition=0, error=None), SimpleNamespace(topic="t", partition=1, error=error)])

    def asked(*answers: object) -> list[Any]:
        left = list(answers)

        def ask() -> dict[str, Future[Any]]:
            future, answer = Future[Any](), left.pop(0)
            future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
            return {"group": future}

        return Stopped(Config(), SimulatedEnvironment(Broker())).ask(ask, "read the offsets of g")

    good = places(None)
    assert asked(KafkaException(loading), places(loading), good) == [good]
    assert asked(places(ending), good) == [good]
    for wrong in (KafkaException(denied), places(denied)):
        with pytest.raises(TransportError, match=r"cannot read the offsets of g( on t\[1\])?: GROUP_AUTHORIZATION_FAILED: not you"):
            asked(KafkaException(loading), wrong)
