"""Workflows that are moved in an archive, again and again, beside the same workflows that stay: the same becomes of both (decisions 0064, 0065)."""

import pathlib
import random
from collections import Counter
from typing import Any

import pytest

from kwflow.core import dispatch, snapshot, timers
from kwflow.runners.embedded.moving import bring, take
from kwflow.runners.embedded.state import EmbeddedStore
from tests.embedded.test_archive import Clock, Site

SOURCE = """
import kwflow as kw
from tests.embedded.test_archive import archive_case_pay

def main(o):
    seen = []
    said = kw.signals("say")
    while True:
        got = yield said
        seen.append(got)
        if got == "end":
            return seen
        if got == "pay":
            seen.append((yield archive_case_pay(1)))
        if got == "sleep":
            yield kw.sleep(60)
        if got == "both":
            seen.append((yield kw.all([archive_case_pay(2), kw.sleep(30), kw.suspend()])))
        if got == "race":
            seen.append((yield kw.race([archive_case_pay(3), kw.sleep(30)])))
        if got == "lock":
            lock = __import__("threading").Lock()
            yield kw.suspend("r")
            del lock
        if got == "update":
            asked = yield kw.on_update("u")
            yield kw.suspend()
            kw.reply(asked, "done")
        if got == "wait":
            try:
                seen.append((yield kw.timeout(kw.wait_signal("brief"), 100)))
            except TimeoutError:
                seen.append("late")
        if got == "kid":
            try:
                seen.append((yield kw.start_child("main", None, id=f"kid of {kw.workflow_id()}")))
            except kw.ChildError as error:
                seen.append(error.outcome)
        if got == "child":
            kw.start_child("main", None, id=f"{kw.workflow_id()}-{len(seen)}")

main.kwflow_checkpoints = 3
"""
IDS = ("a", "b", "a", "b", "a", "b", "fork of a", "fork of fork of a", "kid of a")
SAID = ("x", "pay", "sleep", "lock", "child", "kid", "update", "wait", "end")
MADE_ANEW = (b"moves", b"code", b"ended")
Op = tuple[Any, ...]


def drawn(chance: random.Random) -> Op:
    id = chance.choice(IDS)
    return chance.choice([
        ("start", id), ("anew", id), ("say", id, chance.choice(SAID)), ("say", id, chance.choice(SAID)), ("brief", id, chance.choice([1, 40])), ("update", id),
        ("say", id, "pay"), ("say", id, "race"), ("say", id, "both"), ("later", id),
        *(("answer", id, number) for number in (0, 1, 0, 1)),
        ("wait", chance.choice([1, 31, 61, 101, 90_000])), ("rewind", id, chance.randrange(4)), ("fork", id, None), ("fork", id, chance.randrange(4)), ("cancel", id),
        ("pause", id), ("unpause", id), ("retry", id), ("discard", id), ("terminate", id),
    ])  # fmt: skip


def do(site: Site, kind: str, *told: Any) -> None:
    if kind == "wait":
        site.clock.ms += told[0] * 1000
    elif kind in ("start", "anew"):
        site.send(told[0], "new", **({"start_id": f"run of {told[0]}"} if kind == "start" else {}))
    elif kind == "brief":
        site.send(told[0], {"name": "brief", "value": 1, "ttl_ms": told[1] * 1000}, "signal")
    elif kind == "update":
        headers = {"kwflow-op": b"update", "kwflow-id": b"the update", "kwflow-request": b"7", "kwflow-reply-to": b"0/client"}
        site.engine.append(site.config.resume_topic, told[0].encode(), b'{"name":"u","value":1}', tuple(headers.items()))
    elif kind in ("say", "later"):
        site.say(told[0], told[1] if kind == "say" else "x", work=kind == "say")
    elif kind == "answer":
        stored = site.state().get(told[0].encode())
        waits = [wait["ref"] for wait in snapshot.read_header(stored)["waits"] if wait["kind"] in ("activity", "suspension")] if stored is not None else []
        if waits:
            site.send(told[0], {"ref": waits[told[1] % len(waits)], "value": "ok"})
    else:
        site.send(told[0], {"rewind": {"to": told[-1]}, "fork": {"id": f"fork of {told[0]}", "at": told[-1]}}.get(kind, {}), kind)


def left(site: Site) -> Any:
    """What is there, without refs and the log's own numbers: of each snapshot its header; how many other entries there are; and when timers are due."""
    instances, others = {}, Counter[bytes]()
    for key, data in site.state().items():
        if data.startswith(b"KWF1"):
            header = snapshot.read_header(data)
            waits = [(wait["kind"], wait.get("name"), wait.get("attempt")) for wait in header["waits"]]
            instances[key] = header["status"], waits, *(header.get(name) for name in ("checkpoints", "outcome", "mailbox", "updates")), header.get("parked", {}).get("reason")
        elif (kind := key.split(b"\0")[1]) not in MADE_ANEW:
            others[kind] += 1
    due = [timers.due_entries(key)[0] for key, _ in EmbeddedStore(site.engine.db, site.config.timers_changelog_topic).scan(timers.DUE)]
    return instances, others, due


def told(site: Site) -> Counter[Any]:
    """What it has told others: outcomes, and replies to updates."""
    return Counter((topic, record.key, record.value) for topic in (site.config.result_topic, site.config.error_topic, site.config.reply_topic) for record in site.engine.read(topic))


def moved(site: Site) -> Site:
    where = site.engine.directory
    site.close()
    take(site.config, where, where.with_name(f"{where.name}.kwflow"))
    bring(site.config, where.with_name(f"{where.name}.kwflow"), where.with_name(f"{where.name}+"))
    return Site(where.with_name(f"{where.name}+"), site.clock, SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_the_same_becomes_of_workflows_that_move_and_of_those_that_stay(tmp_path: pathlib.Path, seed: int) -> None:
    chance = random.Random(seed)
    ops: list[Op] = [("start", "a"), ("start", "b"), *(drawn(chance) for _ in range(45))]
    stays, moves = Site(tmp_path / "stays", Clock(), SOURCE), Site(tmp_path / "moves", Clock(), SOURCE)
    called: set[bytes] = set()
    told_before = Counter[Any]()
    try:
        for number, op in enumerate(ops):
            before = {key for key in moves.state() if key.startswith(dispatch.PREFIX)}
            for site in (stays, moves):
                do(site, *op)
            if chance.random() < 0.4:
                told_before += told(moves)
                moves = moved(moves)
            stays.work()
            moves.work()
            assert left(moves) == left(stays), f"after {ops[: number + 1]}"
            new = {key for key in moves.state() if key.startswith(dispatch.PREFIX)} - before
            # a rewind makes a call again, and so does a fork under the id of an earlier one, each under its old key
            assert op[0] in ("rewind", "fork") or not called & new, "no call has the ref, and so the idempotency key, of an earlier one"
            called |= new
        assert told_before + told(moves) == told(stays)
    finally:
        stays.close()
        moves.close()
