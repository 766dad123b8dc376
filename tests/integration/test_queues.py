"""Activities with a queue on a real broker: engines hand calls out and workers answer them, whichever of them is killed (M6.6, BW, ET)."""

import json
import pathlib
import re
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from kwflow.client import Client
from kwflow.config import Config
from kwflow.core.wire import Record
from kwflow.runners.kafka import link as kafka_link
from kwflow.runners.kafka.ledger import Ledger
from tests.commands import Started
from tests.integration.site import ROOT, Site

MODULE = str(pathlib.Path(__file__).parent / "site_of_queues.py")
pytestmark = [pytest.mark.broker, pytest.mark.slow]


class Queues(Site):
    """A site with workers."""

    def __init__(self, broker: str, application: str, directory: pathlib.Path) -> None:
        self.queue = f"{application}-queue"
        self.elsewhere = f"{self.queue}-elsewhere"
        self.config = Config(bootstrap_servers=broker, application_id=application)
        environment = {"QUEUES_TEST_DIRECTORY": str(directory), "QUEUES_TEST_QUEUE": self.queue}
        super().__init__(broker, application, directory, modules=(MODULE,), environment=environment)

    def worker(self, name: str, *more: str) -> Started:
        return self.started(f"worker-{name}.log", "worker", MODULE, *more)

    def said(self, name: str) -> str:
        return (self.directory / f"worker-{name}.log").read_text()

    def start(self, id: str, workflow: str, value: object, *headers: tuple[str, bytes]) -> None:
        self.producer.produce(self.topic("resume"), f"new:{json.dumps(value)}", id, headers=[("kwflow-workflow", workflow.encode()), *headers])
        assert self.producer.flush(20) == 0

    def ran(self, what: str) -> list[list[str]]:
        path = self.directory / "ran"
        return [words for line in path.read_text().splitlines() if (words := line.split())[1] == what] if path.exists() else []

    def results(self, count: int) -> dict[str, object]:
        found = self.read(self.topic("result"), count)
        assert len({id for id, _ in found}) == len(found), "each result once"
        return {id: json.loads(value) for id, value in found}

    def open(self) -> list[str]:
        """The workflows whose calls are open for the next owners of the queue, by the group's positions and notes."""
        consumer = Consumer({"bootstrap.servers": self.broker, "group.id": self.config.workers_group, "log_level": 0})
        try:
            kept = consumer.committed([TopicPartition(self.queue, number) for number in range(4)], timeout=10)
        finally:
            consumer.close()
        ledgers = {place.partition: Ledger(max(0, place.offset), place.metadata or "") for place in kept}
        records = [record for record in kafka_link.read(self.config, self.queue) if record.offset >= ledgers[record.partition].position]
        return sorted(json.loads(record.value or b"{}")["workflow_id"] for record in records if ledgers[record.partition].take(record.offset))


def _lag(metrics: bytes) -> float:
    return sum(float(line.split()[-1]) for line in metrics.decode().splitlines() if line.startswith("kwflow_lag_records{"))


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Queues]:
    site = Queues(broker, application, tmp_path)
    yield site
    site.end()


def test_calls_are_run_by_the_workers_of_their_queue_and_never_by_an_engine(site: Queues) -> None:
    """M6.6, ET-1: the many calls of one workflow are shared among workers, retries included. Its headers go with them (semantics §9.3)."""
    engine = site.engine("one", MODULE)
    site.start("early", "squares", {"numbers": [3]}, ("tenant", b"a"))  # before there is any worker
    workers = [site.worker("a", "--http", "127.0.0.1:0"), site.worker("b")]
    site.until(lambda: "serves" in site.said("a") and "serves" in site.said("b"))
    for n in range(20):
        site.start(f"w{n}", "squares", {"numbers": [n, n + 1, -2, 7]})
    assert site.results(21) == {"early": [9], **{f"w{n}": [n * n, (n + 1) ** 2, 4, 49] for n in range(20)}}
    assert [record.key for record in kafka_link.read(site.config, site.topic("result")) if ("tenant", b"a") in record.headers] == [b"early"]
    pids = {int(words[0]) for words in site.ran("square")}
    assert pids <= {worker.pid for worker in workers} and engine.pid not in pids
    assert len(site.ran("square")) == 1 + 20 * 4 + 20 * 2, "each attempt once"
    at = re.search(r"answered on port (\d+)", site.said("a"))
    assert at is not None
    site.until(lambda: get(f"http://127.0.0.1:{at[1]}/health")[0] == 200)  # it may join late, when the other one has done everything
    assert {one["input"] for one in json.loads(get(f"http://127.0.0.1:{at[1]}/health")[1])["runners"]} == {site.queue, f"{site.queue}-mail"}
    metrics = get(f"http://127.0.0.1:{at[1]}/metrics")[1]
    assert b'kwflow_activities{state="running"} 0.0' in metrics and b'kwflow_partitions{state="owned"' in metrics



