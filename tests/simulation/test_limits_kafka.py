"""What one transaction of the Kafka runner holds: one below each limit, at the limit, and one past it. The rest of what was gathered goes into the next one."""

import json
import pathlib

import pytest

from kwflow.runners.kafka.state import POSITION
from tests.simulation.test_found import Lab, turn


def transactions(directory: pathlib.Path, records: int, **limits: int) -> tuple[list[int], int]:
    """Return how many records each transaction of a backlog took, and the size of all states in bytes."""
    lab = Lab(directory)
    for number in range(records):
        lab.send("workflow-resume", f"w{number}", "new:{}")
    lab.producer.flush()
    engine = lab.engine("one", **limits)
    [changelog] = lab.broker.topics["found-state-changelog"].partitions

    def ends() -> list[int]:
        return [json.loads(entry.value or b"")["next"] for entry in changelog.committed() if entry.key == POSITION]

    turn(engine, lambda: records in ends())
    assert engine.counts["started"] == records
    states = sum(len(entry.key or b"") + len(entry.value or b"") for entry in changelog.committed() if not (entry.key or b"").startswith(b"\0"))
    return [end - before for before, end in zip([0, *ends()], ends(), strict=False)], states


@pytest.mark.parametrize(("over", "sizes"), [(-1, [6]), (0, [7]), (1, [7, 1])])
def test_a_transaction_has_at_most_batch_records_max_records(tmp_path: pathlib.Path, over: int, sizes: list[int]) -> None:
    assert transactions(tmp_path, 7 + over, batch_records_max=7)[0] == sizes


def test_a_long_backlog_is_as_many_full_transactions_as_it_needs(tmp_path: pathlib.Path) -> None:
    """What was gathered and did not fit is counted together with what is gathered next."""
    assert transactions(tmp_path, 24, batch_records_max=5)[0] == [5, 5, 5, 5, 4]


@pytest.mark.parametrize(("over", "sizes"), [(-1, [2]), (0, [2]), (1, [1, 1])])
def test_a_transaction_has_at_most_batch_bytes_max_bytes(tmp_path: pathlib.Path, over: int, sizes: list[int]) -> None:
    """The size is known once the states are saved, before anything is produced."""
    _, states = transactions(tmp_path / "measured", 2)
    assert transactions(tmp_path / "limited", 2, batch_bytes_max=states - over)[0] == sizes


def test_a_record_that_is_larger_than_a_transaction_should_be_has_one_of_its_own(tmp_path: pathlib.Path) -> None:
    assert transactions(tmp_path, 3, batch_bytes_max=1)[0] == [1, 1, 1]


def test_a_topic_that_takes_less_than_the_others_limits_neither_them_nor_a_batch_of_records_that_it_takes(tmp_path: pathlib.Path) -> None:
    """K11: the outputs' topic accepts 200 kB, the changelog accepts more, and many small outputs are several requests."""
    lab = Lab(tmp_path)
    lab.send("workflow-resume", "large", "new:" + json.dumps("x" * 300_000))
    for number in range(6):
        lab.send("workflow-resume", f"w{number}", "new:{}")
        lab.send("workflow-resume", f"w{number}", json.dumps({"ref": "r", "value": "x" * 50_000}))
    lab.producer.flush()
    engine = lab.engine("one")
    turn(engine, lambda: engine.owned and engine.owned[0].position == 13)
    assert dict(engine.counts) == {"started": 7, "resumed": 6}
    assert len(lab.written("found-out")) == 6
