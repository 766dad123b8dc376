"""Moving in place beside what goes on: calls that end meanwhile, records of the same batch, handlers, forks, keys and the history (decision 0061)."""

import json
import pathlib
import threading
from typing import Any

import msgspec
import pytest

from kwflow import durable
from kwflow.client import Client
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.wire import Record
from kwflow.durable import registry
from kwflow.ports import Decision
from kwflow.runners.code import CodeStore
from kwflow.runners.hosted import Hosted
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.testing import MemoryStore
from tests.spec.test_code import Site
from tests.spec.test_migrate_in_place import moved

QUEUED = """
@kw.activity(name="{0}.work", queue="{0}", retry=kw.Retry(max_attempts=2, first=10, jitter=0), timeout=60)
def work(n: int) -> int: ...
def main(n):
    value = yield work(n)
    {1}
    yield kw.suspend("told")
    return [value, {2}]
"""
UPDATED = """
def main(opts):
    limit = 3
    def small(value):
        if value > limit{0}:
            raise ValueError(f"over {{limit{0}}}")
    def handle(update):
        answer = yield kw.suspend(f"ask-{{update.value}}")
        kw.reply(update, [answer, {1}])
    updates = kw.on_update("u", validator=small)
    first = kw.spawn(handle((yield updates)))
    second = kw.spawn(handle((yield updates.wait())))
    yield kw.all([first, second])
    return {1}
"""


def in_queue(site: Site) -> list[dict[str, Any] | None]:
    return [json.loads(one.value) if one.value is not None else None for one in site.w.outputs if one.topic == site.name]


def test_the_result_of_a_call_in_a_queue_that_parked_its_instance_is_applied_once_in_the_mended_code() -> None:
    """K17, M6.6: the call is not made again, and not taken back."""
    site = Site("def main(n):\n    yield kw.suspend('r')")
    site.deploy(QUEUED.format(site.name, "lock = __import__('threading').Lock()", "'old'"))
    site.w._workflows.queues = True
    site.w.start("v", 1)
    [job] = in_queue(site)
    site.w.resume("v", job["ref"], 5)  # type: ignore[index] # it is not None
    site.w.resume("v", "told")
    assert site.w.header("v")["status"] == "parked"
    site.deploy(QUEUED.format(site.name, "value += 1", "'new'"))
    site.w._workflows.queues = True
    assert moved(site)["status"] == "ok"
    assert site.w.result("v") == [6, "new"]
    assert in_queue(site) == [job]


@pytest.mark.parametrize("in_pause", [False, True])
def test_a_call_in_a_queue_is_taken_back_and_made_again_by_the_code_that_it_was_moved_to(in_pause: bool) -> None:
    """M6.4: under the key of the first attempt; its late result is ignored."""
    site = Site("def main(n):\n    yield kw.suspend('r')")
    site.deploy(QUEUED.format(site.name, "pass", "'old'"))
    site.w._workflows.queues = True
    site.w.start("v", 1)
    site.w.advance(60 if in_pause else 1)
    site.deploy(QUEUED.format(site.name, "pass", "'new'").replace("first=10", "first=20"))
    site.w._workflows.queues = True
    assert moved(site)["status"] == "ok"
    site.w.advance(20 if in_pause else 79)
    first, nothing, second = in_queue(site)
    assert first is not None and nothing is None and second is not None and second["idempotency_key"] == first["idempotency_key"]
    for job in (first, second, second):
        site.w.resume("v", job["ref"], job["attempt"])
    site.w.resume("v", "told")
    assert site.w.result("v") == [2, "new"]


def test_an_update_is_answered_once_by_the_handler_as_it_is_now_and_the_next_one_meets_the_new_validator() -> None:
    """M2.4: closures of the function that was moved, with the variables that they share with it."""
    site = Site(UPDATED.format("", "'old'"))
    site.w.start("v")
    assert site.w.command("v", "update", {"name": "u", "value": 4})["message"] == "ValueError: over 3"
    assert site.w.command("v", "update", {"name": "u", "value": 3}) is None, "its handler waits"
    site.deploy(UPDATED.format(" + 7", "'new'"))
    assert moved(site)["status"] == "ok"
    assert site.w.command("v", "update", {"name": "u", "value": 11})["message"] == "ValueError: over 10"
    assert site.w.command("v", "update", {"name": "u", "value": 10}) is None
    site.w.resume("v", "ask-10", "b")
    site.w.resume("v", "ask-3", "a")
    assert site.w.result("v") == "new"
    assert [reply["value"] for reply in site.w.replies if reply["status"] == "ok" and isinstance(reply["value"], list)] == [["b", "new"], ["a", "new"]]