def test_what_a_killed_worker_ran_is_begun_again_and_what_it_had_answered_is_not(site: Queues) -> None:
    """M6.6: at least once. One call that takes long does not keep those behind it from being finished for good."""
    site.engine("one", MODULE)
    first = site.worker("a")
    site.start("long", "squares", {"numbers": [1, 2, 3, 4], "gate": "open"})
    site.until(lambda: len(site.ran("square")) == 4)
    for n in range(30):
        site.start(f"w{n}", "squares", {"numbers": [n]})
    site.results(30)
    site.until(lambda: site.open() == ["long"] * 4)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = site.worker("b")
    site.until(lambda: len([words for words in site.ran("square") if int(words[0]) == second.pid]) == 4)
    (site.directory / "open").touch()
    assert site.results(31)["long"] == [1, 4, 9, 16]
    again = [words for words in site.ran("square") if int(words[0]) == second.pid]
    assert {words[2] for words in again} == {"long"}, "nothing that was answered"
    keys = Counter(words[5] for words in site.ran("square") if words[2] == "long")
    assert len(keys) == 4 and set(keys.values()) == {2}, "the same call has the same key"


def test_a_long_call_continues_in_another_worker_where_its_heartbeats_say(site: Queues) -> None:
    """M6.5: the next worker asks the engines for them, also when the engine was killed meanwhile. An `async def`, too."""
    engine = site.engine("one", MODULE)
    first = site.worker("a")
    site.start("w", "copies", 5)
    for n in range(3):
        (site.directory / f"file-{n}").touch()
    named = {f"{name}_topic": site.topic(name) for name in ("resume", "result", "error", "scheduler")}
    with Client.kafka(site.config.model_copy(update=named)) as client:
        site.until(lambda: [given["details"] for given in client.query("w").result(60).get("heartbeats", {}).values()] == [3, 3])
    for process in (first, engine):
        process.send_signal(signal.SIGKILL)
        process.wait()
    site.engine("two", MODULE)
    second = site.worker("b")
    for n in range(3, 5):
        (site.directory / f"file-{n}").touch()
    assert site.results(1) == {"w": [3, 3]}
    begun = [words for words in site.ran("copy") if int(words[0]) == second.pid]
    assert [words[3:] for words in begun] == [["3", "1"], ["3", "1"]]
    assert Counter(words[3] for words in site.ran("copied")) == {str(n): 2 for n in range(5)}


def test_a_worker_that_is_asked_to_end_lets_calls_finish_and_nothing_runs_twice(site: Queues) -> None:
    """BW-15, M6.5: grace; the rest goes to the other worker."""
    site.engine("one", MODULE)
    first = site.worker("a")
    site.start("w", "squares", {"numbers": [1, 2, 3, 4, 5, 6], "gate": "open"})
    site.until(lambda: len(site.ran("square")) == 6)
    first.send_signal(signal.SIGTERM)
    (site.directory / "open").touch()
    assert first.wait(30) == 0
    assert "6 answered" in site.said("a")
    site.worker("b")
    site.start("w2", "squares", {"numbers": [7]})
    assert site.results(2) == {"w": [1, 4, 9, 16, 25, 36], "w2": [49]}
    assert len(site.ran("square")) == 7


def test_partitions_that_come_back_to_a_worker_that_had_too_much_are_read_again(site: Queues) -> None:
    """M6.6: the client keeps a partition paused that was paused when it left. The calls there waited for ever."""
    site.environment["KWFLOW_ACTIVITY_GRACE_S"] = "0"
    site.engine("one", MODULE)
    site.worker("a")
    site.start("w", "squares", {"numbers": list(range(1600)), "gate": "open"})
    site.until(lambda: len(site.ran("square")) == 64)
    site.until(lambda: len(list(kafka_link.read(site.config, site.queue))) == 1600)
    second = site.worker("b")
    site.until(lambda: len(site.ran("square")) > 64)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
    (site.directory / "open").touch()
    assert site.results(1) == {"w": [n * n for n in range(1600)]}


