"""rest.call by the requirements LR-1 to LR-22 (reference-systems §5), with a real service over HTTP and the test's own clock."""

import asyncio
import pathlib
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from kwflow import durable, rest
from kwflow.config import load_config
from kwflow.errors import UsageError
from kwflow.running import ActivityInfo, running_as
from kwflow.testing import HANGS, WorkflowTester
from tests.spec import rest_service
from tests.spec.rest_service import Answer, Asked, Service, nowhere

FILE = pathlib.Path(__file__).parent / "rest_flows.py"
flows = durable.load_source("rest_flows", FILE.read_text(encoding="utf-8"), str(FILE))
LABELS = {"A": 1, "lines": "two\nlines", "quote": 'String "literal".', "list": ["a", None]}
DONE = {"status": "SUCCESS", "scm": {"url": "…", "revision": "new-scm-tag"}}


@pytest.fixture
def service() -> Iterator[Service]:
    """The service of the example: each job is cancelled at the path that was in its answer."""
    with rest_service.service() as made:
        made.answers = {
            "/prebuild": Answer({"cancelPath": "/cancel/1"}, headers={"Set-Cookie": "myCookieName=myCookieValue"}),
            "/build": Answer({"cancelPath": "/cancel/2"}),
            "/cancel/1": Answer({"stopping": 1}),
            "/cancel/2": Answer({"stopping": 2}),
            "/complete": lambda asked: Answer({"labels": asked.body["labels"]}),
        }
        yield made


def started(workflow: str, order: Any) -> WorkflowTester:
    tester = WorkflowTester(getattr(flows, workflow))
    tester.start("w", order)
    return tester


def callbacks(tester: WorkflowTester) -> list[str]:
    """The refs of callbacks that are waited for."""
    return [ref for ref in tester.waits("w") if ref.startswith("callback-") and not ref.endswith("-heartbeat")]


def under_way(tester: WorkflowTester) -> str:
    """The ref of the request that a fake does not answer."""
    [ref] = [wait["ref"] for wait in tester.header("w")["waits"] if wait["kind"] == "activity"]
    return str(ref)


def timers(tester: WorkflowTester) -> int:
    """How many timers are set."""
    return int(tester.timers.entries[b"\0timers"].split()[0])


# -- the tests of the reference (table 5.2) ------------------------------------------------------------------------------
def test_two_jobs_call_back_and_the_result_has_the_labels_as_they_were(service: Service) -> None:
    """LR-5, LR-12, LR-19: the body is encoded as JSON once, not escaped twice."""
    tester = started("release", {"base": service.base, "labels": LABELS, "timeout": 30})
    service.call_back(tester, "/prebuild", DONE)
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    result = tester.result("w")
    assert result["prebuild"]["response"] == result["prebuild"]["called_back"] == DONE
    assert result["prebuild"]["initial"] == {"cancelPath": "/cancel/1"}
    assert result["build"]["status"] == result["completion"]["status"] == "SUCCESS"
    assert result["completion"]["response"] == {"labels": LABELS}
    assert service.last("/prebuild").body["labels"] == LABELS
    assert service.paths() == ["/prebuild", "/build", "/complete"]
    assert service.last("/build").headers["cookie"] == "myCookieName=myCookieValue"


def test_a_service_that_is_not_there_is_an_error_that_the_workflow_catches(service: Service) -> None:
    """LR-8, LR-19: without retries; the process continues to its last task."""
    tester = WorkflowTester(flows.asked)
    tester.start("w", {"url": nowhere()})
    assert tester.result("w") == {"status": "SYSTEM_ERROR", "response": None, "initial": None, "called_back": None, "cancel": None, "error": "ConnectionError", "http": None, "attempts": 1}


