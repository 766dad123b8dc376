"""Feeds, as an engine in memory calls them: what they are given, what becomes of their messages, and what is a dead letter (decision 0058)."""

import itertools
import json
import types
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import kwflow as kw
from kwflow import durable, feeds
from kwflow.config import Config
from kwflow.core.contract import Limits
from kwflow.core.wire import Output, header
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.letters import _closing, _is_remnant
from kwflow.testing import WorkflowTester

_count = itertools.count()
HEAD = """
import dataclasses
import kwflow as kw

@dataclasses.dataclass
class Event:
    id: str
    n: int = 0

def main(what):
    return what

def waits(_):
    try:
        value = yield kw.suspend("r")
        more = yield kw.wait_signal("s")
        return [value, more]
    except kw.WorkflowError as error:
        return error.payload
    except kw.Cancelled:
        return "cancelled"
"""


@pytest.fixture(autouse=True)
def feeds_of_a_test_are_none_of_the_next() -> Iterator[None]:
    """An engine that a later test starts in this process would check them all, and refuse those that are wrong on purpose here."""
    before = feeds.registered_feeds()
    yield
    feeds._feeds.clear()
    feeds._feeds.update(before)


def loaded(source: str) -> tuple[types.ModuleType, str]:
    """The module, whose `TOPIC` belongs to it alone, and that topic."""
    name = f"feeds_{next(_count)}"
    return durable.load_source(name, f"TOPIC = {name!r}\n{HEAD}{source}", f"{name}.py"), name


def engine_of(source: str) -> tuple[WorkflowTester, str]:
    module, topic = loaded(source)
    return WorkflowTester(main=module.main, waits=module.waits), topic


def letters(tester: WorkflowTester) -> list[tuple[str | None, str | None]]:
    return [(said(output, "reason"), said(output, "message")) for output in tester.outputs if output.topic == tester.config.dead_letter_topic]


def said(output: Output, name: str) -> str | None:
    return next((value.decode() for key, value in reversed(output.headers) if key == f"kwflow-error-{name}" and value is not None), None)


def test_a_feed_is_given_the_value_as_annotated_the_record_or_both() -> None:
    """Decision 0058."""
    for parameters, shown in (
        ("event: Event", "[event.n, None]"), ("event: dict", "[event['n'], None]"), ("event", "[event['n'], None]"), ("record: kw.Record", "[len(record.value), record.timestamp_ms]"),
        ("event: Event, record: kw.Record", "[event.n, record.key.decode()]"), ("record: 'kw.Record', event: 'Event', more: 'OfTypeCheckers' = 5", "[event.n, more]"),
        ("record: Annotated[kw.Record, 'of others']", "[len(record.value), record.timestamp_ms]"),
    ):  # fmt: skip
        tester, topic = engine_of(f"\nfrom typing import Annotated\n\n@kw.feed(TOPIC)\ndef fed({parameters}) -> 'OfTypeCheckers':\n    return kw.Start('w', {shown})\n")
        tester.send("key", b'{"id": "w", "n": 7}', topic=topic)
        assert tester.result("w") in ([7, None], [19, tester.now_ms], [7, "key"], [7, 5])


def test_every_kind_of_message_does_what_a_client_could_do() -> None:
    """KW-2, KW-3, M2, M3: starts, signals, answers, errors, cancels. With ids of their own they are done once."""
    tester, topic = engine_of("""
@kw.feed(TOPIC)
def fed(record: kw.Record):
    op, id = record.value.decode().split()
    yield {
        "start": lambda: kw.Start(id, None, "waits", start_id="run"), "value": lambda: kw.Resume(id, "r", 5), "null": lambda: kw.Resume(id, "r"), "error": lambda: kw.Resume(id, "r", error=None),
        "signal": lambda: kw.Signal(id, "s", [1], command_id="once"), "with start": lambda: kw.Signal(id, "s", 2), "cancel": lambda: kw.Cancel(id, "no"),
    }[op]()
""")
    for line in ("start a", "start a", "value a", "signal a", "start b", "error b", "start c", "cancel c", "start d", "signal d", "signal d", "null d", "start d"):
        tester.send(None, line.encode(), {"tenant": "x", "kwflow-op": "nonsense"}, topic=topic)
    assert {id: tester.result(id) for id in "abcd"} == {"a": [5, [1]], "b": None, "c": "cancelled", "d": [None, [1]]}
    assert tester.counts.count("duplicate-start") == 2 and tester.counts.count("repeated") == 1
    assert all(("tenant", b"x") in output.headers for output in tester.outputs if output.topic == tester.config.result_topic), "headers go on (semantics §9.3)"
    assert not letters(tester)


