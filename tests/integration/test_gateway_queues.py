"""External tasks over HTTP: a gateway lends calls of a queue to workers that know neither Kafka nor Python (ET-3..ET-23)."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from kwflow.client import Client
from kwflow.runners.kafka import link as kafka_link
from kwflow.worker import Lending
from tests.embedded.serving import Serving
from tests.integration.test_queues import MODULE, Queues

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Queues]:
    site = Queues(broker, application, tmp_path)
    site.config = site.config.model_copy(update={f"{name}_topic": site.topic(name) for name in ("resume", "result", "error", "scheduler")})
    yield site
    site.end()


@contextlib.contextmanager
def gateway(site: Queues) -> Iterator[Serving]:
    with Lending(site.config, site.elsewhere, lambda line: None) as lending, Serving(site.config, lambda: Client.kafka(site.config), [lending]) as serving:
        yield serving


def fetch(serving: Serving, queue: str, worker: str = "w", **options: Any) -> list[dict[str, Any]]:
    answer = serving.http.post(f"/queues/{queue}/fetch", params={"worker": worker, **options})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()
    return found


def call(queue: str, job: dict[str, Any], what: str) -> str:
    return f"/queues/{queue}/calls/{quote(job['workflow_id'], safe='')}/{quote(job['ref'], safe='')}/{what}"


def test_a_worker_fetches_locks_and_completes_fails_or_rejects(site: Queues) -> None:
    """ET-1, ET-3, ET-10, ET-12, ET-13, ET-16, ET-21: 204 means that the answer is committed."""
    site.engine("one", MODULE)
    for id in ("a/1", "b", "c", "d"):
        site.start(id, "foreign", 6)
    with gateway(site) as serving:
        jobs: dict[str, dict[str, Any]] = {}
        while len(jobs) < 4:
            jobs |= {job["workflow_id"]: job for job in fetch(serving, site.elsewhere, max=10, wait=30, lock=600)}
        assert {name: jobs["b"][name] for name in ("activity", "attempt", "arguments", "resume_topic")} == {
            "activity": "elsewhere", "attempt": 1, "arguments": {"n": 6}, "resume_topic": site.topic("resume"),
        }  # fmt: skip
        assert fetch(serving, site.elsewhere, worker="another") == []
        assert f'kwflow_gateway_calls{{queue="{site.elsewhere}",state="locked"}} 4.0' in (metrics := serving.http.get("/metrics").text)
        assert f'kwflow_gateway_wait_seconds_count{{queue="{site.elsewhere}"}} 4.0' in metrics and f'le="60.0",queue="{site.elsewhere}"}} 4.0' in metrics
        stolen = serving.http.post(call(site.elsewhere, jobs["b"], "complete"), params={"worker": "another"}, json=1)
        assert (stolen.status_code, stolen.json()["code"]) == (409, "locked") and "is locked by w, not by another" in stolen.json()["detail"]
        by = {"worker": "w"}
        assert serving.http.post(call(site.elsewhere, jobs["a/1"], "complete"), params=by, json=36).status_code == 204
        assert serving.http.post(call(site.elsewhere, jobs["b"], "fail"), params=by, json={"message": "none left", "type": "OutOfStock", "final": True}).status_code == 204
        assert serving.http.post(call(site.elsewhere, jobs["c"], "reject"), params=by, json={"code": "no", "message": "never"}).status_code == 204
        again = serving.http.post(call(site.elsewhere, jobs["a/1"], "complete"), params=by, json=2)
        assert (again.status_code, again.json()["code"]) in ((404, "unknown_ref"), (404, "not_found"))
        wrong = serving.http.post(call(site.elsewhere, jobs["d"], "fail"), params=by, json={"final": True})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "bad_arguments") and "`message`" in wrong.json()["detail"]
        extended = serving.http.post(call(site.elsewhere, jobs["d"], "extend"), params={**by, "lock": 30})
        assert extended.status_code == 200 and extended.json()["locked_until"] < jobs["d"]["locked_until"]
        beat = serving.http.post(call(site.elsewhere, jobs["d"], "heartbeat"), params={**by, "lock": 40}, json={"done": 3})
        assert beat.status_code == 200 and beat.json()["locked_until"] > extended.json()["locked_until"]
        assert serving.http.get("/workflows/d").json()["heartbeats"][jobs["d"]["ref"]]["details"] == {"done": 3}
        large = serving.http.post(call(site.elsewhere, jobs["d"], "heartbeat"), params=by, json="x" * 10_000)
        assert (large.status_code, large.json()["code"]) == (413, "too_large")
        over = serving.http.post(call(site.elsewhere, jobs["c"], "heartbeat"), params=by, json=1)
        assert (over.status_code, over.json()["code"]) == (409, "not_locked")
        assert serving.http.post(call(site.elsewhere, jobs["d"], "release"), params=by).status_code == 204
        gone = serving.http.post(call(site.elsewhere, jobs["d"], "extend"), params=by)
        assert (gone.status_code, gone.json()["code"]) == (409, "not_locked")
        [released] = fetch(serving, site.elsewhere, worker="another", wait=10)
        assert released["workflow_id"] == "d"
        assert serving.http.post(call(site.elsewhere, released, "complete"), params={"worker": "another"}, json=4).status_code == 204
        assert serving.http.get("/workflows/c/outcome", params={"wait": 20}).json()["value"] == "BusinessError: no: never"
        unknown = serving.http.post("/queues/nope/fetch", params=by)
        assert (unknown.status_code, unknown.json()["code"]) == (404, "no_queue") and site.elsewhere in unknown.json()["detail"]
        assert serving.http.post(f"/queues/{site.elsewhere}/fetch").status_code == 400
    assert site.results(3) == {"a/1": 36, "b": ["OutOfStock", "none left"], "d": 4}


def test_the_answer_to_a_call_of_a_paused_workflow_is_the_operators_and_the_call_is_not_lent_again(site: Queues) -> None:
    """ET-21: the gateway waited in vain for a reply, and lent the call again when its lock was over, for as long as the workflow was paused."""
    site.environment["KWFLOW_HOLD_MAX"] = "1"
    site.engine("one", MODULE)
    for id in ("kept", "full"):
        site.start(id, "foreign", 6)
    by = {"worker": "w"}
    with gateway(site) as serving, Client.kafka(site.config) as client:
        jobs: dict[str, dict[str, Any]] = {}
        while len(jobs) < 2:
            jobs |= {job["workflow_id"]: job for job in fetch(serving, site.elsewhere, max=10, wait=30, lock=1)}
        for id in jobs:
            client.pause(id, "audit").result(30)
        client.signal("full", "s")
        client.query("full").result(30)  # is answered after the signal was kept
        answers = {id: serving.http.post(call(site.elsewhere, job, "complete"), params=by, json=36) for id, job in jobs.items()}
        assert {id: (answer.status_code, answer.json()["code"]) for id, answer in answers.items()} == {"kept": (423, "held"), "full": (429, "hold_full")}
        assert "it is paused (audit); this record is kept" in answers["kept"].json()["detail"]
        assert fetch(serving, site.elsewhere, wait=1.5) == []
        for id in jobs:
            client.unpause(id).result(30)
        assert serving.http.post(call(site.elsewhere, jobs["full"], "complete"), params=by, json=37).status_code == 204
    assert site.results(2) == {"kept": 36, "full": 37}


def test_a_call_is_not_lent_again_as_long_as_its_worker_repeats_an_answer_that_no_engine_replies_to(site: Queues) -> None:
    """ET-17: while engines were away, or restarted, others did the work again each time a short lock was over."""
    site.config = site.config.model_copy(update={"command_timeout_s": 2.0})
    engine = site.engine("one", MODULE)
    site.start("a", "foreign", 6)
    with gateway(site) as serving:
        [job] = fetch(serving, site.elsewhere, wait=30, lock=1)  # perhaps over before the first answer: nobody has fetched it since
        engine.kill()
        engine.wait()
        for _ in range(2):
            unknown = serving.http.post(call(site.elsewhere, job, "complete"), params={"worker": "w"}, json=36)
            assert (unknown.status_code, unknown.json()["code"]) == (504, "outcome_unknown")
        assert fetch(serving, site.elsewhere, worker="another") == []
        site.engine("one", MODULE)
        assert site.results(1) == {"a": 36}
        again = serving.http.post(call(site.elsewhere, job, "complete"), params={"worker": "w"}, json=36)
        assert (again.status_code, again.json()["code"]) == (404, "not_found")


def test_headers_of_a_call_are_lent_and_travel_on_with_its_answer(site: Queues) -> None:
    """Semantics §9.3: traces and tenants continue in workers that speak HTTP, and behind them. kwflow's own headers are not passed on."""
    site.engine("one", MODULE)
    given: list[tuple[str, bytes | None]] = [("tenant", b"old"), ("tenant", "Zoë".encode()), ("traceparent", b"00-1-2-01"), ("raw", b"\xff\x00"), ("empty", b""), ("none", None)]
    for id in ("result", "error"):
        site.start(id, "foreign", 6, *given)  # type: ignore[arg-type]
    with gateway(site) as serving:
        jobs: dict[str, dict[str, Any]] = {}
        while len(jobs) < 2:
            jobs |= {job["workflow_id"]: job for job in fetch(serving, site.elsewhere, max=10, wait=30, lock=600)}
        assert jobs["result"]["headers"] == {"tenant": "Zoë", "traceparent": "00-1-2-01", "raw": "\\xff\x00", "empty": "", "none": None}
        assert serving.http.post(call(site.elsewhere, jobs["result"], "complete"), params={"worker": "w"}, json=36).status_code == 204
        assert serving.http.post(call(site.elsewhere, jobs["error"], "reject"), params={"worker": "w"}, json={"code": "no"}).status_code == 204
    found = {record.key: record for topic in ("result", "error") for record in kafka_link.read(site.config, site.topic(topic))}
    for record in found.values():
        assert [pair for pair in record.headers if not pair[0].startswith("kwflow-")] == given
    assert found.keys() == {b"result", b"error"}