def test_retries_wait_longer_each_time_and_give_up_with_the_error(service: Service) -> None:
    """LR-13, LR-14: max_attempts includes the first attempt. Pauses are as documented, and logged with the reason of the failure."""
    tester = started("one", {"base": nowhere().rstrip("/"), "retry": {"max_attempts": 4, "first": 0.25, "factor": 2}})
    tester.finish("w")
    assert (tester.result("w")["status"], tester.result("w")["error"], tester.result("w")["attempts"]) == ("SYSTEM_ERROR", "ConnectionError", 4)
    assert [call.attempt for call in tester.calls if call.activity == rest.request.name] == [1, 2, 3, 4]
    assert [line.rpartition("next attempt in ")[2] for line in tester.logs] == ["0.25 s", "0.5 s", "1 s"]
    assert tester.now_ms == 1_700_000_000_000 + 1750


def test_a_cancel_from_outside_stops_the_job_and_waits_for_its_last_word(service: Service) -> None:
    """LR-15, LR-16, LR-20: the second job never begins, and what is shielded runs after the cancel."""
    tester = started("release", {"base": service.base, "timeout": 30})
    tester.command("w", "cancel")
    assert service.last("/cancel/1").body == {"why": "cancelled"}
    service.call_back(tester, "/prebuild", {"cancelled": "true"})
    failed = tester.result("w")["failed"]
    assert (failed["status"], failed["response"], failed["cancel"]) == ("CANCELLED", {"cancelled": "true"}, {"stopping": 1})
    assert tester.result("w")["completion"]["status"] == "SUCCESS"
    assert service.paths() == ["/prebuild", "/cancel/1", "/complete"]


def test_a_job_over_its_time_is_cancelled_with_the_cookie_of_its_node(service: Service) -> None:
    """LR-7, LR-15, LR-16."""
    tester = started("release", {"base": service.base, "timeout": 2})
    tester.advance(2)
    assert service.last("/cancel/1").headers["cookie"] == "myCookieName=myCookieValue"
    tester.advance(1)
    service.call_back(tester, "/prebuild", {"cancelled": "true"})
    assert (tester.result("w")["failed"]["status"], tester.result("w")["failed"]["response"]) == ("TIMED_OUT", {"cancelled": "true"})
    assert tester.result("w")["completion"]["status"] == "SUCCESS"


def test_a_cancel_that_is_not_confirmed_in_time_ends_the_wait_and_a_late_callback_is_harmless(service: Service) -> None:
    """LR-16, LR-21: 2 s and 2 s more."""
    tester = started("release", {"base": service.base, "timeout": 2, "cancel_timeout": 2})
    tester.advance(3.9)
    assert callbacks(tester)
    tester.advance(0.1)
    assert (tester.result("w")["failed"]["status"], tester.result("w")["failed"]["cancel"]) == ("TIMED_OUT", {"stopping": 1})
    service.call_back(tester, "/prebuild", DONE)
    assert tester.counts[-1] in ("unknown-id", "unknown-ref")


def test_without_success_and_cancel_the_callback_is_the_answer(service: Service) -> None:
    """LR-18: without a template the status is SUCCESS, whatever the service says of itself (LR-22)."""
    tester = started("one", {"base": service.base, "timeout": 10, "success": False, "cancel": False})
    service.call_back(tester, "/build", {"status": "error", "revision": "new-scm-tag"})
    assert (tester.result("w")["status"], tester.result("w")["response"]["revision"]) == ("SUCCESS", "new-scm-tag")


def test_a_heart_that_stops_is_a_death_without_a_cancel_request(service: Service) -> None:
    """LR-15, LR-17: heartbeats until 2 s, then 4 s of silence."""
    tester = started("one", {"base": service.base, "timeout": 10, "heartbeat": 4})
    for _ in range(4):
        tester.advance(0.5)
        service.beat(tester, "/build")
    tester.advance(3.9)
    assert callbacks(tester)
    tester.advance(0.1)
    assert tester.result("w")["status"] == "DIED"
    assert service.paths() == ["/build"]


# -- what the reference has no tests for ---------------------------------------------------------------------------------
def test_beats_keep_a_job_alive_for_longer_than_the_heartbeat_timeout(service: Service) -> None:
    """LR-17 (defect 5.3.1: the reference never saw a heartbeat)."""
    tester = started("one", {"base": service.base, "heartbeat": 4})
    for _ in range(10):
        tester.advance(3)
        service.beat(tester, "/build")
        service.beat(tester, "/build")
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    assert tester.result("w")["status"] == "SUCCESS"
    assert timers(tester) == 0


