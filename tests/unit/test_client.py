"""A client whose engine is this test: replies and outcomes come when the test sends them, and in the order of the test (M1, M4)."""

import gc
import pathlib
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kwflow.client import Client, Future
from kwflow.config import Config
from kwflow.core import wire
from kwflow.core.values import json_dumps
from kwflow.core.wire import Record
from kwflow.errors import CommandError, OutcomeError, OutcomeUnknown, TransportError, UsageError
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.kafka.encryption import Encryption
from tests.waiting import until

TIMEOUT_S = 1.0


class Site:
    """A client, what it has asked, and the answers that it gets."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.config = Config(command_timeout_s=TIMEOUT_S)
        self.engine = Embedded(directory, self.config, sync=False)
        self.client = Client.embedded(self.engine, self.config)
        self.read = 0

    def asked(self) -> Record:
        """Return the client's next record."""
        deadline = time.monotonic() + 20
        while not (found := self.engine.read(self.config.resume_topic, self.read, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.read = found[0].offset + 1
        return found[0]

    def reply(self, record: Record, status: str = "ok", value: object = None, key: bytes | None = None) -> None:
        body = {"request": wire.header(record, "kwflow-request"), "status": status, "message": "", "value": value}
        self.engine.append(self.config.reply_topic, key or self.client._link.process.encode(), json_dumps(body))

    def ends(self, start_id: str, value: object, kind: str = "result") -> None:
        headers = (("kwflow-outcome", kind.encode()), ("kwflow-start-id", start_id.encode()))
        self.engine.append(self.config.result_topic or "", b"w", json_dumps(value), headers)

    def told(self) -> None:
        """Wait until everything that was written has reached the client."""
        ends = {topic: self.engine.end(topic) for topic in self.client._link._positions}  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while self.client._link._positions != ends:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.client.close()
    site.engine.close()


def test_an_outcome_that_came_before_it_was_known_whose_it_is_reaches_its_caller(site: Site) -> None:
    """M1.3: the outcome of another run does not."""
    future = site.client.result("w")
    query = site.asked()
    site.ends("another", 0)
    site.ends("mine", 1)
    site.told()
    assert not future.done()
    site.reply(query, value={"start_id": "mine"})
    assert future.result(20) == 1


def test_an_outcome_that_comes_once_it_is_known_whose_it_is_reaches_its_caller(site: Site) -> None:
    future = site.client.result("w")
    site.reply(site.asked(), value={"start_id": "mine"})
    site.told()
    site.ends("another", 0)
    site.told()
    assert not future.done()
    site.ends("mine", 1)
    assert future.result(20) == 1


@pytest.mark.parametrize(("start_id", "value"), [(None, 3), ("first", 1), ("second", 2), ("never", None)])
def test_an_outcome_that_only_its_topic_has_is_found_there(site: Site, start_id: str | None, value: int | None) -> None:
    """It is the outcome of the requested run, or of the last one."""
    for number, name in enumerate(("first", "second", "third"), 1):
        site.ends(name, number)
    site.told()
    future = site.client.result("w", start_id=start_id)
    site.reply(site.asked(), status="not_found")
    if value is not None:
        assert future.result(20) == value
    else:
        with pytest.raises(CommandError):
            future.result(20)


def test_a_caller_whose_command_was_answered_waits_for_as_long_as_it_takes(site: Site) -> None:
    """The timeout of a command is for its reply alone."""
    waiting = site.client.start_and_wait("w", start_id="mine")
    limited = site.client.result("v", timeout=2 * TIMEOUT_S)
    site.reply(site.asked(), status="started")
    site.reply(site.asked(), value={"start_id": "other"})
    with pytest.raises(OutcomeUnknown):
        site.client.signal("w", "later").result(20)
    assert not waiting.done()
    with pytest.raises(TimeoutError, match="has not ended within"):
        limited.result(20)
    site.ends("mine", {"a": 1}, "error")
    with pytest.raises(OutcomeError):
        waiting.result(20)


def test_nothing_is_kept_of_a_command_that_nobody_answers(site: Site) -> None:
    """M1.4."""
    client = site.client
    futures: list[Future[Any]] = [client.signal("w", "s"), client.start_and_wait("w"), client.query("w"), client.query("w"), client.resume("w", "0:1")]
    futures[2].cancel()
    for future, also in zip(futures[:2], (", or w is paused and keeps it until it is unpaused", ""), strict=True):
        with pytest.raises(OutcomeUnknown) as unknown:
            future.result(20)
        assert unknown.match(f"no reply within .* s; perhaps no engine is running{also}; it may or may not have been done: repeat it under the same id, {unknown.value.command_id}$")
    with pytest.raises(OutcomeUnknown, match="no engine is running; ask again$"):
        futures[3].result(20)
    with pytest.raises(OutcomeUnknown, match="until it is unpaused; it may or may not have been done: repeat it; a second answer is ignored$"):
        futures[4].result(20)
    deadline = time.monotonic() + 20
    while client._futures._deadlines:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (client._futures._requests, client._outcomes._waiters, client._futures._open) == ({}, {}, set())


def test_deadlines_of_callers_who_have_gone_are_not_kept(site: Site) -> None:
    """A program that asks often then has few open questions."""
    site.client.result("w", timeout=3_600).cancel()
    site.reply(site.asked(), status="not_found")
    deadline = time.monotonic() + 20
    while site.client._futures._deadlines:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_deadline_far_away_that_is_still_open_keeps_nothing_of_what_is_settled_behind_it(site: Site) -> None:
    """M1.4: a web handler waits a day at most for each order; one order takes that day, and thousands are done at once."""
    slow = site.client.result("slow", timeout=86_400)
    site.reply(site.asked(), value={"start_id": "of the slow one"})
    settled = []
    for _ in range(300):
        future = site.client.result("w", timeout=90_000)
        site.reply(site.asked(), value={"start_id": "mine", "outcome": {"kind": "result", "value": "7"}})
        assert future.result(20) == 7
        settled.append(weakref.ref(future))
    del future
    until(lambda: gc.collect() >= 0 and all(kept() is None for kept in settled), 10)
    assert not slow.done() and len(site.client._futures._deadlines) < 150


def test_replies_to_others_and_failing_subscribers_harm_nobody(site: Site) -> None:
    """M4."""
    got: list[Any] = []

    def fails(_outcome: object) -> None:
        raise ValueError("a subscriber's own")

    site.client.subscribe("w", fails)
    site.client.subscribe("w", got.append)
    future = site.client.query("w")
    query = site.asked()
    site.reply(query, value="another's", key=b"somebody else")
    site.ends("any", 1)
    site.reply(query, value="mine")
    assert future.result(20) == "mine"
    site.told()
    assert [outcome.value for outcome in got] == [1] and site.client.counts["foreign"] == 1


def encrypted() -> bytes:
    """A value that somebody encrypted with another key."""
    value, _ = Encryption(Config(encryption_keys=["1" * 64])).encrypt("workflow-reply", b"{}")
    return value or b""


def test_a_reply_that_cannot_be_decrypted_fails_who_waits_and_not_the_client(site: Site) -> None:
    """Otherwise, anybody who may write to the topic could end a gateway with five bytes (decision 0060)."""
    for value in (encrypted(), b"\0KWE\1"):
        waiting = site.client.query("w")
        site.asked()
        site.engine.append(site.config.reply_topic, site.client._link.process.encode(), value)
        with pytest.raises(TransportError, match="not in encryption_keys"):
            waiting.result(20)
    future = site.client.query("w")
    site.reply(site.asked(), value="mine")
    assert future.result(20) == "mine" and site.client.lost is None


def ends_unread(site: Site, start_id: str) -> None:
    site.engine.append(site.config.result_topic or "", b"w", encrypted(), (("kwflow-outcome", b"result"), ("kwflow-start-id", start_id.encode())))


def test_an_outcome_that_cannot_be_decrypted_fails_who_waits_for_that_run(site: Site) -> None:
    """Whether the run became known before the outcome came or after it."""
    for known_before in (True, False):
        future = site.client.result("w")
        query = site.asked()
        if known_before:
            site.reply(query, value={"start_id": "mine"})
            site.told()
        ends_unread(site, "mine")
        site.told()
        if not known_before:
            site.reply(query, value={"start_id": "mine"})
        with pytest.raises(TransportError, match="not in encryption_keys"):
            future.result(20)


def test_what_others_encrypted_with_a_former_key_hides_no_outcome(site: Site) -> None:
    """Here, the outcome of an earlier run of the id, and a record of the author in the topic. A caller who waits for the earlier run gets the error."""
    missed: list[bool] = []
    site.client.subscribe("w", lambda _: None, lambda: missed.append(True))
    future = site.client.result("w")
    ends_unread(site, "another")
    site.engine.append(site.config.result_topic or "", b"w", encrypted())
    site.ends("mine", 1)
    site.told()
    site.reply(site.asked(), value={"start_id": "mine"})
    assert future.result(20) == 1 and missed == [True]
    future = site.client.result("w", start_id="mine")
    site.reply(site.asked(), status="not_found")
    assert future.result(20) == 1
    future = site.client.result("w", start_id="another")
    site.reply(site.asked(), status="not_found")
    with pytest.raises(TransportError, match="not in encryption_keys"):
        future.result(20)


def test_whoever_waits_asks_again_after_a_gap(site: Site) -> None:
    """Retention overtook the reader, so an outcome may be among the records that it missed."""
    future = site.client.result("w", start_id="mine")
    site.reply(site.asked(), value={"start_id": "mine"})
    site.told()
    site.client.on_gap()
    site.reply(site.asked(), value={"start_id": "mine", "outcome": {"kind": "result", "value": "7"}})
    assert future.result(20) == 7


def test_a_gap_before_a_start_was_answered_is_asked_about_once_it_is(site: Site) -> None:
    """A question asked at once might be read before the start, and be answered with "there is no such run"."""
    future = site.client.start_and_wait("w", start_id="mine")
    start = site.asked()
    site.client.on_gap()
    site.reply(start, status="started")
    site.reply(query := site.asked(), value={"start_id": "mine", "outcome": {"kind": "result", "value": "7"}})
    assert (wire.header(query, "kwflow-op"), future.result(20)) == ("query", 7)


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_what_fails_on_the_way_is_told_to_whoever_waits(site: Site) -> None:
    """On a link's thread nobody else would see the error."""
    future = site.client.start_and_wait("w", object())
    with pytest.raises(TypeError):
        future.result(20)
    site.client._link.find = raising(OSError("gone"))  # type: ignore[method-assign]
    future = site.client.result("w")
    site.reply(site.asked(), status="not_found")
    with pytest.raises(OSError, match="gone"):
        future.result(20)
    site.client._link.append = raising(UsageError("no"))  # type: ignore[method-assign]
    future = site.client.result("w")
    with pytest.raises(UsageError):
        future.result(20)


def test_the_first_reason_why_a_client_ended_is_the_one_that_it_tells(site: Site) -> None:
    waiting = site.client.query("w")
    site.client.on_lost(TransportError("no broker"))
    site.client.on_lost(TransportError("the client was closed"))
    for call in (lambda: waiting.result(20), lambda: site.client.query("w")):
        with pytest.raises(TransportError, match="no broker"):
            call()


def test_a_time_to_live_that_rounds_to_nothing_is_the_shortest(site: Site) -> None:
    """M3: without a time to live, a signal lives forever."""
    site.client.signal("w", "s", ttl=0.0001)
    assert b'"ttl_ms":1' in (site.asked().value or b"").replace(b" ", b"")


def test_headers_of_an_answer_go_with_it_and_are_none_of_the_engines(site: Site) -> None:
    """Semantics §9.3."""
    future = site.client.resume("w", "0:1", 7, headers=(("tenant", b"north"),))
    record = site.asked()
    assert record.headers[0] == ("tenant", b"north") and wire.header(record, "kwflow-request")
    site.reply(record, "delivered")
    assert future.result(TIMEOUT_S * 20) is None
    with pytest.raises(UsageError, match=r"header 'kwflow-op': kwflow-\* headers belong to the engine"):
        site.client.resume("w", "0:1", 7, headers=(("kwflow-op", b"terminate"),))


def test_what_cannot_be_sent_leaves_nothing_in_the_client(site: Site) -> None:
    """A limit: a caller that passes invalid headers, no JSON or no id may do so forever, and what was kept of each call used to stay forever, too."""
    client, bad = site.client, {"a": 5}
    for call in (
        lambda: client.start("w", headers=bad), lambda: client.signal("w", "s", headers=bad), lambda: client.resume("w", "0:1", headers=bad), lambda: client.update("w", "u", headers=bad),  # type: ignore[dict-item,arg-type]
        lambda: client.signal("w", "s", object()), lambda: client.resume("w", "0:1", b""), lambda: client.query("|"), lambda: client.resume("", "0:1"),
    ):  # fmt: skip
        with pytest.raises((TypeError, UsageError)):
            call()
    assert not client._futures._open and not client._futures._requests and not site.engine.read(site.config.resume_topic, 0, 1)
