"""Bytes from outside become a value or a ProtocolError, never anything else (G3). Nothing in a record is evaluated.

Every function that reads what somebody else wrote is here, and hypothesis looks for input that breaks it.
"""

import dataclasses
import enum
import json
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kwflow.config import Config
from kwflow.core import snapshot, timers, wire
from kwflow.core.contract import Workflows
from kwflow.core.values import LEVELS_MAX, check_levels, json_dumps
from kwflow.core.wire import Record
from kwflow.durable.canonical import canonical_bytes
from kwflow.durable.peek import peek
from kwflow.errors import ProtocolError, SnapshotError
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore

pytestmark = pytest.mark.slow
many = settings(max_examples=300)

NAMES = ["kwflow-op", "kwflow-id", "kwflow-workflow", "kwflow-start-id", "kwflow-request", "kwflow-reply-to", "kwflow-parent", "kwflow-client", "kwflow-due-ms", "kwflow-forwarded", "traceparent", "x"]
texts = st.one_of(st.text(max_size=30), st.sampled_from([*wire.OPS, "null", "0", "1/x", "id|0:1", "5/3f2504e0-4f89-11d3-9a0c-0305e82c3301", "9" * 400, "é" * 5]))
bits = st.one_of(st.none(), st.binary(max_size=60), texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
headers = st.lists(st.tuples(st.one_of(st.sampled_from(NAMES), st.text(max_size=10)), bits), max_size=5).map(tuple)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=10)
fields = st.sampled_from(["ref", "value", "error", "name", "signal", "reason", "x"])
jsons = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=4), max_leaves=8).map(msgspec.json.encode)
deep = st.integers(1, 3000).map(lambda depth: b"[" * depth)
values = st.one_of(bits, jsons, jsons.map(lambda data: b"new:" + data), jsons.map(lambda data: data[:-1]), deep, deep.map(lambda data: b"new:" + data + b"]" * len(data)))
records = st.builds(Record, st.just("workflow-resume"), st.integers(0, 7), st.integers(0, 2**62), st.integers(0, 2**45), bits, values, headers)

timer_keys, delays = st.sampled_from([b"a|b", b"a|", b"b|\0\xff"]), st.sampled_from([b"5", b"0", b"-1"])
timers_set = st.one_of(records, st.builds(Record, st.just("workflow-scheduler"), st.just(0), st.just(0), st.just(1000), timer_keys, delays, headers))