def test_the_heart_need_not_beat_before_the_service_has_answered() -> None:
    """LR-17: heartbeats are required between a successful invocation and the end of waiting. An earlier one is accepted."""
    tester = WorkflowTester(flows.one)
    tester.fake(rest.request, lambda sent: HANGS)
    tester.start("w", {"base": "https://builder.example", "heartbeat": 4})
    [ref] = callbacks(tester)
    tester.resume("w", f"{ref}-heartbeat")
    tester.advance(100)
    tester.resume("w", f"{ref}-heartbeat")
    assert tester.counts[-1] == "resumed"
    tester.resume("w", under_way(tester), {"status": 202})
    tester.advance(3.9)
    assert callbacks(tester) == [ref]
    tester.advance(0.1)
    assert tester.result("w")["status"] == "DIED"


def test_a_job_that_says_no_has_failed(service: Service) -> None:
    """LR-18."""
    tester = started("one", {"base": service.base})
    service.call_back(tester, "/build", {"status": "broken"})
    assert (tester.result("w")["status"], tester.result("w")["response"], tester.result("w")["error"]) == ("FAILED", {"status": "broken"}, None)


def test_a_callback_that_came_as_an_error_has_failed_and_success_is_not_asked(service: Service) -> None:
    """LR-18: `kwflow resume --error`."""
    tester = started("one", {"base": service.base})
    tester.resume("w", callbacks(tester)[0], error={"status": "SUCCESS"})
    assert (tester.result("w")["status"], tester.result("w")["called_back"]) == ("FAILED", {"status": "SUCCESS"})


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (Answer({"a": 1}), {"a": 1}),
        (Answer([1, {"b": None}]), [1, {"b": None}]),
        (Answer(status=204), None),
        (Answer(b"", 201), None),
        (Answer("grüß".encode("latin-1"), headers={"Content-Type": "text/plain; charset=latin-1"}), "grüß"),
        (Answer(b"17", headers={"Content-Type": "text/plain"}), "17"),
        (Answer(b"17", headers={"Content-Type": "application/problem+json"}), 17),
        (Answer(b"17", headers={"Content-Type": "application/octet-stream"}), 17),
        (Answer(b"<a/>", headers={"Content-Type": "application/xml"}), "<a/>"),
    ],
)
def test_without_a_callback_the_response_is_the_answer(service: Service, answer: Answer, response: Any) -> None:
    """LR-9, LR-12: arrays stay arrays, no content is None, and what is not JSON by its Content-Type is text."""
    service.answers["/now"] = answer
    told = started("asked", {"url": f"{service.base}/now"}).result("w")
    assert (told["status"], told["response"], told["initial"], told["called_back"]) == ("SUCCESS", response, response, None)


@pytest.mark.parametrize("status", [300, 302, 400, 401, 404, 409, 422])
def test_what_the_service_does_not_take_is_not_sent_again(service: Service, status: int) -> None:
    """LR-8, and the deviation from it: another attempt would get the same answer."""
    service.answers["/build"] = Answer({"detail": "no"}, status)
    told = started("one", {"base": service.base}).result("w")
    assert (told["status"], told["error"], told["http"], told["attempts"]) == ("SYSTEM_ERROR", "StatusError", status, 1)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_under_one_idempotency_key(service: Service, status: int) -> None:
    """LR-8, LR-13; defect 5.3.8: retries had no key."""
    service.answers["/build"] = [Answer(status=status), Answer(status=status), Answer({})]
    tester = started("one", {"base": service.base})
    tester.advance(3)
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    assert (tester.result("w")["status"], tester.result("w")["attempts"]) == ("SUCCESS", 3)
    assert len({asked.headers["idempotency-key"] for asked in service.asked}) == 1
    assert len({asked.data for asked in service.asked}) == 1