def test_calls_in_a_topic_that_was_made_again_are_run(site: Queues) -> None:
    """The group's offsets of the former topic would skip them."""
    site.engine("one", MODULE)
    for n in range(8):
        site.start(f"w{n}", "squares", {"numbers": [n, n, n, n]})
    first = site.worker("a")
    site.results(8)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    site.worker("b")
    site.start("before", "squares", {"numbers": [1]})
    site.results(9)
    admin = AdminClient({"bootstrap.servers": site.broker, "log_level": 0})
    admin.delete_topics([site.queue])[site.queue].result(20)
    site.until(lambda: site.queue not in admin.list_topics(timeout=10).topics)
    site.run("topics", "create", MODULE, "--partitions", "4")
    site.start("after", "squares", {"numbers": list(range(12))})
    assert site.results(10)["after"] == [n * n for n in range(12)]


def test_a_call_that_nobody_waits_for_is_taken_back(site: Queues) -> None:
    """ET-21: from a worker that runs it, and from the queue."""
    site.engine("one", MODULE)
    site.start("before", "late", 4)
    assert site.results(1) == {"before": "too late"}
    site.worker("a")
    site.start("next", "squares", {"numbers": [1]})
    assert site.results(2)["next"] == [1], "it has joined"
    site.start("during", "late", 5)
    assert site.results(3)["during"] == "too late"
    site.until(lambda: site.ran("cancelled"))
    assert [words[2] for words in site.ran("square")] == ["next", "during"] and [words[2] for words in site.ran("cancelled")] == ["during"]
    site.start("ended", "squares", {"numbers": [8], "gate": "never"})
    site.until(lambda: len(site.ran("square")) == 3)
    site.run("terminate", "ended", "--reason", "not needed")
    site.until(lambda: len(site.ran("cancelled")) == 2)


def test_a_call_that_kills_its_worker_ends_with_its_attempts_and_the_others_are_done(site: Queues) -> None:
    """K19: for example out of memory, or a crash in C. Each worker in turn would die of it, for ever."""
    site.engine("one", MODULE)
    for n in range(10):
        site.start(f"w{n}", "squares", {"numbers": [n]})
    site.start("poison", "poison", None)
    site.environment["KWFLOW_INSTANCE_ID"] = "a"  # so that the next worker need not wait for the end of the last one's session
    worker = site.worker("a")
    while len(list(kafka_link.read(site.config, site.topic("result")))) < 11:
        if worker.poll() is not None:
            assert worker.returncode == 9 and len(site.ran("kill")) <= 4
            worker = site.worker("a")
        time.sleep(0.05)
    assert site.results(11) == {"poison": "WorkerDied", **{f"w{n}": [n * n] for n in range(10)}}
    attempts = Counter(words[2] for words in site.ran("kill"))
    assert attempts.keys() == {"1", "2"} and max(attempts.values()) <= 2
    assert worker.poll() is None


def test_ten_calls_of_ten_workflows_are_one_batch(site: Queues) -> None:
    """Worker-BatchWorker.spec: `{jobBatchMaxTime: 120 s, jobBatchMinSize: 10}`, one call of the handler with exactly ten."""
    site.engine("one", MODULE)
    site.worker("a", "--queue", f"{site.queue}-mail")
    for n in range(10):
        site.start(f"w{n}", "mail", "bad" if n == 3 else f"ada{n}")
    found = site.results(10)
    assert found["w3"] == "bounced: bad" and found["w4"] == "sent to ada4"
    assert [words[2] for words in site.ran("batch")] == ["10"]


def test_a_worker_in_any_language_reads_a_topic_and_writes_a_record(site: Queues) -> None:
    """M6.6, docs/WIRE.md: an answer is a resume record, and an error is what ACTIVITIES.md says."""
    site.engine("one", MODULE)
    site.start("w", "foreign", 6)
    site.start("x", "foreign", 7)
    jobs = {job["workflow_id"]: job for _, value in site.read(site.elsewhere, 2) for job in [json.loads(value)]}
    job = jobs["w"]
    assert job == {
        "resume_topic": site.topic("resume"), "workflow_id": "w", "ref": job["ref"], "activity": "elsewhere", "attempt": 1,
        "idempotency_key": f"w|{job['ref']}", "arguments": {"n": 6},
    }  # fmt: skip
    site.send("w", json.dumps({"ref": job["ref"], "value": 36}))
    error = {"kind": "activity", "type": "OutOfStock", "message": "none left", "final": True}
    site.send("x", json.dumps({"ref": jobs["x"]["ref"], "error": error}))
    assert site.results(2) == {"w": 36, "x": ["OutOfStock", "none left"]}