FUNCTIONS: dict[str, Callable[[Record], Any]] = {
    "workflow_id": wire.workflow_id,
    "parse": wire.parse,
    "reply_address": wire.reply_address,
    "parent_of": wire.parent_of,
    "travelling_headers": wire.travelling_headers,
    "header": lambda record: [wire.header(record, name) for name in NAMES],
    "short_header": lambda record: [wire.short_header(record, name) for name in NAMES],
    "check_size": lambda record: wire.check_size(record, 50, 50),
    "cancel_or_set": lambda record: timers.cancel_or_set(record, None),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wire_function_gives_a_value_or_a_protocol_error(name: str) -> None:
    @many
    @given(records)
    @example(Record("t", 0, 0, 0, b"\xff", b"new:\xff", (("kwflow-op", b"\xff"),)))
    @example(Record("t", 0, 0, 0, b"a|b", b"1" * 5000, (("kwflow-due-ms", "²".encode()),)))
    @example(Record("t", 0, 0, 0, b"a|b", b"1_0", (("kwflow-due-ms", b"9" * 5000),)))
    @example(Record("t", 0, 0, 0, b"a|b", b"-" + b"9" * 4000, ()))
    def total(record: Record) -> None:
        try:
            FUNCTIONS[name](record)
        except ProtocolError as error:
            assert error.reason, "the word that counters and dead letters use"
            assert str(error)

    total()


def test_any_batch_of_records_is_decided_and_each_one_counts_as_something() -> None:
    """G3: applied, ignored by a rule, or dead-lettered. What was decided can be stored, and the timer table still works after it."""

    @many
    @given(st.lists(records, max_size=6), st.lists(timers_set, max_size=6))
    @example([], [Record("workflow-scheduler", 0, 0, 0, b"a|b", b"5", (("x", b"\0\xff\1"), ("", b""), ("none", None)))])
    def total(resumes: list[Record], scheduled: list[Record]) -> None:
        config = Config(instances_cached_max=0)
        for processor, batch in ((WorkflowProcessor(config, Workflows({}), frozenset()), resumes), (TimerProcessor(config), scheduled)):
            store = MemoryStore()
            state = Overlay(store)
            made = processor.decide(state, [msgspec.structs.replace(record, offset=number) for number, record in enumerate(batch)], 1_000)
            assert len(made) == len(batch)
            assert all(decision.counts for decision in made)
            store.apply(state.changes)
            state = Overlay(store)
            fired = processor.due(state, 2**62, 100)
            for output in fired.outputs if fired is not None else ():
                assert output.key is not None

    total()


@many
@given(headers)
def test_the_headers_of_a_timer_come_back_as_they_were(pairs: wire.Headers) -> None:
    """Semantics §9.3. Values may hold any bytes."""
    record = Record("workflow-scheduler", 0, 0, 1000, b"a|b", b"5", tuple(pair for pair in pairs if pair[0] != "kwflow-due-ms"))
    changes = timers.cancel_or_set(record, None)
    [due_key] = [key for key in changes if key.startswith(timers.DUE)]
    _, output = timers.fire(due_key, changes[due_key] or b"", "workflow-resume", 2000)
    assert output.headers == wire.travelling_headers(record)


@many
@given(st.binary(max_size=300), st.binary(max_size=40), st.integers(0, 300))
def test_damaged_snapshots_are_refused_by_name_and_nothing_of_them_is_evaluated(noise: bytes, more: bytes, at: int) -> None:
    """G4, G10: whatever the state store holds."""
    whole = snapshot.save_ended({"id": "w", "workflow": "main", "start_id": "s", "ended": 1})
    for data in (noise, b"KWF1" + noise, whole[:at] + more + whole[at:] if more else whole[:at]):
        for read in (snapshot.read_header, snapshot.load, lambda data: peek(data), canonical_bytes):
            if data == whole:
                continue
            with pytest.raises(SnapshotError):
                read(data)


@given(jsons)
def test_what_json_dumps_gives_is_read_as_the_same_value(data: bytes) -> None:
    """wire.md §4: no value is changed silently."""
    value = msgspec.json.decode(data)
    assert msgspec.json.decode(json_dumps(value)) == value


def _levels(value: object) -> int:
    return 1 + max(map(_levels, value.values() if isinstance(value, dict) else value), default=0) if isinstance(value, (dict, list)) else 0


texts_with_brackets = st.text('[]{}"\\,:a', max_size=6)
nested = st.recursive(st.none() | texts_with_brackets, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts_with_brackets, inner, max_size=3), max_leaves=12)


@many
@given(nested, st.integers(0, 6))
def test_levels_of_json_are_counted_exactly_whatever_its_texts_hold(value: object, most: int) -> None:
    """G3."""
    refused = False
    try:
        check_levels(json.dumps(value).encode(), most - LEVELS_MAX)
    except ValueError:
        refused = True
    assert refused == (_levels(value) > most)


class _Struct(msgspec.Struct):
    held: object


@dataclasses.dataclass
class _Data:
    held: object
    of_the_class: ClassVar[bytes] = b"not written"


@pytest.mark.parametrize("wrap", [_Struct, _Data, lambda held: [_Data({"in": held})], lambda held: enum.Enum("_Named", {"ONE": held}).ONE], ids=["struct", "dataclass", "nested", "enum"])
def test_what_has_no_json_form_is_refused_within_objects_too(wrap: Callable[[object], object]) -> None:
    """wire.md §4: msgspec writes NaN and infinity as null, and bytes as base64, without an error."""
    for held in (float("nan"), float("inf"), -float("inf"), b"x"):
        with pytest.raises((TypeError, ValueError), match="no JSON form"):
            json_dumps(wrap(held))
    assert b"1" in json_dumps(wrap(1))
    cyclic = _Data(None)
    cyclic.held = [cyclic]
    with pytest.raises(ValueError, match="nested"):
        json_dumps(cyclic)
