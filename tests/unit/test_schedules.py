"""When schedules are due (time zones, daylight saving, downtime), and what the overlap policies do."""

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from kwflow import durable, schedules
from kwflow.errors import UsageError
from kwflow.testing import WorkflowTester

BEGIN = 1_700_000_000_000


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def times(cron: str, zone: str, after: str, count: int) -> list[str]:
    """The next times, as the clocks of that zone show them."""
    plan = schedules.checked({"name": "n", "workflow": "w", "cron": cron, "timezone": zone})
    found, at = [], ms(after)
    for _ in range(count):
        following = schedules.next_ms(plan, at, 0)
        assert following is not None
        assert following > at
        at = following
        found.append(datetime.fromtimestamp(at / 1000, ZoneInfo(zone)).isoformat(timespec="minutes"))
    return found


def test_a_cron_expression_is_in_its_time_zone_through_the_seasons() -> None:
    assert times("0 9 * * MON", "Europe/Berlin", "2026-03-22T00:00:00Z", 2) == ["2026-03-23T09:00+01:00", "2026-03-30T09:00+02:00"]


def test_a_time_that_daylight_saving_skips_runs_right_after_the_gap() -> None:
    """As Debian's cron does: on that day, 02:30 does not exist."""
    assert times("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2) == ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]


def test_a_time_that_daylight_saving_repeats_runs_once() -> None:
    assert times("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2) == ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]
    assert times("30 1 * * *", "America/New_York", "2026-11-01T05:40:00Z", 1) == ["2026-11-02T01:30-05:00"], "asked within the repeated hour"


def test_every_few_minutes_goes_on_evenly_through_both_changes() -> None:
    assert times("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:15:00Z", 3) == ["2026-03-29T01:30+01:00", "2026-03-29T03:00+02:00", "2026-03-29T03:30+02:00"]
    repeated = times("*/30 * * * *", "Europe/Berlin", "2026-10-24T23:45:00Z", 5)
    assert repeated == ["2026-10-25T02:00+02:00", "2026-10-25T02:30+02:00", "2026-10-25T02:00+01:00", "2026-10-25T02:30+01:00", "2026-10-25T03:00+01:00"]


def test_an_interval_counts_from_when_it_was_added() -> None:
    plan = schedules.checked({"name": "n", "workflow": "w", "every_ms": 300_000})
    assert schedules.next_ms(plan, BEGIN, BEGIN) == BEGIN + 300_000
    assert schedules.next_ms(plan, BEGIN + 300_000, BEGIN) == BEGIN + 600_000
    assert schedules.next_ms(plan, BEGIN + 300_001, BEGIN) == BEGIN + 600_000


@pytest.mark.parametrize(("plan", "said"), [
    ({"cron": "* * *"}, "Wrong number of fields"), ({"cron": "61 * * * *"}, "minute"), ({"cron": "* * * * *", "timezone": "Mars/Olympus"}, "no time zone 'Mars/Olympus'"),
    ({}, "either a cron"), ({"cron": "* * * * *", "every_ms": 5000}, "either a cron"), ({"every_ms": 10}, "every_ms"), ({"every_ms": 5000, "overlap": "maybe"}, "overlap"),
    ({"cron": "* * * * *", "timezone": "../etc"}, "no time zone"),
    ({"every_ms": 5000, "workflow": ""}, "workflow"), ({"every_ms": 5000, "name": "a|b"}, "name"), ({"every_ms": 5000, "colour": 1}, "colour"),
    ({"every_ms": 316_224_000_001}, "every_ms"), ({"every_ms": 5000, "name": "毎" * 134}, "at most 400 bytes, not 402"),
])  # fmt: skip
def test_a_plan_that_means_nothing_is_refused_by_what_is_wrong(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        schedules.checked({"name": "n", "workflow": "w", **plan})


def test_the_longest_interval_and_name_make_times_and_ids() -> None:
    """What would otherwise fail in the engine is refused before it is sent."""
    plan = schedules.checked({"name": "毎" * 133, "workflow": "w", "every_ms": 316_224_000_000})
    state = schedules.begin(plan, BEGIN)
    assert schedules.told(state, {"do": "trigger"}, BEGIN) is None
    [run] = schedules.due(state, BEGIN + 1)
    assert len(run.encode()) < 512 and schedules.status(state)["next"]


def test_an_expression_that_never_comes_is_no_time() -> None:
    assert schedules.next_ms(schedules.checked({"name": "n", "workflow": "w", "cron": "0 0 */20 * 1L"}), BEGIN, 0) is None


@pytest.mark.parametrize(("text", "value"), [("90s", 90_000), ("5m", 300_000), ("1h30m", 5_400_000), ("2d", 172_800_000)])
def test_durations_are_written_as_people_write_them(text: str, value: int) -> None:
    assert schedules.duration_ms(text) == value
    for wrong in ("", "5", "m5", "5 m", "-5m", "1.5h", "9" * 5000 + "d"):
        with pytest.raises(UsageError, match="like 90s"):
            schedules.duration_ms(wrong)


# -- the workflow --------------------------------------------------------------------------------------------------------
SOURCE = """
import kwflow as kw

def main(seconds):
    if seconds == "fail":
        raise ValueError
    if seconds:
        yield kw.sleep(seconds)
    return seconds
"""


def schedule(**plan: Any) -> WorkflowTester:
    """A schedule of `main`, every minute unless the plan says otherwise."""
    tester = WorkflowTester(durable.load_source("scheduled", SOURCE).main)
    when = {} if "cron" in plan else {"every_ms": 60_000}
    tester.start("schedule:job", {"name": "job", "workflow": "main", **when, **plan}, workflow=schedules.WORKFLOW)
    return tester


def status(tester: WorkflowTester) -> dict[str, Any]:
    found: dict[str, Any] = (tester.header("schedule:job") or {})["status_value"]
    return found


def tell(tester: WorkflowTester, **message: Any) -> None:
    assert (tester.command("schedule:job", "signal", {"name": schedules.SIGNAL, "value": message}) or {})["status"] == "delivered"


def begun(tester: WorkflowTester) -> list[str]:
    return [(output.key or b"").decode().partition("@")[2] for output in tester.outputs if (output.value or b"").startswith(b"new:") and b"@" in (output.key or b"")]


def test_it_starts_a_child_at_each_of_its_times_named_after_the_time() -> None:
    w = schedule(input=0)
    w.advance(180)
    assert begun(w) == ["2023-11-14T22:14:20Z", "2023-11-14T22:15:20Z", "2023-11-14T22:16:20Z"]
    assert status(w)["runs"] == 3
    assert status(w)["next"] == "2023-11-14T22:17:20Z"


@pytest.mark.parametrize(("overlap", "runs", "skipped", "queued", "active"), [("skip", 2, 3, 0, 1), ("queue", 2, 0, 3, 1), ("allow", 5, 0, 0, 3)])
def test_a_time_that_comes_while_a_run_is_on_is_skipped_queued_or_allowed(overlap: str, runs: int, skipped: int, queued: int, active: int) -> None:
    w = schedule(input=150, overlap=overlap)
    w.advance(300)
    found = status(w)
    assert (found["runs"], found["skipped"], found["queued"], found["active"]) == (runs, skipped, queued, active)
    w.advance(10_000)
    assert all(output.topic != "workflow-error" for output in w.outputs)


@pytest.mark.parametrize(("name", "most"), [("n" * 80, 1000), ("n" * 200, 660), ("毎" * 133, 422)])
def test_a_schedule_with_a_long_name_skips_runs_before_the_active_ones_are_too_large_for_its_snapshot(name: str, most: int) -> None:
    w = schedule(name=name, every_ms=1000, overlap="allow", catch_up_ms=10_000_000, input=1_000_000)
    late(w, 700)
    late(w, 700)
    assert (w.header("schedule:job")["status"], status(w)["active"], status(w)["skipped"]) == ("waiting", most, 1400 - most)


def test_queued_runs_are_made_one_after_the_other_in_order() -> None:
    w = schedule(input=90, overlap="queue")
    w.advance(60 * 6)
    first = begun(w)
    tell(w, do="pause")
    w.advance(1000)
    assert begun(w) == sorted(begun(w))
    assert len(begun(w)) == 6 > len(first)


def late(w: WorkflowTester, seconds: int) -> None:
    """Stop the engine for this long: its timers fire when it is back."""
    w.now_ms += seconds * 1000
    w.advance(0)


def test_after_downtime_what_was_missed_runs_as_far_back_as_catch_up_says() -> None:
    w = schedule(input=0, catch_up_ms=300_000, overlap="allow")
    late(w, 3600)
    assert len(begun(w)) == 6, "those of the last five minutes, both ends included"
    assert begun(w)[-1] == "2023-11-14T23:13:20Z"
    w.advance(60)
    assert len(begun(w)) == 7


def test_after_downtime_without_catch_up_only_what_is_less_than_a_minute_late_runs() -> None:
    """A busy engine is a little late, which is not downtime."""
    w = schedule(input=0, catch_up_ms=0)
    late(w, 3570)
    assert begun(w) == ["2023-11-14T23:12:20Z"]
    assert status(w)["next"] == "2023-11-14T23:13:20Z"


def test_a_day_of_missed_seconds_is_passed_over_at_once() -> None:
    w = schedule(input=0, every_ms=1000, catch_up_ms=10_000_000, overlap="skip")
    late(w, 86_400)
    assert status(w)["skipped"] < 1001
    assert status(w)["runs"] >= 1


def test_paused_it_starts_nothing_and_what_came_due_meanwhile_is_not_made_up() -> None:
    w = schedule(input=0)
    tell(w, do="pause")
    w.advance(600)
    assert begun(w) == []
    assert status(w)["next"] is None
    tell(w, do="unpause")
    assert begun(w) == []
    w.advance(60)
    assert len(begun(w)) == 1


def test_what_came_due_while_it_was_paused_is_not_counted_as_missed() -> None:
    w = schedule(input=0, catch_up_ms=0)
    tell(w, do="pause")
    w.advance(3600)
    tell(w, do="trigger")
    tell(w, do="unpause")
    assert (status(w)["missed"], status(w)["runs"]) == (0, 1)
    assert status(w)["next"] == "2023-11-14T23:14:20Z"


def test_a_trigger_starts_a_run_now_also_when_it_is_paused() -> None:
    w = schedule(input=0)
    tell(w, do="pause")
    tell(w, do="trigger")
    tell(w, do="trigger")
    assert begun(w) == ["2023-11-14T22:13:20Z+1", "2023-11-14T22:13:20Z+2"]


def test_removed_it_ends_and_runs_that_are_on_go_on() -> None:
    w = schedule(input=500)
    w.advance(60)
    tell(w, do="remove")
    assert w.result("schedule:job")["runs"] == 1
    w.advance(1000)
    assert [output.key for output in w.outputs if output.topic == "workflow-result"] == [b"schedule:job", b"job@2023-11-14T22:14:20Z"]


def test_a_run_that_fails_or_cannot_start_is_counted_and_the_schedule_goes_on() -> None:
    w = schedule(input="fail")
    w.advance(120)
    assert (status(w)["runs"], status(w)["failed"], status(w)["active"], status(w)["last_failed"]) == (2, 2, 0, "job@2023-11-14T22:15:20Z: error")
    w = schedule(workflow="nowhere")
    w.advance(120)
    assert (status(w)["runs"], status(w)["failed"], status(w)["last_failed"]) == (2, 2, "job@2023-11-14T22:15:20Z: unknown_workflow")


def test_set_changes_the_plan_of_a_running_schedule_and_a_wrong_one_changes_nothing() -> None:
    w = schedule(input=0)
    tell(w, do="set", plan={"name": "job", "workflow": "main", "every_ms": 3_600_000})
    assert status(w)["next"] == "2023-11-14T23:13:20Z"
    tell(w, do="set", plan={"name": "job", "workflow": "main"})
    tell(w, do="dance")
    assert status(w)["next"] == "2023-11-14T23:13:20Z"
    assert any("either a cron" in line for line in w.logs)
    assert any("does not know" in line for line in w.logs)


def test_a_change_of_a_schedule_skips_the_runs_that_are_queued_and_counts_them() -> None:
    w = schedule(input=1000, overlap="queue")
    w.advance(300)
    assert (status(w)["queued"], status(w)["skipped"], status(w)["active"]) == (4, 0, 1)
    tell(w, do="set", plan={"name": "job", "workflow": "main", "every_ms": 3_600_000})
    assert (status(w)["queued"], status(w)["skipped"], status(w)["active"]) == (0, 4, 1)


def test_it_lives_for_years_without_growing() -> None:
    """It has no history: after 296 days, the snapshot is as large as after 40."""
    w = schedule(cron="0 3 * * *", timezone="Europe/Berlin", input=0)
    w.advance(40 * 86_400)
    sizes = set()
    for _ in range(16):
        w.advance(16 * 86_400)
        sizes.add(len(w.state.get(b"schedule:job") or b""))
    assert status(w)["runs"] == 40 + 16 * 16
    assert max(sizes) < 3500
    assert max(sizes) - min(sizes) < 100


def test_a_start_with_a_wrong_plan_is_an_error_record() -> None:
    w = schedule(every_ms=5)
    assert "every_ms" in w.values("workflow-error")[0]



def test_a_schedule_is_not_woken_again_and_again_when_the_engines_clock_is_behind_the_schedulers() -> None:
    """Found by simulation: a timer counted from the engine's clock was due early by the scheduler's, and so was the next one, thousands of times."""
    module = durable.load_source("schedule_skewed", "def main(o):\n    return 1\n    yield\n", "schedule_skewed.py")
    w = WorkflowTester(module.main)
    w.start("schedule:s", {"name": "s", "workflow": "main", "every_ms": 60_000}, "kwflow.schedule")
    begun = w.now_ms
    for _ in range(3):
        w.advance(60)
        [timer] = [output for output in w.outputs if output.topic == "workflow-scheduler" and output.value != b"0"][-1:]
        w.now_ms -= 5_000  # the next timer is set by an engine whose clock is behind
        w.command("schedule:s", "signal", {"name": "kwflow.schedule", "value": {"do": "unpause"}})
        timer = [output for output in w.outputs if output.topic == "workflow-scheduler" and output.value != b"0"][-1]
        due = int(dict(timer.headers)["kwflow-due-ms"] or 0)
        assert (due - begun) % 60_000 == 0, "it is due at the time itself, by whatever clock"
        w.now_ms += 5_000


def test_a_schedule_is_not_forked() -> None:
    """Decision 0048: no command would find the second one."""
    w = schedule(input=0)
    assert w.command("schedule:job", "fork")["status"] == "rejected"
    assert w.ids() == ["schedule:job"]