def test_one_record_may_be_many_messages_or_none() -> None:
    """They are sent in the order in which the feed returns them."""
    for made in ("[kw.Start(str(n), n) for n in range(3)]", "(kw.Start(str(n), n) for n in range(3))", "tuple(kw.Start(str(n), n) for n in range(3))", "map(lambda n: kw.Start(str(n), n), range(3))"):
        tester, topic = engine_of(f"\n@kw.feed(TOPIC)\ndef fed(x):\n    return {made} if x else None\n")
        tester.send(None, b"null", topic=topic)
        assert tester.counts == ["fed-nothing"]
        tester.send(None, b"1", topic=topic)
        assert tester.values(tester.config.result_topic) == [0, 1, 2]


@pytest.mark.parametrize(("value", "reason", "message"), [
    (b"{", "bad-json", "not JSON: "), (b'{"n": 1}', "bad-input", "does not accept this input: Object missing required field `id`"), (None, "bad-input", "Expected `object`, got `null`"),
    (b"[" * 300 + b"]" * 300, "bad-json", "nested more than 200 levels deep"),
])  # fmt: skip
def test_a_value_that_is_not_as_annotated_is_a_dead_letter(value: bytes | None, reason: str, message: str) -> None:
    """G3."""
    refuses("return kw.Start(event.id)", value, reason, message)


@pytest.mark.parametrize(("body", "message"), [
    ("raise LookupError('gone')", "LookupError: gone (feeds_"), ("raise LookupError('a\\nb')", "LookupError: a b (feeds_"),
    ("raise SystemExit(5)", "SystemExit: 5"), ("kw.output('x', 'y')", "only inside a running workflow step"),
    ("return 5", "not 5"), ("return [kw.Start('a'), 'b']", "not 'b'"), ("return {'id': 5}", "not {'id': 5}"), ("yield kw.Start(event.id); raise ValueError('half')", "half"),
    ("return kw.Start('')", "1 to 512 bytes"), ("return kw.Start(5)", "a workflow id must be a str"), ("return kw.Start('a', object())", "kw.Start for 'a' cannot be sent"),
    ("return kw.Start('a', start_id='')", "start_id must be a str"), ("return kw.Start('a', workflow=main)", "a message of a feed takes the name of a workflow"),
    ("return kw.Start('a', 'x' * 1_100_000)", "value_bytes_max"), ("return kw.Signal('a', '')", "the name of a signal"), ("return kw.Signal('a', 's', 'x' * 300_000)", "mailbox_bytes_max"),
    ("return kw.Signal('a', 's', input=5)", "start= names"), ("return kw.Resume('a', 5)", "a ref must be a str"), ("return kw.Signal('a', 's', start='x' * 201)", "1 to 200 characters"),
    ("return kw.Cancel('a', 'x' * 1_001)", "a reason must be a str of up to 1000"), ("return kw.Cancel('a', 5)", "a reason must be a str"),
    ("return (kw.Start('a') for _ in iter(int, 1))", "outputs_max"), ("return (kw.Start('a', 'x' * 900_000) for _ in iter(int, 1))", "output_bytes_max"),
])  # fmt: skip
def test_what_a_feed_raises_or_cannot_mean_makes_a_dead_letter_and_nothing_of_it_is_done(body: str, message: str) -> None:
    """G3: a record is applied as a whole or not at all."""
    refuses(body, b'{"id": "w"}', "feed-failed", message)


def refuses(body: str, value: bytes | None, reason: str, message: str) -> None:
    tester, topic = engine_of(f"\n@kw.feed(TOPIC)\ndef fed(event: Event):\n    {body}\n")
    tester.send("k", value, topic=topic)
    [(found, text)] = letters(tester)
    assert found == reason and message in (text or "") and not tester.ids()
    assert tester.outputs[-1].key == b"k" and tester.outputs[-1].value == value