def test_retry_after_is_the_least_pause(service: Service) -> None:
    service.answers["/build"] = [Answer(status=503, headers={"Retry-After": "30"}), Answer({})]
    tester = started("one", {"base": service.base})
    tester.advance(29)
    assert service.paths() == ["/build"]
    tester.advance(1)
    assert service.paths() == ["/build", "/build"]


def test_a_response_that_is_no_json_is_not_tried_again(service: Service) -> None:
    """LR-8: ResponseProcessingException."""
    service.answers["/build"] = Answer(b"{", headers={"Content-Type": "application/json"})
    told = started("one", {"base": service.base}).result("w")
    assert (told["status"], told["error"], told["attempts"]) == ("SYSTEM_ERROR", "ResponseError", 1)


def test_a_response_that_is_too_large_is_refused_and_not_read_to_its_end(service: Service) -> None:
    """Everything has a limit: activity_bytes_max."""
    service.answers["/build"] = Answer(b'"' + b"x" * 256_000 + b'"')
    tester = WorkflowTester(flows.uncaught)
    tester.start("w", {"base": service.base})
    assert "has more than 256000 bytes (limit activity_bytes_max)" in tester.values("workflow-error")[0]


def test_a_cancel_between_two_attempts_ends_the_call(service: Service) -> None:
    """LR-13: the wait ends at once. Without a response there is nothing to cancel at the service."""
    service.answers["/build"] = Answer(status=503)
    tester = started("cancelled_by_signal", {"base": service.base})
    tester.command("w", "signal", {"name": "stop"})
    told = tester.result("w")
    assert (told["status"], told["attempts"]) == ("CANCELLED", 1)
    assert timers(tester) == 0


def test_a_cancel_before_anything_was_sent_sends_nothing(service: Service) -> None:
    """LR-11 and defect 5.3.5: the cancel URL was evaluated as if the request had run."""
    told = started("cancelled_at_once", {"base": service.base}).result("w")
    assert (told["status"], told["attempts"]) == ("CANCELLED", 0)
    assert service.asked == []


def test_a_cancel_while_the_request_is_under_way_waits_for_its_response_and_cancels_what_it_began(service: Service) -> None:
    """LR-16: only the response says how to cancel. Here the first request is never answered by itself."""
    tester = WorkflowTester(flows.cancelled_by_signal)
    tester.fake(rest.request, lambda sent: HANGS if sent.url.endswith("/build") else rest.Response(200, "stopping"))
    tester.start("w", {"base": service.base})
    tester.command("w", "signal", {"name": "stop"})
    assert tester.header("w")["status"] == "waiting"
    tester.resume("w", under_way(tester), {"status": 200, "body": {"cancelPath": "/cancel/2"}})
    assert [call.arguments["sent"].url for call in tester.calls[1:]] == [f"{service.base}/build", f"{service.base}/cancel/2"]
    tester.resume("w", callbacks(tester)[0], "stopped")
    assert (tester.result("w")["status"], tester.result("w")["response"], tester.result("w")["cancel"]) == ("CANCELLED", "stopped", "stopping")


def test_a_cancel_that_nobody_can_be_told_of_ends_the_call_at_once_also_while_the_request_is_under_way() -> None:
    """LR-16: dirty cancel; nothing is held back."""
    tester = WorkflowTester(flows.cancelled_by_signal)
    tester.fake(rest.request, lambda sent: HANGS)
    tester.start("w", {"base": "https://builder.example", "cancel": False, "timeout": 100, "heartbeat": 100})
    tester.command("w", "signal", {"name": "stop"})
    assert (tester.result("w")["status"], timers(tester)) == ("CANCELLED", 0)