def test_of_an_instance_and_its_fork_each_goes_on_in_its_own_code() -> None:
    """Decision 0048."""
    text = "def main(o):\n    seen = []\n    def see(x):\n        seen.append([x, {0}])\n    see((yield kw.suspend('a')))\n    see((yield kw.suspend('b')))\n    return seen"
    site = Site(text.format("'old'"))
    site.w.resume("w", "a", 1)
    site.w.command("w", "fork", {"id": "copy"})
    site.deploy(text.format("'new'"))
    assert moved(site, "copy")["status"] == "ok"
    assert site.versions("w") != site.versions("copy")
    site.w.command("copy", "fork", {"id": "third"})
    for id in ("w", "copy", "third"):
        site.w.resume(id, "b", id)
    assert site.w.result("w") == [[1, "old"], ["w", "old"]]
    assert [site.w.result(id) for id in ("copy", "third")] == [[[1, "old"], ["copy", "new"]], [[1, "old"], ["third", "new"]]]


class Engine:
    """Engines on the same store and log, one after another, each with its own code and configuration; instances stay live between records."""

    def __init__(self, name: str) -> None:
        self.name, self.store, self.code, self.offset = name, MemoryStore(), list[Record](), 0

    def start(self, source: str, **options: Any) -> None:
        module = durable.load_source(self.name, "import kwflow as kw\n" + source, f"{self.name}.py")
        config = Config(**options)
        sources = CodeStore(lambda start: self.code[start:], config.signing_keys)
        self.processor = WorkflowProcessor(config, Workflows({"main": module.main}, "main"), frozenset(), sources=sources)

    def apply(self, *records: tuple[bytes, str]) -> list[Decision]:
        """Apply these, each a value and an op, as one batch."""
        overlay, made = Overlay(self.store), []
        for value, op in records:
            self.offset += 1
            headers = (("kwflow-op", op.encode()), ("kwflow-reply-to", b"0/test"), ("kwflow-request", op.encode())) if op else ()
            made.append(Record("workflow-resume", 0, self.offset, 0, b"a", value, headers))
        decisions = self.processor.decide(overlay, made, 0)
        self.store.apply(overlay.changes)
        for output in [output for decision in decisions for output in decision.outputs if output.topic.endswith("-code")]:
            self.code.append(Record(output.topic, 0, len(self.code), 0, output.key, output.value))
        return decisions


SUMS = "def main(opts):\n    total = 0\n    while total < 100:\n        more = yield kw.wait_signal('n')\n        total += more{0}\n    return total"
MOVE = (b'{"in_place":true}', "migrate")


def signal(n: int) -> tuple[bytes, str]:
    return json.dumps({"name": "n", "value": n}).encode(), "signal"


def test_records_of_one_batch_before_and_after_the_move_are_applied_on_either_side_of_it() -> None:
    """K15: the instance is live until then; what is live afterwards is what was moved."""
    engine = Engine("moves_in_a_batch")
    engine.start(SUMS.format(""))
    engine.apply((b"new:null", ""), signal(1))
    engine.start(SUMS.format(" * 10"))
    made = engine.apply(signal(2), MOVE, signal(3), MOVE, signal(6))
    assert [one.counts for one in made] == [("signal",), ("migrate",), ("signal",), ("not-migrated",), ("signal",)]
    [made_last] = engine.apply(signal(1))
    assert made_last.outputs[-1].value == b"103", "1 + 2 as the old code counts, 30 + 60 + 10 as the new"


ONE, TWO = "1" * 32, "2" * 32