def test_a_gateway_lends_several_queues_whatever_identity_its_machine_has(site: Queues) -> None:
    """With that identity, they and the workers of that machine would be one member of the group, and evict each other."""
    site.engine("one", MODULE)
    config, said, found = site.config.model_copy(update={"instance_id": "here"}), list[str](), set[str]()
    with Lending(config, site.elsewhere, said.append) as one, Lending(config, f"{site.queue}-mail", said.append) as other:
        site.start("w", "foreign", 6)
        site.start("m", "mail", "ada")
        site.until(lambda: found.update(call.workflow_id for lending in (one, other) for call in lending.lent.fetch(9, "w", 600)) or found == {"w", "m"})
    assert said == []


def test_a_gateway_that_dies_leaves_what_is_open_to_the_next_and_any_gateway_takes_an_answer(site: Queues) -> None:
    """ET-11: the answer of a worker that fetched from the first gateway counts. What it did not answer is fetched again, and nothing else."""
    site.engine("one", MODULE)
    for id in ("a", "b", "c"):
        site.start(id, "foreign", 6)
    with gateway(site) as first:
        jobs: dict[str, dict[str, Any]] = {}
        while len(jobs) < 3:
            jobs |= {job["workflow_id"]: job for job in fetch(first, site.elsewhere, max=10, wait=30, lock=600)}
        assert first.http.post(call(site.elsewhere, jobs["a"], "complete"), params={"worker": "w"}, json=1).status_code == 204
    with gateway(site) as second:
        assert second.http.post(call(site.elsewhere, jobs["b"], "complete"), params={"worker": "w"}, json=2).status_code == 204
        found: list[str] = []
        while "c" not in found:
            found += [job["workflow_id"] for job in fetch(second, site.elsewhere, worker="another", max=10, wait=30)]
        assert "a" not in found
        assert second.http.post(call(site.elsewhere, jobs["c"], "complete"), params={"worker": "another"}, json=3).status_code == 204
    assert site.results(3) == {"a": 1, "b": 2, "c": 3}