def test_a_feed_that_does_not_come_back_is_ended_by_the_watchdog() -> None:
    """K19: like a step that never reaches a wait."""
    module, topic = loaded("\n@kw.feed(TOPIC)\ndef fed(event):\n    while True: pass\n")
    processor = FeedProcessor(Config(step_timeout_ms=50, step_abort_ms=100), feeds.registered_feeds()[topic], lambda line: None)
    [decision] = processor.decide(None, [kw.Record(topic, 0, 0, 0, None, b"1")], 0)  # type: ignore[arg-type]
    assert said(decision.outputs[0], "reason") == "feed-failed" and "step_abort_ms" in (said(decision.outputs[0], "message") or "")


def test_a_letter_of_a_feed_is_sent_again_to_the_engines_and_the_feed_sees_the_record_as_it_was() -> None:
    """K13: other readers of the topic see nothing of it. A letter that fails again is the same letter again."""
    tester, topic = engine_of("""
mended = False

@kw.feed(TOPIC)
def fed(event: Event, record: kw.Record):
    if not globals()["mended"]:
        raise ValueError("not yet")
    return kw.Start(event.id, [record.topic, record.partition, record.offset, record.timestamp_ms, record.key is None, [list(map(str, pair)) for pair in record.headers]])
""")
    theirs = {"a": "b", "kwflow-op": "x", "kwflow-feed": "x", "kwflow-feed-key": "y", "kwflow-feed-header-a": "z", "kwflow-parent": "p|0:1", "kwflow-forwarded": "0"}
    theirs |= {"kwflow-error-reason": "of a letter of theirs", "kwflow-error-feed": topic}
    tester.send(None, b'{"id": "w"}', theirs, topic=topic)
    first = tester.now_ms
    tester.now_ms += 5_000

    def again() -> None:
        [letter, *others] = reversed([output for output in tester.outputs if output.topic == tester.config.dead_letter_topic])
        record = kw.Record(letter.topic, 0, len(others), tester.now_ms, letter.key, letter.value, letter.headers)
        sent = _closing(tester.config, "0:0", record, True).records[0]
        assert sent.topic == tester.config.resume_topic and sent.key == f"{topic}/0/0".encode()
        assert [name for name, _ in sent.headers if name in theirs] == ["a", "kwflow-op", "kwflow-feed"], "an engine reads none of theirs as ours"
        sent = msgspec.structs.replace(sent, headers=(*sent.headers, ("kwflow-original-timestamp", b"5"), ("kwflow-forwarded", b"2")))  # as it is after it was moved, or after a limit was raised
        tester._log(sent)

    again()
    assert [reason for reason, _ in letters(tester)] == ["feed-failed", "feed-failed"]
    tester.globals_check.active = False
    feeds.registered_feeds()[topic].function.__globals__["mended"] = True
    again()
    assert tester.result("w") == [topic, 0, 0, first, True, [[name, str(value.encode())] for name, value in theirs.items()]]


def test_a_letter_is_a_feeds_if_its_processor_wrote_it_whatever_headers_the_record_had() -> None:
    """K13: a letter of another processor goes back where it came from."""
    tester, topic = engine_of("")
    tester.send("w", b"new:{", {"kwflow-error-feed": topic})
    letter = tester.outputs[-1]
    sent = _closing(tester.config, "0:0", kw.Record(letter.topic, 0, 0, 5, letter.key, letter.value, letter.headers), True).records[0]
    assert (sent.key, sent.value) == (b"w", b"new:{") and "kwflow-op" not in dict(sent.headers)


def test_the_letter_of_a_record_that_kills_is_kept_from_now_on_and_may_be_that_of_a_tombstone() -> None:
    """K11, K13, K19: with the timestamp of its record, retention would delete it at once, or the broker refuse it. An empty letter is not a remnant."""
    tester, topic = engine_of("\n@kw.feed(TOPIC)\ndef fed(record: kw.Record): return kw.Start(str(record.timestamp_ms), record.value)\n")
    processor = FeedProcessor(tester.config, feeds.registered_feeds()[topic])
    for timestamp_ms in (0, 1 << 42):
        [letter] = processor.refuse(None, kw.Record(topic, 3, 9, timestamp_ms, b"k", None), "it kills").outputs  # type: ignore[arg-type]
        assert letter.timestamp_ms is None and said(letter, "timestamp") == str(timestamp_ms)
        record = kw.Record(letter.topic, 0, 0, 5, letter.key, None, letter.headers)
        assert not _is_remnant(record)
        tester._log(_closing(tester.config, "0:0", record, True).records[0])
        tester._work()
        assert tester.result(str(timestamp_ms)) is None