def test_a_beat_or_the_end_of_the_time_while_a_cancel_is_held_back_lets_it_go_on() -> None:
    """LR-16: the call still waits for the response."""
    for seconds, then in ((0, "-heartbeat"), (50, "")):
        tester = WorkflowTester(flows.cancelled_by_signal)
        tester.fake(rest.request, lambda sent: HANGS if sent.url.endswith("/build") else rest.Response(200))
        tester.start("w", {"base": "https://builder.example", "timeout": 50, "heartbeat": 100})
        [ref] = callbacks(tester)
        tester.command("w", "signal", {"name": "stop"})
        tester.advance(seconds)
        if then:
            tester.resume("w", ref + then)
        tester.resume("w", under_way(tester), {"status": 200, "body": {"cancelPath": "/cancel/2"}})
        tester.resume("w", ref, "stopped")
        assert (tester.result("w")["status"], tester.result("w")["response"], timers(tester)) == ("CANCELLED", "stopped", 0)


def test_a_request_that_is_not_answered_is_given_up_with_the_cancel_timeout() -> None:
    """LR-16: everything has a limit."""
    tester = WorkflowTester(flows.one)
    tester.fake(rest.request, lambda sent: HANGS)
    tester.start("w", {"base": "https://builder.example", "timeout": 5, "cancel_timeout": 7})
    tester.advance(11.9)
    assert callbacks(tester)
    tester.advance(0.1)
    assert (tester.result("w")["status"], tester.waits("w")) == ("TIMED_OUT", [])


def test_a_second_cancel_does_not_cut_the_first_one_short(service: Service) -> None:
    """LR-16: cancelling takes at most cancel_timeout anyway."""
    tester = started("release", {"base": service.base})
    tester.command("w", "cancel")
    tester.advance(1)
    tester.command("w", "cancel")
    service.call_back(tester, "/prebuild", {"cancelled": "true"})
    assert tester.result("w")["failed"]["response"] == {"cancelled": "true"}


def test_what_is_shielded_is_not_cancelled(service: Service) -> None:
    """LR-20: ignoreCancelSignals."""
    tester = started("shielded", {"base": service.base})
    tester.command("w", "cancel")
    assert service.paths() == ["/build"]
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    assert tester.result("w") == "cancelled after it"


def test_a_timeout_of_the_authors_own_cancels_the_job_while_the_workflow_goes_on(service: Service) -> None:
    """kw.timeout works as it does everywhere. The instance ends when the service has received the cancel and has answered."""
    tester = started("within", {"base": service.base})
    tester.advance(10)
    assert tester.result("w") == "too late"
    assert service.paths() == ["/build", "/cancel/2"]
    assert tester.header("w")["status"] == "closing"
    service.call_back(tester, "/build", {"cancelled": "true"})
    assert tester.ids() == []


def test_two_calls_at_a_time_have_callbacks_of_their_own(service: Service) -> None:
    """X-1: kw.all over calls. Each URL is given to one job."""
    tester = started("both", {"base": service.base})
    first, second = callbacks(tester)
    tester.resume("w", second, {"status": "SUCCESS", "n": 2})
    tester.resume("w", first, {"status": "SUCCESS", "n": 1})
    assert sorted(told["response"]["n"] for told in tester.result("w")) == [1, 2]


def test_in_an_async_def_a_call_is_awaited(service: Service) -> None:
    tester = started("awaited", {"base": service.base})
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    assert tester.result("w")["status"] == "SUCCESS"


def test_a_cancel_request_that_does_not_need_the_response_is_sent_without_one(service: Service) -> None:
    """LR-10: cancelUrlTemplate. It may also contain the callback, and has its own headers."""
    service.answers |= {"/build": Answer(status=503), "/jobs/7": Answer({"stopped": 7})}
    tester = started("with_static_cancel", {"base": service.base})
    tester.advance(10)
    asked = service.last("/jobs/7")
    assert (asked.method, asked.headers["authorization"]) == ("DELETE", "Bearer from-the-engine")
    assert asked.headers["x-callback"].endswith(callbacks(tester)[0])
    tester.advance(30)
    assert (tester.result("w")["status"], tester.result("w")["cancel"]) == ("TIMED_OUT", {"stopped": 7})


