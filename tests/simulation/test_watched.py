"""What an engine on Kafka reports in each state from its start on. The real runner runs on the simulated broker."""

import json
import pathlib

import pytest

from kwflow.runners.logs import as_json
from tests.simulation.test_found import Lab, turn
from tests.simulation.test_takeover import killed_at


@pytest.fixture
def lab(tmp_path: pathlib.Path) -> Lab:
    return Lab(tmp_path)


def test_an_engine_is_ready_once_it_has_joined_and_owns_what_it_was_given(lab: Lab) -> None:
    """It is not ready before its first partition, nor while somebody's open transaction keeps it from its restore."""
    first = lab.engine("one")
    assert [(seen.joined, seen.ready) for seen in first.seen()] == [(False, False)]
    lab.send("workflow-resume", "w", "new:{}")
    turn(first, lambda: first.owned and first.owned[0].position == 1)
    [seen] = first.seen()
    assert (seen.name, seen.topic, seen.owned, seen.waiting, seen.restoring, seen.ready) == ("found", "workflow-resume", [0], [], {}, True)
    lab.send("workflow-resume", "w", '{"ref": "r", "value": 1}')
    killed_at(lab, first, "one", "commit")
    second = lab.engine("two")
    turn(second, lambda: second.takeover.assigned, 2000)
    [seen] = second.seen()
    assert (seen.joined, seen.owned, seen.waiting, seen.ready) == (True, [], [0], False)
    turn(second, lambda: second.seen()[0].ready, 2000)
    assert second.seen()[0].owned == [0]


def test_the_lag_is_what_is_not_applied_yet_and_the_marks_of_transactions_are_none(lab: Lab) -> None:
    engine, scheduler = lab.engine("one"), lab.scheduler("timers")
    turn(engine, lambda: engine.owned)
    for number in range(3):
        lab.send("workflow-resume", f"w{number}", "new:{}", **{"kwflow-workflow": "late"})
    assert [seen.lag for seen in engine.seen()] == [{0: 3}]
    turn(engine, lambda: engine.counts["started"] == 3)
    turn(scheduler, lambda: scheduler.seen()[0].timers == 3)
    assert [(seen.topic, seen.lag, seen.timers) for seen in (*engine.seen(), *scheduler.seen())] == [("workflow-resume", {0: 0}, None), ("workflow-scheduler", {0: 0}, 3)]
    lab.broker.time.now += 20_000
    turn(scheduler, lambda: scheduler.counts["fired"] == 3)
    assert scheduler.seen()[0].timers == 0
    assert [seen.lag for seen in engine.seen()] == [{0: 4}], "three records, and the mark behind them"
    turn(engine, lambda: engine.counts["resumed"] == 3)
    turn(engine, lambda: engine.seen()[0].lag == {0: 0})


def test_every_transaction_is_measured_and_every_outcome_counted(lab: Lab) -> None:
    engine = lab.engine("one", batch_records_max=1)
    for value in ("new:{}", '{"ref": "r", "value": 1}', "no json"):
        lab.send("workflow-resume", "w", value)
    turn(engine, lambda: engine.counts["dead-letter"])
    assert dict(engine.stats.counts) == {"started": 1, "resumed": 1, "dead-letter": 1}
    assert sum(engine.stats.commits.counts) == 3 and engine.stats.commits.total > 0


def test_a_line_about_a_record_tells_its_workflow_and_where_it_lies(lab: Lab) -> None:
    engine = lab.engine("one")
    lab.send("workflow-resume", "fine", "new:{}")
    lab.send("workflow-resume", "bad", "no json")
    turn(engine, lambda: engine.counts["dead-letter"])
    [line] = [json.loads(as_json(line)) for line in lab.said if line.startswith("dead letter")]
    assert {name: line[name] for name in ("level", "workflow", "topic", "partition", "offset")} == {"level": "warning", "workflow": "bad", "topic": "workflow-resume", "partition": 0, "offset": 1}