def test_what_asks_a_feed_again_and_is_no_letter_of_one_is_refused() -> None:
    """G3."""
    tester, topic = engine_of("")
    for fed in (None, "{", '{"topic": 5}', json.dumps({"topic": "t" * 250, "partition": 0, "offset": 5, "timestamp_ms": 0})):
        tester.send("k", b"1", {"kwflow-op": "feed", **({"kwflow-feed": fed} if fed else {})})
    tester.send("k", b"1", {"kwflow-op": "feed", "kwflow-feed": json.dumps({"topic": topic, "partition": 0, "offset": 5, "timestamp_ms": 0})})
    assert [reason for reason, _ in letters(tester)] == ["bad-header"] * 4 + ["unknown-feed"]


@pytest.mark.parametrize(("source", "why"), [
    ("@kw.feed('a b')\ndef fed(x): ...", "takes a topic name"), ("@kw.feed(TOPIC)\nasync def fed(x): ...", "must decorate an ordinary function, which does not wait"),
    ("@kw.feed(TOPIC)\nclass C: ...", "must decorate an ordinary function"), ("@kw.feed(TOPIC)\ndef fed(x): ...\n@kw.feed(TOPIC)\ndef other(x): ...", "has two feeds"),
])  # fmt: skip
def test_what_cannot_be_a_feed_is_refused_when_its_module_is_loaded(source: str, why: str) -> None:
    """The error has the name of the thing and the remedy."""
    with pytest.raises(kw.UsageError, match=why):
        loaded(source)


@pytest.mark.parametrize(("parameters", "why"), [
    ("", "must take the value"), ("a, b", "must take the value"), ("*a", "must take the value"), ("*, a", "must take the value"), ("a: kw.Record, b: kw.Record", "must take the value"),
    ("a: 'Nothing'", "cannot be resolved"), ("a: kw.Record | None", "annotate kw.Record"), ("a: list[kw.Record]", "annotate kw.Record"), ("a: 'Other'", "cannot be rebuilt"),
])  # fmt: skip
def test_a_feed_that_could_not_be_called_is_refused_when_it_is_to_run(parameters: str, why: str) -> None:
    """Its annotations may name classes that are defined further down in its module."""
    _, topic = loaded(f"\n@kw.feed(TOPIC)\ndef fed({parameters}): ...\n\nclass Other: ...\n")
    with pytest.raises(kw.UsageError, match=why):
        FeedProcessor(Config(), feeds.registered_feeds()[topic])


def test_a_feed_is_called_with_what_an_engine_could_do_with() -> None:
    """The limits of an engine apply here, too: a record of the foreign topic that is too large is a dead letter, and so is one whose message would be too large."""
    _, topic = loaded("\n@kw.feed(TOPIC)\ndef fed(event): ...\n")
    processor = FeedProcessor(Config(value_bytes_max=100, header_bytes_max=20), feeds.registered_feeds()[topic])
    record: Any = kw.Record(topic, 3, 9, 1, b"k", b'"%s"' % (b"x" * 100), (("kwflow-request", b"r"), ("kwflow-reply-to", b"0/p")))
    for one in (record, kw.Record(topic, 3, 9, 1, b"k", b"1", (("a", b"x" * 30),))):
        [decision] = processor.decide(None, [one], 77)  # type: ignore[arg-type]
        assert said(decision.outputs[0], "reason") == "too-large" and decision.outputs[0].timestamp_ms == 77, "the letter is kept from now on, however old the record"
        assert not decision.replies, "an address in a record of others is not ours"
    assert feeds.registered_feeds()[topic].outputs(kw.Record(topic, 0, 0, 0, None, b"1"), "resume", Limits()) == ()
    _, topic = loaded("\n@kw.feed(TOPIC)\ndef fed(event): return kw.Start('a', start_id=event)\n")
    for theirs, fits in ((b"x" * 8, True), (b"x" * 9, False)):
        made = FeedProcessor(Config(header_bytes_max=30), feeds.registered_feeds()[topic]).decide(None, [kw.Record(topic, 0, 0, 0, None, b'"runs"', (("abc", theirs),))], 0)  # type: ignore[arg-type]
        assert (made[0].counts == ("fed",)) == fits and (fits or "header_bytes_max" in (said(made[0].outputs[0], "message") or ""))
    assert header(record, "kwflow-request") == "r"