def test_a_cancel_that_fails_changes_no_status_and_is_logged(service: Service) -> None:
    """LR-16: errors of the cancel request are ignored, and a function that raises counts as one."""
    service.answers["/cancel/2"] = Answer(status=404)
    tester = started("one", {"base": service.base, "timeout": 2, "cancel_timeout": 2})
    tester.advance(2)
    assert callbacks(tester), "the job may end by itself meanwhile"
    tester.advance(2)
    assert tester.result("w")["status"] == "TIMED_OUT"
    assert "was not cancelled: POST" in tester.logs[-1]
    service.answers["/build"] = Answer({})
    tester = started("one", {"base": service.base, "timeout": 2})
    tester.advance(2)
    assert tester.result("w")["status"] == "TIMED_OUT"
    assert tester.logs[-1] == f"w: rest.call POST {service.base}/build was not cancelled: KeyError: 'cancelPath'"


def test_a_cancel_request_is_tried_again_within_its_time(service: Service) -> None:
    service.answers["/cancel/2"] = [Answer(status=503), Answer({"stopping": 2})]
    tester = started("one", {"base": service.base, "timeout": 2})
    tester.advance(3)
    service.call_back(tester, "/build", {"cancelled": "true"})
    assert (tester.result("w")["cancel"], tester.result("w")["attempts"]) == ({"stopping": 2}, 1)


def test_only_the_first_callback_counts(service: Service) -> None:
    """LR-21."""
    tester = started("one", {"base": service.base})
    service.call_back(tester, "/build", {"status": "SUCCESS", "n": 1})
    service.call_back(tester, "/build", {"status": "SUCCESS", "n": 2})
    assert tester.result("w")["response"]["n"] == 1


def test_a_callback_before_the_response_is_kept(service: Service) -> None:
    """LR-12, X-1, defect 5.3.7: the wait for the ref begins before the request is made."""
    tester = WorkflowTester(flows.one)

    def fast(asked: Asked) -> Answer:
        service.call_back(tester, "/build", {"status": "SUCCESS"})
        return Answer({"cancelPath": "/cancel/2"})

    service.answers["/build"] = fast
    tester.start("w", {"base": service.base})
    told = tester.result("w")
    assert (told["status"], told["response"], told["initial"]) == ("SUCCESS", {"status": "SUCCESS"}, {"cancelPath": "/cancel/2"})


def test_who_has_called_back_is_not_asked_again_although_its_response_was_lost(service: Service) -> None:
    """LR-13: the connection broke after the service had done the job."""
    tester = WorkflowTester(flows.one)

    def lost(sent: rest.Sent) -> rest.Response:
        tester.resume("w", callbacks(tester)[0], {"status": "SUCCESS"})
        raise ConnectionError("reset")

    tester.fake(rest.request, lost)
    tester.start("w", {"base": service.base})
    assert (tester.result("w")["status"], tester.result("w")["attempts"]) == ("SUCCESS", 1)


def test_a_callback_of_an_attempt_that_seemed_to_fail_ends_the_pause(service: Service) -> None:
    service.answers["/build"] = Answer(status=504)
    tester = started("one", {"base": service.base, "retry": {"first": 60}})
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    assert (tester.result("w")["status"], tester.result("w")["attempts"]) == ("SUCCESS", 1)
    assert timers(tester) == 0


def test_cookies_are_added_and_replaced_and_a_response_without_any_wipes_none(service: Service) -> None:
    """LR-7."""
    service.answers["/build"] = [
        Answer(status=503, headers={"Set-Cookie": "node=a; Path=/"}), Answer(status=503), Answer(status=503, headers={"Set-Cookie": "node=b; Path=/"}), Answer({}),
    ]  # fmt: skip
    tester = started("one", {"base": service.base, "retry": {"first": 1, "factor": 1}})
    tester.advance(3)
    assert [asked.headers.get("cookie") for asked in service.asked] == [None, "node=a", "node=a", "node=b"]