def test_an_instance_is_moved_from_a_source_that_one_of_the_keys_signed_and_from_no_other() -> None:
    """Who can write to the code topic cannot choose where an instance goes on; what is moved is signed with the current key."""
    engine = Engine("moves_with_keys")
    engine.start(SUMS.format(""), snapshot_keys=[ONE])
    engine.apply((b"new:null", ""), signal(1))
    signed = [*engine.code]

    def deploy(*keys: str) -> None:
        engine.start(SUMS.format(" * 100"), snapshot_keys=list(keys))
        registry._replaced[:] = [known for known in registry._replaced if known.name != engine.name]  # as in another process

    engine.code = [msgspec.structs.replace(record, value=(record.value or b"").partition(b"\nHMAC")[0]) for record in signed]
    deploy(TWO, ONE)
    before = engine.store.entries[b"a"]
    [refused] = engine.apply(MOVE)
    assert "is not stored, so it is not known where it waits" in refused.logs[0] and engine.store.entries[b"a"] == before
    engine.code = signed
    deploy(TWO)
    [refused] = engine.apply(MOVE)
    assert "but no key of snapshot_keys signed it" in refused.logs[0] and engine.store.entries[b"a"] == before
    deploy(TWO, ONE)
    assert [one.counts for one in engine.apply(MOVE)] == [("migrate",)]
    assert snapshot.seal_of(engine.store.entries[b"a"], [TWO.encode()]).startswith("verified")
    deploy(TWO)
    [last] = engine.apply(signal(1))
    assert last.outputs[-1].value == b"101"


def events(made: list[Decision]) -> list[dict[str, Any]]:
    return [json.loads(output.value or b"") for one in made for output in one.outputs if output.topic == "history"]


def test_a_move_is_in_the_history() -> None:
    """Decision 0059: it says where the instance waits in the new code; of one that was parked, the events of what it held say that."""
    engine = Engine("moves_with_history")
    engine.start(SUMS.format(""), history_topic="history")
    engine.apply((b"new:null", ""))
    engine.start("# one line further down\n" + SUMS.format("\n        lock = __import__('threading').Lock()"), history_topic="history")
    [event] = events(engine.apply(MOVE, MOVE))
    assert (event["event"], event["by"], event["status"], event["waits"][0]["line"]) == ("migrate", {"kind": "migrate", "in_place": True}, "waiting", 6)
    engine.apply(signal(1), signal(2))
    engine.start(SUMS.format(""), history_topic="history")
    found = events(engine.apply(MOVE))
    assert [(event["event"], event.get("status")) for event in found] == [("migrate", None), ("signal", "waiting"), ("signal", "waiting")]
    engine.apply((b'{"reason":"audit"}', "pause"))
    engine.start(SUMS.format(" * 2"), history_topic="history")
    [event] = events(engine.apply(MOVE))
    assert (event["event"], event["status"], event["reason"]) == ("migrate", "paused", "audit")


RUNS = """
from tests.spec.test_moves_of_what_runs import RUNNING
@kw.activity(name="moves_while_running.work")
{0}
def main(n):
    value = yield work(n)
    return [value, {1}]
"""
WORKS = {
    "on a thread": "def work(n):\n    return RUNNING[-1].work(n)",
    "on the event loop": "async def work(n):\n    import asyncio\n    return await asyncio.to_thread(RUNNING[-1].work, n)",
}
RUNNING: list["Running"] = []


class Running:
    """An activity that runs until it may end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()
        RUNNING.append(self)

    def work(self, n: int) -> int:
        self.begun.release()
        assert self.may_end.wait(20)
        return n + 1


@pytest.mark.parametrize("how", WORKS)
def test_an_activity_that_runs_while_its_instance_is_moved_runs_once_and_is_answered_once(how: str, tmp_path: pathlib.Path) -> None:
    """M6.2, M6.5: the engine that has the new code has begun it again, as the one before it went down; then it goes on under the move."""
    running = Running()

    def engine(text: str) -> Hosted:
        module = durable.load_source("moves_while_running", "import kwflow as kw\n" + RUNS.format(WORKS[how], text), "moves_while_running.py")
        return Hosted(tmp_path, Workflows({"main": module.main}, "main"), Config(activity_grace_s=0), on_log=lambda line: None)

    with engine("'old'") as hosted, Client.embedded(hosted.engine) as client:
        client.start("a", 1).result(20)
        assert running.begun.acquire(timeout=20)
    with engine("'new'") as hosted, Client.embedded(hosted.engine) as client:
        assert running.begun.acquire(timeout=20)
        client.migrate("a", in_place=True).result(20)
        running.may_end.set()
        assert client.result("a").result(20) == [2, "new"]
        assert not running.begun.acquire(blocking=False)