def test_calls_that_a_worker_does_not_know_keep_no_other_waiting_and_are_told_of(site: Queues) -> None:
    """G3, docs/ACTIVITIES.md: they stay where they are until there is a worker that knows them."""
    for n in range(1200):
        job = {"resume_topic": site.topic("resume"), "workflow_id": f"u{n}", "ref": "1:1", "activity": "nowhere", "attempt": 1, "idempotency_key": f"u{n}|1:1", "arguments": {}}
        site.producer.produce(site.queue, json.dumps(job), f"u{n}|1:1")
    assert site.producer.flush(20) == 0
    site.engine("one", MODULE)
    worker = site.worker("a")
    site.start("w", "squares", {"numbers": [2, 3, 4, 5]})
    assert site.results(1) == {"w": [4, 9, 16, 25]}
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert site.said("a").count("no activity nowhere in this worker") == 1
    assert len(site.open()) == 1200


def test_what_is_no_call_is_a_dead_letter_and_what_is_another_applications_is_left_to_it(site: Queues) -> None:
    """G3."""
    other = {"resume_topic": "another", "workflow_id": "w", "ref": "1:1", "activity": "square", "attempt": 1, "idempotency_key": "w|1:1", "arguments": {"n": 1}}
    for value in ("no json", json.dumps({**other, "resume_topic": site.topic("resume"), "ref": "mine"}), json.dumps(other), None):
        site.producer.produce(site.queue, value, "w|1:1")
    assert site.producer.flush(20) == 0
    site.engine("one", MODULE)
    worker = site.worker("a", "--http", "127.0.0.1:0")
    site.start("w", "squares", {"numbers": [2]})
    assert site.results(1) == {"w": [4]}
    letters: list[Record] = []
    site.until(lambda: letters.extend(list(kafka_link.read(site.config, site.config.dead_letter_topic))[len(letters) :]) or len(letters) == 2)  # another producer writes them
    said = [dict(letter.headers) for letter in letters]
    assert [headers["kwflow-error-reason"] for headers in said] == [b"bad-job", b"bad-job"]
    assert {headers["kwflow-error-topic"] for headers in said} == {site.queue.encode()}
    url = re.search(r"answered on port (\d+)", site.said("a"))
    assert url is not None
    site.until(lambda: _lag(get(f"http://127.0.0.1:{url[1]}/metrics")[1]) == 0)  # the markers of the engine's transactions are not calls
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert "1 answered, 2 dead-letter, 1 of-another-application, 1 taken" in site.said("a").splitlines()[-1]


def test_an_instance_whose_call_a_worker_has_is_shown_and_not_forked(site: Queues) -> None:
    """ET-2: the waiting call is shown without the worker."""
    site.engine("one", MODULE)
    site.start("w", "foreign", 6)
    site.read(site.elsewhere, 1)
    [wait] = json.loads(site.run("show", "w", "--json"))["waits"]
    assert (wait["kind"], wait["name"], wait["queue"], wait["attempt"], wait["function"]) == ("job", "elsewhere", site.elsewhere, 1, "foreign")
    assert f"only the queue {site.elsewhere} has the arguments of its call of elsewhere" in site.fails(1, "fork", "w")


def test_a_worker_says_what_it_lacks_before_it_begins(site: Queues) -> None:
    """Wrong usage is 2, what is missing on the broker is 1, and an unknown queue is refused with the known ones."""
    said = site.refused("worker", MODULE, "--queue", "nope")
    assert f"no activity for the queue nope in these modules; there are {site.queue}, {site.elsewhere}, {site.queue}-mail" in said
    assert "activity elsewhere has no body in these modules" in site.refused("worker", MODULE, "--queue", site.elsewhere)
    assert "no activity has a queue; set one with @kw.activity(queue=...)" in site.refused("worker", str(ROOT / "workflows/trip_booking.py"))
    site.environment["QUEUES_TEST_QUEUE"] = "not-created"
    assert "topic not-created is missing; topic not-created-mail is missing (create what is missing with kwflow topics create" in site.fails(1, "worker", MODULE)