def test_headers_are_sent_as_they_are_and_those_of_an_activity_are_stored_nowhere(service: Service) -> None:
    """LR-6: `Basic abc==` was cut off. Secrets stay out of arguments and state."""
    tester = started("one", {"base": service.base})
    assert service.last("/build").headers["authorization"] == "Bearer abc=="
    service.answers["/secret"] = Answer({})
    tester = WorkflowTester(flows.with_secrets)
    tester.start("w", f"{service.base}/secret")
    assert tester.result("w") == "SUCCESS"
    assert service.last("/secret").headers["authorization"] == "Bearer from-the-engine"
    stored = b"".join(tester.state.entries.values()) + b"".join(output.value or b"" for output in tester.outputs)
    assert b"from-the-engine" not in stored


def test_a_secret_that_cannot_be_sent_is_not_told(service: Service) -> None:
    """For example one that was read from a file, with the line break at its end."""
    tester = WorkflowTester(flows.with_bad_secrets)
    tester.start("w", f"{service.base}/secret")
    assert "what activity bad_secret_headers returned cannot be sent: header 'Authorization'" in tester.values("workflow-error")[0]
    assert "hush" not in tester.values("workflow-error")[0]


def test_a_body_is_json_unless_its_content_type_says_otherwise(service: Service) -> None:
    """LR-3: without a body there is no Content-Type."""
    service.answers["/now"] = Answer({})
    for body, headers in ((None, {}), ("text", {}), ("<a/>", {"content-type": "application/xml"})):
        started("asked", {"url": f"{service.base}/now", "body": body, "headers": headers})
    assert [(asked.headers.get("content-type"), asked.data) for asked in service.asked] == [(None, b""), ("application/json", b'"text"'), ("application/xml", b"<a/>")]


def test_urls_are_of_the_gateway_and_hold_ids_encoded(service: Service) -> None:
    """LR-4: the URL was `null…` where no host was configured. The heartbeat's URL is there if heartbeats are waited for."""
    tester = WorkflowTester(flows.one)
    tester.start("a/b ü", {"base": service.base})
    told = service.last("/build").body
    assert re.fullmatch(r"https://gateway\.example/callbacks/a%2Fb%20%C3%BC/callback-[\w-]{32}", told["callbackUrl"])
    assert told["heartBeatUrl"] is None
    service.call_back(tester, "/build", {"status": "SUCCESS"})
    assert tester.result("a/b ü")["status"] == "SUCCESS"


def test_without_a_gateway_url_a_call_is_refused_with_the_remedy(service: Service) -> None:
    """LR-4: it fails at the start."""
    tester = WorkflowTester(flows.one)
    tester._workflows.config = tester.config.model_copy(update={"gateway_url": None})
    tester.start("w", {"base": service.base})
    said = "gateway_url for the callback URL, but it is not set: set it to the URL at which the service reaches `kwflow gateway`, as `url` under [gateway] in kwflow.toml, or as KWFLOW_"
    assert said in tester.values("workflow-error")[0]


@pytest.mark.parametrize("url", ["flows.example", "ftp://flows.example", "https://", "https://flows.example?x=1"])
def test_a_gateway_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="config gateway_url: .*https://flows.example"):
        load_config(None, gateway_url=url)
    assert load_config(None, gateway_url="https://flows.example/x/").gateway_url == "https://flows.example/x"


def test_a_wrong_call_is_refused_where_it_is_made() -> None:
    """Bad input: the error names the thing, the place and the remedy."""
    tester = started("wrong", None)
    parts = ["a method must be a word", "name a host, not 'builder.example'", "the service is not given a URL to call back", "without a callback, body", "timeout=...) must be a timedelta",
             "kw.Retry(max_attempts=1)", "headers_from must be an activity", "leave out heartbeat_timeout", "rest.call(success=...) takes a plain function"]  # fmt: skip
    for told, part in zip(tester.result("w"), parts, strict=True):
        assert part in told


def test_what_cannot_be_sent_is_a_usage_error_at_the_wait() -> None:
    """A header must not affect what follows it: no line breaks."""
    parts = ["has no JSON form", "header 'X': its value is not printable ASCII", "header 'a b': a name must", "(limit header_bytes_max)", "takes a plain function, but this one returns a wait"]
    for told, part in zip(started("unsendable", None).result("w"), parts, strict=True):
        assert part in told


