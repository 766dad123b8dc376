"""Every row of the table of bad input in docs/WIRE.md, sent to a real processor (G3): nothing is lost, and nobody gets another's reply."""

import pathlib
import re
from typing import Any, NamedTuple

import pytest

from kwflow.core.wire import Record
from kwflow.runners.overlay import Overlay
from kwflow.testing import WorkflowTester
from tests.spec.test_messages import run

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs/WIRE.md"
BODY = """
import threading
def check(value):
    if value is not None and value < 0:
        raise ValueError("negative")
def double(number: int):
    return 2 * number
def main(o):
    kw.on_update("u", check)
    if (yield kw.suspend("r")) == "park":
        lock = threading.Lock()
        yield kw.suspend("never")
"""
TO = {"running": "w", "parked": "w", "full": "w", "ended": "w", "nobody": "somebody-else"}


class Row(NamedTuple):
    op: str
    value: bytes
    headers: dict[str, str]
    to: str
    reply: str
    without: str


def _filled(text: str) -> str:
    return re.sub(r"<(\d+) bytes>", lambda found: "x" * int(found[1]), text)


def rows() -> list[Row]:
    text = DOCUMENT.read_text(encoding="utf-8").partition("### Bad input")[2]
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if not line.startswith("| ") or "---" in line or cells[0].startswith("| op"):
            continue
        op, value, header, to, reply, without = (cell.strip("| ").strip("`") for cell in line.strip().removesuffix("|").removeprefix("|").split("|"))
        name, _, content = header.partition(":")
        found.append(Row(op, _filled(value).encode(), {name: _filled(content.removeprefix(" "))} if name else {}, to, reply, without.replace("`", "")))
    return found


def prepared(to: str) -> WorkflowTester:
    w = run(BODY, **{"kwflow-start-id": "run"})
    if to == "running":
        w.command("w", "signal", {"name": "s"}, kwflow_id="known")
    elif to == "full":
        changes, signal = Overlay(w.state), (b'{"name":"s"}', (("kwflow-op", b"signal"),))
        w._workflows.decide(changes, [Record(w.config.resume_topic, 0, offset, w.now_ms, b"w", *signal) for offset in range(1, 1001)], w.now_ms)
        w.state.apply(changes.changes)
        w._offsets[w.config.resume_topic] = 1000
    elif to in ("ended", "parked"):
        w.resume("w", "r", "park" if to == "parked" else None)
    return w


def letters(w: WorkflowTester) -> list[str]:
    found = [dict(output.headers) for output in w.outputs if output.topic == w.config.dead_letter_topic]
    return [(headers["kwflow-error-reason"] or b"").decode() for headers in found if headers["kwflow-error-reason"] != b"parked"]


def sent(w: WorkflowTester, row: Row, **address: str) -> dict[bytes, bytes]:
    """Sends it; returns the state from before."""
    before = dict(w.state.entries)
    w.send(TO[row.to], row.value, {**({"kwflow-op": row.op} if row.op else {}), **row.headers, **address})
    return before


NAMED = [pytest.param(row, id=f"{number}-{row.op or 'record'}-{row.to}-{row.reply}") for number, row in enumerate(rows())]
CHANGES = ("rejected",)  # its step is applied and leaves nothing but a new offset


@pytest.mark.parametrize("row", NAMED)
def test_who_waits_is_replied_as_the_table_says(row: Row) -> None:
    """G3, M1, M2."""
    w = prepared(row.to)
    before, replies = sent(w, row, **{"kwflow-request": "mine", "kwflow-reply-to": "0/me"}), len(w.replies)
    assert [(reply["request"], reply["status"]) for reply in w.replies[replies - 1 :]] == [("mine", row.reply)]
    if row.reply not in CHANGES:
        assert w.state.entries == before
    if row.reply.replace("_", "-") in ("bad-json", "bad-arguments", "bad-header", "too-large", "bad-input", "unknown-op", "unknown-workflow"):
        assert letters(w) == [row.reply.replace("_", "-")]
    else:
        assert letters(w) == []


@pytest.mark.parametrize("row", NAMED)
def test_without_a_reply_address_nothing_is_lost_as_the_table_says(row: Row) -> None:
    """G3."""
    w = prepared(row.to)
    count, replies = len(w.counts), len(w.replies)
    before = sent(w, row)
    if row.without.startswith("dead letter"):
        assert letters(w) == [row.without.removeprefix("dead letter ")]
    else:
        assert (letters(w), w.counts[count:]) == ([], [row.without])
    assert len(w.replies) == replies
    if row.reply not in CHANGES:
        assert w.state.entries == before


def test_the_table_has_each_op_and_each_case() -> None:
    from kwflow.core.wire import OPS

    found = rows()
    assert {row.op for row in found} >= {*OPS, "", "nonsense"}
    assert {row.to for row in found} == set(TO)
    assert len(found) > 60


PLACES = ("", "0", "/p", "0/", "x/p", "-1/p", "9999999999/p")


@pytest.mark.parametrize("headers", [{"kwflow-request": "r"}, {"kwflow-reply-to": "0/p"}, *({"kwflow-request": "r", "kwflow-reply-to": place} for place in PLACES)])
def test_an_address_that_is_none_makes_a_dead_letter_before_anything_is_done(headers: dict[str, str]) -> None:
    """M1.2."""
    for op in ("cancel", "terminate", "query", "signal"):
        w = prepared("running")
        before, replies = dict(w.state.entries), len(w.replies)
        w.send("w", b'{"name":"s"}' if op == "signal" else b"null", {"kwflow-op": op, **headers})
        assert (letters(w), len(w.replies), w.state.entries) == (["bad-header"], replies, before)


def test_a_header_that_is_not_utf_8_is_a_dead_letter(tmp_path: pathlib.Path) -> None:
    from kwflow.core.wire import Output

    for name in ("kwflow-op", "kwflow-id", "kwflow-start-id", "kwflow-request"):
        w = prepared("running")
        headers: tuple[tuple[str, Any], ...] = (("kwflow-op", b"cancel"), (name, b"\xff")) if name != "kwflow-op" else ((name, b"\xff"),)
        w._log(Output(w.config.resume_topic, b"w", b"null", headers, w.now_ms))
        assert letters(w) == ["bad-header"]