def test_a_call_that_cannot_begin_leaves_nothing_behind() -> None:
    tester = WorkflowTester(flows.too_large)
    tester.start("w")
    tester.finish("w")
    assert "(limit activity_bytes_max)" in tester.result("w")
    assert timers(tester) == 0


def test_the_module_and_the_function_may_be_held_over_a_wait(service: Service) -> None:
    tester = started("held", f"{service.base}/complete")
    tester.advance(1)
    assert tester.result("w") == {"labels": 7}


def test_an_error_of_the_authors_functions_is_raised_at_the_wait_and_leaves_nothing_behind(service: Service) -> None:
    tester = started("one", {"base": service.base, "timeout": 100, "heartbeat": 100})
    service.call_back(tester, "/build", {"no": "status"})
    assert tester.values("workflow-error") == ["KeyError: 'status'"]
    assert timers(tester) == 0


def test_a_request_takes_no_longer_than_it_may() -> None:
    """LR-1: timeouts are passed on to the HTTP client (defect 5.3.3)."""
    with rest_service.serving(lambda asked: Answer()) as base:
        pass  # nobody accepts connections there any more
    with running_as(ActivityInfo("kwflow.rest.request", "w", 1, "w|1")):
        gone: Any = asyncio.run(rest.request.function(rest.Sent("GET", base)))
        late: Any = asyncio.run(rest.request.function(rest.Sent("GET", base, timeout_s=0)))
    assert gone.failure.type == "ConnectionError"
    assert (late.failure.type, late.final) == ("Timeout", False)


def test_an_engine_without_httpx_says_what_to_install(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    tester = WorkflowTester(flows.uncaught)
    tester.start("w", {"base": service.base})
    assert tester.values("workflow-error")[0].endswith("SYSTEM_ERROR: rest.call needs httpx, which is not installed for this engine: pip install 'kwflow[rest]'")


# -- whatever happens, in whatever order ---------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(40))
def test_in_any_order_of_events_a_call_ends_and_leaves_nothing_behind(seed: int) -> None:
    """LR-11 to LR-21: the last word of the service counts unless the call had ended before. Every wait ends in time."""
    chance = random.Random(seed)
    told: list[str] = []
    tester = WorkflowTester(flows.cancelled_by_signal if seed % 2 else flows.one)
    tester.fake(rest.request, lambda sent: HANGS)
    order = {"base": "https://builder.example", "timeout": 100, "heartbeat": 60, "cancel": seed % 3 > 0, "cancel_timeout": 20, "success": False}
    tester.start("w", order)
    [ref] = callbacks(tester)
    for _ in range(25):
        sending = [wait["ref"] for wait in (tester.header("w") or {}).get("waits", []) if wait["kind"] == "activity"]
        event = chance.choice(["time", "time", "beat", "callback", "cancel", *["answer", "refuse", "break"] * len(sending)])
        if event == "time":
            tester.advance(chance.choice([0.5, 5, 30]))
        elif event == "beat":
            tester.resume("w", f"{ref}-heartbeat")
        elif event == "callback" and chance.random() < 0.2:
            waited = bool(callbacks(tester))
            tester.resume("w", ref, "done")
            told += ["done"] * waited
        elif event == "cancel" and chance.random() < 0.3:
            tester.command("w", "cancel") if chance.random() < 0.3 else tester.command("w", "signal", {"name": "stop"})
        elif event == "break":
            tester.resume("w", sending[0], error={"kind": "activity", "type": "Timeout", "message": "gone"})
        elif event in ("answer", "refuse"):
            tester.resume("w", sending[0], {"status": 200 if event == "answer" else chance.choice([404, 503]), "body": {"cancelPath": "/cancel/2"}})
    if tester.header("w") is not None:
        tester.advance(200)
        tester.command("w", "signal", {"name": "stop"})
        tester.advance(30)
    assert (tester.ids(), timers(tester), len(told)) == ([], 0, min(1, len(told)))
    for result in tester.values("workflow-result"):
        assert result["called_back"] == (told[0] if told else None)
        assert result["status"] != "SUCCESS" or told
